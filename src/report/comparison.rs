//! Runs and checkpoints of other tools side by side.

use std::{cmp::Reverse, path::PathBuf};

use serde::Serialize;

use super::{
    BranchReport, CheckpointReport, EvaluatedModel, Evaluation, GENERATED_BY, Interval, LinearReport,
    ModelEvaluations, ModelReport, ReaderReport, Report, choice, recommendation::Recommendation,
};
use crate::{
    error::{Error, Result},
    variant::{Order, Output},
};

/// Version of the JSON; it rises when a reader of older comparisons could misread a newer one.
pub const COMPARISON_SCHEMA: &str = "gptq-comparison/2";

/// Length of the windows, tokens, over which perplexities are often published.
const SHORT: usize = 512;

/// A run to be compared.
#[derive(Debug, Clone)]
pub struct RunInput {
    /// Its folder's name.
    pub name: String,
    /// Its report.
    pub report: Report,
    /// Evaluations of its branches that are not in the report.
    pub measured: Vec<ModelEvaluations>,
}

/// The unquantized model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Source {
    /// Its folder's name.
    pub name: String,
    /// Digest of its tensors; none if no figures compare with it.
    pub digest: Option<String>,
    /// Parameters in all tensors.
    pub parameters: Option<u64>,
    /// Bytes of all tensors.
    pub bytes: Option<u64>,
}

/// All data of a comparison; every form of it is made from these.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// [`COMPARISON_SCHEMA`].
    pub schema: &'static str,
    /// `gptq 0.1.0`.
    pub generated_by: &'static str,
    /// The unquantized model that all entries were made from.
    pub source: Source,
    /// Evaluations without their models; the first one decides the recommendation.
    pub protocols: Vec<Evaluation>,
    /// Position in `protocols` of the first text in windows of 512 tokens, where there is one.
    pub short: Option<usize>,
    /// The runs' branches in their order, then the other checkpoints.
    pub entries: Vec<Entry>,
    /// Which entries to take.
    pub recommendation: Option<Recommendation>,
    /// The runs without their branches and evaluations.
    pub runs: Vec<RunSummary>,
}

/// A run's report without its branches and evaluations.
#[derive(Debug, Clone, Serialize)]
pub struct RunSummary {
    /// Its folder's name.
    pub name: String,
    /// The report without them.
    pub report: Report,
    /// Seconds of all its evaluations.
    pub evaluation_seconds: f64,
    /// Seconds of each branch, with its name.
    pub branch_seconds: Vec<(String, f64)>,
}

/// One quantized model.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    /// Its name, unique among all entries.
    pub name: String,
    /// Its variant: `4bit-32g-act`.
    pub variant: String,
    /// The tool that made it.
    pub tool: String,
    /// The run it comes from, by position; none for a single checkpoint.
    pub run: Option<usize>,
    /// Metadata of the checkpoint.
    pub checkpoint: CheckpointReport,
    /// Its figures for each of the protocols.
    pub measured: Vec<Option<EvaluatedModel>>,
    /// Whether no other entry that was measured by the first protocol is both smaller and closer to the unquantized model.
    pub pareto: bool,
    /// Statistics of every linear; empty for a single checkpoint.
    pub linears: Vec<LinearReport>,
}

impl Entry {
    /// The figures of the first protocol, which decide the recommendation.
    pub fn main(&self) -> Option<&EvaluatedModel> {
        self.measured.first()?.as_ref()
    }

    /// Mean KL divergence in the first protocol.
    pub fn kl(&self) -> Option<f64> {
        self.main().map(|m| m.kl_divergence.value)
    }

    /// The maintained readers that do not load it.
    pub fn not_loaded_by(&self) -> Vec<&str> {
        not_loaded_by(&self.checkpoint.readers)
    }

    /// Whether a reader loads it.
    pub fn is_loaded_by(&self, name: &str) -> bool {
        self.checkpoint.readers.iter().any(|reader| reader.name == name && reader.refused.is_none())
    }
}

/// Names of the maintained readers that do not load a checkpoint.
pub(crate) fn not_loaded_by(readers: &[ReaderReport]) -> Vec<&str> {
    let refuse = readers.iter().filter(|reader| reader.living && reader.refused.is_some());
    refuse.map(|reader| reader.name.as_str()).collect()
}

/// Act order as reports name it.
pub(super) fn act_order(order: Order) -> &'static str {
    match order {
        Order::Sequential => "no",
        Order::Act => "yes",
        Order::ActStatic => "static",
    }
}

impl Comparison {
    /// Compares runs and other checkpoints. `source` describes the unquantized model; without it, the runs do. The evaluation that
    /// decides is on the first of `datasets`; without them, the one that has the most entries.
    ///
    /// # Errors
    /// If the list is empty, not all are of the same model, or one of `datasets` has no evaluation.
    pub fn new(
        runs: Vec<RunInput>,
        others: Vec<ModelEvaluations>,
        source: Option<Source>,
        datasets: &[String],
    ) -> Result<Self> {
        let evaluations: Vec<&Evaluation> = runs
            .iter()
            .flat_map(|run| {
                run.report.evaluations.iter().chain(run.measured.iter().flat_map(|m| &m.evaluations))
            })
            .chain(others.iter().flat_map(|m| &m.evaluations))
            .collect();
        let source = same_source(&runs, &evaluations, source)?;
        let mut protocols: Vec<Evaluation> = Vec::new();
        for evaluation in &evaluations {
            if !protocols.iter().any(|known| known.same_protocol(evaluation)) {
                protocols.push(Evaluation { models: Vec::new(), ..(*evaluation).clone() });
            }
        }
        let mut entries: Vec<Entry> = Vec::new();
        for (index, run) in runs.iter().enumerate() {
            entries
                .extend(run.report.branches.iter().map(|branch| of_branch(index, run, branch, &protocols)));
        }
        entries.extend(others.iter().map(|other| of_checkpoint(other, &protocols)));
        name_apart(&mut entries, &runs);

        choice::known(protocols.iter().map(|protocol| protocol.dataset.as_str()), datasets)?;
        // First the datasets that are asked for, then the protocol that most entries were measured by, then a run's own, then the
        // one with longer and with more windows.
        let asked = |p: usize| {
            datasets.iter().position(|name| *name == protocols[p].dataset).unwrap_or(datasets.len())
        };
        let of = |p: usize| entries.iter().filter(|e| e.measured[p].is_some()).count();
        let own = |p: usize| {
            let mut own = runs.iter().flat_map(|run| &run.report.evaluations);
            own.any(|evaluation| evaluation.same_protocol(&protocols[p]))
        };
        let mut order: Vec<usize> = (0..protocols.len()).collect();
        order.sort_by_key(|&p| {
            (asked(p), Reverse((of(p), own(p), protocols[p].seq_len, protocols[p].windows)))
        });
        let protocols: Vec<Evaluation> = order.iter().map(|&p| protocols[p].clone()).collect();
        for entry in &mut entries {
            entry.measured = order.iter().map(|&p| entry.measured[p].take()).collect();
        }
        mark_pareto(&mut entries);
        let short = protocols.first().and_then(|first| {
            let short = |p: &Evaluation| p.seq_len == SHORT && p.dataset == first.dataset;
            protocols.iter().position(short)
        });
        let window_tokens = protocols.first().map(|p| p.window_tokens.clone()).unwrap_or_default();
        Ok(Self {
            schema: COMPARISON_SCHEMA,
            generated_by: GENERATED_BY,
            source,
            recommendation: Recommendation::new(&entries, &window_tokens),
            protocols,
            short,
            entries,
            runs: runs.into_iter().map(summary).collect(),
        })
    }

    /// Perplexity of an entry in short windows.
    pub fn short_perplexity(&self, entry: &Entry) -> Option<Interval> {
        Some(entry.measured.get(self.short?)?.as_ref()?.perplexity)
    }
}

fn summary(run: RunInput) -> RunSummary {
    let RunInput { name, mut report, .. } = run;
    let evaluation_seconds = report.evaluations.iter().map(|e| e.seconds).sum();
    report.evaluations.clear();
    let branches = std::mem::take(&mut report.branches);
    let branch_seconds = branches.into_iter().map(|b| (b.branch, b.seconds)).collect();
    RunSummary { name, report, evaluation_seconds, branch_seconds }
}

/// The unquantized model; returns an error where entries were measured against different ones.
fn same_source(runs: &[RunInput], evaluations: &[&Evaluation], given: Option<Source>) -> Result<Source> {
    let mut source = match (given, runs.first(), evaluations.first()) {
        (Some(given), ..) => given,
        (None, Some(run), _) => {
            let model = &run.report.model;
            let (parameters, bytes) = (Some(model.parameters), Some(model.bytes));
            Source { name: model.name.clone(), digest: None, parameters, bytes }
        }
        (None, None, Some(evaluation)) => {
            Source { name: evaluation.model.clone(), digest: None, parameters: None, bytes: None }
        }
        (None, None, None) => {
            let (what, found) = ("what to report on".into(), "none".into());
            return Err(Error::Value { what, expected: "a run, or a checkpoint with figures".into(), found });
        }
    };
    for other in runs {
        let (a, b) = (&runs[0].report.model, &other.report.model);
        if (a.layers, a.hidden_size, a.parameters) != (b.layers, b.hidden_size, b.parameters) {
            let shape = |m: &ModelReport| {
                format!("{} layers, hidden {}, {} parameters", m.layers, m.hidden_size, m.parameters)
            };
            return Err(Error::NotComparable {
                left: PathBuf::from(&runs[0].name),
                right: PathBuf::from(&other.name),
                problem: format!("they are of two models: {}, and {}", shape(a), shape(b)),
            });
        }
    }
    for evaluation in evaluations {
        let expected = source.digest.get_or_insert_with(|| evaluation.model_digest.clone());
        if *expected != evaluation.model_digest {
            return Err(Error::NotComparable {
                left: PathBuf::from(&source.name),
                right: PathBuf::from(&evaluation.model),
                problem: format!(
                    "figures against two unquantized models, with digests {expected} and {}",
                    evaluation.model_digest
                ),
            });
        }
    }
    Ok(source)
}

fn of_branch(index: usize, run: &RunInput, branch: &BranchReport, protocols: &[Evaluation]) -> Entry {
    let own = run.measured.iter().filter(|m| m.name == branch.branch).flat_map(|m| &m.evaluations);
    // Evaluations outside the report are newer and come first.
    let evaluations: Vec<&Evaluation> = own.chain(&run.report.evaluations).collect();
    let (variant, report) = (&branch.variant, &run.report);
    let checkpoint = CheckpointReport {
        quantizer: Some(report.generated_by.replace(' ', ":")),
        gguf: match variant {
            Output::Gptq(_) => None,
            Output::Gguf(mix) => Some(mix.name().to_owned()),
        },
        bits: variant.bits(),
        group_size: variant.group_size().as_config(),
        digest: String::new(),
        act_order: act_order(variant.order()).into(),
        symmetric: variant.symmetric(),
        damp: Some(report.plan.damp()),
        dataset: Some(report.calibration.names()),
        seq_len: Some(report.calibration.seq_len),
        samples: Some(report.calibration.samples),
        bytes: branch.weight_bytes,
        bits_per_weight: branch.bits_per_weight,
        scale_bits: branch.scale_bits,
        readers: branch.readers.clone(),
        tensor_parallel: branch.tensor_parallel.clone(),
        notes: Vec::new(),
    };
    Entry {
        name: branch.branch.clone(),
        variant: variant.to_string(),
        tool: report.generated_by.clone(),
        run: Some(index),
        checkpoint,
        measured: measured(&branch.branch, &evaluations, protocols),
        pareto: false,
        linears: branch.linears.clone(),
    }
}

fn of_checkpoint(other: &ModelEvaluations, protocols: &[Evaluation]) -> Entry {
    let checkpoint = &other.checkpoint;
    let order = match checkpoint.act_order.as_str() {
        "no" => String::new(),
        "yes" => "-act".into(),
        other => format!("-{other}"),
    };
    let asymmetric = if checkpoint.symmetric { "" } else { "-asym" };
    let variant = format!("{}bit-{}g{order}{asymmetric}", checkpoint.bits, checkpoint.group_size);
    Entry {
        name: other.name.clone(),
        variant: checkpoint.gguf.clone().unwrap_or(variant),
        tool: checkpoint.quantizer.as_ref().map_or_else(|| "unknown".into(), |q| q.replace(':', " ")),
        run: None,
        checkpoint: checkpoint.clone(),
        measured: measured(&other.name, &other.evaluations.iter().collect::<Vec<_>>(), protocols),
        pareto: false,
        linears: Vec::new(),
    }
}

fn measured(
    name: &str,
    evaluations: &[&Evaluation],
    protocols: &[Evaluation],
) -> Vec<Option<EvaluatedModel>> {
    let find = |protocol: &Evaluation| {
        let mut same = evaluations.iter().filter(|e| e.same_protocol(protocol));
        same.find_map(|e| e.model_named(name)).cloned()
    };
    protocols.iter().map(find).collect()
}

/// Makes names unique: puts the run's name before equal ones, and a number behind those that are still equal.
fn name_apart(entries: &mut [Entry], runs: &[RunInput]) {
    let count = |entries: &[Entry], name: &str| entries.iter().filter(|e| e.name == name).count();
    let before: Vec<Entry> = entries.to_vec();
    for entry in entries.iter_mut().filter(|e| count(&before, &e.name) > 1) {
        if let Some(run) = entry.run {
            entry.name = format!("{}/{}", runs[run].name, entry.name);
        }
    }
    for i in 1..entries.len() {
        let (earlier, rest) = entries.split_at_mut(i);
        let same = count(earlier, &rest[0].name);
        if same > 0 {
            rest[0].name = format!("{} ({})", rest[0].name, same + 1);
        }
    }
}

fn mark_pareto(entries: &mut [Entry]) {
    let points: Vec<Option<(u64, f64)>> =
        entries.iter().map(|e| e.kl().map(|kl| (e.checkpoint.bytes, kl))).collect();
    for (i, entry) in entries.iter_mut().enumerate() {
        let Some((bytes, kl)) = points[i] else { continue };
        entry.pareto = !points.iter().flatten().any(|&(b, k)| b <= bytes && k <= kl && (b < bytes || k < kl));
    }
}
