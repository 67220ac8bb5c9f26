//! To a Hub on loopback, through `hf-hub` and its Xet client, with every fault once; and the whole way from a Hub to a Hub.

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    gate::LOOSE,
    helpers::{Lab, Output, demo, entries, files_below, read_json, text_of},
    hub_server::{Fault, HubServer, Repository, TOKEN, on_hub, variables},
    tiny_model::Model,
};

const ACT: &str = "gptq-4bit-32g-actorder_True";
const ID: &str = "models/me/tiny-GPTQ";

/// A small run of two branches, and a Hub that has nothing.
fn place() -> (Lab, HubServer) {
    let lab = Lab::with(&Model { hidden: 128, ..Model::default() });
    lab.quantize(&["--variant", "4bit-128g", "--variant", "4bit-32g-act"]).succeeds();
    (lab, HubServer::start().with_xet())
}

fn publish(lab: &Lab, server: &HubServer, flags: &[&str]) -> Output {
    let out = text_of(&lab.out());
    on_hub(lab, server, TOKEN, &[&["publish", &out, "--to", "hub:me/tiny-GPTQ"], flags].concat())
}

/// Requires that a branch of the Hub is what lies in its folder, and has a card.
#[track_caller]
fn is_published(lab: &Lab, server: &HubServer, id: &str, branch: &str) {
    let store = server.store();
    let tree = store[id].tree(branch);
    let folder = lab.out().join(branch);
    for file in entries(&folder) {
        assert!(
            tree.get(&file).is_some_and(|blob| *blob.bytes == fs::read(folder.join(&file)).unwrap()),
            "{branch}/{file}"
        );
    }
    let card = String::from_utf8(tree["README.md"].bytes.to_vec()).unwrap();
    assert!(card.contains(&format!("card of branch `{branch}`")), "{card}");
}

#[test]
fn branches_are_made_sent_and_proven() {
    let (lab, server) = place();
    let dry = publish(&lab, &server, &["--dry-run"]).succeeds();
    assert!(
        dry.stdout.contains("would send") && dry.stdout.contains("+ model.safetensors"),
        "{}",
        dry.stdout
    );
    assert!(server.store().is_empty(), "a dry run makes nothing");

    let outcome = publish(&lab, &server, &["--private", "--json"]).json();
    for (at, branch) in ["main", ACT].into_iter().enumerate() {
        is_published(&lab, &server, ID, branch);
        let store = server.store();
        assert_eq!(outcome[at]["commit"], store[ID].branches[branch]);
        assert_eq!(outcome[at]["deleted"], json!([]));
    }
    assert!(server.store()[ID].private);
    assert_eq!(server.store()[ID].log.len(), 3, "one commit a branch after the first");

    // Again: nothing to send. One file changed: it alone, in one commit of one branch.
    let again = publish(&lab, &server, &[]).succeeds();
    assert!(again.stdout.contains("nothing to send"), "{}", again.stdout);
    fs::write(lab.out().join(ACT).join("EXTRA.md"), "{}\n").unwrap();
    let outcome = publish(&lab, &server, &["--json"]).json();
    assert_eq!((&outcome[0]["sent"], &outcome[1]["sent"]), (&json!([]), &json!(["EXTRA.md"])));
    assert_eq!(server.store()[ID].log.len(), 4);
    is_published(&lab, &server, ID, ACT);
}

#[test]
fn gguf_files_are_published_in_a_branch_beside_the_others() {
    let lab = Lab::with(&Model { hidden: 128, ..Model::default() });
    lab.quantize(&["--variant", "4bit-128g", "--variant", "q4_0", "--variant", "q8_0"]).succeeds();
    let server = HubServer::start().with_xet();
    let outcome = publish(&lab, &server, &["--json"]).json();
    let files = ["README.md", "model-Q4_0.gguf", "model-Q8_0.gguf"];
    assert_eq!((&outcome[0]["branch"], &outcome[1]["branch"]), (&json!("main"), &json!("gguf")));
    assert_eq!(outcome[1]["sent"], json!(files));
    is_published(&lab, &server, ID, "main");
    let published = |id: &str, branch: &str| {
        let store = server.store();
        let tree = store[id].tree(branch);
        for file in &files[1..] {
            assert!(*tree[*file].bytes == fs::read(lab.out().join(file)).unwrap(), "{branch}/{file}");
        }
        let card = String::from_utf8(tree["README.md"].bytes.to_vec()).unwrap();
        assert!(card.contains(&format!("card of branch `{branch}`")), "{card}");
    };
    published(ID, "gguf");

    // A file that someone put beside them stays; a card in the run's folder is taken.
    fs::write(lab.out().join("README.md"), "of my own").unwrap();
    let again = publish(&lab, &server, &["--json", "--branch", "gguf"]).json();
    assert_eq!((again.as_array().unwrap().len(), &again[0]["sent"]), (1, &json!(["README.md"])));
    fs::remove_file(lab.out().join("README.md")).unwrap();
    let unknown = publish(&lab, &server, &["--branch", "model-Q4_0.gguf"]);
    assert!(
        unknown.stderr.contains("`model-Q4_0.gguf`") && unknown.stderr.contains("`main`, `gguf`"),
        "{unknown:?}"
    );

    // A damaged file is not published.
    let path = lab.out().join("model-Q4_0.gguf");
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    let last = bad.len() - 40;
    bad[last] ^= 1;
    fs::write(&path, bad).unwrap();
    let commits = server.store()[ID].log.len();
    let refused = publish(&lab, &server, &[]);
    assert_eq!(refused.code, Some(2));
    assert!(
        refused.stderr.contains("model-Q4_0.gguf` cannot be read as a GGUF file: "),
        "{}",
        refused.stderr
    );
    assert_eq!(server.store()[ID].log.len(), commits);
    fs::write(&path, good).unwrap();

    // Files alone are in the default branch.
    fs::remove_dir_all(lab.out()).unwrap();
    lab.quantize(&["--variant", "q4_0", "--variant", "q8_0"]).succeeds();
    let out = text_of(&lab.out());
    let to = ["publish", &out, "--to", "hub:me/tiny-GGUF"];
    let outcome = on_hub(&lab, &server, TOKEN, &to).succeeds();
    assert!(!outcome.stderr.contains("readers load by default"), "{}", outcome.stderr);
    published("models/me/tiny-GGUF", "main");
}

#[test]
fn weights_of_before_go_and_other_files_stay() {
    let (lab, server) = place();
    let before =
        ["old.safetensors", "NOTES.md", "model.safetensors"].map(|name| (name.to_owned(), b"x".to_vec()));
    server.store().insert(ID.into(), Repository::of(before));
    let outcome = publish(&lab, &server, &["--json", "--branch", "main"]).json();
    assert_eq!(outcome[0]["deleted"], json!(["old.safetensors"]));
    is_published(&lab, &server, ID, "main");
    let store = server.store();
    assert!(
        store[ID].tree("main").contains_key("NOTES.md")
            && !store[ID].tree("main").contains_key("old.safetensors")
    );
    assert_eq!(store[ID].branches.len(), 1);
}

#[test]
fn every_fault_of_publishing_is_survived_once() {
    let faults = [
        ("POST /api/repos/create", Fault::status(500, "")),
        ("/commits/", Fault::status(503, "")),
        ("/branch/", Fault::status(503, "")),
        ("/branch/", Fault::CutAfter(0)),
        ("/tree/", Fault::status(502, "")),
        ("/preupload/", Fault::Answer(429, vec![("Retry-After", "0".into())])),
        ("/preupload/", Fault::CutAfter(0)),
        ("objects/batch", Fault::status(500, "")),
        ("xet-write-token", Fault::status(500, "")),
        ("/commit/", Fault::status(504, "")),
        // It arrived, and nobody said so.
        ("/commit/", Fault::CutAfter(0)),
        ("/commit/", Fault::status(412, "")),
    ];
    let (lab, server) = place();
    for (part, fault) in faults {
        server.store().clear();
        server.fault(part, fault.clone(), 1);
        let published = publish(&lab, &server, &[]);
        assert_eq!(published.code, Some(0), "{part} {fault:?}: {}", published.stderr);
        is_published(&lab, &server, ID, "main");
        is_published(&lab, &server, ID, ACT);
        server.clear_faults();
    }
}

#[test]
fn an_interrupted_publication_goes_on() {
    let (lab, server) = place();
    // Killed while it waits for an answer about its second branch.
    let about = format!("/preupload/{ACT}");
    server.fault(&about, Fault::SilentAfter(0), 1);
    let (out, endpoint) = (text_of(&lab.out()), server.endpoint());
    let mut killed =
        lab.start_with(&variables(&endpoint, TOKEN), &["publish", &out, "--to", "hub:me/tiny-GPTQ"]);
    let begun = Instant::now();
    while !server.take_seen().iter().any(|seen| seen.path.ends_with(&about)) {
        assert!(begun.elapsed().as_secs() < 60 && killed.try_wait().unwrap().is_none());
        thread::sleep(Duration::from_millis(10));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    is_published(&lab, &server, ID, "main");
    let left: Vec<String> = server.store()[ID].tree(ACT).keys().cloned().collect();
    assert_eq!(left, [".gitattributes"], "not the weights of another branch");

    let outcome = publish(&lab, &server, &["--json"]).json();
    assert_eq!(outcome[0]["sent"], json!([]), "what has arrived is not sent again");
    assert!(outcome[1]["sent"].as_array().unwrap().contains(&json!("model.safetensors")));
    is_published(&lab, &server, ID, ACT);
}

#[test]
fn a_publication_that_cannot_be_proven_is_an_error() {
    let (lab, server) = place();
    publish(&lab, &server, &[]).succeeds();
    // A server that says it has done something and has not.
    let done = json!({ "commitOid": "0".repeat(40) }).to_string();
    fs::write(lab.out().join("main/EXTRA.md"), "{}\n").unwrap();
    server.fault("/commit/main", Fault::Pretend(done), 1);
    let failed = publish(&lab, &server, &[]);
    assert_eq!(failed.code, Some(2), "{}", failed.stdout);
    let error = failed.stderr.replace(&server.endpoint(), "[HUB]");
    assert!(
        error.contains(
            "error: branch `main` was published, but `EXTRA.md` on [HUB] is missing: expected 3 bytes"
        ),
        "{error}"
    );
    assert!(error.contains("hint: publish again: only what differs is sent"), "{error}");
    publish(&lab, &server, &[]).succeeds();
    is_published(&lab, &server, ID, "main");

    // One that says it has something else, after the commit.
    server.store().clear();
    let other = json!([{ "type": "file", "path": "EXTRA.md", "size": 3, "oid": "0".repeat(40) }]);
    server.fault("/tree/main", Fault::Nothing, 1);
    server.fault("/tree/main", Fault::Pretend(other.to_string()), 1);
    let failed = publish(&lab, &server, &[]);
    assert_eq!(failed.code, Some(2), "{}", failed.stdout);
    let found = format!(" is 3 bytes, git blob {}: expected 3 bytes, git blob ", "0".repeat(40));
    assert!(failed.stderr.contains(&found), "{}", failed.stderr);
}

#[test]
fn what_the_hub_refuses() {
    let (lab, server) = place();
    let out = text_of(&lab.out());
    let arguments = ["publish", &out, "--to", "hub:me/tiny-GPTQ"];
    on_hub(&lab, &server, "", &arguments).fails_with(
        "error: the Hub refused to publish to me/tiny-GPTQ: that needs a token with the right to write\n\
         hint: set HF_TOKEN, or log in: hf auth login",
    );
    let wrong = on_hub(&lab, &server, "hf_another", &arguments);
    assert_eq!(wrong.code, Some(2));
    assert!(
        wrong.stderr.contains("Invalid credentials") && wrong.stderr.contains("hint: check HF_TOKEN"),
        "{}",
        wrong.stderr
    );
    for (to, problem) in [
        ("hub:tiny", "`tiny` is not the name of a repository"),
        ("s3:tiny", "expected hub:OWNER/NAME, git:ADDRESS or git:PATH"),
    ] {
        let failed = lab.run(&["publish", &out, "--to", to]);
        assert!(failed.code == Some(2) && failed.stderr.contains(problem), "{}", failed.stderr);
    }
    assert!(server.store().is_empty());
}

#[test]
fn a_gated_source_asks_for_its_licence_by_name() {
    let (lab, server) = place();
    let card = "---\nlicense: other\nlicense_name: llama2\nextra_gated_prompt: please\n---\n# Llama";
    fs::write(lab.out().join("source-card.md"), card).unwrap();
    publish(&lab, &server, &[]).fails_with(
        "error: `model` is gated under the licence `llama2`, which also holds for quantized copies\n\
         hint: read it; if you accept it, publish with --accept-license llama2",
    );
    let other = publish(&lab, &server, &["--accept-license", "mit"]);
    assert_eq!(other.code, Some(2));
    assert!(server.store().is_empty());
    publish(&lab, &server, &["--accept-license", "Llama2"]).succeeds();
    is_published(&lab, &server, ID, "main");
}

/// What the card tells people to do, from end to end: a model and texts from the Hub, four branches, back to the Hub, one
/// of them fetched again by another machine and evaluated to the same numbers.
#[test]
fn from_the_hub_to_the_hub() {
    let (lab, server) = (Lab::empty(), HubServer::start().with_xet());
    let source = demo("config.json").parent().unwrap().to_owned();
    let names = entries(&source).into_iter().filter(|name| !name.ends_with(".parquet"));
    let mut files: Vec<_> = names.map(|name| (name.clone(), fs::read(source.join(name)).unwrap())).collect();
    let card = "---\nlicense: apache-2.0\nlanguage: en\n---\n# Demo\n\nWords of the source.\n";
    files.push(("README.md".into(), card.as_bytes().to_vec()));
    files.push(("LICENSE".into(), b"a licence".to_vec()));
    server.store().insert("models/some/demo".into(), Repository::of(files));
    let texts = [("train", "calibration"), ("test", "evaluation")].map(|(split, file)| {
        let name = format!("wikitext-2-raw-v1/{split}-00000-of-00001.parquet");
        (name, fs::read(demo(&format!("{file}.parquet"))).unwrap())
    });
    let mut wikitext = Repository::of(texts);
    // The commit that the recipe names.
    let commit = "b08601e04326c79dfdd32d625aee71d232d685c3".to_owned();
    let tree = wikitext.tree("main").clone();
    wikitext.commits.insert(commit, tree);
    server.store().insert("datasets/Salesforce/wikitext".into(), wikitext);

    let seen = watch_processes(|| {
        let out = text_of(&lab.out());
        let sizes = ["--samples", "4", "--seq-len", "64"];
        let quantize = ["quantize", "--model", "some/demo", "--out", &out, "--eval-windows", "2"];
        on_hub(&lab, &server, TOKEN, &[&quantize[..], &sizes].concat()).succeeds();
        let report = read_json(&lab.out().join("run.json"));
        assert_eq!(report["model"]["name"], "demo");
        assert_eq!(report["model"]["source"]["repository"], "some/demo");
        assert_eq!(
            report["calibration"]["sources"][0]["revision"],
            "b08601e04326c79dfdd32d625aee71d232d685c3"
        );
        assert_eq!(report["branches"].as_array().unwrap().len(), 4);

        let to = ["publish", &out, "--to", "hub:me/demo-GPTQ", "--verbose"];
        let published = on_hub(&lab, &server, TOKEN, &to).succeeds();
        for branch in report["branches"].as_array().unwrap() {
            is_published(&lab, &server, "models/me/demo-GPTQ", branch["branch"].as_str().unwrap());
        }
        let tree = server.store()["models/me/demo-GPTQ"].tree(ACT).clone();
        let card = String::from_utf8(tree["README.md"].bytes.to_vec()).unwrap();
        for part in [
            "base_model: some/demo\n",
            "license: apache-2.0\n",
            "quantized_by: me\n",
            "Words of the source.",
            "(LICENSE)",
        ] {
            assert!(card.contains(part), "{part}: {card}");
        }

        // Another machine, and the command that the card names.
        let command = format!("gptq eval --model some/demo --quantized me/demo-GPTQ:{ACT}");
        assert!(card.contains(&command), "{card}");
        let other = Lab::empty();
        let mut eval: Vec<&str> = command.split(' ').skip(1).collect();
        eval.extend(["--seq-len", "64", "--windows", "2", "--json"]);
        let evaluated = on_hub(&other, &server, TOKEN, &eval).json();
        let measured = report["evaluations"][0]["models"].as_array().unwrap();
        let measured = measured.iter().find(|model| model["name"] == ACT).unwrap();
        let again = &evaluated["evaluations"][0]["models"][0];
        assert_eq!(again["name"], format!("demo-GPTQ:{ACT}"));
        for figure in ["perplexity", "perplexity_change", "kl_divergence", "top1_agreement"] {
            assert_eq!(again[figure], measured[figure], "{figure}");
        }
        // The cache keeps what the Hub has, and nothing else.
        let cached = files_below(&other.path("hf-home/hub"));
        assert!(cached.iter().any(|file| file.ends_with("model.safetensors")), "{cached:?}");
        assert!(!cached.iter().any(|file| file.ends_with("eval.json")), "{cached:?}");

        // A run of a fetched model is compared and judged as any other.
        let compared =
            on_hub(&lab, &server, TOKEN, &["report", &out, "--model", "some/demo", "--json", "-"]).json();
        assert_eq!(compared["source"]["name"], "demo");
        assert_eq!(compared["entries"].as_array().unwrap().len(), 4);
        let thresholds = lab.write("thresholds.toml", LOOSE);
        let gate = |flags: &[&str]| {
            let baseline = text_of(&lab.path("baseline.json"));
            let gate = ["gate", &out, "--baseline", &baseline, "--thresholds", &thresholds];
            lab.run(&[&gate[..], flags].concat()).succeeds();
        };
        gate(&["--update"]);
        gate(&[]);
        is_without_token(&lab, &server, &published);
    });
    assert!(seen.iter().any(|line| line.contains("publish")), "the processes were looked at");
    assert!(!seen.iter().any(|line| line.contains(TOKEN)), "{seen:?}");
}

/// Neither in what was printed, nor in any file, nor in anything that the Hub was given.
#[track_caller]
fn is_without_token(lab: &Lab, server: &HubServer, output: &Output) {
    let printed = format!("{}{}", output.stdout, output.stderr);
    assert!(!printed.contains(TOKEN) && printed.contains("sending"), "{printed}");
    let has_token = |bytes: &[u8]| bytes.windows(TOKEN.len()).any(|part| part == TOKEN.as_bytes());
    for file in files_below(&lab.path("")) {
        assert!(!has_token(&fs::read(lab.path("").join(&file)).unwrap_or_default()), "{}", file.display());
    }
    for (id, repository) in &*server.store() {
        for tree in repository.commits.values() {
            for (path, blob) in tree {
                assert!(!has_token(&blob.bytes), "{id}: {path}");
            }
        }
    }
}

/// The command lines of all processes that there are while `work` goes on.
fn watch_processes(work: impl FnOnce()) -> Vec<String> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut seen = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                for entry in fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
                    let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                    let line = String::from_utf8_lossy(&line).replace('\0', " ");
                    if line.contains("gptq") && !seen.contains(&line) {
                        seen.push(line);
                    }
                }
                thread::sleep(Duration::from_millis(5));
            }
            seen
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        stop.store(true, Ordering::Relaxed);
        let seen = watcher.join().unwrap();
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        seen
    })
}

#[test]
fn what_is_evaluated_from_the_hub_leaves_its_cache_alone() {
    let (lab, server) = place();
    publish(&lab, &server, &[]).succeeds();
    let (model, text) = (text_of(&lab.model()), text_of(&demo("evaluation.parquet")));
    let branch = format!("me/tiny-GPTQ:{ACT}");
    let arguments = [
        "eval",
        "--model",
        &model,
        "--quantized",
        &branch,
        "--dataset",
        &text,
        "--seq-len",
        "64",
        "--windows",
        "2",
        "--json",
    ];
    let evaluated: Value = on_hub(&lab, &server, TOKEN, &arguments).json();
    assert_eq!(evaluated["evaluations"][0]["model"], "model");
    let snapshots = lab.path("hf-home/hub/models--me--tiny-GPTQ/snapshots");
    let [commit] = &entries(&snapshots)[..] else { panic!("one snapshot") };
    assert!(!Path::new(&snapshots).join(commit).join("eval.json").exists());
    on_hub(&lab, &server, TOKEN, &["verify", &branch]).succeeds();
    let inspected = on_hub(&lab, &server, TOKEN, &["inspect", &branch, "--json"]).json();
    assert_eq!(inspected["quantization"]["group_size"], 32);
    on_hub(&lab, &server, TOKEN, &["generate", &branch, "--prompt", "The", "--max-tokens", "2"]).succeeds();
}
