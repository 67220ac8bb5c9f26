//! Numbers that do not behave: each ends in a result no worse than rounding to nearest, or in an error that says where.

use tch::{Device, Kind, Tensor};

use super::{
    problem::{Problem, to_vec, weight},
    torch::TorchSolver,
};
use crate::{
    accuracy::AccuracyOptions,
    amx::Parts,
    error::{Error, NumericalError, Result},
    gptq::{
        Hessian, QuantizedLinear,
        solver::{CpuSolver, CudaSolver, OrRounded, RtnSolver, Solution, Solver, Weight},
    },
    variant::{Sorting, Variant},
};

const N: usize = 40;
/// More than one panel, and a last group that is not full.
const K: usize = 304;
const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);
const VARIANTS: [&str; 6] =
    ["4bit-32g", "4bit-64g-act", "4bit-128g-static", "4bit--1g", "2bit-32g-act-asym", "8bit-64g-asym"];

/// Largest ratio of an error to that of rounding: both are computed from fp32 weights and inputs.
const TOLERANCE: f64 = 1e-3;

/// The solvers of runs; that of CUDA with plain code in place of its kernels.
fn on_cpu() -> [Box<dyn Solver>; 4] {
    [
        Box::new(CpuSolver::with_products(None)),
        Box::new(CpuSolver::with_products(Some(Parts::Two))),
        Box::new(CpuSolver::with_products(Some(Parts::One))),
        Box::new(CudaSolver::host_emulation(227 << 10)),
    ]
}

/// Independent inputs `[tokens, K]`.
fn plain(tokens: i64) -> Tensor {
    Tensor::randn([tokens, K as i64], OPTIONS)
}

/// Inputs `[T, K]` that make rank-deficient and ill-conditioned Hessians, and plain ones.
fn inputs() -> Vec<(&'static str, Tensor)> {
    tch::manual_seed(11);
    let scaled = |scale: &dyn Fn(usize) -> f32| {
        let scales: Vec<f32> = (0..K).map(scale).collect();
        plain(500) * Tensor::from_slice(&scales)
    };
    let half = plain(500).narrow(1, 0, K as i64 / 2);
    let zeros = plain(500);
    let _ = zeros.narrow(1, 10, 290).zero_();
    vec![
        ("plain", plain(600)),
        ("every feature twice", Tensor::cat(&[&half, &half], 1)),
        ("one feature in all places", half.narrow(1, 0, 1).expand([500, K as i64], false).contiguous()),
        ("one token", plain(1)),
        ("seven tokens", plain(7)),
        ("zero but for 14 features", zeros),
        ("features scaled by 1e4 and 1e-4", scaled(&|k| if k % 2 == 0 { 1e4 } else { 1e-4 })),
        ("features scaled from 1e-4 to 1e4", scaled(&|k| 10f32.powf(k as f32 / K as f32 * 8.0 - 4.0))),
        ("outlier channels", scaled(&|k| if k % 50 == 7 { 1000.0 } else { 1.0 })),
        ("a large common part", plain(500) + plain(1) * 100.0),
        ("tiny", plain(500) * 1e-18),
        ("huge", plain(500) * 1e15),
    ]
}

/// Weights `[N, K]`.
fn weights() -> Vec<(&'static str, Tensor)> {
    tch::manual_seed(12);
    let plain = || Tensor::randn([N as i64, K as i64], OPTIONS) * 0.02;
    let outliers = plain();
    for column in [3, 100, 301] {
        let _ = outliers.narrow(1, column, 1).f_mul_scalar_(1000.0).unwrap();
    }
    vec![
        ("plain", plain()),
        ("positive", plain().abs()),
        ("negative", -(plain().abs()) - 0.5),
        ("zero", plain().zero_()),
        ("denormal in fp16", plain() * 1e-5),
        ("denormal in fp32", plain() * 1e-38),
        ("outlier columns", outliers),
        ("equal", plain().fill_(0.3)),
    ]
}

/// The Hessian of inputs.
fn hessian(inputs: &Tensor) -> Hessian {
    let mut hessian = Hessian::new(K, Device::Cpu).unwrap();
    hessian.add(inputs).unwrap();
    hessian.finish("layer 3, down").unwrap()
}

/// `‖(Ŵ − W) X‖² / T` in f64.
fn objective(weight: &Tensor, inputs: &Tensor, linear: &QuantizedLinear) -> f64 {
    let dense = Tensor::from_slice(&linear.dequantize(f64::from)).view([K as i64, N as i64]);
    let difference = dense.tr() - weight.to_kind(Kind::Double);
    let outputs = difference.mm(&inputs.to_kind(Kind::Double).tr());
    to_vec(&outputs).iter().map(|x| x * x).sum::<f64>() / inputs.size()[0] as f64
}

fn solved(solver: &dyn Solver, hessian: &Hessian, values: &Tensor, variant: &Variant, damp: f64) -> Solution {
    try_solve(solver, hessian, values, variant, damp).unwrap()
}

fn try_solve(
    solver: &dyn Solver,
    hessian: &Hessian,
    values: &Tensor,
    variant: &Variant,
    damp: f64,
) -> Result<Solution> {
    let factor = solver.factorize(hessian, variant.sorting(false), damp, "layer 3, down")?;
    Ok(factor.solve(&[weight(values)], variant)?.remove(0))
}

/// Requires that both CPU solvers do no worse than rounding, and say how well they did; without damping, they may also
/// say that they cannot.
fn no_worse_than_rounding(name: &str, x: &Tensor, w: &Tensor, damp: f64) {
    let hessian = hessian(x);
    for variant in VARIANTS.map(|text| text.parse::<Variant>().unwrap()) {
        let rounded = solved(&RtnSolver, &hessian, w, &variant, damp);
        let limit = objective(w, x, &rounded.linear.on_host().unwrap());
        for solver in on_cpu() {
            let name = format!("{name}, damp {damp}, {variant}, {}", solver.name());
            let solution = match try_solve(&*solver, &hessian, w, &variant, damp) {
                Err(error @ Error::Numerical(_)) if damp == 0.0 => {
                    let text = error.to_string();
                    assert!(text.contains("layer 3, down") || text.contains("`weight`"), "{name}: {text}");
                    assert!(error.hint().unwrap().contains("--on-failure rtn"), "{name}");
                    continue;
                }
                solution => solution.unwrap_or_else(|error| panic!("{name}: {error}")),
            };
            let reported = solution.squared_error;
            let found = objective(w, x, &solution.linear.on_host().unwrap());
            assert!(found <= limit * (1.0 + TOLERANCE), "{name}: {found} is above {limit}");
            assert!(reported.is_finite(), "{name}");
            // Errors far below what rounding would leave are lost in fp32, and so are those that it cannot hold.
            assert!(
                (reported - found).abs() <= 0.01 * found + TOLERANCE * limit + f64::from(f32::MIN_POSITIVE),
                "{name}: {reported} {found}"
            );
        }
    }
}

#[test]
fn degenerate_inputs_end_no_worse_than_rounding() {
    let (_, plain) = weights().remove(0);
    for (name, x) in inputs() {
        for damp in [0.01, 0.0] {
            no_worse_than_rounding(name, &x, &plain, damp);
        }
    }
}

#[test]
fn degenerate_weights_end_no_worse_than_rounding() {
    let inputs = inputs();
    for at in ["plain", "seven tokens", "zero but for 14 features", "outlier channels"] {
        let (name, x) = inputs.iter().find(|(name, _)| *name == at).unwrap();
        for (kind, w) in weights() {
            no_worse_than_rounding(&format!("{name}, {kind} weights"), x, &w, 0.01);
        }
    }
}

/// The plain solver does not compare its rows with rounding: only that nothing leaves the numbers is asked of it.
#[test]
fn degenerate_numbers_stay_numbers_in_libtorchs_solver() {
    let (_, plain) = weights().remove(0);
    let variant: Variant = "4bit-64g-act".parse().unwrap();
    for (name, x) in inputs() {
        let solution = solved(&TorchSolver::default(), &hessian(&x), &plain, &variant, 0.01);
        let found = objective(&plain, &x, &solution.linear.on_host().unwrap());
        assert!(solution.squared_error.is_finite() && found.is_finite(), "{name}");
    }
}

#[test]
fn rows_that_compensation_would_harm_are_rounded_and_counted() {
    tch::manual_seed(13);
    let mut problem = Problem::new(N, K, 500, 13);
    // Rows of one sign among good ones.
    let harmed = problem.weight.narrow(0, 8, 4);
    harmed.shallow_clone().copy_(&(-harmed.abs() * 0.1 - 0.5));
    let x = plain(500);
    problem.hessian = hessian(&x);
    let variant: Variant = "2bit-32g-act-asym".parse().unwrap();
    let rounded = solved(&RtnSolver, &problem.hessian, &problem.weight, &variant, 0.01)
        .linear
        .on_host()
        .unwrap()
        .into_owned();
    let slow = problem.reference_or_rounded(&variant, 0.01, &AccuracyOptions::NONE);
    for solver in on_cpu() {
        let solution = solved(&*solver, &problem.hessian, &problem.weight, &variant, 0.01);
        assert_eq!(solution.uncompensated, 4, "{}", solver.name());
        let linear = solution.linear.on_host().unwrap().into_owned();
        for row in 0..N {
            let codes = |linear: &QuantizedLinear| -> Vec<u8> {
                linear.codes().iter().skip(row).step_by(N).copied().collect()
            };
            let same = codes(&linear) == codes(&rounded);
            assert_eq!(same, (8..12).contains(&row), "{}, row {row}", solver.name());
        }
        let ratio = solution.squared_error / slow.squared_error;
        assert!((ratio - 1.0).abs() < 5e-3, "{}: {ratio}", solver.name());
    }
}

#[test]
fn nan_and_infinity_in_a_weight_are_refused_by_name() {
    let hessian = hessian(&plain(500));
    let (_, good) = weights().remove(0);
    let solvers: [Box<dyn Solver>; 4] = [
        Box::new(CpuSolver::with_products(None)),
        Box::new(CpuSolver::with_products(Some(Parts::One))),
        Box::new(TorchSolver::default()),
        Box::new(OrRounded(CpuSolver::new())),
    ];
    for (solver, value) in
        solvers.iter().flat_map(|s| [f64::NAN, f64::INFINITY, f64::NEG_INFINITY].map(|value| (s, value)))
    {
        let bad = good.copy();
        let _ = bad.narrow(0, 7, 1).narrow(1, 211, 1).fill_(value);
        for variant in VARIANTS.map(|text| text.parse::<Variant>().unwrap()) {
            let factor = solver.factorize(&hessian, variant.sorting(false), 0.01, "layer 3, down").unwrap();
            let name = "model.layers.3.mlp.down_proj";
            let weights = [weight(&good), Weight { name, values: &bad }];
            let error = factor.solve(&weights, &variant).unwrap_err();
            assert_eq!(
                error.to_string(),
                "weight of `model.layers.3.mlp.down_proj`: 1 of 12160 values are NaN or infinite",
                "{value} {variant} {}",
                solver.name()
            );
            assert!(error.hint().is_some());
        }
    }
}

#[test]
fn nan_and_infinity_in_an_activation_are_refused_by_name() {
    for value in [f64::NAN, f64::INFINITY] {
        for kind in [Kind::Float, Kind::BFloat16] {
            let x = plain(500).to_kind(kind);
            let _ = x.narrow(0, 17, 1).narrow(1, 211, 1).fill_(value);
            let mut hessian = Hessian::new(K, Device::Cpu).unwrap();
            hessian.add(&x).unwrap();
            let error = hessian.finish("layer 3, down").unwrap_err();
            assert_eq!(
                error.to_string(),
                "inputs of layer 3, down: 1 of 304 values are NaN or infinite",
                "{value} {kind:?}"
            );
            assert!(error.hint().is_some());
        }
    }
}

#[test]
fn inputs_that_are_all_zero_are_refused_or_rounded() {
    let hessian = hessian(&plain(50).zero_());
    let (_, values) = weights().remove(0);
    let variant: Variant = "4bit-32g-act".parse().unwrap();
    let error =
        CpuSolver::new().factorize(&hessian, Sorting::Descending, 0.01, "layer 3, down").err().unwrap();
    assert!(matches!(error, Error::Numerical(NumericalError::EmptyHessian { .. })), "{error}");
    assert!(error.hint().unwrap().contains("--on-failure rtn"));

    let solution = solved(&OrRounded(CpuSolver::new()), &hessian, &values, &variant, 0.01);
    assert_eq!(
        solution.fallback.as_deref(),
        Some("the Hessian of layer 3, down is zero: all its inputs were zero")
    );
    assert_eq!(solution.squared_error, 0.0);
    let alone = solved(&RtnSolver, &hessian, &values, &variant, 0.01);
    assert_eq!(solution.linear.on_host().unwrap().into_owned(), alone.linear.on_host().unwrap().into_owned());
}

/// A scale that only compensation makes too large for fp16: that linear alone is rounded, the one solved with it is not.
#[test]
fn a_linear_that_fails_is_rounded_alone() {
    // The first feature of the second group is that of the first, a million times smaller, plus next to nothing: its weight
    // has to make good for the first one's rounding a million times over.
    tch::manual_seed(14);
    let x = Tensor::randn([500, 32], OPTIONS);
    let almost = x.narrow(1, 0, 1) * 1e-6 + x.narrow(1, 16, 1) * 1e-9;
    x.narrow(1, 16, 1).copy_(&almost);
    let mut hessian = Hessian::new(32, Device::Cpu).unwrap();
    hessian.add(&x).unwrap();
    let hessian = hessian.finish("layer 3, down").unwrap();
    let variant: Variant = "2bit-16g".parse().unwrap();
    let large = Tensor::randn([8, 32], OPTIONS) * 20_000.0;
    let large = large.clamp(-65_000.0, 65_000.0);
    let small = Tensor::randn([8, 32], OPTIONS) * 1e-3;
    let both = [weight(&small), Weight { name: "large", values: &large }];
    let factor =
        |solver: &dyn Solver| solver.factorize(&hessian, Sorting::Stored, 0.0, "layer 3, down").unwrap();
    let error = factor(&CpuSolver::new()).solve(&both, &variant).unwrap_err();
    let unsolved =
        matches!(&error, Error::Numerical(NumericalError::Unsolved { linear, .. }) if linear == "large");
    assert!(unsolved, "{error}");
    assert!(error.hint().unwrap().contains("--on-failure rtn"));
    let solutions = factor(&OrRounded(CpuSolver::new())).solve(&both, &variant).unwrap();
    assert_eq!(solutions[0].fallback, None);
    assert!(solutions[1].fallback.as_ref().unwrap().starts_with("`large` could not be solved: "));
}
