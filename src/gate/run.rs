//! The checks of a run as a whole.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{
    checklist::{Checklist, size},
    figures::{EvaluationFigures, Figures, ModelFigures},
    thresholds::Thresholds,
};
use crate::variant::{Output, Variant};

/// Settings of a plan that change what the branches hold; the device and the size of files do not.
const PLAN: [&str; 8] =
    ["dataset", "split", "text-column", "samples", "seq-len", "seed", "damp", "shared-hessian"];

/// There must be branches, and none twice.
pub(super) fn branches(checklist: &mut Checklist<'_>, run: &Figures) {
    let mut names = BTreeSet::new();
    let twice: Vec<&str> =
        run.branches.iter().map(|b| b.branch.as_str()).filter(|name| !names.insert(*name)).collect();
    if run.branches.is_empty() {
        checklist.breach("branches", "the report has no branches".into());
    } else if !twice.is_empty() {
        checklist.breach("branches", format!("the report has branches twice: {}", twice.join(", ")));
    }
}

/// The branches of the plan and of the baseline must be there.
pub(super) fn missing_branches(checklist: &mut Checklist<'_>, run: &Figures, baseline: Option<&Figures>) {
    let variants = run.plan.get("variants").and_then(Value::as_array);
    let main = run.plan.get("main").and_then(|value| value.as_str()?.parse::<Variant>().ok());
    let branch = |value: &Value| Some(value.as_str()?.parse::<Output>().ok()?.branch(main));
    let planned = variants.and_then(|variants| variants.iter().map(branch).collect::<Option<Vec<_>>>());
    let Some(planned) = planned.filter(|planned| !planned.is_empty()) else {
        let finding = "the report has no planned branches, or they cannot be read";
        return checklist.breach("max-missing-branches", finding.into());
    };
    let known = baseline.into_iter().flat_map(|baseline| &baseline.branches).map(|b| b.branch.clone());
    let expected: BTreeSet<String> = known.chain(planned).collect();
    let whose = if baseline.is_some() { "the plan and the baseline" } else { "the plan" };
    let is_there = |name: &String| run.branches.iter().any(|b| b.branch == *name);
    let missing: Vec<&str> = expected.iter().filter(|name| !is_there(name)).map(String::as_str).collect();
    let finding = match missing.len() {
        0 => format!("all {} branches of {whose} are there", expected.len()),
        count => {
            format!("{count} of {} branches of {whose} are missing: {}", expected.len(), missing.join(", "))
        }
    };
    let limit = checklist.limits["max-missing-branches"];
    let finding = format!("{finding}; at most {limit} may be missing");
    checklist.check("max-missing-branches", missing.len() as f64 > limit, finding);
}

/// Thresholds must not name unknown branches: after a typing error they would have no effect.
pub(super) fn thresholds(
    checklist: &mut Checklist<'_>,
    run: &Figures,
    baseline: Option<&Figures>,
    thresholds: &Thresholds,
) {
    let all = [Some(run), baseline].into_iter().flatten().flat_map(|figures| &figures.branches);
    let known: Vec<&str> = all.map(|b| b.branch.as_str()).collect();
    for name in thresholds.branches.keys().filter(|name| !known.contains(&name.as_str())) {
        let finding = format!("thresholds name branch {name}, which neither the run nor the baseline has");
        checklist.breach("thresholds", finding);
    }
}

/// Both runs must be of the same model.
pub(super) fn model(checklist: &mut Checklist<'_>, run: &Figures, baseline: &Figures) {
    let digests = |f: &Figures| f.evaluations.iter().map(|e| e.model_digest.clone()).collect::<BTreeSet<_>>();
    let shape = |f: &Figures| (f.model.layers, f.model.hidden_size, f.model.parameters);
    let text = |f: &Figures| {
        let ModelFigures { name, layers, hidden_size, parameters, .. } = &f.model;
        let digests: Vec<String> = digests(f).iter().map(|digest| short(digest)).collect();
        let digests = digests.join(" and ");
        format!("{name} ({layers} layers, hidden {hidden_size}, {parameters} parameters, digest {digests})")
    };
    let digest = digests(run);
    let same = shape(run) == shape(baseline)
        && run.model.layers > 0
        && digest == digests(baseline)
        && digest.len() == 1;
    let finding = match same {
        true => format!("the model is the baseline's: {}", text(run)),
        false => format!("the model is {}, and the baseline is for {}", text(run), text(baseline)),
    };
    checklist.check("model", !same, finding);
}

/// There must be evaluations, each of a known model and text, and none twice.
pub(super) fn evaluated(checklist: &mut Checklist<'_>, figures: &Figures, whose: &str) {
    let evaluations = &figures.evaluations;
    if evaluations.is_empty() {
        return checklist.breach("evaluation", format!("{whose} has no evaluation"));
    }
    for (i, evaluation) in evaluations.iter().enumerate() {
        let needed = [&evaluation.sha256, &evaluation.model_digest, &evaluation.compute];
        if needed.iter().any(|text| text.is_empty()) {
            let finding = format!("{whose} has no model, tokens or data type for its evaluation {}", i + 1);
            checklist.breach("evaluation", finding);
        }
        if evaluations[..i].iter().any(|other| other.same_protocol(evaluation)) {
            checklist
                .breach("evaluation", format!("{whose} has two evaluations on {}", evaluation.in_full()));
        }
    }
}

/// Every text of the baseline must have been evaluated in the run, in the same way.
pub(super) fn protocol(checklist: &mut Checklist<'_>, run: &Figures, baseline: &Figures) {
    for expected in &baseline.evaluations {
        let wanted = expected.in_full();
        if run.evaluations.iter().any(|evaluation| evaluation.same_protocol(expected)) {
            checklist.check("protocol", false, format!("evaluated as the baseline was: on {wanted}"));
            continue;
        }
        let found: Vec<String> = run.evaluations.iter().map(EvaluationFigures::in_full).collect();
        let found = if found.is_empty() { "nothing".to_owned() } else { found.join(" and on ") };
        checklist.breach("protocol", format!("evaluated on {found}, and the baseline on {wanted}"));
    }
}

fn short(digest: &str) -> String {
    digest.chars().take(12).collect()
}

/// Time and memory.
pub(super) fn costs(checklist: &mut Checklist<'_>, run: &Figures) {
    checklist.bounded("max-seconds", "time of the run", run.seconds, seconds);
    checklist.bounded("max-memory", "peak memory", run.peak_memory_bytes, size);
}

/// Time and memory beside the baseline's.
pub(super) fn growing_costs(checklist: &mut Checklist<'_>, run: &Figures, baseline: &Figures) {
    let (now, before) = (run.seconds, baseline.seconds);
    checklist.grows_at_most("max-seconds-growth", "time of the run", now, before, seconds);
    let (now, before) = (run.peak_memory_bytes, baseline.peak_memory_bytes);
    checklist.grows_at_most("max-memory-growth", "peak memory", now, before, size);
}

fn seconds(seconds: f64) -> String {
    format!("{seconds:.1} s")
}

/// Settings and tokens that differ from the baseline's: `damp 1, the baseline's is 0.01`.
pub(super) fn differences(run: &Figures, baseline: &Figures) -> Vec<String> {
    let shown = |value: Option<&Value>| value.map_or_else(|| "not set".to_owned(), Value::to_string);
    let mut differences: Vec<String> = PLAN
        .iter()
        .map(|key| (key, run.plan.get(*key), baseline.plan.get(*key)))
        .filter(|(_, now, before)| now != before)
        .map(|(key, now, before)| format!("{key} {}, the baseline's is {}", shown(now), shown(before)))
        .collect();
    if differences.is_empty() && run.calibration.sha256 != baseline.calibration.sha256 {
        differences.push("calibrated on other tokens than the baseline, by the same plan".into());
    }
    differences
}
