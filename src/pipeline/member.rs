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
    memory::Room, stage_memory::MemoryWatch, stream::Stream, weights::Weights, window_file::WindowFile,
};
use crate::{
    calibration::Windows,
    error::{Error, Result},
    gptq::{Hessian, solver::Solved},
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
    llama: Llama<'a>,
    room: Arc<Room>,
    windows: Range<usize>,
    seq_len: usize,
    per_batch: usize,
    around: Surroundings<'a>,
    weights: Option<Weights>,
    /// The quantized (or, for Hessians of the unquantized model, the dense) linears of the stage that is going on.
    linears: Vec<Dense>,
    /// Hidden states, of each variant that has its own.
    hidden: Vec<Stream>,
    /// Inputs of a stage that its linears are to be applied to once they are solved.
    between: Option<Stream>,
}

impl<'a> Member<'a> {
    /// `per_batch` windows go through the model together.
    pub(super) fn new(
        llama: Llama<'a>,
        room: Room,
        windows: Range<usize>,
        seq_len: usize,
        per_batch: usize,
        around: Surroundings<'a>,
    ) -> Self {
        let room = Arc::new(room);
        let (weights, linears) = (None, Vec::new());
        Self {
            llama,
            room,
            windows,
            seq_len,
            per_batch,
            around,
            weights,
            linears,
            hidden: Vec::new(),
            between: None,
        }
    }

    pub(super) fn device(&self) -> Device {
        self.llama.device()
    }

    fn stream(&self, width: usize) -> Stream {
        Stream::new(&self.room, self.windows.clone(), self.per_batch, [self.seq_len, width])
    }

    /// Begins `streams` variants' hidden states with the embeddings.
    pub(super) fn embed(&mut self, windows: &Windows, streams: usize) -> Result<()> {
        for _ in 0..streams {
            let mut hidden = self.stream(self.llama.config().hidden_size);
            for (i, batch) in hidden.batches().to_vec().into_iter().enumerate() {
                let ids = &windows.ids()[batch.start * self.seq_len..batch.end * self.seq_len];
                hidden.put(i, self.llama.embed(ids, self.seq_len)?)?;
            }
            self.hidden.push(hidden);
        }
        Ok(())
    }

    /// Begins the variants' hidden states where another program left them: a file for each, of `kind`.
    pub(super) fn go_on_from(&mut self, files: &[Arc<WindowFile>], kind: Kind) -> Result<()> {
        for file in files {
            let mut hidden = self.stream(self.llama.config().hidden_size);
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

    /// The stage goes on with these linears as solved.
    pub(super) fn set_solved(&mut self, stage: Stage, solved: &[Solved]) -> Result<()> {
        let weights = self.weights();
        let dense = stage.linears().iter().zip(solved).map(|(&kind, linear)| {
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

    /// Inputs of q, k and v.
    pub(super) fn capture_attention_input(&mut self, stream: usize) -> Result<Hessian> {
        let mut hessian = Hessian::new(self.llama.config().hidden_size, self.device())?;
        self.each_batch(
            stream,
            |member, i| {
                let hidden = member.hidden[stream].get(i)?;
                member.llama.rms_norm(&hidden, &member.weights().norms.input)
            },
            |_, _, x| hessian.add(&x),
        )?;
        Ok(hessian)
    }

    /// Inputs of o, with the stage's q, k and v.
    pub(super) fn capture_attention_output(&mut self, stream: usize) -> Result<Hessian> {
        let width = self.llama.config().attention_width();
        let mut hessian = Hessian::new(width, self.device())?;
        self.between = Some(self.stream_like(stream, width));
        self.each_batch(
            stream,
            |member, i| {
                let hidden = member.hidden[stream].get(i)?;
                let x = member.llama.rms_norm(&hidden, &member.weights().norms.input)?;
                let [q, k, v] = &member.linears[..] else { unreachable!("q, k and v go on") };
                member.llama.attend(&q.forward(&x)?, &k.forward(&x)?, &v.forward(&x)?)
            },
            |member, i, attended| {
                hessian.add(&attended)?;
                member.between().put(i, attended)
            },
        )?;
        self.linears.clear();
        Ok(hessian)
    }

    /// Inputs of gate and up, with the stage's o.
    pub(super) fn capture_mlp_input(&mut self, stream: usize) -> Result<Hessian> {
        let mut hessian = Hessian::new(self.llama.config().hidden_size, self.device())?;
        self.each_batch(
            stream,
            |member, i| {
                let attended = member.between().get(i)?;
                let hidden = add(&member.hidden[stream].get(i)?, &member.linears[0].forward(&attended)?)?;
                let x = member.llama.rms_norm(&hidden, &member.weights().norms.post_attention)?;
                Ok((hidden, x))
            },
            |member, i, (hidden, x)| {
                hessian.add(&x)?;
                member.between().discard(i);
                member.hidden[stream].put(i, hidden)
            },
        )?;
        self.linears.clear();
        self.between = None;
        Ok(hessian)
    }

    /// Inputs of down, with the stage's gate and up.
    pub(super) fn capture_mlp_output(&mut self, stream: usize) -> Result<Hessian> {
        let width = self.llama.config().intermediate_size;
        let mut hessian = Hessian::new(width, self.device())?;
        self.between = Some(self.stream_like(stream, width));
        self.each_batch(
            stream,
            |member, i| {
                let hidden = member.hidden[stream].get(i)?;
                let x = member.llama.rms_norm(&hidden, &member.weights().norms.post_attention)?;
                member.llama.gated(&member.linears[0].forward(&x)?, &member.linears[1].forward(&x)?)
            },
            |member, i, activated| {
                hessian.add(&activated)?;
                member.between().put(i, activated)
            },
        )?;
        self.linears.clear();
        Ok(hessian)
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

    fn between(&mut self) -> &mut Stream {
        self.between.as_mut().expect("captured by the stage before")
    }

    /// A stream with batches as another's are.
    fn stream_like(&self, stream: usize, width: usize) -> Stream {
        self.hidden[stream].empty_like([self.seq_len, width])
    }

    /// Computes something of each batch, then uses it. Where the device's memory ends while computing, room is made and the
    /// batch tried again; using a value changes things, and is done once.
    fn each_batch<T>(
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
        let between = self.between.iter_mut();
        if self.room.near.is_open() {
            self.room.near.close();
            for stream in self.hidden.iter_mut().chain(between) {
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
        for stream in between {
            stream.halve(i)?;
        }
        let text =
            format!("{:?}: out of memory with {windows} windows at a time; trying half", self.device());
        self.around.progress.event(&Event::Warning(&text));
        Ok(true)
    }
}
