//! The order of the steps, from checkpoint and text to branches and report.

mod branches;
mod collective;
mod compute_kinds;
mod estimate;
mod journal;
mod layers;
mod memory;
mod needs;
mod output_folder;
mod output_format;
mod output_hessians;
mod phases;
mod rank_estimate;
mod reference;
mod ring;
mod shared_rows;
mod solution_message;
mod stage_memory;
mod stage_solver;
mod statistics;
mod stream;
#[cfg(test)]
mod tests;
mod weights;
mod window_file;
mod worker;
mod worker_group;
mod worker_pool;

use std::{
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use serde::{Deserialize, Serialize};
use tch::Device;

use crate::{
    calibration::{self, Corpus, Tokenizer, Tokens, Windows, check_seq_len, shares},
    checkpoint::{Checkpoint, write_json_atomically},
    cluster::Cluster,
    device,
    emit::{Provenance, remove_unfinished},
    equalization::Equalization,
    error::{ClusterError, Error, ResourceError, Result},
    eval::folder_name,
    machine::{available_memory, peak_memory, processor, resident_memory},
    plan::{DatasetShare, Plan},
    progress::{Event, Progress},
    report::{
        CalibrationReport, GENERATED_BY, ModelReport, REPORT_FILE, REPORT_SCHEMA, Report, SourceReport,
    },
    rotation::Rotated,
    units::bytes,
};
use compute_kinds::ComputeKinds;
pub use journal::{Begun, begun};
use journal::{Identity, Journal};
use needs::Needs;
use output_folder::OutputFolder;
pub use output_folder::Place;
use phases::{PhaseClock, compare_with_limits};
use stage_memory::{At, MemoryWatch};
use worker::RunContext;

/// Windows that may hold a token, on average, without a warning.
const LARGEST_OVERLAP: usize = 2;

/// A run: the plan and what it needs beside it.
pub struct Run<'a> {
    /// Settings.
    pub plan: &'a Plan,
    /// The dense source.
    pub checkpoint: &'a Checkpoint,
    /// The calibration texts, as many as the plan has datasets and in their order.
    pub texts: &'a [CalibrationText<'a>],
    /// Folder of the branches; an interrupted run there resumes.
    pub place: Place<'a>,
    /// The command, for the report: without paths of this machine.
    pub command: &'a [String],
    /// Set to stop the run; it then ends at the next batch or linear.
    pub stop: &'a AtomicBool,
    /// The processes of the run, of which this is the root or the only one in [`quantize`], and another one in [`assist`].
    pub cluster: &'a Cluster,
}

/// One calibration text.
pub struct CalibrationText<'a> {
    /// Its tokens.
    pub tokens: Tokens<'a>,
    /// Its source, for the report.
    pub provenance: &'a calibration::Provenance,
}

/// A run whose branches are in their places. Until it is completed, the same run resumes from here.
pub struct Finished {
    /// The result, with its figures.
    pub report: Report,
    out: PathBuf,
    journal: Journal,
}

impl Finished {
    /// Writes the report as it is now, and removes the journal.
    ///
    /// # Errors
    /// When the disk is full or fails.
    pub fn complete(self) -> Result<Report> {
        write_report(&self.out, &self.report)?;
        remove_unfinished(&self.out)?;
        self.journal.remove()?;
        Ok(self.report)
    }
}

/// Quantizes a model into all of the plan's variants, or resumes an interrupted run. Afterwards all branches are complete, or
/// none exists. After an error the output folder has the state that the same run resumes from, or nothing if neither a layer
/// nor gradients were finished.
///
/// ```
/// use std::{fs, path::Path, sync::atomic::AtomicBool};
///
/// use gptq::{
///     accuracy::Quality,
///     calibration::{Corpus, Tokenizer, Tokens},
///     checkpoint::Checkpoint,
///     cluster::Cluster,
///     pipeline::{self, CalibrationText, Place, Run},
///     plan::Plan,
///     progress::Silent,
/// };
///
/// let model = Path::new("calibration/demo");
/// let checkpoint = Checkpoint::open(model)?;
/// let tokenizer = Tokenizer::open(model)?;
/// let text = fs::read("calibration/demo/calibration.parquet")?;
/// let corpus = Corpus::from_parquet_bytes("demo", text, "text")?;
/// let tokens = Tokens::new(&corpus, &tokenizer, checkpoint.config().vocab_size)?;
///
/// let plan = Plan {
///     dataset: vec!["demo".into()],
///     samples: 4,
///     seq_len: 64,
///     variants: vec!["4bit-128g".parse()?],
///     quality: Quality::Fast,
///     ..Plan::default()
/// };
/// # let folder = tempfile::tempdir()?;
/// # let out = folder.path().join("branches");
/// let run = Run {
///     plan: &plan,
///     checkpoint: &checkpoint,
///     texts: &[CalibrationText { tokens, provenance: corpus.provenance() }],
///     place: Place::new(&out),
///     command: &[],
///     stop: &AtomicBool::new(false),
///     cluster: &Cluster::alone(),
/// };
/// let report = pipeline::quantize(&run, &Silent)?.complete()?;
///
/// assert_eq!(report.branches[0].branch, "main");
/// assert!(out.join("main/model.safetensors").exists());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// When the model, the plan, memory or the disk do not fit, before the work where possible; when the work fails.
pub fn quantize(run: &Run<'_>, progress: &dyn Progress) -> Result<Finished> {
    let Run { checkpoint, texts, place, command, cluster, .. } = run;
    let Prepared { ref plan, ref shares, ref windows, ref dataset, mut warnings, identity } = prepare(run)?;
    warnings.extend(compare_ranks(cluster, &identity)?);
    warnings.iter().for_each(|text| progress.event(&Event::Warning(text)));

    let mut folder = OutputFolder::create(place)?;
    let mut journal = Journal::open(place, identity, checkpoint.config().num_layers())?;
    journal.share(cluster)?;
    if journal.layers() == 0 {
        folder.empty()?;
    }
    if journal.holds_work() {
        folder.hold();
    }
    let accuracy = plan.accuracy(checkpoint.config());
    let provenance = Provenance {
        quantizer: vec![GENERATED_BY.replace(' ', ":")],
        dataset: dataset.clone(),
        dataset_sha256: windows.digest().to_owned(),
        samples: plan.samples,
        seq_len: plan.seq_len,
        seed: plan.seed,
        damp_percent: plan.damp(),
        shared_hessian: plan.shared_hessian,
        quality: plan.quality,
        accuracy,
    };
    if journal.state().sealed {
        branches::check_sealed(place.out, plan)?;
    } else {
        let memory = MemoryWatch::begin(journal.state().stage_memory);
        let phases = PhaseClock::begin(&journal.state().phases);
        let context = RunContext { progress, stop: run.stop, memory: &memory, phases: &phases, cluster };
        let rotated = match accuracy.rotate {
            true => Some(rotate(checkpoint, journal.folder(), context)?),
            false => None,
        };
        if let Some(rotated) = &rotated {
            let folder = folder_name(rotated.checkpoint().dir());
            cluster.broadcast(Some(folder.into_bytes()))?;
        }
        let equalized = match accuracy.equalize {
            true => equalize(checkpoint, context)?,
            false => None,
        };
        let changed = rotated.as_ref().map(Rotated::checkpoint).or(equalized.as_ref());
        let source = changed.unwrap_or(checkpoint);
        let mut branches = layers::solve(run, source, windows, &mut journal, &mut folder, context)?;
        memory.enter(At::Finishing);
        branches.seal(place.out, source, checkpoint, &provenance, progress)?;
        journal.seal(branches.seconds(), memory.peaks())?;
    }
    let state = journal.state();
    let mut phases = state.phases.clone();
    let compute = state.compute();
    if compute.device == "cpu" {
        compare_with_limits(&mut phases, ComputeKinds::of(plan, checkpoint, Device::Cpu)?)?;
    }
    let branches = branches::publish(place.out, state.reports())?;
    warnings.extend(branches::warnings(&branches, &state.warnings));
    let report = Report {
        schema: REPORT_SCHEMA.into(),
        generated_by: GENERATED_BY.into(),
        command: command.to_vec(),
        plan: plan.clone(),
        accuracy,
        model: model_report(checkpoint)?,
        calibration: CalibrationReport {
            sources: texts.iter().zip(shares).map(|(text, &samples)| source_report(text, samples)).collect(),
            sha256: windows.digest().to_owned(),
            samples: windows.count(),
            seq_len: windows.seq_len(),
        },
        compute: state.compute().clone(),
        resumed: state.interrupted().to_vec(),
        branches,
        warnings,
        seconds: state.seconds,
        journal_seconds: state.journal_seconds,
        layer_seconds: state.layer_seconds.clone(),
        exchanges: state.exchanges.clone(),
        stage_seconds: state.stage_seconds(),
        phases,
        stage_memory_bytes: state.stage_memory,
        peak_memory_bytes: peak_memory().max(state.peak_memory_bytes),
        evaluations: Vec::new(),
    };
    write_report(place.out, &report)?;
    folder.hold();
    Ok(Finished { report, out: place.out.into(), journal })
}

/// Takes part in a run of several processes, of which another one, the root, calls [`quantize`]. The run is the same, but that this
/// process writes nothing but the hidden states of its windows.
///
/// # Errors
/// Those of [`quantize`], and when this rank has another model or text than the root, or does not see its journal.
pub fn assist(run: &Run<'_>, progress: &dyn Progress) -> Result<()> {
    let Run { plan, checkpoint, place, cluster, .. } = run;
    let Prepared { windows, identity, .. } = prepare(run)?;
    compare_ranks(cluster, &identity)?;
    let mut journal = Journal::of_root(place, cluster)?;
    if journal.state().sealed {
        return Ok(());
    }
    let (memory, phases) = (MemoryWatch::begin(journal.state().stage_memory), PhaseClock::begin(&[]));
    let context = RunContext { progress, stop: run.stop, memory: &memory, phases: &phases, cluster };
    let accuracy = plan.accuracy(checkpoint.config());
    let rotated = match accuracy.rotate {
        true => Some(rotated_by_root(journal.folder(), cluster)?),
        false => None,
    };
    let equalized = match accuracy.equalize {
        true => equalize(checkpoint, context)?,
        false => None,
    };
    let source = rotated.as_ref().or(equalized.as_ref()).unwrap_or(checkpoint);
    layers::assist(run, source, &windows, &mut journal, context)
}

/// The rotated model, which the root has written to a folder of the journal's folder. The root removes it once all layers are solved.
fn rotated_by_root(journal: &Path, cluster: &Cluster) -> Result<Checkpoint> {
    let folder = cluster.broadcast(None)?;
    Checkpoint::open(&journal.join(String::from_utf8_lossy(&folder).as_ref()))
}

/// Plan and calibration windows of a run, on every rank.
struct Prepared {
    /// With the names of the texts, which may be given by their paths on this machine.
    plan: Plan,
    /// Windows of each text.
    shares: Vec<usize>,
    windows: Windows,
    /// The texts' names.
    dataset: String,
    warnings: Vec<String>,
    identity: Identity,
}

fn prepare(run: &Run<'_>) -> Result<Prepared> {
    let Run { plan, checkpoint, texts, place, cluster, .. } = run;
    check(plan, checkpoint, place, cluster)?;
    let weights: Vec<u32> = plan.dataset.iter().map(DatasetShare::weight).collect();
    let shares = shares(&weights, plan.samples)?;
    let drawn: Vec<(&Tokens<'_>, usize)> =
        texts.iter().map(|text| &text.tokens).zip(shares.iter().copied()).collect();
    let windows = Windows::mixed(&drawn, plan.seq_len, plan.seed)?;
    check_dense(checkpoint)?;
    let warnings = warnings(checkpoint, plan, &windows, texts);
    let dataset = text_names(&drawn);
    let plan = Plan { dataset: without_paths(&plan.dataset, texts), ..(*plan).clone() };
    let identity = Identity::new(&plan, checkpoint, &windows)?;
    Ok(Prepared { plan, shares, windows, dataset, warnings, identity })
}

/// Inputs that must be the same on all ranks.
#[derive(Serialize, Deserialize)]
struct Introduction {
    identity: Identity,
    threads: usize,
    processor: Option<String>,
}

/// Compares what each rank makes of the plan with what the root does. The result is the root's: the other ranks do not wait for it.
/// Returns a warning if processors differ.
fn compare_ranks(cluster: &Cluster, identity: &Identity) -> Result<Option<String>> {
    let json = |source| Error::Json { path: "identity".into(), source };
    let own = Introduction {
        identity: identity.clone(),
        threads: tch::get_num_threads() as usize,
        processor: processor(),
    };
    let mut warning = None;
    let all = cluster.gather(serde_json::to_vec(&own).map_err(json)?)?;
    for (rank, other) in all.into_iter().flatten().enumerate() {
        let other: Introduction = serde_json::from_slice(&other).map_err(json)?;
        let mut differences = identity.differences_of_rank(&other.identity, rank);
        if own.threads != other.threads {
            differences
                .push(format!("threads ({} on rank 0, {} on rank {rank})", own.threads, other.threads));
        }
        let name = cluster.name(rank);
        if !differences.is_empty() {
            return Err(ClusterError::Differs { name, differences: differences.join("; ") }.into());
        }
        if own.processor != other.processor {
            let text = format!(
                "{name} has another processor than rank 0: another number of ranks may make other bytes"
            );
            warning.get_or_insert(text);
        }
    }
    Ok(warning)
}

/// All checks before any text is read: plan, model, output folder, disk.
///
/// # Errors
/// When something does not fit.
pub fn check(plan: &Plan, checkpoint: &Checkpoint, place: &Place<'_>, cluster: &Cluster) -> Result<()> {
    plan.check()?;
    let devices = device::resolve_all(&plan.device)?;
    if let Some(mix) = plan.variants.iter().find(|variant| variant.gptq().is_none())
        && devices.iter().any(|device| device.device != Device::Cpu)
    {
        let expected = format!("cpu: {mix} is solved there alone");
        return Err(Error::Value { what: "device".into(), expected, found: plan.device.clone() });
    }
    checkpoint.check()?;
    let config = checkpoint.config();
    plan.check_for(config)?;
    check_seq_len(plan.seq_len, config.longest_window(plan.allow_long_windows))?;
    if !place.is_free() {
        return Err(Error::OutputExists { path: place.out.into() });
    }
    Needs::of(plan, checkpoint, place, cluster, plan.accuracy(config).rotate, 0).map(drop)
}

/// Checks, when texts are read and before they are tokenized, that they fit `--max-memory` and the machine with the rest.
///
/// # Errors
/// When they do not.
pub fn check_texts(
    plan: &Plan,
    checkpoint: &Checkpoint,
    place: &Place<'_>,
    cluster: &Cluster,
    corpora: &[Corpus],
    tokenizer: &Tokenizer,
) -> Result<()> {
    let memory = corpora.iter().map(|corpus| Tokens::memory(corpus, tokenizer));
    let [ids, tokenizing] = memory.fold([0, 0], |[ids, most], [own, now]| [ids + own, most.max(now)]);
    let base = resident_memory().unwrap_or(0);
    let needed = base.saturating_add(ids).saturating_add(tokenizing);
    let machine = available_memory().map(|available| base.saturating_add(available));
    if let Some(limit) = plan.max_memory.into_iter().chain(machine).min().filter(|&limit| limit < needed) {
        let needed = format!("{} to tokenize the text", bytes(needed));
        let (memory, available) = ("memory".to_owned(), bytes(limit));
        return Err(ResourceError::Memory { memory, available, needed, flag: None }.into());
    }
    Needs::of(plan, checkpoint, place, cluster, plan.accuracy(checkpoint.config()).rotate, ids).map(drop)
}

/// Writes the rotated model to a folder below `place`.
fn rotate(checkpoint: &Checkpoint, place: &Path, context: RunContext<'_>) -> Result<Rotated> {
    context.progress.begin("rotating", checkpoint.config().num_layers() as u64);
    let mut step = || {
        context.progress.advance(1);
        context.check_cancelled()
    };
    let rotated = Rotated::write(checkpoint, place, &mut step)?;
    check_dense(rotated.checkpoint())?;
    Ok(rotated)
}

/// The model with its norms equalized, if there is anything to equalize.
fn equalize(checkpoint: &Checkpoint, context: RunContext<'_>) -> Result<Option<Checkpoint>> {
    let equalization = Equalization::of(checkpoint, &mut || context.check_cancelled())?;
    let Some(equalized) = equalization.apply(checkpoint)? else { return Ok(None) };
    let (channels, norms) = equalization.channels();
    let text = format!("{channels} outlier channels of {norms} norms are equalized with the linears behind");
    context.progress.event(&Event::Note(&text));
    check_dense(&equalized)?;
    Ok(Some(equalized))
}

/// Refuses numbers that fp16 cannot hold in the tensors that are copied; without this the run would fail at its end.
fn check_dense(checkpoint: &Checkpoint) -> Result<()> {
    let config = checkpoint.config();
    for name in config.dense_tensors().into_iter().map(|(name, _)| name).chain(config.linear_biases()) {
        checkpoint.check_f16(&name)?;
        checkpoint.release([&name]);
    }
    Ok(())
}

/// Writes `run.json` into the output folder.
///
/// # Errors
/// When it cannot be written.
pub fn write_report(out: &Path, report: &Report) -> Result<()> {
    write_json_atomically(&out.join(REPORT_FILE), report)
}

fn model_report(checkpoint: &Checkpoint) -> Result<ModelReport> {
    let config = checkpoint.config();
    let mut parameters = 0;
    for name in checkpoint.names() {
        parameters += checkpoint.view(name)?.shape.iter().product::<usize>() as u64;
    }
    let name = checkpoint.dir().canonicalize().map_err(Error::io("read", checkpoint.dir()))?;
    Ok(ModelReport {
        name: name.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned()),
        source: None,
        layers: config.num_layers(),
        linears: Some(config.linears().count()),
        hidden_size: config.hidden_size,
        parameters,
        bytes: checkpoint.bytes_total(),
    })
}

/// The plan's datasets, each by the name of its text.
fn without_paths(datasets: &[DatasetShare], texts: &[CalibrationText<'_>]) -> Vec<DatasetShare> {
    let name = |text: &CalibrationText<'_>| text.tokens.dataset().to_owned();
    let named = datasets.iter().zip(texts);
    named.map(|(dataset, text)| DatasetShare { name: name(text), weight: dataset.weight }).collect()
}

/// `wikitext2`, or `wikitext2 (96 windows) and chat.jsonl (32 windows)`.
fn text_names(texts: &[(&Tokens<'_>, usize)]) -> String {
    match texts {
        [(one, _)] => one.dataset().to_owned(),
        many => {
            let named = many.iter().map(|(text, windows)| format!("{} ({windows} windows)", text.dataset()));
            named.collect::<Vec<_>>().join(" and ")
        }
    }
}

fn source_report(text: &CalibrationText<'_>, samples: usize) -> SourceReport {
    SourceReport {
        provenance: text.provenance.clone(),
        samples: Some(samples),
        text_tokens: text.tokens.count(),
    }
}

fn warnings(
    checkpoint: &Checkpoint,
    plan: &Plan,
    windows: &Windows,
    texts: &[CalibrationText<'_>],
) -> Vec<String> {
    let mut warnings = calibration::tokenizer_notes(checkpoint.dir());
    for text in texts {
        if let Some(calibration::Refused { count, first, reason }) = &text.provenance.refused {
            let name = text.tokens.dataset();
            warnings.push(format!(
                "{count} conversations of {name} are left out; the first is row {first}: {reason}"
            ));
        }
    }
    warnings.extend(checkpoint.absent());
    let extra = checkpoint.extra();
    if !extra.is_empty() {
        let named = extra.iter().take(3).copied().collect::<Vec<_>>().join(", ");
        warnings
            .push(format!("tensors that are not part of the model are left out ({}): {named}", extra.len()));
    }
    let config = checkpoint.config();
    let stages = config.layers.iter().flat_map(|layer| &layer.stages);
    let widest = stages.flat_map(|stage| &stage.groups).map(|group| group.width).max().unwrap_or(0);
    let (tokens, distinct) = (windows.ids().len(), windows.distinct());
    if distinct < tokens / LARGEST_OVERLAP {
        warnings.push(format!(
            "the {} windows overlap: of their {tokens} tokens {distinct} are distinct; use more text, or fewer or shorter windows",
            windows.count(),
        ));
    }
    if distinct < widest {
        // The Hessian then has not even full rank.
        warnings.push(format!(
            "{distinct} distinct calibration tokens ({} windows of {}) are fewer than the {widest} input features of the widest linear: its error will be judged by the damping more than by the text",
            plan.samples,
            plan.seq_len,
        ));
    }
    warnings
}
