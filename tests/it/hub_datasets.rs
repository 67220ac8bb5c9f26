//! Datasets from a Hub on loopback: the files of a recipe, and nothing else of its repository.

use std::{fs, io::Write, path::Path};

use flate2::{Compression, write::GzEncoder};
use gptq::{
    hub::{Hub, Settings},
    progress::Silent,
};
use serde_json::json;

use crate::{
    helpers::{Lab, files_below, read_json},
    hub_server::{HubServer, Repository, on_hub},
};

#[test]
fn files_of_a_dataset() {
    let (server, cache) = (HubServer::start(), tempfile::tempdir().unwrap());
    let files = ["a/train-00000-of-00001.parquet", "a/test-00000-of-00001.parquet"];
    let repository = Repository::of(files.map(|name| (name.to_owned(), name.as_bytes().to_vec())));
    server.store().insert("datasets/some/texts".into(), repository);
    let settings = Settings { endpoint: server.endpoint(), ..Settings::new(cache.path().into()) };
    let hub = Hub::new(settings).unwrap();
    let fetch = |files: &[String]| hub.fetch_dataset(&"some/texts@main".parse().unwrap(), files, &Silent);
    let snapshot = fetch(&[files[0].to_owned()]).unwrap();
    assert_eq!(files_below(&snapshot.folder), [Path::new(files[0])]);
    assert!(snapshot.folder.starts_with(cache.path().join("datasets--some--texts/snapshots")));
    let error = fetch(&["a/x.parquet".into()]).unwrap_err().to_string();
    assert_eq!(error, "`some/texts` at revision `main` has no `a/x.parquet`");
}

#[test]
fn the_first_shard_of_c4() {
    let (lab, server) = (Lab::new(), HubServer::start());
    let shard = "en/c4-train.00000-of-01024.json.gz";
    let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
    for document in 0..8 {
        let text = format!("Page {document} says once more what it has said before. ").repeat(20);
        writeln!(packed, "{}", json!({ "text": text, "url": "http://example.org" })).unwrap();
    }
    let next = ("en/c4-train.00001-of-01024.json.gz".to_owned(), vec![0]);
    let mut c4 = Repository::of([(shard.to_owned(), packed.finish().unwrap()), next]);
    // The commit that the recipe names.
    let commit = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2";
    let tree = c4.tree("main").clone();
    c4.commits.insert(commit.into(), tree);
    server.store().insert("datasets/allenai/c4".into(), c4);

    let arguments = lab.quantize_args(&["--dataset", "c4", "--variant", "4bit-32g"]);
    on_hub(&lab, &server, "", &arguments).succeeds();
    let report = read_json(&lab.out().join("run.json"));
    let source = &report["calibration"]["sources"][0];
    assert_eq!((&source["dataset"], &source["revision"]), (&json!("c4"), &json!(commit)));
    let snapshot = lab.path("hf-home/hub/datasets--allenai--c4/snapshots").join(commit);
    assert_eq!(files_below(&snapshot), [Path::new(shard)], "one shard alone");

    // Another time, from the cache.
    server.take_seen();
    fs::remove_dir_all(lab.out()).unwrap();
    on_hub(&lab, &server, "", &arguments).succeeds();
    assert!(server.take_seen().is_empty());
}
