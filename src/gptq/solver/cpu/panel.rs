//! A panel of columns for all rows: residuals from the columns before it, then its own columns, tile by tile.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use rayon::prelude::*;

use super::{CpuFactor, LANES, Lane, Stack, State, stack::Layout};
use crate::{
    amx::{self, Line, Operand, Parts, SIDE, Side, Square, Tiles},
    gptq::{
        raw::{Matrix, SharedSlice},
        solver::cpu::{
            Groups,
            kernel::{self, COLUMNS, Columns, Panel, PanelGrid, Tile},
            scale_search::TOGETHER,
        },
    },
};

// A tile is a strip of an operand, and a panel's lanes fill just as much memory as its strip in two parts.
const _: () = assert!(LANES == SIDE);
const _: () = assert!(SIDE * size_of::<Lane>() == 2 * SIDE * SIDE * size_of::<u16>());

/// The most tiles whose residuals are computed together. Each part of the factor is read once for all of them; the tiles and
/// that part fit the second-level cache.
const MAX_TILES: usize = 8;

/// `Ũ` laid out for a panel.
pub(super) struct PanelFactor {
    solved: SolvedFactor,
    /// `[P, P]`, of the panel's own columns.
    own: Vec<Columns>,
}

/// Layouts for panels, by the width of panels and the first column.
pub(super) type PanelFactors = Mutex<HashMap<[usize; 2], Arc<PanelFactor>>>;

/// Rows up to which layouts are kept. To lay the factor out takes as long as to multiply it with hundreds of rows, and so few come from
/// solves of some rows at a time, which need the layouts again.
const FEW_ROWS: usize = 512;

/// `Ũ` of the solved columns (the depth: panel after panel, as in [`Layout`]) and of a panel's columns.
enum SolvedFactor {
    /// A left operand.
    Bf16(Operand, Parts),
    /// `[depth, P]`: for each panel of the depth the lists of its rows, one after another in memory.
    Fp32 { factor: Vec<Columns>, lists: usize },
}

impl CpuFactor {
    /// Solves some columns of the quantization order for all rows.
    pub(super) fn solve_panel(
        &self,
        stack: &mut Stack,
        columns: Range<usize>,
        groups: &Groups,
        grid: PanelGrid<'_>,
        state: &mut State,
    ) {
        let (layout, products) = (stack.layout, self.products);
        let (p, order) = (columns.len(), self.damped.order.columns());
        let factor = self.panel_factor(layout, &columns);
        let fits: Vec<usize> = if groups.fitted { (0..p).step_by(groups.size).collect() } else { Vec::new() };
        let groups_of = &groups.of_columns[columns.clone()];
        let pivots: Vec<f32> = columns.clone().map(|i| self.pivot(i)).collect();
        let panel = Panel { factor: &factor.own, groups: groups_of, fits: &fits, pivots: &pivots, grid };
        let (groups, panels) = (groups.count, layout.k.div_ceil(layout.width));

        let codes = SharedSlice::new(&mut state.codes);
        let together = (layout.tiles() / (4 * rayon::current_num_threads())).clamp(1, MAX_TILES);
        let blocks = stack
            .lines_mut()
            .par_chunks_mut(layout.tile_lines() * together)
            .zip(state.scales.par_chunks_mut(groups * together))
            .zip(state.zeros.par_chunks_mut(groups * together))
            .zip(state.units.par_chunks_mut(panels * together))
            .zip(state.objective.par_chunks_mut(LANES * together))
            .zip(state.distance.par_chunks_mut(LANES * together));
        blocks.enumerate().for_each_init(
            || Scratch::new(layout, together),
            |scratch, (block, (((((lines, scales), zeros), units), objective), distance))| {
                let Scratch { residuals, differences, trials, codes: tile_codes } = scratch;
                let residuals: &mut [Lane] = bytemuck::cast_slice_mut(residuals);
                factor.solved.multiply(layout, lines, residuals);
                let tiles = lines
                    .chunks_mut(layout.tile_lines())
                    .zip(residuals.chunks_mut(layout.padded()))
                    .zip(scales.chunks_mut(groups).zip(zeros.chunks_mut(groups)))
                    .zip(units.chunks_mut(panels))
                    .zip(objective.chunks_mut(LANES).zip(distance.chunks_mut(LANES)));
                for (i, ((((lines, residuals), (scales, zeros)), units), (objective, distance))) in
                    tiles.enumerate()
                {
                    let tile = block * together + i;
                    let lanes = layout.lanes(tile);
                    for scales in scales.iter_mut() {
                        // Lanes beyond the last row must not divide by 0.
                        scales[lanes..].fill(1.0);
                    }
                    let of_panel = columns.start / layout.width * layout.panel_lines();
                    let lines = &mut lines[of_panel..][..layout.panel_lines()];
                    let weights: &[Lane] = bytemuck::cast_slice(lines);
                    let (mut sum_objective, mut sum_distance) = ([0.0; LANES], [0.0; LANES]);
                    kernel::solve_tile(
                        &panel,
                        &mut Tile {
                            weights: &weights[..p],
                            residuals: &mut residuals[..p],
                            differences: &mut differences[..p],
                            trials,
                            codes: &mut tile_codes[..p],
                            scales,
                            zeros,
                            units: &mut units[columns.start / layout.width],
                            objective: &mut sum_objective,
                            distance: &mut sum_distance,
                        },
                    );
                    objective.iter_mut().zip(sum_objective).for_each(|(to, sum)| *to += sum);
                    distance.iter_mut().zip(sum_distance).for_each(|(to, sum)| *to += sum);
                    for (&column, tile_codes) in order[columns.clone()].iter().zip(tile_codes.iter()) {
                        // SAFETY: this task alone has this tile, and every column is solved once.
                        let to = unsafe { codes.part(column as usize * layout.n + tile * LANES, lanes) };
                        to.copy_from_slice(&tile_codes[..lanes]);
                    }
                    match products {
                        Some(parts) => as_operand(lines, differences, parts),
                        None => bytemuck::cast_slice_mut(lines).copy_from_slice(differences),
                    }
                }
            },
        );
    }

    fn panel_factor(&self, layout: Layout, columns: &Range<usize>) -> Arc<PanelFactor> {
        let new = || {
            let (solved, own) = (self.solved_factor(layout, columns), self.own_factor(columns));
            Arc::new(PanelFactor { solved, own })
        };
        if layout.n > FEW_ROWS {
            return new();
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(kept.entry([layout.width, columns.start]).or_insert_with(new))
    }

    /// `Ũ` of a panel's columns: the block of `L` on the diagonal, reversed on both axes.
    fn own_factor(&self, columns: &Range<usize>) -> Vec<Columns> {
        let (lower, last, p) =
            (Matrix::new(&self.damped.factor), self.damped.order.columns().len() - 1, columns.len());
        let mut factor = vec![[0.0; COLUMNS]; p.div_ceil(COLUMNS) * p];
        for (j, at) in columns.clone().enumerate() {
            let row = lower.row(last - at);
            for (c, column) in columns.clone().enumerate().skip(j) {
                factor[c / COLUMNS * p + j][c % COLUMNS] = row[last - column];
            }
        }
        factor
    }

    fn solved_factor(&self, layout: Layout, columns: &Range<usize>) -> SolvedFactor {
        let lower = Matrix::new(&self.damped.factor);
        let (padded, depth) = (layout.padded(), columns.start / layout.width * layout.padded());
        // `[depth, column]` of `Ũ`, which is `L` with both axes reversed; zero beyond the end of either axis.
        let square = |strip: usize, depth: usize| -> Square {
            let (panel, depth) = (depth / padded, depth % padded);
            let end = layout.k - columns.start - strip * SIDE;
            let begin = (layout.k - columns.end).max(end.saturating_sub(SIDE));
            let mut square = [[0.0; SIDE]; SIDE];
            for (d, to) in square.iter_mut().enumerate().take(layout.width - depth) {
                let row = &lower.row(layout.k - 1 - (panel * layout.width + depth + d))[begin..end];
                to.iter_mut().zip(row.iter().rev()).for_each(|(to, &l)| *to = l);
            }
            square
        };
        if let Some(parts) = self.products {
            let mut left = Operand::zeros(depth, columns.len(), parts);
            let chunks = left.lines_mut().par_chunks_mut(parts.chunk_len()).enumerate();
            chunks.for_each(|(i, chunk)| {
                let of_strip = depth / SIDE;
                amx::fill_from_f32(chunk, Side::Left, parts, &square(i / of_strip, i % of_strip * SIDE));
            });
            return SolvedFactor::Bf16(left, parts);
        }
        const LISTS: usize = SIDE / COLUMNS;
        let lists = columns.len().div_ceil(COLUMNS);
        let mut factor = vec![[0.0; COLUMNS]; lists * depth];
        factor.par_chunks_mut(lists * padded).enumerate().for_each(|(panel, factor)| {
            for (strip, lists) in factor.chunks_mut(LISTS * padded).enumerate() {
                for first in (0..padded).step_by(SIDE) {
                    for (row, d) in square(strip, panel * padded + first).iter().zip(first..) {
                        let parts = row.as_chunks().0.iter();
                        lists.chunks_mut(padded).zip(parts).for_each(|(list, part)| list[d] = *part);
                    }
                }
            }
        });
        SolvedFactor::Fp32 { factor, lists }
    }
}

impl SolvedFactor {
    /// Residuals `[tile][padded]` of some tiles, whose lines are given.
    fn multiply(&self, layout: Layout, lines: &[Line], residuals: &mut [Lane]) {
        residuals.fill([0.0; LANES]);
        let padded = layout.padded();
        let depth = match self {
            Self::Bf16(left, parts) => left.strip_len() / parts.chunk_len() * SIDE,
            Self::Fp32 { factor, lists } => factor.len() / lists,
        };
        let tiles = Tiles::new();
        for first in (0..depth).step_by(padded) {
            for (tile, r) in lines.chunks(layout.tile_lines()).zip(residuals.chunks_mut(padded)) {
                let differences = &tile[first / padded * layout.panel_lines()..][..layout.panel_lines()];
                match self {
                    Self::Bf16(left, parts) => {
                        let squares = r.as_flattened_mut().chunks_mut(SIDE * LANES);
                        for (strip, square) in squares.enumerate().take(left.strips()) {
                            let left = left.chunks(strip, first / SIDE, (first + padded) / SIDE);
                            tiles.multiply_add(left, &differences[..left.len()], *parts, square, LANES);
                        }
                    }
                    Self::Fp32 { factor, lists } => {
                        let differences = bytemuck::cast_slice(differences);
                        let lists = factor[lists * first..].chunks(padded).take(*lists);
                        for (factor, r) in lists.zip(r.chunks_mut(COLUMNS)) {
                            kernel::multiply_add(factor, differences, r);
                        }
                    }
                }
            }
        }
    }
}

/// Replaces the lanes of a panel by its differences `[≥ P]`, laid out as a strip of a right operand, which may leave a rest.
fn as_operand(lines: &mut [Line], differences: &[Lane], parts: Parts) {
    let chunks = lines.chunks_exact_mut(parts.chunk_len());
    for (chunk, square) in chunks.zip(differences.as_chunks().0) {
        amx::fill_from_f32(chunk, Side::Right, parts, square);
    }
}

/// A thread's buffers for some tiles of a panel of `P` columns.
struct Scratch {
    /// `[tile][P, padded]` lanes, aligned for tile registers.
    residuals: Vec<Line>,
    /// `[P, padded]`; zero from `P` on.
    differences: Vec<Lane>,
    /// `[P]` of each candidate scale.
    trials: [Vec<Lane>; TOGETHER],
    codes: Vec<[u8; LANES]>,
}

impl Scratch {
    fn new(layout: Layout, tiles: usize) -> Self {
        let padded = layout.padded();
        Self {
            residuals: bytemuck::zeroed_vec(tiles * layout.panel_lines()),
            differences: vec![[0.0; LANES]; padded],
            trials: std::array::from_fn(|_| vec![[0.0; LANES]; padded]),
            codes: vec![[0; LANES]; padded],
        }
    }
}
