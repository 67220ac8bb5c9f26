//! Errors of a run on several machines.

/// Something between the ranks of a run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// A launcher of MPI has started a program that was built without it.
    #[error("MPI has started this program as one of several ranks, but the program was built without MPI")]
    WithoutMpi,
    /// MPI cannot be used.
    #[error("MPI cannot be used: {problem}")]
    Start {
        /// Why.
        problem: String,
    },
    /// A rank has not been heard of for too long.
    #[error("{name} has sent nothing for {seconds} s: the rank, its machine or the network has failed")]
    Silent {
        /// The rank, with its machine.
        name: String,
        /// Since when.
        seconds: u64,
    },
    /// A rank has another program, model or text than the root.
    #[error("{name} differs from rank 0: {differences}")]
    Differs {
        /// The rank, with its machine.
        name: String,
        /// What differs, with both values.
        differences: String,
    },
    /// A rank does not see the folder of the journal.
    #[error("{name} does not see the folder `{folder}` of rank 0")]
    NotShared {
        /// The rank, with its machine.
        name: String,
        /// The journal's folder.
        folder: String,
    },
}

impl ClusterError {
    pub(super) fn hint(&self) -> &'static str {
        match self {
            Self::WithoutMpi => {
                "build it with MPI (cargo build --release --features mpi), or start it without mpirun and srun"
            }
            Self::Start { .. } => "does `mpirun -n 2 hostname` work?",
            Self::Silent { .. } => "the same command resumes the run, also with another number of ranks",
            Self::Differs { .. } => {
                "all ranks need the same program, model and texts, and the same number of threads (OMP_NUM_THREADS)"
            }
            Self::NotShared { .. } => {
                "put the output folder, or --journal-dir, on a file system that all machines share"
            }
        }
    }
}
