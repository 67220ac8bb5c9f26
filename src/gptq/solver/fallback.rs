//! A solver that rounds to nearest if another solver fails.

use tch::{Kind, Tensor};

use super::{Factor, Factorization, Factorized, RtnSolver, Solution, Solver, Weight};
use crate::{
    error::{Error, Result},
    ggml::BlockType,
    gptq::Hessian,
    variant::{Sorting, Variant},
};

/// Another solver, with [`RtnSolver`] as fallback for numerical errors: a Hessian that cannot be factorized, or a linear
/// without a usable solution. [`Solution::fallback`] has the reason. The Hessian is kept until all linears that share it are
/// solved.
pub struct OrRounded<S>(pub S);

impl<S: Solver> Solver for OrRounded<S> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn factorize(&self, hessian: &Hessian, sorting: Sorting, damp: f64, stage: &str) -> Result<Factor> {
        let rounding = RtnSolver.factorize(hessian, sorting, damp, stage)?;
        let solving = match self.0.factorize(hessian, sorting, damp, stage) {
            Err(Error::Numerical(problem)) => Err(problem.to_string()),
            other => Ok(other?),
        };
        Ok(Box::new(FactorOrRounded { solving, rounding }))
    }
}

struct FactorOrRounded {
    /// The factor, or why there is none.
    solving: Result<Factor, String>,
    rounding: Factor,
}

impl Factorized for FactorOrRounded {
    fn facts(&self) -> &Factorization {
        self.solving.as_ref().map_or_else(|_| self.rounding.facts(), |factor| factor.facts())
    }

    fn solve(&self, weights: &[Weight<'_>], variant: &Variant) -> Result<Vec<Solution>> {
        self.solve_or_round(weights, &|factor, weights| factor.solve(weights, variant))
    }

    fn solve_blocks(&self, weights: &[Weight<'_>], kind: BlockType) -> Result<Vec<Solution>> {
        self.solve_or_round(weights, &|factor, weights| factor.solve_blocks(weights, kind))
    }

    fn divide(&self, b: &Tensor, products: Kind) -> Result<Option<Tensor>> {
        self.solving.as_ref().unwrap_or(&self.rounding).divide(b, products)
    }

    fn rounds_failures(&self) -> bool {
        true
    }
}

/// Quantizes weights with a factor.
type Solve<'a> = &'a dyn Fn(&dyn Factorized, &[Weight<'_>]) -> Result<Vec<Solution>>;

impl FactorOrRounded {
    fn solve_or_round(&self, weights: &[Weight<'_>], solve: Solve<'_>) -> Result<Vec<Solution>> {
        let factor = match &self.solving {
            Ok(factor) => factor,
            Err(reason) => return self.round(weights, solve, reason),
        };
        match solve(&**factor, weights) {
            // One of them fails: solve each alone, so that only that one is rounded.
            Err(Error::Numerical(_)) if weights.len() > 1 => {
                let alone = weights.iter().map(|weight| self.solve_or_round(&[*weight], solve));
                Ok(alone.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
            }
            Err(Error::Numerical(problem)) => self.round(weights, solve, &problem.to_string()),
            other => other,
        }
    }

    fn round(&self, weights: &[Weight<'_>], solve: Solve<'_>, reason: &str) -> Result<Vec<Solution>> {
        let mut solutions = solve(&*self.rounding, weights)?;
        solutions.iter_mut().for_each(|solution| solution.fallback = Some(reason.to_owned()));
        Ok(solutions)
    }
}
