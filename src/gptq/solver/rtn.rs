//! Round-to-nearest: every weight becomes the nearest level of its group's grid, without compensation. It is the baseline of
//! GPTQ, and the optional fallback of a run.

use half::f16;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::{
    Factor, Factorization, Factorized, Solution, Solved, Solver, Weight, check_finite, check_scales,
    outlier_ratio, refused_scale,
};
use crate::{
    error::{Result, TorchContext},
    ggml::{BlockType, round_rows},
    gptq::{
        BlockLinear, ColumnOrder, Grid, Hessian, QuantizedLinear, Step, dead_columns,
        raw::{floats, floats_mut},
    },
    variant::{Sorting, Variant},
};

/// Rounds on the CPU. The Hessian is used only for the groups of act order and for the reported error.
#[derive(Debug, Clone, Copy, Default)]
pub struct RtnSolver;

impl Solver for RtnSolver {
    fn name(&self) -> &'static str {
        "rtn"
    }

    /// Factorizes nothing; damping is not used and is reported as 0.
    fn factorize(&self, hessian: &Hessian, sorting: Sorting, _damp: f64, _stage: &str) -> Result<Factor> {
        let diagonal = hessian.diagonal()?;
        let dead_columns = dead_columns(&diagonal).len();
        let outlier_ratio = outlier_ratio(&diagonal);
        let facts =
            Factorization { damp: 0.0, damp_raised: 0, dead_columns, outlier_ratio, condition_estimate: 0.0 };
        let order = ColumnOrder::new(sorting, &diagonal);
        Ok(Box::new(Rounding { hessian: hessian.shared(), order, facts }))
    }
}

struct Rounding {
    hessian: Hessian,
    order: ColumnOrder,
    facts: Factorization,
}

impl Factorized for Rounding {
    fn facts(&self) -> &Factorization {
        &self.facts
    }

    fn solve(&self, weights: &[Weight<'_>], variant: &Variant) -> Result<Vec<Solution>> {
        let g_idx = self.order.g_idx(variant);
        weights.iter().map(|weight| self.round(weight, variant, &g_idx)).collect()
    }

    fn solve_blocks(&self, weights: &[Weight<'_>], kind: BlockType) -> Result<Vec<Solution>> {
        weights.iter().map(|weight| self.round_blocks(weight, kind)).collect()
    }

    fn divide(&self, _b: &Tensor, _products: Kind) -> Result<Option<Tensor>> {
        Ok(None)
    }
}

impl Rounding {
    /// The cost of each column's errors is the diagonal of the Hessian.
    fn round_blocks(&self, weight: &Weight<'_>, kind: BlockType) -> Result<Solution> {
        check_finite(weight)?;
        let host =
            weight.values.f_to_device(Device::Cpu).and_then(|w| w.f_to_kind(Kind::Float)?.f_contiguous());
        let host = host.torch("copy a weight")?;
        let k = host.size()[1] as usize;
        let linear = {
            let values: Vec<f32> = host.f_flatten(0, -1).and_then(Vec::try_from).torch("copy a weight")?;
            BlockLinear::new(kind, k, round_rows(kind, &values, k, Some(&self.hessian.diagonal()?)))
        };
        let mut differences = Tensor::f_zeros_like(&host).torch("allocate a linear's error")?;
        floats_mut(&mut differences).copy_from_slice(&linear.dequantize());
        let differences = differences.f_sub(&host).torch("compare a linear")?;
        let squared_error = self.hessian.output_energy(&differences)?;
        if !squared_error.is_finite() {
            return Err(refused_scale(weight, &format!("scale of a block of {kind}")));
        }
        let (linear, squared_error) = (Solved::Blocks(linear), squared_error.max(0.0));
        Ok(Solution { linear, squared_error, uncompensated: 0, fallback: None })
    }

    fn round(&self, weight: &Weight<'_>, variant: &Variant, g_idx: &[u32]) -> Result<Solution> {
        check_finite(weight)?;
        let host = weight.values.f_to_device(Device::Cpu).and_then(|w| w.f_contiguous());
        let host = host.torch("copy a weight")?;
        let (n, k) = (host.size()[0] as usize, g_idx.len());
        let (groups, grid) = (variant.group_size.groups(k), Grid::new(variant.bits, variant.symmetric));
        let rows: Vec<_> = (0..n).map(|row| floats(&host, row * k, k)).collect();

        // `Ŵ − W` `[N, K]`; codes and steps row by row, as they are made.
        let size = [n as i64, k as i64];
        let differences = Tensor::f_empty(size, (Kind::Float, Device::Cpu));
        let mut differences = differences.torch("allocate a linear's error")?;
        let (mut codes, mut steps) = (vec![0; n * k], vec![Step::default(); n * groups]);
        let out = codes.par_chunks_mut(k).zip(steps.par_chunks_mut(groups));
        let work = floats_mut(&mut differences).par_chunks_mut(k).zip(rows).zip(out);
        work.for_each(|((values, row), (codes, steps))| {
            row.widen(values);
            round_row(grid, g_idx, values, steps, codes);
        });
        let (codes, steps) = (transposed(&codes, k), transposed(&steps, groups));

        let scales: Vec<f16> = steps.iter().map(|step| step.scale).collect();
        check_scales(weight, &scales, n)?;
        let zeros = steps.iter().map(|step| step.zero).collect();
        let squared_error = self.hessian.output_energy(&differences)?.max(0.0);
        let linear = QuantizedLinear::new(variant.bits, codes, scales, zeros, g_idx.to_vec());
        Ok(Solution { linear: Solved::Host(linear), squared_error, uncompensated: 0, fallback: None })
    }
}

/// A row rounded to nearest.
pub(super) struct Rounded {
    /// Which row of a stack of weights.
    pub(super) row: usize,
    pub(super) steps: Vec<Step>,
    /// `[K]`, in the features' own order.
    pub(super) codes: Vec<u8>,
    /// `‖d‖²`.
    pub(super) distance: f64,
}

/// Rounds the row `values` `[K]`, which become its differences, 0 for `dead` features.
pub(super) fn round_alive(
    grid: Grid,
    g_idx: &[u32],
    dead: &[u32],
    row: usize,
    groups: usize,
    values: &mut [f32],
) -> Rounded {
    let mut steps = vec![Step::default(); groups];
    let mut codes = vec![0; values.len()];
    round_row(grid, g_idx, values, &mut steps, &mut codes);
    for &feature in dead {
        let feature = feature as usize;
        values[feature] = 0.0;
        codes[feature] = steps[g_idx[feature] as usize].zero;
    }
    let distance = values.iter().map(|&d| f64::from(d) * f64::from(d)).sum();
    Rounded { row, steps, codes, distance }
}

/// The code nearest to a weight, less the zero point.
#[inline(always)]
fn nearest_offset(weight: f32, scale: f32, zero: f32, max_code: f32) -> f32 {
    /// Added to a small number and taken away again, this leaves the nearest integer, ties to even.
    const INTEGERS: f32 = 12_582_912.0;
    ((weight / scale).clamp(-zero, max_code - zero) + INTEGERS) - INTEGERS
}

/// Rounds a row of weights `[K]`: writes its groups' steps `[G]` and its codes `[K]`, and replaces the weights by `Ŵ − W`. A
/// scale that fp16 cannot hold becomes infinite, and the differences of its group are then undefined.
pub(super) fn round_row(grid: Grid, g_idx: &[u32], values: &mut [f32], steps: &mut [Step], codes: &mut [u8]) {
    fit(grid, g_idx, values, steps);
    let wide = |step: &Step| (step.scale.to_f32(), f32::from(step.zero));
    let (steps, max_code): (Vec<_>, _) = (steps.iter().map(wide).collect(), f32::from(grid.max_code()));
    for ((value, code), &group) in values.iter_mut().zip(codes).zip(g_idx) {
        let (scale, zero) = steps[group as usize];
        let offset = nearest_offset(*value, scale, zero, max_code);
        *code = (offset + zero) as u8;
        *value = offset * scale - *value;
    }
}

/// `Σ H_ii d_i²` for the differences that rounding a row of weights `[K]` leaves, or a part of it if that is more than `enough`.
pub(super) fn independent_error(
    grid: Grid,
    g_idx: &[u32],
    weights: &[f32],
    diagonal: &[f32],
    steps: &mut [Step],
    enough: f64,
) -> f64 {
    fit(grid, g_idx, weights, steps);
    let max_code = f32::from(grid.max_code());
    let (mut total, mut start) = (0.0, 0);
    for run in runs(g_idx) {
        let columns = start..start + run.len();
        start = columns.end;
        let step = steps[run[0] as usize];
        let (scale, zero) = (step.scale.to_f32(), f32::from(step.zero));
        let mut sums = [0.0f32; 8];
        let pairs = weights[columns.clone()].chunks(8).zip(diagonal[columns].chunks(8));
        for (weights, diagonal) in pairs {
            for ((sum, weight), h) in sums.iter_mut().zip(weights).zip(diagonal) {
                let d = nearest_offset(*weight, scale, zero, max_code) * scale - weight;
                *sum += h * d * d;
            }
        }
        total += sums.iter().map(|&sum| f64::from(sum)).sum::<f64>();
        if total > enough {
            break;
        }
    }
    total
}

/// Neighbouring features of the same group.
fn runs(g_idx: &[u32]) -> impl Iterator<Item = &[u32]> {
    g_idx.chunk_by(|a, b| a == b)
}

/// The steps of a row's groups.
fn fit(grid: Grid, g_idx: &[u32], weights: &[f32], steps: &mut [Step]) {
    let mut ranges = vec![(f32::INFINITY, f32::NEG_INFINITY); steps.len()];
    let mut left = weights;
    for run in runs(g_idx) {
        let (weights, others) = left.split_at(run.len());
        left = others;
        let (mut least, mut largest) = ([f32::INFINITY; 8], [f32::NEG_INFINITY; 8]);
        for weights in weights.chunks(8) {
            for ((least, largest), &weight) in least.iter_mut().zip(&mut largest).zip(weights) {
                *least = if weight < *least { weight } else { *least };
                *largest = if weight > *largest { weight } else { *largest };
            }
        }
        let (min, max) = &mut ranges[run[0] as usize];
        *min = least.into_iter().fold(*min, f32::min);
        *max = largest.into_iter().fold(*max, f32::max);
    }
    for (step, (min, max)) in steps.iter_mut().zip(ranges) {
        *step = grid.fit(f64::from(min), f64::from(max));
    }
}

/// `[rows, columns]` as `[columns, rows]`.
fn transposed<T: Copy + Send + Sync>(values: &[T], columns: usize) -> Vec<T> {
    let column = |column: usize| values.iter().skip(column).step_by(columns).copied();
    (0..columns).into_par_iter().flat_map_iter(column).collect()
}
