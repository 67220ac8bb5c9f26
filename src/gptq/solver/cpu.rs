//! The fast solver: libtorch does the cubic work (factorization, products between panels), the kernel the columns.

use half::f16;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::{
    Factorization, Factorized, Solution, Solver, cholesky, damping_steps,
    kernel::{self, LANES, Lane, Panel, Tile},
};
use crate::{
    error::{Error, Result, TorchContext},
    gptq::{
        ColumnOrder, Grid, Hessian, QuantizedLinear, dead_columns,
        raw::{Matrix, SharedMatrix, SharedSlice},
    },
    variant::{GroupSize, Order, Variant},
};

/// Columns solved between two matrix products, unless a group is wider.
const PANEL: usize = 256;

/// Solves on the CPU in fp32.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuSolver;

impl Solver for CpuSolver {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn factorize(
        &self,
        hessian: &Hessian,
        desc_act: bool,
        damp: f64,
        stage: &str,
    ) -> Result<Box<dyn Factorized>> {
        let diagonal = hessian.diagonal()?;
        let dead = dead_columns(&diagonal);
        let alive = diagonal.len() - dead.len();
        let mean = diagonal.iter().map(|&d| f64::from(d)).sum::<f64>() / alive as f64;
        let order = ColumnOrder::new(desc_act, &diagonal);
        let reversed: Vec<u32> = order.columns().iter().rev().copied().collect();
        for (raised, damp) in damping_steps(damp).enumerate() {
            let lambda = damp * mean;
            let lower = reordered(hessian, &reversed, mean, lambda)?;
            if cholesky::in_place(&lower).torch("factorize a Hessian")? {
                let facts = Factorization { damp, damp_raised: raised as u32, dead_columns: dead.len() };
                return Ok(Box::new(CpuFactor { lower, order, reversed, dead, lambda, facts }));
            }
        }
        Err(Error::NotPositiveDefinite { stage: stage.to_owned(), damp: 1.0 })
    }
}

/// `H + λI` with rows and columns in the order of `columns`; only on and below the diagonal. Dead features, whose rows
/// are zero, get `mean` on the diagonal.
fn reordered(hessian: &Hessian, columns: &[u32], mean: f64, lambda: f64) -> Result<Tensor> {
    let k = columns.len();
    let lower =
        Tensor::f_empty([k as i64, k as i64], (Kind::Float, Device::Cpu)).torch("allocate a factor")?;
    let source = Matrix::new(hessian.matrix());
    let target = SharedMatrix::new(&lower);
    (0..k).into_par_iter().for_each(|i| {
        // SAFETY: each row is written by the one task that has its index.
        let row = unsafe { target.row_part(i, 0, k) };
        let from = source.row(columns[i] as usize);
        for (to, &c) in row[..=i].iter_mut().zip(columns) {
            *to = from[c as usize];
        }
        row[i] = (if row[i] == 0.0 { mean } else { f64::from(row[i]) } + lambda) as f32;
        // The blocks on the diagonal are read as a whole.
        row[i + 1..].fill(0.0);
    });
    Ok(lower)
}

/// `H + λI`, with rows and columns in *reversed* quantization order, is `L Lᵀ`: `L` is `Ũ` with both axes reversed, so
/// nothing has to be flipped. Position `p` of a reversed axis is column `K−1−p` of the quantization order.
struct CpuFactor {
    /// `L`, `[K, K]` fp32; what lies above the diagonal means nothing.
    lower: Tensor,
    order: ColumnOrder,
    /// Original feature at each reversed position, `[K]`.
    reversed: Vec<u32>,
    dead: Vec<u32>,
    lambda: f64,
    facts: Factorization,
}

impl Factorized for CpuFactor {
    fn facts(&self) -> &Factorization {
        &self.facts
    }

    fn solve(&self, weights: &[&Tensor], variant: &Variant) -> Result<Vec<Solution>> {
        let k = self.order.columns().len();
        // `[K, N]` fp32 in reversed order; holds W before a panel is solved and D after.
        let stack = self.stack(weights).torch("stack weights")?;
        let n = stack.size()[1] as usize;
        let groups = variant.group_size.groups(k);
        let mut state = State {
            scales: vec![[0.0; LANES]; groups * n.div_ceil(LANES)],
            zeros: vec![[0.0; LANES]; groups * n.div_ceil(LANES)],
            codes: vec![0; k * n],
            objective: vec![0.0; n],
            distance: vec![0.0; n],
            groups,
            n,
        };
        let grid = Grid::new(variant.bits, variant.symmetric);
        if variant.order == Order::ActStatic {
            self.fit_static(&stack, grid, variant, &mut state);
        }
        let panel_width = match variant.group_size {
            GroupSize::Features(size) if variant.order != Order::ActStatic => size.max(PANEL / size * size),
            _ => PANEL,
        };
        // A panel that cannot hold its only group is one where that group's scale is fitted before the first column.
        if variant.group_size == GroupSize::PerChannel {
            self.fit_static(&stack, grid, variant, &mut state);
        }
        for start in (0..k).step_by(panel_width) {
            let end = (start + panel_width).min(k);
            self.solve_panel(&stack, start, end, variant, grid, &mut state)?;
        }
        self.split(weights, variant, state)
    }
}

/// What grows while the panels are solved. Per-row arrays are indexed by row of the stack, `[N]`.
struct State {
    /// `[tile][G]`.
    scales: Vec<Lane>,
    zeros: Vec<Lane>,
    /// `[K, N]`, original feature order.
    codes: Vec<u8>,
    objective: Vec<f64>,
    distance: Vec<f64>,
    groups: usize,
    n: usize,
}

impl CpuFactor {
    /// The weights side by side, `[K, N]` fp32: transposed, rows in reversed quantization order, dead features zero.
    fn stack(&self, weights: &[&Tensor]) -> Result<Tensor, tch::TchError> {
        let k = self.reversed.len();
        let rows: Vec<usize> = weights.iter().map(|w| w.size()[0] as usize).collect();
        let size = [k as i64, rows.iter().sum::<usize>() as i64];
        let stack = Tensor::f_empty(size, (Kind::Float, Device::Cpu))?;
        let target = SharedMatrix::new(&stack);
        let (reversed, dead) = (&self.reversed, &self.dead);
        let mut first = 0;
        for (weight, rows) in weights.iter().zip(rows) {
            let weight = weight.f_to_kind(Kind::Float)?.f_contiguous()?;
            let source = Matrix::new(&weight);
            (0..rows).into_par_iter().step_by(LANES).for_each(|row| {
                let lanes = LANES.min(rows - row);
                for (position, &column) in reversed.iter().enumerate() {
                    // SAFETY: this task alone writes these columns of the stack.
                    let to = unsafe { target.row_part(position, first + row, lanes) };
                    if dead.binary_search(&column).is_ok() {
                        to.fill(0.0);
                        continue;
                    }
                    for (lane, to) in to.iter_mut().enumerate() {
                        *to = source.row(row + lane)[column as usize];
                    }
                }
            });
            first += rows;
        }
        Ok(stack)
    }

    /// Scales from the original weights, for groups known before the first column.
    fn fit_static(&self, stack: &Tensor, grid: Grid, variant: &Variant, state: &mut State) {
        let order = &self.order;
        let (k, n, groups) = (order.columns().len(), state.n, state.groups);
        let weights = Matrix::new(stack);
        let tiles = state.scales.par_chunks_mut(groups).zip(state.zeros.par_chunks_mut(groups));
        tiles.enumerate().for_each(|(tile, (scales, zeros))| {
            let mut min = vec![[f32::INFINITY; LANES]; groups];
            let mut max = vec![[f32::NEG_INFINITY; LANES]; groups];
            let lanes = LANES.min(n - tile * LANES);
            for i in 0..k {
                let group = order.group_at(i, variant);
                for (l, &w) in weights.row(k - 1 - i)[tile * LANES..][..lanes].iter().enumerate() {
                    min[group][l] = min[group][l].min(w);
                    max[group][l] = max[group][l].max(w);
                }
            }
            for g in 0..groups {
                for l in 0..lanes {
                    let step = grid.fit(f64::from(min[g][l]), f64::from(max[g][l]));
                    scales[g][l] = step.scale.to_f32();
                    zeros[g][l] = f32::from(step.zero);
                }
            }
        });
    }

    /// Solves the columns `start..end` of the quantization order for all rows.
    fn solve_panel(
        &self,
        stack: &Tensor,
        start: usize,
        end: usize,
        variant: &Variant,
        grid: Grid,
        state: &mut State,
    ) -> Result<()> {
        let order = &self.order;
        let (k, p, n, groups) = (order.columns().len(), end - start, state.n, state.groups);
        let first = (k - end) as i64;
        let products = || -> Result<(Tensor, Tensor), tch::TchError> {
            // Ũ_pp of the natural order is the reversed block flipped on both axes; the kernel wants its transpose.
            let block = self.lower.f_narrow(0, first, p as i64)?.f_narrow(1, first, p as i64)?;
            let factor = block.f_flip([0, 1])?.f_tr()?.f_contiguous()?;
            // r of the panel, reversed rows: Σ over the solved columns of Lᵀ D.
            let solved =
                self.lower.f_narrow(0, (k - start) as i64, start as i64)?.f_narrow(1, first, p as i64)?;
            let done = stack.f_narrow(0, (k - start) as i64, start as i64)?;
            Ok((factor, solved.f_tr()?.f_mm(&done)?))
        };
        let (factor, residuals) = products().torch("compensate a panel")?;

        let size = variant.group_size.features(k);
        let fitted_here = variant.order != Order::ActStatic && variant.group_size != GroupSize::PerChannel;
        let fits: Vec<usize> = if fitted_here { (0..p).step_by(size).collect() } else { Vec::new() };
        let groups_of: Vec<u32> = (start..end).map(|i| order.group_at(i, variant) as u32).collect();
        let factor = Matrix::new(&factor);
        let panel = Panel { factor: factor.all(), groups: &groups_of, fits: &fits, grid };

        let residuals = Matrix::new(&residuals);
        let stack = SharedMatrix::new(stack);
        let codes = SharedSlice::new(&mut state.codes);
        let tiles = state
            .scales
            .par_chunks_mut(groups)
            .zip(state.zeros.par_chunks_mut(groups))
            .zip(state.objective.par_chunks_mut(LANES))
            .zip(state.distance.par_chunks_mut(LANES));
        tiles.enumerate().for_each_init(
            || Scratch::new(p),
            |scratch, (tile, (((scales, zeros), objective), distance))| {
                let first_row = tile * LANES;
                let lanes = LANES.min(n - first_row);
                let Scratch { weights, residuals: r, other, codes: tile_codes } = scratch;
                for c in 0..p {
                    let reversed = k - 1 - (start + c);
                    // SAFETY: this tile alone touches the lanes `first_row..first_row+lanes` of any row.
                    let row = unsafe { stack.row_part(reversed, first_row, lanes) };
                    weights[c] = [0.0; LANES];
                    weights[c][..lanes].copy_from_slice(row);
                    r[c] = [0.0; LANES];
                    r[c][..lanes].copy_from_slice(&residuals.row(p - 1 - c)[first_row..][..lanes]);
                }
                for zeros_and_scales in scales.iter_mut() {
                    // Lanes beyond the last row divide by 1, not by 0.
                    zeros_and_scales[lanes..].fill(1.0);
                }
                let (mut sum_objective, mut sum_distance) = ([0.0; LANES], [0.0; LANES]);
                kernel::solve_tile(
                    &panel,
                    &mut Tile {
                        weights,
                        residuals: r,
                        scratch: other,
                        codes: tile_codes,
                        scales,
                        zeros,
                        objective: &mut sum_objective,
                        distance: &mut sum_distance,
                    },
                );
                for l in 0..lanes {
                    objective[l] += sum_objective[l];
                    distance[l] += sum_distance[l];
                }
                for c in 0..p {
                    let reversed = k - 1 - (start + c);
                    let column = order.columns()[start + c] as usize;
                    // SAFETY: as above; every column is solved once, so its codes are written once.
                    unsafe {
                        stack.row_part(reversed, first_row, lanes).copy_from_slice(&weights[c][..lanes]);
                        codes.part(column * n + first_row, lanes).copy_from_slice(&tile_codes[c][..lanes]);
                    }
                }
            },
        );
        Ok(())
    }

    /// Takes the stack apart again.
    fn split(&self, weights: &[&Tensor], variant: &Variant, state: State) -> Result<Vec<Solution>> {
        let State { scales, zeros, codes, objective, distance, groups, n } = state;
        let g_idx = self.order.g_idx(variant);
        let mut first = 0;
        let mut solutions = Vec::with_capacity(weights.len());
        for weight in weights {
            let rows = weight.size()[0] as usize;
            let range = first..first + rows;
            first += rows;
            let mut own_codes = vec![0; rows * g_idx.len()];
            own_codes
                .par_chunks_mut(rows)
                .zip(codes.par_chunks(n))
                .for_each(|(own, all)| own.copy_from_slice(&all[range.clone()]));
            let of_row =
                |values: &[Lane], g: usize, row: usize| values[row / LANES * groups + g][row % LANES];
            let own = |values: &[Lane]| -> Vec<f32> {
                (0..groups).flat_map(|g| range.clone().map(move |r| of_row(values, g, r))).collect()
            };
            let own_scales: Vec<f16> = own(&scales).into_iter().map(f16::from_f32).collect();
            if let Some(at) = own_scales.iter().position(|s| !s.is_finite()) {
                let place = format!("scale of group {}, output feature {}", at / rows, at % rows);
                return Err(Error::Fp16Overflow { place, value: f32::INFINITY });
            }
            let own_zeros = own(&zeros).into_iter().map(|z| z as u8).collect();
            let linear = QuantizedLinear::new(variant.bits, own_codes, own_scales, own_zeros, g_idx.clone());
            // tr(D (H+λI) Dᵀ) less λ‖D‖² is the undamped error.
            let damped: f64 = objective[range.clone()].iter().sum();
            let distance: f64 = distance[range].iter().sum();
            let squared_error = (damped - self.lambda * distance).max(0.0);
            solutions.push(Solution { linear, squared_error });
        }
        Ok(solutions)
    }
}

/// A thread's buffers for one tile of a panel of `P` columns.
struct Scratch {
    weights: Vec<Lane>,
    residuals: Vec<Lane>,
    other: Vec<Lane>,
    codes: Vec<[u8; LANES]>,
}

impl Scratch {
    fn new(p: usize) -> Self {
        let lanes = || vec![[0.0; LANES]; p];
        Self { weights: lanes(), residuals: lanes(), other: lanes(), codes: vec![[0; LANES]; p] }
    }
}
