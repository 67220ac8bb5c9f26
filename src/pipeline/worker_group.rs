//! Some variants of one layer on one device or several: take a stage's statistics, solve it, advance through the quantized weights.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use super::{
    journal::NextStates,
    output_hessians::{LayerFactors, OutputHessians},
    stage_memory::At,
    stage_solver::LinearStatistics,
    statistics::CalibrationStatistics,
    weights::Weights,
    worker::{RunContext, Worker},
};
use crate::{
    accuracy::AccuracyOptions,
    architectures::{LayerConfig, LinearId},
    error::Result,
    gptq::solver::{Solved, Solver},
    plan::OnFailure,
    progress::Event,
    variant::Variant,
};

/// Takes solved linears, variant by variant.
pub(super) trait Sink {
    /// `variant` is an index into the run's variants.
    fn take(
        &mut self,
        variant: usize,
        id: LinearId,
        linear: &Solved,
        statistics: LinearStatistics,
    ) -> Result<()>;

    /// Takes a warning, for the report.
    fn warn(&mut self, text: String);
}

/// A sink for several worker groups.
pub(super) type SharedSink<'s> = Mutex<&'s mut (dyn Sink + Send)>;

/// The file that the hidden states behind a layer go to, for several worker groups.
pub(super) type SharedStates<'s> = Mutex<&'s mut NextStates>;

/// What does not change during a run.
#[derive(Clone, Copy)]
pub(super) struct Task<'a> {
    /// All of the run's.
    pub(super) variants: &'a [Variant],
    pub(super) damp: f64,
    pub(super) accuracy: AccuracyOptions,
    /// What errors in outputs cost, where that is used.
    pub(super) output_hessians: Option<&'a OutputHessians>,
    pub(super) shared_hessian: bool,
    pub(super) on_failure: OnFailure,
    /// Decoder layers.
    pub(super) layers: usize,
}

impl Task<'_> {
    /// Number of activation streams: one per variant, plus one for the reference model if it is run; or only the reference model's.
    pub(super) fn streams(&self) -> usize {
        if self.shared_hessian {
            1
        } else {
            self.variants.len() + usize::from(self.accuracy.runs_reference())
        }
    }
}

/// Devices that work on the same variants, each with a part of the windows; the first solves.
pub(super) struct WorkerGroup<'a> {
    pub(super) workers: Vec<Worker<'a>>,
    pub(super) solver: Box<dyn Solver + Send>,
    /// Indices of its variants.
    variants: Vec<usize>,
    pub(super) task: Task<'a>,
    pub(super) context: RunContext<'a>,
    /// Of the layer that is worked on.
    pub(super) outputs: Option<LayerFactors>,
}

impl<'a> WorkerGroup<'a> {
    pub(super) fn new(
        workers: Vec<Worker<'a>>,
        solver: Box<dyn Solver + Send>,
        variants: Vec<usize>,
        task: Task<'a>,
        context: RunContext<'a>,
    ) -> Self {
        assert!(!workers.is_empty() && !variants.is_empty(), "a group has work and someone to do it");
        Self { workers, solver, variants, task, context, outputs: None }
    }

    /// Streams of variants' hidden states, or the reference model's one where only these are advanced.
    fn streams(&self) -> usize {
        if self.task.shared_hessian { 1 } else { self.variants.len() }
    }

    /// All streams of hidden states, with the reference model's.
    pub(super) fn all_streams(&self) -> usize {
        self.streams() + usize::from(self.task.accuracy.runs_reference())
    }

    /// Progress steps of a layer: each batch to every stage and, but in the last layer, out of the layer; and every solve.
    pub(super) fn steps(&self, layer: usize) -> u64 {
        let config = &self.workers[0].config().layers[layer];
        let (stages, groups) =
            (config.stages.len(), config.stages.iter().map(|stage| stage.groups.len()).sum::<usize>());
        let batches: usize = self.workers.iter().map(Worker::batches).sum();
        let passes = stages + usize::from(!self.is_last(layer));
        let mut steps = passes * batches * self.streams() + groups * self.variants.len();
        if layer == 0 && !self.task.shared_hessian {
            // One capture for all.
            steps -= batches * (self.variants.len() - 1);
        }
        if self.task.accuracy.runs_reference() {
            // The first stage's inputs are not captured.
            steps += (passes - 1) * batches;
        }
        steps as u64
    }

    /// Indices of its variants.
    pub(super) fn variants(&self) -> &[usize] {
        &self.variants
    }

    pub(super) fn solver_name(&self) -> &'static str {
        self.solver.name()
    }

    fn is_last(&self, layer: usize) -> bool {
        layer + 1 == self.task.layers
    }

    /// The layer that was entered.
    pub(super) fn layer(&self) -> &'a LayerConfig {
        self.workers[0].layer()
    }

    /// Solves a layer for the group's variants.
    pub(super) fn solve_layer(
        &mut self,
        weights: &Weights,
        sink: &SharedSink<'_>,
        next: Option<&SharedStates<'_>>,
    ) -> Result<()> {
        // Tensors may go to other threads, but not be looked at by two.
        self.workers.iter_mut().try_for_each(|worker| worker.enter_layer(weights))?;
        let (config, device) = (self.workers[0].config(), self.workers[0].device());
        let factors = |all: &OutputHessians| all.factors(config, weights.layer, device);
        self.outputs = self.task.output_hessians.map(factors).transpose()?;
        if self.task.shared_hessian {
            self.solve_shared(sink, next)?;
        } else {
            self.solve_each(weights.layer, sink, next)?;
        }
        self.workers.iter_mut().for_each(Worker::forget_layer);
        Ok(())
    }

    /// Each variant on hidden states of its own, which are advanced through the quantized layer.
    fn solve_each(
        &mut self,
        layer: usize,
        sink: &SharedSink<'_>,
        next: Option<&SharedStates<'_>>,
    ) -> Result<()> {
        let all = self.variants.clone();
        let reference = self.task.accuracy.runs_reference().then_some(all.len());
        if let Some(reference) = reference {
            self.run_reference(layer, reference, next)?;
        }
        // Before the first layer all variants have the same hidden states, which are the reference model's too: one Hessian for all.
        let mut first_stage = Vec::new();
        if layer == 0 {
            let statistics = self.capture(0, None, 0, None)?;
            first_stage = self.solve_stage(0, statistics, &all, sink)?;
        }
        let stages = self.layer().stages.len();
        for (stream, &variant) in all.iter().enumerate() {
            for stage in 0..stages {
                let solved = if layer == 0 && stage == 0 {
                    std::mem::take(&mut first_stage[stream])
                } else {
                    let statistics = self.capture(stage, Some(variant), stream, reference)?;
                    self.solve_stage(stage, statistics, &[variant], sink)?.swap_remove(0)
                };
                if stage + 1 < stages || next.is_some() {
                    self.set_solved(stage, &solved)?;
                }
            }
            self.leave_layer(stream, variant, next)?;
        }
        if let Some(reference) = reference {
            self.workers.iter_mut().for_each(|worker| worker.leave_reference(reference));
        }
        Ok(())
    }

    /// All variants with the Hessians of the reference model, whose hidden states are advanced: one forward pass and one
    /// Hessian a stage, one factorization a column order.
    fn solve_shared(&mut self, sink: &SharedSink<'_>, next: Option<&SharedStates<'_>>) -> Result<()> {
        let all = self.variants.clone();
        for stage in 0..self.layer().stages.len() {
            let statistics = self.capture(stage, None, 0, None)?;
            drop(self.solve_stage(stage, statistics, &all, sink)?);
            self.on_all(|worker| worker.set_dense(stage))?;
        }
        self.leave_layer(0, 0, next)
    }

    /// Advances the reference model's hidden states, and keeps what its stages get in this layer. Every group has them;
    /// that of the first variant writes them to the journal.
    fn run_reference(
        &mut self,
        layer: usize,
        reference: usize,
        next: Option<&SharedStates<'_>>,
    ) -> Result<()> {
        self.context.memory.enter(At::Calibrating);
        self.context.progress.event(&Event::Stage { variant: "unquantized", stage: "all of the layer" });
        let of_all = self.task.variants.len();
        let next = next.filter(|_| self.variants[0] == 0);
        let file = next.map(|next| Arc::clone(lock(next).file(of_all)));
        let last = self.is_last(layer);
        self.on_all(|worker| worker.run_reference(reference, file.as_ref(), last))?;
        if let Some(next) = next {
            lock(next).sync(of_all);
        }
        Ok(())
    }

    /// Advances a stream of hidden states behind the layer, into the run's file `of_all` too; the last layer's outputs are dropped.
    fn leave_layer(&mut self, stream: usize, of_all: usize, next: Option<&SharedStates<'_>>) -> Result<()> {
        let Some(next) = next else {
            self.workers.iter_mut().for_each(Worker::end);
            return Ok(());
        };
        let file = Arc::clone(lock(next).file(of_all));
        self.on_all(|worker| worker.leave_layer(stream, &file))?;
        lock(next).sync(of_all);
        Ok(())
    }

    /// The statistics of a stage's groups: all devices' sums, added in their order.
    fn capture(
        &mut self,
        stage: usize,
        variant: Option<usize>,
        stream: usize,
        reference: Option<usize>,
    ) -> Result<Vec<CalibrationStatistics>> {
        let variant = variant.map_or("all variants".to_owned(), |v| self.task.variants[v].to_string());
        let name = self.layer().stages[stage].name();
        self.context.progress.event(&Event::Stage { variant: &variant, stage: &name });
        self.context.memory.enter(At::Calibrating);
        let mut parts = self.on_all(|worker| worker.capture(stage, stream, reference))?.into_iter();
        let mut sums = parts.next().expect("a group has workers");
        for part in parts {
            for (sum, other) in sums.iter_mut().zip(part) {
                sum.absorb(other)?;
            }
        }
        Ok(sums)
    }

    /// The windows leave a stage through what was solved.
    fn set_solved(&mut self, stage: usize, solved: &[Solved]) -> Result<()> {
        // What is solved lies on the first device and does not go from thread to thread.
        self.workers.iter_mut().try_for_each(|worker| worker.set_solved(stage, solved))
    }

    /// Does something on all devices at the same time.
    fn on_all<T: Send>(&mut self, work: impl Fn(&mut Worker<'a>) -> Result<T> + Sync) -> Result<Vec<T>> {
        if let [only] = &mut self.workers[..] {
            return Ok(vec![work(only)?]);
        }
        thread::scope(|scope| {
            let work = &work;
            let start = |worker| {
                scope.spawn(move || {
                    let _guard = tch::no_grad_guard();
                    work(worker)
                })
            };
            let started: Vec<_> = self.workers.iter_mut().map(start).collect();
            let joined =
                started.into_iter().map(|thread| thread.join().expect("a device's thread does not panic"));
            joined.collect()
        })
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
