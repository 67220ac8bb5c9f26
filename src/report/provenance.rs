//! Provenance of a run or an evaluation: commands, models, texts and their digests.

use super::{Comparison, ComputeReport, Evaluation, LayersComputed, RunSummary, SourceReport};
use crate::calibration::ProvenanceFile;

/// A heading and its facts: name and value.
pub(super) type Facts = (String, Vec<(&'static str, String)>);

/// The facts of every run, then of every evaluation.
pub(super) fn all(comparison: &Comparison) -> Vec<Facts> {
    let runs = comparison.runs.iter().map(run);
    runs.chain(comparison.protocols.iter().map(protocol)).collect()
}

fn run(run: &RunSummary) -> Facts {
    let report = &run.report;
    let (plan, calibration, model) = (&report.plan, &report.calibration, &report.model);
    let computed = |compute: &ComputeReport, solver: &str| {
        format!("{} on {}, {solver}{} threads", compute.dtype, compute.device, compute.threads)
    };
    let mut facts = Vec::new();
    if !report.command.is_empty() {
        facts.push(("command", command(&report.command)));
    }
    let variants: Vec<String> = plan.variants.iter().map(ToString::to_string).collect();
    let hessians =
        if plan.shared_hessian { "of the unquantized model" } else { "of the quantized model so far" };
    let (windows, length) = (calibration.samples, calibration.seq_len);
    facts.extend([
        ("made by", report.generated_by.clone()),
        ("model", format!("{} ({} layers, {} parameters)", model.name, model.layers, model.parameters)),
        ("variants", variants.join(", ")),
        ("damping, seed, Hessians", format!("{}, {}, {hessians}", plan.damp(), plan.seed)),
        ("calibration", format!("{windows} windows of {length} tokens of {}", calibration.names())),
    ]);
    for SourceReport { provenance: source, samples, .. } in &calibration.sources {
        if let (Some(samples), true) = (samples, calibration.sources.len() > 1) {
            facts.push(("text", format!("{}, {samples} windows", source.dataset)));
        }
        if let Some(repository) = &source.repository {
            let revision = source.revision.as_deref().unwrap_or("unknown");
            facts.push(("text from", format!("{repository}, revision {revision}")));
        }
        let file = |file: &ProvenanceFile| ("text file", format!("{}, sha256 {}", file.name, file.sha256));
        facts.extend(source.files.iter().map(file));
    }
    let solver = format!("solver {}, ", report.compute.solver);
    facts.push(("calibration tokens", format!("sha256 {}", calibration.sha256)));
    facts.push(("computed", computed(&report.compute, &solver)));
    for LayersComputed { first, count, compute } in &report.resumed {
        facts.push(("resumed", format!("{count} layers from layer {first}: {}", computed(compute, ""))));
    }
    facts.extend(report.warnings.iter().map(|warning| ("warning", warning.clone())));
    (format!("Run {}", run.name), facts)
}

fn protocol(protocol: &Evaluation) -> Facts {
    let Evaluation { model, dataset, seq_len, windows, stride, .. } = protocol;
    let words = ["gptq", "eval", "--model", model, "--quantized", "FOLDER", "--dataset", dataset];
    let mut words = words.map(str::to_owned).to_vec();
    words.extend(["--seq-len".into(), seq_len.to_string(), "--windows".into(), windows.to_string()]);
    if stride != seq_len {
        words.extend(["--stride".into(), stride.to_string()]);
    }
    let facts = vec![
        ("command", command(&words)),
        ("unquantized model", format!("{model}, digest {}", protocol.model_digest)),
        ("tokens", format!("sha256 {}", protocol.sha256)),
        ("how", protocol.protocol.trim_start_matches("Protocol: ").to_owned()),
    ];
    (format!("Measured on {dataset}, windows of {seq_len}"), facts)
}

/// The words quoted for a shell.
fn command(words: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=.,:/+@%".contains(c);
    let quoted = words.iter().map(|word| {
        if !word.is_empty() && word.chars().all(plain) {
            word.clone()
        } else {
            format!("'{}'", word.replace('\'', "'\\''"))
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_the_shell() {
        let words = ["gptq", "quantize", "--out", "my model", "it's", ""].map(str::to_owned);
        assert_eq!(command(&words), r"gptq quantize --out 'my model' 'it'\''s' ''");
    }
}
