//! Models and datasets from a Hub: which files are fetched, which faults are survived, and which are errors.

use std::{fs, path::PathBuf, sync::Mutex, time::Duration};

use gptq::{
    Error,
    checkpoint::Checkpoint,
    error::HubError,
    hub::{Hub, Reference, Settings, Snapshot, Token},
    progress::{Event, Progress},
};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::{
    helpers::{Lab, entries, files_below, repository},
    hub_server::{Fault, HubServer, Repository, TOKEN},
};

pub(crate) const ID: &str = "models/some/llama";

/// A server with the tiny model, and a cache.
pub(crate) struct Place {
    pub(crate) server: HubServer,
    model: Lab,
    pub(crate) cache: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let (server, model) = (HubServer::start(), Lab::new());
        fs::write(model.model().join("LICENSE.txt"), "a licence").unwrap();
        fs::write(model.model().join("training.log"), "not needed").unwrap();
        fs::write(model.model().join("README.md"), "# A card").unwrap();
        server.store().insert(ID.into(), Repository::of_folder(&model.model()));
        Self { server, model, cache: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings {
            endpoint: self.server.endpoint(),
            silence: Duration::from_millis(700),
            retries: 2,
            pause: Duration::from_millis(1),
            ..Settings::new(self.cache.path().into())
        }
    }

    pub(crate) fn fetch(&self, name: &str) -> Result<Snapshot, Error> {
        self.fetch_with(self.settings(), name, &Notes::default())
    }

    pub(crate) fn fetch_with(
        &self,
        settings: Settings,
        name: &str,
        notes: &Notes,
    ) -> Result<Snapshot, Error> {
        Hub::new(settings)?.fetch_model(&name.parse::<Reference>()?, notes)
    }

    /// The error, and its hint, without the server's address.
    pub(crate) fn refused(&self, settings: Settings, name: &str) -> String {
        let error = self.fetch_with(settings, name, &Notes::default()).unwrap_err();
        let hint = error.hint().map_or_else(String::new, |hint| format!(" | {hint}"));
        let text = format!("{error}{hint}").replace(&self.server.endpoint(), "[HUB]");
        assert!(
            !text.contains(TOKEN) && !text.contains("hf_wrong") && !format!("{error:?}").contains(TOKEN),
            "{text}"
        );
        text
    }

    pub(crate) fn repository(&self) -> PathBuf {
        self.cache.path().join("models--some--llama")
    }

    /// Requires that what was fetched is what the server has.
    #[track_caller]
    pub(crate) fn is_right(&self, snapshot: &Snapshot) {
        for file in files_below(&snapshot.folder) {
            let [found, expected] =
                [&snapshot.folder, &self.model.model()].map(|dir| fs::read(dir.join(&file)).unwrap());
            assert!(found == expected, "{}", file.display());
        }
    }
}

#[derive(Default)]
pub(crate) struct Notes(pub(crate) Mutex<Vec<String>>);

impl Progress for Notes {
    fn begin(&self, phase: &str, total: u64) {
        self.0.lock().unwrap().push(format!("{phase} 0/{total}"));
    }
    fn advance(&self, _steps: u64) {}
    fn event(&self, event: &Event<'_>) {
        if let Event::Note(text) | Event::Warning(text) = event {
            self.0.lock().unwrap().push((*text).to_owned());
        }
    }
}

#[test]
fn only_what_is_needed_is_fetched_and_once() {
    let place = Place::new();
    let notes = Notes::default();
    let settings = Settings { token: Token::new(TOKEN), ..place.settings() };
    let snapshot = place.fetch_with(settings.clone(), "some/llama", &notes).unwrap();
    place.is_right(&snapshot);
    let files = entries(&snapshot.folder);
    let needed = "LICENSE.txt README.md config.json generation_config.json model.safetensors \
                  special_tokens_map.json tokenizer.json tokenizer_config.json";
    assert_eq!(files.join(" "), needed);

    // The layout of the Hugging Face cache.
    assert_eq!(snapshot.folder, place.repository().join("snapshots").join(&snapshot.commit));
    assert_eq!(fs::read_to_string(place.repository().join("refs/main")).unwrap(), snapshot.commit);
    let link = fs::read_link(snapshot.folder.join("model.safetensors")).unwrap();
    assert!(link.starts_with("../../blobs"), "{}", link.display());
    assert_eq!(entries(&place.repository().join("blobs")).len(), files.len());
    let notes = notes.0.into_inner().unwrap();
    assert!(
        notes[1].starts_with("fetched 8 files, ") && notes[1].contains("of model some/llama at commit"),
        "{notes:?}"
    );

    // Large files come from elsewhere, and the token does not go there.
    let seen = place.server.take_seen();
    assert!(
        seen.iter().any(|seen| seen.large) && seen.iter().all(|seen| seen.token != seen.large),
        "{seen:?}"
    );

    // What is there is not fetched again, also not by its commit.
    for name in ["some/llama".to_owned(), format!("some/llama@{}", snapshot.commit)] {
        assert_eq!(place.fetch_with(settings.clone(), &name, &Notes::default()).unwrap(), snapshot);
        let seen = place.server.take_seen();
        assert!(seen.iter().all(|seen| seen.path.starts_with("/api/")), "{seen:?}");
    }
}

#[test]
fn a_branch_and_the_shards_that_its_index_names() {
    let place = Place::new();
    let mut store = place.server.store();
    let repository = store.get_mut(ID).unwrap();
    let mut tree = repository.tree("main").clone();
    let weights = tree.remove("model.safetensors").unwrap();
    for name in ["model-00001-of-00001.safetensors", "other.safetensors"] {
        tree.insert(name.into(), weights.clone());
    }
    let index = br#"{"weight_map": {"a": "model-00001-of-00001.safetensors"}}"#.to_vec();
    let extra = Repository::of([("model.safetensors.index.json".to_owned(), index)]);
    tree.extend(extra.tree("main").clone());
    let commit = repository.commit("gptq-4bit-32g-actorder_True", tree, "sharded");
    drop(store);

    let snapshot = place.fetch("some/llama:gptq-4bit-32g-actorder_True").unwrap();
    assert_eq!(snapshot.commit, commit);
    let names = entries(&snapshot.folder);
    assert!(names.contains(&"model-00001-of-00001.safetensors".into()), "{names:?}");
    assert!(!names.contains(&"other.safetensors".into()), "{names:?}");
    assert_eq!(place.fetch("some/llama@gptq-4bit-32g-actorder_True").unwrap(), snapshot);
}

#[test]
fn every_fault_is_survived_once() {
    let weights = "model.safetensors";
    let faults = [
        ("GET /api/models", Fault::status(500, "")),
        ("GET /api/models", Fault::Answer(429, vec![("Retry-After", "0".into())])),
        ("/tree/", Fault::status(503, "")),
        ("/tree/", Fault::CutAfter(0)),
        (weights, Fault::status(502, "")),
        (weights, Fault::Answer(429, vec![])),
        ("GET /some/llama/resolve", Fault::CutAfter(3)),
        ("GET /some/llama/resolve", Fault::FlippedBit),
        (&format!("/{weights}"), Fault::CutAfter(0)),
    ];
    for (part, fault) in faults {
        let place = Place::new();
        place.server.fault(part, fault.clone(), 1);
        let snapshot = place.fetch("some/llama").unwrap_or_else(|error| panic!("{part} {fault:?}: {error}"));
        place.is_right(&snapshot);
    }
    // On the way from the other address.
    for fault in [Fault::CutAfter(1000), Fault::FlippedBit, Fault::TooLong, Fault::SilentAfter(1000)] {
        let place = Place::new();
        let large = format!("GET /{}", sha256_of_weights(&place));
        place.server.fault(&large, fault.clone(), 1);
        let snapshot = place.fetch("some/llama").unwrap_or_else(|error| panic!("{fault:?}: {error}"));
        place.is_right(&snapshot);
        let ranges: Vec<_> = place
            .server
            .take_seen()
            .into_iter()
            .filter(|s| s.large && s.method == "GET")
            .map(|s| s.range)
            .collect();
        let again = match fault {
            Fault::CutAfter(_) | Fault::SilentAfter(_) => {
                Some(format!("bytes=1000-{}", size_of_weights(&place) - 1))
            }
            // What is wrong is not gone on with.
            _ => None,
        };
        assert_eq!(ranges, [None, again], "{fault:?}");
    }
}

#[test]
fn a_slow_answer_is_waited_for() {
    let place = Place::new();
    place.server.fault(&format!("GET /{}", sha256_of_weights(&place)), Fault::Slow, 1);
    place.is_right(&place.fetch("some/llama").unwrap());
    let large =
        place.server.take_seen().into_iter().filter(|seen| seen.large && seen.method == "GET").count();
    assert_eq!(large, 1, "once, in one piece");
}

#[test]
fn a_server_that_knows_no_ranges_sends_all_again() {
    let place = Place::new();
    let large = format!("GET /{}", sha256_of_weights(&place));
    place.server.fault(&large, Fault::CutAfter(1000), 1);
    place.server.fault(&large, Fault::NoRanges, 1);
    place.is_right(&place.fetch("some/llama").unwrap());
}

#[test]
fn what_stays_wrong_is_an_error_and_not_in_the_cache() {
    let place = Place::new();
    let large = format!("GET /{}", sha256_of_weights(&place));
    for (fault, found) in [(Fault::FlippedBit, "found sha256 "), (Fault::TooLong, "found more")] {
        place.server.fault(&large, fault.clone(), 9);
        let error = place.fetch("some/llama").unwrap_err();
        assert!(
            matches!(&error, Error::Hub(HubError::Content { file, .. }) if file == "model.safetensors"),
            "{error}"
        );
        assert!(error.to_string().contains(found), "{error}");
        place.server.clear_faults();
        let blobs = entries(&place.repository().join("blobs"));
        assert!(!blobs.contains(&sha256_of_weights(&place)), "{blobs:?}");
        assert!(!place.repository().join("refs/main").exists());
    }
    // A part of another file under this one's name: found out, and fetched anew.
    let part = place.repository().join("blobs").join(format!("{}.incomplete", sha256_of_weights(&place)));
    fs::write(&part, [7; 500]).unwrap();
    place.is_right(&place.fetch("some/llama").unwrap());
    assert!(!part.exists());
}

#[test]
fn a_transfer_goes_on_where_the_last_run_stopped() {
    let place = Place::new();
    let large = format!("GET /{}", sha256_of_weights(&place));
    place.server.fault(&large, Fault::CutAfter(2000), 1);
    place.server.fault(&large, Fault::CutAfter(0), 9);
    let error = place.fetch("some/llama").unwrap_err();
    assert!(matches!(error, Error::Hub(HubError::Cut { got: 2000, .. })), "{error}");
    assert_eq!(error.hint().unwrap(), "start again: it resumes where it stopped");
    place.server.clear_faults();
    place.server.take_seen();
    place.is_right(&place.fetch("some/llama").unwrap());
    let ranges: Vec<_> = place.server.take_seen().into_iter().filter_map(|seen| seen.range).collect();
    assert!(ranges.iter().all(|range| range.starts_with("bytes=2000-")) && !ranges.is_empty(), "{ranges:?}");
}

#[test]
fn refusals_say_what_helps() {
    let place = Place::new();
    let anonymous = place.settings();
    let known = Settings { token: Token::new(TOKEN), ..anonymous.clone() };
    let stranger = Settings { token: Token::new("hf_wrong"), ..anonymous.clone() };

    assert_eq!(
        place.refused(anonymous.clone(), "some/lama"),
        "model `some/lama` is not on [HUB], or is private | check the name, or whether a folder was meant; if it is \
         private, set HF_TOKEN, or log in: hf auth login"
    );
    assert_eq!(
        place.refused(known.clone(), "some/lama"),
        "model `some/lama` is not on [HUB], or is private | check the name, or whether a folder was meant; if it is \
         private, the token must be of a user who may read it"
    );
    assert_eq!(
        place.refused(anonymous.clone(), "some/llama@maine"),
        "`some/llama` has no revision `maine` (it has `main`)"
    );
    place.server.store().get_mut(ID).unwrap().gated = true;
    assert_eq!(
        place.refused(anonymous.clone(), "some/llama"),
        "`some/llama` is gated, and no token was given | accept its conditions at [HUB]/some/llama, then set HF_TOKEN, \
         or log in: hf auth login"
    );
    assert_eq!(
        place.refused(stranger, "some/llama"),
        "`some/llama` is gated, and this token's user has no access | ask for access at [HUB]/some/llama with the \
         account of this token"
    );
    assert_eq!(place.fetch_with(known, "some/llama", &Notes::default()).unwrap().gated, Some(true));

    place.server.fault("/api/models", Fault::Answer(401, vec![]), 1);
    let invalid = place.refused(anonymous.clone(), "some/llama");
    assert!(invalid.starts_with("the Hub refused to read some/llama: 401"), "{invalid}");
    place.server.fault("/api/models", Fault::Answer(429, vec![]), 9);
    let busy = place.refused(anonymous, "other/llama");
    assert!(busy.starts_with("[HUB] refuses further requests for now (429) | wait a while"), "{busy}");
}

/// `tests/golden/pytorch/pytorch_model.bin` has the weights of `llama2-mha`.
#[test]
fn weights_in_pytorch_format_are_fetched_if_there_are_no_others() {
    let place = Place::new();
    let golden = repository().join("tests/golden");
    let model = golden.join("models/llama2-mha");
    let weights = fs::read(golden.join("pytorch/pytorch_model.bin")).unwrap();
    let expected = Checkpoint::open(&model).unwrap();
    let publish = |name: &str, weights: &[(&str, &[u8])]| {
        let config = fs::read(model.join("config.json")).unwrap();
        let others = [("config.json", &config[..]), ("training_args.bin", &b"not needed"[..])];
        let files = others.iter().chain(weights).map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec()));
        place.server.store().insert(format!("models/{name}"), Repository::of(files));
    };
    let fetched = |name: &str| {
        let folder = place.fetch(name).unwrap().folder;
        let found = Checkpoint::open(&folder).unwrap();
        for name in expected.names() {
            let [expected, found] = [&expected, &found].map(|checkpoint| checkpoint.view(name).unwrap());
            assert!(found.bytes == expected.bytes, "{name}");
        }
        let offline = Settings { offline: true, ..place.settings() };
        assert_eq!(place.fetch_with(offline, name, &Notes::default()).unwrap().folder, folder);
        entries(&folder)
    };

    publish("old/whole", &[("pytorch_model.bin", &weights)]);
    assert_eq!(fetched("old/whole"), ["config.json", "pytorch_model.bin"]);

    let shard = "pytorch_model-00001-of-00001.bin";
    let map: Map<String, Value> = expected.names().map(|name| (name.to_owned(), shard.into())).collect();
    let (index, text) = ("pytorch_model.bin.index.json", json!({ "weight_map": map }).to_string());
    let other = ("pytorch_model-00001-of-00002.bin", &weights[..1]);
    publish("old/shards", &[(shard, &weights), other, (index, text.as_bytes())]);
    assert_eq!(fetched("old/shards"), ["config.json", shard, index]);

    let safetensors = fs::read(model.join("model.safetensors")).unwrap();
    publish("new/both", &[("pytorch_model.bin", &weights), ("model.safetensors", &safetensors)]);
    assert_eq!(fetched("new/both"), ["config.json", "model.safetensors"]);
}

#[test]
fn weights_that_the_config_names_are_fetched() {
    let place = Place::new();
    let publish = |old_config: &str| {
        let files = [("config.json", "{}"), ("quantize_config.json", old_config), ("a.safetensors", "a")];
        let more = [("b-00001-of-00001.safetensors", "b"), ("b.safetensors.index.json", BASE_INDEX)];
        let files =
            files.into_iter().chain(more).map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec()));
        place.server.store().insert("models/old/two".into(), Repository::of(files));
    };
    const BASE_INDEX: &str = r#"{"weight_map": {"x": "b-00001-of-00001.safetensors"}}"#;
    publish(r#"{"model_file_base_name": "b"}"#);
    let snapshot = place.fetch("old/two").unwrap();
    let configs = ["config.json", "quantize_config.json"];
    let shards = ["b-00001-of-00001.safetensors", "b.safetensors.index.json"];
    assert_eq!(entries(&snapshot.folder), [shards, configs].concat());
    let offline = Settings { offline: true, ..place.settings() };
    assert_eq!(place.fetch_with(offline, "old/two", &Notes::default()).unwrap().folder, snapshot.folder);

    publish("{}");
    let refused = place.refused(place.settings(), "old/two");
    let expected = "`old/two` has several weights files: `a.safetensors`, `b.safetensors.index.json` | fetch it: hf download";
    assert!(refused.starts_with(expected), "{refused}");
}

#[test]
fn weights_that_are_not_read_name_the_conversion() {
    let place = Place::new();
    let files = [("config.json", "{}"), ("tf_model.h5", "x")];
    let files = files.map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec()));
    place.server.store().insert("models/old/llama".into(), Repository::of(files));
    let refused = place.refused(place.settings(), "old/llama");
    assert!(
        refused.starts_with(
            "`old/llama` has only `tf_model.h5`; expected safetensors or `pytorch_model.bin` | convert it: python -c"
        ),
        "{refused}"
    );
    place.server.store().insert("models/no/llama".into(), Repository::of([("a.txt".to_owned(), vec![1])]));
    assert_eq!(
        place.refused(place.settings(), "no/llama"),
        "`no/llama` at revision `main` has no `config.json`"
    );
    assert!(!place.cache.path().join("models--old--llama/blobs").exists(), "nothing was fetched");
}

pub(crate) fn sha256_of_weights(place: &Place) -> String {
    place.server.store()[ID].tree("main")["model.safetensors"].id.hex().to_owned()
}

fn size_of_weights(place: &Place) -> usize {
    place.server.store()[ID].tree("main")["model.safetensors"].bytes.len()
}
