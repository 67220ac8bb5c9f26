//! Arithmetic on packed weights.

use rayon::prelude::*;

use crate::pack::PackedView;

/// `y[M,N] = x[M,K] · dequant(W)ᵀ`, fp32, row-major.
pub fn matmul(x: &[f32], rows: usize, w: &PackedView<'_>, y: &mut [f32]) {
    let (k, n) = (w.in_features(), w.out_features());
    let mut dense = vec![0.0; k * n];
    dequantize_into(w, &mut dense);
    y.par_chunks_mut(n).zip(x.par_chunks(k)).take(rows).for_each(|(y, x)| {
        y.fill(0.0);
        for (x, w) in x.iter().zip(dense.chunks(n)) {
            for (y, w) in y.iter_mut().zip(w) {
                *y += x * w;
            }
        }
    });
}

/// The dense weight, transposed: `[K, N]`.
pub fn dequantize_into(w: &PackedView<'_>, out: &mut [f32]) {
    let n = w.out_features();
    let (codes, zeros) = (w.unpack_codes(), w.unpack_stored_zeros());
    let offset = i32::from(w.format().zero_offset());
    out.par_chunks_mut(n).zip(codes.par_chunks(n)).zip(w.g_idx()).for_each(|((out, codes), &g)| {
        let group = g as usize * n..(g as usize + 1) * n;
        for (((out, &code), scale), &zero) in
            out.iter_mut().zip(codes).zip(&w.scales()[group.clone()]).zip(&zeros[group])
        {
            *out = scale.to_f32() * (i32::from(code) - i32::from(zero) - offset) as f32;
        }
    });
}
