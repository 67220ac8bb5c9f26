//! The values that a template can use.

use std::{fs, path::Path};

use serde_json::{Value, json};

use super::{Address, CardOptions, card_folder, metadata, prompt, published_branch, source::SourceCard};
use crate::{
    emit::is_licence,
    error::Result,
    ggml::Mix,
    report::{BranchReport, EvaluatedModel, Evaluation, Interval, Report, not_loaded_by},
    units::bytes,
    variant::{GroupSize, Order, Output},
};

/// Reader of the column `ExLlama`.
const EXLLAMA: &str = "ExLlamaV2";

/// Reader of the section on vLLM.
const VLLM: &str = "vLLM 0.30 and newer";

/// The values for the card of the branch at `at`.
pub(super) fn facts(
    report: &Report,
    run: &Path,
    at: usize,
    source: &SourceCard,
    options: &CardOptions,
) -> Result<Value> {
    let own = &report.branches[at];
    let is_gguf = own.variant.gptq().is_none();
    let folder = card_folder(run, own);
    let prompt = match (&options.prompt_template, is_gguf) {
        (None, true) => prompt::of_gguf(&run.join(&own.branch))?,
        (given, _) => prompt::prompt(&folder, given.as_deref())?,
    };
    let vllm = report.branches.iter().filter(|branch| takes(branch, VLLM) == Some(true));
    Ok(json!({
        "metadata": metadata::block(report, is_gguf, source, options),
        "branch": published_branch(report, own),
        "is_gguf": is_gguf,
        "branches": branches(report).map(|branch| row(report, branch)).collect::<Vec<_>>(),
        "gguf_branch": gguf_files(report).next().map(|file| published_branch(report, file)),
        "gguf_files": gguf_files(report).filter_map(|file| gguf_row(report, file)).collect::<Vec<_>>(),
        "repository": options.repository.as_ref().map(Address::text),
        "on_hub": !matches!(options.repository, Some(Address::Git(_))),
        "quantized_by": options.quantized_by(),
        "model": {
            "name": report.model.name,
            "repository": options.base_model(report),
            "commit": report.model.source.as_ref().map(|source| &source.commit),
            "parameters": report.model.parameters,
        },
        "evaluations": report.evaluations.iter().map(evaluation).collect::<Vec<_>>(),
        "readers": readers(report),
        "vllm_branches": vllm.map(|branch| &branch.branch).collect::<Vec<_>>(),
        "recommendations": recommendations(report),
        "prompt": prompt,
        "licence": {
            "id": source.text_of("license"),
            "name": source.licence(),
            "link": source.text_of("license_link"),
            "files": if is_gguf { Vec::new() } else { licence_files(&folder) },
        },
        "calibration": report.calibration,
        "plan": report.plan,
        "compute": report.compute,
        "generated_by": report.generated_by,
        "command": report.command.join(" "),
        "warnings": report.warnings,
        "source_card": source.text,
    }))
}

/// The branches in GPTQ's format.
fn branches(report: &Report) -> impl Iterator<Item = &BranchReport> {
    report.branches.iter().filter(|branch| branch.variant.gptq().is_some())
}

fn gguf_files(report: &Report) -> impl Iterator<Item = &BranchReport> {
    report.branches.iter().filter(|file| file.variant.gptq().is_none())
}

/// A row of the table of GGUF files, with the divergence of the first evaluation; `None` for branches.
fn gguf_row(report: &Report, file: &BranchReport) -> Option<Value> {
    let Output::Gguf(mix) = file.variant else { return None };
    let measured = report.evaluations.first().and_then(|evaluation| evaluation.model_named(&file.branch));
    let use_case = match mix {
        Mix::Q2_K => "the smallest; a large loss of quality",
        Mix::Q3_K_M => "small; a noticeable loss of quality",
        Mix::Q4_0 => "the format that the most programs run fast; Q4_K_M is closer to the original",
        Mix::Q4_K_M => "a good balance of size and quality",
        Mix::Q5_K_M => "larger; a small loss of quality",
        Mix::Q6_K => "large; hardly any loss of quality",
        Mix::Q8_0 => "the largest; next to no loss of quality",
    };
    Some(json!({
        "name": file.branch,
        "method": mix.name(),
        "bits": file.variant.bits(),
        "bits_per_weight": format!("{:.2}", file.bits_per_weight),
        "size": bytes(file.bytes),
        "kl_divergence": measured.map(|model| shown(model.kl_divergence, 6)),
        "use_case": use_case,
    }))
}

/// A row of the table of branches, with the figures of the first evaluation.
fn row(report: &Report, branch: &BranchReport) -> Value {
    let variant = branch.variant;
    let measured = report.evaluations.first().and_then(|evaluation| evaluation.model_named(&branch.branch));
    let group_size = match variant.group_size() {
        GroupSize::PerChannel => "None".to_owned(),
        GroupSize::Features(size) => size.to_string(),
    };
    let act_order = match variant.order() {
        Order::Sequential => "No",
        Order::Act => "Yes",
        Order::ActStatic => "Yes, static groups",
    };
    let refusing = not_loaded_by(&branch.readers);
    json!({
        "branch": branch.branch,
        "variant": variant.to_string(),
        "bits": variant.bits(),
        "group_size": group_size,
        "act_order": act_order,
        "symmetric": variant.symmetric(),
        "damp": report.plan.damp().to_string(),
        "dataset": report.calibration.names(),
        "seq_len": report.calibration.seq_len,
        "size": bytes(branch.bytes),
        "exllama": if takes(branch, EXLLAMA) == Some(true) { "Yes" } else { "No" },
        "not_loaded_by": if refusing.is_empty() { "–".to_owned() } else { refusing.join(", ") },
        "perplexity": measured.map(|model| shown(model.perplexity, 4)),
        "kl_divergence": measured.map(|model| shown(model.kl_divergence, 6)),
        "description": description(report, branch),
    })
}

/// Differences of a branch from the others: its format, and its size and divergence where they are the smallest.
fn description(report: &Report, branch: &BranchReport) -> String {
    let mut parts = vec![match branch.variant.order() {
        Order::Sequential => "Groups of neighbouring features: `g_idx` is sequential.".to_owned(),
        Order::Act => "Act order: `g_idx` is a permutation.".to_owned(),
        Order::ActStatic => {
            "Act order with groups of neighbouring features: `g_idx` is sequential.".to_owned()
        }
    }];
    if !branch.variant.symmetric() {
        parts.push("Asymmetric zero points.".into());
    }
    let others = || report.branches.iter().filter(|other| other.branch != branch.branch);
    if others().next().is_some() && others().all(|other| other.bytes > branch.bytes) {
        parts.push("The smallest of these.".into());
    }
    if let Some(evaluation) = report.evaluations.first() {
        let divergence = |name: &str| {
            let found = evaluation.model_named(name)?.kl_divergence;
            found.margin.map(|margin| (found.value - margin, found.value + margin))
        };
        let others: Option<Vec<_>> = others().map(|other| divergence(&other.branch)).collect();
        match (divergence(&branch.branch), others) {
            // Only where the intervals leave no doubt.
            (Some((_, own)), Some(others))
                if !others.is_empty() && others.iter().all(|other| other.0 > own) =>
            {
                parts.push("The closest to the unquantized model, as measured below.".into());
            }
            _ => {}
        }
    }
    parts.join(" ")
}

/// For each maintained reader, the smallest of the branches that it loads, and the one with the smallest divergence. Readers that
/// load the same branches share an item.
fn recommendations(report: &Report) -> Vec<Value> {
    let mut choices: Vec<(Vec<&str>, Vec<&BranchReport>)> = Vec::new();
    let readers = branches(report).next().map_or(&[][..], |first| &first.readers);
    for reader in readers.iter().filter(|reader| reader.living) {
        let loaded: Vec<&BranchReport> =
            branches(report).filter(|branch| takes(branch, &reader.name) == Some(true)).collect();
        match choices.iter_mut().find(|known| known.1 == loaded) {
            Some(known) => known.0.push(&reader.name),
            None => choices.push((vec![&reader.name], loaded)),
        }
    }
    let divergence = |branch: &BranchReport| {
        let measured = report.evaluations.first()?.model_named(&branch.branch)?;
        Some(measured.kl_divergence.value).filter(|kl| kl.is_finite())
    };
    let one = |(readers, loaded): &(Vec<&str>, Vec<&BranchReport>)| {
        // The closest one is known only where all were measured.
        let measured: Option<Vec<_>> =
            loaded.iter().map(|branch| Some((branch, divergence(branch)?))).collect();
        let closest = measured.and_then(|all| all.into_iter().min_by(|a, b| a.1.total_cmp(&b.1)));
        let closest = closest.map(|(branch, _)| &branch.branch);
        let smallest = loaded.iter().min_by_key(|branch| branch.bytes).map(|branch| &branch.branch);
        let loaded: Vec<&String> = loaded.iter().map(|branch| &branch.branch).collect();
        json!({ "readers": readers, "closest": closest, "smallest": smallest, "loaded": loaded })
    };
    choices.iter().map(one).collect()
}

/// Whether a reader loads a branch; none when there is no such reader.
fn takes(branch: &BranchReport, reader: &str) -> Option<bool> {
    let found = branch.readers.iter().find(|known| known.name == reader)?;
    Some(found.refused.is_none())
}

fn evaluation(evaluation: &Evaluation) -> Value {
    let model = |model: &EvaluatedModel| {
        json!({
            "branch": model.name,
            "perplexity": shown(model.perplexity, 4),
            "perplexity_change": shown(model.perplexity_change, 4),
            "kl_divergence": shown(model.kl_divergence, 6),
            "kl_p99": format!("{:.5}", model.kl_p99),
            "top1": format!("{} %", shown(model.top1_agreement.percent(), 2)),
        })
    };
    json!({
        "dataset": evaluation.dataset,
        "sha256": evaluation.sha256,
        "protocol": evaluation.protocol,
        "compute": evaluation.compute,
        "windows": evaluation.windows,
        "seq_len": evaluation.seq_len,
        "stride": evaluation.stride,
        "reference_perplexity": shown(evaluation.reference_perplexity, 4),
        "models": evaluation.models.iter().map(model).collect::<Vec<_>>(),
    })
}

/// Readers, each with its verdict on every branch.
fn readers(report: &Report) -> Vec<Value> {
    let Some(first) = branches(report).next() else { return Vec::new() };
    let verdict = |branch: &BranchReport, name: &str| {
        let found = branch.readers.iter().find(|reader| reader.name == name);
        match found.map(|reader| &reader.refused) {
            Some(None) => "Yes".to_owned(),
            Some(Some(why)) => format!("No: {why}"),
            None => "not known".to_owned(),
        }
    };
    let one = |name: &String| {
        let verdicts: Vec<String> = branches(report).map(|branch| verdict(branch, name)).collect();
        json!({ "name": name, "verdicts": verdicts })
    };
    first.readers.iter().map(|reader| one(&reader.name)).collect()
}

fn licence_files(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| is_licence(name)).collect();
    names.sort();
    names
}

fn shown(interval: Interval, digits: usize) -> String {
    format!("{interval:.digits$}").replace('±', "± ")
}
