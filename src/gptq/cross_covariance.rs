//! Cross-covariance of the quantized model's activations with their difference to the reference model's.

use tch::{Device, Kind, TchError, Tensor};

use super::{hessian::add_sums, raw, tensor_cores};
use crate::{
    amx,
    error::{Error, Result, TorchContext},
};

/// `D = 1/T Σ (x̂ − x) xᵀ` over the calibration tokens of a linear: `x` is its input in the quantized model, `x̂` its input in
/// the reference model. The target of asymmetric calibration (GPTAQ, arXiv 2504.02692), the weight whose outputs on `x` come
/// nearest to `W x̂`, is `W + W D H⁻¹`.
#[derive(Debug)]
pub struct CrossCovariance {
    /// `[K, K]` fp32; undefined before the first batch.
    matrix: Tensor,
    tokens: u64,
}

impl CrossCovariance {
    /// An empty cross-covariance for `in_features` inputs.
    ///
    /// # Errors
    /// When libtorch cannot allocate it.
    pub fn new(in_features: usize, device: Device) -> Result<Self> {
        let k = in_features as i64;
        let matrix = Tensor::f_empty([k, k], (Kind::Float, device)).torch("allocate a cross-covariance")?;
        Ok(Self { matrix, tokens: 0 })
    }

    /// Adds a batch: `inputs` are `x` and `dense` are `x̂` of the same tokens, both `[…, K]` and of the same kind.
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
        let tokens = x.size()[0] as u64;
        self.add_product(&off, &x, first)?;
        self.tokens += tokens;
        Ok(())
    }

    fn add_product(&mut self, off: &Tensor, x: &Tensor, first: bool) -> Result<(), TchError> {
        let k = self.matrix.size()[0];
        if (x.kind(), x.device()) == (Kind::BFloat16, Device::Cpu) && amx::has_bf16_products() {
            let (off, x) = (off.f_contiguous()?, x.f_contiguous()?);
            let (off, x) = (raw::bf16_bits(&off), raw::bf16_bits(&x));
            amx::cross_gram(raw::floats_mut(&mut self.matrix), k as usize, off, x, !first);
            return Ok(());
        }
        // The matrix is small beside H, so that its rounding errors need no check.
        if tensor_cores::can_multiply(x) {
            match first {
                true => drop(off.f_tr()?.f_mm_dtype_out(&self.matrix, x, Kind::Float)?),
                false => drop(self.matrix.f_addmm_dtype_out(&self.matrix, &off.f_tr()?, x, Kind::Float)?),
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
    /// When the sums cannot be copied.
    pub fn absorb(&mut self, other: Self) -> Result<()> {
        if other.tokens > 0 {
            let moved = other.matrix.f_to_device(self.matrix.device());
            let added = moved.and_then(|more| add_sums(&mut self.matrix, self.tokens, &more));
            added.torch("add two cross-covariances")?;
        }
        self.tokens += other.tokens;
        Ok(())
    }

    /// Divides the sums by at least `least` tokens; missing tokens count as tokens without a difference.
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

    /// `α D` `[K, K]` fp32.
    ///
    /// # Errors
    /// When an input was NaN or infinite (`stage` names the inputs), or libtorch cannot compute it.
    pub(super) fn finish(&self, alpha: f64, stage: &str) -> Result<Tensor> {
        let finite = || i64::try_from(self.matrix.f_isfinite()?.f_sum(Kind::Int64)?);
        let (finite, total) =
            (finite().torch("look at a cross-covariance")? as u64, self.matrix.numel() as u64);
        if finite < total {
            let place = format!("inputs of {stage}, in the unquantized model or behind quantized layers");
            return Err(Error::NonFinite { place, count: total - finite, total, computed: true });
        }
        let scale = alpha / self.tokens.max(1) as f64;
        self.matrix.f_mul_scalar(scale).torch("scale a cross-covariance")
    }
}
