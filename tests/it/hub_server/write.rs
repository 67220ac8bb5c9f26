//! What is written to a Hub.

use serde_json::{Value, json};

use super::{
    Shared,
    http::{Answer, Request},
    lock,
    read::{has_token, no_repository},
    store::{Blob, Repository, is_large},
};

pub(super) fn answer(request: &Request, shared: &Shared) -> Answer {
    if !has_token(request) {
        return Answer::error(401, "Invalid credentials in Authorization header");
    }
    let parts = request.parts();
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    let body = request.json();
    match parts[..] {
        ["api", "repos", "create"] => create(shared, &body),
        [_, name, "info", "lfs", "objects", "batch"] if name.ends_with(".git") => batch(shared),
        ["api", "models", owner, name, what, revision] => {
            let mut store = lock(&shared.store);
            let Some(repository) = store.get_mut(&format!("models/{owner}/{name}")) else {
                return no_repository(request);
            };
            match what {
                "branch" => branch(repository, revision, &body),
                "preupload" => preupload(&body),
                "commit" => commit(shared, repository, revision, &request.body),
                _ => Answer::error(404, "no such address"),
            }
        }
        _ => Answer::error(404, "no such address"),
    }
}

fn create(shared: &Shared, body: &Value) -> Answer {
    let id = format!("{}/{}", body["organization"].as_str().unwrap(), body["name"].as_str().unwrap());
    let mut store = lock(&shared.store);
    if store.contains_key(&format!("models/{id}")) {
        return Answer::error(409, "You already created this model repo");
    }
    let attributes = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n";
    let mut repository = Repository::of([(".gitattributes".to_owned(), attributes.as_bytes().to_vec())]);
    repository.private = body["private"] == true;
    store.insert(format!("models/{id}"), repository);
    Answer::json(&json!({ "url": format!("http://{}/{id}", shared.api) }))
}

fn branch(repository: &mut Repository, name: &str, body: &Value) -> Answer {
    if repository.branches.contains_key(name) {
        return Answer::error(409, "Reference already exists");
    }
    let Some(start) = repository.resolve(body["startingPoint"].as_str().unwrap_or("main")) else {
        return Answer::error(404, "Invalid rev id").with("X-Error-Code", "RevisionNotFound");
    };
    repository.branches.insert(name.into(), start);
    Answer::json(&json!({}))
}

fn preupload(body: &Value) -> Answer {
    let mode = |file: &Value| {
        let path = file["path"].as_str().unwrap();
        json!({ "path": path, "uploadMode": if is_large(path) { "lfs" } else { "regular" }, "shouldIgnore": false })
    };
    let files: Vec<Value> = body["files"].as_array().unwrap().iter().map(mode).collect();
    Answer::json(&json!({ "files": files }))
}

fn batch(shared: &Shared) -> Answer {
    let transfer = if lock(&shared.xet).is_some() { "xet" } else { "basic" };
    Answer::json(&json!({ "transfer": transfer, "objects": [] }))
}

fn commit(shared: &Shared, repository: &mut Repository, branch: &str, lines: &[u8]) -> Answer {
    let Some(head) = repository.branches.get(branch).cloned() else {
        return Answer::error(404, "Invalid rev id").with("X-Error-Code", "RevisionNotFound");
    };
    let mut tree = repository.commits[&head].clone();
    let mut message = String::new();
    for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let line: Value = serde_json::from_slice(line).unwrap();
        let (value, path) = (&line["value"], line["value"]["path"].as_str().unwrap_or_default());
        match line["key"].as_str().unwrap() {
            "header" => {
                if value["parentCommit"].as_str().is_some_and(|parent| parent != head) {
                    return Answer::error(412, "A commit has happened since. Please refresh and try again.");
                }
                message = value["summary"].as_str().unwrap().to_owned();
            }
            "file" if is_large(path) => {
                return Answer::error(400, "this file must be uploaded as a large one");
            }
            "file" => {
                tree.insert(path.into(), Blob::new(path, from_base64(value["content"].as_str().unwrap())));
            }
            "lfsFile" => {
                let sha256 = value["oid"].as_str().unwrap();
                let content = lock(&shared.xet).as_ref().and_then(|xet| xet.content(sha256));
                let Some(content) = content else {
                    return Answer::error(400, "the large file has not been uploaded");
                };
                tree.insert(path.into(), Blob::new(path, content));
            }
            "deletedFile" => {
                if tree.remove(path).is_none() {
                    return Answer::error(400, "no such file to delete");
                }
            }
            other => return Answer::error(400, other),
        }
    }
    let commit = repository.commit(branch, tree, &message);
    Answer::json(
        &json!({ "commitOid": commit, "commitUrl": format!("http://{}/commit/{commit}", shared.api), "success": true }),
    )
}

fn from_base64(text: &str) -> Vec<u8> {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0u32, 0);
    for letter in text.bytes().filter(|letter| *letter != b'=') {
        let value = LETTERS.iter().position(|known| *known == letter).expect("base64") as u32;
        (bits, count) = (bits << 6 | value, count + 6);
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    bytes
}
