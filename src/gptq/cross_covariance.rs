//! Cross-covariance of the quantized model's activations with their difference to the reference model's.

use tch::{Device, Kind, TchError, Tensor};

use super::tensor_cores;
use crate::error::{Error, Result, TorchContext};

/// `D = 1/T Σ (x̂ − x) xᵀ` over the calibration tokens that reach a linear: `x` is what it gets behind the quantized layers,
/// `x̂` what it gets in the unquantized model. With it a linear can aim at `W x̂` (GPTAQ, arXiv 2504.02692): the weight whose
/// outputs come nearest to that is `W + W D H⁻¹`.
#[derive(Debug)]
pub struct CrossCovariance {
    /// `[K, K]` fp32; before the first batch it means nothing.
    matrix: Tensor,
    tokens: u64,
}

impl CrossCovariance {
    /// Nothing yet, for `in_features` inputs.
    ///
    /// # Errors
    /// When libtorch cannot allocate it.
    pub fn new(in_features: usize, device: Device) -> Result<Self> {
        let k = in_features as i64;
        let matrix = Tensor::f_empty([k, k], (Kind::Float, device)).torch("allocate a cross-covariance")?;
        Ok(Self { matrix, tokens: 0 })
    }

    /// Adds a batch: `inputs` are `x` and `dense` are `x̂` of the same tokens, `[…, K]` of one kind.
    ///
    /// # Errors
    /// When libtorch cannot compute it.
    pub fn add(&mut self, inputs: &Tensor, dense: &Tensor) -> Result<()> {
        self.accumulate(inputs, dense).torch("accumulate a cross-covariance")
    }

    fn accumulate(&mut self, inputs: &Tensor, dense: &Tensor) -> Result<(), TchError> {
        let k = self.matrix.size()[0];
        let x = inputs.f_reshape([-1, k])?;
        let off = dense.f_reshape([-1, k])?.f_sub(&x)?;
        let first = self.tokens == 0;
        self.tokens += x.size()[0] as u64;
        // Rounding errors of what is small beside H need no check.
        if tensor_cores::can_multiply(&x) {
            match first {
                true => drop(off.f_tr()?.f_mm_dtype_out(&self.matrix, &x, Kind::Float)?),
                false => drop(self.matrix.f_addmm_dtype_out(&self.matrix, &off.f_tr()?, &x, Kind::Float)?),
            }
            return Ok(());
        }
        let (off, x) = (off.f_to_kind(Kind::Float)?, x.f_to_kind(Kind::Float)?);
        match first {
            true => self.matrix.f_copy_(&off.f_tr()?.f_mm(&x)?),
            false => self.matrix.f_addmm_(&off.f_tr()?, &x).map(drop),
        }
    }

    /// Adds another device's sums over other tokens.
    ///
    /// # Errors
    /// When they cannot be copied.
    pub fn absorb(&mut self, other: Self) -> Result<()> {
        let mut add = || {
            let matrix = other.matrix.f_to_device(self.matrix.device())?;
            match self.tokens {
                0 => self.matrix.f_copy_(&matrix),
                _ => self.matrix.f_add_(&matrix).map(drop),
            }
        };
        if other.tokens > 0 {
            add().torch("add two cross-covariances")?;
        }
        self.tokens += other.tokens;
        Ok(())
    }

    /// Divides the sums by at least so many tokens: where fewer were seen, the others differ by nothing.
    ///
    /// # Errors
    /// When libtorch cannot compute it.
    pub fn spread_over(&mut self, least: u64) -> Result<()> {
        if self.tokens == 0 {
            drop(self.matrix.f_zero_().torch("reset a cross-covariance")?);
        }
        self.tokens = self.tokens.max(least);
        Ok(())
    }

    /// Calibration tokens seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// `α W D` `[N, K]` fp32 of a weight `[N, K]`.
    ///
    /// # Errors
    /// When an input was NaN or infinite (`stage` names them), or libtorch cannot compute it.
    pub fn of(&self, weight: &Tensor, alpha: f64, stage: &str) -> Result<Tensor> {
        let product = || {
            let weight = weight.f_to_kind(Kind::Float)?.f_to_device(self.matrix.device())?;
            weight.f_mm(&self.matrix)?.f_mul_scalar(alpha / self.tokens.max(1) as f64)
        };
        let product = product().torch("multiply a weight with a cross-covariance")?;
        let finite = || i64::try_from(self.matrix.f_isfinite()?.f_sum(Kind::Int64)?);
        let (finite, total) =
            (finite().torch("look at a cross-covariance")? as u64, self.matrix.numel() as u64);
        if finite < total {
            let place = format!("inputs of {stage}, in the unquantized model or behind quantized layers");
            return Err(Error::NonFinite { place, count: total - finite, total, computed: true });
        }
        Ok(product)
    }
}

/// `X` with `X F Fᵀ = B`: `B` `[N, K]`, `F` `[K, K]` triangular, `upper` or lower.
pub(super) fn divided(b: &Tensor, factor: &Tensor, upper: bool) -> Result<Tensor, TchError> {
    let half = factor.f_tr()?.f_linalg_solve_triangular(b, !upper, false, false)?;
    factor.f_linalg_solve_triangular(&half, upper, false, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weight_aimed_at_has_the_least_error() {
        tch::manual_seed(3);
        let options = (Kind::Double, Device::Cpu);
        let x = Tensor::randn([300, 12], options);
        let dense = &x + Tensor::randn([300, 12], options) * 0.2 + x.roll([1], [1]) * 0.3;
        let weight = Tensor::randn([5, 12], options);
        let h = x.tr().mm(&x) / 300.0;
        let mut cross = CrossCovariance::new(12, Device::Cpu).unwrap();
        for first in [0, 100] {
            let part =
                |t: &Tensor| t.narrow(0, first, if first == 0 { 100 } else { 200 }).to_kind(Kind::Float);
            cross.add(&part(&x), &part(&dense)).unwrap();
        }
        let error = |w: &Tensor| {
            let off = x.mm(&w.tr()) - dense.mm(&weight.tr());
            f64::try_from(off.square().sum(Kind::Double)).unwrap()
        };
        let lower = h.linalg_cholesky(false);
        let pull = cross.of(&weight, 1.0, "test").unwrap().to_kind(Kind::Double);
        let aimed = &weight + divided(&pull, &lower, false).unwrap();
        let upper = h.flip([0, 1]).linalg_cholesky(false).flip([0, 1]);
        let other = &weight + divided(&pull, &upper, true).unwrap();
        assert!(aimed.allclose(&other, 1e-6, 1e-8, false));
        let least = error(&aimed);
        assert!(least < 0.9 * error(&weight));
        for _ in 0..20 {
            assert!(error(&(&aimed + Tensor::randn([5, 12], options) * 1e-2)) > least);
        }
    }
}
