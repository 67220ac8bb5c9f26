//! To a git remote, large files through git-lfs.
//!
//! Commits are put together from blobs alone: no branch is checked out, and large files are linked, not copied.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    path::{Path, absolute},
};

use super::{Branch, Content, LocalFile, Outcome, git::Git, to_hub::message};
use crate::{
    error::{Error, HubError, Result},
    hub::Settings,
    progress::{Event, Progress},
    units::bytes,
};

/// Files from this size on are large, whatever they are called.
const LARGE: u64 = 10_000_000;

/// The file that says which files git-lfs keeps.
const ATTRIBUTES: &str = ".gitattributes";

/// How to publish to a git remote.
#[derive(Debug, Clone, Default)]
pub struct GitOptions {
    /// Branches begin anew, without the remote's history, which is thrown away.
    pub force: bool,
    /// Nothing is sent.
    pub dry_run: bool,
}

/// Publishes branches to a git remote: an address, or the path of a repository.
///
/// # Errors
/// When git refuses, or the remote does not have afterwards what was sent.
pub fn to_git(
    remote: &str,
    run: &Path,
    branches: &[Branch],
    options: &GitOptions,
    settings: &Settings,
    progress: &dyn Progress,
) -> Result<Vec<Outcome>> {
    if remote
        .split_once("://")
        .is_some_and(|(scheme, rest)| scheme.starts_with("http") && user_of(rest).is_some())
    {
        // git hands addresses on to other programs, where everybody on this machine sees them.
        return Err(Error::Value {
            what: "--to git:".into(),
            expected: "an address without name or password in it (use a credential helper, or HF_TOKEN)"
                .into(),
            found: "one with".into(),
        });
    }
    let remote = match Path::new(remote) {
        path if path.is_dir() => absolute(path).map_err(Error::io("find", path))?.display().to_string(),
        _ => remote.to_owned(),
    };
    let git = Git::new(run, &remote, &settings.endpoint, settings.token.clone())?;
    let heads = heads(&git)?;
    let one = |branch: &Branch| publish(&git, &remote, branch, heads.get(&branch.name), options, progress);
    branches.iter().map(one).collect()
}

/// What stands before the `@` of an address's host.
fn user_of(rest: &str) -> Option<&str> {
    rest.split('/').next()?.split_once('@').map(|(user, _)| user)
}

/// The commits that the remote's branches are at.
fn heads(git: &Git) -> Result<BTreeMap<String, String>> {
    let lines = git.run("read the remote's branches", &["ls-remote", "--heads", "origin"])?;
    let head = |line: &str| {
        let (commit, name) = line.split_once('\t')?;
        Some((name.strip_prefix("refs/heads/")?.to_owned(), commit.to_owned()))
    };
    Ok(lines.lines().filter_map(head).collect())
}

fn publish(
    git: &Git,
    remote: &str,
    branch: &Branch,
    head: Option<&String>,
    options: &GitOptions,
    progress: &dyn Progress,
) -> Result<Outcome> {
    git.run("empty its index", &["read-tree", "--empty"])?;
    let mut parent = None;
    if head.is_some() && !options.force {
        // The newest commit alone: what was there before it is not needed to go on from it.
        let branch = format!("refs/heads/{}", branch.name);
        git.run("fetch the branch", &["fetch", "--quiet", "--depth", "1", "origin", &branch])?;
        let newest = git.run("read the branch", &["rev-parse", "FETCH_HEAD"])?;
        git.run("read the branch", &["read-tree", &newest])?;
        parent = Some(newest);
    }
    let before = index(git)?;
    let large: Vec<&LocalFile> = branch.files.iter().filter(|file| is_large(file)).collect();
    let mut outcome = Outcome {
        branch: branch.name.clone(),
        commit: parent.clone(),
        sent: Vec::new(),
        bytes: 0,
        deleted: before.keys().filter(|path| branch.makes_stale(path)).cloned().collect(),
        unchanged: 0,
    };
    for path in &outcome.deleted {
        git.run("delete a file", &["update-index", "--force-remove", path])?;
    }
    for file in &branch.files {
        let blob = if is_large(file) { pointer(git, file)? } else { blob(git, file)? };
        if before.get(&file.path) == Some(&blob) {
            outcome.unchanged += 1;
            continue;
        }
        outcome.sent.push(file.path.clone());
        outcome.bytes += file.size;
        add(git, &file.path, &blob)?;
    }
    let attributes = attributes(git, before.get(ATTRIBUTES), &large)?;
    if before.get(ATTRIBUTES) != Some(&attributes) {
        add(git, ATTRIBUTES, &attributes)?;
    } else if outcome.sent.is_empty() && outcome.deleted.is_empty() {
        return Ok(outcome);
    }
    if options.dry_run {
        return Ok(outcome);
    }
    let commit = commit(git, branch, parent.as_ref())?;
    let text = format!(
        "sending {} files, {}, to {remote} {}",
        outcome.sent.len(),
        bytes(outcome.bytes),
        branch.name
    );
    progress.event(&Event::Note(&text));
    push(git, branch, &commit, head, options.force)?;
    prove(git, remote, branch, &commit)?;
    outcome.commit = Some(commit);
    Ok(outcome)
}

fn is_large(file: &LocalFile) -> bool {
    file.path.ends_with(".safetensors") || file.size >= LARGE
}

/// The blobs of the index by path.
fn index(git: &Git) -> Result<BTreeMap<String, String>> {
    let lines = git.run("list the branch's files", &["-c", "core.quotePath=false", "ls-files", "--stage"])?;
    let entry = |line: &str| {
        let (stage, path) = line.split_once('\t')?;
        Some((path.to_owned(), stage.split(' ').nth(1)?.to_owned()))
    };
    Ok(lines.lines().filter_map(entry).collect())
}

fn add(git: &Git, path: &str, blob: &str) -> Result<()> {
    let entry = format!("100644,{blob},{path}");
    git.run("add a file", &["update-index", "--add", "--cacheinfo", &entry]).map(|_| ())
}

/// Puts a small file's content into the repository.
fn blob(git: &Git, file: &LocalFile) -> Result<String> {
    let bytes = match &file.content {
        Content::Bytes(bytes) => bytes.clone(),
        Content::File(path) => fs::read(path).map_err(Error::io("read", path))?,
    };
    git.store("take a file in", &bytes)
}

/// Lets git-lfs find a large file's content, and puts a pointer to it into the repository.
fn pointer(git: &Git, file: &LocalFile) -> Result<String> {
    let sha256 = &file.sha256;
    let object = git.path(&format!(".git/lfs/objects/{}/{}/{sha256}", &sha256[..2], &sha256[2..4]));
    if let Some(parent) = object.parent() {
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    }
    if !object.exists() {
        match &file.content {
            Content::Bytes(bytes) => fs::write(&object, bytes).map_err(Error::io("write", &object))?,
            Content::File(path) => {
                let path = absolute(path).map_err(Error::io("find", path))?;
                fs::hard_link(&path, &object)
                    .or_else(|_| symlink(&path, &object))
                    .map_err(Error::io("link", &object))?;
            }
        }
    }
    let text =
        format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {}\n", file.size);
    git.store("take a file in", text.as_bytes())
}

/// The blob of the attributes: what is there, and that the large files are git-lfs's.
fn attributes(git: &Git, before: Option<&String>, large: &[&LocalFile]) -> Result<String> {
    let mut text = match before {
        Some(blob) => git.run("read its attributes", &["cat-file", "blob", blob])?,
        None => String::new(),
    };
    let others = large.iter().filter(|file| !file.path.ends_with(".safetensors"));
    let patterns = ["*.safetensors".to_owned()].into_iter().chain(others.map(|file| file.path.clone()));
    for pattern in patterns {
        if !text.lines().any(|line| line.starts_with(&format!("{pattern} ")) && line.contains("filter=lfs")) {
            if !text.is_empty() && !text.ends_with('\n') {
                text.push('\n');
            }
            text += &format!("{pattern} filter=lfs diff=lfs merge=lfs -text\n");
        }
    }
    let text = format!("{}\n", text.trim_end());
    git.store("write its attributes", text.as_bytes())
}

fn commit(git: &Git, branch: &Branch, parent: Option<&String>) -> Result<String> {
    let tree = git.run("write the tree", &["write-tree"])?;
    let known = |key: &str| git.run("read its settings", &["config", key]).is_ok();
    let mut arguments = Vec::new();
    for (key, value) in [("user.name", "gptq"), ("user.email", "gptq@localhost")] {
        if !known(key) {
            arguments.extend(["-c".to_owned(), format!("{key}={value}")]);
        }
    }
    arguments.extend(["commit-tree".to_owned(), tree, "-m".to_owned(), message(branch)]);
    if let Some(parent) = parent {
        arguments.extend(["-p".to_owned(), parent.clone()]);
    }
    git.run("commit", &arguments)
}

fn push(git: &Git, branch: &Branch, commit: &str, head: Option<&String>, force: bool) -> Result<()> {
    let to = format!("refs/heads/{}", branch.name);
    // First the contents: a branch must not name what is not there.
    let large = branch.files.iter().filter(|file| is_large(file)).map(|file| file.sha256.clone());
    let mut arguments = ["lfs", "push", "--object-id", "origin"].map(str::to_owned).to_vec();
    arguments.extend(large);
    git.run("send large files", &arguments)?;
    let mut arguments = vec!["push".to_owned(), "--quiet".to_owned(), "--no-verify".to_owned()];
    if force {
        // Only what was seen is thrown away.
        arguments.push(format!("--force-with-lease={to}:{}", head.map_or("", String::as_str)));
    }
    arguments.extend(["origin".to_owned(), format!("{commit}:{to}")]);
    git.run(&format!("send branch {}", branch.name), &arguments).map(|_| ())
}

/// Asks the remote where the branch is; that it has the large files git-lfs made sure of before.
fn prove(git: &Git, remote: &str, branch: &Branch, commit: &str) -> Result<()> {
    let found = heads(git)?.remove(&branch.name).unwrap_or_else(|| "missing".into());
    if found == commit {
        return Ok(());
    }
    let (branch, file) = (branch.name.clone(), "its newest commit".to_owned());
    let (place, expected) = (remote.to_owned(), commit.to_owned());
    Err(HubError::NotProven { branch, place, file, expected, found }.into())
}
