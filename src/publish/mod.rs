//! Publishing of a run's branches on the Hub or on a git remote.
//!
//! A published branch consists of the files in its folder and its card. Only files that differ from the remote's are sent, as
//! one commit per branch. Afterwards the remote's files are listed and compared: a difference is an error.

mod branch;
mod git;
mod to_git;
mod to_hub;

use serde::Serialize;

pub use branch::{Branch, Content, LocalFile, branches};
pub use to_git::to_git;
pub use to_hub::to_hub;

use crate::{
    card::SourceCard,
    error::{HubError, Result},
    report::{GENERATED_BY, Report},
};

/// Options of a publication.
#[derive(Debug, Clone, Default)]
pub struct PublishOptions {
    /// On the Hub: a new repository is private.
    pub private: bool,
    /// On a git remote: branches start anew, and the remote's history of them is thrown away.
    pub force: bool,
    /// List the files, and send nothing.
    pub dry_run: bool,
}

/// The changes to a branch of the remote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// The branch.
    pub branch: String,
    /// Its newest commit; `None` in a dry run if the branch would be new.
    pub commit: Option<String>,
    /// Files added or replaced.
    pub sent: Vec<String>,
    /// Their bytes.
    pub bytes: u64,
    /// Deleted weights that are not part of the branch any more.
    pub deleted: Vec<String>,
    /// Number of files that the remote already had.
    pub unchanged: usize,
}

impl Outcome {
    /// No changes to a branch but the deletion of `there`'s weights that it does not have.
    fn new<'a>(branch: &Branch, there: impl IntoIterator<Item = &'a String>) -> Self {
        Self {
            branch: branch.name.clone(),
            commit: None,
            sent: Vec::new(),
            bytes: 0,
            deleted: there.into_iter().filter(|path| branch.makes_stale(path)).cloned().collect(),
            unchanged: 0,
        }
    }

    /// Counts a file of the branch, which is sent unless the remote has the `same`.
    fn count(&mut self, file: &LocalFile, same: bool) {
        if same {
            self.unchanged += 1;
        } else {
            self.sent.push(file.path.clone());
            self.bytes += file.size;
        }
    }

    fn is_empty(&self) -> bool {
        self.sent.is_empty() && self.deleted.is_empty()
    }
}

/// The message of a branch's commit.
fn message(branch: &Branch) -> String {
    format!("{} of {GENERATED_BY}", branch.name)
}

/// Requires that `accepted` names the licence of a gated source. The licence also holds for quantized copies.
///
/// A source is gated if the Hub listed it as gated at the download. It is also gated if its card has a prompt or fields for users
/// of its files.
///
/// # Errors
/// If it was not accepted.
pub fn check_licence(report: &Report, source: &SourceCard, accepted: &[String]) -> Result<()> {
    let fetched = report.model.source.as_ref();
    let gated = fetched.and_then(|fetched| fetched.gated).unwrap_or(false) || source.is_gated();
    let model = fetched.map_or(&report.model.name, |fetched| &fetched.repository);
    let licence = source.licence().unwrap_or(model);
    if !gated || accepted.iter().any(|name| name.eq_ignore_ascii_case(licence)) {
        return Ok(());
    }
    Err(HubError::Licence { model: model.clone(), licence: licence.to_owned() }.into())
}
