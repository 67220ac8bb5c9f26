//! The definition of the search for a group's scale, in f64; [`Scales`] has the candidates.

use super::{Grid, Step};
use crate::accuracy::Scales;

/// A group whose scale is searched for.
pub(super) struct Group<'a> {
    /// `[g]`, as compensated for every column before the group.
    pub(super) weights: &'a [f64],
    /// `[g]`: `Ũ_ii` of the group's columns.
    pub(super) pivots: &'a [f64],
    /// `[g, g]`: `Ũ_gg`, upper triangular; none if the group's columns are not solved one after another.
    pub(super) block: Option<&'a [f64]>,
}

/// The best step for a group.
pub(super) fn best_step(grid: Grid, scales: Scales, group: &Group<'_>) -> Step {
    let (min, max) =
        group.weights.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), &w| (lo.min(w), hi.max(w)));
    let steps = grid.factors(scales).into_iter().map(|f| grid.fit_scaled(min, max, f));
    let mut tried: Vec<(f64, Step)> = steps.map(|step| (by_diagonal(grid, group, step), step)).collect();
    if tried.len() > 1 {
        // Stable: the first of equals stays the first.
        tried.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    if let (Some(block), finalists @ 1..) = (group.block, scales.finalists()) {
        tried.truncate(finalists);
        tried.iter_mut().for_each(|(cost, step)| *cost = by_block(grid, group, block, *step));
        tried.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    tried[0].1
}

/// `Σ Ũ_ii² (q_i − w_i)²`.
fn by_diagonal(grid: Grid, group: &Group<'_>, step: Step) -> f64 {
    let cost = |(&w, &pivot): (&f64, &f64)| ((step.weight(grid.code(w, step)) - w) * pivot).powi(2);
    group.weights.iter().zip(group.pivots).map(cost).sum()
}

/// `‖(q − w) Ũ_gg‖²` with the codes that the column loop chooses.
fn by_block(grid: Grid, group: &Group<'_>, block: &[f64], step: Step) -> f64 {
    let g = group.weights.len();
    let mut differences: Vec<f64> = Vec::with_capacity(g);
    let mut cost = 0.0;
    for (i, &w) in group.weights.iter().enumerate() {
        let residual: f64 = differences.iter().enumerate().map(|(j, d)| block[j * g + i] * d).sum();
        let target = w - residual / group.pivots[i];
        let quantized = step.weight(grid.code(target, step));
        cost += ((quantized - target) * group.pivots[i]).powi(2);
        differences.push(quantized - w);
    }
    cost
}
