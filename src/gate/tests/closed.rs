//! Missing or incomparable figures are a reason to fail.

use serde_json::{Value, json};

use super::{MAIN, WINDOWS, changed, figures, judged, lines, run, thresholds};
use crate::gate::{Figures, Thresholds, Verdict, judge, judge_alone};

/// Requires that `run` fails, by itself or against the good run, with a line that begins so.
#[track_caller]
fn fails(run: &Value, reason: &str) {
    let found = lines(&judged(run));
    assert!(found.iter().any(|line| line.starts_with(reason)), "{reason}\n{found:#?}");
}

#[test]
fn an_empty_report_fails() {
    for value in [json!({}), json!({ "schema": "gptq-run/2", "branches": [], "evaluations": [] })] {
        fails(&value, "the report has no branches [branches]");
        fails(&value, "the report has no evaluation [evaluation]");
        let alone = judge_alone(&figures(&value), &Thresholds::default());
        assert!(matches!(alone.verdict(), Verdict::Fail(breaches) if breaches.len() == 3));
    }
    let empty = judge(&Figures::default(), &Figures::default(), &Thresholds::default());
    assert_ne!(empty.verdict(), Verdict::Pass);
}

/// A good run fails without any one of its parts: each number, text and list that the gate reads.
#[test]
fn whatever_is_missing_fails() {
    let limits = thresholds("max-seconds = 1000\nmax-memory = 1e10\nmax-size = 1e7\nsame-plan = true");
    let good = run();
    assert_eq!(judge(&figures(&good), &figures(&good), &limits).verdict(), Verdict::Pass);
    // What is for people, or says how it was computed; and a branch that is there all the same.
    let free =
        ["/schema", "/generated_by", "/compute", "/model/name", "/evaluations/0/dataset", "/plan/variants/"];
    let mut places = Vec::new();
    places_of(&good, &mut String::new(), &mut places);
    assert!(places.len() > 150, "{}", places.len());
    for place in places.iter().filter(|place| !free.iter().any(|free| place.starts_with(free))) {
        let mut less = good.clone();
        let (parent, key) = place.rsplit_once('/').unwrap();
        match less.pointer_mut(parent).unwrap() {
            Value::Object(map) => drop(map.remove(key)),
            Value::Array(list) => drop(list.remove(key.parse().unwrap())),
            _ => unreachable!("only these hold others"),
        }
        let verdict = judge(&figures(&less), &figures(&good), &limits).verdict();
        assert_ne!(verdict, Verdict::Pass, "without {place}");
        // A NaN is `null` in JSON.
        if good.pointer(place).unwrap().is_number() {
            let mut nan = good.clone();
            *nan.pointer_mut(place).unwrap() = Value::Null;
            if let Ok(nan) = serde_json::from_value(nan) {
                assert_ne!(judge(&nan, &figures(&good), &limits).verdict(), Verdict::Pass, "NaN at {place}");
            }
        }
    }
}

/// Every place in a JSON value, as pointers.
fn places_of(value: &Value, at: &mut String, places: &mut Vec<String>) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), value)).collect(),
        Value::Array(list) => list.iter().enumerate().map(|(i, value)| (i.to_string(), value)).collect(),
        _ => return,
    };
    for (key, value) in children {
        let length = at.len();
        at.push('/');
        at.push_str(&key);
        places.push(at.clone());
        places_of(value, at, places);
        at.truncate(length);
    }
}

#[test]
fn what_is_missing_is_named() {
    let models = "/evaluations/0/models/0";
    fails(
        &changed("/branches/0/bytes", Value::Null),
        &format!("{MAIN}: the report has no size, or it is not a number [max-size-growth]"),
    );
    fails(
        &changed("/branches/0/scale_bits", Value::Null),
        &format!("{MAIN}: the report has no significant bits"),
    );
    fails(
        &changed("/branches/0/linears", json!([])),
        &format!("{MAIN}: 0 of 7 linears were quantized [linears]"),
    );
    fails(
        &changed("/branches/0/linears/2/relative_error", Value::Null),
        &format!("{MAIN}: the report has no error of"),
    );
    fails(
        &changed(&format!("{models}/window_kl/3"), Value::Null),
        &format!("{MAIN}: KL divergence on text is missing or not a number in some windows [evaluation]"),
    );
    fails(
        &changed(&format!("{models}/window_kl"), json!(vec![0.01; 5])),
        &format!("{MAIN}: has KL divergence of 5 windows on text, expected 6 [evaluation]"),
    );
    fails(
        &changed(&format!("{models}/window_kl"), json!(vec![0.0; WINDOWS])),
        &format!("{MAIN}: KL divergence on text is 0, as of a model that is not quantized"),
    );
    fails(
        &changed(&format!("{models}/window_top1/0"), json!(1.5)),
        &format!("{MAIN}: top-1 agreement on text is no share"),
    );
    fails(
        &changed(&format!("{models}/name"), json!("mian")),
        &format!("{MAIN}: was not evaluated on text [evaluation]"),
    );
    fails(
        &changed("/plan/variants/0", json!("4bits")),
        "the report has no planned branches, or they cannot be read",
    );
    fails(&changed("/branches/1/branch", json!(MAIN)), &format!("the report has branches twice: {MAIN}"));
}

#[test]
fn a_baseline_of_something_else_fails() {
    for (place, value) in [
        ("/model/parameters", json!(1001)),
        ("/model/hidden_size", json!(9)),
        ("/evaluations/0/model_digest", json!("xxh3:2")),
    ] {
        fails(&changed(place, value), "the model is demo (1 layers, hidden");
    }
    for (place, value) in [
        ("/evaluations/0/sha256", json!("other")),
        ("/evaluations/0/seq_len", json!(32)),
        ("/evaluations/0/stride", json!(32)),
        ("/evaluations/0/compute", json!("bf16")),
        ("/evaluations/0/window_tokens/0", json!(62)),
    ] {
        fails(&changed(place, value), "evaluated on text, 6 windows of");
    }
    fails(
        &changed("/branches/0/variant", json!("4bit-32g")),
        &format!("{MAIN}: variant 4bit-32g, the baseline's is 4bit-32g-act [variant]"),
    );
    fails(
        &changed("/branches/0/linears/0/name", json!("other")),
        &format!("{MAIN}: the linears are not those of the baseline"),
    );
    // The baseline's own gaps are as bad.
    let good = figures(&run());
    for (place, value) in [
        ("/evaluations", json!([])),
        ("/branches/0/bytes", Value::Null),
        ("/branches/0/linears", json!([])),
        ("/evaluations/0/models/0/window_kl/0", Value::Null),
        ("/evaluations/0/models", json!([])),
        ("/branches", json!([])),
    ] {
        let judgement = judge(&good, &figures(&changed(place, value)), &Thresholds::default());
        assert_ne!(judgement.verdict(), Verdict::Pass, "{place}");
    }
}
