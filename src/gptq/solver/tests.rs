//! The fast solver against the definition, and the definition against the classical loop.

use tch::{Device, Kind, Tensor};

use super::{
    CpuSolver, CudaSolver, Factorized, Solver, TorchSolver, Weight, damping_steps,
    reference::{self, ReferenceSolution},
};
use crate::{
    error::Error,
    gptq::{Grid, Hessian, QuantizedLinear},
    variant::Variant,
};

/// fp32 arithmetic moves a value that lies on the border between two codes to either side, and every later column of
/// that row then aims at another point; the objective says whether that was harmless.
const CODES_THAT_MAY_DIFFER: f64 = 0.02;
/// The objective is quadratic about its minimum, so ties do not show in it.
const OBJECTIVE_TOLERANCE: f64 = 1e-3;

struct Problem {
    n: usize,
    k: usize,
    weight: Tensor,
    hessian: Hessian,
}

impl Problem {
    /// Correlated inputs of very different size, as in a real model.
    fn new(n: usize, k: usize, tokens: i64, seed: i64) -> Self {
        tch::manual_seed(seed);
        let f32 = (Kind::Float, Device::Cpu);
        let mix = Tensor::randn([k as i64, k as i64], f32) * 0.3 + Tensor::eye(k as i64, f32);
        let sizes = (Tensor::randn([k as i64], f32) * 0.7).exp();
        let inputs = Tensor::randn([tokens, k as i64], f32).matmul(&mix) * sizes;
        Self::with_inputs(n, k, &inputs)
    }

    fn with_inputs(n: usize, k: usize, inputs: &Tensor) -> Self {
        let mut hessian = Hessian::new(k, Device::Cpu).unwrap();
        // Two batches, as in a run.
        let half = inputs.size()[0] / 2;
        hessian.add(&inputs.narrow(0, 0, half)).unwrap();
        hessian.add(&inputs.narrow(0, half, inputs.size()[0] - half)).unwrap();
        let weight = Tensor::randn([n as i64, k as i64], (Kind::Float, Device::Cpu)) * 0.02;
        Self { n, k, weight, hessian: hessian.finish("test").unwrap() }
    }

    fn weight(&self) -> Vec<f64> {
        to_vec(&self.weight)
    }

    fn hessian(&self) -> Vec<f64> {
        to_vec(self.hessian.matrix())
    }

    fn reference(&self, variant: &Variant, damp: f64) -> ReferenceSolution {
        reference::solve(&self.weight(), &self.hessian(), self.k, damp, variant).unwrap()
    }

    fn fast(&self, variant: &Variant, damp: f64) -> ReferenceSolution {
        self.fast_with(&CpuSolver::new(), variant, damp)
    }

    fn fast_with(&self, solver: &dyn Solver, variant: &Variant, damp: f64) -> ReferenceSolution {
        let factor = solver.factorize(&self.hessian, variant.order.desc_act(), damp, "test").unwrap();
        solve(&*factor, &[&self.weight], variant).remove(0)
    }

    /// `tr(D H Dᵀ)` in f64.
    fn objective(&self, linear: &QuantizedLinear) -> f64 {
        let (w, h) = (self.weight(), self.hessian());
        let dense = linear.dequantize(f64::from);
        let mut sum = 0.0;
        for row in 0..self.n {
            let d: Vec<f64> = (0..self.k).map(|k| dense[k * self.n + row] - w[row * self.k + k]).collect();
            for (i, di) in d.iter().enumerate() {
                sum += di * d.iter().zip(&h[i * self.k..]).map(|(dj, h)| dj * h).sum::<f64>();
            }
        }
        sum
    }
}

fn weight(values: &Tensor) -> Weight<'_> {
    Weight { name: "weight", values }
}

/// All that run here; the one for CUDA twice, with plain code in place of its kernels, on devices with much and with
/// little shared memory.
fn all_solvers() -> [Box<dyn Solver>; 5] {
    [
        Box::new(CpuSolver::with_amx(false)),
        Box::new(CpuSolver::with_amx(true)),
        Box::new(TorchSolver),
        Box::new(CudaSolver::stand_in(227 << 10)),
        Box::new(CudaSolver::stand_in(99 << 10)),
    ]
}

/// Solved, and on the host.
fn solve(factor: &dyn Factorized, weights: &[&Tensor], variant: &Variant) -> Vec<ReferenceSolution> {
    let weights: Vec<_> = weights.iter().map(|w| weight(w)).collect();
    let solutions = factor.solve(&weights, variant).unwrap().into_iter();
    let on_host = solutions
        .map(|s| ReferenceSolution { linear: s.linear.into_host().unwrap(), squared_error: s.squared_error });
    on_host.collect()
}

fn to_vec(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.to_kind(Kind::Double).flatten(0, -1)).unwrap()
}

fn variants() -> Vec<Variant> {
    let texts = [
        "4bit-128g",
        "4bit-128g-act",
        "4bit-32g",
        "4bit-32g-act",
        "4bit-64g-act",
        "4bit-16g",
        "3bit-64g-act",
        "2bit-32g-asym",
        "8bit-128g-act-asym",
        "4bit--1g",
        "4bit--1g-act-asym",
        "4bit-48g-static",
        "4bit-512g-act",
        "4bit-100g-static-asym",
        "4bit-300g",
    ];
    texts.iter().map(|t| t.parse().unwrap()).collect()
}

#[test]
fn solvers_agree_with_the_definition() {
    // 600 columns: several panels, partial last groups; 70 rows: a partial tile.
    let problem = Problem::new(70, 600, 2000, 1);
    let solvers = all_solvers();
    for (variant, solver) in variants().into_iter().flat_map(|v| solvers.iter().map(move |s| (v, s))) {
        let slow = problem.reference(&variant, 0.01);
        let fast = problem.fast_with(&**solver, &variant, 0.01);
        let variant = format!("{variant}, {}", solver.name());
        assert_eq!(slow.linear.g_idx(), fast.linear.g_idx(), "{variant}");
        let pairs = slow.linear.codes().iter().zip(fast.linear.codes());
        let different = pairs.filter(|(a, b)| a != b).count() as f64 / slow.linear.codes().len() as f64;
        assert!(different <= CODES_THAT_MAY_DIFFER, "{variant}: {different} of the codes differ");
        let ratio = fast.squared_error / slow.squared_error;
        assert!((ratio - 1.0).abs() < OBJECTIVE_TOLERANCE * 5.0, "{variant}: objective ratio {ratio}");
        let direct = problem.objective(&fast.linear);
        let ratio = fast.squared_error / direct;
        assert!((ratio - 1.0).abs() < OBJECTIVE_TOLERANCE, "{variant}: reported over measured {ratio}");
    }
}

#[test]
fn stacked_weights_are_solved_as_if_alone() {
    let problem = Problem::new(40, 256, 800, 2);
    let other = Tensor::randn([24, 256], (Kind::Float, Device::Cpu));
    let variant: Variant = "4bit-64g-act".parse().unwrap();
    for solver in all_solvers() {
        let factor = solver.factorize(&problem.hessian, true, 0.01, "test").unwrap();
        let both = solve(&*factor, &[&problem.weight, &other], &variant);
        let alone = solve(&*factor, &[&other], &variant);
        assert_eq!(both[1].linear.out_features(), 24);
        assert_eq!(both[1].linear.g_idx(), alone[0].linear.g_idx());
        let same = both[1].linear.codes().iter().zip(alone[0].linear.codes()).filter(|(a, b)| a == b).count();
        assert!(same as f64 > 0.995 * (24.0 * 256.0), "{}: {same}", solver.name());
        let ratio = both[1].squared_error / alone[0].squared_error;
        assert!((ratio - 1.0).abs() < OBJECTIVE_TOLERANCE, "{}: {ratio}", solver.name());
    }
}

#[test]
fn two_solves_are_byte_identical() {
    let problem = Problem::new(96, 320, 900, 3);
    for variant in variants() {
        assert_eq!(problem.fast(&variant, 0.01).linear, problem.fast(&variant, 0.01).linear, "{variant}");
    }
}

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
fn dead_columns_get_zero_weights_and_are_counted() {
    let inputs = Tensor::randn([600, 128], (Kind::Float, Device::Cpu));
    for column in [5i64, 64, 127] {
        let _ = inputs.narrow(1, column, 1).zero_();
    }
    let problem = Problem::with_inputs(32, 128, &inputs);
    let solvers = all_solvers();
    for (text, solver) in ["4bit-32g", "4bit-32g-act", "4bit-64g-static"]
        .iter()
        .flat_map(|t| solvers.iter().map(move |s| (t, s)))
    {
        let variant: Variant = text.parse().unwrap();
        let factor = solver.factorize(&problem.hessian, variant.order.desc_act(), 0.01, "test").unwrap();
        let name = format!("{text}, {}", solver.name());
        assert_eq!(factor.facts().dead_columns, 3, "{name}");
        let solution = solve(&*factor, &[&problem.weight], &variant).remove(0);
        let dense = solution.linear.dequantize(|w| w);
        for column in [5, 64, 127] {
            assert!(dense[column * 32..][..32].iter().all(|&w| w == 0.0), "{name}");
        }
        let slow = problem.reference(&variant, 0.01);
        let ratio = solution.squared_error / slow.squared_error;
        assert!((ratio - 1.0).abs() < 5.0 * OBJECTIVE_TOLERANCE, "{name}: {ratio}");
    }
}

#[test]
fn damping_is_raised_only_when_needed_and_said() {
    // 20 tokens for 64 features: rank 20, so that without damping the factorization fails.
    let inputs = Tensor::randn([20, 64], (Kind::Float, Device::Cpu));
    let problem = Problem::with_inputs(8, 64, &inputs);
    for solver in all_solvers() {
        let facts = |damp| solver.factorize(&problem.hessian, false, damp, "test").unwrap().facts().clone();
        let raised = facts(0.0);
        assert!(raised.damp_raised > 0 && raised.damp >= 0.01, "{}: {raised:?}", solver.name());
        let plain = facts(0.01);
        assert_eq!((plain.damp, plain.damp_raised), (0.01, 0), "{}", solver.name());
    }
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
    assert!(matches!(empty, Error::EmptyHessian { .. }));
}

#[test]
fn a_weight_beyond_fp16_is_refused() {
    let problem = Problem::new(8, 64, 200, 6);
    let huge = &problem.weight * 1e9;
    for solver in all_solvers() {
        let factor = solver.factorize(&problem.hessian, false, 0.01, "test").unwrap();
        let weights = [weight(&problem.weight), Weight { name: "huge", values: &huge }];
        let error = factor.solve(&weights, &"4bit-32g".parse().unwrap()).unwrap_err();
        assert!(matches!(error, Error::Fp16Overflow { .. }), "{}: {error}", solver.name());
        assert!(error.to_string().starts_with("huge: scale of group 0, output feature 0"), "{error}");
    }
}

#[test]
fn output_energy_is_close_to_fp32() {
    let problem = Problem::new(64, 256, 1000, 7);
    let exact = problem.hessian.output_energy_fp32(&problem.weight).unwrap();
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
