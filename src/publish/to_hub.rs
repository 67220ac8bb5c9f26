//! Publishing on the Hub.

use hf_hub::repository::CommitOperation;

use super::{Branch, Content, LocalFile, Outcome, PublishOptions, message};
use crate::{
    error::{Error, HubError, Result, quoted},
    hub::{Commit, DEFAULT_REVISION, Hub, Listed, Reference},
    progress::{Event, Progress},
    units::bytes,
};

/// Publishes branches to the repository of `reference`, one commit each.
///
/// # Errors
/// If the Hub refuses, cannot be reached, or does not have afterwards what was sent.
pub fn to_hub(
    hub: &Hub,
    reference: &Reference,
    branches: &[Branch],
    options: &PublishOptions,
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
        None if options.dry_run => return branches.iter().map(|branch| changes(branch, &[])).collect(),
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
                return changes(branch, &[]);
            }
            if branch.name != DEFAULT_REVISION {
                hub.create_branch(&place)?;
            }
        }
        if options.dry_run {
            let changes = changes(branch, &hub.files(&place)?)?;
            return Ok(Outcome { commit: known.get(&branch.name).cloned(), ..changes });
        }
        send(hub, &place, branch, progress)
    };
    branches.iter().map(one).collect()
}

/// Sends what differs, repeatedly if the connection fails, and proves the publication.
fn send(hub: &Hub, place: &Reference, branch: &Branch, progress: &dyn Progress) -> Result<Outcome> {
    let mut failures = 0;
    let mut first: Option<Outcome> = None;
    loop {
        let head = head(hub, place)?;
        let changes = changes(branch, &hub.files(place)?)?;
        let outcome = first.get_or_insert_with(|| changes.clone());
        if changes.is_empty() {
            outcome.commit = Some(head);
            break;
        }
        let text = format!("sending {} files, {}, to {place}", outcome.sent.len(), bytes(outcome.bytes));
        progress.event(&Event::Note(&text));
        match hub.commit(place, &commit(branch, &changes), &head, progress) {
            Ok(()) => {
                prove(hub, place, branch)?;
                outcome.commit = Some(self::head(hub, place)?);
                break;
            }
            // The commit may have arrived all the same: the next round compares again.
            Err(Error::Hub(error)) if error.is_passing() && failures < hub.settings().retries => {
                failures += 1;
                progress.event(&Event::Warning(&format!("{error}; trying again")));
                std::thread::sleep(hub.settings().pause_after(failures));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(first.expect("set in the first round"))
}

/// The newest commit of a branch.
fn head(hub: &Hub, place: &Reference) -> Result<String> {
    let heads = hub.branches(place)?.unwrap_or_default();
    heads.get(place.revision()).cloned().ok_or_else(|| {
        let (repository, revision) = (place.repository().to_owned(), place.revision().to_owned());
        HubError::Revision { repository, revision, known: quoted(heads.keys()) }.into()
    })
}

/// Requires that the Hub has what was sent.
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

/// The changes that make the files that are `there` those of the branch.
fn changes(branch: &Branch, there: &[Listed]) -> Result<Outcome> {
    let mut outcome = Outcome::new(branch, there.iter().map(|there| &there.path));
    for file in &branch.files {
        let same = there.iter().find(|there| there.path == file.path).map(|there| file.is(there));
        outcome.count(file, same.transpose()?.unwrap_or(false));
    }
    Ok(outcome)
}

/// The commit with these changes.
fn commit(branch: &Branch, changes: &Outcome) -> Commit {
    let files = || branch.files.iter().filter(|file| changes.sent.contains(&file.path));
    let add = |file: &LocalFile| match &file.content {
        Content::File(path) => CommitOperation::add_file(&file.path, path),
        Content::Bytes(bytes) => CommitOperation::add_bytes(&file.path, bytes.clone()),
    };
    let delete = changes.deleted.iter().map(CommitOperation::delete);
    Commit {
        operations: files().map(add).chain(delete).collect(),
        bytes: changes.bytes,
        largest: files().max_by_key(|file| file.size).map(|file| (file.size, file.sha256.clone())),
        message: message(branch),
    }
}
