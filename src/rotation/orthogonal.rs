//! Orthogonal matrices that mix all features evenly, applied without making them.

use pulp::Arch;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;
use tch::{Kind, TchError, Tensor};

/// Values that are copied out of a tensor and turned together.
pub const TURNED_TOGETHER: usize = 1 << 24;

/// `Q = diag(s) (S ⊗ C)` `[n, n]`, with random signs `s`, Sylvester's Hadamard matrix `S` of the power of two in `n`, and the matrix `C` of the
/// cosine transform (DCT-II) of its odd part, both orthonormal.
pub(super) struct Orthogonal {
    /// `[n]`.
    signs: Vec<f64>,
    /// `C` `[odd, odd]`.
    cosines: Vec<f64>,
    odd: usize,
}

impl Orthogonal {
    pub(super) fn new(n: usize, seed: u64) -> Self {
        let mut draws = ChaCha8Rng::seed_from_u64(seed);
        let signs = (0..n).map(|_| if draws.next_u32() & 1 == 0 { 1.0 } else { -1.0 }).collect();
        let odd = n >> n.trailing_zeros();
        Self { signs, cosines: cosines(odd), odd }
    }

    /// `x Q`, for `x` `[…, n]` on the CPU, in fp32.
    pub(super) fn turn(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let n = self.signs.len();
        let rows = x.f_reshape([-1, n as i64])?;
        let turned = Tensor::f_empty(rows.size(), (Kind::Float, x.device()))?;
        let (count, step) = (rows.size()[0], (TURNED_TOGETHER / n).max(1));
        for first in (0..count).step_by(step) {
            let size = (step as i64).min(count - first);
            let part = rows.f_narrow(0, first, size)?.f_to_kind(Kind::Float)?.f_contiguous()?;
            let mut values = Vec::<f32>::try_from(part.f_view([-1])?)?;
            values.par_chunks_mut(n).for_each_init(
                || vec![0.0; n],
                |wide, row| Arch::new().dispatch(|| self.turn_row(row, wide)),
            );
            let values = Tensor::f_from_slice(&values)?.f_view([size, n as i64])?;
            turned.f_narrow(0, first, size)?.f_copy_(&values)?;
        }
        turned.f_reshape(x.size())
    }

    /// Turns a row in fp64; `wide` is a buffer as long.
    #[inline(always)]
    fn turn_row(&self, row: &mut [f32], wide: &mut [f64]) {
        let (n, odd) = (row.len(), self.odd);
        for ((wide, value), sign) in wide.iter_mut().zip(&*row).zip(&self.signs) {
            *wide = f64::from(*value) * sign;
        }
        // The fast Walsh-Hadamard transform.
        let mut half = odd;
        while half < n {
            for both in wide.chunks_exact_mut(2 * half) {
                let (left, right) = both.split_at_mut(half);
                for (a, b) in left.iter_mut().zip(right) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        let scale = ((n / odd) as f64).sqrt().recip();
        if odd == 1 {
            row.iter_mut().zip(wide).for_each(|(to, value)| *to = (*value * scale) as f32);
            return;
        }
        for (to, from) in row.chunks_exact_mut(odd).zip(wide.chunks_exact(odd)) {
            for (c, to) in to.iter_mut().enumerate() {
                let column = self.cosines[c..].iter().step_by(odd);
                *to = (scale * from.iter().zip(column).map(|(a, b)| a * b).sum::<f64>()) as f32;
            }
        }
    }
}

/// The orthonormal matrix of the cosine transform.
fn cosines(n: usize) -> Vec<f64> {
    let value = |i: usize| {
        let (row, column) = ((i / n) as f64, (i % n) as f64);
        let scale = if row == 0.0 { 1.0 } else { 2.0 } / n as f64;
        scale.sqrt() * (std::f64::consts::PI / n as f64 * (column + 0.5) * row).cos()
    };
    (0..n * n).map(value).collect()
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn it_keeps_lengths_and_angles_and_mixes_all_features() {
        for n in [1, 3, 64, 96, 384, 4096, 28 * 32] {
            let q = Orthogonal::new(n, 7);
            let size = n as i64;
            let matrix = q.turn(&Tensor::eye(size, (Kind::Double, Device::Cpu))).unwrap();
            let product = matrix.mm(&matrix.tr());
            assert!(
                product.allclose(&Tensor::eye(size, (Kind::Float, Device::Cpu)), 0.0, 1e-5, false),
                "{n}"
            );
            let largest = f64::try_from(matrix.abs().max()).unwrap();
            assert!(largest <= 1.42 / (n as f64).sqrt() + 1e-6, "{n}: {largest}");
        }
    }

    #[test]
    fn rows_are_turned_as_by_the_matrix() {
        let q = Orthogonal::new(96, 7);
        let matrix = q.turn(&Tensor::eye(96, (Kind::Double, Device::Cpu))).unwrap();
        let x = Tensor::randn([5, 2, 96], (Kind::Float, Device::Cpu));
        assert!(q.turn(&x).unwrap().allclose(&x.matmul(&matrix), 1e-5, 1e-5, false));
    }
}
