//! `H = 1/T Σ x xᵀ` over the calibration tokens that reach a linear.

use tch::{Device, Kind, Tensor};

use super::raw;
use crate::error::{Error, Result, TorchContext};

/// Rows of `H` computed by one matrix product. Only blocks on and below the diagonal are computed, so smaller
/// blocks waste less on the diagonal, larger ones run nearer to the machine's limit.
const BLOCK: i64 = 1024;

/// The Hessian of a stage's inputs, accumulated in fp32 in the order in which batches arrive.
#[derive(Debug)]
pub struct Hessian {
    /// `[K, K]` fp32; while accumulating only the lower block triangle is valid.
    matrix: Tensor,
    tokens: u64,
    finished: bool,
}

impl Hessian {
    /// An empty Hessian for `in_features` inputs.
    ///
    /// # Errors
    /// When libtorch cannot allocate it.
    pub fn new(in_features: usize, device: Device) -> Result<Self> {
        let k = in_features as i64;
        let matrix = Tensor::f_zeros([k, k], (Kind::Float, device)).torch("allocate a Hessian")?;
        Ok(Self { matrix, tokens: 0, finished: false })
    }

    /// Adds a batch of inputs `[…, K]`.
    ///
    /// # Errors
    /// When libtorch cannot compute it.
    pub fn add(&mut self, inputs: &Tensor) -> Result<()> {
        debug_assert!(!self.finished, "a finished Hessian takes no more inputs");
        self.accumulate(inputs).torch("accumulate a Hessian")
    }

    fn accumulate(&mut self, inputs: &Tensor) -> Result<(), tch::TchError> {
        let k = self.matrix.size()[0];
        let x = inputs.f_reshape([-1, k])?.f_to_kind(Kind::Float)?;
        for start in (0..k).step_by(BLOCK as usize) {
            let rows = BLOCK.min(k - start);
            let mut block = self.matrix.f_narrow(0, start, rows)?.f_narrow(1, 0, start + rows)?;
            let left = x.f_narrow(1, start, rows)?.f_tr()?;
            let right = x.f_narrow(1, 0, start + rows)?;
            let _ = block.f_addmm_(&left, &right)?;
        }
        self.tokens += x.size()[0] as u64;
        Ok(())
    }

    /// Ends the accumulation: divides by the number of tokens and mirrors the lower triangle. `stage` names the
    /// inputs in errors.
    ///
    /// # Errors
    /// When any input was NaN or infinite, or all were zero.
    pub fn finish(mut self, stage: &str) -> Result<Self> {
        let scaled = self.matrix.f_div_scalar_(self.tokens.max(1) as f64);
        drop(scaled.torch("scale a Hessian")?);
        self.mirror().torch("mirror a Hessian")?;
        self.finished = true;
        let diagonal = self.diagonal()?;
        let broken = diagonal.iter().filter(|d| !d.is_finite()).count() as u64;
        if broken > 0 {
            let (place, total) = (format!("inputs of {stage}"), diagonal.len() as u64);
            return Err(Error::NonFinite { place, count: broken, total });
        }
        if diagonal.iter().all(|&d| d == 0.0) {
            return Err(Error::EmptyHessian { stage: stage.to_owned() });
        }
        Ok(self)
    }

    fn mirror(&mut self) -> Result<(), tch::TchError> {
        if self.matrix.device() == Device::Cpu {
            raw::mirror_lower(&self.matrix);
            return Ok(());
        }
        let k = self.matrix.size()[0];
        for start in (0..k).step_by(BLOCK as usize) {
            let rows = BLOCK.min(k - start);
            let below = self.matrix.f_narrow(0, start, rows)?.f_narrow(1, 0, start)?;
            self.matrix.f_narrow(0, 0, start)?.f_narrow(1, start, rows)?.f_copy_(&below.f_tr()?)?;
        }
        Ok(())
    }

    /// `[K, K]` fp32, symmetric.
    pub fn matrix(&self) -> &Tensor {
        debug_assert!(self.finished);
        &self.matrix
    }

    /// `K`.
    pub fn in_features(&self) -> usize {
        self.matrix.size()[0] as usize
    }

    /// Calibration tokens seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The diagonal, `[K]`.
    ///
    /// # Errors
    /// When libtorch cannot copy it.
    pub fn diagonal(&self) -> Result<Vec<f32>> {
        let copy = || Vec::<f32>::try_from(self.matrix.f_diagonal(0, 0, 1)?.f_contiguous()?);
        copy().torch("read a Hessian's diagonal")
    }

    /// `‖W X‖² / T = tr(W H Wᵀ)` of a weight `[N, K]`: the mean squared length of the linear's output.
    ///
    /// Computed in `kind`; bf16 is within 0.2% (its rounding errors average out over `N·K` terms) and several times as
    /// fast where the processor has it.
    ///
    /// # Errors
    /// When libtorch cannot compute it.
    pub fn output_energy(&self, weight: &Tensor, kind: Kind) -> Result<f64> {
        let energy = || -> Result<f64, tch::TchError> {
            let k = self.matrix.size()[0];
            let weight = weight.f_to_kind(kind)?.f_contiguous()?;
            let mut sum = 0.0;
            // H is symmetric: each block left of the diagonal stands for the one above it too.
            for start in (0..k).step_by(BLOCK as usize) {
                let rows = BLOCK.min(k - start);
                let h =
                    self.matrix.f_narrow(0, start, rows)?.f_narrow(1, 0, start + rows)?.f_to_kind(kind)?;
                let product = weight.f_narrow(1, start, rows)?.f_mm(&h)?;
                let [left, corner] = inner_products(&product, &weight, start)?;
                sum += 2.0 * left + corner;
            }
            Ok(sum)
        };
        energy().torch("measure a linear's output")
    }
}

/// `Σ product ∘ weight` over the columns before and from `split` on; `product` `[N, C]`, `weight` `[N, K]`, `C ≤ K`.
fn inner_products(product: &Tensor, weight: &Tensor, split: i64) -> Result<[f64; 2], tch::TchError> {
    if (product.device(), product.kind()) == (Device::Cpu, Kind::BFloat16) {
        return Ok(raw::inner_products_bf16(product, weight, split as usize));
    }
    let columns = product.size()[1];
    let sum = |first: i64, count: i64| -> Result<f64, tch::TchError> {
        let part = |t: &Tensor| t.f_narrow(1, first, count)?.f_to_kind(Kind::Float);
        f64::try_from(part(product)?.f_mul(&part(weight)?)?.f_sum(Kind::Double)?)
    };
    Ok([sum(0, split)?, sum(split, columns - split)?])
}
