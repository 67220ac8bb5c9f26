//! One device and its windows: forward passes through the stages of a layer.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tch::{Device, Kind, TchError, Tensor};

use super::{
    memory::ActivationStore,
    output_hessians::TokenWeights,
    phases::{PhaseClock, per_token},
    reference::ReferenceLayer,
    stage_memory::MemoryWatch,
    stage_solver::FreeMemory,
    statistics::{CalibrationStatistics, Captured},
    stream::Stream,
    weights::Weights,
    window_file::WindowFile,
};
use crate::{
    architectures::{LayerConfig, ModelConfig},
    calibration::Windows,
    cluster::Cluster,
    error::{Error, Result, TorchContext},
    ggml::BlockType,
    model::{Between, ForwardDense, Linear, Transformer},
    progress::{Event, Progress},
    report::Phase,
};

/// Shared context of a run: progress sink, cancellation flag, memory watch.
#[derive(Clone, Copy)]
pub(super) struct RunContext<'a> {
    pub(super) progress: &'a dyn Progress,
    /// Set when the user asks to stop.
    pub(super) stop: &'a AtomicBool,
    pub(super) memory: &'a MemoryWatch,
    pub(super) phases: &'a PhaseClock,
    /// The processes of the run.
    pub(super) cluster: &'a Cluster,
}

impl RunContext<'_> {
    /// # Errors
    /// When the user asked to stop.
    pub(super) fn check_cancelled(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }
}

/// Why a value was not added to sums.
struct NotAdded {
    error: Box<Error>,
    /// Whether some of the sums have it.
    in_part: bool,
}

const ENTERED_FIRST: &str = "a layer is entered before it is worked on";
const REFERENCE_RUNS_FIRST: &str = "the reference model runs through a layer first";

/// A device and the windows that are run on it.
pub(super) struct Worker<'a> {
    transformer: Transformer<'a>,
    /// The kind that activations are multiplied in for statistics.
    statistics: Kind,
    store: Arc<ActivationStore>,
    windows: Range<usize>,
    seq_len: usize,
    per_batch: usize,
    context: RunContext<'a>,
    weights: Option<Weights>,
    /// Of the tokens in the layer's Hessians; none where all count alike.
    token_weights: Option<TokenWeights>,
    /// The linears that the windows leave the captured stage through: quantized, or dense with shared Hessians.
    linears: Vec<ForwardDense>,
    /// Hidden states, of each variant that has its own; then the reference model's, where it is run.
    hidden: Vec<Stream>,
    /// Activations in front of the captured stage, beside the hidden states.
    stored: Vec<Stream>,
    /// The same in front of the next stage.
    next_stored: Vec<Stream>,
    /// The reference model's activations in this layer, where it is run.
    reference: Option<ReferenceLayer<'a>>,
}

impl<'a> Worker<'a> {
    /// `per_batch` of these windows go through the model together.
    pub(super) fn new(
        transformer: Transformer<'a>,
        statistics: Kind,
        store: Arc<ActivationStore>,
        windows: Range<usize>,
        seq_len: usize,
        per_batch: usize,
        context: RunContext<'a>,
    ) -> Self {
        Self {
            transformer,
            statistics,
            store,
            windows,
            seq_len,
            per_batch,
            context,
            weights: None,
            token_weights: None,
            linears: Vec::new(),
            hidden: Vec::new(),
            stored: Vec::new(),
            next_stored: Vec::new(),
            reference: None,
        }
    }

    pub(super) fn device(&self) -> Device {
        self.transformer.device()
    }

    /// Empty hidden states.
    fn stream(&self) -> Stream {
        let window = [self.seq_len, self.config().hidden_size];
        Stream::new(&self.store, self.windows.clone(), self.per_batch, window)
    }

    /// Begins streams of hidden states with the embeddings, those of each rounded to blocks of a type; fp32 leaves them.
    pub(super) fn embed(&mut self, windows: &Windows, roundings: &[BlockType]) -> Result<()> {
        for &blocks in roundings {
            let mut hidden = self.stream();
            for (i, batch) in hidden.batches().to_vec().into_iter().enumerate() {
                let ids = &windows.ids()[batch.start * self.seq_len..batch.end * self.seq_len];
                hidden.put(i, self.transformer.embed_rounded(ids, self.seq_len, blocks)?)?;
            }
            self.hidden.push(hidden);
        }
        Ok(())
    }

    /// Begins hidden states with those of an interrupted run: a file for each stream, and the kind of what it holds.
    pub(super) fn resume_from(&mut self, files: &[(Arc<WindowFile>, Kind)]) -> Result<()> {
        for (file, kind) in files {
            let mut hidden = self.stream();
            hidden.take_from_journal(file, *kind)?;
            self.hidden.push(hidden);
        }
        Ok(())
    }

    /// Batches of a stream.
    pub(super) fn batches(&self) -> usize {
        self.hidden.first().map_or(0, Stream::len)
    }

    /// Copies a layer's weights and the weights of tokens to the device, these in the kind of the inputs that they multiply.
    pub(super) fn enter_layer(&mut self, weights: &Weights, tokens: Option<&TokenWeights>) -> Result<()> {
        let device = self.device();
        self.weights = Some(self.context.phases.time(Phase::Weights, 0.0, || weights.on(device))?);
        let kind = self.kind();
        let converted = |own: &Tensor| own.f_to_device(device)?.f_to_kind(kind);
        let of_stage = |stage: &Vec<Tensor>| stage.iter().map(converted).collect();
        let tokens = tokens.map(|all| all.iter().map(of_stage).collect()).transpose();
        self.token_weights = tokens.torch("copy weights of tokens")?;
        Ok(())
    }

    /// Drops the layer's weights, so that only one layer has to fit.
    pub(super) fn forget_layer(&mut self) {
        self.weights = None;
    }

    pub(super) fn weights(&self) -> &Weights {
        self.weights.as_ref().expect(ENTERED_FIRST)
    }

    /// Solves with the layer's weights, and with a function that moves activations from the device.
    pub(super) fn solve_with<T>(
        &mut self,
        solve: impl FnOnce(&Weights, &mut FreeMemory<'_>) -> Result<T>,
    ) -> Result<T> {
        let weights = self.weights.take().expect(ENTERED_FIRST);
        let result = solve(&weights, &mut || self.leave_device());
        self.weights = Some(weights);
        result
    }

    /// The layer that was entered.
    pub(super) fn layer(&self) -> &'a LayerConfig {
        &self.config().layers[self.weights().layer]
    }

    /// The kind of weights and activations in forward passes.
    pub(super) fn kind(&self) -> Kind {
        self.transformer.kind()
    }

    /// Sets the linears that windows leave a stage through: dequantized `weights` `[K, N]`, on any device.
    pub(super) fn set_solved(&mut self, stage: usize, weights: &[Tensor]) -> Result<()> {
        let linears = self.layer().stages[stage].linears().zip(weights).map(|(position, weight)| {
            let (_, bias) = self.weights().of(position);
            let weight = weight.f_to_device(self.device()).and_then(|w| w.f_tr());
            ForwardDense::new(&weight.torch("dequantize a linear")?, bias.as_ref(), self.kind())
        });
        self.linears = self.context.phases.time(Phase::Weights, 0.0, || linears.collect::<Result<_>>())?;
        Ok(())
    }

    /// Sets the linears that windows leave a stage through: those of the checkpoint.
    pub(super) fn set_dense(&mut self, stage: usize) -> Result<()> {
        let linears = self.layer().stages[stage].linears().map(|position| {
            let (weight, bias) = self.weights().of(position);
            ForwardDense::new(weight, bias.as_ref(), self.kind())
        });
        self.linears = self.context.phases.time(Phase::Weights, 0.0, || linears.collect::<Result<_>>())?;
        Ok(())
    }

    /// Runs a layer as it is on the reference model's hidden states, which are stream `reference`, and keeps the inputs of its stages.
    /// The outputs are also written to the journal's `file`; the `last` layer has none.
    pub(super) fn run_reference(
        &mut self,
        reference: usize,
        file: Option<&Arc<WindowFile>>,
        last: bool,
    ) -> Result<()> {
        let config = self.layer();
        let window = [self.seq_len, self.config().hidden_size];
        self.reference = Some(ReferenceLayer::new(config, &self.hidden[reference], window));
        for stage in 0..config.stages.len() - usize::from(last) {
            self.set_dense(stage)?;
            self.each_batch(
                reference,
                |worker, i| {
                    let windows = worker.hidden[reference].batches()[i].clone();
                    let at = worker.reference_at(stage, reference, &windows, true)?;
                    worker.advance(stage, at)
                },
                |worker, i, after| {
                    let phases = worker.context.phases;
                    let layer = worker.reference.as_mut().expect(REFERENCE_RUNS_FIRST);
                    phases.time(Phase::Activations, 0.0, || layer.put(stage, i, after, file))
                },
            )?;
        }
        self.linears.clear();
        self.reference.as_mut().map_or(Ok(()), ReferenceLayer::finish_journal)
    }

    /// Ends the layer for the reference model: its hidden states, stream `reference`, are now those behind the layer.
    pub(super) fn leave_reference(&mut self, reference: usize) {
        if let Some(layer) = self.reference.take() {
            self.hidden[reference] = layer.into_next();
        }
    }

    /// The reference model's activations in front of a stage.
    fn reference_at(
        &mut self,
        stage: usize,
        reference: usize,
        windows: &Range<usize>,
        whole: bool,
    ) -> Result<Between> {
        let layer = self.reference.as_mut().expect(REFERENCE_RUNS_FIRST);
        let hidden = &mut self.hidden[reference];
        self.context.phases.time(Phase::Activations, 0.0, || layer.at(stage, hidden, windows, whole))
    }

    /// Advances windows to a stage, through the linears of the stage before. Returns the statistics of its inputs, one for each group
    /// of its linears; with the cross-covariance where the reference model is run, as stream `reference`. With `keep` batches are kept
    /// instead of added.
    pub(super) fn capture(
        &mut self,
        stage: usize,
        stream: usize,
        reference: Option<usize>,
        keep: bool,
    ) -> Result<Captured> {
        let config = self.layer();
        let device = self.device();
        let kind = self.statistics;
        let groups = config.stages[stage].groups.iter();
        let statistics = groups.map(|group| {
            let weights = group.linears.clone().map(|position| &self.weights().of(position).0);
            let weights = reference.map(|_| weights.collect::<Vec<_>>());
            CalibrationStatistics::new(group.width, device, weights.as_deref(), kind)
        });
        let mut statistics = statistics.collect::<Result<Vec<_>>>()?;
        let mut batches: Vec<Vec<_>> = statistics.iter().map(|_| Vec::new()).collect();
        let widths = config.stored_widths(stage).into_iter();
        self.next_stored = widths.map(|width| self.stream_like(stream, width)).collect();
        let changes = stage > 0 && config.stages[stage - 1].kind.writes();
        // Groups that have the batch that is added.
        let mut added = 0;
        let phases = self.context.phases;
        self.each_batch_added(
            stream,
            |worker, i| {
                let mut at = worker.at(stream, i)?;
                if stage > 0 {
                    at = worker.advance(stage - 1, at)?;
                }
                let index = worker.weights().layer;
                let windows = worker.hidden[stream].batches()[i].clone();
                let Some(reference) = reference else {
                    let parts = &worker.weights().parts;
                    let inputs = || worker.transformer.inputs(index, parts, stage, &at);
                    let inputs = worker.context.phases.time(Phase::Forward, 0.0, inputs)?;
                    return Ok((at, worker.weighed(stage, &windows, inputs)?, Vec::new()));
                };
                let beside = worker.reference_at(stage, reference, &windows, false)?;
                let parts = &worker.weights().parts;
                let both = || worker.transformer.inputs_beside(index, parts, stage, &at, &beside);
                let (inputs, others) = worker.context.phases.time(Phase::Forward, 0.0, both)?;
                let weighed = |inputs| worker.weighed(stage, &windows, inputs);
                Ok((at, weighed(inputs)?, weighed(others)?))
            },
            |(_, inputs, others)| {
                while let (Some(statistics), Some(x)) = (statistics.get_mut(added), inputs.get(added)) {
                    let result = match keep {
                        true => {
                            statistics.keep(x, others.get(added)).map(|batch| batches[added].extend(batch))
                        }
                        false => statistics.add(x, others.get(added), phases),
                    };
                    result.map_err(|error| NotAdded {
                        error: Box::new(error),
                        in_part: added > 0 || !statistics.is_between_batches(),
                    })?;
                    added += 1;
                }
                added = 0;
                Ok(())
            },
            |worker, i, (at, inputs, others)| {
                drop((inputs, others));
                worker.context.phases.time(Phase::Activations, 0.0, || {
                    worker.stored.iter_mut().for_each(|stream| stream.discard(i));
                    for (stream, tensor) in worker.next_stored.iter_mut().zip(at.stored) {
                        stream.put(i, tensor)?;
                    }
                    if changes { worker.hidden[stream].put(i, at.hidden) } else { Ok(()) }
                })
            },
        )?;
        self.stored = std::mem::take(&mut self.next_stored);
        self.linears.clear();
        Ok(Captured { sums: statistics, batches })
    }

    /// Inputs of the groups of a stage, times the square roots of their tokens' weights.
    fn weighed(&self, stage: usize, windows: &Range<usize>, inputs: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let Some(weights) = &self.token_weights else { return Ok(inputs) };
        let (first, tokens) = (windows.start * self.seq_len, windows.len() * self.seq_len);
        let weighed = |(inputs, weights): (Tensor, &Tensor)| {
            let mut shape = inputs.size();
            shape.last_mut().into_iter().for_each(|width| *width = 1);
            inputs.f_mul(&weights.f_narrow(0, first as i64, tokens as i64)?.f_view(shape.as_slice())?)
        };
        let all = || inputs.into_iter().zip(&weights[stage]).map(weighed).collect::<Result<_, TchError>>();
        self.context.phases.time(Phase::Hessian, 0.0, all).torch("weigh tokens")
    }

    /// Hidden states behind the layer, with the linears of its last stage; also into the journal's `file`.
    pub(super) fn leave_layer(&mut self, stream: usize, file: &Arc<WindowFile>) -> Result<()> {
        let last = self.layer().stages.len() - 1;
        self.each_batch(
            stream,
            |worker, i| {
                let at = worker.at(stream, i)?;
                worker.advance(last, at)
            },
            |worker, i, after| {
                worker.context.phases.time(Phase::Activations, 0.0, || {
                    worker.stored.iter_mut().for_each(|stream| stream.discard(i));
                    worker.hidden[stream].put_in_journal(i, after.hidden, file)
                })
            },
        )?;
        self.end();
        self.hidden[stream].finish_journal()
    }

    /// Ends the last layer, whose outputs are dropped.
    pub(super) fn end(&mut self) {
        self.linears.clear();
        self.stored.clear();
    }

    pub(super) fn config(&self) -> &'a ModelConfig {
        self.transformer.config()
    }

    /// A batch in front of the stage that was captured last.
    fn at(&mut self, stream: usize, i: usize) -> Result<Between> {
        self.context.phases.time(Phase::Activations, 0.0, || {
            let hidden = self.hidden[stream].get(i)?;
            let stored = self.stored.iter_mut().map(|stream| stream.get(i)).collect::<Result<_>>()?;
            Ok(Between { hidden, stored })
        })
    }

    /// A batch behind a stage, through the linears that were set for it.
    fn advance(&self, stage: usize, at: Between) -> Result<Between> {
        let linears: Vec<&dyn Linear> = self.linears.iter().map(|linear| linear as &dyn Linear).collect();
        let (weights, layer) = (self.weights(), self.layer());
        let groups = layer.stages[stage].groups.iter();
        let operations: f64 = groups.map(|group| per_token(layer, group).forward).sum();
        let tokens = at.hidden.numel().max(1) / self.config().hidden_size;
        self.context.phases.time(Phase::Forward, tokens as f64 * operations, || {
            self.transformer.advance(weights.layer, &weights.parts, stage, at, &linears, None)
        })
    }

    /// A stream with batches as another's are.
    fn stream_like(&self, stream: usize, width: usize) -> Stream {
        self.hidden[stream].empty_like([self.seq_len, width])
    }

    /// Computes a value of each batch, then uses it. If the device's memory ends meanwhile, memory is freed and the batch is
    /// computed again. `use_it` changes the worker and is called once for each batch.
    fn each_batch<T>(
        &mut self,
        stream: usize,
        compute: impl Fn(&mut Self, usize) -> Result<T>,
        use_it: impl FnMut(&mut Self, usize, T) -> Result<()>,
    ) -> Result<()> {
        self.each_batch_added(stream, compute, |_| Ok(()), use_it)
    }

    /// Like [`Worker::each_batch`], with sums that `add` adds each value to before its use.
    ///
    /// If the device runs out of memory in `add`, it is called again. It gets the same value if the error states that a part of it
    /// was added, else values of smaller batches.
    fn each_batch_added<T>(
        &mut self,
        stream: usize,
        compute: impl Fn(&mut Self, usize) -> Result<T>,
        mut add: impl FnMut(&T) -> Result<(), NotAdded>,
        mut use_it: impl FnMut(&mut Self, usize, T) -> Result<()>,
    ) -> Result<()> {
        let mut i = 0;
        'batches: while i < self.hidden[stream].len() {
            self.context.check_cancelled()?;
            let value = match compute(self, i) {
                Err(error) if error.is_out_of_device_memory() && self.free_device_memory(stream, i)? => {
                    continue;
                }
                value => value?,
            };
            while let Err(NotAdded { error, in_part }) = add(&value) {
                if !error.is_out_of_device_memory() {
                    return Err(*error);
                }
                if in_part {
                    if !self.leave_device()? {
                        return Err(*error);
                    }
                } else {
                    drop(value);
                    if !self.free_device_memory(stream, i)? {
                        return Err(*error);
                    }
                    continue 'batches;
                }
            }
            use_it(self, i, value)?;
            self.context.progress.advance(1);
            i += 1;
        }
        Ok(())
    }

    /// Moves activations from the device. False when they are elsewhere already.
    fn leave_device(&mut self) -> Result<bool> {
        if !self.store.close_device() {
            return Ok(false);
        }
        let reference = self.reference.iter_mut().flat_map(ReferenceLayer::streams_mut);
        let others = self.stored.iter_mut().chain(&mut self.next_stored).chain(reference);
        for stream in self.hidden.iter_mut().chain(others) {
            stream.leave_device()?;
        }
        let text =
            format!("{:?}: out of memory; activations are kept outside of it from now on", self.device());
        self.context.progress.event(&Event::Warning(&text));
        Ok(true)
    }

    /// Frees memory of the device: activations leave it, then batches are halved. False when neither is possible any more.
    fn free_device_memory(&mut self, stream: usize, i: usize) -> Result<bool> {
        if self.leave_device()? {
            return Ok(true);
        }
        let windows = self.hidden[stream].batches()[i].len();
        if !self.hidden[stream].halve(i)? {
            return Ok(false);
        }
        // These streams have the same batches.
        for stored in self.stored.iter_mut().chain(&mut self.next_stored) {
            stored.halve(i)?;
        }
        if stream + 1 == self.hidden.len() {
            for stored in self.reference.iter_mut().flat_map(ReferenceLayer::streams_mut) {
                stored.halve(i)?;
            }
        }
        let text =
            format!("{:?}: out of memory with {windows} windows at a time; trying half", self.device());
        self.context.progress.event(&Event::Warning(&text));
        Ok(true)
    }
}
