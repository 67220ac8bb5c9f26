//! Runs that end early, however they end, and go on to the same bytes.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use gptq::{
    Error, JournalError, Result,
    accuracy::Quality,
    calibration::{CorpusSource, SourceOptions, Tokenizer, Tokens},
    checkpoint::Checkpoint,
    cluster::Cluster,
    pipeline::{self, Begun, CalibrationText, Place, Run},
    plan::{ComputeDtype, Plan},
    progress::{Event, Progress},
    report::Report,
};

use serde_json::Value;

use crate::{
    helpers::{Lab, copy, demo, digests, entries, text_of},
    safetensors_file,
    tiny_model::Model,
};

/// Asks a run to stop when this many layers are finished.
struct StopAfter<'a> {
    layers: Option<usize>,
    stop: &'a AtomicBool,
}

impl Progress for StopAfter<'_> {
    fn begin(&self, _phase: &str, _total: u64) {}

    fn advance(&self, _steps: u64) {}

    fn event(&self, event: &Event<'_>) {
        if let Event::Layer { done, .. } = event {
            self.stop.fetch_or(self.layers == Some(*done), Ordering::Relaxed);
        }
    }
}

fn plan(variants: &[&str]) -> Plan {
    Plan {
        dataset: vec![text_of(&demo("evaluation.parquet")).as_str().into()],
        samples: 6,
        seq_len: 64,
        variants: variants.iter().map(|v| v.parse().unwrap()).collect(),
        ..Plan::default()
    }
}

/// Runs the plan in this program; with `stop_after`, until so many layers are finished.
fn run(model: &Path, plan: &Plan, place: &Place<'_>, stop_after: Option<usize>) -> Result<Report> {
    let checkpoint = Checkpoint::open(model)?;
    let corpus = CorpusSource::resolve(&plan.dataset[0].name, &SourceOptions::default())?.load(None)?;
    let tokenizer = Tokenizer::open(model)?;
    let tokens = Tokens::new(&corpus, &tokenizer, checkpoint.config().vocab_size)?;
    let stop = AtomicBool::new(false);
    let run = Run {
        plan,
        checkpoint: &checkpoint,
        texts: &[CalibrationText { tokens, provenance: corpus.provenance() }],
        place: *place,
        command: &[],
        stop: &stop,
        cluster: &Cluster::alone(),
    };
    pipeline::quantize(&run, &StopAfter { layers: stop_after, stop: &stop })?.complete()
}

/// A run of the tiny model's two layers that ended after the first.
fn interrupted(lab: &Lab, plan: &Plan) -> PathBuf {
    let out = lab.path("interrupted");
    let error = run(&lab.model(), plan, &Place::new(&out), Some(1)).unwrap_err();
    assert!(matches!(error, Error::Interrupted), "{error}");
    let begun = Begun { layers: 1, total_layers: 2, ..Begun::default() };
    assert_eq!(pipeline::begun(&Place::new(&out)), Some(begun));
    out
}

fn corrupted(lab: &Lab, from: &Path, name: &str, damage: impl FnOnce(&Path)) -> Error {
    let out = lab.path(name);
    copy(from, &out);
    damage(&out);
    let before = digests(&out);
    let error = run(&lab.model(), &plan(&["4bit-32g", "3bit-64g-act"]), &Place::new(&out), None).unwrap_err();
    let kept: Vec<_> = digests(&out).into_iter().filter(|(name, _)| !name.ends_with("lock")).collect();
    let before: Vec<_> = before.into_iter().filter(|(name, _)| !name.ends_with("lock")).collect();
    assert_eq!(kept, before, "{error}: what is there is left as it is");
    error
}

fn flip_last_bit(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn every_configuration_goes_on_to_the_same_bytes() {
    let lab = Lab::new();
    let all =
        plan(&["4bit-32g-act", "2bit-64g", "3bit-64g-act", "8bit--1g", "4bit-32g-static", "4bit-32g-asym"]);
    let plans = [
        all.clone(),
        Plan { shared_hessian: true, ..all },
        Plan { max_shard_size: 1_000_000, ..plan(&["4bit-32g-act"]) },
        Plan { device: "cpu,cpu".into(), ..plan(&["4bit-32g", "4bit-32g-act"]) },
        Plan { compute_dtype: ComputeDtype::Bf16, ..plan(&["4bit-32g"]) },
        Plan { quality: Quality::Best, ..plan(&["4bit-32g", "2bit-64g-act"]) },
        Plan {
            quality: Quality::Best,
            shared_hessian: true,
            device: "cpu,cpu".into(),
            ..plan(&["4bit-32g", "4bit-32g-act"])
        },
        Plan { rotate: Some(true), ..plan(&["4bit-32g"]) },
        plan(&["4bit-32g", "q4_0", "q4_k_m"]),
        Plan { quality: Quality::Best, ..plan(&["q4_k_m"]) },
        Plan { shared_hessian: true, ..plan(&["q3_k_m", "4bit-32g"]) },
        // Two variants of one kind of forward passes and one of another, on two devices.
        Plan { device: "cpu,cpu".into(), ..plan(&["8bit-32g", "4bit-32g", "4bit-32g-act"]) },
        // Windows of one variant on two devices.
        Plan { quality: Quality::Best, device: "cpu,cpu".into(), ..plan(&["4bit-32g"]) },
    ];
    for (i, plan) in plans.iter().enumerate() {
        let place = lab.path(&format!("whole-{i}"));
        let whole = run(&lab.model(), plan, &Place::new(&place), None).unwrap();
        assert!(whole.resumed.is_empty());
        let out = lab.path(&format!("ended-{i}"));
        let ended = run(&lab.model(), plan, &Place::new(&out), Some(1));
        assert!(matches!(ended, Err(Error::Interrupted)));
        assert!(entries(&out).iter().all(|name| name.ends_with(".partial")), "{:?}", entries(&out));
        let report = run(&lab.model(), plan, &Place::new(&out), None).unwrap();
        assert_eq!(digests(&out), digests(&place), "{plan:?}");
        let parts: Vec<_> = report.resumed.iter().map(|part| (part.first, part.count)).collect();
        assert_eq!((parts, report.layer_seconds.len()), (vec![(0, 1), (1, 1)], 2));
        let linears: Vec<_> = report.branches.iter().map(|branch| branch.linears.len()).collect();
        assert_eq!(linears, vec![14; plan.variants.len()]);
    }
}

#[test]
fn the_journal_can_lie_elsewhere_and_goes_when_the_run_is_complete() {
    let lab = Lab::new();
    let plan = plan(&["4bit-32g"]);
    let (out, journals) = (lab.out(), lab.path("journals"));
    let place = Place { journal_dir: Some(&journals), ..Place::new(&out) };
    run(&lab.model(), &plan, &place, Some(1)).unwrap_err();
    assert_eq!(entries(&out), [".gptq-4bit-32g-actorder_False.partial"]);
    let journal = journals.join(&entries(&journals)[0]);
    // The variant's hidden states, and the unquantized model's.
    assert_eq!(entries(&journal), ["hidden-1-0", "hidden-1-1", "lock", "state.json"]);

    // Without it, what is there is neither used nor lost.
    let error = run(&lab.model(), &plan, &Place::new(&out), None).unwrap_err();
    assert!(error.to_string().contains("holds a run that was begun, whose journal is not in"), "{error}");
    assert_eq!(entries(&out), [".gptq-4bit-32g-actorder_False.partial"]);

    run(&lab.model(), &plan, &place, None).unwrap();
    assert_eq!(entries(&out), ["gptq-4bit-32g-actorder_False", "run.json"]);
    assert!(entries(&journals).is_empty());
}

#[test]
fn a_run_begun_otherwise_is_refused_with_what_differs() {
    let lab = Lab::new();
    let then = plan(&["4bit-32g"]);
    let out = interrupted(&lab, &then);
    let before = digests(&out);
    let refused = |plan: &Plan, model: &Path| {
        let error = run(model, plan, &Place::new(&out), None).unwrap_err();
        assert!(matches!(error, Error::Journal(JournalError::Differs { .. })), "{error}");
        assert!(error.hint().unwrap().contains("--restart"));
        assert_eq!(digests(&out), before, "{error}: nothing is touched");
        error.to_string().split("different: ").nth(1).unwrap().to_owned()
    };
    let damp = Plan { damp: Some(0.05), ..then.clone() };
    assert_eq!(refused(&damp, &lab.model()), "damp (unset then, 0.05 now)");
    let variants = plan(&["4bit-32g-act"]);
    assert_eq!(refused(&variants, &lab.model()), "variants (4bit-32g then, 4bit-32g-act now)");
    let text = Plan { dataset: vec![text_of(&demo("calibration.parquet")).as_str().into()], ..then.clone() };
    let differences = refused(&text, &lab.model());
    assert!(
        differences.contains("dataset (evaluation.parquet then, calibration.parquet now)"),
        "{differences}"
    );
    assert!(differences.contains("the calibration tokens ("), "{differences}");

    // The same in name and shape, with one weight more or less.
    let other = lab.path("other");
    Model::default().write(&other);
    safetensors_file::change(&other, |tensors| {
        tensors.get_mut("model.layers.1.mlp.up_proj.weight").unwrap().bytes[0] ^= 1;
    });
    assert!(refused(&then, &other).starts_with("the model's weights ("));

    // Where and with how much memory it is computed may differ.
    let free = Plan { max_memory: Some(1 << 40), device: "auto".into(), ..then };
    run(&lab.model(), &free, &Place::new(&out), None).unwrap();
}

#[test]
fn restart_throws_the_old_run_away() {
    let lab = Lab::new();
    let out = interrupted(&lab, &plan(&["4bit-32g"]));
    let other = plan(&["4bit-64g-act"]);
    let place = Place { restart: true, ..Place::new(&out) };
    assert!(run(&lab.model(), &other, &place, None).unwrap().resumed.is_empty());
    assert_eq!(entries(&out), ["gptq-4bit-64g-actorder_True", "run.json"]);
    // A complete run is nothing to restart.
    assert!(matches!(run(&lab.model(), &other, &place, None), Err(Error::OutputExists { .. })));
}

#[test]
fn a_damaged_journal_is_named_and_never_used() {
    let lab = Lab::new();
    let from = interrupted(&lab, &plan(&["4bit-32g", "3bit-64g-act"]));
    let journal = ".journal.partial";
    let state = |out: &Path| out.join(journal).join("state.json");
    let hidden = |out: &Path| out.join(journal).join("hidden-1-1");

    let error = corrupted(&lab, &from, "flipped", |out| flip_last_bit(&state(out))).to_string();
    assert!(
        error.contains("state.json` cannot be resumed: it is not what was written (checksum)"),
        "{error}"
    );
    let error = corrupted(&lab, &from, "cut", |out| {
        let text = fs::read(state(out)).unwrap();
        fs::write(state(out), &text[..text.len() / 2]).unwrap();
    });
    assert!(error.to_string().contains("(checksum)"), "{error}");
    assert!(error.hint().unwrap().contains("--restart"));
    let error = corrupted(&lab, &from, "empty", |out| fs::write(state(out), "").unwrap()).to_string();
    assert!(error.contains("it is cut off"), "{error}");
    let error = corrupted(&lab, &from, "hidden", |out| flip_last_bit(&hidden(out))).to_string();
    assert!(error.contains("hidden-1-1` cannot be resumed: window 5 is not what was written"), "{error}");
    let error = corrupted(&lab, &from, "short", |out| {
        let bytes = fs::read(hidden(out)).unwrap();
        fs::write(hidden(out), &bytes[1..]).unwrap();
    });
    assert!(error.to_string().contains("bytes, where"), "{error}");
    let error = corrupted(&lab, &from, "missing", |out| fs::remove_file(hidden(out)).unwrap()).to_string();
    assert!(error.contains("cannot open") && error.contains("hidden-1-1"), "{error}");

    // Half of it from a run on other text.
    let text = Plan { seed: 9, ..plan(&["4bit-32g", "3bit-64g-act"]) };
    let other = lab.path("another");
    run(&lab.model(), &text, &Place::new(&other), Some(1)).unwrap_err();
    let error = corrupted(&lab, &from, "half", |out| {
        fs::copy(hidden(&other), hidden(out)).unwrap();
    });
    assert!(error.to_string().contains("hidden-1-1` cannot be resumed: window 0"), "{error}");

    // The branches are part of what is gone on with.
    let branch = ".gptq-3bit-64g-actorder_True.partial";
    let error = corrupted(&lab, &from, "tensor", |out| {
        let path = out.join(branch).join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let header = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        let json: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
        let offset = &json["model.layers.0.mlp.up_proj.qweight"]["data_offsets"][0];
        bytes[8 + header + offset.as_u64().unwrap() as usize] ^= 4;
        fs::write(&path, bytes).unwrap();
    });
    assert!(
        error.to_string().contains("tensor `model.layers.0.mlp.up_proj.qweight` is not what was written")
    );
    let error = corrupted(&lab, &from, "truncated", |out| {
        let file =
            fs::OpenOptions::new().write(true).open(out.join(branch).join("model.safetensors")).unwrap();
        file.set_len(1000).unwrap();
    });
    assert!(error.to_string().contains("1000 bytes, where"), "{error}");
}
