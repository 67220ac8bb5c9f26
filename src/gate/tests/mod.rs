//! A good run, as small as one can be, and everything that can be wrong with one.

mod checks;
mod closed;
mod formats;

use serde_json::{Value, json};

use super::{Figures, Judgement, Thresholds, judge};

/// Windows of the one text.
const WINDOWS: usize = 6;
const MAIN: &str = "gptq-4bit-32g-actorder_True";
const OTHER: &str = "gptq-4bit-128g-actorder_True";

/// A run of two branches of a model of one layer.
fn run() -> Value {
    let linear = |i: usize| {
        json!({
            "name": format!("model.layers.0.l{i}"), "relative_error": 0.02 + 0.01 * i as f64,
            "damp_raised": 0, "dead_columns": 0,
        })
    };
    let branch = |name: &str, variant: &str| {
        let linears: Vec<Value> = (0..7).map(linear).collect();
        json!({ "branch": name, "variant": variant, "bytes": 1e6, "scale_bits": 11, "linears": linears })
    };
    // The windows differ from each other far more than a run from the next.
    let nll = |shift: f64| (0..WINDOWS).map(|w| 2.0 + 0.3 * w as f64 + shift).collect::<Vec<f64>>();
    let model = |name: &str| {
        json!({
            "name": name, "window_nll": nll(0.001),
            "window_kl": [0.010, 0.012, 0.008, 0.011, 0.009, 0.010], "window_top1": vec![0.95; WINDOWS],
        })
    };
    json!({
        "schema": "gptq-run/2",
        "generated_by": "gptq 0.1.0",
        "model": { "name": "demo", "layers": 1, "linears": 7, "hidden_size": 8, "parameters": 1000 },
        "plan": { "variants": ["4bit-32g-act", "4bit-128g-act"], "damp": 0.01, "seed": 0, "samples": 8 },
        "calibration": { "sha256": "c0ffee" },
        "compute": { "device": "cpu", "dtype": "fp32", "threads": 2 },
        "branches": [branch(MAIN, "4bit-32g-act"), branch(OTHER, "4bit-128g-act")],
        "seconds": 100.0,
        "peak_memory_bytes": 1e9,
        "evaluations": [{
            "dataset": "text", "sha256": "0123456789abcdef", "model_digest": "xxh3:1", "compute": "fp32",
            "windows": WINDOWS, "seq_len": 64, "stride": 64, "window_tokens": vec![63; WINDOWS],
            "window_nll": nll(0.0), "models": [model(MAIN), model(OTHER)],
        }],
    })
}

fn figures(value: &Value) -> Figures {
    serde_json::from_value(value.clone()).unwrap()
}

/// The run with one place in it changed.
fn changed(place: &str, value: Value) -> Value {
    let mut run = run();
    *run.pointer_mut(place).unwrap_or_else(|| panic!("no {place}")) = value;
    run
}

/// Judged by default thresholds against the good run.
fn judged(run: &Value) -> Judgement {
    judge(&figures(run), &figures(&self::run()), &Thresholds::default())
}

fn lines(judgement: &Judgement) -> Vec<String> {
    judgement.breaches().map(super::Check::line).collect()
}

/// Thresholds as a file would have them.
fn thresholds(text: &str) -> Thresholds {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    Thresholds::read(file.path()).unwrap()
}
