//! Errors of a run: its numbers, its journal, the machine's resources, and its figures.

use std::path::PathBuf;

use super::Error;

/// A stage or a linear that cannot be solved numerically; `--on-failure rtn` rounds such linears to nearest.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum NumericalError {
    /// The damped Hessian could not be factorized.
    #[error(
        "the Hessian of {stage} is not positive definite, even with damping raised to {damp} of its mean diagonal"
    )]
    NotPositiveDefinite {
        /// Layer and stage.
        stage: String,
        /// The last damping tried.
        damp: f64,
    },
    /// The Hessian is zero after calibration.
    #[error("the Hessian of {stage} is zero: all its inputs were zero")]
    EmptyHessian {
        /// Layer and stage.
        stage: String,
    },
    /// The solver's result cannot be used.
    #[error("`{linear}` could not be solved: {problem}")]
    Unsolved {
        /// The linear.
        linear: String,
        /// The problem of the result, with numbers.
        problem: String,
    },
}

impl NumericalError {
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

/// A begun run that cannot be resumed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// Its journal or its files are damaged or missing.
    #[error("`{}` cannot be resumed: {problem}", path.display())]
    Broken {
        /// The file or folder.
        path: PathBuf,
        /// The problem.
        problem: String,
    },
    /// Its settings differ.
    #[error(
        "`{}` holds a run with other settings ({layers} of {total} layers are finished); different: {differences}",
        path.display()
    )]
    Differs {
        /// The output folder.
        path: PathBuf,
        /// Layers finished.
        layers: usize,
        /// Of how many.
        total: usize,
        /// The settings that differ, with the old and the new value.
        differences: String,
    },
    /// Another process is writing to it.
    #[error("another run is writing to `{}`", path.display())]
    Busy {
        /// The output folder.
        path: PathBuf,
    },
}

impl JournalError {
    pub(super) fn hint(&self) -> &'static str {
        match self {
            Self::Broken { .. } => {
                "--restart discards the unfinished run; if its journal is in another folder, name that with --journal-dir"
            }
            Self::Differs { .. } => {
                "repeat its settings to resume it, choose another folder, or discard it with --restart"
            }
            Self::Busy { .. } => "wait until it has ended, or choose another folder",
        }
    }
}

impl Error {
    /// A [`JournalError::Broken`] of `path`.
    pub(crate) fn journal(path: impl Into<PathBuf>, problem: impl Into<String>) -> Self {
        JournalError::Broken { path: path.into(), problem: problem.into() }.into()
    }
}

/// The machine has too little disk space or memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResourceError {
    /// The disk has too little room for the result.
    #[error("`{}` has {available} free, and the result needs {needed}", path.display())]
    DiskSpace {
        /// A folder on that disk.
        path: PathBuf,
        /// Free space, as text with its unit.
        available: String,
        /// Needed space, as text with its unit.
        needed: String,
    },
    /// The work does not fit the memory allowed for it.
    #[error("too little {memory}: available {available}, needed at least {needed}")]
    Memory {
        /// The kind of memory and its place.
        memory: String,
        /// Allowed memory, as text with its unit.
        available: String,
        /// Needed memory, as text with its unit, and what needs it.
        needed: String,
        /// The flag with which it would fit.
        flag: Option<String>,
    },
}

impl ResourceError {
    pub(super) fn hint(&self) -> String {
        match self {
            Self::DiskSpace { .. } => "free some space or choose a folder on another disk".into(),
            Self::Memory { flag: Some(flag), .. } => {
                format!(
                    "it fits with {flag}: activations that do not fit are kept on disk, in the journal's folder"
                )
            }
            Self::Memory { memory, .. } if memory.starts_with("device") => {
                "use fewer --variant, a shorter --seq-len, or a device with more memory".into()
            }
            Self::Memory { .. } => {
                "allow more with --max-memory, or use fewer --variant or a shorter --seq-len".into()
            }
        }
    }
}

/// Figures that cannot be reported or compared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// They were measured with other weights.
    #[error("`{}` was measured with other weights than those beside it", path.display())]
    Stale {
        /// The figures' file.
        path: PathBuf,
    },
    /// The baseline does not exist.
    #[error("the baseline `{}` does not exist", path.display())]
    NoBaseline {
        /// The file.
        path: PathBuf,
    },
}

impl ReportError {
    pub(super) fn hint(&self) -> String {
        match self {
            Self::Stale { path } => {
                let folder = path.parent().unwrap_or(path).display();
                format!("measure again: gptq eval --model MODEL --quantized {folder}")
            }
            Self::NoBaseline { .. } => {
                "write it from a good run: gptq gate RUN --baseline FILE --update".into()
            }
        }
    }
}
