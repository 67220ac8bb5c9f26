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
///
/// For weights with less than half as many rows as columns the sums are those of `W D`, `1/T Σ W (x̂ − x) xᵀ`. They take
/// `4 N K` operations a token instead of `2 K²`, and less memory.
#[derive(Debug)]
pub struct CrossCovariance {
    /// `[K, K]` fp32, or `[N, K]` if there are weights; undefined before the first batch.
    matrix: Tensor,
    /// `W` `[N, K]` in the kind of the inputs, if the sums are those of `W D`.
    weights: Option<Tensor>,
    /// Whether the inputs are bf16, on the CPU.
    bf16: bool,
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
        Ok(Self { matrix, weights: None, bf16: false, tokens: 0 })
    }

    /// Whether the sums for weights with so many rows and columns are those of `W D`.
    pub fn sums_products(rows: u64, columns: u64) -> bool {
        2 * rows < columns
    }

    /// An empty cross-covariance for weights `[N, K]` that share inputs of `kind`. Its sums are those of
    /// `W D` where [`CrossCovariance::sums_products`] is true.
    ///
    /// # Errors
    /// When libtorch cannot allocate it or convert the weights.
    pub fn of_weights(weights: &[&Tensor], kind: Kind, device: Device) -> Result<Self> {
        let k = weights[0].size()[1];
        let rows: i64 = weights.iter().map(|weight| weight.size()[0]).sum();
        if !Self::sums_products(rows as u64, k as u64) {
            return Self::new(k as usize, device);
        }
        let allocate = || -> Result<(Tensor, Tensor), TchError> {
            let weights = Tensor::f_cat(weights, 0)?.f_to_device(device)?.f_to_kind(kind)?;
            Ok((Tensor::f_empty([rows, k], (Kind::Float, device))?, weights))
        };
        let (matrix, weights) = allocate().torch("allocate a cross-covariance")?;
        Ok(Self { matrix, weights: Some(weights), bf16: false, tokens: 0 })
    }

    /// Adds a batch: `inputs` are `x` and `dense` are `x̂` of the same tokens, both `[…, K]` and of the same kind.
    ///
    /// # Errors
    /// When libtorch cannot compute it.
    pub fn add(&mut self, inputs: &Tensor, dense: &Tensor) -> Result<()> {
        self.accumulate(inputs, dense).torch("accumulate a cross-covariance")
    }

    fn accumulate(&mut self, inputs: &Tensor, dense: &Tensor) -> Result<(), TchError> {
        let k = self.matrix.size()[1];
        let x = inputs.f_reshape([-1, k])?;
        let mut off = dense.f_reshape([-1, k])?.f_sub(&x)?;
        if let Some(weights) = &self.weights {
            off = off.f_mm(&weights.f_tr()?)?;
        }
        let first = self.tokens == 0;
        let tokens = x.size()[0] as u64;
        self.bf16 = (x.kind(), x.device()) == (Kind::BFloat16, Device::Cpu);
        self.add_product(&off, &x, first)?;
        self.tokens += tokens;
        Ok(())
    }

    fn add_product(&mut self, off: &Tensor, x: &Tensor, first: bool) -> Result<(), TchError> {
        let k = self.matrix.size()[1];
        if self.bf16 && amx::has_bf16_products() {
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

    /// Floating-point operations of adding a token.
    pub fn operations(&self) -> f64 {
        let (rows, k) = (self.matrix.size()[0] as f64, self.matrix.size()[1] as f64);
        let products = if self.weights.is_some() { 2.0 } else { 1.0 };
        products * 2.0 * rows * k
    }

    /// Number of calibration tokens.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Whether the sums are those of `W D`, for the weights that it was made for.
    pub(super) fn is_product(&self) -> bool {
        self.weights.is_some()
    }

    /// The kind in which products with the finished sums are computed: bf16 if the inputs are, where the processor multiplies that
    /// faster. `W D` is a small correction, and bf16 inputs are less exact than its rounding.
    pub(super) fn product_kind(&self) -> Kind {
        if self.bf16 && amx::has_bf16_products() { Kind::BFloat16 } else { Kind::Float }
    }

    /// `α D` `[K, K]` fp32, or `α W D` `[N, K]`.
    ///
    /// # Errors
    /// When an input was NaN or infinite (`stage` names the inputs), or libtorch cannot compute it.
    pub(super) fn finish(&self, alpha: f64, stage: &str) -> Result<Tensor> {
        let total = self.matrix.numel() as u64;
        let count = match self.matrix.device() {
            Device::Cpu => raw::count_non_finite(&self.matrix),
            _ => {
                let finite = || i64::try_from(self.matrix.f_isfinite()?.f_sum(Kind::Int64)?);
                total - finite().torch("look at a cross-covariance")? as u64
            }
        };
        if count > 0 {
            let place = format!("inputs of {stage}, in the unquantized model or behind quantized layers");
            return Err(Error::NonFinite { place, count, total, computed: true });
        }
        let scale = alpha / self.tokens.max(1) as f64;
        self.matrix.f_mul_scalar(scale).torch("scale a cross-covariance")
    }
}
