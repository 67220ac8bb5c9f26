//! The search for a group's scales on the CPU, for a tile of rows at once. `solver/tests/reference.rs` has the definition.

use pulp::{Arch, Simd, WithSimd};

use super::{
    kernel::{AroundZero, LANES, Lane, Panel, Rounding, Tile, span},
    vectors::{add_column, product},
};
use crate::{accuracy::Scales, gptq::Grid};

/// The candidate scales of a group.
pub(super) struct Search {
    grid: Grid,
    factors: Vec<f64>,
    finalists: usize,
}

/// The most candidates that are compared by the block.
pub(super) const MAX_FINALISTS: usize = 16;

impl Search {
    pub(super) fn new(grid: Grid, scales: Scales) -> Self {
        let finalists = scales.finalists();
        assert!(finalists <= MAX_FINALISTS, "finalists have a fixed place");
        Self { grid, factors: grid.factors(scales), finalists }
    }
}

/// A step for each row, and what it costs.
#[derive(Clone, Copy)]
pub(super) struct Candidate {
    pub(super) cost: Lane,
    pub(super) scale: Lane,
    pub(super) zero: Lane,
}

impl Candidate {
    /// Costs more than any candidate; its scale is refused.
    pub(super) const NONE: Self =
        Self { cost: [f32::INFINITY; LANES], scale: [f32::NAN; LANES], zero: [0.0; LANES] };

    /// Swaps with `other` in the rows in which `other` costs less; ties keep the order.
    #[inline(always)]
    pub(super) fn sort_with(&mut self, other: &mut Self) {
        for l in 0..LANES {
            let less = other.cost[l] < self.cost[l];
            let sorted = |a: f32, b: f32| if less { (b, a) } else { (a, b) };
            (self.cost[l], other.cost[l]) = sorted(self.cost[l], other.cost[l]);
            (self.scale[l], other.scale[l]) = sorted(self.scale[l], other.scale[l]);
            (self.zero[l], other.zero[l]) = sorted(self.zero[l], other.zero[l]);
        }
    }
}

/// Fits scale and zero of the group at `start..end` to the compensated weights in the tile's differences.
#[inline(always)]
pub(super) fn fit_scales<S: Simd>(
    simd: S,
    panel: &Panel<'_>,
    tile: &mut Tile<'_>,
    search: &Search,
    start: usize,
    end: usize,
) {
    let mut best = [Candidate::NONE; MAX_FINALISTS];
    let best = &mut best[..search.finalists.max(1)];
    by_diagonal(search, &tile.differences[start..end], &panel.pivots[start..end], best);
    let (first, others) = best.split_at_mut(1);
    if !others.is_empty() {
        let rounding = AroundZero::new(search.grid);
        by_block(simd, panel, tile, rounding, start, end, &mut first[0], &[f32::INFINITY; LANES]);
        for other in others {
            by_block(simd, panel, tile, rounding, start, end, other, &first[0].cost);
            first[0].sort_with(other);
        }
    }
    let group = panel.groups[start] as usize;
    (tile.scales[group], tile.zeros[group]) = (first[0].scale, first[0].zero);
}

/// The best step of each row by the diagonal. `weights` `[g]` are compensated, `pivots` `[g]` are `Ũ_ii`.
pub(super) fn best_by_diagonal(search: &Search, weights: &[Lane], pivots: &[f32]) -> Candidate {
    let mut best = [Candidate::NONE];
    struct ByDiagonal<'a>(&'a Search, &'a [Lane], &'a [f32], &'a mut [Candidate]);
    impl WithSimd for ByDiagonal<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            by_diagonal(self.0, self.1, self.2, self.3);
        }
    }
    Arch::new().dispatch(ByDiagonal(search, weights, pivots, &mut best));
    best[0]
}

/// The best steps of each row by `Σ Ũ_ii² (q_i − w_i)²`, in ascending order.
#[inline(always)]
fn by_diagonal(search: &Search, weights: &[Lane], pivots: &[f32], best: &mut [Candidate]) {
    let (mut min, mut max) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    for weights in weights {
        for l in 0..LANES {
            min[l] = if weights[l] < min[l] { weights[l] } else { min[l] };
            max[l] = if weights[l] > max[l] { weights[l] } else { max[l] };
        }
    }
    let mut fitted = Candidate::NONE;
    for (i, &factor) in search.factors.iter().enumerate() {
        // The negative factor of a pair has the scales of the positive one before it, negated.
        if i > 0 && factor == -search.factors[i - 1] {
            fitted.scale = fitted.scale.map(|scale| -scale);
        } else {
            for l in 0..LANES {
                let step = search.grid.fit_scaled(f64::from(min[l]), f64::from(max[l]), factor);
                fitted.scale[l] = step.scale.to_f32();
                fitted.zero[l] = f32::from(step.zero);
            }
        }
        if search.factors.len() == 1 {
            best[0] = fitted;
            return;
        }
        let limit = best.last().map_or([f32::INFINITY; LANES], |last| last.cost);
        let mut candidate =
            Candidate { cost: diagonal_cost(search.grid, weights, pivots, &fitted, &limit), ..fitted };
        if i == 0 {
            // If no scale fits fp16, no cost is a number: this candidate stays and is refused.
            best[0] = Candidate { cost: candidate.cost.map(|c| c.min(f32::INFINITY)), ..candidate };
            continue;
        }
        for better in &mut *best {
            better.sort_with(&mut candidate);
        }
    }
}

/// Whether no cost of `costs` is below its limit. Costs only grow, so that such candidates need not be added up to the end.
#[inline(always)]
fn all_reach(costs: &Lane, limits: &Lane) -> bool {
    costs.iter().zip(limits).fold(true, |all, (cost, limit)| all & (cost >= limit))
}

/// Columns whose costs are added between two looks at the limit.
const CHUNK: usize = 16;

/// `Σ Ũ_ii² (q_i − w_i)²`, or a part of it if no row's part is below its limit.
#[inline(always)]
fn diagonal_cost(grid: Grid, weights: &[Lane], pivots: &[f32], step: &Candidate, limits: &Lane) -> Lane {
    let max_code = f32::from(grid.max_code());
    let (mut inverse, mut lowest, mut highest) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    for l in 0..LANES {
        inverse[l] = 1.0 / step.scale[l];
        (lowest[l], highest[l]) = (-step.zero[l], max_code - step.zero[l]);
    }
    let mut cost = [0.0f32; LANES];
    for (weights, pivots) in weights.chunks(CHUNK).zip(pivots.chunks(CHUNK)) {
        for (weights, pivot) in weights.iter().zip(pivots) {
            for l in 0..LANES {
                let offset = (weights[l] * inverse[l]).round_ties_even().max(lowest[l]).min(highest[l]);
                let error = (offset * step.scale[l] - weights[l]) * pivot;
                cost[l] += error * error;
            }
        }
        if all_reach(&cost, limits) {
            break;
        }
    }
    cost
}

/// Sets the cost to `‖(q − w) Ũ_gg‖²` with the codes that the column loop chooses. It stops with a part of the cost if no row's part
/// is below its limit.
#[inline(always)]
pub(super) fn by_block<S: Simd, R: Rounding>(
    simd: S,
    panel: &Panel<'_>,
    tile: &mut Tile<'_>,
    rounding: R,
    start: usize,
    end: usize,
    step: &mut Candidate,
    limits: &Lane,
) {
    let (weights, d) = (&*tile.differences, &mut *tile.trial);
    let inverse = step.scale.map(R::inverse);
    step.cost = [0.0; LANES];
    let mut c = start;
    while c < end {
        let (first, next) = span(c, end);
        let mut sums = product(simd, panel.rows(first, start..c), &d[start..c]);
        let own = panel.rows(first, c..next);
        for column in c..next {
            let sum = &mut sums[column - first];
            add_column(simd, sum, own, column - first, &d[c..column]);
            let pivot = panel.pivots[column];
            let inverse_pivot = 1.0 / pivot;
            for l in 0..LANES {
                let target = weights[column][l] - sum[l] * inverse_pivot;
                let (quantized, _) = rounding.round(target, inverse[l], step.scale[l], step.zero[l]);
                let error = (quantized - target) * pivot;
                d[column][l] = quantized - weights[column][l];
                step.cost[l] += error * error;
            }
        }
        if all_reach(&step.cost, limits) {
            return;
        }
        c = next;
    }
}
