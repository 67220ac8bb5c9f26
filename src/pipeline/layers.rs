//! The layers of a run, one after another, from the first that is not finished.

use std::{sync::Mutex, time::Instant};

use tch::Device;

use super::{
    Run,
    branches::Branches,
    journal::{Journal, LayerCosts},
    needs::Needs,
    output_folder::OutputFolder,
    output_hessians::{GradientWindows, OutputHessians},
    worker::RunContext,
    worker_group::Task,
    worker_pool::WorkerPool,
};
use crate::{
    calibration::Windows,
    checkpoint::Checkpoint,
    device,
    error::Result,
    machine::resident_memory,
    model::kind_name,
    progress::Event,
    report::{ComputeReport, Phase},
};

/// Solves the unfinished layers of `source`, which is the run's model, or that model equalized or rotated. After each layer the
/// branches are synced and the layer is committed to the journal.
pub(super) fn solve(
    run: &Run<'_>,
    source: &Checkpoint,
    windows: &Windows,
    journal: &mut Journal,
    folder: &mut OutputFolder<'_>,
    context: RunContext<'_>,
) -> Result<Branches> {
    let Run { plan, checkpoint, place, .. } = run;
    let RunContext { progress, memory, .. } = context;
    let total = checkpoint.config().num_layers();
    if journal.layers() > 0 {
        let text = format!("resuming: {} of {total} layers are finished", journal.layers());
        progress.event(&Event::Note(&text));
    }
    let mut branches = Branches::open(plan, source, checkpoint, place.out, journal.state())?;
    let report_layer = |done: usize, seconds: Option<f64>| {
        let memory = resident_memory().unwrap_or(0);
        progress.event(&Event::Layer { done, total, seconds, memory });
    };
    report_layer(journal.layers(), None);
    if journal.layers() == total {
        return Ok(branches);
    }

    let choices = device::resolve_all(&plan.device)?;
    choices.iter().filter_map(|c| c.note.as_ref()).for_each(|text| progress.event(&Event::Note(text)));
    let _guard = tch::no_grad_guard();
    let devices: Vec<Device> = choices.iter().map(|choice| choice.device).collect();
    let needs = Needs::of(plan, checkpoint, place, false, 0)?;
    let time = needs.time(total - journal.layers())?;
    progress.event(&Event::Note(&format!("{needs}{}", time.map_or_else(String::new, |t| format!("; {t}")))));
    let kind = needs.kind;
    let accuracy = plan.accuracy(checkpoint.config());
    progress.event(&Event::Note(&format!("quality {}: {accuracy}", plan.quality)));
    for text in plan.left_out(checkpoint.config()) {
        progress.event(&Event::Note(&text));
    }
    let spill = journal.folder().to_owned();
    let output_hessians = match accuracy.gradient_windows(plan.samples) {
        0 => None,
        count => {
            let windows = GradientWindows { windows, count, at_once: needs.gradients_at_once };
            let device = devices[0];
            let measured = context.phases.time(Phase::Gradients, needs.gradient_operations, || {
                OutputHessians::measure(source, device, windows, plan.seed, needs.limits, journal, context)
            });
            if journal.holds_work() {
                folder.hold();
            }
            Some(measured?)
        }
    };
    let task = Task {
        variants: &plan.variants,
        damp: plan.damp(),
        accuracy,
        output_hessians: output_hessians.as_ref(),
        shared_hessian: plan.shared_hessian,
        on_failure: plan.on_failure,
        layers: total,
    };
    let kept = journal.kept()?;
    let limits = needs.limits;
    let mut pool =
        WorkerPool::new(source, &devices, kind, windows, task, limits, &spill, kept.as_ref(), context)?;
    drop(kept);
    let compute = ComputeReport {
        device: choices.iter().map(|c| c.name.as_str()).collect::<Vec<_>>().join(","),
        solver: pool.solver_name().to_owned(),
        dtype: kind_name(kind).into(),
        threads: rayon::current_num_threads(),
    };
    let window_bytes = checkpoint.config().hidden_size * windows.seq_len() * kind.elt_size_in_bytes();
    let streams = task.streams(plan.variants.len());
    for layer in journal.layers()..total {
        let layer_begun = Instant::now();
        progress.begin(&format!("layer {}/{total}", layer + 1), pool.steps(layer));
        // The last layer has no next layer, so its outputs are dropped.
        let mut next = match layer + 1 < total {
            true => Some(journal.next(streams, windows.count(), window_bytes, kind)?),
            false => None,
        };
        let states = next.as_mut().map(Mutex::new);
        pool.solve_layer(layer, &Mutex::new(&mut branches), states.as_ref())?;
        let committed = branches.commit()?;
        let layer_seconds = layer_begun.elapsed().as_secs_f64();
        let costs = LayerCosts {
            seconds: layer_seconds,
            stage_seconds: branches.seconds(),
            phases: context.phases.so_far(),
            stage_memory: memory.peaks(),
        };
        journal.commit(next, committed, branches.warnings().to_vec(), costs, &compute)?;
        folder.hold();
        report_layer(layer + 1, Some(layer_seconds));
    }
    Ok(branches)
}
