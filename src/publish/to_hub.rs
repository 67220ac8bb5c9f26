//! To the Hub, through its interface.

use hf_hub::repository::CommitOperation;

use super::{Branch, Content, Outcome};
use crate::{
    error::{Error, HubError, Result, quoted},
    hub::{Commit, DEFAULT_REVISION, Hub, Listed, Reference},
    progress::{Event, Progress},
    units::bytes,
};

/// How to publish to the Hub.
#[derive(Debug, Clone, Default)]
pub struct HubOptions {
    /// A repository that is made is private.
    pub private: bool,
    /// Nothing is written.
    pub dry_run: bool,
}

/// Publishes branches to the repository of `reference`, one commit each.
///
/// # Errors
/// When the Hub refuses, the way to it fails for good, or it does not have afterwards what was sent.
pub fn to_hub(
    hub: &Hub,
    reference: &Reference,
    branches: &[Branch],
    options: &HubOptions,
    progress: &dyn Progress,
) -> Result<Vec<Outcome>> {
    let settings = hub.settings();
    if settings.token.is_none() && !options.dry_run {
        let action = format!("publish to {reference}");
        let message = "that needs a token with the right to write".into();
        return Err(HubError::Unauthorized { action, message, token: false }.into());
    }
    let known = match hub.branches(reference)? {
        Some(known) => known,
        None if options.dry_run => return Ok(branches.iter().map(all_new).collect()),
        None => {
            hub.create_repository(reference, options.private)?;
            progress.event(&Event::Note(&format!("made {}/{reference}", settings.endpoint)));
            hub.branches(reference)?.unwrap_or_default()
        }
    };
    let one = |branch: &Branch| {
        let place = Reference::new(reference.repository(), Some(&branch.name))?;
        if !known.contains_key(&branch.name) {
            if options.dry_run {
                return Ok(all_new(branch));
            }
            if branch.name != DEFAULT_REVISION {
                hub.create_branch(&place)?;
            }
        }
        if options.dry_run {
            let changes = Changes::between(branch, &hub.files(&place)?)?;
            return Ok(changes.outcome(branch, known.get(&branch.name).cloned()));
        }
        send(hub, &place, branch, progress)
    };
    branches.iter().map(one).collect()
}

/// Brings a branch to what it should be, again where the way fails, and proves it.
fn send(hub: &Hub, place: &Reference, branch: &Branch, progress: &dyn Progress) -> Result<Outcome> {
    let mut failures = 0;
    let mut first: Option<Outcome> = None;
    loop {
        let head = head(hub, place)?;
        let changes = Changes::between(branch, &hub.files(place)?)?;
        let outcome = first.get_or_insert_with(|| changes.outcome(branch, None));
        if changes.is_empty() {
            outcome.commit = Some(head);
            break;
        }
        let commit = changes.commit(branch);
        let text = format!("sending {} files, {}, to {place}", outcome.sent.len(), bytes(outcome.bytes));
        progress.event(&Event::Note(&text));
        match hub.commit(place, &commit, &head, progress) {
            Ok(()) => {
                prove(hub, place, branch)?;
                outcome.commit = Some(self::head(hub, place)?);
                break;
            }
            // It may have arrived all the same: what is missing is asked for again.
            Err(Error::Hub(error)) if error.is_passing() && failures < hub.settings().retries => {
                failures += 1;
                progress.event(&Event::Warning(&format!("{error}; going on")));
                std::thread::sleep(hub.settings().pause_after(failures));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(first.expect("set in the first round"))
}

/// The commit that a branch is at.
fn head(hub: &Hub, place: &Reference) -> Result<String> {
    let heads = hub.branches(place)?.unwrap_or_default();
    heads.get(place.revision()).cloned().ok_or_else(|| {
        let (repository, revision) = (place.repository().to_owned(), place.revision().to_owned());
        HubError::Revision { repository, revision, known: quoted(heads.keys()) }.into()
    })
}

/// Asks the Hub what it has, and requires that it is what was sent.
fn prove(hub: &Hub, place: &Reference, branch: &Branch) -> Result<()> {
    let listed = hub.files(place)?;
    let wrong = |file: &str, expected: String, found: String| {
        let (branch, place) = (branch.name.clone(), hub.settings().endpoint.clone());
        Err(HubError::NotProven { branch, place, file: file.to_owned(), expected, found }.into())
    };
    for file in &branch.files {
        let Some(there) = listed.iter().find(|there| there.path == file.path) else {
            return wrong(&file.path, format!("{} bytes", file.size), "missing".into());
        };
        if !file.is(there)? {
            let describe = |size: u64, id: &str| format!("{size} bytes, {id}");
            let expected = describe(file.size, &file.id_like(&there.id)?.describe());
            return wrong(&file.path, expected, describe(there.size, &there.id.describe()));
        }
    }
    match listed.iter().find(|there| branch.makes_stale(&there.path)) {
        Some(stale) => wrong(&stale.path, "deleted".into(), format!("{} bytes", stale.size)),
        None => Ok(()),
    }
}

/// What is to be done to a branch.
struct Changes {
    /// Positions of the branch's files that are sent.
    send: Vec<usize>,
    delete: Vec<String>,
}

impl Changes {
    fn between(branch: &Branch, there: &[Listed]) -> Result<Self> {
        let mut send = Vec::new();
        for (at, file) in branch.files.iter().enumerate() {
            let same = match there.iter().find(|there| there.path == file.path) {
                Some(there) => file.is(there)?,
                None => false,
            };
            if !same {
                send.push(at);
            }
        }
        let stale = there.iter().filter(|there| branch.makes_stale(&there.path));
        Ok(Self { send, delete: stale.map(|there| there.path.clone()).collect() })
    }

    fn is_empty(&self) -> bool {
        self.send.is_empty() && self.delete.is_empty()
    }

    fn outcome(&self, branch: &Branch, commit: Option<String>) -> Outcome {
        let sent: Vec<_> = self.send.iter().map(|&at| &branch.files[at]).collect();
        Outcome {
            branch: branch.name.clone(),
            commit,
            bytes: sent.iter().map(|file| file.size).sum(),
            sent: sent.iter().map(|file| file.path.clone()).collect(),
            deleted: self.delete.clone(),
            unchanged: branch.files.len() - self.send.len(),
        }
    }

    fn commit(&self, branch: &Branch) -> Commit {
        let mut commit = Commit { message: message(branch), ..Commit::default() };
        for file in self.send.iter().map(|&at| &branch.files[at]) {
            commit.bytes += file.size;
            if commit.largest.as_ref().is_none_or(|(size, _)| *size < file.size) {
                commit.largest = Some((file.size, file.sha256.clone()));
            }
            commit.operations.push(match &file.content {
                Content::File(path) => CommitOperation::add_file(&file.path, path),
                Content::Bytes(bytes) => CommitOperation::add_bytes(&file.path, bytes.clone()),
            });
        }
        commit.operations.extend(self.delete.iter().map(CommitOperation::delete));
        commit
    }
}

/// The message of a branch's commit.
pub(super) fn message(branch: &Branch) -> String {
    format!("{} of {}", branch.name, crate::report::GENERATED_BY)
}

/// A branch of which nothing is there.
fn all_new(branch: &Branch) -> Outcome {
    Changes { send: (0..branch.files.len()).collect(), delete: Vec::new() }.outcome(branch, None)
}
