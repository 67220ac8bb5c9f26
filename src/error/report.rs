//! Why figures cannot be reported.

use std::path::PathBuf;

/// Why figures cannot be reported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// They were measured before the weights were changed.
    #[error("`{}` has figures of other weights than those beside it", path.display())]
    Stale {
        /// The figures' file.
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
        }
    }
}
