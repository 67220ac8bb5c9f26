//! Cross-covariance of the quantized model's activations with their difference to the reference model's.

use std::ops::Range;

use tch::{Device, Kind, TchError, Tensor};

use super::{
    hessian::{add_sums, bf16_block, blocks, takes_bf16_products},
    raw, tensor_cores,
};
use crate::{
    amx,
    error::{Error, Result, TorchContext},
    products,
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
    /// `W` `[N, K]` in `kind`, if the sums are those of `W D`.
    weights: Option<products::Weight>,
    /// The kind that inputs and their differences are multiplied in. Differences are taken before, and relative to them its rounding
    /// is small.
    kind: Kind,
    tokens: u64,
}

impl CrossCovariance {
    /// An empty cross-covariance for `in_features` inputs, which are multiplied in `kind`.
    ///
    /// # Errors
    /// When libtorch cannot allocate it.
    pub fn new(in_features: usize, kind: Kind, device: Device) -> Result<Self> {
        let k = in_features as i64;
        let matrix = Tensor::f_empty([k, k], (Kind::Float, device)).torch("allocate a cross-covariance")?;
        Ok(Self { matrix, weights: None, kind, tokens: 0 })
    }

    /// Whether the sums for weights with so many rows and columns are those of `W D`.
    pub fn sums_products(rows: u64, columns: u64) -> bool {
        2 * rows < columns
    }

    /// An empty cross-covariance for weights `[N, K]` that share inputs, which are multiplied in `kind`. Its sums are those of
    /// `W D` where [`CrossCovariance::sums_products`] is true.
    ///
    /// # Errors
    /// When libtorch cannot allocate it or convert the weights.
    pub fn of_weights(weights: &[&Tensor], kind: Kind, device: Device) -> Result<Self> {
        let k = weights[0].size()[1];
        let rows: i64 = weights.iter().map(|weight| weight.size()[0]).sum();
        if !Self::sums_products(rows as u64, k as u64) {
            return Self::new(k as usize, kind, device);
        }
        let allocate = || -> Result<(Tensor, products::Weight), TchError> {
            let weights = Tensor::f_cat(weights, 0)?.f_to_device(device)?.f_to_kind(kind)?;
            Ok((Tensor::f_empty([rows, k], (Kind::Float, device))?, products::Weight::new(&weights)?))
        };
        let (matrix, weights) = allocate().torch("allocate a cross-covariance")?;
        Ok(Self { matrix, weights: Some(weights), kind, tokens: 0 })
    }

    /// Adds a batch: `inputs` are `x` and `dense` are `x̂` of the same tokens, both `[…, K]` and of the same kind.
    ///
    /// # Errors
    /// When libtorch cannot compute it.
    pub fn add(&mut self, inputs: &Tensor, dense: &Tensor) -> Result<()> {
        self.accumulate(inputs, dense).torch("accumulate a cross-covariance")
    }

    fn accumulate(&mut self, inputs: &Tensor, dense: &Tensor) -> Result<(), TchError> {
        let off = self.off(inputs, dense)?;
        let [rows, k] = self.shape();
        let x = inputs.f_reshape([-1, k])?.f_to_kind(self.kind)?;
        self.add_to_rows(&off, &x, &(0..rows), self.tokens == 0)?;
        self.tokens += x.size()[0] as u64;
        Ok(())
    }

    /// `[rows, K]` of the sums.
    fn shape(&self) -> [i64; 2] {
        [self.matrix.size()[0], self.matrix.size()[1]]
    }

    /// `x̂ − x` `[T, K]` of a batch, or `W (x̂ − x)` `[T, N]`.
    fn off(&self, inputs: &Tensor, dense: &Tensor) -> Result<Tensor, TchError> {
        let k = self.shape()[1];
        let off = dense.f_reshape([-1, k])?.f_sub(&inputs.f_reshape([-1, k])?)?.f_to_kind(self.kind)?;
        match &self.weights {
            Some(weights) => weights.linear(&off, None),
            None => Ok(off),
        }
    }

    fn add_to_rows(
        &mut self,
        off: &Tensor,
        x: &Tensor,
        rows: &Range<i64>,
        first: bool,
    ) -> Result<(), TchError> {
        if takes_bf16_products(x.kind(), x.device()) {
            let (k, rows) = (x.size()[1] as usize, rows.start as usize..rows.end as usize);
            let (off, x) = (off.f_contiguous()?, x.f_contiguous()?);
            let (off, x) = (raw::bf16_bits(&off), raw::bf16_bits(&x));
            amx::cross_gram(raw::floats_mut(&mut self.matrix), k, rows, off, x, !first);
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

    /// Blocks of rows that inputs of `kind` can be added to one after another, with [`CrossCovariance::add_to_block`]: all rows at once
    /// where products are libtorch's. The sums are the same as those of [`CrossCovariance::add`].
    pub fn row_blocks(&self, kind: Kind) -> Vec<Range<i64>> {
        let rows = self.shape()[0];
        let in_parts = takes_bf16_products(kind, self.matrix.device());
        blocks(rows, if in_parts { bf16_block(rows) } else { rows })
    }

    /// The sums of one of the [`CrossCovariance::row_blocks`]: a view of its rows.
    ///
    /// # Errors
    /// When libtorch cannot make it.
    pub fn row_block(&self, rows: &Range<i64>) -> Result<Tensor> {
        self.matrix.f_narrow(0, rows.start, rows.end - rows.start).torch("read a cross-covariance")
    }

    /// Factor of the inputs of a batch: `[T, rows]` for inputs `[…, K]` of the quantized and of the reference model.
    ///
    /// # Errors
    /// When libtorch cannot compute it.
    pub fn difference(&self, inputs: &Tensor, dense: &Tensor) -> Result<Tensor> {
        self.off(inputs, dense).torch("accumulate a cross-covariance")
    }

    /// Adds a batch, by its [`CrossCovariance::difference`] and inputs `[…, K]`, to one of the [`CrossCovariance::row_blocks`]; `first`
    /// if it has no tokens yet. The tokens are counted by [`CrossCovariance::count`].
    ///
    /// # Errors
    /// When libtorch cannot compute it.
    pub fn add_to_block(
        &mut self,
        difference: &Tensor,
        inputs: &Tensor,
        rows: &Range<i64>,
        first: bool,
    ) -> Result<()> {
        let x = inputs.f_reshape([-1, self.shape()[1]]).and_then(|x| x.f_to_kind(self.kind));
        let added = x.and_then(|x| self.add_to_rows(difference, &x, rows, first));
        added.torch("accumulate a cross-covariance")
    }

    /// Sets the number of tokens in sums that were added block by block.
    pub fn count(&mut self, tokens: u64) {
        self.tokens = tokens;
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
        let bf16 = (self.kind, self.matrix.device()) == (Kind::BFloat16, Device::Cpu);
        if bf16 && amx::has_bf16_products() { Kind::BFloat16 } else { Kind::Float }
    }

    /// Ends the accumulation: makes the sums those of `α D`, or of `α W D`. `stage` names the inputs in errors.
    ///
    /// # Errors
    /// When an input was NaN or infinite, or libtorch cannot compute it.
    pub fn finish(mut self, alpha: f64, stage: &str) -> Result<Self> {
        let total = self.matrix.numel() as u64;
        let count = raw::count_non_finite(&self.matrix).torch("look at a cross-covariance")?;
        if count > 0 {
            let place = format!("inputs of {stage}, in the unquantized model or behind quantized layers");
            return Err(Error::NonFinite { place, count, total, computed: true });
        }
        let scale = alpha / self.tokens.max(1) as f64;
        drop(self.matrix.f_mul_scalar_(scale).torch("scale a cross-covariance")?);
        Ok(self)
    }

    /// `α D` `[K, K]` fp32, or `α W D` `[N, K]`, once it is finished.
    pub(super) fn finished(&self) -> &Tensor {
        &self.matrix
    }
}
