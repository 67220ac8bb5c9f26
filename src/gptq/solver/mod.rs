//! Solvers: from a Hessian and the weights that share it to codes and scales.
//!
//! GPTQ as Babai's nearest plane (arXiv 2507.18553): with `H + λI = Ũ Ũᵀ`, `Ũ` upper triangular, and
//! `D = Ŵ − W`, the columns are taken in order and
//! `q_i = round_to_grid( w_i − (1/Ũ_ii) Σ_{j<i} Ũ_ji d_j )`, always with the *original* `w_i`.
//! At the start of a group its scale is fitted to the weights as compensated for everything before it,
//! `w_g − (Ũ_ggᵀ)⁻¹ r_g` with `r_g = Σ_{j<g} Ũ_jg d_j`, wherever the group starts.

mod by_rows;
mod cpu;
mod cuda;
mod fallback;
mod rtn;
mod solved;
#[cfg(test)]
pub(in crate::gptq) mod tests;

use std::borrow::Borrow;

use half::f16;
use tch::{Device, Kind, TchError, Tensor};

pub use by_rows::{OutputFactor, join_strands, solve_by_rows, solve_strands, strand_rows};
pub use cpu::CpuSolver;
pub use cuda::{Clock, CudaSolver, DeviceLinear, Kernels, PackedCodes, StageShape, Work};
pub use fallback::OrRounded;
pub use rtn::RtnSolver;
pub use solved::{Solution, Solved};

use super::{ColumnOrder, CrossCovariance, Hessian, QuantizedLinear, Step, dead_columns, mean_alive, raw};
use crate::{
    error::{Error, NumericalError, Result, TorchContext},
    ggml::BlockType,
    products,
    variant::{Sorting, Variant},
};

/// A solver; there is one for each kind of device.
pub trait Solver {
    /// Its name in reports.
    fn name(&self) -> &'static str;

    /// Orders (`sorting`), damps and factorizes a Hessian. The result solves any number of weights and variants of that
    /// order. Damping starts at `damp` of the mean diagonal and is raised only if the factorization fails. `stage` names the
    /// inputs in errors.
    ///
    /// # Errors
    /// When the Hessian is all zero or stays indefinite at full damping, or memory is exhausted.
    fn factorize(&self, hessian: &Hessian, sorting: Sorting, damp: f64, stage: &str) -> Result<Factor>;
}

/// A factorized Hessian, as a solver returns it.
pub type Factor = Box<dyn Factorized>;

/// A factorized Hessian.
pub trait Factorized {
    /// Statistics of the factorization.
    fn facts(&self) -> &Factorization;

    /// Quantizes weights that share these inputs. `variant.order` must be the order of the factorization.
    ///
    /// # Errors
    /// When a weight is NaN or infinite, a scale does not fit fp16, a result is NaN or infinite, or libtorch fails.
    fn solve(&self, weights: &[Weight<'_>], variant: &Variant) -> Result<Vec<Solution>>;

    /// Quantizes weights that share these inputs to blocks of ggml. The order of the factorization must be that of the file, and rows
    /// must be whole blocks of a type with codes.
    ///
    /// # Errors
    /// As for [`Factorized::solve`]; if the solver has no grids of ggml.
    fn solve_blocks(&self, _weights: &[Weight<'_>], kind: BlockType) -> Result<Vec<Solution>> {
        let expected = "cpu: the solvers of other devices have no grids of ggml".to_owned();
        Err(Error::Value { what: format!("device for {kind}"), expected, found: "another".into() })
    }

    /// `B (H + λI)⁻¹` of `B` `[N, K]` fp32; `None` if there is no factor because weights are rounded. If `products` are bf16, a
    /// solver may round what it multiplies to that, and return it so; else it is fp32.
    ///
    /// # Errors
    /// When libtorch fails.
    fn divide(&self, b: &Tensor, products: Kind) -> Result<Option<Tensor>>;

    /// Whether it rounds linears without a solution to nearest.
    fn rounds_failures(&self) -> bool {
        false
    }
}

/// A weight for the solver.
#[derive(Debug, Clone, Copy)]
pub struct Weight<'a> {
    /// Its name in errors.
    pub name: &'a str,
    /// `[N, K]`.
    pub values: &'a Tensor,
}

/// Statistics of a factorization.
#[derive(Debug, Clone, PartialEq)]
pub struct Factorization {
    /// Damping used, as a fraction of the mean diagonal of the features that are not dead.
    pub damp: f64,
    /// Number of times that it had to rise.
    pub damp_raised: u32,
    /// Input features that are zero in all calibration tokens; the solver sets their weights to zero.
    pub dead_columns: usize,
    /// Ratio of the largest to the median diagonal element, without dead features.
    pub outlier_ratio: f64,
    /// The square of the largest over the smallest diagonal element of the factor: at most the condition number.
    pub condition_estimate: f64,
}

/// A factorization with its order and damping.
struct Damped<F> {
    factor: F,
    order: ColumnOrder,
    /// Undamped, in the features' own order.
    diagonal: Vec<f32>,
    dead: Vec<u32>,
    /// Number added to the diagonal.
    lambda: f64,
    facts: Factorization,
}

/// Order and damping of a Hessian: its rows and columns follow `order`, and `lambda` is added to its diagonal. A diagonal
/// element that is zero, of a dead feature, becomes `mean + lambda`.
struct Damping<'a> {
    order: &'a ColumnOrder,
    mean: f64,
    lambda: f64,
}

/// Orders a Hessian and tries dampings from `damp` on until `factorize` returns a factor, triangular in any direction.
fn damped<F: Borrow<Tensor>>(
    hessian: &Hessian,
    sorting: Sorting,
    damp: f64,
    stage: &str,
    factorize: impl Fn(&Damping<'_>) -> Result<Option<F>>,
) -> Result<Damped<F>> {
    let diagonal = hessian.diagonal()?;
    let dead = dead_columns(&diagonal);
    let mean = mean_alive(&diagonal, &dead)
        .ok_or_else(|| NumericalError::EmptyHessian { stage: stage.to_owned() })?;
    let order = ColumnOrder::new(sorting, &diagonal);
    for (raised, damp) in damping_steps(damp).enumerate() {
        let lambda = damp * mean;
        if let Some(factor) = factorize(&Damping { order: &order, mean, lambda })? {
            let facts = Factorization {
                damp,
                damp_raised: raised as u32,
                dead_columns: dead.len(),
                outlier_ratio: outlier_ratio(&diagonal),
                condition_estimate: condition_estimate(factor.borrow()).torch("look at a factor")?,
            };
            return Ok(Damped { factor, order, diagonal, dead, lambda, facts });
        }
    }
    Err(NumericalError::NotPositiveDefinite { stage: stage.to_owned(), damp: 1.0 }.into())
}

/// The targets of weights that share inputs: `W + α W D (H + λI)⁻¹` `[N, K]` fp32, with the finished cross-covariance of these
/// inputs. If `factor` rounds failures, the weight itself replaces a target that is not finite.
///
/// # Errors
/// When a target is NaN or infinite, or libtorch fails.
pub fn targets(
    factor: &dyn Factorized,
    cross_covariance: &CrossCovariance,
    weights: &[Weight<'_>],
) -> Result<Vec<Tensor>> {
    let (sums, kind) = (cross_covariance.finished(), cross_covariance.product_kind());
    let device = sums.device();
    let rows = |weight: &Weight<'_>| weight.values.size()[0];
    // `D (H + λI)⁻¹` is divided once for all weights; for few rows it is cheaper to divide each `W D`.
    let shared = !cross_covariance.is_product() && weights.iter().map(rows).sum::<i64>() >= sums.size()[0];
    let d = match (cross_covariance.is_product(), shared) {
        (true, _) => None,
        (false, false) => Some(sums.shallow_clone()),
        (false, true) => match factor.divide(sums, kind)? {
            Some(divided) => Some(divided),
            None => return weights.iter().map(|weight| as_fp32(weight, device)).collect(),
        },
    };
    // As the weight of a linear, transposed.
    let d = d.map(|d| d.f_to_kind(kind)?.f_tr().and_then(|d| products::Weight::new(&d)));
    let d = d.transpose().torch("convert a cross-covariance")?;
    let mut first = 0;
    let mut target = |weight: &Weight<'_>| {
        let (begin, count) = (first, rows(weight));
        first += count;
        // The product of some rows with `d`.
        let product = |from: i64, rows: i64| match &d {
            Some(d) => {
                d.linear(&weight.values.f_narrow(0, from, rows)?.f_to_device(device)?.f_to_kind(kind)?, None)
            }
            None => sums.f_narrow(0, begin + from, rows),
        };
        let shift = match shared {
            true => None,
            false => {
                let product = product(0, count).and_then(|product| product.f_to_kind(Kind::Float));
                match factor.divide(&product.torch("compute a target")?, kind)? {
                    Some(shift) => Some(shift),
                    None => return as_fp32(weight, device),
                }
            }
        };
        let shift = |from: i64, rows: i64| match &shift {
            Some(shift) => shift.f_narrow(0, from, rows),
            None => product(from, rows),
        };
        if let Some(target) = shifted(weight.values, device, shift).torch("compute a target")? {
            return Ok(target);
        }
        check_finite(weight)?;
        if factor.rounds_failures() {
            return as_fp32(weight, device);
        }
        let problem = "its target is NaN or infinite".to_owned();
        Err(NumericalError::Unsolved { linear: weight.name.to_owned(), problem }.into())
    };
    weights.iter().map(&mut target).collect()
}

/// Rows of a target computed together on the CPU: enough for a fast product, few enough for buffers that are used again.
const TARGET_ROWS: i64 = 4096;

/// A weight `[N, K]` plus the `shift` of its rows (the first, and how many), in fp32. `None` if a sum is not finite.
fn shifted(
    weight: &Tensor,
    device: Device,
    shift: impl Fn(i64, i64) -> Result<Tensor, TchError>,
) -> Result<Option<Tensor>, TchError> {
    let n = weight.size()[0];
    if device != Device::Cpu {
        let target = shift(0, n)?.f_to_kind(Kind::Float)?.f_add_(&weight.f_to_device(device)?)?;
        return Ok(bool::try_from(target.f_isfinite()?.f_all()?)?.then_some(target));
    }
    let mut target = Tensor::f_empty(weight.size(), (Kind::Float, device))?;
    let mut finite = true;
    for from in (0..n).step_by(TARGET_ROWS as usize) {
        let rows = TARGET_ROWS.min(n - from);
        let (own, shift) = (weight.f_narrow(0, from, rows)?, shift(from, rows)?);
        finite &= raw::add_rows(&mut target, from as usize, &shift, &own)?;
    }
    Ok(finite.then_some(target))
}

fn as_fp32(weight: &Weight<'_>, device: Device) -> Result<Tensor> {
    let convert = || weight.values.f_to_device(device)?.f_to_kind(Kind::Float);
    convert().torch("convert a weight")
}

/// [`Factorized::divide`] by an upper triangular `factor` of `H + λI`, in the order of `columns`.
fn divide_by(b: &Tensor, factor: &Tensor, columns: &[u32]) -> Result<Option<Tensor>> {
    let divide = || {
        let half = select_columns(b, columns)
            .and_then(|b| factor.f_tr()?.f_linalg_solve_triangular(&b, false, false, false))?;
        select_columns(&factor.f_linalg_solve_triangular(&half, true, false, false)?, &places(columns))
    };
    divide().torch("divide by a factor").map(Some)
}

/// The place of each column in `columns`.
fn places(columns: &[u32]) -> Vec<u32> {
    let mut places = vec![0; columns.len()];
    columns.iter().zip(0..).for_each(|(&column, place)| places[column as usize] = place);
    places
}

fn select_columns(matrix: &Tensor, columns: &[u32]) -> Result<Tensor, TchError> {
    if matrix.device() == Device::Cpu {
        return raw::select_columns(matrix, columns);
    }
    let columns: Vec<i64> = columns.iter().map(|&column| i64::from(column)).collect();
    matrix.f_index_select(1, &Tensor::f_from_slice(&columns)?.f_to_device(matrix.device())?)
}

/// Ratio of the largest to the median of the elements that are not zero; 0 if all are zero.
fn outlier_ratio(diagonal: &[f32]) -> f64 {
    let mut alive: Vec<f32> = diagonal.iter().copied().filter(|&d| d != 0.0).collect();
    alive.sort_unstable_by(f32::total_cmp);
    let largest = alive.last().map_or(0.0, |&d| f64::from(d));
    alive.get(alive.len() / 2).map_or(0.0, |&median| largest / f64::from(median))
}

fn condition_estimate(factor: &Tensor) -> Result<f64, TchError> {
    let (smallest, largest) = factor.f_diagonal(0, 0, 1)?.f_aminmax(0, false)?;
    Ok((f64::try_from(largest)? / f64::try_from(smallest)?).powi(2))
}

/// Columns solved between two matrix products: about `panel`, but whole groups if scales are fitted during the solve. `k` is
/// the number of all columns.
fn panel_width(variant: &Variant, k: usize, panel: usize) -> usize {
    let size = variant.group_size.features(k);
    if variant.scales_known_beforehand() { panel } else { size.max(panel / size * size) }
}

/// Sums over the columns of a solved weight or row.
#[derive(Debug, Clone, Copy)]
struct Sums {
    /// `tr(D (H+λI) Dᵀ)`.
    objective: f64,
    /// `‖D‖²`.
    distance: f64,
}

impl Sums {
    /// `tr(D H Dᵀ)`: `tr(D (H+λI) Dᵀ)` less `λ‖D‖²`.
    fn undamped(self, lambda: f64) -> f64 {
        (self.objective - lambda * self.distance).max(0.0)
    }
}

/// Builds a solution from codes `[K, N]` and steps `[G, N]`.
///
/// # Errors
/// As for [`check_scales`] and [`check_sums`].
fn solution(
    weight: &Weight<'_>,
    variant: &Variant,
    codes: Vec<u8>,
    steps: &[Step],
    g_idx: Vec<u32>,
    sums: Sums,
    lambda: f64,
) -> Result<Solution> {
    let scales: Vec<f16> = steps.iter().map(|s| s.scale).collect();
    check_scales(weight, &scales, codes.len() / g_idx.len())?;
    check_sums(weight, sums)?;
    let zeros = steps.iter().map(|s| s.zero).collect();
    let linear = QuantizedLinear::new(variant.bits, codes, scales, zeros, g_idx);
    Ok(Solution {
        linear: Solved::Host(linear),
        squared_error: sums.undamped(lambda),
        uncompensated: 0,
        fallback: None,
    })
}

/// Refuses a scale of `scales` `[G, N]` that does not fit fp16; the cause is the weight or its target.
fn check_scales(weight: &Weight<'_>, scales: &[f16], n: usize) -> Result<()> {
    let Some(at) = scales.iter().position(|s| !s.is_finite()) else { return Ok(()) };
    Err(refused_scale(weight, &format!("scale of group {}, output feature {}", at / n, at % n)))
}

/// The error for a scale that does not fit fp16.
fn refused_scale(weight: &Weight<'_>, place: &str) -> Error {
    let largest = match check_finite(weight).and_then(|()| largest(weight)) {
        Ok(largest) => largest,
        Err(error) => return error,
    };
    if largest > f16::MAX.to_f32() {
        let place = format!("{}: {place}, from its largest weight", weight.name);
        return Error::Fp16Overflow { place, value: largest };
    }
    let problem = format!("{place}: it does not fit fp16, though the largest weight, {largest}, does");
    NumericalError::Unsolved { linear: weight.name.to_owned(), problem }.into()
}

/// Refuses a solution whose sums are NaN or infinite; its codes alone would not show that.
fn check_sums(weight: &Weight<'_>, sums: Sums) -> Result<()> {
    if sums.objective.is_finite() && sums.distance.is_finite() {
        return Ok(());
    }
    check_finite(weight)?;
    let problem = "its error came out as NaN or infinite, though its weights are numbers".to_owned();
    Err(NumericalError::Unsolved { linear: weight.name.to_owned(), problem }.into())
}

/// Refuses a weight with NaN or infinity in it.
fn check_finite(weight: &Weight<'_>) -> Result<()> {
    let total = weight.values.numel() as u64;
    let count = raw::count_non_finite(weight.values).torch("look for NaN and infinity")?;
    if count == 0 {
        return Ok(());
    }
    let place = format!("weight of `{}`", weight.name);
    Err(Error::NonFinite { place, count, total, computed: false })
}

fn largest(weight: &Weight<'_>) -> Result<f32> {
    let largest = || f64::try_from(weight.values.f_abs()?.f_max()?);
    Ok(largest().torch("find the largest weight")? as f32)
}

/// The dampings to try one after another, as fractions of the mean diagonal: `start`, then doubled up to 1.
fn damping_steps(start: f64) -> impl Iterator<Item = f64> {
    let next = |&d: &f64| (d < 1.0).then(|| (d * 2.0).clamp(0.01, 1.0));
    std::iter::successors(Some(start), next)
}
