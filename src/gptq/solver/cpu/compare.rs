//! Rows that are better rounded than compensated.
//!
//! Compensation moves later weights, and the grid clips weights that move too far. For weights of one sign, or of one value,
//! the error can then exceed that of plain rounding. Rows are independent, so that the better result is taken for each row.

use rayon::prelude::*;
use tch::{Device, Kind, TchError, Tensor};

use super::{CpuFactor, LANES, State};
use crate::{
    error::{Result, TorchContext},
    gptq::{
        Grid, Step,
        raw::{Floats, floats, floats_mut},
        solver::{
            Sums, Weight,
            rtn::{Rounded, independent_error, round_alive},
        },
    },
    variant::Variant,
};

/// With independent errors of a row's weights, the error of rounding would be `Σ H_ii d_i²`. A compensated row with less than
/// this part of it is not compared: errors of rounding do not cancel that well by chance.
pub(in crate::gptq::solver) const CLEARLY_BETTER: f64 = 0.5;
/// Relative error of the comparison itself, from fp32 sums on both sides.
pub(in crate::gptq::solver) const UNSURE: f64 = 1e-4;
/// Rows compared together.
pub(in crate::gptq::solver) const ROWS: usize = 512;
/// Columns of the factor multiplied together.
const BLOCK: i64 = 768;

/// Inputs of rounding that all rows share.
struct Rounding<'a> {
    grid: Grid,
    groups: usize,
    g_idx: Vec<u32>,
    dead: &'a [u32],
    /// `[N]` of all weights.
    rows: Vec<Floats<'a>>,
}

impl CpuFactor {
    /// Replaces compensated rows by rounded rows if these have a smaller error; returns their number for each weight.
    pub(super) fn round_where_better(
        &self,
        weights: &[Weight<'_>],
        variant: &Variant,
        grid: Grid,
        state: &mut State,
    ) -> Result<Vec<usize>> {
        let k = self.damped.order.columns().len();
        let contiguous = weights.iter().map(|w| w.values.f_contiguous()).collect::<Result<Vec<_>, _>>();
        let contiguous = contiguous.torch("copy a weight")?;
        let rows: Vec<Floats<'_>> = contiguous
            .iter()
            .flat_map(|w| (0..w.size()[0] as usize).map(move |row| floats(w, row * k, k)))
            .collect();
        let count = rows.len();
        let (g_idx, dead) = (self.damped.order.g_idx(variant), self.damped.dead.as_slice());
        let rounding = Rounding { grid, groups: state.groups, g_idx, dead, rows };
        let (diagonal, lambda, before) = (&self.damped.diagonal, self.damped.lambda, &*state);
        let doubtful: Vec<usize> = (0..count)
            .into_par_iter()
            .map_init(
                || (vec![0.0; k], vec![Step::default(); before.groups]),
                |(values, steps), row| {
                    rounding.rows[row].widen(values);
                    let error = error(before, row, lambda);
                    let enough = error / CLEARLY_BETTER;
                    let independent =
                        independent_error(grid, &rounding.g_idx, values, diagonal, steps, enough);
                    (enough > independent).then_some(row)
                },
            )
            .flatten_iter()
            .collect();

        let mut better = vec![false; count];
        for some in doubtful.chunks(ROWS) {
            for (rounded, objective) in self.rounded(some, &rounding).torch("compare solutions")? {
                let sums = Sums { objective, distance: rounded.distance };
                if sums.undamped(lambda) < (1.0 - UNSURE) * error(state, rounded.row, lambda) {
                    better[rounded.row] = true;
                    take(state, rounded, sums);
                }
            }
        }
        let mut left = better.as_slice();
        let counts = contiguous.iter().map(|weight| {
            let (own, others) = left.split_at(weight.size()[0] as usize);
            left = others;
            own.iter().filter(|&&better| better).count()
        });
        Ok(counts.collect())
    }

    /// Rounds some rows; returns `d (H + λI) dᵀ` with each.
    fn rounded(&self, some: &[usize], rounding: &Rounding<'_>) -> Result<Vec<(Rounded, f64)>, TchError> {
        let columns = self.damped.order.columns();
        let k = columns.len();
        let size = [some.len() as i64, k as i64];
        // In the order of `L`.
        let mut differences = Tensor::f_empty(size, (Kind::Float, Device::Cpu))?;
        let out = floats_mut(&mut differences).par_chunks_mut(k);
        let rounded: Vec<Rounded> = out
            .zip(some)
            .map_init(
                || vec![0.0; k],
                |values, (to, &row)| {
                    let rounded = rounding.round(row, values);
                    let columns = columns.iter().rev();
                    to.iter_mut().zip(columns).for_each(|(to, &column)| *to = values[column as usize]);
                    rounded
                },
            )
            .collect();
        let objectives = self.objectives(&differences)?;
        Ok(rounded.into_iter().zip(objectives).collect())
    }

    /// `‖d L‖²` of each row of `D` `[S, K]`.
    fn objectives(&self, differences: &Tensor) -> Result<Vec<f64>, TchError> {
        let k = self.damped.factor.size()[0];
        let mut sums = Tensor::f_zeros([differences.size()[0]], (Kind::Double, Device::Cpu))?;
        for start in (0..k).step_by(BLOCK as usize) {
            let width = BLOCK.min(k - start);
            let columns = self.damped.factor.f_narrow(1, start, width)?;
            let part = |from: i64, rows: i64| -> Result<(Tensor, Tensor), TchError> {
                Ok((differences.f_narrow(1, from, rows)?, columns.f_narrow(0, from, rows)?))
            };
            let (left, corner) = part(start, width)?;
            let mut product = left.f_mm(&corner.f_tril(0)?)?;
            let below = start + width;
            if below < k {
                let (left, right) = part(below, k - below)?;
                product = product.f_addmm(&left, &right)?;
            }
            let squares = product.f_to_kind(Kind::Double)?.f_square()?;
            sums = sums.f_add(&squares.f_sum_dim_intlist([1].as_slice(), false, Kind::Double)?)?;
        }
        Vec::try_from(sums)
    }
}

impl Rounding<'_> {
    /// Rounds one row; `values` become its differences, 0 for dead features.
    fn round(&self, row: usize, values: &mut [f32]) -> Rounded {
        self.rows[row].widen(values);
        round_alive(self.grid, &self.g_idx, self.dead, row, self.groups, values)
    }
}

/// `d H dᵀ` of a row as it was solved.
fn error(state: &State, row: usize, lambda: f64) -> f64 {
    Sums { objective: state.objective[row], distance: state.distance[row] }.undamped(lambda)
}

/// Stores a rounded row.
fn take(state: &mut State, rounded: Rounded, sums: Sums) {
    let Rounded { row, steps, codes, .. } = rounded;
    let n = state.objective.len();
    let (tile, lane) = (row / LANES, row % LANES);
    for (group, step) in steps.into_iter().enumerate() {
        state.scales[tile * state.groups + group][lane] = step.scale.to_f32();
        state.zeros[tile * state.groups + group][lane] = f32::from(step.zero);
    }
    for (feature, code) in codes.into_iter().enumerate() {
        state.codes[feature * n + row] = code;
    }
    (state.objective[row], state.distance[row]) = (sums.objective, sums.distance);
}
