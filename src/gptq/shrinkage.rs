//! Damping of a Hessian by shrinkage, from its spectrum and its number of tokens.

use tch::{Device, Kind, TchError};

use super::{Hessian, raw};
use crate::error::{Result, TorchContext};

/// Rows that are summed together in fp64.
const ROWS: i64 = 256;

impl Hessian {
    /// The damping of the oracle approximating shrinkage estimator (arXiv 0907.4698), as a fraction of the mean diagonal and at
    /// most 1. Of all `(1 − ρ) H + ρ μ I`, with `μ` the mean diagonal, the estimator chooses the one with the least expected
    /// distance to the Hessian of infinitely many tokens. Solvers ignore a Hessian's scale, so that this is
    /// `H + ρ / (1 − ρ) μ I`.
    ///
    /// The estimator assumes independent Gaussian tokens; tokens of a text are neither.
    ///
    /// # Errors
    /// When libtorch cannot compute it.
    pub fn shrinkage(&self) -> Result<f64> {
        let diagonal = self.diagonal()?;
        let alive = diagonal.iter().filter(|&&d| d != 0.0).count();
        let trace = diagonal.iter().map(|&d| f64::from(d)).sum();
        let squares = self.sum_of_squares().torch("measure a Hessian's spectrum")?;
        let rho = shrunk(alive as f64, self.tokens() as f64, trace, squares);
        // More than half would be more than all of the mean diagonal.
        Ok(if rho < 0.5 { rho / (1.0 - rho) } else { 1.0 })
    }

    /// `‖H‖²`, in fp64: the squares alone may not fit fp32.
    fn sum_of_squares(&self) -> Result<f64, TchError> {
        if self.matrix().device() == Device::Cpu {
            return Ok(raw::sum_of_squares(self.matrix()));
        }
        let k = self.in_features() as i64;
        let parts = (0..k).step_by(ROWS as usize).map(|first| {
            let rows = self.matrix().f_narrow(0, first, ROWS.min(k - first))?;
            let rows = rows.f_to_kind(Kind::Double)?.f_reshape([-1])?;
            f64::try_from(rows.f_dot(&rows)?)
        });
        parts.sum()
    }
}

/// `ρ` of `features` that are not dead, from `tr H` and `tr H²`: the limit of the paper's iteration.
fn shrunk(features: f64, tokens: f64, trace: f64, squares: f64) -> f64 {
    // Zero for an even spectrum.
    let spread = squares - trace * trace / features;
    let few = 1.0 - 2.0 / features;
    let rho = (few * squares + trace * trace) / ((tokens + few) * spread);
    // Shrinkage does not change an even spectrum.
    if spread > 0.0 { rho.min(1.0) } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use std::f64::consts::TAU;

    use rand_chacha::{
        ChaCha8Rng,
        rand_core::{RngCore, SeedableRng},
    };
    use tch::Tensor;

    use super::*;
    use crate::gptq::solver::tests::problem::{Problem, to_vec};

    fn features() -> i64 {
        // More than are summed together.
        ROWS + 44
    }

    /// Normal numbers (Box-Muller): libtorch's own are every thread's, and Hessians here must be of the same distribution.
    fn normal(draws: &mut ChaCha8Rng, rows: i64, columns: i64) -> Tensor {
        let mut uniform = || (draws.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut draw = || ((-2.0 * (1.0 - uniform()).ln()).sqrt() * (TAU * uniform()).cos()) as f32;
        let values: Vec<f32> = (0..rows * columns).map(|_| draw()).collect();
        Tensor::from_slice(&values).reshape([rows, columns])
    }

    /// Correlated inputs of different size, and two dead features.
    fn hessian(tokens: i64) -> Hessian {
        let mut draws = ChaCha8Rng::seed_from_u64(8);
        let k = features();
        let mix = normal(&mut draws, k, k) * 0.05 + Tensor::eye(k, (Kind::Float, Device::Cpu));
        let sizes = (normal(&mut draws, 1, k) * 0.7).exp();
        let _ = sizes.narrow(1, 100, 2).zero_();
        let inputs = normal(&mut draws, tokens, k).matmul(&mix) * sizes;
        Problem::with_inputs(1, k as usize, &inputs).hessian
    }

    /// `tr H`, `tr H²` and live features, plainly.
    fn sums(hessian: &Hessian) -> (f64, f64, f64) {
        let (k, h) = (hessian.in_features(), to_vec(hessian.matrix()));
        let diagonal = (0..k).map(|i| h[i * k + i]);
        let alive = diagonal.clone().filter(|&d| d != 0.0).count();
        (diagonal.sum(), h.iter().map(|v| v * v).sum(), alive as f64)
    }

    #[test]
    fn damping_is_what_the_papers_iteration_converges_to() {
        for tokens in [150, 600, 5000] {
            let hessian = hessian(tokens);
            let (trace, squares, p) = sums(&hessian);
            assert_eq!(p as i64, features() - 2);
            let n = tokens as f64;
            // The oracle's coefficient for the estimate before, over and over.
            let mut rho = 0.5;
            for _ in 0..10_000 {
                let product = (1.0 - rho) * squares + rho * trace * trace / p;
                rho = ((1.0 - 2.0 / p) * product + trace * trace)
                    / ((n + 1.0 - 2.0 / p) * product + (1.0 - n / p) * trace * trace);
            }
            let (found, expected) = (hessian.shrinkage().unwrap(), (rho / (1.0 - rho)).min(1.0));
            assert!((found / expected - 1.0).abs() < 1e-4, "{tokens}: {found} {expected}");
        }
    }

    #[test]
    fn it_brings_a_hessian_nearer_to_that_of_many_tokens() {
        let exact = hessian(40_000);
        let off = |hessian: &Hessian, damp: f64| {
            let mean = sums(hessian).0 / sums(hessian).2;
            let damped = (hessian.matrix()
                + Tensor::eye(features(), (Kind::Float, Device::Cpu)) * (damp * mean))
                / (1.0 + damp);
            f64::try_from((damped - exact.matrix()).square().sum(Kind::Double)).unwrap()
        };
        for tokens in [150, 600] {
            let few = hessian(tokens);
            let damp = few.shrinkage().unwrap();
            let [none, less, asked, more] = [0.0, damp / 2.0, damp, damp * 2.0].map(|d| off(&few, d));
            assert!(asked < none && asked < less && asked < more, "{none} {less} {asked} {more}");
        }
    }

    #[test]
    fn few_tokens_ask_for_more_than_many() {
        let damps = [20, 150, 600, 5000, 40_000].map(|tokens| hessian(tokens).shrinkage().unwrap());
        assert!(damps.windows(2).all(|pair| pair[0] > pair[1]), "{damps:?}");
        assert!(damps[0] <= 1.0 && damps[4] < 0.01, "{damps:?}");
    }

    #[test]
    fn an_even_spectrum_and_one_feature_are_no_trouble() {
        assert_eq!(shrunk(4.0, 100.0, 8.0, 16.0), 1.0);
        let mut one = Hessian::new(1, Device::Cpu).unwrap();
        one.add(&Tensor::ones([3, 1], (Kind::Float, Device::Cpu))).unwrap();
        assert_eq!(one.finish("test").unwrap().shrinkage().unwrap(), 1.0);
    }
}
