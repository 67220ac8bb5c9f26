//! What is read from a Hub.

use serde_json::{Value, json};

use super::{
    Shared, TOKEN,
    http::{Answer, Request},
    lock,
    store::{Blob, Repository},
};
use gptq::hub::ContentId;

/// Entries of a listing that come at once; few, so that listings have several pages.
const PAGE: usize = 5;

pub(super) fn answer(request: &Request, shared: &Shared) -> Answer {
    let parts = request.parts();
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    match parts[..] {
        ["api", kind, owner, name, ref rest @ ..] => {
            let store = lock(&shared.store);
            let Some(repository) =
                store.get(&format!("{kind}/{owner}/{name}")).filter(|r| may_see(request, r))
            else {
                return no_repository(request);
            };
            match *rest {
                [] => info(repository, owner, name, "main"),
                ["revision", revision] => info(repository, owner, name, revision),
                ["refs"] => refs(repository),
                ["tree", revision] => tree(request, shared, repository, revision),
                ["commits", branch] => commits(repository, branch),
                ["xet-write-token" | "xet-read-token", _] => xet_token(shared),
                _ => Answer::error(404, "no such address"),
            }
        }
        ["datasets", owner, name, "resolve", revision, ref path @ ..] => {
            resolve(request, shared, &format!("datasets/{owner}/{name}"), revision, &path.join("/"))
        }
        [owner, name, "resolve", revision, ref path @ ..] => {
            resolve(request, shared, &format!("models/{owner}/{name}"), revision, &path.join("/"))
        }
        _ => Answer::error(404, "no such address"),
    }
}

pub(super) fn no_repository(request: &Request) -> Answer {
    // To those without a token, a private repository and one that does not exist are the same.
    let status = if has_token(request) { 404 } else { 401 };
    Answer::error(status, "Repository not found").with("X-Error-Code", "RepoNotFound")
}

pub(super) fn has_token(request: &Request) -> bool {
    request.header("authorization") == Some(&format!("Bearer {TOKEN}"))
}

pub(super) fn may_see(request: &Request, repository: &Repository) -> bool {
    !repository.private || has_token(request)
}

fn no_revision() -> Answer {
    Answer::error(404, "Invalid rev id").with("X-Error-Code", "RevisionNotFound")
}

fn info(repository: &Repository, owner: &str, name: &str, revision: &str) -> Answer {
    let Some(commit) = repository.resolve(revision) else { return no_revision() };
    let siblings: Vec<Value> =
        repository.commits[&commit].keys().map(|path| json!({ "rfilename": path })).collect();
    let gated = if repository.gated { json!("manual") } else { json!(false) };
    Answer::json(&json!({
        "_id": "0", "id": format!("{owner}/{name}"), "sha": commit, "private": repository.private,
        "gated": gated, "siblings": siblings, "tags": [],
    }))
}

fn refs(repository: &Repository) -> Answer {
    let branch = |(name, commit): (&String, &String)| json!({ "name": name, "ref": format!("refs/heads/{name}"), "targetCommit": commit });
    let branches: Vec<Value> = repository.branches.iter().map(branch).collect();
    Answer::json(&json!({ "branches": branches, "tags": [], "converts": [] }))
}

/// Of a branch that did not begin from another.
fn commits(repository: &Repository, branch: &str) -> Answer {
    let of_branch = repository.log.iter().rev().filter(|(_, made_on)| made_on == branch);
    let commits: Vec<Value> = of_branch
        .map(|(commit, _)| json!({ "id": commit, "authors": [], "title": "", "message": "" }))
        .collect();
    Answer::json(&commits.into())
}

fn tree(request: &Request, shared: &Shared, repository: &Repository, revision: &str) -> Answer {
    let Some(commit) = repository.resolve(revision) else { return no_revision() };
    let cursor = request.query.split('&').find_map(|pair| pair.strip_prefix("cursor="));
    let start: usize = cursor.and_then(|cursor| cursor.parse().ok()).unwrap_or(0);
    let files = &repository.commits[&commit];
    let page: Vec<Value> =
        files.iter().skip(start).take(PAGE).map(|(path, blob)| entry(path, blob)).collect();
    let answer = Answer::json(&page.into());
    if start + PAGE >= files.len() {
        return answer;
    }
    let next = format!(
        "<http://{}{}?recursive=true&cursor={}>; rel=\"next\"",
        shared.api,
        request.path,
        start + PAGE
    );
    answer.with("Link", &next)
}

fn entry(path: &str, blob: &Blob) -> Value {
    let size = blob.bytes.len();
    match &blob.id {
        ContentId::GitBlob(hex) => json!({ "type": "file", "path": path, "size": size, "oid": hex }),
        ContentId::Sha256(hex) => {
            // The blob is the pointer; the content is named by its own digest.
            let lfs = json!({ "oid": hex, "size": size, "pointerSize": 130 });
            json!({ "type": "file", "path": path, "size": size, "oid": "0".repeat(40), "lfs": lfs })
        }
    }
}

fn xet_token(shared: &Shared) -> Answer {
    match &*lock(&shared.xet) {
        Some(xet) => {
            Answer::json(&json!({ "accessToken": "xet", "exp": 4_000_000_000_u64, "casUrl": xet.endpoint() }))
        }
        None => Answer::error(404, "no Xet here"),
    }
}

fn resolve(request: &Request, shared: &Shared, id: &str, revision: &str, path: &str) -> Answer {
    let store = lock(&shared.store);
    let Some(repository) = store.get(id).filter(|r| may_see(request, r)) else {
        return no_repository(request);
    };
    if repository.gated && !has_token(request) {
        let status = if request.header("authorization").is_some() { 403 } else { 401 };
        return Answer::error(status, "Access to model is restricted").with("X-Error-Code", "GatedRepo");
    }
    let Some(commit) = repository.resolve(revision) else { return no_revision() };
    let Some(blob) = repository.commits[&commit].get(path) else {
        return Answer::error(404, "Entry not found").with("X-Error-Code", "EntryNotFound");
    };
    match &blob.id {
        ContentId::GitBlob(hex) => {
            part(request, blob, false).with("ETag", &format!("\"{hex}\"")).with("X-Repo-Commit", &commit)
        }
        ContentId::Sha256(hex) => Answer::new(302, Vec::new())
            .with("X-Repo-Commit", &commit)
            .with("X-Linked-Etag", &format!("\"{hex}\""))
            .with("X-Linked-Size", &blob.bytes.len().to_string())
            .with("Location", &format!("http://{}/{hex}/{path}?Signature=secret", shared.large)),
    }
}

/// The content of a large file, from the other address.
pub(super) fn content(request: &Request, shared: &Shared, no_ranges: bool) -> Answer {
    if request.header("authorization").is_some() {
        return Answer::error(400, "only one way to authorize is allowed");
    }
    let parts = request.parts();
    let store = lock(&shared.store);
    let trees = store.values().flat_map(|repository| repository.commits.values());
    let blob = trees.flat_map(|tree| tree.values()).find(|blob| blob.id.hex() == parts[0]);
    match blob {
        Some(blob) => part(request, blob, no_ranges),
        None => Answer::error(403, "signature does not match"),
    }
}

fn part(request: &Request, blob: &Blob, no_ranges: bool) -> Answer {
    let range = request.header("range").filter(|_| !no_ranges).and_then(|range| {
        let (start, end) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some((start.parse::<usize>().ok()?, end.parse::<usize>().ok()?))
    });
    match range {
        None => Answer::new(200, blob.bytes.to_vec()),
        Some((start, end)) if end < blob.bytes.len() && start <= end => {
            let range = format!("bytes {start}-{end}/{}", blob.bytes.len());
            Answer::new(206, blob.bytes[start..=end].to_vec()).with("Content-Range", &range)
        }
        Some(_) => Answer::error(416, "range not satisfiable"),
    }
}
