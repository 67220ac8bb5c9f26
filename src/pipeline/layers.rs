//! The layers of a run, one after another, from the first that is not finished.

use std::{ops::Range, sync::Mutex, time::Instant};

use tch::Device;

use super::{
    Run,
    branches::Branches,
    journal::{Journal, LayerCosts, NextStates},
    needs::Needs,
    output_folder::OutputFolder,
    output_hessians::{GradientWindows, OutputHessians},
    worker::RunContext,
    worker_group::{Sink, Task},
    worker_pool::WorkerPool,
};
use crate::{
    architectures::LinearId,
    calibration::Windows,
    checkpoint::Checkpoint,
    cluster::{Cluster, Exchanged, message, windows_of_ranks},
    device::{self, Choice},
    error::{Error, Result},
    gptq::solver::Solved,
    machine::resident_memory,
    model::{Compute, kind_name},
    plan::Plan,
    progress::Event,
    report::{ComputeReport, LayerExchange, LinearReport, Phase},
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

    let setup = Setup::new(run, windows)?;
    setup.notes.iter().for_each(|text| progress.event(&Event::Note(text)));
    let needs = &setup.needs;
    let time = needs.time(total - journal.layers())?;
    progress.event(&Event::Note(&format!("{needs}{}", time.map_or_else(String::new, |t| format!("; {t}")))));
    if let Some(speed) = network_speed(context.cluster)? {
        progress.event(&Event::Note(&needs.of_more_ranks(speed)?));
    }
    let accuracy = plan.accuracy(checkpoint.config());
    progress.event(&Event::Note(&format!("quality {}: {accuracy}", plan.quality)));
    if let Some(text) = needs.kinds.note(&plan.variants) {
        progress.event(&Event::Note(text));
    }
    for text in plan.left_out(checkpoint.config()) {
        progress.event(&Event::Note(&text));
    }
    let _guard = tch::no_grad_guard();
    let output_hessians = setup.output_hessians(run, source, journal, context);
    if journal.holds_work() {
        folder.hold();
    }
    let output_hessians = output_hessians?;
    let task = setup.task(run, output_hessians.as_ref());
    let mut pool = setup.pool(source, task, journal, context)?;
    let compute = ComputeReport {
        device: setup.device.clone(),
        solver: pool.solver_name().to_owned(),
        dtype: needs
            .kinds
            .of_outputs(&plan.variants)
            .into_iter()
            .map(kind_name)
            .collect::<Vec<_>>()
            .join(" and "),
        threads: rayon::current_num_threads(),
    };
    for layer in journal.layers()..total {
        let layer_begun = Instant::now();
        progress.begin(&format!("layer {}/{total}", layer + 1), pool.steps(layer));
        let (next, exchange) = setup.solve_layer(&mut pool, layer, &mut branches, task, journal, context)?;
        let committed = branches.commit()?;
        let layer_seconds = layer_begun.elapsed().as_secs_f64();
        if let Some(exchange) = &exchange {
            progress.event(&Event::Note(&waited(exchange, layer_seconds)));
        }
        let costs = LayerCosts {
            seconds: layer_seconds,
            stage_seconds: branches.seconds(),
            phases: context.phases.so_far(),
            stage_memory: memory.peaks(),
            exchange,
        };
        journal.commit(next, committed, branches.warnings().to_vec(), costs, &compute)?;
        folder.hold();
        report_layer(layer + 1, Some(layer_seconds));
    }
    Ok(branches)
}

/// Takes part in the unfinished layers of another process, the root: with the windows of this rank.
pub(super) fn assist(
    run: &Run<'_>,
    source: &Checkpoint,
    windows: &Windows,
    journal: &mut Journal,
    context: RunContext<'_>,
) -> Result<()> {
    let total = run.checkpoint.config().num_layers();
    if journal.layers() == total {
        return Ok(());
    }
    let setup = Setup::new(run, windows)?;
    network_speed(context.cluster)?;
    let _guard = tch::no_grad_guard();
    let output_hessians = setup.output_hessians(run, source, journal, context)?;
    let task = setup.task(run, output_hessians.as_ref());
    let mut pool = setup.pool(source, task, journal, context)?;
    for layer in journal.layers()..total {
        setup.solve_layer(&mut pool, layer, &mut NoSink, task, journal, context)?;
    }
    Ok(())
}

/// Inputs and devices of a rank.
struct Setup<'a> {
    windows: &'a Windows,
    /// Those of each rank.
    of_ranks: Vec<Range<usize>>,
    devices: Vec<Device>,
    /// Their names.
    device: String,
    notes: Vec<String>,
    needs: Needs,
}

impl<'a> Setup<'a> {
    fn new(run: &Run<'_>, windows: &'a Windows) -> Result<Self> {
        let Run { plan, checkpoint, place, cluster, .. } = run;
        let choices = devices(plan, cluster)?;
        let needs = Needs::of(plan, checkpoint, place, cluster, false, 0)?;
        let per_batch = needs.limits.windows_per_batch(windows.seq_len());
        Ok(Self {
            windows,
            of_ranks: windows_of_ranks(windows.count(), per_batch, cluster.ranks()),
            devices: choices.iter().map(|choice| choice.device).collect(),
            device: choices.iter().map(|choice| choice.name.as_str()).collect::<Vec<_>>().join(","),
            notes: choices.iter().filter_map(|choice| choice.note.clone()).collect(),
            needs,
        })
    }

    /// Output Hessians, where they are used.
    fn output_hessians(
        &self,
        run: &Run<'_>,
        source: &Checkpoint,
        journal: &mut Journal,
        context: RunContext<'_>,
    ) -> Result<Option<OutputHessians>> {
        let count = run.plan.accuracy(run.checkpoint.config()).gradient_windows(run.plan.samples);
        if count == 0 {
            return Ok(None);
        }
        let Needs { limits, gradients_at_once: at_once, gradient_operations, .. } = self.needs;
        let windows = GradientWindows { windows: self.windows, count, at_once };
        let (kind, seed) = (self.needs.kinds.of_gradients(), run.plan.seed);
        let compute = Compute { device: self.devices[0], kind };
        let measure =
            || OutputHessians::measure(source, compute, windows, seed, limits, journal, context).map(Some);
        context.phases.time(Phase::Gradients, gradient_operations, measure)
    }

    fn task<'t>(&self, run: &Run<'t>, output_hessians: Option<&'t OutputHessians>) -> Task<'t> {
        let (plan, config) = (run.plan, run.checkpoint.config());
        Task {
            variants: &plan.variants,
            damp: plan.damp(),
            accuracy: plan.accuracy(config),
            kinds: self.needs.kinds,
            output_hessians,
            shared_hessian: plan.shared_hessian,
            on_failure: plan.on_failure,
            layers: config.num_layers(),
        }
    }

    fn pool<'p>(
        &self,
        source: &'p Checkpoint,
        task: Task<'p>,
        journal: &Journal,
        context: RunContext<'p>,
    ) -> Result<WorkerPool<'p>> {
        let kept = journal.kept(self.of_ranks[context.cluster.rank()].clone())?;
        let limits = self.needs.limits;
        let (devices, spill) = (&self.devices, journal.folder());
        WorkerPool::new(source, devices, self.windows, task, limits, spill, kept.as_ref(), context)
    }

    /// Solves a layer. Returns the hidden states behind it, and on the root of several ranks what they have exchanged.
    fn solve_layer(
        &self,
        pool: &mut WorkerPool<'_>,
        layer: usize,
        sink: &mut (dyn Sink + Send),
        task: Task<'_>,
        journal: &Journal,
        context: RunContext<'_>,
    ) -> Result<(Option<NextStates>, Option<LayerExchange>)> {
        let before = context.cluster.exchanged();
        // The last layer has no next layer, so its outputs are dropped.
        let mut next = match layer + 1 < task.layers {
            true => Some(self.next(pool, layer + 1, task, journal, context)?),
            false => None,
        };
        let states = next.as_mut().map(Mutex::new);
        pool.solve_layer(layer, &Mutex::new(sink), states.as_ref())?;
        next.iter_mut().try_for_each(|next| next.gather(context.cluster, &self.of_ranks))?;
        let exchange = self.exchange(layer, context.cluster, before)?;
        Ok((next, exchange))
    }

    /// What the ranks have exchanged in a layer since `before`, on the root of several ranks.
    fn exchange(&self, layer: usize, cluster: &Cluster, before: Exchanged) -> Result<Option<LayerExchange>> {
        if cluster.ranks() == 1 {
            return Ok(None);
        }
        let Exchanged { sent, barriers, waited } = cluster.exchanged().since(before);
        let all = cluster.gather(message::of_floats(&[sent as f64, waited]))?;
        let computed = self.needs.exchange(layer);
        Ok(all.map(|all| {
            let all: Vec<Vec<f64>> = all.iter().map(|own| message::floats(own)).collect();
            LayerExchange {
                layer,
                sent_bytes: all.iter().map(|own| own[0] as u64).collect(),
                computed_bytes: computed.sent as u64,
                barriers,
                computed_barriers: computed.barriers as u64,
                waited_seconds: all.iter().map(|own| own[1]).collect(),
            }
        }))
    }

    /// Files for the hidden states in front of a layer.
    fn next(
        &self,
        pool: &WorkerPool<'_>,
        layer: usize,
        task: Task<'_>,
        journal: &Journal,
        context: RunContext<'_>,
    ) -> Result<NextStates> {
        let values = pool.hidden_size() * self.windows.seq_len();
        journal.next(context.cluster, layer, &task.stream_kinds(), self.windows.count(), values)
    }
}

/// `waited for messages: rank 0 0.1 s, rank 1 2.3 s, of 12.5 s`.
fn waited(exchange: &LayerExchange, seconds: f64) -> String {
    let each = exchange.waited_seconds.iter().enumerate();
    let each: Vec<String> = each.map(|(rank, waited)| format!("rank {rank} {waited:.1} s")).collect();
    format!("waited for messages: {}, of {seconds:.1} s", each.join(", "))
}

/// The speed of the network on the root of a run of several ranks. All ranks call it.
fn network_speed(cluster: &Cluster) -> Result<Option<f64>> {
    if cluster.ranks() == 1 { Ok(None) } else { cluster.measure_speed() }
}

/// The devices of this rank: all that the plan names. In a run of several processes it is one of them, by the rank's number on its
/// machine.
pub(super) fn devices(plan: &Plan, cluster: &Cluster) -> Result<Vec<Choice>> {
    let mut all = device::resolve_all(&plan.device)?;
    if cluster.ranks() == 1 || all.len() == 1 {
        return Ok(all);
    }
    if cluster.local_rank() >= all.len() {
        let expected = format!("a device for each rank on {}", cluster.host());
        return Err(Error::Value { what: "device".into(), expected, found: plan.device.clone() });
    }
    Ok(vec![all.swap_remove(cluster.local_rank())])
}

/// The root alone writes.
struct NoSink;

impl Sink for NoSink {
    fn take(&mut self, _: usize, _: &LinearId, _: &Solved, _: LinearReport) -> Result<()> {
        Ok(())
    }

    fn warn(&mut self, _: String) {}
}
