//! A solver that rounds to nearest where another one fails, and says so.

use tch::Tensor;

use super::{Factor, Factorization, Factorized, RtnSolver, Solution, Solver, Weight};
use crate::{
    error::{Error, Result},
    gptq::Hessian,
    variant::{Sorting, Variant},
};

/// Another solver, and [`RtnSolver`] for what that cannot solve because of the numbers in it: a stage whose Hessian cannot
/// be factorized, a linear whose solution is of no use. Every [`Solution`] says whether it was rounded, and why. It keeps a
/// Hessian until all linears are solved that share it.
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
    /// Or why there is no factor.
    solving: Result<Factor, String>,
    rounding: Factor,
}

impl Factorized for FactorOrRounded {
    fn facts(&self) -> &Factorization {
        self.solving.as_ref().map_or_else(|_| self.rounding.facts(), |factor| factor.facts())
    }

    fn solve(&self, weights: &[Weight<'_>], variant: &Variant) -> Result<Vec<Solution>> {
        let factor = match &self.solving {
            Ok(factor) => factor,
            Err(reason) => return self.round(weights, variant, reason),
        };
        match factor.solve(weights, variant) {
            // One of them fails: the others need not be rounded for that.
            Err(Error::Numerical(_)) if weights.len() > 1 => {
                let alone = weights.iter().map(|weight| self.solve(&[*weight], variant));
                Ok(alone.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
            }
            Err(Error::Numerical(problem)) => self.round(weights, variant, &problem.to_string()),
            other => other,
        }
    }

    fn divide(&self, b: &Tensor) -> Result<Option<Tensor>> {
        self.solving.as_ref().unwrap_or(&self.rounding).divide(b)
    }

    fn rounds_failures(&self) -> bool {
        true
    }
}

impl FactorOrRounded {
    fn round(&self, weights: &[Weight<'_>], variant: &Variant, reason: &str) -> Result<Vec<Solution>> {
        let mut solutions = self.rounding.solve(weights, variant)?;
        solutions.iter_mut().for_each(|solution| solution.fallback = Some(reason.to_owned()));
        Ok(solutions)
    }
}
