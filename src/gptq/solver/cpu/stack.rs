//! Stacks the weights that are solved together, and splits the results.

use half::f16;
use rayon::prelude::*;
use tch::TchError;

use super::{CpuFactor, LANES, Lane, Solution, State};
use crate::{
    amx::{Line, SIDE},
    error::Result,
    gptq::{
        Step,
        raw::{Floats, floats},
        solver::{Sums, Weight, cpu::scale_search::best_by_diagonal, solution},
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
    pub(super) fn fit_static(&self, stack: &Stack, variant: &Variant, state: &mut State) {
        let (order, layout) = (&self.damped.order, stack.layout);
        let (groups, search) = (state.groups, &state.search);
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
}
