//! What a machine has too little of for the work that is asked for.

use std::path::PathBuf;

/// What a machine has too little of.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResourceError {
    /// The disk has too little room for the result.
    #[error("`{}` has {available} free, and the result needs {needed}", path.display())]
    DiskSpace {
        /// A folder on that disk.
        path: PathBuf,
        /// Free, readable.
        available: String,
        /// Needed, readable.
        needed: String,
    },
    /// The work does not fit the memory allowed for it.
    #[error("{memory}: {available} are available, and at least {needed} are needed")]
    Memory {
        /// Whose memory.
        memory: String,
        /// Allowed, readable.
        available: String,
        /// Needed, readable, and by what.
        needed: String,
        /// The flag with which it would fit.
        flag: Option<String>,
    },
}

impl ResourceError {
    /// What the user can do about it.
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
