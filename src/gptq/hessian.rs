//! `H = 1/T Σ x xᵀ` over the calibration tokens that reach a linear.

use std::ops::Range;

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use tch::{Device, Kind, TchError, Tensor};

use super::{raw, tensor_cores};
use crate::{
    amx,
    error::{Error, NumericalError, Result, TorchContext},
};

/// Rows of `H` computed by one matrix product. Only blocks on and below the diagonal are computed, so smaller
/// blocks waste less on the diagonal, larger ones run nearer to the machine's limit.
const BLOCK: i64 = 1024;
/// The same on CUDA: fewer, larger products, each of which fills the device.
const CUDA_BLOCK: i64 = 2048;
/// Blocks of rows that sums are accumulated in one after another, about.
const ROW_BLOCKS: i64 = 32;
/// Rows of a weight that are multiplied together in fp32.
const ROWS: i64 = 1024;
/// Rows up to which the output energy is computed exactly.
const EXACT_ROWS: i64 = 256;
/// Probes for the subspace, and as many for the rest.
const PROBES: i64 = 32;

/// The Hessian of a group of linears, accumulated in fp32 in the order in which batches arrive. On CUDA, products of fp16
/// and bf16 inputs run on tensor cores, unless these are found to be inexact; all others are plain fp32 products. fp16
/// inputs cannot overflow: the square of the largest fp16 number times 10²⁸ tokens is within fp32.
#[derive(Debug)]
pub struct Hessian {
    /// `[K, K]` fp32. Before [`Hessian::finish`] only the lower block triangle is valid; before the first batch, nothing.
    matrix: Tensor,
    tokens: u64,
    /// Blocks of rows that the batch was added to which the device's memory ended in.
    added: usize,
    finished: bool,
    /// Why products do not run on tensor cores, if these inputs showed it.
    warning: Option<String>,
}

impl Hessian {
    /// An empty Hessian for `in_features` inputs.
    ///
    /// # Errors
    /// When libtorch cannot allocate it.
    pub fn new(in_features: usize, device: Device) -> Result<Self> {
        let k = in_features as i64;
        let matrix = Tensor::f_empty([k, k], (Kind::Float, device)).torch("allocate a Hessian")?;
        Ok(Self { matrix, tokens: 0, added: 0, finished: false, warning: None })
    }

    /// An empty Hessian for the same number of inputs, on the same device.
    ///
    /// # Errors
    /// When libtorch cannot allocate it.
    pub fn empty_like(&self) -> Result<Self> {
        Self::new(self.in_features(), self.matrix.device())
    }

    /// Adds a batch of inputs `[…, K]`. After an error it can be called again with the same batch: what was added of it is not
    /// added twice.
    ///
    /// # Errors
    /// When libtorch cannot compute it.
    pub fn add(&mut self, inputs: &Tensor) -> Result<()> {
        debug_assert!(!self.finished, "a finished Hessian takes no more inputs");
        self.accumulate(inputs).torch("accumulate a Hessian")
    }

    fn accumulate(&mut self, inputs: &Tensor) -> Result<(), TchError> {
        let k = self.matrix.size()[0];
        let x = inputs.f_reshape([-1, k])?;
        let first = self.tokens == 0;
        if takes_bf16_products(x.kind(), x.device()) {
            self.add_to_rows(&x, &(0..k), first)?;
        } else if tensor_cores::can_multiply(&x) {
            self.add_products(&x, first)?;
            if first && !tensor_cores::is_known(&x) {
                let error = tensor_cores::largest_error(&self.matrix, &x, self.block())?;
                self.warning = tensor_cores::judge(&x, error);
                if self.warning.is_some() {
                    self.added = 0;
                    self.add_products(&x.f_to_kind(Kind::Float)?, first)?;
                }
            }
        } else {
            self.add_products(&x.f_to_kind(Kind::Float)?, first)?;
        }
        self.added = 0;
        self.tokens += x.size()[0] as u64;
        Ok(())
    }

    /// Whether a batch was added in part.
    pub(crate) fn is_between_batches(&self) -> bool {
        self.added == 0
    }

    fn block(&self) -> i64 {
        block_of(self.matrix.device())
    }

    /// Adds `xᵀx`, on and below the blocks of the diagonal; of fp16 and bf16 on tensor cores.
    fn add_products(&mut self, x: &Tensor, first: bool) -> Result<(), TchError> {
        let k = self.matrix.size()[0];
        for rows in blocks(k, self.block()).into_iter().skip(self.added) {
            #[cfg(test)]
            fault::check()?;
            self.add_to_rows(x, &rows, first)?;
            self.added += 1;
        }
        Ok(())
    }

    /// Adds `xᵀx` to some rows, up to the end of their diagonal block.
    fn add_to_rows(&mut self, x: &Tensor, rows: &Range<i64>, first: bool) -> Result<(), TchError> {
        if takes_bf16_products(x.kind(), x.device()) {
            let (k, rows) = (x.size()[1] as usize, rows.start as usize..rows.end as usize);
            let x = x.f_contiguous()?;
            amx::gram(raw::floats_mut(&mut self.matrix), k, rows, raw::bf16_bits(&x), !first);
            return Ok(());
        }
        let mut block = self.rows(rows)?;
        let left = x.f_narrow(1, rows.start, rows.end - rows.start)?.f_tr()?;
        let right = x.f_narrow(1, 0, rows.end)?;
        match (x.kind(), first) {
            (Kind::Float, true) => block.f_copy_(&left.f_mm(&right)?)?,
            (Kind::Float, false) => drop(block.f_addmm_(&left, &right)?),
            (_, true) => drop(left.f_mm_dtype_out(&block, &right, Kind::Float)?),
            (_, false) => drop(block.f_addmm_dtype_out(&block, &left, &right, Kind::Float)?),
        }
        Ok(())
    }

    /// A view of some rows, up to the end of their diagonal block.
    fn rows(&self, rows: &Range<i64>) -> Result<Tensor, TchError> {
        self.matrix.f_narrow(0, rows.start, rows.end - rows.start)?.f_narrow(1, 0, rows.end)
    }

    /// Blocks of rows that inputs of `kind` can be added to one after another, with [`Hessian::add_to_block`]. The sums are the same as
    /// those of [`Hessian::add`].
    pub fn row_blocks(&self, kind: Kind) -> Vec<Range<i64>> {
        row_blocks(self.in_features() as i64, kind, self.matrix.device())
    }

    /// Number of values in all [`Hessian::row_blocks`] of `in_features` inputs.
    pub fn values_in_blocks(in_features: usize, kind: Kind, device: Device) -> usize {
        let rows = row_blocks(in_features as i64, kind, device).into_iter();
        rows.map(|rows| ((rows.end - rows.start) * rows.end) as usize).sum()
    }

    /// The sums of one of the [`Hessian::row_blocks`]: a view of its rows, up to the end of their diagonal block.
    ///
    /// # Errors
    /// When libtorch cannot make it.
    pub fn row_block(&self, rows: &Range<i64>) -> Result<Tensor> {
        self.rows(rows).torch("read a Hessian")
    }

    /// Adds a batch of inputs `[…, K]` to one of the [`Hessian::row_blocks`]; `first` if it has no tokens yet. The tokens are
    /// counted by [`Hessian::count`].
    ///
    /// # Errors
    /// When libtorch cannot compute it.
    pub fn add_to_block(&mut self, inputs: &Tensor, rows: &Range<i64>, first: bool) -> Result<()> {
        let add = |own: &mut Self| {
            let x = inputs.f_reshape([-1, own.matrix.size()[0]])?;
            if tensor_cores::can_multiply(&x) && !tensor_cores::is_known(&x) {
                // Another Hessian, which is compared with fp64.
                let mut judged = Self { matrix: own.matrix.f_empty_like()?, ..own.shared() };
                (judged.tokens, judged.finished) = (0, false);
                judged.accumulate(&x)?;
                own.warning = judged.warning;
            }
            let x = match x.kind() {
                kind if takes_bf16_products(kind, x.device()) || tensor_cores::can_multiply(&x) => x,
                _ => x.f_to_kind(Kind::Float)?,
            };
            own.add_to_rows(&x, rows, first)
        };
        add(self).torch("accumulate a Hessian")
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
            added.torch("add two Hessians")?;
        }
        self.tokens += other.tokens;
        self.warning = self.warning.take().or(other.warning);
        Ok(())
    }

    /// The sum of several Hessians over different tokens.
    ///
    /// # Errors
    /// When libtorch cannot compute it.
    pub fn sum_of<'a>(all: impl Iterator<Item = &'a Self>) -> Result<Self> {
        let mut sum: Option<Self> = None;
        for own in all {
            let matrix = own.matrix.f_add_scalar(0.0).torch("copy a Hessian")?;
            let warning = own.warning.clone();
            let copy = Self { matrix, tokens: own.tokens, added: 0, finished: false, warning };
            match &mut sum {
                Some(sum) => sum.absorb(copy)?,
                none => *none = Some(copy),
            }
        }
        Ok(sum.expect("at least one Hessian"))
    }

    /// If this Hessian has fewer than `least` tokens, adds the mean of `pooled` for each missing token.
    ///
    /// # Errors
    /// When libtorch cannot compute it.
    pub fn fill_up(&mut self, pooled: &Self, least: u64) -> Result<()> {
        if self.tokens >= least || pooled.tokens == 0 {
            return Ok(());
        }
        let share = (least - self.tokens) as f64 / pooled.tokens as f64;
        let filling = pooled.matrix.f_mul_scalar(share);
        let added = filling.and_then(|more| add_sums(&mut self.matrix, self.tokens, &more));
        added.torch("add two Hessians")?;
        self.tokens = least;
        Ok(())
    }

    /// A warning for the user, if tensor cores were found to be inexact.
    pub fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }

    /// Ends the accumulation: divides by the number of tokens and mirrors the lower triangle. `stage` names the
    /// inputs in errors.
    ///
    /// # Errors
    /// When an input was NaN or infinite, or there were no inputs.
    pub fn finish(mut self, stage: &str) -> Result<Self> {
        if self.tokens == 0 {
            return Err(NumericalError::EmptyHessian { stage: stage.to_owned() }.into());
        }
        let scaled = self.matrix.f_div_scalar_(self.tokens as f64);
        drop(scaled.torch("scale a Hessian")?);
        self.mirror().torch("mirror a Hessian")?;
        self.finished = true;
        let diagonal = self.diagonal()?;
        let broken = diagonal.iter().filter(|d| !d.is_finite()).count() as u64;
        if broken > 0 {
            let (place, total) = (format!("inputs of {stage}"), diagonal.len() as u64);
            return Err(Error::NonFinite { place, count: broken, total, computed: true });
        }
        Ok(self)
    }

    fn mirror(&mut self) -> Result<(), TchError> {
        if self.matrix.device() == Device::Cpu {
            raw::mirror_lower(&mut self.matrix);
            return Ok(());
        }
        let (k, block) = (self.matrix.size()[0], self.block());
        for start in (0..k).step_by(block as usize) {
            let rows = block.min(k - start);
            let below = self.matrix.f_narrow(0, start, rows)?.f_narrow(1, 0, start)?;
            self.matrix.f_narrow(0, 0, start)?.f_narrow(1, start, rows)?.f_copy_(&below.f_tr()?)?;
        }
        Ok(())
    }

    /// Another sum, `[K, K]` fp32.
    #[cfg(test)]
    pub(super) fn set_matrix(&mut self, matrix: Tensor) {
        self.matrix = matrix;
    }

    /// On another device.
    #[cfg(test)]
    pub(super) fn on(&self, device: Device) -> Self {
        let matrix = self.matrix.to_device(device);
        Self { matrix, tokens: self.tokens, added: 0, finished: self.finished, warning: None }
    }

    /// A second handle of the same matrix.
    pub(super) fn shared(&self) -> Self {
        let matrix = self.matrix.shallow_clone();
        Self { matrix, tokens: self.tokens, added: 0, finished: self.finished, warning: None }
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

    /// Number of calibration tokens.
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
    /// Exact for at most 256 rows. For more rows it is an estimate by Hutch++ (arXiv 2010.09649) with fixed probes. `W H Wᵀ`
    /// maps the first probes to a subspace, whose trace is exact. The other probes estimate the rest, by the mean of their quadratic
    /// forms. The estimate is within about 2% and costs a small part of the exact product, which takes as long as a solve.
    ///
    /// # Errors
    /// When libtorch cannot compute it.
    pub fn output_energy(&self, weight: &Tensor) -> Result<f64> {
        let exact = weight.size()[0] <= EXACT_ROWS;
        let energy =
            if exact { self.exact_output_energy(weight) } else { self.estimated_output_energy(weight) };
        energy.torch("measure a linear's output")
    }

    /// [`Hessian::output_energy`] of several weights. On CUDA all of it is computed, by products of bf16 with fp32 sums: that takes few
    /// launches and is within a thousandth.
    ///
    /// # Errors
    /// When libtorch cannot compute it.
    pub fn output_energies(&self, weights: &[&Tensor]) -> Result<Vec<f64>> {
        match self.matrix.device() {
            Device::Cpu => weights.iter().map(|weight| self.output_energy(weight)).collect(),
            _ => self.output_energies_in_bf16(weights).torch("measure a linear's output"),
        }
    }

    /// `tr(W H Wᵀ)` with inputs scaled to unit size, so that bf16 rounds all of them alike.
    pub(crate) fn output_energies_in_bf16(&self, weights: &[&Tensor]) -> Result<Vec<f64>, TchError> {
        let sizes = self.matrix.f_diagonal(0, 0, 1)?.f_clamp_min(f64::from(f32::MIN_POSITIVE))?.f_sqrt()?;
        let unit = self.matrix.f_div(&sizes)?.f_div_(&sizes.f_unsqueeze(1)?)?.f_to_kind(Kind::BFloat16)?;
        let energies = weights.iter().map(|weight| {
            let weight = weight.f_to_device(self.matrix.device())?;
            let scaled = weight.f_mul(&sizes)?.f_to_kind(Kind::BFloat16)?;
            let product = match self.matrix.device() {
                // For tests; the product of bf16 with fp32 sums is CUDA's.
                Device::Cpu => scaled.f_to_kind(Kind::Float)?.f_mm(&unit.f_to_kind(Kind::Float)?)?,
                _ => scaled.f_mm_dtype(&unit, Kind::Float)?,
            };
            product.f_mul(&scaled)?.f_sum(Kind::Double)
        });
        let energies = energies.collect::<Result<Vec<_>, _>>()?;
        Vec::try_from(Tensor::f_stack(&energies, 0)?)
    }

    fn exact_output_energy(&self, weight: &Tensor) -> Result<f64, TchError> {
        let weight = weight.f_to_device(self.matrix.device())?.f_to_kind(Kind::Float)?;
        self.quadratic_forms(&weight.f_tr()?)
    }

    fn estimated_output_energy(&self, weight: &Tensor) -> Result<f64, TchError> {
        let n = weight.size()[0];
        let signs = signs(n, 2 * PROBES)?.f_to_device(self.matrix.device())?;
        // bf16 rounds much less than the estimate errs. In fp32 some rows at a time: all would take the weight's memory twice more.
        let (weight, kind, some) = match takes_bf16_products(Kind::BFloat16, self.matrix.device()) {
            true => (weight.f_to_kind(Kind::BFloat16)?, Kind::BFloat16, n),
            false => (weight.shallow_clone(), Kind::Float, ROWS),
        };
        let blocks = (0..n).step_by(some as usize).map(|first| (first, some.min(n - first)));
        let rows = |(first, count): (i64, i64)| {
            weight.f_narrow(0, first, count)?.f_to_device(self.matrix.device())?.f_to_kind(kind)
        };
        // `Wᵀ Z` of `Z` `[N, m]`.
        let transposed = |z: &Tensor| {
            let mut sum =
                Tensor::f_zeros([self.matrix.size()[0], z.size()[1]], (Kind::Float, self.matrix.device()))?;
            for block in blocks.clone() {
                let z = z.f_narrow(0, block.0, block.1)?.f_to_kind(kind)?;
                let _ = sum.f_add_(&rows(block)?.f_tr()?.f_mm(&z)?)?;
            }
            Ok::<_, TchError>(sum)
        };
        let (first, second) = (signs.f_narrow(1, 0, PROBES)?, signs.f_narrow(1, PROBES, PROBES)?);
        let inner = self.matrix.f_mm(&transposed(&first)?)?.f_to_kind(kind)?;
        let image = blocks.clone().map(|block| rows(block)?.f_mm(&inner)).collect::<Result<Vec<_>, _>>()?;
        let image = Tensor::f_cat(&image, 0)?.f_to_kind(Kind::Float)?;
        let (basis, _) = Tensor::f_linalg_qr(&image, "reduced")?;
        let rest = second.f_sub(&basis.f_mm(&basis.f_tr()?.f_mm(&second)?)?)?;
        // Together, so that the weight is converted once for both.
        let both = transposed(&Tensor::f_cat(&[basis, rest], 1)?)?;
        let on_basis = self.quadratic_forms(&both.f_narrow(1, 0, PROBES)?)?;
        Ok(on_basis + self.quadratic_forms(&both.f_narrow(1, PROBES, PROBES)?)? / PROBES as f64)
    }

    /// `tr(Zᵀ H Z)` of `Z` `[K, m]` fp32.
    fn quadratic_forms(&self, z: &Tensor) -> Result<f64, TchError> {
        f64::try_from(self.matrix.f_mm(z)?.f_mul(z)?.f_sum(Kind::Double)?)
    }
}

/// Whether products of inputs are those of [`amx`].
pub(super) fn takes_bf16_products(kind: Kind, device: Device) -> bool {
    (kind, device) == (Kind::BFloat16, Device::Cpu) && amx::has_bf16_products()
}

/// Rows of a block that products of [`amx`] are computed for, of `count` rows. Each block takes the inputs' layout again, so that there
/// are not too many.
pub(super) fn bf16_block(count: i64) -> i64 {
    let smallest = amx::BLOCK as i64;
    smallest * (count as u64).div_ceil((smallest * ROW_BLOCKS) as u64) as i64
}

/// Blocks of rows of a Hessian of `k` inputs of `kind`.
pub(super) fn row_blocks(k: i64, kind: Kind, device: Device) -> Vec<Range<i64>> {
    blocks(k, if takes_bf16_products(kind, device) { bf16_block(k) } else { block_of(device) })
}

fn block_of(device: Device) -> i64 {
    if device == Device::Cpu { BLOCK } else { CUDA_BLOCK }
}

/// Rows `0..count` in blocks.
pub(super) fn blocks(count: i64, block: i64) -> Vec<Range<i64>> {
    (0..count).step_by(block as usize).map(|start| start..(start + block).min(count)).collect()
}

/// Adds `more` to the sums over `tokens` tokens, which are undefined before the first token.
pub(super) fn add_sums(sums: &mut Tensor, tokens: u64, more: &Tensor) -> Result<(), TchError> {
    match tokens {
        0 => sums.f_copy_(more),
        _ => sums.f_add_(more).map(drop),
    }
}

/// `[rows, columns]` fp32, each 1 or -1, always the same ones.
fn signs(rows: i64, columns: i64) -> Result<Tensor, TchError> {
    let mut generator = ChaCha8Rng::seed_from_u64(0);
    let mut sign = || if generator.next_u32() & 1 == 0 { 1.0f32 } else { -1.0 };
    let signs: Vec<f32> = std::iter::repeat_with(&mut sign).take((rows * columns) as usize).collect();
    Tensor::f_from_slice(&signs)?.f_reshape([rows, columns])
}

/// Products and solves that fail for lack of memory, for tests.
#[cfg(test)]
pub(crate) mod fault {
    use std::cell::Cell;

    use tch::TchError;

    thread_local! {
        /// Operations that this thread has left before one fails.
        static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    }

    /// Makes an operation of this thread fail after so many that do not.
    pub(crate) fn after(operations: usize) {
        LEFT.set(Some(operations));
    }

    /// Whether the operation has failed. If it has not, it does not fail any more.
    pub(crate) fn has_failed() -> bool {
        LEFT.take().is_none()
    }

    pub(crate) fn check() -> Result<(), TchError> {
        match LEFT.get() {
            Some(0) => {
                LEFT.set(None);
                Err(TchError::Torch("CUDA out of memory. (Of a test.)".into()))
            }
            left => {
                LEFT.set(left.map(|left| left - 1));
                Ok(())
            }
        }
    }
}
