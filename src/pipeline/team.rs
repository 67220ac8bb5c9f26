//! Some variants of one layer on one device or several: capture a stage's inputs, solve it, go on with the quantized weights.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use super::{
    dense_path::Capture,
    journal::NextStates,
    member::{Member, Surroundings},
    output_hessians::{LayerFactors, OutputHessians},
    stage_memory::At,
    stage_solving::{Outcome, Record},
    weights::Weights,
    window_file::WindowFile,
};
use crate::{
    accuracy::Refinements,
    checkpoint::LinearId,
    error::Result,
    gptq::solver::{Solved, Solver},
    model::Stage,
    plan::OnFailure,
    progress::Event,
    variant::Variant,
};

/// Takes solved linears, variant by variant.
pub(super) trait Sink {
    /// `variant` is an index into the run's variants.
    fn take(&mut self, variant: usize, id: LinearId, linear: &Solved, record: Record) -> Result<()>;

    /// Takes a warning, for the report.
    fn warn(&mut self, text: String);
}

/// A sink for several teams.
pub(super) type SharedSink<'s> = Mutex<&'s mut (dyn Sink + Send)>;

/// Where the hidden states behind a layer go, for several teams.
pub(super) type SharedStates<'s> = Mutex<&'s mut NextStates>;

/// What does not change during a run.
#[derive(Clone, Copy)]
pub(super) struct Task<'a> {
    /// All of the run's.
    pub(super) variants: &'a [Variant],
    pub(super) damp: f64,
    pub(super) refinements: Refinements,
    /// Windows on which the unquantized model's hidden states are advanced beside the variants'.
    pub(super) dense_windows: usize,
    /// What errors in outputs cost, where that is looked at.
    pub(super) output_hessians: Option<&'a OutputHessians>,
    pub(super) shared_hessian: bool,
    pub(super) on_failure: OnFailure,
    /// Decoder layers.
    pub(super) layers: usize,
}

impl Task<'_> {
    /// Hidden states that are advanced, and of how many of all `windows`: the variants' own and, where it is followed, the unquantized model's; or only the
    /// unquantized model's.
    pub(super) fn streams(&self, windows: usize) -> Vec<usize> {
        if self.shared_hessian {
            return vec![windows];
        }
        let dense = (self.dense_windows > 0).then_some(self.dense_windows);
        self.variants.iter().map(|_| windows).chain(dense).collect()
    }

    /// Whether the unquantized model's hidden states are advanced beside the variants'.
    pub(super) fn follows_dense(&self) -> bool {
        self.dense_windows > 0
    }

    /// Whether the scales of each layer are tuned once it is solved.
    pub(super) fn tunes(&self) -> bool {
        self.refinements.tune > 0
    }
}

/// Devices that work on the same variants, each with a part of the windows; the first solves.
pub(super) struct Team<'a> {
    pub(super) members: Vec<Member<'a>>,
    pub(super) solver: Box<dyn Solver + Send>,
    /// Indices of its variants.
    variants: Vec<usize>,
    pub(super) task: Task<'a>,
    pub(super) around: Surroundings<'a>,
    /// Of the layer that is worked on.
    pub(super) outputs: Option<LayerFactors>,
}

impl<'a> Team<'a> {
    pub(super) fn new(
        members: Vec<Member<'a>>,
        solver: Box<dyn Solver + Send>,
        variants: Vec<usize>,
        task: Task<'a>,
        around: Surroundings<'a>,
    ) -> Self {
        assert!(!members.is_empty() && !variants.is_empty(), "a team has work and someone to do it");
        Self { members, solver, variants, task, around, outputs: None }
    }

    /// Hidden states of variants, or the unquantized model's where only these are advanced.
    pub(super) fn streams(&self) -> usize {
        if self.task.shared_hessian { 1 } else { self.variants.len() }
    }

    /// The stream of the unquantized model's hidden states, where it is followed.
    fn dense_stream(&self) -> Option<usize> {
        self.task.follows_dense().then_some(self.variants.len())
    }

    /// Progress steps of a layer: each batch through four captures and, but in the last layer, out of the layer; and each
    /// variant's four solves.
    pub(super) fn steps(&self, layer: usize) -> u64 {
        let batches: usize = self.members.iter().map(Member::batches).sum();
        let passes = Stage::ALL.len() + usize::from(!self.is_last(layer));
        let mut steps = passes * batches * self.streams() + Stage::ALL.len() * self.variants.len();
        if layer == 0 && !self.task.shared_hessian {
            // One capture for all.
            steps -= batches * (self.variants.len() - 1);
        }
        if self.task.follows_dense() {
            let batches: usize = self.members.iter().map(Member::dense_batches).sum();
            // No capture of the first stage's inputs.
            steps += (passes - 1) * batches;
            if self.task.tunes() && self.is_last(layer) {
                steps += batches;
            }
        }
        if self.task.tunes() {
            steps += self.task.refinements.tune as usize * self.variants.len();
        }
        steps as u64
    }

    /// Indices of its variants.
    pub(super) fn variants(&self) -> &[usize] {
        &self.variants
    }

    pub(super) fn members_mut(&mut self) -> &mut [Member<'a>] {
        &mut self.members
    }

    pub(super) fn solver_name(&self) -> &'static str {
        self.solver.name()
    }

    fn is_last(&self, layer: usize) -> bool {
        layer + 1 == self.task.layers
    }

    /// Solves a layer for the team's variants.
    pub(super) fn solve_layer(
        &mut self,
        layer: usize,
        weights: &Weights,
        sink: &SharedSink<'_>,
        next: Option<&SharedStates<'_>>,
    ) -> Result<()> {
        // Tensors may go to other threads, but not be looked at by two.
        self.members.iter_mut().try_for_each(|member| member.enter_layer(weights))?;
        let (config, device) = (self.members[0].config(), self.members[0].device());
        self.outputs = self.task.output_hessians.map(|all| all.factors(config, layer, device)).transpose()?;
        if self.task.shared_hessian {
            self.solve_shared(layer, sink, next)?;
        } else {
            self.solve_each(layer, sink, next)?;
        }
        self.members.iter_mut().for_each(Member::forget_layer);
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
        let follows = self.dense_stream();
        if let Some(dense) = follows {
            self.run_dense(layer, dense, next)?;
        }
        // What linears aim at; tuning alone does not change that.
        let dense = follows.filter(|_| self.task.refinements.asymmetric > 0.0);
        // Before the first layer all variants have the same hidden states, hence the same first Hessian.
        let mut first_stage = Vec::new();
        if layer == 0 {
            self.stage(None, Stage::AttentionInput);
            // As are the unquantized model's.
            let captured = self.capture(|member| member.capture_attention_input(0, None))?;
            first_stage = self.solve_stage(layer, Stage::AttentionInput, captured, &all, sink)?;
        }
        for (stream, &variant) in all.iter().enumerate() {
            // What the sink takes when the layer is tuned.
            let mut held = Vec::new();
            if self.task.tunes() {
                self.everywhere(|member| member.keep_inputs(stream))?;
            }
            let solved = if layer == 0 {
                std::mem::take(&mut first_stage[stream])
            } else {
                self.stage(Some(variant), Stage::AttentionInput);
                let captured = self.capture(|member| member.capture_attention_input(stream, dense))?;
                self.solve_one(layer, Stage::AttentionInput, captured, variant, sink)?
            };
            self.go_on_with(Stage::AttentionInput, solved, &mut held)?;

            self.stage(Some(variant), Stage::AttentionOutput);
            let captured = self.capture(|member| member.capture_attention_output(stream, dense))?;
            let solved = self.solve_one(layer, Stage::AttentionOutput, captured, variant, sink)?;
            self.go_on_with(Stage::AttentionOutput, solved, &mut held)?;

            self.stage(Some(variant), Stage::MlpInput);
            let captured = self.capture(|member| member.capture_mlp_input(stream, dense))?;
            let solved = self.solve_one(layer, Stage::MlpInput, captured, variant, sink)?;
            self.go_on_with(Stage::MlpInput, solved, &mut held)?;

            self.stage(Some(variant), Stage::MlpOutput);
            let captured = self.capture(|member| member.capture_mlp_output(stream, dense))?;
            let solved = self.solve_one(layer, Stage::MlpOutput, captured, variant, sink)?;
            let tuned = match self.task.tunes() {
                true => {
                    self.go_on_with(Stage::MlpOutput, solved, &mut held)?;
                    self.tune(variant, &mut held, sink)?
                }
                false => {
                    if next.is_some() {
                        self.go_on_with(Stage::MlpOutput, solved, &mut held)?;
                    }
                    false
                }
            };
            match next {
                // Nobody's inputs.
                None => self.end()?,
                Some(next) if tuned => self.leave_tuned(stream, variant, &held, next)?,
                Some(next) => self.leave_layer(stream, variant, next)?,
            }
        }
        if let Some(dense) = follows {
            self.members.iter_mut().for_each(|member| member.leave_dense(dense));
        }
        Ok(())
    }

    /// Advances the unquantized model's hidden states, and keeps what its stages get in this layer. Every team has them;
    /// that of the first variant writes them to the journal.
    fn run_dense(&mut self, layer: usize, dense: usize, next: Option<&SharedStates<'_>>) -> Result<()> {
        self.around.memory.enter(At::Calibrating);
        self.around.progress.event(&Event::Stage { variant: "unquantized", stage: "all of the layer" });
        let of_all = self.task.variants.len();
        let next = next.filter(|_| self.variants[0] == 0);
        let states = |next: &'_ SharedStates<'_>| Arc::clone(lock(next).file(of_all));
        // Nobody goes on from the last layer, but tuning aims at what comes out of it.
        let (file, last) = (next.map(states), self.is_last(layer) && !self.task.tunes());
        self.everywhere(|member| member.run_dense(dense, file.as_ref(), last))?;
        if let Some(next) = next {
            lock(next).sync(of_all);
        }
        Ok(())
    }

    /// All variants with the Hessians of the unquantized model, whose hidden states are advanced: one forward pass and one
    /// Hessian a stage, one factorization a column order.
    fn solve_shared(
        &mut self,
        layer: usize,
        sink: &SharedSink<'_>,
        next: Option<&SharedStates<'_>>,
    ) -> Result<()> {
        let all = self.variants.clone();
        for stage in Stage::ALL {
            self.stage(None, stage);
            let captured = self.capture(|member| match stage {
                Stage::AttentionInput => member.capture_attention_input(0, None),
                Stage::AttentionOutput => member.capture_attention_output(0, None),
                Stage::MlpInput => member.capture_mlp_input(0, None),
                Stage::MlpOutput => member.capture_mlp_output(0, None),
            })?;
            drop(self.solve_stage(layer, stage, captured, &all, sink)?);
            self.everywhere(|member| member.set_dense(stage))?;
        }
        match next {
            None => self.end(),
            Some(next) => self.leave_layer(0, 0, next),
        }
    }

    /// Advances a stream of hidden states behind the layer; it is the run's `of_all`-th.
    fn leave_layer(&mut self, stream: usize, of_all: usize, next: &SharedStates<'_>) -> Result<()> {
        self.leave(of_all, next, |member, file| member.leave_layer(stream, file))
    }

    /// The same, as `leave` does it on each device; the states go into a file too.
    pub(super) fn leave(
        &mut self,
        of_all: usize,
        next: &SharedStates<'_>,
        leave: impl Fn(&mut Member<'a>, &Arc<WindowFile>) -> Result<()> + Sync,
    ) -> Result<()> {
        let file = Arc::clone(lock(next).file(of_all));
        self.everywhere(|member| leave(member, &file))?;
        lock(next).sync(of_all);
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        self.everywhere(|member| {
            member.end();
            Ok(())
        })
    }

    fn stage(&self, variant: Option<usize>, stage: Stage) {
        let variant = variant.map_or("all variants".to_owned(), |v| self.task.variants[v].to_string());
        self.around.progress.event(&Event::Stage { variant: &variant, stage: stage.name() });
    }

    /// All devices' sums, added in their order.
    fn capture(&mut self, capture: impl Fn(&mut Member<'a>) -> Result<Capture> + Sync) -> Result<Capture> {
        self.around.memory.enter(At::Calibrating);
        let mut parts = self.on_all(capture)?.into_iter();
        let mut sum = parts.next().expect("a team has members");
        parts.try_for_each(|part| sum.absorb(part))?;
        Ok(sum)
    }

    /// The stage goes on with what was solved, which is kept where the layer will be tuned.
    fn go_on_with(&mut self, stage: Stage, solved: Vec<Outcome>, held: &mut Vec<Outcome>) -> Result<()> {
        // What is solved lies on the first device and does not go from thread to thread.
        let linears: Vec<&Solved> = solved.iter().map(|outcome| &outcome.linear).collect();
        self.members.iter_mut().try_for_each(|member| member.set_solved(stage.linears(), &linears))?;
        if self.task.tunes() {
            held.extend(solved);
        }
        Ok(())
    }

    fn everywhere(&mut self, work: impl Fn(&mut Member<'a>) -> Result<()> + Sync) -> Result<()> {
        self.on_all(work).map(drop)
    }

    /// Does something on all devices at the same time.
    fn on_all<T: Send>(&mut self, work: impl Fn(&mut Member<'a>) -> Result<T> + Sync) -> Result<Vec<T>> {
        if let [only] = &mut self.members[..] {
            return Ok(vec![work(only)?]);
        }
        thread::scope(|scope| {
            let work = &work;
            let start = |member| {
                scope.spawn(move || {
                    let _guard = tch::no_grad_guard();
                    work(member)
                })
            };
            let started: Vec<_> = self.members.iter_mut().map(start).collect();
            let joined =
                started.into_iter().map(|thread| thread.join().expect("a device's thread does not panic"));
            joined.collect()
        })
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
