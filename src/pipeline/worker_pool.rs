//! All devices of a run: variants are spread over them first, those of one kind together, then windows.

use std::{ops::Range, path::Path, sync::Arc, thread};

use tch::{Device, Kind};

use super::{
    journal::Kept,
    memory::{ActivationStore, Limits, MemoryBudget},
    weights::Weights,
    worker::{RunContext, Worker},
    worker_group::{SharedSink, SharedStates, Task, WorkerGroup},
};
use crate::{
    calibration::Windows,
    checkpoint::Checkpoint,
    cluster::{split, windows_of_ranks},
    cuda::HostPool,
    error::Result,
    model::Transformer,
    report::Phase,
};

/// All worker groups of a run.
pub(super) struct WorkerPool<'a> {
    checkpoint: &'a Checkpoint,
    /// Of each kind of forward passes.
    groups: Vec<Vec<WorkerGroup<'a>>>,
    layers: usize,
    /// The next layer's weights, read while this one is solved. Only beside a device that is not the CPU, where it saves time.
    next: Option<Weights>,
    /// Memory of weights, if devices other than the CPU copy them.
    page_locked: Option<Arc<HostPool>>,
    context: RunContext<'a>,
}

impl<'a> WorkerPool<'a> {
    /// Spreads the work over `devices`. Hidden states begin with those that were `kept`, or with the embeddings of the windows.
    /// `spill` is a folder for activations that do not fit memory.
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        devices: &[Device],
        windows: &Windows,
        task: Task<'a>,
        limits: Limits,
        spill: &Path,
        kept: Option<&Kept>,
        context: RunContext<'a>,
    ) -> Result<Self> {
        let memory = MemoryBudget::new(limits.in_memory);
        let per_batch = limits.windows_per_batch(windows.seq_len());
        let cluster = context.cluster;
        let of_rank =
            windows_of_ranks(windows.count(), per_batch, cluster.ranks()).swap_remove(cluster.rank());
        let group = |kind: Kind, devices: &[Device], variants: Vec<usize>| {
            let parts = split(of_rank.len(), devices.len()).into_iter();
            let parts = parts.map(|part| of_rank.start + part.start..of_rank.start + part.end);
            let worker = |(&device, part): (&Device, Range<usize>)| {
                let store = ActivationStore::new(device, kind, limits.on_device, &memory, spill)?;
                let transformer = Transformer::new(checkpoint, windows.seq_len(), kind, device)?;
                let (statistics, seq_len) = (task.kinds.usual, windows.seq_len());
                Ok(Worker::new(transformer, statistics, store, part, seq_len, per_batch, context))
            };
            let workers = devices.iter().zip(parts).map(worker).collect::<Result<_>>()?;
            let mut group = WorkerGroup::new(workers, variants, task, context)?;
            group.begin(windows, kept)?;
            Ok(group)
        };
        let of_kind = |kind: Kind| {
            let of_kind = |&i: &usize| task.kinds.of_output(&task.variants[i]) == kind;
            let all: Vec<usize> = (0..task.variants.len()).filter(of_kind).collect();
            let spread = spread(devices, task.solved_streams(all.len())).into_iter();
            // With shared Hessians all are solved together.
            let own = |part: Range<usize>| if task.shared_hessian { all.clone() } else { all[part].to_vec() };
            spread.map(|(devices, part)| group(kind, &devices, own(part))).collect()
        };
        let groups = task.kinds.of_outputs(task.variants).into_iter().map(of_kind).collect::<Result<_>>()?;
        let page_locked = (devices[0] != Device::Cpu).then(|| HostPool::for_libtorch(devices)).transpose()?;
        Ok(Self { checkpoint, groups, layers: task.layers, next: None, page_locked, context })
    }

    pub(super) fn solver_name(&self) -> &'static str {
        self.groups[0][0].solver_name()
    }

    /// Width of the hidden states.
    pub(super) fn hidden_size(&self) -> usize {
        self.checkpoint.config().hidden_size
    }

    /// Progress steps of a layer.
    pub(super) fn steps(&self, layer: usize) -> u64 {
        self.groups.iter().flatten().map(|group| group.steps(layer)).sum()
    }

    /// Solves a layer for all variants. The hidden states behind it are also written to `next`; the last layer has none.
    pub(super) fn solve_layer<'s>(
        &mut self,
        layer: usize,
        sink: &SharedSink<'s>,
        next: Option<&SharedStates<'s>>,
    ) -> Result<()> {
        let (checkpoint, page_locked) = (self.checkpoint, self.page_locked.as_ref());
        let weights = match self.next.take() {
            Some(weights) => weights,
            None => {
                let read = || Weights::read(checkpoint, layer, page_locked);
                self.context.phases.time(Phase::Weights, 0.0, read)?
            }
        };
        let prefetch = page_locked.is_some() && layer + 1 < self.layers;
        let (solved, ahead) = thread::scope(|scope| {
            let ahead =
                prefetch.then(|| scope.spawn(move || Weights::read(checkpoint, layer + 1, page_locked)));
            let mut kinds = self.groups.iter_mut();
            let solved = kinds.try_for_each(|groups| solve_all(groups, &weights, sink, next));
            (solved, ahead.map(|thread| thread.join().expect("reading does not panic")))
        });
        solved?;
        self.next = ahead.transpose()?;
        Ok(())
    }
}

/// Solves a layer in some groups at the same time.
fn solve_all<'s>(
    groups: &mut [WorkerGroup<'_>],
    weights: &Weights,
    sink: &SharedSink<'s>,
    next: Option<&SharedStates<'s>>,
) -> Result<()> {
    if let [only] = groups {
        return only.solve_layer(weights, sink, next);
    }
    // A tensor may move to another thread, but two threads may not share it.
    let copies = (0..groups.len()).map(|_| weights.on(Device::Cpu)).collect::<Result<Vec<_>>>()?;
    thread::scope(|scope| {
        let start = |(group, weights): (&mut WorkerGroup<'_>, Weights)| {
            let _guard = tch::no_grad_guard();
            group.solve_layer(&weights, sink, next)
        };
        let threads: Vec<_> =
            groups.iter_mut().zip(copies).map(|own| scope.spawn(move || start(own))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("a group's thread does not panic"))
    })
}

/// Spreads `streams` variants over devices: each device has some variants, or several devices share one variant where there
/// are more devices than variants.
fn spread(devices: &[Device], streams: usize) -> Vec<(Vec<Device>, Range<usize>)> {
    let groups = devices.len().min(streams);
    let own = split(streams, groups);
    let devices = split(devices.len(), groups).into_iter().map(|part| devices[part].to_vec());
    devices.zip(own).collect()
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
    }
}
