//! Orthogonal matrices that mix all features evenly, applied factor by factor.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use tch::{Kind, TchError, Tensor};

/// The largest factor that is applied as a whole.
const LARGEST: usize = 64;
/// Values that are turned together, in fp64.
pub const TURNED_TOGETHER: i64 = 1 << 24;

/// `Q = diag(s) (F₁ ⊗ F₂ ⊗ …)` `[n, n]`, with random signs `s`. For a power of two it is the randomized Hadamard matrix. The
/// factor of the odd part of `n` is the cosine transform's matrix.
pub(super) struct Orthogonal {
    /// `[n]` fp64.
    signs: Tensor,
    /// `[f, f]` fp64 each.
    factors: Vec<Tensor>,
}

impl Orthogonal {
    pub(super) fn new(n: usize, seed: u64) -> Result<Self, TchError> {
        let mut draws = ChaCha8Rng::seed_from_u64(seed);
        let signs: Vec<f64> = (0..n).map(|_| if draws.next_u32() & 1 == 0 { 1.0 } else { -1.0 }).collect();
        let twos = 1 << n.trailing_zeros();
        let mut factors = Vec::new();
        let mut left: usize = twos;
        while left > 1 {
            let factor = left.min(LARGEST);
            factors.push(hadamard(factor)?);
            left /= factor;
        }
        if n / twos > 1 {
            factors.push(cosines(n / twos)?);
        }
        Ok(Self { signs: Tensor::f_from_slice(&signs)?, factors })
    }

    /// `x Q`, for `x` `[…, n]` on the CPU, in fp32.
    pub(super) fn turn(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let n = self.signs.size()[0];
        let rows = x.f_reshape([-1, n])?;
        let turned = rows.f_empty_like()?.f_to_kind(Kind::Float)?;
        let count = rows.size()[0];
        let step = (TURNED_TOGETHER / n).max(1);
        for first in (0..count).step_by(step as usize) {
            let size = step.min(count - first);
            let mut part = rows.f_narrow(0, first, size)?.f_to_kind(Kind::Double)?.f_mul(&self.signs)?;
            let mut before = 1;
            for factor in &self.factors {
                let f = factor.size()[0];
                let after = n / (before * f);
                part = factor.f_tr()?.f_matmul(&part.f_reshape([size * before, f, after])?)?;
                before *= f;
            }
            turned.f_narrow(0, first, size)?.f_copy_(&part.f_reshape([size, n])?)?;
        }
        turned.f_reshape(x.size())
    }
}

/// Sylvester's, of a power of two, orthonormal.
fn hadamard(n: usize) -> Result<Tensor, TchError> {
    let sign = |i: usize| if ((i / n) & (i % n)).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    let values: Vec<f64> = (0..n * n).map(|i| sign(i) / (n as f64).sqrt()).collect();
    Tensor::f_from_slice(&values)?.f_reshape([n as i64, n as i64])
}

/// The matrix of the cosine transform (DCT-II), orthonormal.
fn cosines(n: usize) -> Result<Tensor, TchError> {
    let value = |i: usize| {
        let (row, column) = ((i / n) as f64, (i % n) as f64);
        let scale = if row == 0.0 { 1.0 } else { 2.0 } / n as f64;
        scale.sqrt() * (std::f64::consts::PI / n as f64 * (column + 0.5) * row).cos()
    };
    let values: Vec<f64> = (0..n * n).map(value).collect();
    Tensor::f_from_slice(&values)?.f_reshape([n as i64, n as i64])
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn it_keeps_lengths_and_angles_and_mixes_all_features() {
        for n in [1, 3, 64, 96, 384, 4096, 28 * 32] {
            let q = Orthogonal::new(n, 7).unwrap();
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
        let q = Orthogonal::new(96, 7).unwrap();
        let matrix = q.turn(&Tensor::eye(96, (Kind::Double, Device::Cpu))).unwrap();
        let x = Tensor::randn([5, 2, 96], (Kind::Float, Device::Cpu));
        assert!(q.turn(&x).unwrap().allclose(&x.matmul(&matrix), 1e-5, 1e-5, false));
    }
}
