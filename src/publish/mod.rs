//! The branches of a run on the Hub or on a git remote.
//!
//! A branch is what lies in its folder, and its card. Only what differs from the other side is sent, as one commit a
//! branch, and afterwards the other side is asked what it has: a publication that cannot be proven is an error.

mod branch;
mod git;
mod licence;
mod to_git;
mod to_hub;

use serde::Serialize;

pub use branch::{Branch, Content, LocalFile, branches};
pub use licence::check_licence;
pub use to_git::{GitOptions, to_git};
pub use to_hub::{HubOptions, to_hub};

/// What became of a branch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// The branch.
    pub branch: String,
    /// The commit it is at now; none in a dry run, or when the branch would be new.
    pub commit: Option<String>,
    /// Files added or replaced.
    pub sent: Vec<String>,
    /// Their bytes.
    pub bytes: u64,
    /// Weights of before that are not part of the branch any more.
    pub deleted: Vec<String>,
    /// Files that were there already.
    pub unchanged: usize,
}
