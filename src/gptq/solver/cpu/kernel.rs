//! The column loop on the CPU: a panel of columns for a tile of [`LANES`] rows, kept in cache.
//!
//! Everything here works on local buffers `[column][lane]`, one lane for each row of the weight, so that each step is the
//! same arithmetic on neighbouring floats. The bodies are plain loops over fixed-size arrays, except for the innermost
//! products (`vectors`). pulp compiles them once for each instruction set, and chooses the set at run time, so that builds
//! need no `target-cpu`.

use pulp::{Arch, Simd, WithSimd};

use super::{
    blocks::{self, BlockSearch, Uneven},
    scale_search::{self, Search, TOGETHER},
    vectors::{add, add_to_later, product, subtract_from},
};
use crate::gptq::Grid;

/// Rows of the weight handled together.
pub(super) const LANES: usize = 32;

/// One value for each row of a tile.
pub(super) type Lane = [f32; LANES];

/// Columns of a factor that are multiplied together.
pub(super) const COLUMNS: usize = 8;

/// Neighbouring columns of a row of a factor. A factor `[J, C]` is a list of these: for each [`COLUMNS`] columns all
/// rows, so that a product reads it in order. Values beyond the last column are undefined.
pub(super) type Columns = [f32; COLUMNS];

/// Inputs that all tiles of a panel share. Columns are counted from the panel's start.
pub(super) struct Panel<'a> {
    /// `Ũ_pp` `[P, P]`, upper triangular.
    pub(super) factor: &'a [Columns],
    /// Group of each column, `[P]`.
    pub(super) groups: &'a [u32],
    /// Columns where the kernel fits a scale to the compensated weights; ascending, empty when all scales are known.
    pub(super) fits: &'a [usize],
    /// `Ũ_ii` of each column, `[P]`.
    pub(super) pivots: &'a [f32],
    /// The grid, and the candidates where a scale is fitted.
    pub(super) grid: PanelGrid<'a>,
}

/// A grid of the column loop.
#[derive(Clone, Copy)]
pub(super) enum PanelGrid<'a> {
    /// Of a variant of GPTQ's format.
    Gptq(Grid, &'a Search),
    /// Of blocks of ggml. A panel is one block, or several whole ones of a single sub-block each.
    Blocks(&'a BlockSearch),
}

/// Rounding of compensated weights to codes, lane by lane.
pub(super) trait Rounding: Copy {
    /// The factor by which weights of this scale are multiplied before they are rounded.
    fn inverse(scale: f32) -> f32;

    /// The value that is nearest to `target`, and its code. `zero` is the zero point, or the offset.
    fn round(self, target: f32, inverse: f32, scale: f32, zero: f32) -> (f32, f32);
}

/// Codes from 0 to `max_code`, with a zero point among them.
#[derive(Clone, Copy)]
pub(super) struct AroundZero {
    max_code: f32,
}

impl AroundZero {
    #[inline(always)]
    pub(super) fn new(grid: Grid) -> Self {
        Self { max_code: f32::from(grid.max_code()) }
    }
}

/// `x`, but at least `low` and at most `high`; `low` for NaN. It takes half as many instructions as the methods of `f32`, which are
/// defined for limits of NaN too.
#[inline(always)]
pub(super) fn within(x: f32, low: f32, high: f32) -> f32 {
    let x = if x > low { x } else { low };
    if x < high { x } else { high }
}

impl Rounding for AroundZero {
    #[inline(always)]
    fn inverse(scale: f32) -> f32 {
        1.0 / scale
    }

    #[inline(always)]
    fn round(self, target: f32, inverse: f32, scale: f32, zero: f32) -> (f32, f32) {
        let code = within((target * inverse).round_ties_even() + zero, 0.0, self.max_code);
        ((code - zero) * scale, code)
    }
}

/// Buffers of one tile for one panel.
pub(super) struct Tile<'a> {
    /// Original weights `[P]`.
    pub(super) weights: &'a [Lane],
    /// In: `r` of all columns before the panel. Overwritten.
    pub(super) residuals: &'a mut [Lane],
    /// Out: `d = ŵ − w` `[P]`. Meanwhile it holds compensated weights.
    pub(super) differences: &'a mut [Lane],
    /// Scratch `[P]`: the differences that each candidate scale leads to.
    pub(super) trials: &'a mut [Vec<Lane>; TOGETHER],
    /// Out: codes `[P]`.
    pub(super) codes: &'a mut [[u8; LANES]],
    /// Scales `[G]`, as rounded to fp16; filled where the panel fits them.
    pub(super) scales: &'a mut [Lane],
    /// Zero points `[G]`; of blocks, offsets.
    pub(super) zeros: &'a mut [Lane],
    /// Out: `d` and the minimum of the panel's block, of types with sub-blocks.
    pub(super) units: &'a mut [Lane; 2],
    /// Adds `Σ ((ŵ_i − t_i) Ũ_ii)²`, the damped objective, lane by lane.
    pub(super) objective: &'a mut [f64; LANES],
    /// Adds `Σ d²`, lane by lane.
    pub(super) distance: &'a mut [f64; LANES],
}

impl Panel<'_> {
    /// Rows `rows` of the columns `first..first + COLUMNS`; `first` is a multiple of [`COLUMNS`].
    #[inline(always)]
    pub(super) fn rows(&self, first: usize, rows: std::ops::Range<usize>) -> &[Columns] {
        &self.factor[first / COLUMNS * self.groups.len()..][rows]
    }
}

/// `r[c] += Σ_j factor[j, c] · source[j]`, for the factor's [`COLUMNS`] columns and as many lanes, or fewer.
pub(super) fn multiply_add(factor: &[Columns], source: &[Lane], r: &mut [Lane]) {
    struct MultiplyAdd<'a>(&'a [Columns], &'a [Lane], &'a mut [Lane]);
    impl WithSimd for MultiplyAdd<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self(factor, source, r) = self;
            let sums = product(simd, factor, source);
            r.iter_mut().zip(&sums).for_each(|(r, sum)| add(simd, r, sum));
        }
    }
    Arch::new().dispatch(MultiplyAdd(factor, source, r));
}

/// Quantizes one tile over one panel.
pub(super) fn solve_tile(panel: &Panel<'_>, tile: &mut Tile<'_>) {
    struct SolveTile<'a, 'b, 'c>(&'a Panel<'b>, &'a mut Tile<'c>);
    impl WithSimd for SolveTile<'_, '_, '_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            solve(simd, self.0, self.1);
        }
    }
    Arch::new().dispatch(SolveTile(panel, tile));
}

#[inline(always)]
fn solve<S: Simd>(simd: S, panel: &Panel<'_>, tile: &mut Tile<'_>) {
    match panel.grid {
        PanelGrid::Gptq(grid, search) => solve_variant(simd, panel, tile, grid, search),
        PanelGrid::Blocks(search) => match search.even() {
            Some(levels) => solve_blocks(simd, panel, tile, search, levels),
            None => solve_blocks(simd, panel, tile, search, Uneven),
        },
    }
}

#[inline(always)]
fn solve_variant<S: Simd>(simd: S, panel: &Panel<'_>, tile: &mut Tile<'_>, grid: Grid, search: &Search) {
    let columns = panel.groups.len();
    let mut start = 0;
    while start < columns {
        let fit = panel.fits.contains(&start);
        let end = block_end(panel, start);
        if fit {
            compensate(simd, panel, tile, start, end);
            scale_search::fit_scales(simd, panel, tile, search, start, end);
        }
        quantize_block(simd, panel, tile, AroundZero::new(grid), start, end);
        push_residuals(simd, panel, tile, start, end);
        start = end;
    }
}

#[inline(always)]
fn solve_blocks<S: Simd, L: blocks::LevelRounding>(
    simd: S,
    panel: &Panel<'_>,
    tile: &mut Tile<'_>,
    search: &BlockSearch,
    levels: L,
) {
    blocks::fit_block(simd, panel, tile, search, levels);
    let columns = panel.groups.len();
    let mut start = 0;
    while start < columns {
        let end = block_end(panel, start);
        compensate(simd, panel, tile, start, end);
        blocks::fit_sub_block(simd, panel, tile, search, levels, start, end);
        quantize_block(simd, panel, tile, levels, start, end);
        push_residuals(simd, panel, tile, start, end);
        start = end;
    }
}

/// Columns quantized before their effect is added to later columns, if no group begins earlier.
const BLOCK: usize = 64;

fn block_end(panel: &Panel<'_>, start: usize) -> usize {
    let columns = panel.groups.len();
    if panel.fits.is_empty() {
        return (start + BLOCK).min(columns);
    }
    panel.fits.iter().copied().find(|&f| f > start).unwrap_or(columns)
}

/// `differences[c] = w_c − x_c` with `Ũ_ggᵀ x = r_g`: forward substitution.
#[inline(always)]
pub(super) fn compensate<S: Simd>(simd: S, panel: &Panel<'_>, tile: &mut Tile<'_>, start: usize, end: usize) {
    let x = &mut *tile.differences;
    let mut c = start;
    while c < end {
        let (first, next) = span(c, end);
        let mut sums = product(simd, panel.rows(first, start..c), &x[start..c]);
        let own = panel.rows(first, c..next);
        for column in c..next {
            let at = column - first;
            let inverse = 1.0 / own[column - c][at];
            for l in 0..LANES {
                x[column][l] = (tile.residuals[column][l] - sums[at][l]) * inverse;
            }
            add_to_later(simd, &mut sums[at..next - first], &own[column - c][at..], &x[column]);
        }
        c = next;
    }
    let columns = tile.weights[start..end].iter().zip(&mut x[start..end]);
    columns.for_each(|(weights, x)| subtract_from(simd, weights, x));
}

/// Quantizes the columns `start..end`; `residuals` already include the columns before `start`.
#[inline(always)]
fn quantize_block<S: Simd, R: Rounding>(
    simd: S,
    panel: &Panel<'_>,
    tile: &mut Tile<'_>,
    rounding: R,
    start: usize,
    end: usize,
) {
    let d = &mut *tile.differences;
    let (mut objective, mut distance) = ([0.0f32; LANES], [0.0f32; LANES]);
    let (mut inverse_scale, mut inverse_of) = ([0.0; LANES], usize::MAX);
    let mut c = start;
    while c < end {
        let (first, next) = span(c, end);
        let mut sums = product(simd, panel.rows(first, start..c), &d[start..c]);
        let own = panel.rows(first, c..next);
        for column in c..next {
            let at = column - first;
            let pivot = own[column - c][at];
            let (inverse_pivot, group) = (1.0 / pivot, panel.groups[column] as usize);
            let (scale, zero) = (&tile.scales[group], &tile.zeros[group]);
            if group != inverse_of {
                inverse_of = group;
                inverse_scale = scale.map(R::inverse);
            }
            let (weight, residual, sum) = (&tile.weights[column], &tile.residuals[column], &sums[at]);
            for l in 0..LANES {
                let target = weight[l] - (residual[l] + sum[l]) * inverse_pivot;
                let (quantized, code) = rounding.round(target, inverse_scale[l], scale[l], zero[l]);
                let error = (quantized - target) * pivot;
                d[column][l] = quantized - weight[l];
                objective[l] += error * error;
                distance[l] += d[column][l] * d[column][l];
                // A whole number from 0 to 255 plus 2²³ has itself as its lowest bits.
                tile.codes[column][l] = (code + 8_388_608.0).to_bits() as u8;
            }
            add_to_later(simd, &mut sums[at..next - first], &own[column - c][at..], &d[column]);
        }
        c = next;
    }
    for l in 0..LANES {
        tile.objective[l] += f64::from(objective[l]);
        tile.distance[l] += f64::from(distance[l]);
    }
}

/// Adds the effect of the columns `start..end` to the residuals of later columns.
#[inline(always)]
fn push_residuals<S: Simd>(simd: S, panel: &Panel<'_>, tile: &mut Tile<'_>, start: usize, end: usize) {
    let columns = panel.groups.len();
    let mut c = end;
    while c < columns {
        let (first, next) = span(c, columns);
        let sums = product(simd, panel.rows(first, start..end), &tile.differences[start..end]);
        tile.residuals[c..next].iter_mut().zip(&sums[c - first..]).for_each(|(r, sum)| add(simd, r, sum));
        c = next;
    }
}

/// The list of [`Columns`] that holds column `c`: its first column, and the end of its columns up to `end`.
#[inline(always)]
pub(super) fn span(c: usize, end: usize) -> (usize, usize) {
    let first = c / COLUMNS * COLUMNS;
    (first, (first + COLUMNS).min(end))
}
