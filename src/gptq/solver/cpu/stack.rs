//! Stacks the weights that are solved together, and splits the results.

use std::{
    ops::Range,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use half::f16;
use rayon::prelude::*;
use tch::TchError;

use super::{CpuFactor, LANES, Lane, Solution, State};
use crate::{
    amx::{Line, SIDE},
    error::Result,
    ggml::{Block, BlockGrid, BlockType, SubStep},
    gptq::{
        BlockLinear, Step, mean_alive,
        raw::{Floats, floats},
        solver::{
            Solved, Sums, Weight, check_sums,
            cpu::scale_search::{Search, best_by_diagonal},
            refused_scale, solution,
        },
    },
    variant::Variant,
};

/// Lines in the lanes of one column.
pub(super) const LINES: usize = size_of::<Lane>() / size_of::<Line>();

/// Stacked weights, `N` rows in all, by tile, by panel, by column of the panel, so that the values of a tile are contiguous. A
/// panel's part holds `W` until the panel is solved, then `D`, as lanes or as an operand's strip.
pub(super) struct Stack {
    lines: Vec<Line>,
    pub(super) layout: Layout,
}

/// Places of the stack's values.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// Rows of all weights.
    pub(super) n: usize,
    /// Columns in all.
    pub(super) k: usize,
    /// Columns of all panels but the last.
    pub(super) width: usize,
}

impl Layout {
    pub(super) fn tiles(self) -> usize {
        self.n.div_ceil(LANES)
    }

    /// Rows in a tile.
    pub(super) fn lanes(self, tile: usize) -> usize {
        LANES.min(self.n - tile * LANES)
    }

    /// Columns of a panel, padded to whole chunks.
    pub(super) fn padded(self) -> usize {
        self.width.next_multiple_of(SIDE)
    }

    /// Lines of a panel in a tile.
    pub(super) fn panel_lines(self) -> usize {
        self.padded() * LINES
    }

    /// Lines of a tile.
    pub(super) fn tile_lines(self) -> usize {
        self.k.div_ceil(self.width) * self.panel_lines()
    }

    /// Index of a column's lanes in its tile.
    fn at(self, column: usize) -> usize {
        column / self.width * self.padded() + column % self.width
    }
}

impl Stack {
    /// All tiles, one after another.
    pub(super) fn lines_mut(&mut self) -> &mut [Line] {
        &mut self.lines
    }
}

impl CpuFactor {
    /// The weights in quantization order, for panels of `width` columns; dead features are zero.
    pub(super) fn stack(&self, weights: &[Weight<'_>], width: usize) -> Result<Stack, TchError> {
        let columns = self.damped.order.columns();
        let k = columns.len();
        let weights = weights.iter().map(|w| w.values.f_contiguous()).collect::<Result<Vec<_>, _>>()?;
        let rows: Vec<Floats<'_>> = weights
            .iter()
            .flat_map(|w| (0..w.size()[0] as usize).map(move |row| floats(w, row * k, k)))
            .collect();
        let layout = Layout { n: rows.len(), k, width };
        let mut lines = bytemuck::zeroed_vec(layout.tiles() * layout.tile_lines());
        let places: Vec<Option<usize>> = columns
            .iter()
            .enumerate()
            .map(|(i, column)| self.damped.dead.binary_search(column).is_err().then(|| layout.at(i)))
            .collect();
        let tiles = lines.par_chunks_mut(layout.tile_lines()).zip(rows.par_chunks(LANES));
        tiles.for_each_init(
            || vec![0.0; k * LANES],
            |wide, (tile, rows)| {
                let tile: &mut [Lane] = bytemuck::cast_slice_mut(tile);
                rows.iter().zip(wide.chunks_mut(k)).for_each(|(row, wide)| row.widen(wide));
                for (&column, place) in columns.iter().zip(&places) {
                    if let Some(place) = *place {
                        let to = tile[place][..rows.len()].iter_mut();
                        to.zip(wide.chunks(k)).for_each(|(to, row)| *to = row[column as usize]);
                    }
                }
            },
        );
        Ok(Stack { lines, layout })
    }

    /// Fits all scales to the original weights, for orders with static groups.
    pub(super) fn fit_static(&self, stack: &Stack, variant: &Variant, search: &Search, state: &mut State) {
        let (order, layout) = (&self.damped.order, stack.layout);
        let groups = state.groups;
        let mut columns_of: Vec<Vec<usize>> = vec![Vec::new(); groups];
        (0..layout.k).for_each(|i| columns_of[order.group_at(i, variant)].push(i));
        let pivots: Vec<Vec<f32>> =
            columns_of.iter().map(|columns| columns.iter().map(|&i| self.pivot(i)).collect()).collect();
        let tiles = state.scales.par_chunks_mut(groups).zip(state.zeros.par_chunks_mut(groups));
        let tiles = tiles.zip(stack.lines.par_chunks(layout.tile_lines()));
        tiles.enumerate().for_each(|(tile, ((scales, zeros), lines))| {
            let weights: &[Lane] = bytemuck::cast_slice(lines);
            let lanes = layout.lanes(tile);
            for (g, (columns, pivots)) in columns_of.iter().zip(&pivots).enumerate() {
                let of_group: Vec<Lane> = columns.iter().map(|&i| weights[layout.at(i)]).collect();
                let best = best_by_diagonal(search, &of_group, pivots);
                scales[g][..lanes].copy_from_slice(&best.scale[..lanes]);
                zeros[g][..lanes].copy_from_slice(&best.zero[..lanes]);
            }
        });
    }

    /// Splits the results by weight.
    pub(super) fn split(
        &self,
        weights: &[Weight<'_>],
        variant: &Variant,
        state: State,
    ) -> Result<Vec<Solution>> {
        let State { scales, zeros, codes, objective, distance, groups, .. } = state;
        let n = objective.len();
        let g_idx = self.damped.order.g_idx(variant);
        let mut first = 0;
        let mut solutions = Vec::with_capacity(weights.len());
        for weight in weights {
            let rows = weight.values.size()[0] as usize;
            let range = first..first + rows;
            first += rows;
            let mut own_codes = vec![0; rows * g_idx.len()];
            own_codes
                .par_chunks_mut(rows)
                .zip(codes.par_chunks(n))
                .for_each(|(own, all)| own.copy_from_slice(&all[range.clone()]));
            let steps: Vec<Step> = (0..groups)
                .flat_map(|g| range.clone().map(move |row| (row / LANES * groups + g, row % LANES)))
                .map(|(at, lane)| Step {
                    scale: f16::from_f32(scales[at][lane]),
                    zero: zeros[at][lane] as u8,
                })
                .collect();
            let sums = Sums {
                objective: objective[range.clone()].iter().sum(),
                distance: distance[range].iter().sum(),
            };
            solutions.push(solution(
                weight,
                variant,
                own_codes,
                &steps,
                g_idx.clone(),
                sums,
                self.damped.lambda,
            )?);
        }
        Ok(solutions)
    }

    /// Encodes the blocks of each weight.
    pub(super) fn split_blocks(
        &self,
        weights: &[Weight<'_>],
        kind: BlockType,
        grid: &BlockGrid,
        state: &State,
    ) -> Result<Vec<Solution>> {
        let (n, k) = (state.objective.len(), self.damped.order.columns().len());
        let (len, size) = (kind.block_len(), kind.block_bytes());
        let mut first = 0;
        let mut solutions = Vec::with_capacity(weights.len());
        for weight in weights {
            let rows = first..first + weight.values.size()[0] as usize;
            first = rows.end;
            let mut bytes = vec![0; rows.len() * (k / len) * size];
            let to = bytes.par_chunks_mut(k / len * size).zip(rows.clone());
            let infinite = AtomicBool::new(false);
            to.for_each(|(bytes, row)| {
                for (i, bytes) in bytes.chunks_mut(size).enumerate() {
                    let block = block(state, grid, row, i * len..(i + 1) * len, n);
                    if !(block.d.is_finite() && block.min.is_finite()) {
                        infinite.store(true, Relaxed);
                    }
                    block.write(kind, bytes);
                }
            });
            if infinite.into_inner() {
                return Err(refused_scale(weight, &format!("scale of a block of {kind}")));
            }
            let linear = BlockLinear::new(kind, k, bytes);
            let sums = Sums {
                objective: state.objective[rows.clone()].iter().sum::<f64>() - self.cost_of_dead(&linear),
                distance: state.distance[rows].iter().sum(),
            };
            check_sums(weight, sums)?;
            solutions.push(Solution {
                linear: Solved::Blocks(linear),
                squared_error: sums.undamped(self.damped.lambda),
                uncompensated: 0,
                fallback: None,
            });
        }
        Ok(solutions)
    }
}

impl CpuFactor {
    /// The objective's part of the weights of dead features, which not every block can store as zero. Their diagonal of the
    /// Hessian was set to the mean, but their errors cost nothing.
    fn cost_of_dead(&self, linear: &BlockLinear) -> f64 {
        let (dead, k) = (&self.damped.dead, linear.in_features());
        if dead.is_empty() {
            return 0.0;
        }
        let mean = mean_alive(&self.damped.diagonal, dead).unwrap_or(0.0);
        let dense = linear.dequantize();
        let weights = dense.chunks(k).flat_map(|row| dead.iter().map(|&column| row[column as usize]));
        mean * weights.map(|weight| f64::from(weight).powi(2)).sum::<f64>()
    }
}

/// The block of a row at some columns, of `n` rows in all.
fn block(state: &State, grid: &BlockGrid, row: usize, columns: Range<usize>, n: usize) -> Block {
    let (tile, lane, panels) = (row / LANES, row % LANES, state.units.len() / n.div_ceil(LANES));
    let mut block = Block::EMPTY;
    if grid.has_sub_scales() {
        let units = &state.units[tile * panels + columns.start / columns.len()];
        [block.d, block.min] = [0, 1].map(|i| f16::from_f32(units[i][lane]));
    }
    let groups = columns.start / grid.sub_len..columns.end / grid.sub_len;
    for (i, group) in groups.enumerate() {
        let at = tile * state.groups + group;
        let (scale, offset) = (f64::from(state.scales[at][lane]), f64::from(state.zeros[at][lane]));
        block.set_step(&grid.scales, i, SubStep { scale, offset });
    }
    for (code, column) in block.codes.iter_mut().zip(columns) {
        *code = state.codes[column * n + row];
    }
    block
}
