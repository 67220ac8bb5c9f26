//! Why a run that was begun cannot be gone on with.

use std::path::PathBuf;

use super::Error;

/// Why a run that was begun cannot be gone on with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// What it left is not whole.
    #[error("`{}` cannot be gone on with: {problem}", path.display())]
    Broken {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// It is another run.
    #[error(
        "`{}` holds a run that was begun otherwise ({layers} of {total} layers are finished); different: {differences}",
        path.display()
    )]
    Differs {
        /// The output folder.
        path: PathBuf,
        /// Layers finished.
        layers: usize,
        /// Of how many.
        total: usize,
        /// What differs, then and now.
        differences: String,
    },
    /// Another program works on it.
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
                "--restart throws what was begun away; if its journal lies elsewhere, name it with --journal-dir"
            }
            Self::Differs { .. } => {
                "repeat the settings of then to go on, choose another folder, or throw it away with --restart"
            }
            Self::Busy { .. } => "wait until it has ended, or choose another folder",
        }
    }
}

impl Error {
    /// What a run left at `path` is not whole.
    pub(crate) fn journal(path: impl Into<PathBuf>, problem: impl Into<String>) -> Self {
        JournalError::Broken { path: path.into(), problem: problem.into() }.into()
    }
}
