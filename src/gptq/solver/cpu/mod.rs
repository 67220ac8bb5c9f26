//! The solver of the CPU: matrix products for the cubic work (factorization, compensation between panels), a kernel for
//! the columns.

mod blocks;
mod cholesky;
pub(super) mod compare;
mod kernel;
mod panel;
mod scale_search;
mod stack;
mod vectors;

use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::{
    Damped, Damping, Factor, Factorization, Factorized, Solution, Solver, Weight, damped, panel_width,
    places, select_columns,
};
use crate::{
    accuracy::Scales,
    amx::{self, Parts},
    error::{Result, TorchContext},
    ggml::BlockType,
    gptq::{
        Grid, Hessian,
        raw::{Matrix, floats_mut},
    },
    variant::{Sorting, Variant},
};
use blocks::BlockSearch;
use kernel::{LANES, Lane, PanelGrid};
use panel::PanelFactors;
use scale_search::Search;
use stack::{Layout, Stack};

/// Columns solved between two matrix products, unless a group is wider.
const PANEL: usize = 256;

/// Solves on the CPU in fp32, except for products: the factorization's, and those that compensate a panel for the panels before it.
#[derive(Debug, Clone, Copy)]
pub struct CpuSolver {
    /// In how many bf16 parts values are multiplied; `None` if in fp32.
    products: Option<Parts>,
    scales: Scales,
}

impl CpuSolver {
    /// With fp32 products; where the processor has AMX, with each value in two bf16 parts, which is nearly as exact.
    pub fn new() -> Self {
        Self::with_products(amx::available().then_some(Parts::Two))
    }

    /// For inputs that are multiplied in bf16: where that is faster than fp32, panels are compensated by products of bf16 too.
    ///
    /// What is multiplied is rounded by up to 2⁻⁹ of itself, so that columns are compensated by 0.2% too much or too little, where
    /// rounding to codes is off by up to half a step. The objective grows by about 2⁻¹⁹ of `Σ d_j² H_jj`, the cost of the same errors
    /// without compensation.
    pub fn for_bf16_inputs() -> Self {
        if amx::has_bf16_products() { Self::with_products(Some(Parts::One)) } else { Self::new() }
    }

    /// With values in so many bf16 parts, or in fp32. Plain code computes the same on a processor without bf16 products, for tests.
    pub fn with_products(products: Option<Parts>) -> Self {
        Self { products, scales: Scales::PLAIN }
    }

    /// The same solver with another choice of scales.
    #[must_use]
    pub fn with_scales(self, scales: Scales) -> Self {
        Self { scales, ..self }
    }
}

impl Default for CpuSolver {
    fn default() -> Self {
        Self::new()
    }
}

impl Solver for CpuSolver {
    fn name(&self) -> &'static str {
        match self.products {
            Some(Parts::One) => "cpu-bf16",
            Some(Parts::Two) => "cpu-amx",
            None => "cpu",
        }
    }

    fn factorize(&self, hessian: &Hessian, sorting: Sorting, damp: f64, stage: &str) -> Result<Factor> {
        let factorize = |damping: &Damping<'_>| {
            let lower = reordered(hessian, damping)?;
            let in_parts = match self.products {
                // Where bf16 products have twice the speed of fp32, three of them are slower.
                Some(Parts::One) => amx::available(),
                products => products.is_some(),
            };
            let done = cholesky::in_place(&lower, in_parts).torch("factorize a Hessian")?;
            Ok(done.then_some(lower))
        };
        let damped = damped(hessian, sorting, damp, stage, factorize)?;
        let kept = PanelFactors::default();
        Ok(Box::new(CpuFactor { damped, products: self.products, scales: self.scales, kept }))
    }
}

/// `H + λI` with rows and columns in reversed quantization order, on and below the diagonal. The diagonal of dead features,
/// whose rows are zero, is `mean + λ`.
fn reordered(hessian: &Hessian, damping: &Damping<'_>) -> Result<Tensor> {
    let &Damping { order, mean, lambda } = damping;
    let columns: Vec<u32> = order.columns().iter().rev().copied().collect();
    let k = columns.len();
    let mut lower =
        Tensor::f_empty([k as i64, k as i64], (Kind::Float, Device::Cpu)).torch("allocate a factor")?;
    let source = Matrix::new(hessian.matrix());
    floats_mut(&mut lower).par_chunks_mut(k).enumerate().for_each(|(i, row)| {
        let from = source.row(columns[i] as usize);
        for (to, &c) in row[..=i].iter_mut().zip(&columns) {
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
    /// With `L` `[K, K]` fp32; values above its diagonal are undefined.
    damped: Damped<Tensor>,
    products: Option<Parts>,
    scales: Scales,
    kept: PanelFactors,
}

impl CpuFactor {
    /// `Ũ_ii` of a column of the quantization order.
    fn pivot(&self, i: usize) -> f32 {
        let at = self.damped.order.columns().len() - 1 - i;
        Matrix::new(&self.damped.factor).row(at)[at]
    }
}

impl Factorized for CpuFactor {
    fn facts(&self) -> &Factorization {
        &self.damped.facts
    }

    fn solve(&self, weights: &[Weight<'_>], variant: &Variant) -> Result<Vec<Solution>> {
        let k = self.damped.order.columns().len();
        let groups = Groups {
            count: variant.group_size.groups(k),
            size: variant.group_size.features(k),
            fitted: !variant.scales_known_beforehand(),
            of_columns: (0..k).map(|i| self.damped.order.group_at(i, variant) as u32).collect(),
        };
        let width = panel_width(variant, k, PANEL);
        let mut stack = self.stack(weights, width).torch("stack weights")?;
        let grid = Grid::new(variant.bits, variant.symmetric);
        let search = Search::new(grid, self.scales);
        let mut state = State::new(&stack, &groups);
        if variant.scales_known_beforehand() {
            self.fit_static(&stack, variant, &search, &mut state);
        }
        self.solve_columns(&mut stack, &groups, PanelGrid::Gptq(grid, &search), &mut state);
        drop(stack);
        let uncompensated = self.round_where_better(weights, variant, grid, &mut state)?;
        let mut solutions = self.split(weights, variant, state)?;
        solutions.iter_mut().zip(uncompensated).for_each(|(solution, count)| solution.uncompensated = count);
        Ok(solutions)
    }

    fn solve_blocks(&self, weights: &[Weight<'_>], kind: BlockType) -> Result<Vec<Solution>> {
        let k = self.damped.order.columns().len();
        let search = BlockSearch::new(kind, self.scales);
        let size = search.grid.sub_len;
        let groups = Groups {
            count: k / size,
            size,
            fitted: true,
            of_columns: (0..k as u32).map(|i| i / size as u32).collect(),
        };
        let mut stack = self.stack(weights, PANEL).torch("stack weights")?;
        let mut state = State::new(&stack, &groups);
        self.solve_columns(&mut stack, &groups, PanelGrid::Blocks(&search), &mut state);
        drop(stack);
        self.split_blocks(weights, kind, &search.grid, &state)
    }

    fn divide(&self, b: &Tensor, products: Kind) -> Result<Option<Tensor>> {
        let columns: Vec<u32> = self.damped.order.columns().iter().rev().copied().collect();
        let divided = cholesky::divide(b, &columns, &self.damped.factor, products)
            .and_then(|divided| select_columns(&divided, &places(&columns)));
        divided.torch("divide by a factor").map(Some)
    }
}

impl CpuFactor {
    /// Solves all columns of the quantization order, panel by panel.
    fn solve_columns(&self, stack: &mut Stack, groups: &Groups, grid: PanelGrid<'_>, state: &mut State) {
        let (k, width) = (stack.layout.k, stack.layout.width);
        for start in (0..k).step_by(width) {
            self.solve_panel(stack, start..(start + width).min(k), groups, grid, state);
        }
    }
}

/// Columns that share a scale.
struct Groups {
    /// `G`.
    count: usize,
    /// Columns of all groups but the last.
    size: usize,
    /// Whether scales are fitted where groups begin.
    fitted: bool,
    /// The group of each column of the quantization order, `[K]`.
    of_columns: Vec<u32>,
}

/// Results that grow while the panels are solved. Per-row arrays are indexed by row of the stack, `[N]`.
struct State {
    /// `[tile][G]`.
    scales: Vec<Lane>,
    /// Zero points, or offsets of blocks.
    zeros: Vec<Lane>,
    /// `d` and the minimum of blocks with sub-blocks, `[tile][panel]`.
    units: Vec<[Lane; 2]>,
    /// `[K, N]`, original feature order.
    codes: Vec<u8>,
    objective: Vec<f64>,
    distance: Vec<f64>,
    groups: usize,
}

impl State {
    fn new(stack: &Stack, groups: &Groups) -> Self {
        let Layout { n, k, width } = stack.layout;
        let tiles = stack.layout.tiles();
        Self {
            scales: vec![[0.0; LANES]; groups.count * tiles],
            zeros: vec![[0.0; LANES]; groups.count * tiles],
            units: vec![[[0.0; LANES]; 2]; k.div_ceil(width) * tiles],
            codes: vec![0; k * n],
            objective: vec![0.0; n],
            distance: vec![0.0; n],
            groups: groups.count,
        }
    }
}
