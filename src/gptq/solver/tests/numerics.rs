//! Numbers that do not behave: each ends in a result no worse than rounding to nearest, or in an error that says where.

use tch::{Device, Kind, Tensor};

use super::problem::{Problem, solve, to_vec};
use crate::{
    gptq::{
        QuantizedLinear,
        solver::{CpuSolver, RtnSolver, Solver, TorchSolver},
    },
    variant::Variant,
};

const N: usize = 40;
/// More than one panel of either solver, and a last group that is not full.
const K: usize = 304;
const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);

fn solvers() -> [Box<dyn Solver>; 3] {
    [Box::new(CpuSolver::with_amx(false)), Box::new(CpuSolver::with_amx(true)), Box::new(TorchSolver)]
}

/// Independent inputs `[tokens, K]`.
fn plain(tokens: i64) -> Tensor {
    Tensor::randn([tokens, K as i64], OPTIONS)
}

/// Inputs `[T, K]` that make rank-deficient and ill-conditioned Hessians.
fn inputs() -> Vec<(&'static str, Tensor)> {
    tch::manual_seed(11);
    let scaled = |scale: &dyn Fn(usize) -> f32| {
        let scales: Vec<f32> = (0..K).map(scale).collect();
        plain(500) * Tensor::from_slice(&scales)
    };
    let duplicates = {
        let half = plain(500).narrow(1, 0, K as i64 / 2);
        Tensor::cat(&[&half, &half], 1)
    };
    let zeros = plain(500);
    let _ = zeros.narrow(1, 10, 290).zero_();
    vec![
        ("plain", plain(600)),
        ("duplicate features", duplicates),
        ("one feature in all places", plain(500).narrow(1, 0, 1).expand([500, K as i64], false).contiguous()),
        ("one token", plain(1)),
        ("seven tokens", plain(7)),
        ("zero but for 14 features", zeros),
        ("features scaled by 1e4 and 1e-4", scaled(&|k| if k % 2 == 0 { 1e4 } else { 1e-4 })),
        ("features scaled from 1e-4 to 1e4", scaled(&|k| 10f32.powf(k as f32 / K as f32 * 8.0 - 4.0))),
        ("outlier channels", scaled(&|k| if k % 50 == 7 { 1000.0 } else { 1.0 })),
        ("one outlier channel", scaled(&|k| if k == 100 { 1000.0 } else { 1.0 })),
        ("a large common part", plain(500) + plain(1) * 100.0),
        ("tiny", plain(500) * 1e-20),
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

/// `‖(Ŵ − W) X‖² / T` in f64.
fn objective(weight: &Tensor, inputs: &Tensor, linear: &QuantizedLinear) -> f64 {
    let dense = Tensor::from_slice(&linear.dequantize(f64::from)).view([K as i64, N as i64]);
    let difference = dense.tr() - weight.to_kind(Kind::Double);
    let outputs = difference.mm(&inputs.to_kind(Kind::Double).tr());
    to_vec(&outputs).iter().map(|x| x * x).sum::<f64>() / inputs.size()[0] as f64
}

#[test]
fn experiment() {
    let variants = ["4bit-32g", "4bit-64g-act", "4bit-128g-static", "4bit--1g", "2bit-32g-act-asym", "8bit-64g-asym", "3bit-48g-act"];
    for (x_name, x) in inputs() {
        for (w_name, w) in weights() {
            let mut problem = Problem::with_inputs(N, K, &Tensor::cat(&[&x, &x], 0));
            problem.weight = w.shallow_clone();
            for damp in [0.01, 0.0] {
                for variant in variants.map(|text| text.parse::<Variant>().unwrap()) {
                    let rtn = problem.fast_with(&RtnSolver, &variant, damp);
                    let limit = objective(&w, &x, &rtn.linear);
                    for solver in solvers() {
                        let name = format!("{x_name:35} {w_name:18} {variant:20} {damp} {}", solver.name());
                        let factor = match solver.factorize(&problem.hessian, variant.order.desc_act(), damp, "s") {
                            Ok(f) => f, Err(e) => { println!("{name}: {e}"); continue }
                        };
                        let ws = [super::problem::weight(&w)];
                        match factor.solve(&ws, &variant) {
                            Err(e) => println!("{name}: {e}"),
                            Ok(mut s) => {
                                let s = s.remove(0);
                                let reported = s.squared_error;
                                let found = objective(&w, &x, &s.linear.into_host().unwrap());
                                let flag = if found > limit * 1.0001 { "WORSE" } else { "ok" };
                                println!("{name}: {flag} ratio {:.4} reported/found {:.4} {:?}", found / limit, reported / found, factor.facts());
                            }
                        }
                    }
                }
            }
        }
    }
    let _ = solve;
}
