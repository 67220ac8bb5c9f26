//! The cache of what comes from a Hub: what it serves without one, what is not fetched twice, and where it is full.

use std::fs;

use gptq::{
    Error,
    error::{HubError, ResourceError},
    hub::{Settings, Snapshot},
};
use serde_json::json;

use crate::{
    hub_fetch::{ID, Notes, Place, sha256_of_weights},
    hub_server::Fault,
};

#[test]
fn without_a_network_the_cache_serves() {
    let place = Place::new();
    let gone = Settings { endpoint: "http://127.0.0.1:1".into(), ..place.settings() };
    let offline = Settings { offline: true, ..place.settings() };
    let error = place.fetch_with(gone.clone(), "some/llama", &Notes::default()).unwrap_err();
    assert!(matches!(error, Error::Hub(HubError::Unreachable { .. })), "{error}");
    assert_eq!(
        place.refused(offline.clone(), "some/llama"),
        "HF_HUB_OFFLINE is set, and `some/llama` at revision `main` is incomplete in the cache: all of it is missing \
         | unset HF_HUB_OFFLINE to fetch it"
    );

    let snapshot = place.fetch("some/llama").unwrap();
    place.server.take_seen();
    let cached = Snapshot { gated: None, ..snapshot.clone() };
    let notes = Notes::default();
    assert_eq!(place.fetch_with(gone.clone(), "some/llama", &notes).unwrap(), cached);
    let notes = notes.0.into_inner().unwrap();
    assert!(notes[0].contains("; using some/llama from the cache, as it was at commit"), "{notes:?}");
    assert_eq!(place.fetch_with(offline.clone(), "some/llama", &Notes::default()).unwrap(), cached);
    assert_eq!(place.server.take_seen().len(), 0);
    place.server.fault("/api/models", Fault::status(503, ""), 9);
    assert_eq!(place.fetch("some/llama").unwrap(), cached);

    fs::remove_file(snapshot.folder.join("config.json")).unwrap();
    let refused = place.refused(offline, "some/llama");
    assert!(refused.contains("is incomplete in the cache: `config.json` is missing"), "{refused}");
}

#[test]
fn a_disk_that_fills_up_is_an_error_of_its_own() {
    let place = Place::new();
    let part = place.repository().join("blobs").join(format!("{}.incomplete", sha256_of_weights(&place)));
    fs::create_dir_all(part.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/full", &part).unwrap();
    let error = place.fetch("some/llama").unwrap_err();
    assert!(matches!(error, Error::Resource(ResourceError::DiskSpace { .. })), "{error}");
    assert_eq!(error.hint().unwrap(), "free some space or choose a folder on another disk");
}

#[test]
fn a_listing_is_believed_only_as_far_as_it_can_be() {
    let place = Place::new();
    let listing = |path: &str, size: u64| {
        let oid = "0".repeat(40);
        let lfs = json!({ "oid": "0".repeat(64), "size": size });
        let config = json!({ "type": "file", "path": "config.json", "size": 2, "oid": oid });
        let weights = json!({ "type": "file", "path": path, "size": size, "oid": oid, "lfs": lfs });
        Fault::Pretend(json!([config, weights]).to_string())
    };
    place.server.fault("/tree/", listing("model.safetensors", 1 << 60), 1);
    let error = place.fetch("some/llama").unwrap_err();
    assert!(matches!(error, Error::Resource(ResourceError::DiskSpace { .. })), "{error}");
    for path in ["../../config.json", "/config.json", "a/./config.json"] {
        place.server.fault("/tree/", listing(path, 2), 1);
        let error = place.fetch("some/llama").unwrap_err();
        assert!(error.to_string().contains("which is not below the repository"), "{error}");
    }
    assert!(
        place.server.take_seen().iter().all(|seen| seen.path.starts_with("/api/")),
        "nothing was fetched"
    );
}

#[test]
fn what_another_revision_brought_is_not_fetched_again() {
    let place = Place::new();
    place.fetch("some/llama").unwrap();
    let mut store = place.server.store();
    let repository = store.get_mut(ID).unwrap();
    let tree = repository.tree("main").clone();
    let commit = repository.commit("main", tree, "the same files");
    drop(store);
    place.server.take_seen();
    let snapshot = place.fetch("some/llama").unwrap();
    assert_eq!(snapshot.commit, commit);
    place.is_right(&snapshot);
    assert!(place.server.take_seen().iter().all(|seen| seen.path.starts_with("/api/")));
}
