//! The order of the steps, from checkpoint and text to branches and report.

mod branches;
mod crew;
mod estimate;
mod member;
mod memory;
mod output_folder;
mod preflight;
mod stream;
mod team;
mod weights;
mod window_file;

use std::{
    path::Path,
    sync::{Mutex, atomic::AtomicBool},
    time::Instant,
};

use tch::{Device, Kind};

use crate::{
    calibration::{self, Tokens, Windows, check_seq_len},
    checkpoint::{Checkpoint, LinearId, dense_tensors},
    cuda::Gpu,
    device,
    emit::Provenance,
    error::{Error, Result},
    model::{kind_name, source_kind},
    plan::{ComputeDtype, Plan},
    progress::{Event, Progress},
    report::{CalibrationReport, ComputeReport, ModelReport, REPORT_FILE, REPORT_SCHEMA, Report, bytes},
};
use branches::Branches;
use crew::{Crew, Limits};
use estimate::Shape;
use member::Surroundings;
use output_folder::OutputFolder;
pub use preflight::{available_space, fast_bf16, peak_memory, resident_memory};
use team::Task;

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
    /// Set by whoever wants the run to stop; it then ends at the next batch or linear.
    pub stop: &'a AtomicBool,
}

/// Quantizes a model into all of the plan's variants. `out` is complete afterwards, or absent.
///
/// # Errors
/// When anything at all does not fit, before the work where it can be known before.
pub fn quantize(run: &Run<'_>, progress: &dyn Progress) -> Result<Report> {
    let begun = Instant::now();
    let Run { plan, checkpoint, tokens, provenance: text, out, stop } = run;
    check(plan, checkpoint, out)?;
    let config = checkpoint.config();
    let windows = Windows::random(tokens, plan.samples, plan.seq_len, plan.seed)?;
    let choices = device::resolve_all(&plan.device)?;
    choices.iter().filter_map(|c| c.note.as_ref()).for_each(|text| progress.event(&Event::Note(text)));
    check_dense(checkpoint)?;
    let mut warnings = warnings(checkpoint, plan, &windows);
    warnings.iter().for_each(|text| progress.event(&Event::Warning(text)));

    let _guard = tch::no_grad_guard();
    let devices: Vec<Device> = choices.iter().map(|choice| choice.device).collect();
    let kind = compute_kind(plan.compute_dtype, devices[0], source_kind(checkpoint)?);
    let limits = limits(plan, checkpoint, devices[0], kind, progress)?;
    let folder = OutputFolder::create(out)?;
    let mut branches = Branches::create(plan, checkpoint, out)?;
    let refinements = plan.refinements();
    progress.event(&Event::Note(&format!("quality {}: {refinements}", plan.quality)));
    let task = Task {
        variants: &plan.variants,
        damp: plan.damp,
        refinements,
        shared_hessian: plan.shared_hessian,
        layers: config.num_layers,
    };
    let around = Surroundings { progress, stop };
    let mut crew = Crew::new(checkpoint, &devices, kind, &windows, task, limits, out, around)?;

    let mut layer_seconds = Vec::with_capacity(config.num_layers);
    let report_layer = |done: usize, seconds: f64| {
        let (total, memory) = (config.num_layers, resident_memory().unwrap_or(0));
        progress.event(&Event::Layer { done, total, seconds, memory });
    };
    report_layer(0, 0.0);
    for layer in 0..config.num_layers {
        let begun = Instant::now();
        progress.begin(&format!("layer {}/{}", layer + 1, config.num_layers), crew.steps(layer));
        crew.solve_layer(layer, &Mutex::new(&mut branches))?;
        let seconds = begun.elapsed().as_secs_f64();
        layer_seconds.push(seconds);
        report_layer(layer + 1, seconds);
    }
    let solver = crew.solver_name().to_owned();
    drop(crew);

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
    warnings.extend(branches.warnings());
    let branches = branches.finish(checkpoint, &provenance, progress)?;
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
            device: choices.iter().map(|c| c.name.as_str()).collect::<Vec<_>>().join(","),
            solver,
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
    device::resolve_all(&plan.device)?;
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

/// What may be held where, told to the user beforehand.
fn limits(
    plan: &Plan,
    checkpoint: &Checkpoint,
    device: Device,
    kind: Kind,
    progress: &dyn Progress,
) -> Result<Limits> {
    let shape = Shape {
        config: checkpoint.config(),
        source_bytes: source_kind(checkpoint)?.elt_size_in_bytes() as u64,
        kind,
        windows: plan.samples,
        seq_len: plan.seq_len,
        variants: plan.variants.len(),
        shared_hessian: plan.shared_hessian,
    };
    let device_memory = match (device, plan.max_device_memory) {
        (Device::Cpu, _) => None,
        (_, Some(limit)) => Some(limit),
        // Others may want some too, and a heap has holes.
        (_, None) => Some(Gpu::of(device)?.memory()?.free as u64 / 10 * 9),
    };
    let base = resident_memory().unwrap_or(0);
    let limits = shape.limits(device, device_memory, plan.max_memory, base)?;
    let need = shape.need(device, limits.batch_tokens);
    let (whose, own) = if device == Device::Cpu { ("memory", base) } else { ("device memory", 0) };
    let allowed = if device == Device::Cpu { limits.in_memory } else { limits.on_device };
    let held = need.activations.min(allowed.unwrap_or(u64::MAX));
    let mut text = format!("{whose}: about {} at most", bytes(own + need.working + held));
    if held < need.activations {
        let elsewhere = if device == Device::Cpu { "on disk" } else { "in memory or on disk" };
        text += &format!("; {} of activations {elsewhere}", bytes(need.activations - held));
    }
    progress.event(&Event::Note(&text));
    Ok(limits)
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
