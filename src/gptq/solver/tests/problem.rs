//! Problems for tests of solvers.

use tch::{Device, Kind, Tensor};

use super::reference::{self, ReferenceSolution};
use crate::{
    accuracy::AccuracyOptions,
    device,
    gptq::{
        Hessian, QuantizedLinear,
        solver::{CpuSolver, Factorized, Solver, Weight},
    },
    variant::Variant,
};

/// fp32 arithmetic moves a value on the border between two codes to either side. Every later column of that row then has
/// another target. The objective shows whether that was harmless.
pub(in crate::gptq) const CODES_THAT_MAY_DIFFER: f64 = 0.02;
/// The objective is quadratic about its minimum, so ties do not show in it.
pub(in crate::gptq) const OBJECTIVE_TOLERANCE: f64 = 1e-3;

/// A linear to be quantized.
pub(in crate::gptq) struct Problem {
    pub(in crate::gptq) n: usize,
    pub(in crate::gptq) k: usize,
    /// `[N, K]` fp32.
    pub(in crate::gptq) weight: Tensor,
    pub(in crate::gptq) hessian: Hessian,
}

impl Problem {
    /// Correlated inputs of very different size, as in a real model.
    pub(in crate::gptq) fn new(n: usize, k: usize, tokens: i64, seed: i64) -> Self {
        tch::manual_seed(seed);
        let f32 = (Kind::Float, Device::Cpu);
        let mix = Tensor::randn([k as i64, k as i64], f32) * 0.3 + Tensor::eye(k as i64, f32);
        let sizes = (Tensor::randn([k as i64], f32) * 0.7).exp();
        let inputs = Tensor::randn([tokens, k as i64], f32).matmul(&mix) * sizes;
        Self::with_inputs(n, k, &inputs)
    }

    pub(in crate::gptq) fn with_inputs(n: usize, k: usize, inputs: &Tensor) -> Self {
        let mut hessian = Hessian::new(k, Device::Cpu).unwrap();
        // Two batches, as in a run.
        let half = inputs.size()[0] / 2;
        hessian.add(&inputs.narrow(0, 0, half)).unwrap();
        hessian.add(&inputs.narrow(0, half, inputs.size()[0] - half)).unwrap();
        let weight = Tensor::randn([n as i64, k as i64], (Kind::Float, Device::Cpu)) * 0.02;
        Self { n, k, weight, hessian: hessian.finish("test").unwrap() }
    }

    /// The same on another device.
    pub(in crate::gptq) fn on(&self, device: Device) -> Self {
        let (weight, hessian) = (self.weight.to_device(device), self.hessian.on(device));
        Self { n: self.n, k: self.k, weight, hessian }
    }

    pub(in crate::gptq) fn weight(&self) -> Vec<f64> {
        to_vec(&self.weight)
    }

    pub(in crate::gptq) fn hessian(&self) -> Vec<f64> {
        to_vec(self.hessian.matrix())
    }

    pub(in crate::gptq) fn reference(&self, variant: &Variant, damp: f64) -> ReferenceSolution {
        self.reference_with(variant, damp, &AccuracyOptions::NONE)
    }

    pub(in crate::gptq) fn reference_with(
        &self,
        variant: &Variant,
        damp: f64,
        accuracy: &AccuracyOptions,
    ) -> ReferenceSolution {
        reference::solve(&self.weight(), &self.hessian(), self.k, damp, variant, accuracy, false).unwrap()
    }

    /// With rows rounded to nearest where that is better, as the solvers of a run do it.
    pub(in crate::gptq) fn reference_or_rounded(
        &self,
        variant: &Variant,
        damp: f64,
        accuracy: &AccuracyOptions,
    ) -> ReferenceSolution {
        reference::solve(&self.weight(), &self.hessian(), self.k, damp, variant, accuracy, true).unwrap()
    }

    pub(in crate::gptq) fn fast(&self, variant: &Variant, damp: f64) -> ReferenceSolution {
        self.fast_with(&CpuSolver::new(), variant, damp, &AccuracyOptions::NONE)
    }

    pub(in crate::gptq) fn fast_with(
        &self,
        solver: &dyn Solver,
        variant: &Variant,
        damp: f64,
        accuracy: &AccuracyOptions,
    ) -> ReferenceSolution {
        let sorting = accuracy.sorting(variant);
        let factor = solver.factorize(&self.hessian, sorting, damp, "test").unwrap();
        solve(&*factor, &[&self.weight], variant).remove(0)
    }

    /// `tr(D H Dᵀ)` in f64.
    pub(in crate::gptq) fn objective(&self, linear: &QuantizedLinear) -> f64 {
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

pub(in crate::gptq) fn weight(values: &Tensor) -> Weight<'_> {
    Weight { name: "weight", values }
}

/// Solved, and on the host.
pub(in crate::gptq) fn solve(
    factor: &dyn Factorized,
    weights: &[&Tensor],
    variant: &Variant,
) -> Vec<ReferenceSolution> {
    let weights: Vec<_> = weights.iter().map(|w| weight(w)).collect();
    let solutions = factor.solve(&weights, variant).unwrap().into_iter();
    let on_host = solutions.map(|s| ReferenceSolution {
        linear: s.linear.on_host().unwrap().into_owned(),
        squared_error: s.squared_error,
    });
    on_host.collect()
}

pub(in crate::gptq) fn to_vec(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.to_kind(Kind::Double).flatten(0, -1)).unwrap()
}

pub(in crate::gptq) fn variants() -> Vec<Variant> {
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

/// The device of the tests that need one.
pub(in crate::gptq) fn cuda() -> Device {
    device::resolve("cuda").unwrap_or_else(|error| panic!("{error}")).device
}
