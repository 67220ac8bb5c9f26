//! The definition against the classical loop, and the solvers against the definition.

mod hessian;
mod numerics;
pub(in crate::gptq) mod problem;
mod solvers;

use tch::{Device, Kind, Tensor};

use super::damping_steps;
use crate::{
    error::{Error, NumericalError},
    gptq::{Grid, Hessian},
    variant::Variant,
};
use problem::{Problem, to_vec};

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

#[test]
fn output_energy_is_close_to_fp32() {
    let problem = Problem::new(64, 256, 1000, 7);
    let exact = problem.hessian.output_energy_in(Kind::Float, &problem.weight).unwrap();
    let fast = problem.hessian.output_energy(&problem.weight).unwrap();
    assert!((fast / exact - 1.0).abs() < 2e-3, "{fast} {exact}");
    let (w, h) = (problem.weight(), problem.hessian());
    let k = problem.k;
    let direct: f64 = w
        .chunks(k)
        .map(|w| (0..k).map(|i| w[i] * (0..k).map(|j| w[j] * h[i * k + j]).sum::<f64>()).sum::<f64>())
        .sum();
    assert!((exact / direct - 1.0).abs() < 1e-4, "{exact} {direct}");
}

#[test]
fn damping_rises_to_one_and_ends() {
    let steps: Vec<_> = damping_steps(0.01).collect();
    assert_eq!(steps, [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0]);
    assert_eq!(damping_steps(0.0).take(2).collect::<Vec<_>>(), [0.0, 0.01]);
    assert_eq!(damping_steps(1.0).count(), 1);
}
