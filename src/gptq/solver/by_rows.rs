//! Feedback between output features: each row block is solved against a target that compensates the errors of the row blocks
//! before it.
//!
//! An error `D = Ŵ − W` costs `tr(G D H Dᵀ)`, with `G = Ũ Ũᵀ` and `Ũ` upper triangular. After rows with errors `D_j`, the best
//! values of the rows `b` are `W_b − (Ũ_bbᵀ)⁻¹ Σ_{j<b} Ũ_jbᵀ D_j`, for any `H`. These are the target of the rows `b`, which are
//! then solved without feedback. That is Babai's nearest plane on `G ⊗ H`, without feedback between the rows of one block.
//! (YAQA, arXiv 2505.22988, has both feedbacks in one expression and without groups' scales.)

use tch::{Device, Kind, TchError, Tensor};

use super::{Solution, Solved, Weight, damping_steps};
use crate::{
    error::{NumericalError, Result, TorchContext},
    gptq::Hessian,
};

/// Rows of a row block, which are solved together.
const ROWS: i64 = 32;

/// A factorized block of an output Hessian. Its output features are ordered by falling cost of their errors.
pub struct OutputFactor {
    /// `[n]` output features, in the order in which they are solved.
    rows: Tensor,
    /// `Ũ` `[n, n]` in that order.
    upper: Tensor,
}

impl OutputFactor {
    /// Damps and factorizes all blocks of an output Hessian, on `device`. `damp` is a fraction of the mean diagonal and is raised
    /// only if a factorization fails. `linear` is the name in errors.
    ///
    /// # Errors
    /// When a block stays indefinite at full damping, or memory is exhausted.
    pub fn all(blocks: &[Tensor], damp: f64, device: Device, linear: &str) -> Result<Vec<Self>> {
        let mut first = 0;
        let mut factors = Vec::with_capacity(blocks.len());
        for block in blocks {
            let factor = block.f_to_device(device).and_then(|block| Self::of(&block, first, damp));
            let indefinite =
                || NumericalError::NotPositiveDefinite { stage: format!("outputs of {linear}"), damp: 1.0 };
            factors.push(factor.torch("factorize an output Hessian")?.ok_or_else(indefinite)?);
            first += block.size()[0];
        }
        Ok(factors)
    }

    /// `None` if the block is not positive definite at any damping.
    fn of(block: &Tensor, first: i64, damp: f64) -> Result<Option<Self>, TchError> {
        let diagonal = block.f_diagonal(0, 0, 1)?;
        let mean = f64::try_from(diagonal.f_mean(Kind::Float)?)?;
        // With both axes reversed `Ũ` is the plain lower factor.
        let reversed = diagonal.f_argsort_stable(true, 0, true)?.f_flip([0])?;
        let ordered = block.f_index_select(0, &reversed)?.f_index_select(1, &reversed)?;
        let rows = reversed.f_flip([0])?.f_add_scalar(first)?;
        // 0 if the loss does not depend on these outputs.
        let unit = if mean > 0.0 { mean } else { 1.0 };
        for damp in damping_steps(damp) {
            let damped = ordered.f_add(
                &Tensor::f_eye(block.size()[0], (Kind::Float, block.device()))?.f_mul_scalar(damp * unit)?,
            )?;
            let (lower, info) = damped.f_linalg_cholesky_ex(false, false)?;
            if i64::try_from(info)? == 0 {
                return Ok(Some(Self { rows, upper: lower.f_flip([0, 1])? }));
            }
        }
        Ok(None)
    }

    /// Errors of all outputs `[…, N]` → `[…, n]` for this block; the sum of their squares is the cost of the errors.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn weighted(&self, errors: &Tensor) -> Result<Tensor> {
        errors.f_index_select(-1, &self.rows).and_then(|e| e.f_matmul(&self.upper)).torch("weigh errors")
    }

    fn len(&self) -> i64 {
        self.upper.size()[0]
    }
}

/// Quantizes weights that share the inputs of `hessian` and its factorization, with feedback between the rows of each weight.
/// `outputs` are the factors of each weight's output Hessian. `solve` quantizes some rows without feedback between them.
///
/// # Errors
/// Those of `solve`, and when libtorch fails.
pub fn solve_by_rows(
    hessian: &Hessian,
    weights: &[Weight<'_>],
    outputs: &[&[OutputFactor]],
    solve: &dyn Fn(&[Weight<'_>]) -> Result<Vec<Solution>>,
) -> Result<Vec<Solution>> {
    join_strands(outputs, solve_strands(hessian, weights, outputs, &|_| true, solve)?)
}

/// Rows of each *strand*: the rows of a weight that belong to one block of its output Hessian. Strands are those of each weight, one after
/// another; they do not depend on each other.
pub fn strand_rows(outputs: &[&[OutputFactor]]) -> Vec<usize> {
    outputs.iter().flat_map(|factors| factors.iter().map(|factor| factor.len() as usize)).collect()
}

/// The part of [`solve_by_rows`] that solves the strands that are `chosen`, by their index. A strand's solution has its rows in the order in
/// which they are solved.
///
/// # Errors
/// As for [`solve_by_rows`].
pub fn solve_strands(
    hessian: &Hessian,
    weights: &[Weight<'_>],
    outputs: &[&[OutputFactor]],
    chosen: &dyn Fn(usize) -> bool,
    solve: &dyn Fn(&[Weight<'_>]) -> Result<Vec<Solution>>,
) -> Result<Vec<Solution>> {
    let device = hessian.matrix().device();
    let all =
        weights.iter().zip(outputs).flat_map(|(weight, factors)| factors.iter().map(move |f| (weight, f)));
    let mut strands = Vec::new();
    for (_, (weight, factor)) in all.enumerate().filter(|(strand, _)| chosen(*strand)) {
        strands.push(Strand::new(weight, factor, device).torch("take rows of a weight")?);
    }
    let longest = strands.iter().map(|strand| strand.output.len()).max().unwrap_or(0);
    for start in (0..longest).step_by(ROWS as usize) {
        let mut unsolved: Vec<_> = strands.iter_mut().filter(|s| start < s.output.len()).collect();
        let targets = targets(&unsolved, start).torch("compute a target")?;
        let rows = unsolved.iter().zip(&targets).map(|(s, values)| Weight { name: s.name, values });
        let solutions = solve(&rows.collect::<Vec<_>>())?;
        for (strand, solution) in unsolved.iter_mut().zip(solutions) {
            strand.take(start, solution)?;
        }
    }
    strands.into_iter().map(|strand| strand.solution(hessian)).collect()
}

/// Joins the solutions of all strands to those of the weights.
///
/// # Errors
/// When libtorch fails.
pub fn join_strands(
    outputs: &[&[OutputFactor]],
    strands: impl IntoIterator<Item = Solution>,
) -> Result<Vec<Solution>> {
    let mut strands = strands.into_iter();
    outputs.iter().map(|factors| joined(factors, strands.by_ref().take(factors.len()))).collect()
}

/// The targets of the row blocks from `start` on: the values that compensate the errors of all rows before them. They do not
/// depend on each other. Blocks of equal size share one triangular solve.
fn targets(strands: &[&mut Strand<'_>], start: i64) -> Result<Vec<Tensor>, TchError> {
    let values = |s: &Strand<'_>| s.values.f_narrow(0, start, s.rows_at(start));
    if start == 0 {
        return strands.iter().map(|s| values(s)).collect();
    }
    let mut targets: Vec<Option<Tensor>> = strands.iter().map(|_| None).collect();
    while let Some(first) = targets.iter().position(Option::is_none) {
        let alike: Vec<usize> = (first..strands.len())
            .filter(|&i| targets[i].is_none() && strands[i].rows_at(start) == strands[first].rows_at(start))
            .collect();
        let stacked = |of: &dyn Fn(&Strand<'_>) -> Result<Tensor, TchError>| {
            Tensor::f_stack(&alike.iter().map(|&i| of(&*strands[i])).collect::<Result<Vec<_>, _>>()?, 0)
        };
        let (corners, sums) = (stacked(&|s| s.corner(start))?, stacked(&|s| s.sums(start))?);
        let shifts = corners.f_linalg_solve_triangular(&sums, false, true, false)?;
        let all = stacked(&values)?.f_sub_(&shifts)?;
        for (position, &i) in alike.iter().enumerate() {
            targets[i] = Some(all.f_select(0, position as i64)?);
        }
    }
    Ok(targets.into_iter().flatten().collect())
}

/// The rows of a weight that belong to one block of its output Hessian.
struct Strand<'a> {
    /// Of the weight.
    name: &'a str,
    output: &'a OutputFactor,
    /// `[n, K]` fp32, in the block's order.
    values: Tensor,
    /// `Ŵ − W` `[n, K]` fp32 of the solved rows, in the block's order.
    differences: Tensor,
    solved: Vec<Solution>,
}

impl<'a> Strand<'a> {
    fn new(weight: &Weight<'a>, output: &'a OutputFactor, device: Device) -> Result<Self, TchError> {
        let values =
            weight.values.f_to_device(device)?.f_index_select(0, &output.rows)?.f_to_kind(Kind::Float)?;
        let differences = values.f_empty_like()?;
        Ok(Self { name: weight.name, output, values, differences, solved: Vec::new() })
    }

    /// Rows of the row block from `start` on.
    fn rows_at(&self, start: i64) -> i64 {
        ROWS.min(self.output.len() - start)
    }

    /// `Σ_{j<b} Ũ_jbᵀ D_j` of the row block `b` from `start` on.
    fn sums(&self, start: i64) -> Result<Tensor, TchError> {
        let columns = self.output.upper.f_narrow(1, start, self.rows_at(start))?;
        columns.f_narrow(0, 0, start)?.f_tr()?.f_mm(&self.differences.f_narrow(0, 0, start)?)
    }

    /// `Ũ_bbᵀ` of that row block.
    fn corner(&self, start: i64) -> Result<Tensor, TchError> {
        let count = self.rows_at(start);
        self.output.upper.f_narrow(0, start, count)?.f_narrow(1, start, count)?.f_tr()
    }

    /// Stores the solution of the row block from `start` on.
    fn take(&mut self, start: i64, solution: Solution) -> Result<()> {
        let dense = solution.linear.dequantize(Kind::Float)?;
        let keep = || -> Result<(), TchError> {
            let dense = dense.f_to_device(self.values.device())?.f_tr()?;
            let count = dense.size()[0];
            let difference = dense.f_sub(&self.values.f_narrow(0, start, count)?)?;
            self.differences.f_narrow(0, start, count)?.f_copy_(&difference)
        };
        keep().torch("keep the errors of rows")?;
        self.solved.push(solution);
        Ok(())
    }

    /// The rows in the block's order. The error is that against the weight.
    fn solution(self, hessian: &Hessian) -> Result<Solution> {
        let squared_error = hessian.output_energy(&self.differences)?;
        let rows: Vec<i64> = (0..self.output.len()).collect();
        let uncompensated = self.solved.iter().map(|solution| solution.uncompensated).sum();
        let (mut parts, mut fallback) = (Vec::new(), None);
        for solution in self.solved {
            fallback = fallback.or(solution.fallback);
            parts.push(solution.linear);
        }
        Ok(Solution { linear: Solved::joined(parts, &rows)?, squared_error, uncompensated, fallback })
    }
}

/// Joins the strands of a linear.
fn joined(factors: &[OutputFactor], strands: impl Iterator<Item = Solution>) -> Result<Solution> {
    let (mut rows, mut parts) = (Vec::new(), Vec::new());
    let (mut squared_error, mut uncompensated, mut fallback) = (0.0, 0, None);
    for (factor, strand) in factors.iter().zip(strands) {
        rows.extend(Vec::<i64>::try_from(&factor.rows).torch("read an order of rows")?);
        squared_error += strand.squared_error;
        uncompensated += strand.uncompensated;
        fallback = fallback.or(strand.fallback);
        parts.push(strand.linear);
    }
    Ok(Solution { linear: Solved::joined(parts, &rows)?, squared_error, uncompensated, fallback })
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::{
        accuracy::AccuracyOptions,
        gptq::solver::{
            CpuSolver, CudaSolver, Solver,
            tests::problem::{Problem, solve, weight},
        },
        variant::Variant,
    };

    /// Cost of errors in 70 outputs that depend on each other.
    fn output_hessian(n: i64) -> Tensor {
        let options = (Kind::Float, Device::Cpu);
        let mix = Tensor::randn([n, n], options) + Tensor::eye(n, options) * 4.0;
        let gradients = Tensor::randn([1000, n], options).mm(&mix);
        gradients.tr().mm(&gradients) / 1000.0
    }

    fn by_rows(problem: &Problem, output: &Tensor, variant: &Variant) -> Solution {
        let sorting = AccuracyOptions::NONE.sorting(variant);
        let factor = CpuSolver::new().factorize(&problem.hessian, sorting, 0.01, "test").unwrap();
        let outputs = OutputFactor::all(&[output.shallow_clone()], 0.01, Device::Cpu, "test").unwrap();
        let weights = [weight(&problem.weight)];
        let solve = |rows: &[Weight<'_>]| factor.solve(rows, variant);
        solve_by_rows(&problem.hessian, &weights, &[&outputs[..]], &solve).unwrap().remove(0)
    }

    /// `tr(G D H Dᵀ)`.
    fn cost(problem: &Problem, output: &Tensor, linear: &Solved) -> f64 {
        let d = linear.dequantize(Kind::Float).unwrap().tr() - &problem.weight;
        let product = output.mm(&d).mm(problem.hessian.matrix()) * &d;
        f64::try_from(product.sum(Kind::Double)).unwrap()
    }

    #[test]
    fn rows_that_do_not_depend_on_each_other_are_solved_as_if_alone() {
        let problem = Problem::new(70, 96, 600, 3);
        let variant: Variant = "4bit-32g-act".parse().unwrap();
        let output = Tensor::eye(70, (Kind::Float, Device::Cpu)) * 3.0;
        let factor = CpuSolver::new()
            .factorize(&problem.hessian, AccuracyOptions::NONE.sorting(&variant), 0.01, "test")
            .unwrap();
        let alone = solve(&*factor, &[&problem.weight], &variant).remove(0);
        let solution = by_rows(&problem, &output, &variant);
        assert!((solution.squared_error / alone.squared_error - 1.0).abs() < 0.01);
        assert_eq!(solution.linear.on_host().unwrap().into_owned(), alone.linear);
    }

    /// Two weights with three strands. Each call of the solver has one row block of each strand.
    #[test]
    fn a_device_solves_rows_as_the_cpu_does() {
        let problem = Problem::new(70, 96, 600, 6);
        let other = Tensor::randn([33, 96], (Kind::Float, Device::Cpu)) * 0.02;
        let weights = [weight(&problem.weight), weight(&other)];
        let blocks: [&[i64]; 2] = [&[45, 25], &[33]];
        let outputs = blocks.map(|sizes| {
            let blocks: Vec<Tensor> = sizes.iter().map(|&n| output_hessian(n)).collect();
            OutputFactor::all(&blocks, 0.01, Device::Cpu, "test").unwrap()
        });
        let outputs: Vec<&[OutputFactor]> = outputs.iter().map(Vec::as_slice).collect();
        for variant in ["4bit-32g-act", "3bit-32g-asym", "4bit-48g-static"] {
            let variant: Variant = variant.parse().unwrap();
            let sorting = AccuracyOptions::NONE.sorting(&variant);
            let solved_by = |solver: &dyn Solver| {
                let (factor, calls) =
                    (solver.factorize(&problem.hessian, sorting, 0.01, "test").unwrap(), Cell::new(0));
                let solve = |rows: &[Weight<'_>]| {
                    calls.set(calls.get() + 1);
                    factor.solve(rows, &variant)
                };
                let solutions = solve_by_rows(&problem.hessian, &weights, &outputs, &solve).unwrap();
                assert_eq!(calls.get(), 45usize.div_ceil(ROWS as usize), "row blocks of the longest strand");
                solutions
            };
            let on_cpu = solved_by(&CpuSolver::new());
            let on_device = solved_by(&CudaSolver::host_emulation(227 << 10));
            for (expected, found) in on_cpu.iter().zip(&on_device) {
                assert!(matches!(found.linear, Solved::Device(_)), "{variant}");
                let [a, b] = [expected, found].map(|solution| solution.linear.on_host().unwrap());
                let same = a.codes().iter().zip(b.codes()).filter(|(a, b)| a == b).count();
                // A code on a border changes the targets of the rows after it.
                assert!(same * 100 >= a.codes().len() * 90, "{variant}: {same} of {}", a.codes().len());
                let ratio = found.squared_error / expected.squared_error;
                assert!((ratio - 1.0).abs() < 0.05, "{variant}: {ratio}");
            }
        }
    }

    /// Blocks of several weights, of equal size and not, are solved together, each as if alone.
    #[test]
    fn weights_that_are_solved_together_do_not_feel_each_other() {
        let problem = Problem::new(70, 96, 600, 5);
        let variant: Variant = "4bit-32g-act".parse().unwrap();
        let sorting = AccuracyOptions::NONE.sorting(&variant);
        let factor = CpuSolver::new().factorize(&problem.hessian, sorting, 0.01, "test").unwrap();
        let others = [70, 40, 33].map(|n| Tensor::randn([n, 96], (Kind::Float, Device::Cpu)) * 0.02);
        let values: Vec<&Tensor> = std::iter::once(&problem.weight).chain(&others).collect();
        let outputs: Vec<Vec<OutputFactor>> = values
            .iter()
            .map(|w| OutputFactor::all(&[output_hessian(w.size()[0])], 0.01, Device::Cpu, "test").unwrap())
            .collect();
        let solve = |some: &[usize]| -> Vec<Solution> {
            let weights: Vec<Weight<'_>> = some.iter().map(|&i| weight(values[i])).collect();
            let outputs: Vec<&[OutputFactor]> = some.iter().map(|&i| &outputs[i][..]).collect();
            let solve = |rows: &[Weight<'_>]| factor.solve(rows, &variant);
            solve_by_rows(&problem.hessian, &weights, &outputs, &solve).unwrap()
        };
        for (i, together) in solve(&[0, 1, 2, 3]).iter().enumerate() {
            let alone = solve(&[i]).remove(0);
            let same = together
                .linear
                .on_host()
                .unwrap()
                .codes()
                .iter()
                .zip(alone.linear.on_host().unwrap().codes())
                .filter(|(a, b)| a == b)
                .count();
            // Products of other sizes round differently.
            assert!(same * 100 >= together.linear.on_host().unwrap().codes().len() * 99, "{i}: {same}");
            assert!((together.squared_error / alone.squared_error - 1.0).abs() < 1e-3, "{i}");
        }
    }

    #[test]
    fn feedback_lowers_what_errors_cost() {
        let problem = Problem::new(70, 96, 600, 4);
        let output = output_hessian(70);
        for variant in ["4bit-32g-act", "3bit-32g", "4bit-48g-static-asym"] {
            let variant: Variant = variant.parse().unwrap();
            let factor = CpuSolver::new()
                .factorize(&problem.hessian, AccuracyOptions::NONE.sorting(&variant), 0.01, "test")
                .unwrap();
            let alone = solve(&*factor, &[&problem.weight], &variant).remove(0);
            let alone = cost(&problem, &output, &Solved::Host(alone.linear));
            let together = cost(&problem, &output, &by_rows(&problem, &output, &variant).linear);
            assert!(together < 0.9 * alone, "{variant}: {together} {alone}");
        }
    }
}
