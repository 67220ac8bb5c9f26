//! Grids of ggml's blocks on the CPU, for a tile of rows at once: the scales of a block, and those of its sub-blocks.
//! `ggml/fit.rs` has the definition of a fit, `solver/tests/blocks.rs` that of a solve.

use half::f16;
use pulp::Simd;

use super::{
    kernel::{LANES, Lane, Panel, Rounding, Tile, compensate, within},
    scale_search::{Candidate, MAX_FINALISTS, best_by_block},
};
use crate::{
    accuracy::{ScaleSearch, Scales},
    ggml::{BlockGrid, BlockType, D_FACTORS, IQ4_NL_LEVELS, Levels, MAX_SUB_BLOCKS, ScaleForm},
};

/// The grid of a block type, and the candidates for its scales.
pub(super) struct BlockSearch {
    /// The grid.
    pub(super) grid: BlockGrid,
    factors: Vec<f32>,
    finalists: usize,
    /// The lowest and the highest level.
    ends: [f32; 2],
    /// Smallest and largest integer that stands for a scale, and largest for a minimum.
    integers: [f32; 3],
}

impl BlockSearch {
    /// # Panics
    /// When the type has no codes.
    pub(super) fn new(kind: BlockType, scales: Scales) -> Self {
        let grid = kind.grid().expect("a type with codes");
        let factors = grid.factors(scales.search != ScaleSearch::Off, scales.signed);
        let integers = match &grid.scales {
            ScaleForm::Signed(range) => [f32::from(*range.start()), f32::from(*range.end()), 0.0],
            ScaleForm::Pairs(largest) => [0.0, f32::from(*largest), f32::from(*largest)],
            ScaleForm::Scale | ScaleForm::ScaleAndMin => [0.0; 3],
        };
        Self {
            factors: factors.into_iter().map(|factor| factor as f32).collect(),
            finalists: scales.finalists().clamp(1, MAX_FINALISTS),
            ends: grid.levels.ends(),
            integers,
            grid,
        }
    }

    /// The rounding to evenly spaced levels; `None` if they are not evenly spaced.
    pub(super) fn even(&self) -> Option<Even> {
        let [lowest, highest] = self.ends;
        match &self.grid.levels {
            Levels::Uniform { zero, .. } => Some(Even { lowest, highest, zero: f32::from(*zero) }),
            Levels::Table(_) => None,
        }
    }
}

/// Evenly spaced levels: a weight is `level · scale + offset`.
#[derive(Clone, Copy)]
pub(super) struct Even {
    lowest: f32,
    highest: f32,
    zero: f32,
}

/// The levels of a table.
#[derive(Clone, Copy)]
pub(super) struct Uneven;

/// Levels in units of the scale.
pub(super) trait LevelRounding: Copy {
    /// The nearest level to `x`, and its code.
    fn level(self, x: f32) -> (f32, f32);
}

impl LevelRounding for Even {
    #[inline(always)]
    fn level(self, x: f32) -> (f32, f32) {
        let level = within(x.round_ties_even(), self.lowest, self.highest);
        (level, level + self.zero)
    }
}

impl LevelRounding for Uneven {
    #[inline(always)]
    fn level(self, x: f32) -> (f32, f32) {
        const FIRST: f32 = IQ4_NL_LEVELS[0] as f32;
        let (mut level, mut code) = (FIRST, 0.0);
        for i in 1..IQ4_NL_LEVELS.len() {
            let (below, above) = (f32::from(IQ4_NL_LEVELS[i - 1]), f32::from(IQ4_NL_LEVELS[i]));
            let more = x > (below + above) / 2.0;
            level += if more { above - below } else { 0.0 };
            code += if more { 1.0 } else { 0.0 };
        }
        (level, code)
    }
}

impl<L: LevelRounding> Rounding for L {
    /// All weights of a scale of 0 have one code.
    #[inline(always)]
    fn inverse(scale: f32) -> f32 {
        if scale == 0.0 { 0.0 } else { 1.0 / scale }
    }

    #[inline(always)]
    fn round(self, target: f32, inverse: f32, scale: f32, offset: f32) -> (f32, f32) {
        let (level, code) = self.level((target - offset) * inverse);
        (level * scale + offset, code)
    }
}

/// Fits `d` and the minimum of the tile's block, which is the panel, to the weights as compensated for all columns before it.
#[inline(always)]
pub(super) fn fit_block<S: Simd, L: LevelRounding>(
    simd: S,
    panel: &Panel<'_>,
    tile: &mut Tile<'_>,
    search: &BlockSearch,
    levels: L,
) {
    if !search.grid.has_sub_scales() {
        return;
    }
    let (columns, len) = (panel.groups.len(), search.grid.sub_len);
    compensate(simd, panel, tile, 0, columns);
    let mut scales = [[0.0; LANES]; MAX_SUB_BLOCKS];
    let mut mins = [[0.0; LANES]; MAX_SUB_BLOCKS];
    let mut scale_costs = [[0.0; LANES]; MAX_SUB_BLOCKS];
    let mut min_costs = [[0.0; LANES]; MAX_SUB_BLOCKS];
    let count = columns / len;
    for i in 0..count {
        let range = i * len..(i + 1) * len;
        let (weights, pivots) = (&tile.differences[range.clone()], &panel.pivots[range]);
        let mut best = [Candidate::NONE];
        by_diagonal(search, levels, None, weights, pivots, &mut best);
        let [Candidate { scale, zero: offset, .. }] = best;
        (scales[i], mins[i]) = (scale, offset.map(|offset| -offset));
        let inverse = scale.map(L::inverse);
        for (weights, pivot) in weights.iter().zip(pivots) {
            for l in 0..LANES {
                let (level, _) = levels.level((weights[l] - offset[l]) * inverse[l]);
                scale_costs[i][l] += pivot * pivot * (level * level);
                min_costs[i][l] += pivot * pivot;
            }
        }
    }
    let [low, high, largest_min] = search.integers;
    let far = if low < 0.0 { low } else { high };
    tile.units[0] = best_units(&scales[..count], &scale_costs[..count], far, [low, high]);
    if largest_min > 0.0 {
        tile.units[1] = best_units(&mins[..count], &min_costs[..count], largest_min, [0.0, largest_min]);
    }
}

/// The units that represent the values with the least error by integers in a range.
#[inline(always)]
fn best_units(values: &[Lane], costs: &[Lane], far: f32, [low, high]: [f32; 2]) -> Lane {
    let mut largest = [0.0f32; LANES];
    for values in values {
        for l in 0..LANES {
            largest[l] = if values[l].abs() > largest[l].abs() { values[l] } else { largest[l] };
        }
    }
    let (mut best, mut least) = ([0.0f32; LANES], [f32::INFINITY; LANES]);
    for (i, factor) in D_FACTORS.into_iter().enumerate() {
        let unit = largest.map(|largest| to_f16(factor as f32 * largest / far));
        let inverse = unit.map(<Even as Rounding>::inverse);
        let mut error = [0.0f32; LANES];
        for (values, costs) in values.iter().zip(costs) {
            for l in 0..LANES {
                let n = within((values[l] * inverse[l]).round_ties_even(), low, high);
                let off = unit[l] * n - values[l];
                error[l] += costs[l] * (off * off);
            }
        }
        for l in 0..LANES {
            let better = error[l] < least[l] || i == 0;
            (best[l], least[l]) = if better { (unit[l], error[l]) } else { (best[l], least[l]) };
        }
    }
    best
}

/// Fits scale and offset of the sub-block at `start..end` to the compensated weights in the tile's differences.
#[inline(always)]
pub(super) fn fit_sub_block<S: Simd, L: LevelRounding>(
    simd: S,
    panel: &Panel<'_>,
    tile: &mut Tile<'_>,
    search: &BlockSearch,
    levels: L,
    start: usize,
    end: usize,
) {
    let mut best = [Candidate::NONE; MAX_FINALISTS];
    let best = &mut best[..search.finalists];
    let (weights, pivots) = (&tile.differences[start..end], &panel.pivots[start..end]);
    by_diagonal(search, levels, Some(&*tile.units), weights, pivots, best);
    let best = best_by_block(simd, panel, tile, levels, start, end, best);
    let group = panel.groups[start] as usize;
    (tile.scales[group], tile.zeros[group]) = (best.scale, best.zero);
}

/// The best steps of each row by `Σ Ũ_ii² (q_i − w_i)²`, in ascending order, each once; as they are stored in blocks with `units`, or
/// as they are. `weights` `[g]` are compensated, `pivots` `[g]` are `Ũ_ii`.
#[inline(always)]
fn by_diagonal<L: LevelRounding>(
    search: &BlockSearch,
    levels: L,
    units: Option<&[Lane; 2]>,
    weights: &[Lane],
    pivots: &[f32],
    best: &mut [Candidate],
) {
    let (mut min, mut max) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    for weights in weights {
        for l in 0..LANES {
            min[l] = if weights[l] < min[l] { weights[l] } else { min[l] };
            max[l] = if weights[l] > max[l] { weights[l] } else { max[l] };
        }
    }
    let inverse_units = units.map(|units| units.map(|unit| unit.map(<Even as Rounding>::inverse)));
    for (i, &factor) in search.factors.iter().enumerate() {
        let mut candidate = covering(search, &min, &max, factor);
        refit(search, levels, weights, pivots, &mut candidate);
        if let (Some(units), Some(inverse)) = (units, &inverse_units) {
            store(search, units, inverse, &mut candidate);
        }
        candidate.cost = diagonal_cost(levels, weights, pivots, &candidate);
        if i == 0 {
            // If no scale fits fp16, no cost is a number: this candidate stays and is refused.
            best[0] = Candidate { cost: candidate.cost.map(|c| c.min(f32::INFINITY)), ..candidate };
            continue;
        }
        for better in &*best {
            for l in 0..LANES {
                let same = better.scale[l] == candidate.scale[l] && better.zero[l] == candidate.zero[l];
                candidate.cost[l] = if same { f32::INFINITY } else { candidate.cost[l] };
            }
        }
        for better in &mut *best {
            better.sort_with(&mut candidate);
        }
    }
}

/// The step whose levels cover `factor` times the range.
#[inline(always)]
fn covering(search: &BlockSearch, min: &Lane, max: &Lane, factor: f32) -> Candidate {
    let mut step = Candidate::NONE;
    let width = search.ends[1] - search.ends[0];
    let (offsets, pairs) = (search.grid.has_offsets(), search.grid.has_sub_scales());
    for l in 0..LANES {
        if offsets {
            let min = if pairs { min[l].min(0.0) } else { min[l] };
            let (middle, half) = ((max[l] + min) * 0.5, factor * (max[l] - min) * 0.5);
            let offset = middle - half;
            step.zero[l] = if pairs { offset.min(0.0) } else { offset };
            step.scale[l] = 2.0 * half / width;
        } else {
            step.scale[l] = 2.0 * factor * min[l].abs().max(max[l].abs()) / width;
        }
    }
    step
}

/// The step with the least squared error for the codes that `step` gives.
#[inline(always)]
fn refit<L: LevelRounding>(
    search: &BlockSearch,
    levels: L,
    weights: &[Lane],
    pivots: &[f32],
    step: &mut Candidate,
) {
    let inverse = step.scale.map(L::inverse);
    let [mut sum_l, mut sum_ll, mut sum_w, mut sum_wl] = [[0.0f32; LANES]; 4];
    let mut cost = 0.0;
    for (weights, pivot) in weights.iter().zip(pivots) {
        let square = pivot * pivot;
        cost += square;
        for l in 0..LANES {
            let (level, _) = levels.level((weights[l] - step.zero[l]) * inverse[l]);
            let weighted = square * level;
            sum_l[l] += weighted;
            sum_ll[l] += weighted * level;
            sum_w[l] += square * weights[l];
            sum_wl[l] += weighted * weights[l];
        }
    }
    let (offsets, pairs) = (search.grid.has_offsets(), search.grid.has_sub_scales());
    for l in 0..LANES {
        let alone =
            if sum_ll[l] > 0.0 { (sum_wl[l] / sum_ll[l], 0.0) } else { (step.scale[l], step.zero[l]) };
        if !offsets {
            (step.scale[l], step.zero[l]) = alone;
            continue;
        }
        let determinant = cost * sum_ll[l] - sum_l[l] * sum_l[l];
        let inverse = 1.0 / determinant;
        let scale = (cost * sum_wl[l] - sum_l[l] * sum_w[l]) * inverse;
        let offset = (sum_ll[l] * sum_w[l] - sum_l[l] * sum_wl[l]) * inverse;
        let both = if pairs && offset > 0.0 { alone } else { (scale, offset) };
        let singular = determinant <= 1e-6 * cost * sum_ll[l];
        (step.scale[l], step.zero[l]) = if singular { (step.scale[l], step.zero[l]) } else { both };
    }
}

/// Rounds a step to what a block with `units` can store.
#[inline(always)]
fn store(search: &BlockSearch, units: &[Lane; 2], inverse: &[Lane; 2], step: &mut Candidate) {
    let [low, high, largest_min] = search.integers;
    match search.grid.scales {
        ScaleForm::Scale => step.scale = step.scale.map(to_f16),
        ScaleForm::ScaleAndMin => {
            (step.scale, step.zero) = (step.scale.map(to_f16), step.zero.map(to_f16));
        }
        ScaleForm::Signed(_) | ScaleForm::Pairs(_) => {
            for l in 0..LANES {
                let scale = within((step.scale[l] * inverse[0][l]).round_ties_even(), low, high);
                let min = within((-step.zero[l] * inverse[1][l]).round_ties_even(), 0.0, largest_min);
                step.scale[l] = units[0][l] * scale;
                step.zero[l] = 0.0 - units[1][l] * min;
            }
        }
    }
}

#[inline(always)]
fn diagonal_cost<L: LevelRounding>(levels: L, weights: &[Lane], pivots: &[f32], step: &Candidate) -> Lane {
    let inverse = step.scale.map(L::inverse);
    let mut cost = [0.0f32; LANES];
    for (weights, pivot) in weights.iter().zip(pivots) {
        for l in 0..LANES {
            let (quantized, _) = levels.round(weights[l], inverse[l], step.scale[l], step.zero[l]);
            let error = (quantized - weights[l]) * pivot;
            cost[l] += error * error;
        }
    }
    cost
}

#[inline(always)]
fn to_f16(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}
