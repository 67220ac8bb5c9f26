//! The unquantized model's activations of a layer, kept beside the quantized ones: what linears aim at in asymmetric
//! calibration.

use std::{ops::Range, sync::Arc};

use tch::{Device, Tensor};

use super::{member::Member, stream::Stream, window_file::WindowFile};
use crate::{
    error::{Result, TorchContext},
    gptq::{Drift, Hessian},
    model::{Linear, Stage, add},
};

/// What a stage's inputs are told by.
pub(super) struct Capture {
    pub(super) hessian: Hessian,
    /// How far they are from the unquantized model's, where that is followed.
    pub(super) drift: Option<Drift>,
    /// Positions at the beginning of each window that are left out.
    skipped: i64,
    /// Of the windows that are held out of the other two, if there are any.
    pub(super) held_out: Option<Hessian>,
}

impl Capture {
    /// Nothing yet, of inputs of that width. The unquantized model may be `followed`, some windows `held_out`, and the first position
    /// of each window be left out.
    pub(super) fn new(
        width: usize,
        device: Device,
        followed: bool,
        held_out: bool,
        skip_first: bool,
    ) -> Result<Self> {
        let drift = followed.then(|| Drift::new(width, device)).transpose()?;
        let hessian = Hessian::new(width, device)?;
        let held_out = held_out.then(|| hessian.empty_like()).transpose()?;
        Ok(Self { hessian, drift, skipped: skip_first.into(), held_out })
    }

    /// Adds another device's sums over other tokens.
    pub(super) fn absorb(&mut self, other: Self) -> Result<()> {
        self.hessian.absorb(other.hessian)?;
        if let (Some(own), Some(drift)) = (&mut self.drift, other.drift) {
            own.absorb(drift)?;
        }
        if let Some(held_out) = other.held_out {
            let own = match &mut self.held_out {
                Some(own) => own,
                none => none.insert(self.hessian.empty_like()?),
            };
            own.absorb(held_out)?;
        }
        Ok(())
    }

    /// Adds a batch of inputs `[B, S, K]`, the first `counted` of whose windows are not held out, and what the unquantized model has
    /// in their place in the first of its windows.
    pub(super) fn add(&mut self, inputs: &Tensor, counted: usize, dense: Option<&Tensor>) -> Result<()> {
        let without_first = |t: &Tensor| {
            t.f_narrow(1, self.skipped, t.size()[1] - self.skipped).torch("leave out first positions")
        };
        let inputs = without_first(inputs)?;
        let dense = dense.map(without_first).transpose()?;
        let (counted, all) = (counted as i64, inputs.size()[0]);
        if counted > 0 {
            self.hessian.add(&inputs.f_narrow(0, 0, counted).torch("split a batch")?)?;
        }
        if counted < all {
            let held_out =
                self.held_out.as_mut().expect("windows are held out where there is a Hessian for them");
            held_out.add(&inputs.f_narrow(0, counted, all - counted).torch("split a batch")?)?;
        }
        let (Some(drift), Some(dense)) = (&mut self.drift, dense) else { return Ok(()) };
        drift.add(&inputs.f_narrow(0, 0, dense.size()[0]).torch("split a batch")?, &dense)
    }
}

/// Activations of the unquantized model in one layer, of all windows.
pub(super) struct DenseLayer {
    /// Inputs of o.
    attended: Stream,
    /// Hidden states between attention and MLP.
    middle: Stream,
    /// Inputs of down.
    activated: Stream,
    /// Hidden states behind the layer; of the last one where it is tuned.
    pub(super) next: Stream,
}

impl DenseLayer {
    pub(super) fn streams_mut(&mut self) -> [&mut Stream; 4] {
        [&mut self.attended, &mut self.middle, &mut self.activated, &mut self.next]
    }
}

impl Member<'_> {
    /// Runs a layer as it is on the unquantized model's hidden states, which are stream `dense`, and keeps what its stages
    /// get. What comes out goes into the journal's `file` too; nothing does in a layer that is `last`.
    pub(super) fn run_dense(
        &mut self,
        dense: usize,
        file: Option<&Arc<WindowFile>>,
        last: bool,
    ) -> Result<()> {
        let config = self.config();
        let (hidden, attention, wide) =
            (config.hidden_size, config.attention_width(), config.intermediate_size);
        self.dense = Some(DenseLayer {
            attended: self.stream_like(dense, attention),
            middle: self.stream_like(dense, hidden),
            activated: self.stream_like(dense, wide),
            next: self.stream_like(dense, hidden),
        });
        self.set_dense(Stage::AttentionInput)?;
        self.each_batch(
            dense,
            |member, i| {
                let x = member.attention_input(dense, i)?;
                member.attend(&x)
            },
            |member, i, attended| member.dense_layer().attended.put(i, attended),
        )?;
        self.set_dense(Stage::AttentionOutput)?;
        self.each_batch(
            dense,
            |member, i| {
                let attended = member.dense_layer().attended.get(i)?;
                let output = member.linears[0].forward(&attended)?;
                add(&member.hidden[dense].get(i)?, &output)
            },
            |member, i, middle| member.dense_layer().middle.put(i, middle),
        )?;
        self.set_dense(Stage::MlpInput)?;
        self.each_batch(
            dense,
            |member, i| {
                let middle = member.dense_layer().middle.get(i)?;
                member.activate(&middle)
            },
            |member, i, activated| member.dense_layer().activated.put(i, activated),
        )?;
        if !last {
            self.set_dense(Stage::MlpOutput)?;
            self.each_batch(
                dense,
                |member, i| {
                    let activated = member.dense_layer().activated.get(i)?;
                    let output = member.linears[0].forward(&activated)?;
                    add(&member.dense_layer().middle.get(i)?, &output)
                },
                |member, i, hidden| {
                    let next = &mut member.dense_layer().next;
                    match file {
                        Some(file) => next.put_in_journal(i, hidden, file),
                        None => next.put(i, hidden),
                    }
                },
            )?;
        }
        self.linears.clear();
        Ok(())
    }

    /// The layer is done: the unquantized model's hidden states, stream `dense`, are those behind it.
    pub(super) fn leave_dense(&mut self, dense: usize) {
        if let Some(layer) = self.dense.take() {
            self.hidden[dense] = layer.next;
        }
    }

    /// What the unquantized model, stream `dense`, has as a stage's inputs in the windows of a batch of another stream: in the
    /// first of them, as far as it is followed.
    pub(super) fn dense_inputs(
        &mut self,
        stage: Stage,
        dense: Option<usize>,
        stream: usize,
        i: usize,
    ) -> Result<Option<Tensor>> {
        let Some(dense) = dense else { return Ok(None) };
        let Range { start, end } = self.hidden[stream].batches()[i].clone();
        let windows = start..end.min(self.followed.end);
        if windows.is_empty() {
            return Ok(None);
        }
        let inputs = match stage {
            Stage::AttentionInput => {
                let hidden = self.hidden[dense].of_windows(&windows)?;
                self.norm(&hidden, stage)?
            }
            Stage::AttentionOutput => self.dense_layer().attended.of_windows(&windows)?,
            Stage::MlpInput => {
                let middle = self.dense_layer().middle.of_windows(&windows)?;
                self.norm(&middle, stage)?
            }
            Stage::MlpOutput => self.dense_layer().activated.of_windows(&windows)?,
        };
        Ok(Some(inputs))
    }

    pub(super) fn dense_layer(&mut self) -> &mut DenseLayer {
        self.dense.as_mut().expect("the unquantized model runs through a layer first")
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    /// Of 5 windows of 4 positions in two batches, of which the unquantized model is followed on 3.
    fn captured(x: &Tensor, dense: &Tensor, skip_first: bool) -> Capture {
        let mut capture = Capture::new(6, Device::Cpu, true, false, skip_first).unwrap();
        capture.add(&x.narrow(0, 0, 2), 2, Some(&dense.narrow(0, 0, 2))).unwrap();
        // Another device's.
        let mut other = Capture::new(6, Device::Cpu, true, false, skip_first).unwrap();
        other.add(&x.narrow(0, 2, 3), 3, Some(&dense.narrow(0, 2, 1))).unwrap();
        capture.absorb(other).unwrap();
        capture
    }

    #[test]
    fn first_positions_are_in_neither_sum() {
        tch::manual_seed(5);
        let options = (Kind::Float, Device::Cpu);
        let (x, dense) = (Tensor::randn([5, 4, 6], options), Tensor::randn([3, 4, 6], options));
        // Sinks: nothing else would show beside them.
        let _ = x.narrow(1, 0, 1).fill_(1000.0);
        let all = captured(&x, &dense, false);
        assert_eq!((all.hessian.tokens(), all.drift.unwrap().tokens()), (20, 12));
        assert!(all.hessian.finish("test").unwrap().matrix().min().double_value(&[]) > 1e5);

        let Capture { hessian, drift, .. } = captured(&x, &dense, true);
        let drift = drift.unwrap();
        assert_eq!((hessian.tokens(), drift.tokens()), (15, 9));
        let rows = |t: &Tensor, windows: i64| t.narrow(0, 0, windows).slice(1, 1, 4, 1).reshape([-1, 6]);
        let later = rows(&x, 5);
        let expected = later.tr().mm(&later) / 15.0;
        assert!(hessian.finish("test").unwrap().matrix().allclose(&expected, 1e-4, 1e-4, false));
        let (later, off) = (rows(&x, 3), rows(&dense, 3) - rows(&x, 3));
        let expected = off.tr().mm(&later) / 9.0;
        let identity = Tensor::eye(6, options);
        assert!(drift.of(&identity, 1.0, "test").unwrap().allclose(&expected, 1e-4, 1e-4, false));
    }
}
