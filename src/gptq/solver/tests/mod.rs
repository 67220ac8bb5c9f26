//! The definition against the classical loop, and the solvers against the definition.

mod blocks;
mod hessian;
mod numerics;
pub(in crate::gptq) mod problem;
mod reference;
mod solvers;
mod torch;

use tch::{Device, Kind, Tensor};

use super::{CpuSolver, RtnSolver, Solver, Weight, damping_steps, targets};
use crate::{
    accuracy::{AccuracyOptions, Scales},
    error::{Error, NumericalError},
    gptq::{ColumnOrder, CrossCovariance, Grid, Hessian, QuantizedLinear, Step, dead_columns},
    variant::{Order, Variant},
};
use problem::{Problem, to_vec};
use torch::TorchSolver;

/// The loop of the GPTQ paper on the Cholesky factor of the inverse, with scales fitted to compensated weights.
fn classical(problem: &Problem, group: usize, damp: f64) -> Vec<u8> {
    let (n, k) = (problem.n, problem.k);
    let h = problem.hessian.matrix().to_kind(Kind::Double);
    let mean = f64::try_from(h.diagonal(0, 0, 1).mean(Kind::Double)).unwrap();
    let damped = &h + Tensor::eye(k as i64, (Kind::Double, Device::Cpu)) * (damp * mean);
    let inverse = damped.linalg_cholesky(false).cholesky_inverse(false);
    let u = to_vec(&inverse.linalg_cholesky(true));
    let mut w = problem.weight();
    let grid = Grid::new("4bit-128g".parse::<Variant>().unwrap().bits, true);
    let mut codes = vec![0u8; k * n];
    for row in 0..n {
        let w = &mut w[row * k..][..k];
        let mut step = grid.fit(0.0, 0.0);
        for i in 0..k {
            if i % group == 0 {
                let range = &w[i..(i + group).min(k)];
                let (min, max) = range.iter().fold((f64::MAX, f64::MIN), |(a, b), &x| (a.min(x), b.max(x)));
                step = grid.fit(min, max);
            }
            let code = grid.code(w[i], step);
            codes[i * n + row] = code;
            let error = (w[i] - step.weight(code)) / u[i * k + i];
            for j in i..k {
                w[j] -= error * u[i * k + j];
            }
        }
    }
    codes
}

#[test]
fn the_definition_is_the_classical_loop() {
    let problem = Problem::new(24, 160, 500, 4);
    for group in [32, 48, 160] {
        let variant: Variant = format!("4bit-{group}g").parse().unwrap();
        assert_eq!(
            problem.reference(&variant, 0.01).linear.codes(),
            classical(&problem, group, 0.01),
            "{group}"
        );
    }
}

#[test]
fn compensated_scales_beat_stale_ones_and_gptq_beats_rounding() {
    let problem = Problem::new(64, 512, 2000, 5);
    let gptq = problem.fast(&"4bit-32g-act".parse().unwrap(), 0.01).squared_error;
    // Full damping leaves next to no compensation: nearly round-to-nearest.
    let rounding = problem.fast(&"4bit-32g".parse().unwrap(), 1000.0).squared_error;
    assert!(gptq < 0.8 * rounding, "{gptq} {rounding}");
}

#[test]
fn broken_inputs_are_named() {
    let mut hessian = Hessian::new(8, Device::Cpu).unwrap();
    let inputs = Tensor::ones([4, 8], (Kind::Float, Device::Cpu));
    let _ = inputs.narrow(1, 3, 1).fill_(f64::NAN);
    hessian.add(&inputs).unwrap();
    let error = hessian.finish("layer 3, down").unwrap_err();
    assert_eq!(error.to_string(), "inputs of layer 3, down: 1 of 8 values are NaN or infinite");
    let empty = Hessian::new(8, Device::Cpu).unwrap().finish("layer 3, down").unwrap_err();
    assert!(matches!(empty, Error::Numerical(NumericalError::EmptyHessian { .. })));
}

/// `tr(W H Wᵀ)` in f64.
fn energy(problem: &Problem) -> f64 {
    let h = problem.hessian.matrix().to_device(Device::Cpu).to_kind(Kind::Double);
    let w = problem.weight.to_device(Device::Cpu).to_kind(Kind::Double);
    f64::try_from((w.mm(&h) * w).sum(Kind::Double)).unwrap()
}

#[test]
fn output_energy_of_few_rows_is_exact() {
    let problem = Problem::new(64, 256, 1000, 7);
    let ratio = problem.hessian.output_energy(&problem.weight).unwrap() / energy(&problem);
    assert!((ratio - 1.0).abs() < 1e-5, "{ratio}");
}

#[test]
fn output_energy_of_many_rows_is_within_two_percent() {
    for (n, k, tokens) in [(700, 256, 1000), (1100, 512, 600)] {
        let problem = Problem::new(n, k, tokens, 7);
        let estimate = problem.hessian.output_energy(&problem.weight).unwrap();
        assert_eq!(problem.hessian.output_energy(&problem.weight).unwrap(), estimate);
        let ratio = estimate / energy(&problem);
        assert!((ratio - 1.0).abs() < 0.02, "{ratio}");
    }
}

#[test]
fn damping_rises_to_one_and_ends() {
    let steps: Vec<_> = damping_steps(0.01).collect();
    assert_eq!(steps, [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0]);
    assert_eq!(damping_steps(0.0).take(2).collect::<Vec<_>>(), [0.0, 0.01]);
    assert_eq!(damping_steps(1.0).count(), 1);
}

/// With `x̂` a disturbed `x`: of all weights the target has outputs on `x` that come nearest to those of the weight on `x̂`. One weight is divided
/// alone, as it has fewer rows than columns; three together.
#[test]
fn targets_have_the_least_error() {
    tch::manual_seed(3);
    let options = (Kind::Float, Device::Cpu);
    let x = Tensor::randn([300, 12], options);
    let reference = &x + Tensor::randn([300, 12], options) * 0.2 + x.roll([1], [1]) * 0.3;
    let (mut hessian, mut cross) =
        (Hessian::new(12, Device::Cpu).unwrap(), CrossCovariance::new(12, Kind::Float, Device::Cpu).unwrap());
    for (first, count) in [(0, 100), (100, 200)] {
        let part = |t: &Tensor| t.narrow(0, first, count);
        hessian.add(&part(&x)).unwrap();
        cross.add(&part(&x), &part(&reference)).unwrap();
    }
    let (hessian, cross) = (hessian.finish("test").unwrap(), cross.finish(1.0, "test").unwrap());
    let values: Vec<Tensor> = (0..3).map(|_| Tensor::randn([5, 12], options)).collect();
    // For so few rows the sums are those of `W D`.
    let mut product = CrossCovariance::of_weights(&[&values[0]], Kind::Float, Device::Cpu).unwrap();
    product.add(&x, &reference).unwrap();
    assert!(product.is_product());
    let product = product.finish(1.0, "test").unwrap();
    let weights: Vec<Weight<'_>> = values.iter().map(|values| Weight { name: "test", values }).collect();
    for sorting in ["4bit-32g", "4bit-32g-act"].map(|v| v.parse::<Variant>().unwrap().sorting(false)) {
        let of = |solver: &dyn Solver, count: usize| {
            let factor = solver.factorize(&hessian, sorting, 0.0, "test").unwrap();
            targets(&*factor, &cross, &weights[..count]).unwrap()
        };
        for solver in [&CpuSolver::new() as &dyn Solver, &TorchSolver::default()] {
            let (alone, together) = (of(solver, 1), of(solver, 3));
            assert!(alone[0].allclose(&together[0], 1e-4, 1e-5, false));
            let factor = solver.factorize(&hessian, sorting, 0.0, "test").unwrap();
            let of_product = targets(&*factor, &product, &weights[..1]).unwrap();
            assert!(of_product[0].allclose(&together[0], 1e-4, 1e-5, false));
            for (weight, target) in values.iter().zip(&together) {
                let error = |w: &Tensor| {
                    let off = x.mm(&w.tr()) - reference.mm(&weight.tr());
                    f64::try_from(off.square().sum(Kind::Double)).unwrap()
                };
                let least = error(target);
                assert!(least < 0.9 * error(weight));
                for _ in 0..20 {
                    assert!(error(&(target + Tensor::randn([5, 12], options) * 1e-2)) > least);
                }
            }
        }
    }
    let rounded =
        RtnSolver.factorize(&hessian, "4bit-32g".parse::<Variant>().unwrap().sorting(false), 0.0, "test");
    let rounded = targets(&*rounded.unwrap(), &cross, &weights).unwrap();
    assert!(rounded.iter().zip(&values).all(|(target, weight)| target == weight));
}

/// Inputs are multiplied in bf16, which cannot tell them from the reference model's.
#[test]
fn a_cross_covariance_takes_differences_before_it_rounds() {
    tch::manual_seed(5);
    let x = Tensor::randn([300, 12], (Kind::Float, Device::Cpu)).abs() + 1.0;
    let reference = &x * (1.0 + 1.0 / 4096.0);
    let sums = |kind: Kind, weights: &[&Tensor]| {
        let mut sums = CrossCovariance::of_weights(weights, kind, Device::Cpu).unwrap();
        sums.add(&x, &reference).unwrap();
        sums.finish(1.0, "test").unwrap().finished().copy()
    };
    // Few rows, so that the sums are those of `W D`, and many.
    for rows in [4, 20] {
        let weight = Tensor::randn([rows, 12], (Kind::Float, Device::Cpu)).abs();
        let (exact, rounded) = (sums(Kind::Float, &[&weight]), sums(Kind::BFloat16, &[&weight]));
        let off = (rounded - &exact).abs() / exact.abs();
        assert!(off.max().double_value(&[]) < 0.02, "{off}");
    }
}
