//! Some variants of one layer on one device or several: capture a stage's statistics, solve it, advance through the quantized
//! weights.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use tch::Kind;

use super::{
    collective::{Collective, connect},
    compute_kinds::ComputeKinds,
    journal::{Kept, NextStates},
    output_hessians::OutputHessians,
    stage_memory::At,
    stage_solver::StageSolver,
    weights::Weights,
    worker::{RunContext, Worker},
};
use crate::{
    accuracy::AccuracyOptions,
    architectures::LinearId,
    calibration::Windows,
    emit::embedding_type,
    error::{Error, Result},
    ggml::BlockType,
    gptq::solver::Solved,
    plan::OnFailure,
    progress::Event,
    report::LinearReport,
    variant::Output,
};

/// Takes solved linears, variant by variant.
pub(super) trait Sink {
    /// Takes a solved linear of one of the run's variants, given by index, and its figures for the report.
    fn take(&mut self, variant: usize, id: &LinearId, linear: &Solved, report: LinearReport) -> Result<()>;

    /// Takes a warning, for the report.
    fn warn(&mut self, text: String);
}

/// A sink for several worker groups.
pub(super) type SharedSink<'s> = Mutex<&'s mut (dyn Sink + Send)>;

/// The files of the hidden states behind a layer, for several worker groups.
pub(super) type SharedStates<'s> = Mutex<&'s mut NextStates>;

/// Settings that do not change during a run.
#[derive(Clone, Copy)]
pub(super) struct Task<'a> {
    /// All of the run's.
    pub(super) variants: &'a [Output],
    pub(super) damp: f64,
    pub(super) accuracy: AccuracyOptions,
    pub(super) kinds: ComputeKinds,
    /// Output Hessians; `None` without that option.
    pub(super) output_hessians: Option<&'a OutputHessians>,
    pub(super) shared_hessian: bool,
    pub(super) on_failure: OnFailure,
    /// Decoder layers.
    pub(super) layers: usize,
}

impl Task<'_> {
    /// Number of streams that are solved with, for so many variants: one each, or one for all with shared Hessians.
    pub(super) fn solved_streams(&self, variants: usize) -> usize {
        if self.shared_hessian { 1 } else { variants }
    }

    /// The kind of each activation stream of the run.
    pub(super) fn stream_kinds(&self) -> Vec<Kind> {
        self.kinds.of_streams(self.variants, self.shared_hessian, self.accuracy.runs_reference())
    }

    /// The stream of the run that is the reference model's beside `variant`, if it is run.
    fn reference_stream(&self, variant: usize) -> Option<usize> {
        let own = self.kinds.of_output(&self.variants[variant]);
        let place = self.kinds.of_outputs(self.variants).iter().position(|&kind| kind == own);
        let place = place.filter(|_| self.accuracy.runs_reference());
        place.map(|place| self.variants.len() + place)
    }
}

/// Devices that work on the same variants, each with a part of the windows; the first solves. The variants' forward passes are of one
/// kind.
pub(super) struct WorkerGroup<'a> {
    /// The first is the root of their collective.
    workers: Vec<Worker<'a>>,
    solver: StageSolver<'a>,
    /// Indices of its variants.
    variants: Vec<usize>,
    task: Task<'a>,
    context: RunContext<'a>,
}

impl<'a> WorkerGroup<'a> {
    pub(super) fn new(
        workers: Vec<Worker<'a>>,
        variants: Vec<usize>,
        task: Task<'a>,
        context: RunContext<'a>,
    ) -> Result<Self> {
        assert!(!workers.is_empty() && !variants.is_empty(), "a group has devices and variants");
        let solver = StageSolver::new(workers[0].config(), workers[0].device(), task, context)?;
        Ok(Self { workers, solver, variants, task, context })
    }

    /// Fills the streams of hidden states: with those that were `kept`, or with the embeddings of the windows.
    pub(super) fn begin(&mut self, windows: &Windows, kept: Option<&Kept>) -> Result<()> {
        let references = usize::from(self.task.accuracy.runs_reference());
        let streams = self.task.solved_streams(self.variants.len()) + references;
        let Some(kept) = kept else {
            let roundings = self.roundings(streams)?;
            return self.workers.iter_mut().try_for_each(|worker| worker.embed(windows, &roundings));
        };
        let reference = self.task.reference_stream(self.variants[0]);
        let files: Vec<_> = match self.task.shared_hessian {
            true => kept.0.clone(),
            false => self.variants.iter().copied().chain(reference).map(|i| kept.0[i].clone()).collect(),
        };
        self.workers.iter_mut().try_for_each(|worker| worker.resume_from(&files))
    }

    /// What the embeddings of each stream are rounded to: a GGUF file's have another type than fp32. Shared Hessians are those of the
    /// unquantized model, and so are its hidden states.
    fn roundings(&self, streams: usize) -> Result<Vec<BlockType>> {
        let mut roundings = vec![BlockType::F32; streams];
        if !self.task.shared_hessian {
            for (rounding, &variant) in roundings.iter_mut().zip(&self.variants) {
                if let Output::Gguf(mix) = self.task.variants[variant] {
                    *rounding = embedding_type(mix, self.workers[0].config())?;
                }
            }
        }
        Ok(roundings)
    }

    /// Progress steps of a layer: each batch to every stage and, but in the last layer, out of the layer; and every solve.
    pub(super) fn steps(&self, layer: usize) -> u64 {
        let config = &self.workers[0].config().layers[layer];
        let (stages, groups) =
            (config.stages.len(), config.stages.iter().map(|stage| stage.groups.len()).sum::<usize>());
        let batches: usize = self.workers.iter().map(Worker::batches).sum();
        let passes = stages + usize::from(layer + 1 < self.task.layers);
        let variants = self.variants.len();
        let mut steps = passes * batches * self.task.solved_streams(variants) + groups * variants;
        if layer == 0 && !self.task.shared_hessian {
            // One capture for all that have the same embeddings.
            steps -= batches * with_embedding(&self.variants, self.task).count().saturating_sub(1);
        }
        if self.task.accuracy.runs_reference() {
            // The first stage's inputs are not captured.
            steps += (passes - 1) * batches;
        }
        steps as u64
    }

    pub(super) fn solver_name(&self) -> &'static str {
        self.solver.name()
    }

    /// Solves a layer for the group's variants, on all devices at the same time.
    pub(super) fn solve_layer<'s>(
        &mut self,
        weights: &Weights,
        sink: &SharedSink<'s>,
        next: Option<&SharedStates<'s>>,
    ) -> Result<()> {
        // A tensor may move to another thread, but two threads may not share it.
        self.solver.enter_layer(weights.layer)?;
        let token_weights = self.solver.token_weights();
        self.workers.iter_mut().try_for_each(|worker| worker.enter_layer(weights, token_weights))?;
        let (variants, task, context) = (&self.variants[..], self.task, self.context);
        let connections = connect(self.workers.len(), context.cluster, context.phases);
        let mut passes = self.workers.iter_mut().zip(connections).map(|(worker, collective)| LayerPass {
            worker,
            collective,
            root: None,
            variants,
            task,
            context,
            next,
        });
        let mut root = passes.next().expect("a group has workers");
        root.root = Some((&mut self.solver, sink));
        let results = thread::scope(|scope| {
            let start = |pass: LayerPass<'_, '_, '_>| {
                let _guard = tch::no_grad_guard();
                pass.solve()
            };
            let others: Vec<_> = passes.map(|pass| scope.spawn(move || start(pass))).collect();
            let mut results = vec![root.solve()];
            results.extend(others.into_iter().map(|thread| thread.join().expect("a worker does not panic")));
            results
        });
        // Workers whose connection ended have stopped because of the one that failed.
        let mut errors: Vec<Error> = results.into_iter().filter_map(Result::err).collect();
        let cause = errors.iter().position(|error| !matches!(error, Error::Interrupted)).unwrap_or(0);
        if !errors.is_empty() {
            return Err(errors.swap_remove(cause));
        }
        self.workers.iter_mut().for_each(Worker::forget_layer);
        Ok(())
    }
}

/// One worker's way through one layer. All workers of a group take the same steps, and the root also solves.
struct LayerPass<'w, 's, 'a> {
    worker: &'w mut Worker<'a>,
    collective: Box<dyn Collective + Send + 'w>,
    /// Solver and output of the root; `None` on other workers.
    root: Option<(&'w mut StageSolver<'a>, &'w SharedSink<'s>)>,
    /// Indices of the group's variants.
    variants: &'w [usize],
    task: Task<'a>,
    context: RunContext<'a>,
    /// `None` in the last layer, whose outputs are dropped.
    next: Option<&'w SharedStates<'s>>,
}

impl LayerPass<'_, '_, '_> {
    fn solve(mut self) -> Result<()> {
        if self.task.shared_hessian { self.solve_shared() } else { self.solve_each() }
    }

    /// Each variant on hidden states of its own, which are advanced through the quantized layer.
    fn solve_each(&mut self) -> Result<()> {
        let (layer, stages) = (self.worker.weights().layer, self.worker.layer().stages.len());
        let reference = self.task.accuracy.runs_reference().then_some(self.variants.len());
        if let Some(reference) = reference {
            self.run_reference(layer, reference)?;
        }
        // Before the first layer all variants but GGUF files have the same hidden states, which are the reference model's too: one
        // Hessian for all.
        let same: Vec<(usize, usize)> = match layer {
            0 => with_embedding(self.variants, self.task).collect(),
            _ => Vec::new(),
        };
        let mut first_stage = match same.first() {
            Some(&(stream, _)) => {
                let variants: Vec<usize> = same.iter().map(|(_, variant)| *variant).collect();
                self.solve_stage(0, &variants, stream, None)?.map(|all| all.into_iter())
            }
            None => None,
        };
        for (stream, &variant) in self.variants.iter().enumerate() {
            for stage in 0..stages {
                let solved = if stage == 0 && same.contains(&(stream, variant)) {
                    first_stage.as_mut().and_then(Iterator::next)
                } else {
                    let solved = self.solve_stage(stage, &[variant], stream, reference)?;
                    solved.map(|mut all| all.swap_remove(0))
                };
                if stage + 1 < stages || self.next.is_some() {
                    self.set_solved(stage, solved)?;
                }
            }
            self.leave_layer(stream, variant)?;
        }
        if let Some(reference) = reference {
            self.worker.leave_reference(reference);
        }
        Ok(())
    }

    /// Solves all variants with the Hessians of the reference model, whose hidden states are advanced. There is one forward
    /// pass and one Hessian for a stage, and one factorization for a column order.
    fn solve_shared(&mut self) -> Result<()> {
        for stage in 0..self.worker.layer().stages.len() {
            drop(self.solve_stage(stage, self.variants, 0, None)?);
            self.worker.set_dense(stage)?;
        }
        self.leave_layer(0, 0)
    }

    /// Captures a stage's statistics on `stream` and solves it for some variants. The root gets the linears of each
    /// variant, the other workers `None`.
    fn solve_stage(
        &mut self,
        stage: usize,
        variants: &[usize],
        stream: usize,
        reference: Option<usize>,
    ) -> Result<Option<Vec<Vec<Solved>>>> {
        if self.root.is_some() {
            let variant = match variants {
                [one] => self.task.variants[*one].to_string(),
                _ => "all variants".to_owned(),
            };
            let stage = self.worker.layer().stages[stage].name();
            self.context.progress.event(&Event::Stage { variant: &variant, stage: &stage });
            self.context.memory.enter(At::Calibrating);
        }
        let keep = self.collective.continues_sums();
        let own = self.worker.capture(stage, stream, reference, keep)?;
        let sums = self.collective.sum(own)?;
        let (Some((solver, sink)), Some(sums)) = (&self.root, sums) else { return Ok(None) };
        let solve = self
            .worker
            .solve_with(|weights, free| solver.solve_stage(weights, stage, sums, variants, sink, free));
        solve.map(Some)
    }

    /// Sets the linears that the windows leave a stage through: those that the root has solved.
    fn set_solved(&mut self, stage: usize, solved: Option<Vec<Solved>>) -> Result<()> {
        let kind = self.worker.kind();
        let weights = solved.map(|solved| solved.iter().map(|linear| linear.dequantize(kind)).collect());
        let weights = self.collective.broadcast(weights.transpose()?)?;
        self.worker.set_solved(stage, &weights)
    }

    /// Advances the reference model's hidden states, and keeps the inputs of its stages in this layer. Every group does so;
    /// that of the first variant of a kind writes the hidden states to the journal.
    fn run_reference(&mut self, layer: usize, reference: usize) -> Result<()> {
        if self.root.is_some() {
            self.context.memory.enter(At::Calibrating);
            let stage = Event::Stage { variant: "unquantized", stage: "all of the layer" };
            self.context.progress.event(&stage);
        }
        let of_all = self.task.reference_stream(self.variants[0]).expect("it is run");
        let first = (0..self.variants[0]).all(|other| self.task.reference_stream(other) != Some(of_all));
        let next = self.next.filter(|_| first);
        let file = next.map(|next| Arc::clone(lock(next).file(of_all)));
        self.worker.run_reference(reference, file.as_ref(), layer + 1 == self.task.layers)?;
        if file.is_some() { self.sync(of_all) } else { Ok(()) }
    }

    /// Advances a stream of hidden states behind the layer, also into the run's file `of_all`.
    fn leave_layer(&mut self, stream: usize, of_all: usize) -> Result<()> {
        let Some(next) = self.next else {
            self.worker.end();
            return Ok(());
        };
        let file = Arc::clone(lock(next).file(of_all));
        self.worker.leave_layer(stream, &file)?;
        self.sync(of_all)
    }

    /// Has a file of hidden states synced once all workers have written their part.
    fn sync(&mut self, of_all: usize) -> Result<()> {
        self.collective.barrier()?;
        if let (Some(_), Some(next)) = (&self.root, self.next) {
            lock(next).sync(of_all);
        }
        Ok(())
    }
}

/// Streams and variants whose hidden states begin with the embedding as it is.
fn with_embedding<'v>(variants: &'v [usize], task: Task<'v>) -> impl Iterator<Item = (usize, usize)> + 'v {
    let of_all = variants.iter().copied().enumerate();
    of_all.filter(move |&(_, variant)| task.variants[variant].gptq().is_some())
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
