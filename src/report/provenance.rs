//! What is needed to make a run again.

use super::{Comparison, Evaluation, LayersComputed, RunSummary, SourceReport};

/// A heading and its facts: name and value.
pub(super) type Facts = (String, Vec<(String, String)>);

/// Of every run, then of every measurement.
pub(super) fn all(comparison: &Comparison) -> Vec<Facts> {
    let runs = comparison.runs.iter().map(run);
    runs.chain(comparison.protocols.iter().map(protocol)).collect()
}

fn run(run: &RunSummary) -> Facts {
    let report = &run.report;
    let (plan, calibration, compute) = (&report.plan, &report.calibration, &report.compute);
    let mut facts: Vec<(&str, String)> = Vec::new();
    if !report.command.is_empty() {
        facts.push(("command", command(&report.command)));
    }
    facts.push(("made by", report.generated_by.clone()));
    let model = &report.model;
    facts.push((
        "model",
        format!("{} ({} layers, {} parameters)", model.name, model.layers, model.parameters),
    ));
    let variants: Vec<String> = plan.variants.iter().map(ToString::to_string).collect();
    facts.push(("variants", variants.join(", ")));
    let hessians =
        if plan.shared_hessian { "of the unquantized model" } else { "of the quantized model so far" };
    facts.push(("damping, seed, Hessians", format!("{}, {}, {hessians}", plan.damp, plan.seed)));
    facts.push((
        "calibration",
        format!(
            "{} windows of {} tokens of {}",
            calibration.samples,
            calibration.seq_len,
            calibration.names()
        ),
    ));
    for SourceReport { provenance: source, samples, .. } in &calibration.sources {
        if let (Some(samples), true) = (samples, calibration.sources.len() > 1) {
            facts.push(("text", format!("{}, {samples} windows", source.dataset)));
        }
        if let Some(repository) = &source.repository {
            let revision = source.revision.as_deref().unwrap_or("unknown");
            facts.push(("text from", format!("{repository}, revision {revision}")));
        }
        for file in &source.files {
            facts.push(("text file", format!("{}, sha256 {}", file.name, file.sha256)));
        }
    }
    facts.push(("calibration tokens", format!("sha256 {}", calibration.sha256)));
    facts.push((
        "computed",
        format!(
            "{} on {}, solver {}, {} threads",
            compute.dtype, compute.device, compute.solver, compute.threads
        ),
    ));
    for part in &report.resumed {
        let LayersComputed { first, count, compute } = part;
        facts.push((
            "went on",
            format!(
                "{count} layers from layer {first}: {} on {}, {} threads",
                compute.dtype, compute.device, compute.threads
            ),
        ));
    }
    facts.extend(report.warnings.iter().map(|warning| ("warning", warning.clone())));
    (format!("Run {}", run.name), owned(facts))
}

fn protocol(protocol: &Evaluation) -> Facts {
    let Evaluation { model, dataset, seq_len, windows, stride, .. } = protocol;
    let words =
        ["gptq", "eval", "--model", model, "--quantized", "FOLDER", "--dataset", dataset].map(str::to_owned);
    let numbers = [("--seq-len", seq_len), ("--windows", windows), ("--stride", stride)];
    let numbers = numbers.into_iter().filter(|(flag, n)| *flag != "--stride" || *n != seq_len);
    let numbers = numbers.flat_map(|(flag, number)| [flag.to_owned(), number.to_string()]);
    let facts = vec![
        ("command", command(&words.into_iter().chain(numbers).collect::<Vec<_>>())),
        ("unquantized model", format!("{}, digest {}", protocol.model, protocol.model_digest)),
        ("tokens", format!("sha256 {}", protocol.sha256)),
        ("how", protocol.protocol.trim_start_matches("Protocol: ").to_owned()),
    ];
    let name = format!("Measured on {}, windows of {}", protocol.dataset, protocol.seq_len);
    (name, owned(facts))
}

fn owned(facts: Vec<(&str, String)>) -> Vec<(String, String)> {
    facts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// The words as a shell reads them.
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
