//! The result of a solve: codes, scales, zeros and groups of one linear, unpacked.

use half::{f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use crate::variant::Bits;

/// A quantized linear. `Ŵ[n, k] = scales[g_idx[k], n] · (codes[k, n] − zeros[g_idx[k], n])`.
///
/// Stored transposed, with the output feature as the fastest axis, as in the checkpoint format.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedLinear {
    bits: Bits,
    in_features: usize,
    out_features: usize,
    codes: Vec<u8>,
    scales: Vec<f16>,
    zeros: Vec<u8>,
    g_idx: Vec<u32>,
}

impl QuantizedLinear {
    /// `codes` `[K, N]`, `scales` and `zeros` `[G, N]`, `g_idx` `[K]`.
    ///
    /// # Panics
    /// When the lengths contradict each other, which is an error of the solver.
    pub fn new(bits: Bits, codes: Vec<u8>, scales: Vec<f16>, zeros: Vec<u8>, g_idx: Vec<u32>) -> Self {
        let in_features = g_idx.len();
        assert!(in_features > 0 && codes.len().is_multiple_of(in_features), "codes are [K, N]");
        let out_features = codes.len() / in_features;
        let groups = g_idx.iter().max().map_or(0, |&g| g as usize + 1);
        assert_eq!(scales.len(), groups * out_features, "scales are [G, N]");
        assert_eq!(zeros.len(), groups * out_features, "zeros are [G, N]");
        debug_assert!(
            codes.iter().chain(&zeros).all(|&c| c <= bits.max_code()),
            "codes and zeros fit the bits"
        );
        Self { bits, in_features, out_features, codes, scales, zeros, g_idx }
    }

    /// Joins `parts`, which hold some output features each and share their groups: the `i`-th output feature of the
    /// concatenated parts becomes output feature `rows[i]`.
    ///
    /// # Panics
    /// When there are no parts, or the number of their output features is not that of `rows`.
    pub fn joined(parts: &[Self], rows: &[i64]) -> Self {
        fn gather<T: Copy + Default + Send + Sync>(parts: &[(&[T], usize)], rows: &[i64]) -> Vec<T> {
            let n = rows.len();
            let lines = parts.first().map_or(0, |(values, width)| values.len() / width);
            let mut all = vec![T::default(); lines * n];
            all.par_chunks_mut(n).enumerate().for_each(|(line, to)| {
                let from = parts.iter().flat_map(|(values, width)| &values[line * width..][..*width]);
                for (&value, &row) in from.zip(rows) {
                    to[row as usize] = value;
                }
            });
            all
        }
        let first = parts.first().expect("a linear has parts");
        assert_eq!(parts.iter().map(|part| part.out_features).sum::<usize>(), rows.len());
        let of = |part: &'_ Self| part.out_features;
        let codes: Vec<_> = parts.iter().map(|part| (&part.codes[..], of(part))).collect();
        let scales: Vec<_> = parts.iter().map(|part| (&part.scales[..], of(part))).collect();
        let zeros: Vec<_> = parts.iter().map(|part| (&part.zeros[..], of(part))).collect();
        let (codes, scales, zeros) = (gather(&codes, rows), gather(&scales, rows), gather(&zeros, rows));
        Self::new(first.bits, codes, scales, zeros, first.g_idx.clone())
    }

    /// The same codes with other scales `[G, N]`.
    ///
    /// # Panics
    /// When their number differs.
    pub fn with_scales(self, scales: Vec<f16>) -> Self {
        assert_eq!(scales.len(), self.scales.len(), "scales are [G, N]");
        Self { scales, ..self }
    }

    /// Bits a code.
    pub fn bits(&self) -> Bits {
        self.bits
    }

    /// `K`.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// `N`.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// `G`.
    pub fn groups(&self) -> usize {
        self.scales.len() / self.out_features
    }

    /// `[K, N]`.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// `[G, N]`.
    pub fn scales(&self) -> &[f16] {
        &self.scales
    }

    /// The true zero points, `[G, N]`.
    pub fn zeros(&self) -> &[u8] {
        &self.zeros
    }

    /// The group of each input feature, `[K]`.
    pub fn g_idx(&self) -> &[u32] {
        &self.g_idx
    }

    /// The dense weight, transposed: `[K, N]`; `convert` is applied to each value, which is exact in f32.
    pub fn dequantize<T: Send + Copy + Default>(&self, convert: impl Fn(f32) -> T + Sync) -> Vec<T> {
        let mut dense = vec![T::default(); self.codes.len()];
        self.dequantize_into(&mut dense, convert);
        dense
    }

    /// [`QuantizedLinear::dequantize`] into existing memory.
    ///
    /// # Panics
    /// When `dense` has not `K·N` elements.
    pub fn dequantize_into<T: Send>(&self, dense: &mut [T], convert: impl Fn(f32) -> T + Sync) {
        assert_eq!(dense.len(), self.codes.len(), "[K, N]");
        let n = self.out_features;
        let mut all_scales = vec![0.0f32; self.scales.len()];
        self.scales.convert_to_f32_slice(&mut all_scales);
        dense.par_chunks_mut(n).zip(self.codes.par_chunks(n)).zip(&self.g_idx).for_each(
            |((out, codes), &g)| {
                let group = g as usize * n..(g as usize + 1) * n;
                let (scales, zeros) = (&all_scales[group.clone()], &self.zeros[group]);
                for (((out, &code), scale), &zero) in out.iter_mut().zip(codes).zip(scales).zip(zeros) {
                    *out = convert(scale * (f32::from(code) - f32::from(zero)));
                }
            },
        );
    }
}
