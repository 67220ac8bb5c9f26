//! One device's part of a layer: its windows, through the stages of the layer.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tch::{Device, Kind};

use super::{
    memory::ActivationStore, reference::ReferenceLayer, stage_memory::MemoryWatch,
    statistics::CalibrationStatistics, stream::Stream, weights::Weights, window_file::WindowFile,
};
use crate::{
    architectures::{LayerConfig, ModelConfig},
    calibration::Windows,
    error::{Error, Result},
    gptq::solver::Solved,
    model::{Between, Dense, Linear, Transformer},
    progress::{Event, Progress},
};

/// Shared context of a run: progress sink, cancellation flag, memory watch.
#[derive(Clone, Copy)]
pub(super) struct RunContext<'a> {
    pub(super) progress: &'a dyn Progress,
    /// Set when the user asks to stop.
    pub(super) stop: &'a AtomicBool,
    pub(super) memory: &'a MemoryWatch,
}

impl RunContext<'_> {
    /// # Errors
    /// When the user asked to stop.
    pub(super) fn check_cancelled(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }
}

/// A device and the windows that are run on it.
pub(super) struct Worker<'a> {
    transformer: Transformer<'a>,
    room: Arc<ActivationStore>,
    windows: Range<usize>,
    seq_len: usize,
    per_batch: usize,
    context: RunContext<'a>,
    weights: Option<Weights>,
    /// The quantized (or, for Hessians of the reference model, the dense) linears of the stage that the windows leave next.
    linears: Vec<Dense>,
    /// Hidden states, of each variant that has its own; then the reference model's, where it is run.
    pub(super) hidden: Vec<Stream>,
    /// What the stage before has left for the one that is captured.
    stored: Vec<Stream>,
    /// What this one leaves for the next.
    next_stored: Vec<Stream>,
    /// The reference model's activations in this layer, where it is run.
    pub(super) reference: Option<ReferenceLayer>,
}

impl<'a> Worker<'a> {
    /// `per_batch` of these windows go through the model together.
    pub(super) fn new(
        transformer: Transformer<'a>,
        room: ActivationStore,
        windows: Range<usize>,
        seq_len: usize,
        per_batch: usize,
        context: RunContext<'a>,
    ) -> Self {
        Self {
            transformer,
            room: Arc::new(room),
            windows,
            seq_len,
            per_batch,
            context,
            weights: None,
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
        Stream::new(&self.room, self.windows.clone(), self.per_batch, window)
    }

    /// Begins `streams` of hidden states with the embeddings.
    pub(super) fn embed(&mut self, windows: &Windows, streams: usize) -> Result<()> {
        for _ in 0..streams {
            let mut hidden = self.stream();
            for (i, batch) in hidden.batches().to_vec().into_iter().enumerate() {
                let ids = &windows.ids()[batch.start * self.seq_len..batch.end * self.seq_len];
                hidden.put(i, self.transformer.embed(ids, self.seq_len)?)?;
            }
            self.hidden.push(hidden);
        }
        Ok(())
    }

    /// Begins hidden states where an interrupted run left them: a file for each stream, of `kind`.
    pub(super) fn resume_from(&mut self, files: &[Arc<WindowFile>], kind: Kind) -> Result<()> {
        for file in files {
            let mut hidden = self.stream();
            hidden.take_from_journal(file, kind)?;
            self.hidden.push(hidden);
        }
        Ok(())
    }

    /// Batches of a stream.
    pub(super) fn batches(&self) -> usize {
        self.hidden.first().map_or(0, Stream::len)
    }

    /// Takes a layer's weights.
    pub(super) fn enter_layer(&mut self, weights: &Weights) -> Result<()> {
        self.weights = Some(weights.on(self.device())?);
        Ok(())
    }

    /// Lets them go: two layers at a time need not fit.
    pub(super) fn forget_layer(&mut self) {
        self.weights = None;
    }

    pub(super) fn weights(&self) -> &Weights {
        self.weights.as_ref().expect("a layer is entered before it is worked on")
    }

    /// The layer that was entered.
    pub(super) fn layer(&self) -> &'a LayerConfig {
        &self.config().layers[self.weights().layer]
    }

    /// Windows leave a stage with its linears as they were solved.
    pub(super) fn set_solved(&mut self, stage: usize, solved: &[Solved]) -> Result<()> {
        let weights = self.weights();
        let linears = self.layer().stages[stage].linears().zip(solved).map(|(position, linear)| {
            let (_, bias) = weights.of(position);
            Dense::from_solved(linear, bias.as_ref(), self.transformer.kind(), self.device())
        });
        self.linears = linears.collect::<Result<_>>()?;
        Ok(())
    }

    /// Windows leave a stage with its linears as they are in the checkpoint.
    pub(super) fn set_dense(&mut self, stage: usize) -> Result<()> {
        let weights = self.weights();
        let linears = self.layer().stages[stage].linears().map(|position| {
            let (weight, bias) = weights.of(position);
            Dense::converted(weight, bias.as_ref(), self.transformer.kind())
        });
        self.linears = linears.collect::<Result<_>>()?;
        Ok(())
    }

    /// Lets the linears go that windows left a stage with.
    pub(super) fn forget_linears(&mut self) {
        self.linears.clear();
    }

    /// Brings windows to a stage, through the linears of the stage before, and takes the statistics of its inputs, one for each group
    /// of its linears; beside the reference model, stream `reference`, where that is run.
    pub(super) fn capture(
        &mut self,
        stage: usize,
        stream: usize,
        reference: Option<usize>,
    ) -> Result<Vec<CalibrationStatistics>> {
        let config = self.layer();
        let device = self.device();
        let groups = config.stages[stage].groups.iter();
        let statistics =
            groups.map(|group| CalibrationStatistics::new(group.width, device, reference.is_some()));
        let mut statistics = statistics.collect::<Result<Vec<_>>>()?;
        let widths = config.stored_widths(stage).into_iter();
        self.next_stored = widths.map(|width| self.stream_like(stream, width)).collect();
        let changes = stage > 0 && config.stages[stage - 1].kind.writes();
        self.each_batch(
            stream,
            |worker, i| {
                let mut at = worker.at(stream, i)?;
                if stage > 0 {
                    at = worker.advance(stage - 1, at)?;
                }
                let (index, parts) = (worker.weights().layer, &worker.weights().parts);
                let Some(reference) = reference else {
                    let inputs = worker.transformer.inputs(index, parts, stage, &at)?;
                    return Ok((at, inputs, Vec::new()));
                };
                let windows = worker.hidden[stream].batches()[i].clone();
                let beside = worker.reference_at(stage, reference, &windows, false)?;
                let parts = &worker.weights().parts;
                let (inputs, others) = worker.transformer.inputs_beside(index, parts, stage, &at, &beside)?;
                Ok((at, inputs, others))
            },
            |worker, i, (at, inputs, others)| {
                for (position, (statistics, x)) in statistics.iter_mut().zip(&inputs).enumerate() {
                    statistics.add(x, others.get(position))?;
                }
                drop(inputs);
                worker.stored.iter_mut().for_each(|stream| stream.discard(i));
                for (stream, tensor) in worker.next_stored.iter_mut().zip(at.stored) {
                    stream.put(i, tensor)?;
                }
                if changes { worker.hidden[stream].put(i, at.hidden) } else { Ok(()) }
            },
        )?;
        self.stored = std::mem::take(&mut self.next_stored);
        self.linears.clear();
        Ok(statistics)
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
                worker.stored.iter_mut().for_each(|stream| stream.discard(i));
                worker.hidden[stream].put_in_journal(i, after.hidden, file)
            },
        )?;
        self.end();
        Ok(())
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
        let hidden = self.hidden[stream].get(i)?;
        let stored = self.stored.iter_mut().map(|stream| stream.get(i)).collect::<Result<_>>()?;
        Ok(Between { hidden, stored })
    }

    /// A batch behind a stage, through the linears that were set for it.
    pub(super) fn advance(&self, stage: usize, at: Between) -> Result<Between> {
        let linears: Vec<&dyn Linear> = self.linears.iter().map(|linear| linear as &dyn Linear).collect();
        let weights = self.weights();
        self.transformer.advance(weights.layer, &weights.parts, stage, at, &linears)
    }

    /// A stream with batches as another's are.
    pub(super) fn stream_like(&self, stream: usize, width: usize) -> Stream {
        self.hidden[stream].empty_like([self.seq_len, width])
    }

    /// Computes something of each batch, then uses it. Where the device's memory ends while computing, room is made and the
    /// batch tried again; using a value changes things, and is done once.
    pub(super) fn each_batch<T>(
        &mut self,
        stream: usize,
        compute: impl Fn(&mut Self, usize) -> Result<T>,
        mut use_it: impl FnMut(&mut Self, usize, T) -> Result<()>,
    ) -> Result<()> {
        let mut i = 0;
        while i < self.hidden[stream].len() {
            self.context.check_cancelled()?;
            let value = match compute(self, i) {
                Err(error) if error.is_out_of_device_memory() && self.make_room(stream, i)? => continue,
                value => value?,
            };
            use_it(self, i, value)?;
            self.context.progress.advance(1);
            i += 1;
        }
        Ok(())
    }

    /// Frees memory of the device: activations leave it, then batches become smaller. False when there is nothing more to
    /// be done.
    fn make_room(&mut self, stream: usize, i: usize) -> Result<bool> {
        if self.room.near.is_open() {
            self.room.near.close();
            let reference = self.reference.iter_mut().flat_map(ReferenceLayer::streams_mut);
            let others = self.stored.iter_mut().chain(&mut self.next_stored).chain(reference);
            for stream in self.hidden.iter_mut().chain(others) {
                stream.leave_device()?;
            }
            let text =
                format!("{:?}: out of memory; activations are kept outside of it from now on", self.device());
            self.context.progress.event(&Event::Warning(&text));
            return Ok(true);
        }
        let windows = self.hidden[stream].batches()[i].len();
        if !self.hidden[stream].halve(i)? {
            return Ok(false);
        }
        // What has the same batches.
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
