//! One decoder layer: capture a stage's inputs, solve it, go on with the quantized weights.

use std::time::Instant;

use tch::{Kind, Tensor};

use super::hidden_states::HiddenStates;
use crate::{
    checkpoint::{LinearId, LinearKind},
    error::Result,
    gptq::{
        Hessian,
        solver::{Factorization, Solved, Solver, Weight},
    },
    model::{Dense, Linear, Llama, Norms, Stage, add},
    progress::{Event, Progress},
    variant::Variant,
};

/// Takes solved linears, variant by variant.
pub(super) trait Sink {
    /// `variant` is an index into the run's variants.
    fn take(&mut self, variant: usize, id: LinearId, linear: &Solved, record: Record) -> Result<()>;

    /// Takes a warning, for the report.
    fn warn(&mut self, text: String);
}

/// How one linear fared.
#[derive(Debug, Clone)]
pub(super) struct Record {
    pub(super) relative_error: f64,
    pub(super) facts: Factorization,
    /// The linear's share of its stage's time, by size.
    pub(super) seconds: f64,
}

/// A layer's dense weights, read once for all variants.
struct Weights {
    norms: Norms,
    /// In the order of [`LinearKind::ALL`], in the checkpoint's own kind.
    linears: Vec<(Tensor, Option<Tensor>)>,
}

impl Weights {
    fn of(&self, kind: LinearKind) -> &(Tensor, Option<Tensor>) {
        let position = LinearKind::ALL.iter().position(|&k| k == kind);
        &self.linears[position.expect("ALL holds every kind")]
    }
}

/// What does not change from layer to layer.
pub(super) struct Layers<'a> {
    pub(super) llama: &'a Llama<'a>,
    pub(super) solver: &'a dyn Solver,
    pub(super) variants: &'a [Variant],
    pub(super) damp: f64,
    pub(super) progress: &'a dyn Progress,
}

impl Layers<'_> {
    /// Progress steps of a layer: a batch through each of four captures, and each variant's four solves.
    pub(super) fn steps(&self, hidden: &HiddenStates, shared: bool) -> u64 {
        let (batches, variants) = (hidden.batches().len() as u64, self.variants.len() as u64);
        let streams = if shared { 1 } else { variants };
        Stage::ALL.len() as u64 * (batches * streams + variants)
    }

    /// Solves layer `layer` for every variant, each on hidden states of its own, which are advanced through the
    /// quantized layer.
    pub(super) fn solve_each(
        &self,
        layer: usize,
        hidden: &mut [HiddenStates],
        sink: &mut dyn Sink,
    ) -> Result<()> {
        let weights = self.read(layer)?;
        let all: Vec<usize> = (0..self.variants.len()).collect();
        // Before the first layer all variants have the same hidden states, hence the same first Hessian.
        let mut first_stage = if layer == 0 {
            self.stage("all variants", Stage::AttentionInput);
            let hessian = self.capture_attention_input(&hidden[0], &weights)?;
            self.solve_stage(layer, Stage::AttentionInput, hessian, &all, &weights, sink)?
        } else {
            Vec::new()
        };
        for variant in all {
            let name = self.variants[variant].to_string();
            let hidden = &mut hidden[variant];
            let qkv = if layer == 0 {
                if variant > 0 {
                    // The capture that was shared counts for all.
                    self.progress.advance(hidden.batches().len() as u64);
                }
                self.quantized(std::mem::take(&mut first_stage[variant]), Stage::AttentionInput, &weights)?
            } else {
                self.stage(&name, Stage::AttentionInput);
                let hessian = self.capture_attention_input(hidden, &weights)?;
                self.solve_one(layer, Stage::AttentionInput, hessian, variant, &weights, sink)?
            };
            self.stage(&name, Stage::AttentionOutput);
            let (attended, hessian) = self.capture_attention_output(hidden, &weights, &qkv)?;
            drop(qkv);
            let o = self.solve_one(layer, Stage::AttentionOutput, hessian, variant, &weights, sink)?;
            self.stage(&name, Stage::MlpInput);
            let hessian = self.capture_mlp_input(hidden, &weights, attended, &o)?;
            let gate_up = self.solve_one(layer, Stage::MlpInput, hessian, variant, &weights, sink)?;
            self.stage(&name, Stage::MlpOutput);
            let (activated, hessian) = self.capture_mlp_output(hidden, &weights, &gate_up)?;
            drop(gate_up);
            let down = self.solve_one(layer, Stage::MlpOutput, hessian, variant, &weights, sink)?;
            self.leave_layer(layer, hidden, activated, &down)?;
        }
        Ok(())
    }

    /// Solves layer `layer` for every variant with the Hessians of the unquantized model, whose hidden states are
    /// advanced: one forward pass and one Hessian a stage, one factorization a column order.
    pub(super) fn solve_shared(
        &self,
        layer: usize,
        hidden: &mut HiddenStates,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        let weights = self.read(layer)?;
        let all: Vec<usize> = (0..self.variants.len()).collect();
        let mut solve = |stage, hessian| {
            self.stage("all variants", stage);
            self.solve_stage(layer, stage, hessian, &all, &weights, sink).map(|_| ())
        };
        solve(Stage::AttentionInput, self.capture_attention_input(hidden, &weights)?)?;
        let qkv = self.dense(Stage::AttentionInput, &weights)?;
        let (attended, hessian) = self.capture_attention_output(hidden, &weights, &qkv)?;
        solve(Stage::AttentionOutput, hessian)?;
        let o = self.dense(Stage::AttentionOutput, &weights)?;
        solve(Stage::MlpInput, self.capture_mlp_input(hidden, &weights, attended, &o)?)?;
        let gate_up = self.dense(Stage::MlpInput, &weights)?;
        let (activated, hessian) = self.capture_mlp_output(hidden, &weights, &gate_up)?;
        solve(Stage::MlpOutput, hessian)?;
        let down = self.dense(Stage::MlpOutput, &weights)?;
        self.leave_layer(layer, hidden, activated, &down)
    }

    fn stage(&self, variant: &str, stage: Stage) {
        self.progress.event(&Event::Stage { variant, stage: stage.name() });
    }

    fn read(&self, layer: usize) -> Result<Weights> {
        let source = self.llama.source_kind(LinearId { layer, kind: LinearKind::Q })?;
        if source != Kind::Half {
            for kind in LinearKind::ALL {
                self.llama.check_f16(LinearId { layer, kind })?;
            }
        }
        let linears = LinearKind::ALL.iter().map(|&kind| self.llama.weight(LinearId { layer, kind }, source));
        let weights = Weights { norms: self.llama.norms(layer)?, linears: linears.collect::<Result<_>>()? };
        self.llama.release(layer);
        Ok(weights)
    }

    fn capture_attention_input(&self, hidden: &HiddenStates, weights: &Weights) -> Result<Hessian> {
        let mut hessian = Hessian::new(self.llama.config().hidden_size, self.llama.device())?;
        for batch in hidden.batches() {
            hessian.add(&self.llama.rms_norm(batch, &weights.norms.input)?)?;
            self.progress.advance(1);
        }
        Ok(hessian)
    }

    fn capture_attention_output(
        &self,
        hidden: &HiddenStates,
        weights: &Weights,
        qkv: &[Dense],
    ) -> Result<(Vec<Tensor>, Hessian)> {
        let mut hessian = Hessian::new(self.llama.config().attention_width(), self.llama.device())?;
        let mut attended = Vec::with_capacity(hidden.batches().len());
        for batch in hidden.batches() {
            let x = self.llama.rms_norm(batch, &weights.norms.input)?;
            let a = self.llama.attend(&qkv[0].forward(&x)?, &qkv[1].forward(&x)?, &qkv[2].forward(&x)?)?;
            hessian.add(&a)?;
            attended.push(a);
            self.progress.advance(1);
        }
        Ok((attended, hessian))
    }

    fn capture_mlp_input(
        &self,
        hidden: &mut HiddenStates,
        weights: &Weights,
        attended: Vec<Tensor>,
        o: &[Dense],
    ) -> Result<Hessian> {
        let mut hessian = Hessian::new(self.llama.config().hidden_size, self.llama.device())?;
        for (batch, attended) in hidden.batches_mut().iter_mut().zip(attended) {
            *batch = add(batch, &o[0].forward(&attended)?)?;
            hessian.add(&self.llama.rms_norm(batch, &weights.norms.post_attention)?)?;
            self.progress.advance(1);
        }
        Ok(hessian)
    }

    fn capture_mlp_output(
        &self,
        hidden: &HiddenStates,
        weights: &Weights,
        gate_up: &[Dense],
    ) -> Result<(Vec<Tensor>, Hessian)> {
        let mut hessian = Hessian::new(self.llama.config().intermediate_size, self.llama.device())?;
        let mut activated = Vec::with_capacity(hidden.batches().len());
        for batch in hidden.batches() {
            let x = self.llama.rms_norm(batch, &weights.norms.post_attention)?;
            let a = self.llama.gated(&gate_up[0].forward(&x)?, &gate_up[1].forward(&x)?)?;
            hessian.add(&a)?;
            activated.push(a);
            self.progress.advance(1);
        }
        Ok((activated, hessian))
    }

    /// The last stage's outputs are nobody's inputs after the last layer, so there they are not computed.
    fn leave_layer(
        &self,
        layer: usize,
        hidden: &mut HiddenStates,
        activated: Vec<Tensor>,
        down: &[Dense],
    ) -> Result<()> {
        if layer + 1 == self.llama.config().num_layers {
            return Ok(());
        }
        for (batch, activated) in hidden.batches_mut().iter_mut().zip(activated) {
            *batch = add(batch, &down[0].forward(&activated)?)?;
        }
        Ok(())
    }

    fn dense(&self, stage: Stage, weights: &Weights) -> Result<Vec<Dense>> {
        let of = |&kind: &LinearKind| {
            let (weight, bias) = weights.of(kind);
            Dense::converted(weight, bias.as_ref(), self.llama.kind())
        };
        stage.linears().iter().map(of).collect()
    }

    fn solve_one(
        &self,
        layer: usize,
        stage: Stage,
        hessian: Hessian,
        variant: usize,
        weights: &Weights,
        sink: &mut dyn Sink,
    ) -> Result<Vec<Dense>> {
        let mut solved = self.solve_stage(layer, stage, hessian, &[variant], weights, sink)?;
        self.quantized(std::mem::take(&mut solved[variant]), stage, weights)
    }

    /// A stage's solved linears in dense form.
    fn quantized(&self, solved: Vec<Solved>, stage: Stage, weights: &Weights) -> Result<Vec<Dense>> {
        let dense = stage.linears().iter().zip(&solved).map(|(&kind, linear)| {
            let bias = weights.of(kind).1.as_ref();
            Dense::from_solved(linear, bias, self.llama.kind(), self.llama.device())
        });
        dense.collect()
    }

    /// Solves a stage for some variants; returns the quantized linears, indexed by variant.
    fn solve_stage(
        &self,
        layer: usize,
        stage: Stage,
        hessian: Hessian,
        variants: &[usize],
        weights: &Weights,
        sink: &mut dyn Sink,
    ) -> Result<Vec<Vec<Solved>>> {
        let ids: Vec<LinearId> = stage.linears().iter().map(|&kind| LinearId { layer, kind }).collect();
        let name = format!("layer {layer}, {}", stage.name());
        if let Some(text) = hessian.warning() {
            self.progress.event(&Event::Warning(text));
            sink.warn(text.to_owned());
        }
        let mut hessian = Some(hessian.finish(&name)?);
        let names: Vec<String> = ids.iter().map(LinearId::to_string).collect();
        let dense: Vec<Weight<'_>> = ids
            .iter()
            .zip(&names)
            .map(|(id, name)| Weight { name, values: &weights.of(id.kind).0 })
            .collect();
        let energies = dense.iter().map(|w| hessian.as_ref().map_or(Ok(0.0), |h| h.output_energy(w.values)));
        let energies = energies.collect::<Result<Vec<_>>>()?;
        let mut solved: Vec<Vec<Solved>> = self.variants.iter().map(|_| Vec::new()).collect();

        let mut by_order: Vec<(bool, Vec<usize>)> = Vec::new();
        for &variant in variants {
            let order = self.variants[variant].order.desc_act();
            match by_order.iter_mut().find(|(o, _)| *o == order) {
                Some((_, list)) => list.push(variant),
                None => by_order.push((order, vec![variant])),
            }
        }
        let orders = by_order.len();
        for (i, (order, list)) in by_order.into_iter().enumerate() {
            let begun = Instant::now();
            let factor = {
                let hessian = hessian.as_ref().expect("kept until the last order");
                self.solver.factorize(hessian, order, self.damp, &name)?
            };
            if i + 1 == orders {
                hessian = None;
            }
            self.warn(&name, factor.facts());
            // The factorization is shared by this order's variants, and so is its time.
            let factor_seconds = begun.elapsed().as_secs_f64() / list.len() as f64;
            for variant in list {
                let begun = Instant::now();
                let solutions = factor.solve(&dense, &self.variants[variant])?;
                let seconds = begun.elapsed().as_secs_f64() + factor_seconds;
                let size = |linear: &Solved| linear.in_features() * linear.out_features();
                let total: usize = solutions.iter().map(|s| size(&s.linear)).sum();
                for ((id, solution), energy) in ids.iter().zip(solutions).zip(&energies) {
                    let relative_error =
                        if *energy > 0.0 { (solution.squared_error / energy).sqrt() } else { 0.0 };
                    let share = size(&solution.linear) as f64 / total as f64;
                    let record =
                        Record { relative_error, facts: factor.facts().clone(), seconds: seconds * share };
                    self.progress.event(&Event::Linear {
                        name: &id.to_string(),
                        variant: &self.variants[variant].to_string(),
                        relative_error,
                    });
                    sink.take(variant, *id, &solution.linear, record)?;
                    solved[variant].push(solution.linear);
                }
                self.progress.advance(1);
            }
        }
        Ok(solved)
    }

    fn warn(&self, stage: &str, facts: &Factorization) {
        if facts.damp_raised > 0 {
            let text = format!(
                "{stage}: not positive definite at damping {}; raised {} times to {}",
                self.damp, facts.damp_raised, facts.damp
            );
            self.progress.event(&Event::Warning(&text));
        }
    }
}
