//! One device's part of a layer: its windows, through the stages of the layer.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tch::{Device, Kind, Tensor};

use super::{
    dense_path::{Capture, DenseLayer},
    memory::Room,
    stage_memory::MemoryWatch,
    stream::Stream,
    weights::Weights,
    window_file::WindowFile,
};
use crate::{
    calibration::Windows,
    checkpoint::{LinearKind, LlamaConfig},
    error::{Error, Result},
    gptq::solver::Solved,
    model::{Dense, Linear, Llama, Stage, add},
    progress::{Event, Progress},
};

/// What everybody needs to see and to be told.
#[derive(Clone, Copy)]
pub(super) struct Surroundings<'a> {
    pub(super) progress: &'a dyn Progress,
    /// Set when the user asks to stop.
    pub(super) stop: &'a AtomicBool,
    /// Told what is being done.
    pub(super) memory: &'a MemoryWatch,
}

impl Surroundings<'_> {
    /// # Errors
    /// When the user asked to stop.
    pub(super) fn go_on(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }
}

/// A device and the windows that are run on it.
pub(super) struct Member<'a> {
    pub(super) llama: Llama<'a>,
    room: Arc<Room>,
    windows: Range<usize>,
    /// Of these, those on which the unquantized model is followed.
    pub(super) followed: Range<usize>,
    /// Of these, those whose tokens are solved with; others are held out.
    counted: Range<usize>,
    pub(super) seq_len: usize,
    per_batch: usize,
    /// Whether the first position of each window is left out of what is captured.
    skip_first: bool,
    pub(super) around: Surroundings<'a>,
    weights: Option<Weights>,
    /// The quantized (or, for Hessians of the unquantized model, the dense) linears of the stage that is going on.
    pub(super) linears: Vec<Dense>,
    /// Hidden states, of each variant that has its own; then the unquantized model's, where it is followed.
    pub(super) hidden: Vec<Stream>,
    /// Inputs of a stage that its linears are to be applied to once they are solved.
    between: Option<Stream>,
    /// The unquantized model's activations in this layer, where it is followed.
    pub(super) dense: Option<DenseLayer>,
    /// What went into the layer, where it is tuned.
    pub(super) entered: Option<Stream>,
}

impl<'a> Member<'a> {
    /// `per_batch` windows go through the model together; of these `windows`, the unquantized model is `followed` on some, and
    /// some are `counted` in what is solved with.
    pub(super) fn new(
        llama: Llama<'a>,
        room: Room,
        [windows, followed, counted]: [Range<usize>; 3],
        seq_len: usize,
        per_batch: usize,
        skip_first: bool,
        around: Surroundings<'a>,
    ) -> Self {
        let room = Arc::new(room);
        let (weights, linears) = (None, Vec::new());
        Self {
            llama,
            room,
            windows,
            followed,
            counted,
            seq_len,
            per_batch,
            skip_first,
            around,
            weights,
            linears,
            hidden: Vec::new(),
            between: None,
            dense: None,
            entered: None,
        }
    }

    pub(super) fn device(&self) -> Device {
        self.llama.device()
    }

    /// Empty hidden states of a variant, or of the unquantized model.
    fn stream(&self, dense: bool) -> Stream {
        let windows = if dense { &self.followed } else { &self.windows };
        Stream::new(&self.room, windows.clone(), self.per_batch, [self.seq_len, self.config().hidden_size])
    }

    /// Begins `streams` variants' hidden states with the embeddings, and the unquantized model's, where it is followed.
    pub(super) fn embed(&mut self, windows: &Windows, streams: usize, follow: bool) -> Result<()> {
        for stream in 0..streams + usize::from(follow) {
            let mut hidden = self.stream(stream == streams);
            for (i, batch) in hidden.batches().to_vec().into_iter().enumerate() {
                let ids = &windows.ids()[batch.start * self.seq_len..batch.end * self.seq_len];
                hidden.put(i, self.llama.embed(ids, self.seq_len)?)?;
            }
            self.hidden.push(hidden);
        }
        Ok(())
    }

    /// Begins hidden states where another program left them: a file for each, of `kind`, of `streams` variants and then of
    /// the unquantized model.
    pub(super) fn go_on_from(&mut self, files: &[Arc<WindowFile>], kind: Kind, streams: usize) -> Result<()> {
        for (stream, file) in files.iter().enumerate() {
            let mut hidden = self.stream(stream == streams);
            hidden.take_from_journal(file, kind)?;
            self.hidden.push(hidden);
        }
        Ok(())
    }

    /// Batches of a stream.
    pub(super) fn batches(&self) -> usize {
        self.hidden.first().map_or(0, Stream::len)
    }

    /// Batches that the unquantized model is followed on.
    pub(super) fn dense_batches(&self) -> usize {
        self.followed.len().div_ceil(self.per_batch)
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

    /// Goes on with linears as solved, which are of these kinds.
    pub(super) fn set_solved(&mut self, kinds: &[LinearKind], solved: &[&Solved]) -> Result<()> {
        let weights = self.weights();
        let dense = kinds.iter().zip(solved).map(|(&kind, linear)| {
            Dense::from_solved(linear, weights.of(kind).1.as_ref(), self.llama.kind(), self.device())
        });
        self.linears = dense.collect::<Result<_>>()?;
        Ok(())
    }

    /// The stage goes on with its linears as they were.
    pub(super) fn set_dense(&mut self, stage: Stage) -> Result<()> {
        let weights = self.weights();
        let dense = stage.linears().iter().map(|&kind| {
            let (weight, bias) = weights.of(kind);
            Dense::converted(weight, bias.as_ref(), self.llama.kind())
        });
        self.linears = dense.collect::<Result<_>>()?;
        Ok(())
    }

    /// Inputs of q, k and v; of the unquantized model, where it is followed, from stream `dense`.
    pub(super) fn capture_attention_input(&mut self, stream: usize, dense: Option<usize>) -> Result<Capture> {
        let mut capture = self.capture(self.config().hidden_size, dense)?;
        self.each_batch(
            stream,
            |member, i| {
                let x = member.attention_input(stream, i)?;
                Ok((x, member.dense_inputs(Stage::AttentionInput, dense, stream, i)?))
            },
            |member, i, (x, dense)| capture.add(&x, member.counted(stream, i), dense.as_ref()),
        )?;
        Ok(capture)
    }

    /// Inputs of o, with the stage's q, k and v.
    pub(super) fn capture_attention_output(
        &mut self,
        stream: usize,
        dense: Option<usize>,
    ) -> Result<Capture> {
        let width = self.config().attention_width();
        let mut capture = self.capture(width, dense)?;
        self.between = Some(self.stream_like(stream, width));
        self.each_batch(
            stream,
            |member, i| {
                let x = member.attention_input(stream, i)?;
                Ok((member.attend(&x)?, member.dense_inputs(Stage::AttentionOutput, dense, stream, i)?))
            },
            |member, i, (attended, dense)| {
                capture.add(&attended, member.counted(stream, i), dense.as_ref())?;
                member.between().put(i, attended)
            },
        )?;
        self.linears.clear();
        Ok(capture)
    }

    /// Inputs of gate and up, with the stage's o.
    pub(super) fn capture_mlp_input(&mut self, stream: usize, dense: Option<usize>) -> Result<Capture> {
        let mut capture = self.capture(self.config().hidden_size, dense)?;
        self.each_batch(
            stream,
            |member, i| {
                let attended = member.between().get(i)?;
                let hidden = add(&member.hidden[stream].get(i)?, &member.linears[0].forward(&attended)?)?;
                let x = member.norm(&hidden, Stage::MlpInput)?;
                Ok((hidden, x, member.dense_inputs(Stage::MlpInput, dense, stream, i)?))
            },
            |member, i, (hidden, x, dense)| {
                capture.add(&x, member.counted(stream, i), dense.as_ref())?;
                member.between().discard(i);
                member.hidden[stream].put(i, hidden)
            },
        )?;
        self.linears.clear();
        self.between = None;
        Ok(capture)
    }

    /// Inputs of down, with the stage's gate and up.
    pub(super) fn capture_mlp_output(&mut self, stream: usize, dense: Option<usize>) -> Result<Capture> {
        let width = self.config().intermediate_size;
        let mut capture = self.capture(width, dense)?;
        self.between = Some(self.stream_like(stream, width));
        self.each_batch(
            stream,
            |member, i| {
                let hidden = member.hidden[stream].get(i)?;
                let activated = member.activate(&hidden)?;
                Ok((activated, member.dense_inputs(Stage::MlpOutput, dense, stream, i)?))
            },
            |member, i, (activated, dense)| {
                capture.add(&activated, member.counted(stream, i), dense.as_ref())?;
                member.between().put(i, activated)
            },
        )?;
        self.linears.clear();
        Ok(capture)
    }

    /// Hidden states behind the layer, with its down; also into the journal's `file`.
    pub(super) fn leave_layer(&mut self, stream: usize, file: &Arc<WindowFile>) -> Result<()> {
        self.each_batch(
            stream,
            |member, i| {
                let activated = member.between().get(i)?;
                add(&member.hidden[stream].get(i)?, &member.linears[0].forward(&activated)?)
            },
            |member, i, hidden| {
                member.between().discard(i);
                member.hidden[stream].put_in_journal(i, hidden, file)
            },
        )?;
        self.linears.clear();
        self.between = None;
        Ok(())
    }

    /// Ends a layer whose last stage nobody goes on from.
    pub(super) fn end(&mut self) {
        self.linears.clear();
        self.between = None;
    }

    pub(super) fn config(&self) -> &LlamaConfig {
        self.llama.config()
    }

    fn capture(&self, width: usize, dense: Option<usize>) -> Result<Capture> {
        let held_out = self.counted != self.windows;
        Capture::new(width, self.device(), dense.is_some(), held_out, self.skip_first)
    }

    /// How many of a batch's windows, the first ones, are not held out.
    fn counted(&self, stream: usize, i: usize) -> usize {
        let windows = &self.hidden[stream].batches()[i];
        self.counted.end.clamp(windows.start, windows.end) - windows.start
    }

    /// Hidden states, normalized as a stage gets them that stands behind a norm.
    pub(super) fn norm(&self, hidden: &Tensor, stage: Stage) -> Result<Tensor> {
        let norms = &self.weights().norms;
        let norm = if stage == Stage::AttentionInput { &norms.input } else { &norms.post_attention };
        self.llama.rms_norm(hidden, norm)
    }

    /// Inputs of q, k and v in a batch.
    pub(super) fn attention_input(&mut self, stream: usize, i: usize) -> Result<Tensor> {
        let hidden = self.hidden[stream].get(i)?;
        self.norm(&hidden, Stage::AttentionInput)
    }

    /// Inputs of q, k and v → inputs of o, with the stage's q, k and v.
    pub(super) fn attend(&self, x: &Tensor) -> Result<Tensor> {
        let [q, k, v] = &self.linears[..] else { unreachable!("q, k and v go on") };
        self.llama.attend(&q.forward(x)?, &k.forward(x)?, &v.forward(x)?)
    }

    /// Hidden states in front of the MLP → inputs of down, with the stage's gate and up.
    pub(super) fn activate(&self, hidden: &Tensor) -> Result<Tensor> {
        let x = self.norm(hidden, Stage::MlpInput)?;
        self.llama.gated(&self.linears[0].forward(&x)?, &self.linears[1].forward(&x)?)
    }

    fn between(&mut self) -> &mut Stream {
        self.between.as_mut().expect("captured by the stage before")
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
            self.around.go_on()?;
            let value = match compute(self, i) {
                Err(error) if error.is_out_of_device_memory() && self.make_room(stream, i)? => continue,
                value => value?,
            };
            use_it(self, i, value)?;
            self.around.progress.advance(1);
            i += 1;
        }
        Ok(())
    }

    /// Frees memory of the device: activations leave it, then batches become smaller. False when there is nothing more to
    /// be done.
    fn make_room(&mut self, stream: usize, i: usize) -> Result<bool> {
        if self.room.near.is_open() {
            self.room.near.close();
            let dense = self.dense.iter_mut().flat_map(DenseLayer::streams_mut);
            let others = self.between.iter_mut().chain(&mut self.entered).chain(dense);
            for stream in self.hidden.iter_mut().chain(others) {
                stream.leave_device()?;
            }
            let text =
                format!("{:?}: out of memory; activations are kept outside of it from now on", self.device());
            self.around.progress.event(&Event::Warning(&text));
            return Ok(true);
        }
        let windows = self.hidden[stream].batches()[i].len();
        if !self.hidden[stream].halve(i)? {
            return Ok(false);
        }
        // What has the same batches.
        let followers: Vec<&mut Stream> = match (&mut self.between, &mut self.dense) {
            (Some(between), _) => vec![between],
            (None, Some(dense)) if stream + 1 == self.hidden.len() => dense.streams_mut().into(),
            (None, _) => Vec::new(),
        };
        for stream in followers {
            stream.halve(i)?;
        }
        let text =
            format!("{:?}: out of memory with {windows} windows at a time; trying half", self.device());
        self.around.progress.event(&Event::Warning(&text));
        Ok(true)
    }
}
