//! The search for a group's scales on the CPU, for a tile of rows at once. `solver/tests/reference.rs` has the definition.

use pulp::{Arch, Simd, WithSimd};

use super::{
    kernel::{AroundZero, COLUMNS, LANES, Lane, Panel, Rounding, Tile, span, within},
    vectors::{add_to_later, product},
};
use crate::{accuracy::Scales, gptq::Grid};

/// The candidate scales of a group.
pub(super) struct Search {
    grid: Grid,
    /// Factors of the range's scale, above zero.
    factors: Vec<f64>,
    /// Whether each of them is followed by its negative.
    signed: bool,
    finalists: usize,
}

/// The most candidates that are compared by the block.
pub(super) const MAX_FINALISTS: usize = 16;

impl Search {
    pub(super) fn new(grid: Grid, scales: Scales) -> Self {
        let finalists = scales.finalists();
        assert!(finalists <= MAX_FINALISTS, "finalists have a fixed place");
        let factors = grid.factors(scales);
        let signed = factors.iter().any(|&factor| factor < 0.0);
        Self {
            grid,
            factors: factors.into_iter().filter(|&factor| factor > 0.0).collect(),
            signed,
            finalists,
        }
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
    let scratch = &mut tile.trials[0][start..end];
    by_diagonal(search, &tile.differences[start..end], &panel.pivots[start..end], scratch, best);
    let rounding = AroundZero::new(search.grid);
    let best = best_by_block(simd, panel, tile, rounding, start, end, best);
    let group = panel.groups[start] as usize;
    (tile.scales[group], tile.zeros[group]) = (best.scale, best.zero);
}

/// The best step of each row by the diagonal. `weights` `[g]` are compensated, `pivots` `[g]` are `Ũ_ii`.
pub(super) fn best_by_diagonal(search: &Search, weights: &[Lane], pivots: &[f32]) -> Candidate {
    struct ByDiagonal<'a>(&'a Search, &'a [Lane], &'a [f32], &'a mut [Lane], &'a mut [Candidate]);
    impl WithSimd for ByDiagonal<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            by_diagonal(self.0, self.1, self.2, self.3, self.4);
        }
    }
    let mut best = [Candidate::NONE];
    let mut scratch = vec![[0.0; LANES]; weights.len()];
    Arch::new().dispatch(ByDiagonal(search, weights, pivots, &mut scratch, &mut best));
    best[0]
}

/// The best steps of each row by `Σ Ũ_ii² (q_i − w_i)²`, in ascending order. `scaled` `[g]` is scratch.
#[inline(always)]
fn by_diagonal(
    search: &Search,
    weights: &[Lane],
    pivots: &[f32],
    scaled: &mut [Lane],
    best: &mut [Candidate],
) {
    let (mut min, mut max) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    for weights in weights {
        for l in 0..LANES {
            min[l] = if weights[l] < min[l] { weights[l] } else { min[l] };
            max[l] = if weights[l] > max[l] { weights[l] } else { max[l] };
        }
    }
    for ((scaled, weights), pivot) in scaled.iter_mut().zip(weights).zip(pivots) {
        for l in 0..LANES {
            scaled[l] = weights[l] * pivot;
        }
    }
    let mut fitted = Candidate::NONE;
    for (i, &factor) in search.factors.iter().enumerate() {
        fit_scaled(search.grid, &min, &max, factor, &mut fitted);
        if search.factors.len() == 1 && !search.signed {
            best[0] = fitted;
            return;
        }
        let grid = search.grid;
        let costs: &[Lane] = match search.signed {
            true => &diagonal_costs::<2>(grid, weights, pivots, scaled, &fitted),
            false => &diagonal_costs::<1>(grid, weights, pivots, scaled, &fitted),
        };
        for (turned, &cost) in costs.iter().enumerate() {
            if i == 0 && turned == 0 {
                // If no scale fits fp16, no cost is a number: this candidate stays and is refused.
                best[0] = Candidate { cost: cost.map(|cost| cost.min(f32::INFINITY)), ..fitted };
                continue;
            }
            if best.last().is_some_and(|last| all_reach(&cost, &last.cost)) {
                continue;
            }
            let scale = if turned == 1 { fitted.scale.map(|scale| -scale) } else { fitted.scale };
            let mut candidate = Candidate { cost, scale, ..fitted };
            for better in &mut *best {
                better.sort_with(&mut candidate);
            }
        }
    }
}

/// [`Grid::fit_scaled`] for each row.
#[inline(always)]
fn fit_scaled(grid: Grid, min: &Lane, max: &Lane, factor: f64, fitted: &mut Candidate) {
    if let Some(zero) = grid.symmetric_zero() {
        for l in 0..LANES {
            let largest = if max[l] > -min[l] { max[l] } else { -min[l] };
            fitted.scale[l] = grid.symmetric_scale(f64::from(largest) * factor);
        }
        fitted.zero = [f32::from(zero); LANES];
        return;
    }
    for l in 0..LANES {
        let step = grid.fit_scaled(f64::from(min[l]), f64::from(max[l]), factor);
        (fitted.scale[l], fitted.zero[l]) = (step.scale.to_f32(), f32::from(step.zero));
    }
}

/// Whether no cost of `costs` is below its limit.
#[inline(always)]
fn all_reach(costs: &Lane, limits: &Lane) -> bool {
    costs.iter().zip(limits).fold(true, |all, (cost, limit)| all & (cost >= limit))
}

/// A number that is added and subtracted again to round to a whole number, ties to even: no float of its size has a fraction.
const ROUNDER: f32 = 12_582_912.0;

/// `Σ Ũ_ii² (q_i − w_i)²` for a step, and for the same step turned around if `N` is 2. `scaled` are `Ũ_ii w_i`.
///
/// Both have the same offsets from zero, but for their limits, so that both together take two thirds of the instructions.
#[inline(always)]
fn diagonal_costs<const N: usize>(
    grid: Grid,
    weights: &[Lane],
    pivots: &[f32],
    scaled: &[Lane],
    step: &Candidate,
) -> [Lane; N] {
    let max_code = f32::from(grid.max_code());
    let (mut inverse, mut lowest, mut highest) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    for l in 0..LANES {
        inverse[l] = 1.0 / step.scale[l];
        (lowest[l], highest[l]) = (-step.zero[l], max_code - step.zero[l]);
    }
    let mut costs = [[0.0f32; LANES]; N];
    for ((weights, scaled), pivot) in weights.iter().zip(scaled).zip(pivots) {
        for l in 0..LANES {
            let offset = weights[l].mul_add(inverse[l], ROUNDER) - ROUNDER;
            let scale = step.scale[l] * pivot;
            for (turned, cost) in costs.iter_mut().enumerate() {
                let (low, high) =
                    if turned == 0 { (lowest[l], highest[l]) } else { (-highest[l], -lowest[l]) };
                let error = within(offset, low, high).mul_add(scale, -scaled[l]);
                cost[l] = error.mul_add(error, cost[l]);
            }
        }
    }
    costs
}

/// Of each row the candidate with the least `‖(q − w) Ũ_gg‖²`, for the codes that the column loop chooses; the first of equal ones.
#[inline(always)]
pub(super) fn best_by_block<S: Simd, R: Rounding>(
    simd: S,
    panel: &Panel<'_>,
    tile: &mut Tile<'_>,
    rounding: R,
    start: usize,
    end: usize,
    candidates: &mut [Candidate],
) -> Candidate {
    if let [only] = candidates {
        return *only;
    }
    let mut best: Option<Candidate> = None;
    for some in candidates.chunks_mut(TOGETHER) {
        let limits = best.map_or([f32::INFINITY; LANES], |best| best.cost);
        by_block(simd, panel, tile, rounding, start, end, some, &limits);
        for other in some {
            match &mut best {
                Some(best) => best.sort_with(other),
                None => best = Some(*other),
            }
        }
    }
    best.expect("there are candidates")
}

/// Candidates in the column loop at once. A column waits for the one before it; the columns of other candidates do not.
pub(super) const TOGETHER: usize = 4;

/// Sets the costs of up to [`TOGETHER`] candidates. It stops with a part of them if no row's part is below its limit.
#[inline(always)]
fn by_block<S: Simd, R: Rounding>(
    simd: S,
    panel: &Panel<'_>,
    tile: &mut Tile<'_>,
    rounding: R,
    start: usize,
    end: usize,
    steps: &mut [Candidate],
    limits: &Lane,
) {
    let weights = &*tile.differences;
    let mut trials = tile.trials.each_mut();
    let mut inverses = [[0.0; LANES]; TOGETHER];
    for (step, inverse) in steps.iter_mut().zip(&mut inverses) {
        *inverse = step.scale.map(R::inverse);
        step.cost = [0.0; LANES];
    }
    let mut c = start;
    while c < end {
        let (first, next) = span(c, end);
        let (above, own) = (panel.rows(first, start..c), panel.rows(first, c..next));
        let mut sums = [[[0.0; LANES]; COLUMNS]; TOGETHER];
        for ((sums, d), _) in sums.iter_mut().zip(&trials).zip(&*steps) {
            *sums = product(simd, above, &d[start..c]);
        }
        for column in c..next {
            let (at, pivot) = (column - first, panel.pivots[column]);
            let inverse_pivot = 1.0 / pivot;
            let of_steps = steps.iter_mut().zip(&inverses).zip(&mut trials).zip(&mut sums);
            for (((step, inverse), d), sums) in of_steps {
                let d = &mut d[column];
                for l in 0..LANES {
                    let target = weights[column][l] - sums[at][l] * inverse_pivot;
                    let (quantized, _) = rounding.round(target, inverse[l], step.scale[l], step.zero[l]);
                    let error = (quantized - target) * pivot;
                    d[l] = quantized - weights[column][l];
                    step.cost[l] += error * error;
                }
                add_to_later(simd, &mut sums[at..next - first], &own[column - c][at..], d);
            }
        }
        if steps.iter().all(|step| all_reach(&step.cost, limits)) {
            return;
        }
        c = next;
    }
}
