//! Errors of libtorch, in our words.

use super::{Error, Result};

/// Adds what was tried to a libtorch error.
pub trait TorchContext<T> {
    /// `action` completes the sentence "libtorch could not …".
    fn torch(self, action: &str) -> Result<T>;
}

impl<T> TorchContext<T> for std::result::Result<T, tch::TchError> {
    fn torch(self, action: &str) -> Result<T> {
        self.map_err(|source| Error::Torch { action: action.to_owned(), source })
    }
}

/// libtorch appends a C++ stack with paths of the machine it was built on.
pub(super) fn without_backtrace(error: &tch::TchError) -> String {
    let text = error.to_string();
    text.split("\nException raised from").next().unwrap_or_default().trim_end().to_owned()
}
