//! Numbers that the method cannot deal with: what rounding to nearest can stand in for, when it is asked to.

/// Why a stage or a linear could not be solved, though nothing is wrong with its file.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum NumericalError {
    /// The damped Hessian could not be factorized.
    #[error(
        "the Hessian of {stage} is not positive definite, also with damping raised to {damp} of its mean diagonal"
    )]
    NotPositiveDefinite {
        /// Layer and stage.
        stage: String,
        /// The last damping tried.
        damp: f64,
    },
    /// A Hessian that calibration left empty.
    #[error("the Hessian of {stage} is all zero: its inputs carried nothing")]
    EmptyHessian {
        /// Layer and stage.
        stage: String,
    },
    /// A linear for which the solver found nothing that can be used.
    #[error("`{linear}` could not be solved: {problem}")]
    Unsolved {
        /// The linear.
        linear: String,
        /// What came out, with numbers.
        problem: String,
    },
}

impl NumericalError {
    /// What the user can do about it.
    pub(super) fn hint(&self) -> &'static str {
        match self {
            Self::EmptyHessian { .. } => {
                "look for a norm or a linear before it whose weights are all zero; --on-failure rtn rounds such linears \
                 to nearest"
            }
            Self::NotPositiveDefinite { .. } | Self::Unsolved { .. } => {
                "use more or more varied calibration text (--samples), or a larger --damp; --on-failure rtn rounds such \
                 linears to nearest"
            }
        }
    }
}
