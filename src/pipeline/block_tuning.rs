//! Tuning a layer's scales, once it is solved, for what the unquantized model's layer puts out.

use std::{borrow::Cow, ops::Range, sync::Arc};

use tch::{Kind, Tensor};

use super::{
    member::Member,
    stage_solving::Outcome,
    team::{SharedSink, SharedStates, Team, lock},
    window_file::WindowFile,
};
use crate::{
    accuracy::held_out,
    checkpoint::LinearKind,
    error::{Result, TorchContext},
    gptq::{
        QuantizedLinear,
        solver::{OutputFactor, Solved},
    },
    model::{Layer, Linear, TunedLayer},
    progress::Event,
};

/// Tokens that a step looks at, but at least one window.
const STEP_TOKENS: usize = 1024;

/// What came of tuning a layer.
enum Tuned {
    /// Its linears with other scales.
    Better(Vec<QuantizedLinear>),
    /// No better on the windows that were held out.
    NoBetter,
    /// There are not enough windows.
    Impossible,
}

impl Team<'_> {
    /// Tunes the scales of a variant's layer, whose solved linears are `held` in the order of [`LinearKind::ALL`], and gives them
    /// to the sink: tuned, if that lowers the error of the layer's outputs on windows that were held out, else as they are.
    /// Returns whether they are tuned.
    pub(super) fn tune(
        &mut self,
        variant: usize,
        held: &mut [Outcome],
        sink: &SharedSink<'_>,
    ) -> Result<bool> {
        let metric = self.outputs.as_ref().map(|layer| layer.of(LinearKind::Down));
        let tuned = self.members[0].tune(held, self.task.refinements.tune, metric)?;
        let better = matches!(tuned, Tuned::Better(_));
        match tuned {
            Tuned::Better(linears) => {
                for (outcome, linear) in held.iter_mut().zip(linears) {
                    outcome.linear = Solved::Host(linear);
                    outcome.record.tuned = true;
                }
            }
            Tuned::NoBetter => {}
            Tuned::Impossible => {
                let name = &self.task.variants[variant];
                let text = format!("{name}: too few windows to tune a layer on; it stays as solved");
                self.around.progress.event(&Event::Warning(&text));
                lock(sink).warn(text);
            }
        }
        held.iter().try_for_each(|outcome| self.pack(variant, outcome, sink))?;
        if !better {
            self.members.iter_mut().for_each(|member| member.entered = None);
        }
        Ok(better)
    }

    /// Advances a stream of hidden states behind a layer that was tuned; it is the run's `of_all`-th.
    pub(super) fn leave_tuned(
        &mut self,
        stream: usize,
        of_all: usize,
        held: &[Outcome],
        next: &SharedStates<'_>,
    ) -> Result<()> {
        let linears: Vec<&Solved> = held.iter().map(|outcome| &outcome.linear).collect();
        self.members.iter_mut().try_for_each(|member| member.set_solved(&LinearKind::ALL, &linears))?;
        self.leave(of_all, next, |member, file| member.leave_tuned(stream, file))
    }
}

impl Member<'_> {
    /// Keeps what goes into a layer, until it is tuned.
    pub(super) fn keep_inputs(&mut self, stream: usize) -> Result<()> {
        let mut kept = self.stream_like(stream, self.config().hidden_size);
        for i in 0..kept.len() {
            kept.put(i, self.hidden[stream].get(i)?)?;
        }
        self.entered = Some(kept);
        Ok(())
    }

    /// Tunes the scales of a layer on the windows on which the unquantized model is followed. `metric` says what errors in its
    /// outputs cost; without it all cost the same.
    fn tune(&mut self, solved: &[Outcome], steps: u32, metric: Option<&[OutputFactor]>) -> Result<Tuned> {
        let Range { start, end } = self.followed;
        let tuned_on = start..end - held_out(end - start);
        if tuned_on.is_empty() {
            return Ok(Tuned::Impossible);
        }
        let llama = self.llama.in_kind(self.seq_len, Kind::Float)?;
        let weights = self.weights();
        let linears = solved.iter().map(|outcome| outcome.linear.on_host()).collect::<Result<Vec<_>>>()?;
        let biases = solved.iter().map(|outcome| weights.of(outcome.id.kind).1.as_ref());
        let with_biases: Vec<_> = linears.iter().map(Cow::as_ref).zip(biases).collect();
        let mut layer = TunedLayer::new(&llama, &weights.norms, &with_biases, steps)?;
        let weighted = |errors: &Tensor| match metric {
            None => Ok(errors.shallow_clone()),
            Some(factors) => {
                let parts =
                    factors.iter().map(|factor| factor.weighted(errors)).collect::<Result<Vec<_>>>()?;
                Tensor::f_cat(&parts, -1).torch("weigh errors")
            }
        };
        let judging = tuned_on.end..end;
        let before = self.held_out_loss(&layer, judging.clone(), &weighted)?;
        let together = (STEP_TOKENS / self.seq_len).clamp(1, tuned_on.len());
        let mut at = tuned_on.start;
        for _ in 0..steps {
            self.around.go_on()?;
            if at + together > tuned_on.end {
                at = tuned_on.start;
            }
            let [hidden, target] = self.pair(at..at + together)?;
            layer.step([&hidden, &target], &weighted)?;
            self.around.progress.advance(1);
            at += together;
        }
        layer.round()?;
        let after = self.held_out_loss(&layer, judging, &weighted)?;
        if after >= before || after.is_nan() {
            return Ok(Tuned::NoBetter);
        }
        let rescaled = linears.into_iter().zip(layer.scales()?);
        Ok(Tuned::Better(rescaled.map(|(linear, scales)| linear.into_owned().with_scales(scales)).collect()))
    }

    fn held_out_loss(
        &mut self,
        layer: &TunedLayer<'_>,
        windows: Range<usize>,
        weighted: &dyn Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<f64> {
        let mut sum = 0.0;
        for window in windows {
            let [hidden, target] = self.pair(window..window + 1)?;
            sum += layer.loss([&hidden, &target], weighted)?;
        }
        Ok(sum)
    }

    /// What goes into the layer in some windows, and what comes out of the unquantized model's, in fp32.
    fn pair(&mut self, windows: Range<usize>) -> Result<[Tensor; 2]> {
        let entered = self.entered.as_mut().expect("kept while the layer is tuned").of_windows(&windows)?;
        let target = self.dense_layer().next.of_windows(&windows)?;
        let in_fp32 = |t: Tensor| t.f_to_kind(Kind::Float).torch("convert activations");
        Ok([in_fp32(entered)?, in_fp32(target)?])
    }

    /// Hidden states behind the layer, from what went into it, with all of its linears; also into the journal's `file`.
    fn leave_tuned(&mut self, stream: usize, file: &Arc<WindowFile>) -> Result<()> {
        let norms = self.weights().norms.shallow_clone();
        let linears: Vec<Box<dyn Linear>> =
            self.linears.drain(..).map(|linear| Box::new(linear) as Box<dyn Linear>).collect();
        let linears = linears.try_into().unwrap_or_else(|_| unreachable!("one for each kind"));
        let layer = Layer::new(norms, linears);
        self.each_batch(
            stream,
            |member, i| {
                let windows = member.hidden[stream].batches()[i].clone();
                let entered = member.entered.as_mut().expect("kept while the layer is tuned");
                let hidden = entered.of_windows(&windows)?;
                member.llama.forward(&layer, &hidden)
            },
            |member, i, hidden| member.hidden[stream].put_in_journal(i, hidden, file),
        )?;
        self.entered = None;
        self.end();
        Ok(())
    }
}
