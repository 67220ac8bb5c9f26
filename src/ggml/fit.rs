//! Fitting scales and offsets to weights: the definition, in f64. The fast solver does the same for many rows at once.

use half::f16;

use super::{Block, BlockGrid, Levels, MAX_SUB_BLOCKS, ScaleForm};
use crate::fp16::nearest_f16;

/// Scale and offset of a sub-block. A weight is `scale · level(code) + offset`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SubStep {
    /// May be negative, or zero.
    pub scale: f64,
    /// Zero for grids without offsets.
    pub offset: f64,
}

/// The weights of a sub-block, and the cost of a unit of squared error of each.
#[derive(Debug, Clone, Copy)]
pub struct SubBlock<'a> {
    /// `[g]`.
    pub weights: &'a [f64],
    /// `[g]`.
    pub costs: &'a [f64],
}

/// The difference of neighbouring factors in [`BlockGrid::factors`].
const SHRINK_STEP: f64 = 0.02;

/// Values of `d` that are compared for a block of sub-blocks, as factors of the value that just reaches the largest scale.
pub const D_FACTORS: [f64; 9] = [1.0, 0.96, 0.92, 0.88, 0.84, 1.04, 1.08, 1.12, 1.16];

impl BlockGrid {
    /// Factors of the scale of the weights' range that are tried, in order; the first of equal candidates wins. None is 1, where the
    /// largest weight may lie just between two levels. `search`: whether
    /// scales below that of the range are tried. `signed`: whether negative scales are tried, of grids without offsets.
    pub fn factors(&self, search: bool, signed: bool) -> Vec<f64> {
        let steps = match self.levels.count() {
            _ if !search => 0,
            0..=4 => 36,
            5..=8 => 30,
            9..=16 => 22,
            17..=32 => 15,
            33..=64 => 10,
            _ => 5,
        };
        let shrunk = (0..=steps).map(|i| 1.01 - SHRINK_STEP * f64::from(i));
        if signed && !self.has_offsets() { shrunk.flat_map(|f| [f, -f]).collect() } else { shrunk.collect() }
    }

    /// Whether weights have an offset.
    pub fn has_offsets(&self) -> bool {
        matches!(self.scales, ScaleForm::ScaleAndMin | ScaleForm::Pairs(_))
    }

    /// Whether the scales of sub-blocks are integers, in units of the block's.
    pub fn has_sub_scales(&self) -> bool {
        matches!(self.scales, ScaleForm::Signed(_) | ScaleForm::Pairs(_))
    }

    /// The code whose level is nearest to a weight.
    pub fn code(&self, weight: f64, step: SubStep) -> u8 {
        self.levels.code(if step.scale == 0.0 { 0.0 } else { (weight - step.offset) / step.scale })
    }

    /// The weight that a code stands for.
    pub fn weight(&self, code: u8, step: SubStep) -> f64 {
        step.scale * f64::from(self.levels.level(code)) + step.offset
    }

    /// The step whose levels cover `factor` times the range of the weights; a negative factor turns the levels around.
    fn covering(&self, weights: &[f64], factor: f64) -> SubStep {
        let (min, max) =
            weights.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), &w| (a.min(w), b.max(w)));
        let [lowest, highest] = self.levels.ends().map(f64::from);
        let width = highest - lowest;
        match self.scales {
            ScaleForm::Scale | ScaleForm::Signed(_) => {
                SubStep { scale: 2.0 * factor * min.abs().max(max.abs()) / width, offset: 0.0 }
            }
            ScaleForm::ScaleAndMin | ScaleForm::Pairs(_) => {
                // Offsets of pairs are never above zero.
                let min = if self.has_sub_scales() { min.min(0.0) } else { min };
                let (middle, half) = ((max + min) / 2.0, factor * (max - min) / 2.0);
                let offset = middle - half;
                let offset = if self.has_sub_scales() { offset.min(0.0) } else { offset };
                SubStep { scale: 2.0 * half / width, offset }
            }
        }
    }

    /// The step with the least squared error for the codes that `step` gives; `step` if there is none.
    fn refit(&self, part: &SubBlock<'_>, step: SubStep) -> SubStep {
        let [mut c, mut l, mut ll, mut w, mut wl] = [0.0f64; 5];
        for (&weight, &cost) in part.weights.iter().zip(part.costs) {
            let level = f64::from(self.levels.level(self.code(weight, step)));
            c += cost;
            l += cost * level;
            ll += cost * level * level;
            w += cost * weight;
            wl += cost * weight * level;
        }
        let alone = if ll > 0.0 { SubStep { scale: wl / ll, offset: 0.0 } } else { step };
        if !self.has_offsets() {
            return alone;
        }
        let determinant = c * ll - l * l;
        if determinant <= 1e-6 * c * ll {
            return step;
        }
        let (scale, offset) = ((c * wl - l * w) / determinant, (ll * w - l * wl) / determinant);
        if self.has_sub_scales() && offset > 0.0 { alone } else { SubStep { scale, offset } }
    }

    /// `Σ cost · (q − w)²`.
    pub fn cost(&self, part: &SubBlock<'_>, step: SubStep) -> f64 {
        let errors = part.weights.iter().map(|&w| self.weight(self.code(w, step), step) - w);
        errors.zip(part.costs).map(|(error, cost)| cost * error * error).sum()
    }

    /// The steps of `factors`, rounded to what `store` can store, by ascending cost. The order is stable, and equal steps are
    /// in the list once.
    pub fn candidates(
        &self,
        part: &SubBlock<'_>,
        factors: &[f64],
        store: impl Fn(SubStep) -> SubStep,
    ) -> Vec<(f64, SubStep)> {
        let mut all: Vec<(f64, SubStep)> = Vec::new();
        for &factor in factors {
            let step = store(self.refit(part, self.covering(part.weights, factor)));
            if !all.iter().any(|(_, other)| *other == step) {
                all.push((self.cost(part, step), step));
            }
        }
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        all
    }

    /// `d` and the minimum of a block, for the best steps of its sub-blocks if these could be stored as they are.
    pub fn block_scales(&self, parts: &[SubBlock<'_>], factors: &[f64]) -> [f16; 2] {
        let mut scales = Vec::with_capacity(MAX_SUB_BLOCKS);
        let mut mins = Vec::with_capacity(MAX_SUB_BLOCKS);
        for part in parts {
            let step = self.candidates(part, factors, |step| step)[0].1;
            let squares = |&w: &f64| f64::from(self.levels.level(self.code(w, step))).powi(2);
            let by_scale = part.weights.iter().zip(part.costs).map(|(w, cost)| cost * squares(w)).sum();
            scales.push((step.scale, by_scale));
            mins.push((-step.offset, part.costs.iter().sum()));
        }
        match &self.scales {
            ScaleForm::Signed(range) => {
                [best_unit(&scales, [*range.start(), *range.end()].map(f64::from)), f16::ZERO]
            }
            ScaleForm::Pairs(largest) => {
                let range = [f64::from(*largest), 0.0];
                [best_unit(&scales, range), best_unit(&mins, range)]
            }
            ScaleForm::Scale | ScaleForm::ScaleAndMin => [f16::ZERO; 2],
        }
    }

    /// The nearest step that can be stored in a block with this `d` and minimum.
    pub fn stored(&self, step: SubStep, [d, min]: [f16; 2]) -> SubStep {
        let SubStep { scale, offset } = step;
        let (d, min) = (f64::from(d), f64::from(min));
        let f16 = |x: f64| f64::from(nearest_f16(x));
        match &self.scales {
            ScaleForm::Scale => SubStep { scale: f16(scale), offset: 0.0 },
            ScaleForm::ScaleAndMin => SubStep { scale: f16(scale), offset: f16(offset) },
            ScaleForm::Signed(range) => {
                let [lowest, highest] = [*range.start(), *range.end()].map(f64::from);
                SubStep { scale: d * nearest(scale, d, lowest, highest), offset: 0.0 }
            }
            ScaleForm::Pairs(largest) => {
                let largest = f64::from(*largest);
                let (scale, min) =
                    (d * nearest(scale, d, 0.0, largest), min * nearest(-offset, min, 0.0, largest));
                SubStep { scale, offset: 0.0 - min }
            }
        }
    }
}

impl Levels {
    /// Their number.
    pub fn count(&self) -> usize {
        match self {
            Self::Uniform { codes, .. } => codes.len(),
            Self::Table(levels) => levels.len(),
        }
    }
}

impl Block {
    /// Sets the scale and the offset of the sub-block `i` to a step that can be stored with this block's `d` and minimum. Blocks without
    /// integer scales get their `d` and minimum from it.
    pub fn set_step(&mut self, form: &ScaleForm, i: usize, step: SubStep) {
        let SubStep { scale, offset } = step;
        let (d, min) = (f64::from(self.d), f64::from(self.min));
        match form {
            ScaleForm::Scale | ScaleForm::ScaleAndMin => {
                (self.d, self.min) = (nearest_f16(scale), nearest_f16(offset));
            }
            ScaleForm::Signed(_) => self.scales[i] = nearest(scale, d, -128.0, 127.0) as i8,
            ScaleForm::Pairs(_) => {
                self.scales[i] = nearest(scale, d, 0.0, 127.0) as i8;
                self.mins[i] = nearest(-offset, min, 0.0, 255.0) as u8;
            }
        }
    }
}

/// The integer `n` from `lowest` to `highest` with `n · unit` nearest to `x`; 0 for a unit of 0.
fn nearest(x: f64, unit: f64, lowest: f64, highest: f64) -> f64 {
    if unit == 0.0 { 0.0 } else { (x / unit).round_ties_even().clamp(lowest, highest) }
}

/// The fp16 unit whose integer multiples, within a range, represent `values` with the least error. Each value has the cost of a
/// unit of squared error. The first end is the one that is farther from zero; the largest value reaches it at the factor 1.
fn best_unit(values: &[(f64, f64)], [far, near]: [f64; 2]) -> f16 {
    let largest = values.iter().fold(0.0f64, |best, &(x, _)| if x.abs() > best.abs() { x } else { best });
    let (lowest, highest) = (far.min(near), far.max(near));
    let mut best = (f64::INFINITY, f16::ZERO);
    for factor in D_FACTORS {
        let unit = nearest_f16(factor * largest / far);
        let wide = f64::from(unit);
        let error = |&(x, cost): &(f64, f64)| cost * (wide * nearest(x, wide, lowest, highest) - x).powi(2);
        let error: f64 = values.iter().map(error).sum();
        if error < best.0 {
            best = (error, unit);
        }
    }
    if best.0.is_infinite() { nearest_f16(largest / far) } else { best.1 }
}
