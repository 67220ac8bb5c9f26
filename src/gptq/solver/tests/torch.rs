//! The column loop in libtorch's own operations, on any device: fast enough to check the solvers on larger problems than the
//! definition.

use half::f16;
use tch::{Device, Kind, TchError, Tensor};

use crate::{
    accuracy::Scales,
    error::{Result, TorchContext},
    gptq::{
        Grid, Hessian, Step,
        solver::{
            Damped, Damping, Factor, Factorization, Factorized, Solution, Solver, Sums, Weight,
            cuda::scale_search::{Group, best_steps},
            damped, divide_by, panel_width, solution,
        },
    },
    variant::{Sorting, Variant},
};

/// Columns solved between two matrix products, unless a group is wider.
const PANEL: usize = 128;

/// Solves in fp32 on the device of the Hessian.
#[derive(Debug, Clone, Copy)]
pub(super) struct TorchSolver {
    scales: Scales,
}

impl Default for TorchSolver {
    /// Plain GPTQ.
    fn default() -> Self {
        Self::new(Scales::PLAIN)
    }
}

impl TorchSolver {
    /// Choosing scales in this way.
    pub(super) fn new(scales: Scales) -> Self {
        Self { scales }
    }
}

impl Solver for TorchSolver {
    fn name(&self) -> &'static str {
        "libtorch"
    }

    fn factorize(&self, hessian: &Hessian, sorting: Sorting, damp: f64, stage: &str) -> Result<Factor> {
        let factorize =
            |damping: &Damping<'_>| upper_factor(hessian.matrix(), damping).torch("factorize a Hessian");
        let damped = damped(hessian, sorting, damp, stage, factorize)?;
        Ok(Box::new(TorchFactor { damped, scales: self.scales }))
    }
}

/// `Ũ` with `H + λI = Ũ Ũᵀ`, in quantization order; `None` when that is not positive definite.
fn upper_factor(matrix: &Tensor, damping: &Damping<'_>) -> Result<Option<Tensor>, TchError> {
    let &Damping { order, mean, lambda } = damping;
    // With both axes reversed `Ũ` is the plain lower factor.
    let reversed: Vec<i64> = order.columns().iter().rev().map(|&c| i64::from(c)).collect();
    let index = Tensor::f_from_slice(&reversed)?.f_to_device(matrix.device())?;
    let ordered = matrix.f_index_select(0, &index)?.f_index_select(1, &index)?;
    let mut diagonal = ordered.f_diagonal(0, 0, 1)?;
    let added = |&d: &f32| (lambda + if d == 0.0 { mean } else { 0.0 }) as f32;
    let added: Vec<f32> = Vec::<f32>::try_from(diagonal.f_contiguous()?)?.iter().map(added).collect();
    let _ = diagonal.f_add_(&Tensor::f_from_slice(&added)?.f_to_device(matrix.device())?)?;
    let (lower, info) = ordered.f_linalg_cholesky_ex(false, false)?;
    Ok(if i64::try_from(info)? == 0 { Some(lower.f_flip([0, 1])?) } else { None })
}

/// `Ũ` `[K, K]` in quantization order.
struct TorchFactor {
    damped: Damped<Tensor>,
    scales: Scales,
}

impl Factorized for TorchFactor {
    fn facts(&self) -> &Factorization {
        &self.damped.facts
    }

    fn solve(&self, weights: &[Weight<'_>], variant: &Variant) -> Result<Vec<Solution>> {
        let solved = Columns::new(self, weights, variant).and_then(|mut columns| {
            columns.solve()?;
            columns.take(weights)
        });
        let g_idx = self.damped.order.g_idx(variant);
        let solved = solved.torch("solve a stage")?;
        let solutions = solved.into_iter().zip(weights).map(|((codes, steps, sums), weight)| {
            solution(weight, variant, codes, &steps, g_idx.clone(), sums, self.damped.lambda)
        });
        solutions.collect()
    }

    fn divide(&self, b: &Tensor, _products: Kind) -> Result<Option<Tensor>> {
        divide_by(b, &self.damped.factor, self.damped.order.columns())
    }
}

/// The column loop. Tensors of rows are `[N]`.
struct Columns<'a> {
    factor: &'a Damped<Tensor>,
    /// The diagonal of `Ũ`.
    pivots: Tensor,
    variant: &'a Variant,
    how: Scales,
    grid: Grid,
    /// `[N, K]` fp32 in quantization order, dead features zero.
    weights: Tensor,
    /// `D` `[N, K]` in quantization order.
    differences: Tensor,
    /// `[K, N]`, original feature order.
    codes: Tensor,
    /// `[G][N]`.
    steps: Vec<Vec<Step>>,
    /// Scale and zero of each group, as the steps have them.
    scales: Vec<Option<(Tensor, Tensor)>>,
    objective: Tensor,
    distance: Tensor,
}

/// Codes `[K, N]`, steps `[G, N]` and sums over rows of one weight.
type Taken = (Vec<u8>, Vec<Step>, Sums);

impl<'a> Columns<'a> {
    fn new(solver: &'a TorchFactor, weights: &[Weight<'_>], variant: &'a Variant) -> Result<Self, TchError> {
        let factor = &solver.damped;
        let device = factor.factor.device();
        let order: Vec<i64> = factor.order.columns().iter().map(|&c| i64::from(c)).collect();
        let index = Tensor::f_from_slice(&order)?.f_to_device(device)?;
        let values: Vec<&Tensor> = weights.iter().map(|w| w.values).collect();
        let stacked = Tensor::f_cat(&values, 0)?.f_to_device(device)?.f_to_kind(Kind::Float)?;
        let stacked = stacked.f_index_select(1, &index)?;
        for (i, column) in factor.order.columns().iter().enumerate() {
            if factor.dead.binary_search(column).is_ok() {
                let _ = stacked.f_select(1, i as i64)?.f_zero_()?;
            }
        }
        let (n, k) = (stacked.size()[0], order.len());
        let groups = variant.group_size.groups(k);
        let sums = || Tensor::f_zeros([n], (Kind::Double, device));
        Ok(Self {
            factor,
            pivots: factor.factor.f_diagonal(0, 0, 1)?.f_contiguous()?,
            variant,
            how: solver.scales,
            grid: Grid::new(variant.bits, variant.symmetric),
            differences: stacked.f_zeros_like()?,
            weights: stacked,
            codes: Tensor::f_zeros([k as i64, n], (Kind::Uint8, device))?,
            steps: vec![Vec::new(); groups],
            scales: (0..groups).map(|_| None).collect(),
            objective: sums()?,
            distance: sums()?,
        })
    }

    fn solve(&mut self) -> Result<(), TchError> {
        let k = self.factor.order.columns().len();
        let fixed = self.variant.scales_known_beforehand();
        let size = self.variant.group_size.features(k);
        if fixed {
            for group in 0..self.steps.len() {
                let of_group: Vec<i64> = (0..k)
                    .filter(|&i| self.factor.order.group_at(i, self.variant) == group)
                    .map(|i| i as i64)
                    .collect();
                let index = Tensor::f_from_slice(&of_group)?.f_to_device(self.weights.device())?;
                let pivots = self.pivots.f_index_select(0, &index)?;
                self.fit(group, &self.weights.f_index_select(1, &index)?, &pivots, None)?;
            }
        }
        let width = panel_width(self.variant, k, PANEL);
        for start in (0..k).step_by(width) {
            let end = (start + width).min(k);
            // r of the panel: what the columns before it leave to it.
            let residuals = self.left_by(0, start, start, end)?;
            for i in start..end {
                if !fixed && i % size == 0 {
                    let last = (i + size).min(end);
                    let of_group = residuals.f_narrow(1, (i - start) as i64, (last - i) as i64)?;
                    let of_group = of_group.f_add(&self.left_by(start, i, i, last)?)?;
                    let corner = part(&self.factor.factor, i, last, i, last)?;
                    let x = corner.f_linalg_solve_triangular(&of_group, true, false, false)?;
                    let target = self.weights.f_narrow(1, i as i64, (last - i) as i64)?.f_sub(&x)?;
                    let pivots = self.pivots.f_narrow(0, i as i64, (last - i) as i64)?;
                    self.fit(self.factor.order.group_at(i, self.variant), &target, &pivots, Some(&corner))?;
                }
                let residual = residuals.f_select(1, (i - start) as i64)?;
                let residual = residual.f_add(&self.left_by(start, i, i, i + 1)?.f_squeeze_dim(1)?)?;
                self.quantize(i, &residual)?;
            }
        }
        Ok(())
    }

    /// `Σ d_j Ũ_jc` over the columns `first..end` for the columns `from..to`, `[N, to − from]`.
    fn left_by(&self, first: usize, end: usize, from: usize, to: usize) -> Result<Tensor, TchError> {
        let solved = self.differences.f_narrow(1, first as i64, (end - first) as i64)?;
        solved.f_mm(&part(&self.factor.factor, first, end, from, to)?)
    }

    /// Fits a group's steps to weights `[N, g]`.
    fn fit(
        &mut self,
        group: usize,
        weights: &Tensor,
        pivots: &Tensor,
        block: Option<&Tensor>,
    ) -> Result<(), TchError> {
        let weights = &weights.f_tr()?.f_contiguous()?;
        let steps = best_steps(self.grid, self.how, &Group { weights, pivots, block })?;
        let host = |t: &Tensor| Vec::<f32>::try_from(t.f_to_device(Device::Cpu)?);
        let pairs = host(&steps.scales)?.into_iter().zip(host(&steps.zeros)?);
        self.steps[group] =
            pairs.map(|(scale, zero)| Step { scale: f16::from_f32(scale), zero: zero as u8 }).collect();
        self.scales[group] = Some((steps.scales, steps.zeros));
        Ok(())
    }

    fn quantize(&mut self, i: usize, residual: &Tensor) -> Result<(), TchError> {
        let column = self.factor.order.columns()[i];
        let group = self.factor.order.group_at(i, self.variant);
        let (scale, zero) = self.scales[group].as_ref().expect("fitted before its first column");
        let pivot = self.factor.factor.f_select(0, i as i64)?.f_select(0, i as i64)?;
        let weight = self.weights.f_select(1, i as i64)?;
        let target = weight.f_sub(&residual.f_div(&pivot)?)?;
        let code = target.f_div(scale)?.f_round()?.f_add(zero)?;
        let code = code.f_clamp(0.0, f64::from(self.grid.max_code()))?;
        let quantized = code.f_sub(zero)?.f_mul(scale)?;
        let difference = quantized.f_sub(&weight)?;
        let square = |t: &Tensor| t.f_to_kind(Kind::Double)?.f_square();
        self.objective = self.objective.f_add(&square(&quantized.f_sub(&target)?.f_mul(&pivot)?)?)?;
        self.distance = self.distance.f_add(&square(&difference)?)?;
        self.differences.f_select(1, i as i64)?.f_copy_(&difference)?;
        self.codes.f_select(0, i64::from(column))?.f_copy_(&code)
    }

    fn take(self, weights: &[Weight<'_>]) -> Result<Vec<Taken>, TchError> {
        let mut first = 0;
        let mut taken = Vec::with_capacity(weights.len());
        for weight in weights {
            let rows = weight.values.size()[0];
            let range = first as usize..(first + rows) as usize;
            let codes = self.codes.f_narrow(1, first, rows)?.f_contiguous()?.f_to_device(Device::Cpu)?;
            let sum = |t: &Tensor| f64::try_from(t.f_narrow(0, first, rows)?.f_sum(Kind::Double)?);
            let sums = Sums { objective: sum(&self.objective)?, distance: sum(&self.distance)? };
            let steps = self.steps.iter().flat_map(|group| &group[range.clone()]).copied().collect();
            taken.push((Vec::<u8>::try_from(codes.f_flatten(0, -1)?)?, steps, sums));
            first += rows;
        }
        Ok(taken)
    }
}

/// Rows `top..bottom` and columns `left..right`.
fn part(matrix: &Tensor, top: usize, bottom: usize, left: usize, right: usize) -> Result<Tensor, TchError> {
    let rows = matrix.f_narrow(0, top as i64, (bottom - top) as i64)?;
    rows.f_narrow(1, left as i64, (right - left) as i64)
}
