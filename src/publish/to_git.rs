//! Publishing on a git remote, with large files through git-lfs.
//!
//! Commits are made from blobs: no branch is checked out, and large files are linked, not copied.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    path::{Path, absolute},
};

use super::{Branch, Content, LocalFile, Outcome, PublishOptions, git::Git, message};
use crate::{
    error::{Error, HubError, Result},
    hub::Settings,
    progress::{Event, Progress},
    units::bytes,
};

/// Least size of large files, whatever their names.
const LARGE: u64 = 10_000_000;

/// The file that names the files in git-lfs.
const ATTRIBUTES: &str = ".gitattributes";

/// Publishes branches to a git remote: an address, or the path of a repository.
///
/// # Errors
/// If git refuses, or the remote does not have afterwards what was sent.
pub fn to_git(
    remote: &str,
    run: &Path,
    branches: &[Branch],
    options: &PublishOptions,
    settings: &Settings,
    progress: &dyn Progress,
) -> Result<Vec<Outcome>> {
    if remote
        .split_once("://")
        .is_some_and(|(scheme, rest)| scheme.starts_with("http") && user_of(rest).is_some())
    {
        // git passes addresses to other programs, whose command lines all users of this machine see.
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

/// The part before the `@` of an address's host.
fn user_of(rest: &str) -> Option<&str> {
    rest.split('/').next()?.split_once('@').map(|(user, _)| user)
}

/// The newest commits of the remote's branches.
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
    options: &PublishOptions,
    progress: &dyn Progress,
) -> Result<Outcome> {
    git.run("empty its index", &["read-tree", "--empty"])?;
    let mut parent = None;
    if head.is_some() && !options.force {
        // A commit on top of the newest one needs no older ones.
        let branch = format!("refs/heads/{}", branch.name);
        git.run("fetch the branch", &["fetch", "--quiet", "--depth", "1", "origin", &branch])?;
        let newest = git.run("read the branch", &["rev-parse", "FETCH_HEAD"])?;
        git.run("read the branch", &["read-tree", &newest])?;
        parent = Some(newest);
    }
    let before = index(git)?;
    let large: Vec<&LocalFile> = branch.files.iter().filter(|file| is_large(file)).collect();
    let mut outcome = Outcome { commit: parent.clone(), ..Outcome::new(branch, before.keys()) };
    for path in &outcome.deleted {
        git.run("delete a file", &["update-index", "--force-remove", path])?;
    }
    for file in &branch.files {
        let blob = if is_large(file) { pointer(git, file)? } else { blob(git, file)? };
        let same = before.get(&file.path) == Some(&blob);
        outcome.count(file, same);
        if !same {
            add(git, &file.path, &blob)?;
        }
    }
    let attributes = attributes(git, before.get(ATTRIBUTES), &large)?;
    if before.get(ATTRIBUTES) != Some(&attributes) {
        add(git, ATTRIBUTES, &attributes)?;
    } else if outcome.is_empty() {
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
    [".safetensors", ".gguf"].iter().any(|end| file.path.ends_with(end)) || file.size >= LARGE
}

/// The index's blobs by path.
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

/// Stores a small file's content in the repository; returns its blob.
fn blob(git: &Git, file: &LocalFile) -> Result<String> {
    let bytes = match &file.content {
        Content::Bytes(bytes) => bytes.clone(),
        Content::File(path) => fs::read(path).map_err(Error::io("read", path))?,
    };
    git.store("take a file in", &bytes)
}

/// Links a large file into git-lfs's store and stores a pointer to it in the repository; returns the pointer's blob.
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

/// The blob of the attributes: those that are there, and those that put the large files into git-lfs.
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
    // Contents first: a branch must not refer to missing contents.
    let large = branch.files.iter().filter(|file| is_large(file)).map(|file| file.sha256.clone());
    let mut arguments = ["lfs", "push", "--object-id", "origin"].map(str::to_owned).to_vec();
    arguments.extend(large);
    git.run("send large files", &arguments)?;
    let mut arguments = vec!["push".to_owned(), "--quiet".to_owned(), "--no-verify".to_owned()];
    if force {
        // Refused if the remote has commits that were not seen above.
        arguments.push(format!("--force-with-lease={to}:{}", head.map_or("", String::as_str)));
    }
    arguments.extend(["origin".to_owned(), format!("{commit}:{to}")]);
    git.run(&format!("send branch {}", branch.name), &arguments).map(|_| ())
}

/// Requires that the remote's branch is at the commit; git-lfs has made sure before that the remote has the large files.
fn prove(git: &Git, remote: &str, branch: &Branch, commit: &str) -> Result<()> {
    let found = heads(git)?.remove(&branch.name).unwrap_or_else(|| "missing".into());
    if found == commit {
        return Ok(());
    }
    let (branch, file) = (branch.name.clone(), "its newest commit".to_owned());
    let (place, expected) = (remote.to_owned(), commit.to_owned());
    Err(HubError::NotProven { branch, place, file, expected, found }.into())
}
