//! All devices of a run: variants are spread over them first, then windows.

use std::{ops::Range, path::Path, sync::Arc, thread};

use tch::{Device, Kind};

use super::{
    journal::Kept,
    memory::{ActivationStore, MemoryBudget},
    weights::Weights,
    worker::{RunContext, Worker},
    worker_group::{SharedSink, SharedStates, Task, WorkerGroup},
};
use crate::{
    calibration::Windows,
    checkpoint::Checkpoint,
    error::Result,
    gptq::solver::{CpuSolver, CudaSolver, OrRounded, Solver},
    model::Transformer,
    plan::OnFailure,
};

/// What may be held where, bytes; `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    /// Activations on each device that is not the CPU.
    pub(super) on_device: Option<u64>,
    /// Activations in memory, of all devices together.
    pub(super) in_memory: Option<u64>,
    /// Tokens that go through the model together.
    pub(super) batch_tokens: usize,
}

/// All worker groups of a run.
pub(super) struct WorkerPool<'a> {
    checkpoint: &'a Checkpoint,
    groups: Vec<WorkerGroup<'a>>,
    layers: usize,
    /// The next layer's weights, read while this one is solved; only worth it beside a device that is not the CPU.
    next: Option<Weights>,
    pinned_for: Option<Device>,
}

impl<'a> WorkerPool<'a> {
    /// Spreads the work over `devices`, and embeds the windows or goes on with hidden states that were `kept`. `spill` is a
    /// folder for what does not fit memory.
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        devices: &[Device],
        kind: Kind,
        windows: &Windows,
        task: Task<'a>,
        limits: Limits,
        spill: &Path,
        kept: Option<&Kept>,
        context: RunContext<'a>,
    ) -> Result<Self> {
        let streams = if task.shared_hessian { 1 } else { task.variants.len() };
        let memory = MemoryBudget::new(limits.in_memory);
        let per_batch = (limits.batch_tokens / windows.seq_len()).max(1);
        let mut groups = Vec::new();
        for (devices, own) in spread(devices, streams) {
            let parts = split(windows.count(), devices.len());
            let mut workers = Vec::with_capacity(devices.len());
            for (&device, part) in devices.iter().zip(parts) {
                let near = match device {
                    Device::Cpu => Arc::clone(&memory),
                    _ => MemoryBudget::new(limits.on_device),
                };
                let room = ActivationStore::new(device, kind, near, Arc::clone(&memory), spill)?;
                let transformer = Transformer::new(checkpoint, windows.seq_len(), kind, device)?;
                workers.push(Worker::new(transformer, room, part, windows.seq_len(), per_batch, context));
            }
            let variants =
                if task.shared_hessian { (0..task.variants.len()).collect() } else { own.collect() };
            let mut group = WorkerGroup::new(workers, solver(devices[0], task)?, variants, task, context);
            let streams = group.all_streams();
            let own: Vec<_> = match kept {
                Some(kept) if task.shared_hessian => kept.files.clone(),
                Some(kept) => {
                    let reference = task.accuracy.runs_reference().then_some(task.variants.len());
                    let own = group.variants().iter().copied().chain(reference);
                    own.map(|v| Arc::clone(&kept.files[v])).collect()
                }
                None => Vec::new(),
            };
            group.workers.iter_mut().try_for_each(|worker| match kept {
                Some(kept) => worker.resume_from(&own, kept.kind),
                None => worker.embed(windows, streams),
            })?;
            groups.push(group);
        }
        let pinned_for = devices.iter().copied().find(|d| *d != Device::Cpu);
        Ok(Self { checkpoint, groups, layers: task.layers, next: None, pinned_for })
    }

    pub(super) fn solver_name(&self) -> &'static str {
        self.groups[0].solver_name()
    }

    /// Progress steps of a layer.
    pub(super) fn steps(&self, layer: usize) -> u64 {
        self.groups.iter().map(|group| group.steps(layer)).sum()
    }

    /// Solves a layer for all variants; hidden states behind it go into `next` too, if anybody goes on from them.
    pub(super) fn solve_layer(
        &mut self,
        layer: usize,
        sink: &SharedSink<'_>,
        next: Option<&SharedStates<'_>>,
    ) -> Result<()> {
        let (checkpoint, pinned_for) = (self.checkpoint, self.pinned_for);
        let weights = match self.next.take() {
            Some(weights) => weights,
            None => Weights::read(checkpoint, layer, pinned_for)?,
        };
        if pinned_for.is_none() && self.groups.len() == 1 {
            return self.groups[0].solve_layer(&weights, sink, next);
        }
        let prefetch = pinned_for.is_some() && layer + 1 < self.layers;
        let (solved, ahead) = thread::scope(|scope| {
            let ahead =
                prefetch.then(|| scope.spawn(move || Weights::read(checkpoint, layer + 1, pinned_for)));
            let solved = solve_all(&mut self.groups, weights, sink, next);
            (solved, ahead.map(|thread| thread.join().expect("reading does not panic")))
        });
        solved?;
        self.next = ahead.transpose()?;
        Ok(())
    }
}

/// All groups at the same time.
fn solve_all(
    groups: &mut [WorkerGroup<'_>],
    weights: Weights,
    sink: &SharedSink<'_>,
    next: Option<&SharedStates<'_>>,
) -> Result<()> {
    if let [only] = groups {
        return only.solve_layer(&weights, sink, next);
    }
    // Tensors may go to other threads, but not be looked at by two.
    let copies = (0..groups.len()).map(|_| weights.on(Device::Cpu)).collect::<Result<Vec<_>>>()?;
    thread::scope(|scope| {
        let start = |(group, weights): (&'_ mut WorkerGroup<'_>, Weights)| -> Result<()> {
            let _guard = tch::no_grad_guard();
            group.solve_layer(&weights, sink, next)
        };
        let mut threads = Vec::with_capacity(groups.len());
        for (group, weights) in groups.iter_mut().zip(copies) {
            threads.push(scope.spawn(move || start((group, weights))));
        }
        threads.into_iter().try_for_each(|thread| thread.join().expect("a group's thread does not panic"))
    })
}

/// The fastest there is for a device.
fn solver(device: Device, task: Task<'_>) -> Result<Box<dyn Solver + Send>> {
    let scales = task.accuracy.scales;
    Ok(match (device, task.on_failure) {
        (Device::Cpu, OnFailure::Error) => Box::new(CpuSolver::new().with_scales(scales)),
        (Device::Cpu, OnFailure::Rtn) => Box::new(OrRounded(CpuSolver::new().with_scales(scales))),
        (_, OnFailure::Error) => Box::new(CudaSolver::new(device)?.with_scales(scales)),
        (_, OnFailure::Rtn) => Box::new(OrRounded(CudaSolver::new(device)?.with_scales(scales))),
    })
}

/// Which devices work on which of `streams` variants: each on some variants; where there are more devices than variants,
/// several on one.
fn spread(devices: &[Device], streams: usize) -> Vec<(Vec<Device>, Range<usize>)> {
    let groups = devices.len().min(streams);
    let own = split(streams, groups);
    let devices = split(devices.len(), groups).into_iter().map(|part| devices[part].to_vec());
    devices.zip(own).collect()
}

/// `count` things in `parts` runs, as even as can be, the first ones longer.
fn split(count: usize, parts: usize) -> Vec<Range<usize>> {
    let start = |part: usize| part * (count / parts) + part.min(count % parts);
    (0..parts).map(|part| start(part)..start(part + 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_are_spread_before_windows() {
        let gpus = |count| (0..count).map(Device::Cuda).collect::<Vec<_>>();
        assert_eq!(spread(&gpus(1), 4), [(gpus(1), 0..4)]);
        let two = spread(&gpus(2), 3);
        assert_eq!(two, [(vec![Device::Cuda(0)], 0..2), (vec![Device::Cuda(1)], 2..3)]);
        let three = spread(&gpus(3), 2);
        assert_eq!(three, [(gpus(2), 0..1), (vec![Device::Cuda(2)], 1..2)]);
        assert_eq!(split(7, 3), [0..3, 3..5, 5..7]);
    }
}
