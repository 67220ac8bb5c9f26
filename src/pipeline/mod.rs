//! The order of the steps, from checkpoint and text to branches and report.

mod hidden_states;
mod layers;
mod output_folder;
mod preflight;

use std::{path::Path, time::Instant};

use tch::{Device, Kind};

use crate::{
    calibration::{self, Tokens, Windows, check_seq_len},
    checkpoint::{Checkpoint, LinearId, dense_tensors},
    device,
    emit::{BranchWriter, Provenance},
    error::{Error, Result},
    gptq::solver::{CpuSolver, CudaSolver, Solved, Solver},
    model::{Llama, kind_name, source_kind},
    plan::{ComputeDtype, Plan},
    progress::{Event, Progress},
    report::{
        BranchReport, CalibrationReport, ComputeReport, LinearReport, ModelReport, REPORT_FILE,
        REPORT_SCHEMA, Report,
    },
    variant::Variant,
    verify,
};
use hidden_states::HiddenStates;
use layers::{Layers, Record, Sink};
use output_folder::OutputFolder;
pub use preflight::{available_space, fast_bf16, peak_memory, resident_memory};

/// `gptq 0.1.0`.
pub const GENERATED_BY: &str = concat!("gptq ", env!("CARGO_PKG_VERSION"));

/// What a run needs beside the plan.
pub struct Run<'a> {
    /// What to make.
    pub plan: &'a Plan,
    /// The dense source.
    pub checkpoint: &'a Checkpoint,
    /// The calibration text.
    pub tokens: &'a Tokens<'a>,
    /// Where that text comes from, for the report.
    pub provenance: &'a calibration::Provenance,
    /// The folder for the branches; must not exist.
    pub out: &'a Path,
}

/// Quantizes a model into all of the plan's variants. `out` is complete afterwards, or absent.
///
/// # Errors
/// When anything at all does not fit, before the work where it can be known before.
pub fn quantize(run: &Run<'_>, progress: &dyn Progress) -> Result<Report> {
    let begun = Instant::now();
    let Run { plan, checkpoint, tokens, provenance: text, out } = run;
    check(plan, checkpoint, out)?;
    let config = checkpoint.config();
    let windows = Windows::random(tokens, plan.samples, plan.seq_len, plan.seed)?;
    let choice = device::resolve(&plan.device)?;
    choice.note.iter().for_each(|text| progress.event(&Event::Note(text)));
    check_dense(checkpoint)?;
    let mut warnings = warnings(checkpoint, plan, &windows);
    warnings.iter().for_each(|text| progress.event(&Event::Warning(text)));

    let _guard = tch::no_grad_guard();
    let folder = OutputFolder::create(out)?;
    let mut sink = Branches::create(plan, checkpoint, out)?;
    let kind = compute_kind(plan.compute_dtype, choice.device, source_kind(checkpoint)?);
    let llama = Llama::new(checkpoint, plan.seq_len, kind, choice.device)?;
    let solver = solver(choice.device)?;
    let layers =
        Layers { llama: &llama, solver: &*solver, variants: &plan.variants, damp: plan.damp, progress };

    let first = HiddenStates::embed(&llama, &windows)?;
    let steps = layers.steps(&first, plan.shared_hessian);
    let streams = if plan.shared_hessian { 1 } else { plan.variants.len() };
    let mut hidden: Vec<HiddenStates> = (1..streams).map(|_| first.share()).collect();
    hidden.push(first);
    let mut layer_seconds = Vec::with_capacity(config.num_layers);
    let report_layer = |done: usize, seconds: f64| {
        let (total, memory) = (config.num_layers, resident_memory().unwrap_or(0));
        progress.event(&Event::Layer { done, total, seconds, memory });
    };
    report_layer(0, 0.0);
    for layer in 0..config.num_layers {
        let begun = Instant::now();
        progress.begin(&format!("layer {}/{}", layer + 1, config.num_layers), steps);
        if plan.shared_hessian {
            layers.solve_shared(layer, &mut hidden[0], &mut sink)?;
        } else {
            layers.solve_each(layer, &mut hidden, &mut sink)?;
        }
        let seconds = begun.elapsed().as_secs_f64();
        layer_seconds.push(seconds);
        report_layer(layer + 1, seconds);
    }
    drop(hidden);

    let provenance = Provenance {
        quantizer: vec![GENERATED_BY.replace(' ', ":")],
        dataset: tokens.dataset().to_owned(),
        dataset_sha256: windows.digest().to_owned(),
        samples: plan.samples,
        seq_len: plan.seq_len,
        seed: plan.seed,
        damp_percent: plan.damp,
        shared_hessian: plan.shared_hessian,
    };
    warnings.extend(sink.warnings());
    let branches = sink.finish(checkpoint, &provenance, progress)?;
    let report = Report {
        schema: REPORT_SCHEMA.into(),
        generated_by: GENERATED_BY.into(),
        // A local text was given by its path on this machine.
        plan: Plan { dataset: tokens.dataset().to_owned(), ..(*plan).clone() },
        model: model_report(checkpoint)?,
        calibration: CalibrationReport {
            source: (*text).clone(),
            sha256: windows.digest().to_owned(),
            text_tokens: tokens.count(),
            samples: windows.count(),
            seq_len: windows.seq_len(),
        },
        compute: ComputeReport {
            device: choice.name,
            solver: solver.name().into(),
            dtype: kind_name(kind).into(),
            threads: rayon::current_num_threads(),
        },
        branches,
        warnings,
        seconds: begun.elapsed().as_secs_f64(),
        layer_seconds,
        peak_memory_bytes: peak_memory(),
        evaluation: None,
    };
    write_report(out, &report)?;
    folder.keep();
    Ok(report)
}

/// Everything that can be refused before text is read: plan, model, output folder, disk.
///
/// # Errors
/// When something does not fit.
pub fn check(plan: &Plan, checkpoint: &Checkpoint, out: &Path) -> Result<()> {
    plan.check()?;
    device::resolve(&plan.device)?;
    checkpoint.check()?;
    let config = checkpoint.config();
    check_seq_len(plan.seq_len, config.max_position_embeddings)?;
    preflight::check(plan, config, out)
}

/// Refuses numbers that fp16 cannot hold in the tensors that are copied, which would else be met at the very end.
fn check_dense(checkpoint: &Checkpoint) -> Result<()> {
    let config = checkpoint.config();
    let biases = LinearId::all(config).filter(|id| id.kind.has_bias(config)).map(LinearId::bias);
    for name in dense_tensors(config).into_iter().map(|(name, _)| name).chain(biases) {
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
    let path = out.join(REPORT_FILE);
    let mut text =
        serde_json::to_vec_pretty(report).map_err(|source| Error::Json { path: path.clone(), source })?;
    text.push(b'\n');
    crate::checkpoint::write_file_atomically(&path, &text)
}

/// The kind forward passes run in.
pub fn compute_kind(dtype: ComputeDtype, device: Device, source: Kind) -> Kind {
    match dtype {
        ComputeDtype::Fp32 => Kind::Float,
        ComputeDtype::Bf16 => Kind::BFloat16,
        ComputeDtype::Fp16 => Kind::Half,
        ComputeDtype::Auto if device != Device::Cpu => match source {
            Kind::Half => Kind::Half,
            _ => Kind::BFloat16,
        },
        ComputeDtype::Auto if fast_bf16() => Kind::BFloat16,
        ComputeDtype::Auto => Kind::Float,
    }
}

/// The fastest there is for a device.
fn solver(device: Device) -> Result<Box<dyn Solver>> {
    Ok(match device {
        Device::Cpu => Box::new(CpuSolver::new()),
        _ => Box::new(CudaSolver::new(device)?),
    })
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
        layers: config.num_layers,
        hidden_size: config.hidden_size,
        parameters,
        bytes: checkpoint.bytes_total(),
    })
}

fn warnings(checkpoint: &Checkpoint, plan: &Plan, windows: &Windows) -> Vec<String> {
    let mut warnings = Vec::new();
    let extra = checkpoint.extra();
    if !extra.is_empty() {
        let named = extra.iter().take(3).copied().collect::<Vec<_>>().join(", ");
        warnings
            .push(format!("tensors that are not part of the model are left out ({}): {named}", extra.len()));
    }
    let config = checkpoint.config();
    let widest = config.intermediate_size.max(config.hidden_size);
    let tokens = windows.count() * windows.seq_len();
    if tokens < widest {
        // The Hessian then has not even full rank.
        warnings.push(format!(
            "{tokens} calibration tokens ({} windows of {}) are fewer than the {widest} input features of the widest linear: its error will be judged by the damping more than by the text",
            plan.samples, plan.seq_len
        ));
    }
    warnings
}

/// All branches while they grow.
struct Branches {
    writers: Vec<BranchWriter>,
    reports: Vec<BranchReport>,
    warnings: Vec<String>,
}

impl Branches {
    fn create(plan: &Plan, checkpoint: &Checkpoint, out: &Path) -> Result<Self> {
        let create = |v: &Variant| BranchWriter::create(out, *v, checkpoint.config(), plan.max_shard_size);
        let report = |v: &Variant| BranchReport {
            branch: v.branch(),
            variant: *v,
            bytes: 0,
            bits_per_weight: bits_per_weight(v, checkpoint),
            seconds: 0.0,
            linears: Vec::new(),
        };
        Ok(Self {
            writers: plan.variants.iter().map(create).collect::<Result<_>>()?,
            reports: plan.variants.iter().map(report).collect(),
            warnings: Vec::new(),
        })
    }

    fn warnings(&self) -> Vec<String> {
        let raised = self.reports.iter().map(|r| (r, r.linears.iter().filter(|l| l.damp_raised > 0).count()));
        let raised = raised
            .filter(|(_, count)| *count > 0)
            .map(|(r, count)| format!("{}: damping was raised for {count} linears", r.branch));
        self.warnings.iter().cloned().chain(raised).collect()
    }

    /// Seals, checks and publishes the branches. They appear together: a failure in the last leaves none.
    fn finish(
        mut self,
        checkpoint: &Checkpoint,
        provenance: &Provenance,
        progress: &dyn Progress,
    ) -> Result<Vec<BranchReport>> {
        progress.begin("writing and checking", self.writers.len() as u64);
        for writer in &mut self.writers {
            let folder = writer.seal(checkpoint, provenance)?;
            verify::written(folder)?;
            progress.advance(1);
        }
        for (writer, report) in self.writers.into_iter().zip(&mut self.reports) {
            report.bytes = writer.publish()?.1;
        }
        Ok(self.reports)
    }
}

impl Sink for Branches {
    fn warn(&mut self, text: String) {
        self.warnings.push(text);
    }

    fn take(&mut self, variant: usize, id: LinearId, linear: &Solved, record: Record) -> Result<()> {
        let begun = Instant::now();
        self.writers[variant].write_linear(id, linear)?;
        let report = &mut self.reports[variant];
        report.seconds += record.seconds + begun.elapsed().as_secs_f64();
        report.linears.push(LinearReport {
            name: id.to_string(),
            relative_error: record.relative_error,
            damp: record.facts.damp,
            damp_raised: record.facts.damp_raised,
            dead_columns: record.facts.dead_columns,
            seconds: record.seconds,
        });
        Ok(())
    }
}

/// Bits of codes, scales, zeros and group indices over the quantized weights.
fn bits_per_weight(variant: &Variant, checkpoint: &Checkpoint) -> f64 {
    let (mut bits, mut weights) = (0.0, 0.0);
    for id in LinearId::all(checkpoint.config()) {
        let [n, k] = id.kind.shape(checkpoint.config()).map(|size| size as f64);
        let groups = variant.group_size.groups(k as usize) as f64;
        let code = f64::from(variant.bits.get());
        bits += n * k * code + groups * n * (16.0 + code) + 32.0 * k;
        weights += n * k;
    }
    bits / weights
}
