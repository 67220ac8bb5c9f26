//! Solving the linears of one stage, for some variants of a team.

use std::time::Instant;

use tch::Tensor;

use super::{
    dense_path::Capture,
    machine::return_free_memory,
    stage_memory::At,
    team::{SharedSink, Team, lock},
};
use crate::{
    checkpoint::{LinearId, LinearKind},
    error::Result,
    gptq::{
        Drift, Hessian, Refiner,
        solver::{Factorization, Factorized, Solution, Solved, Weight, solve_by_rows},
    },
    model::Stage,
    progress::Event,
    variant::Sorting,
};

/// How one linear fared.
#[derive(Debug, Clone)]
pub(super) struct Record {
    pub(super) relative_error: f64,
    pub(super) facts: Factorization,
    /// The linear's share of its stage's time, by size.
    pub(super) seconds: f64,
    /// Output features that were rounded to nearest, as that is better.
    pub(super) uncompensated: usize,
    /// Why all of it was, if it was.
    pub(super) fallback: Option<String>,
    /// Whether it was refined after the solve, as that is better on held-out tokens.
    pub(super) refined: bool,
    /// Whether its scales are other ones since the layer was tuned.
    pub(super) tuned: bool,
}

/// A solved linear, and how it fared.
pub(super) struct Outcome {
    pub(super) id: LinearId,
    pub(super) linear: Solved,
    pub(super) record: Record,
}

impl Team<'_> {
    pub(super) fn solve_one(
        &self,
        layer: usize,
        stage: Stage,
        captured: Capture,
        variant: usize,
        sink: &SharedSink<'_>,
    ) -> Result<Vec<Outcome>> {
        let solved = self.solve_stage(layer, stage, captured, &[variant], sink)?;
        Ok(solved.into_iter().next().unwrap_or_default())
    }

    /// Solves a stage for some variants; returns the quantized linears of each. The sink takes them, unless they are tuned first.
    pub(super) fn solve_stage(
        &self,
        layer: usize,
        stage: Stage,
        captured: Capture,
        variants: &[usize],
        sink_of_all: &SharedSink<'_>,
    ) -> Result<Vec<Vec<Outcome>>> {
        return_free_memory();
        let sink = || lock(sink_of_all);
        let progress = self.around.progress;
        let weights = self.members[0].weights();
        let ids: Vec<LinearId> = stage.linears().iter().map(|&kind| LinearId { layer, kind }).collect();
        let name = format!("layer {layer}, {}", stage.name());
        let Capture { hessian, drift, held_out, .. } = captured;
        if let Some(text) = hessian.warning().or(held_out.as_ref().and_then(|h| h.warning())) {
            progress.event(&Event::Warning(text));
            sink().warn(text.to_owned());
        }
        self.around.memory.enter(At::Solving);
        let hessian = hessian.finish(&name)?;
        let damp = self.damp(&hessian)?;
        let mut hessian = Some(hessian);
        let held_out = held_out.map(|held_out| held_out.finish(&name)).transpose()?;
        let names: Vec<String> = ids.iter().map(LinearId::to_string).collect();
        let values = |kind: LinearKind| &weights.of(kind).0;
        let dense: Vec<Weight<'_>> =
            ids.iter().zip(&names).map(|(id, name)| Weight { name, values: values(id.kind) }).collect();
        let energies = dense.iter().map(|w| hessian.as_ref().map_or(Ok(0.0), |h| h.output_energy(w.values)));
        let energies = energies.collect::<Result<Vec<_>>>()?;
        let mut solved: Vec<Vec<Outcome>> = variants.iter().map(|_| Vec::new()).collect();

        let mut by_order: Vec<(Sorting, Vec<usize>)> = Vec::new();
        for (position, &variant) in variants.iter().enumerate() {
            let order = self.task.refinements.sorting(&self.task.variants[variant]);
            match by_order.iter_mut().find(|(o, _)| *o == order) {
                Some((_, list)) => list.push(position),
                None => by_order.push((order, vec![position])),
            }
        }
        let orders = by_order.len();
        let outputs = self.outputs.as_ref();
        let outputs: Option<Vec<_>> = outputs.map(|layer| ids.iter().map(|id| layer.of(id.kind)).collect());
        for (i, (order, list)) in by_order.into_iter().enumerate() {
            let begun = Instant::now();
            let factor = {
                let hessian = hessian.as_ref().expect("kept until the last order");
                self.solver.factorize(hessian, order, damp, &name)?
            };
            if i + 1 == orders && outputs.is_none() && held_out.is_none() {
                hessian = None;
            }
            self.warn(&name, damp, factor.facts());
            let aimed = self.aimed(&*factor, drift.as_ref(), &dense, &name)?;
            let weights: Vec<Weight<'_>> = match &aimed {
                Some(aimed) => dense.iter().zip(aimed).map(|(w, values)| Weight { values, ..*w }).collect(),
                None => dense.clone(),
            };
            let refiner = match (&hessian, &held_out) {
                (Some(hessian), Some(held_out)) => {
                    let sweeps = self.task.refinements.refine;
                    Some(Refiner::new(hessian, held_out, factor.facts().damp, sweeps)?)
                }
                _ => None,
            };
            // The factorization is shared by this order's variants, and so is its time.
            let factor_seconds = begun.elapsed().as_secs_f64() / list.len() as f64;
            for position in list {
                self.around.go_on()?;
                let variant = &self.task.variants[variants[position]];
                let begun = Instant::now();
                let solutions = match (&outputs, &hessian) {
                    (Some(outputs), Some(hessian)) => {
                        let go_on = || self.around.go_on();
                        solve_by_rows(&*factor, hessian, &weights, outputs, variant, &go_on)?
                    }
                    _ => factor.solve(&weights, variant)?,
                };
                let solutions = self.refined(refiner.as_ref(), &weights, solutions)?;
                let seconds = begun.elapsed().as_secs_f64() + factor_seconds;
                let size = |linear: &Solved| linear.in_features() * linear.out_features();
                let total: usize = solutions.iter().map(|(s, _)| size(&s.linear)).sum();
                for ((id, (solution, refined)), energy) in ids.iter().zip(solutions).zip(&energies) {
                    let relative_error =
                        if *energy > 0.0 { (solution.squared_error / energy).sqrt() } else { 0.0 };
                    let share = size(&solution.linear) as f64 / total as f64;
                    let (facts, fallback) = (factor.facts().clone(), solution.fallback);
                    if let Some(reason) = &fallback {
                        progress.event(&Event::Warning(&format!(
                            "{id}, {variant}: rounded to nearest: {reason}"
                        )));
                    }
                    let (seconds, uncompensated) = (seconds * share, solution.uncompensated);
                    let tuned = false;
                    let record =
                        Record { relative_error, facts, seconds, uncompensated, fallback, refined, tuned };
                    progress.event(&Event::Linear {
                        name: &id.to_string(),
                        variant: &variant.to_string(),
                        relative_error,
                    });
                    let outcome = Outcome { id: *id, linear: solution.linear, record };
                    if !self.task.tunes() {
                        self.pack(variants[position], &outcome, sink_of_all)?;
                    }
                    solved[position].push(outcome);
                }
                progress.advance(1);
            }
        }
        self.around.memory.enter(At::Calibrating);
        Ok(solved)
    }

    /// Gives a linear to the sink.
    pub(super) fn pack(&self, variant: usize, outcome: &Outcome, sink: &SharedSink<'_>) -> Result<()> {
        self.around.memory.enter(At::Packing);
        lock(sink).take(variant, outcome.id, &outcome.linear, outcome.record.clone())?;
        self.around.memory.enter(At::Solving);
        Ok(())
    }

    /// The damping that is tried first: the plan's, or what the spectrum asks for where that is more.
    fn damp(&self, hessian: &Hessian) -> Result<f64> {
        let least = self.task.damp;
        if self.task.refinements.shrinkage { Ok(hessian.shrinkage()?.max(least)) } else { Ok(least) }
    }

    /// The weights that aim at what the unquantized model computes, where it is followed.
    fn aimed(
        &self,
        factor: &dyn Factorized,
        drift: Option<&Drift>,
        dense: &[Weight<'_>],
        stage: &str,
    ) -> Result<Option<Vec<Tensor>>> {
        let Some(drift) = drift.filter(|drift| drift.tokens() > 0) else { return Ok(None) };
        let alpha = self.task.refinements.asymmetric;
        let aimed = dense.iter().map(|w| factor.aimed(w, &drift.of(w.values, alpha, stage)?));
        aimed.collect::<Result<_>>().map(Some)
    }

    /// Solutions as refinement has made them, and which of them it has changed.
    fn refined(
        &self,
        refiner: Option<&Refiner<'_>>,
        weights: &[Weight<'_>],
        solutions: Vec<Solution>,
    ) -> Result<Vec<(Solution, bool)>> {
        let refine = |(weight, solution): (&Weight<'_>, Solution)| {
            self.around.go_on()?;
            let refined = match refiner {
                // What could not be solved is left as it is.
                Some(refiner) if solution.fallback.is_none() => refiner.refine(weight, &solution.linear)?,
                _ => None,
            };
            Ok(match refined {
                Some(new) => {
                    let (linear, squared_error) = (Solved::Host(new.linear), new.squared_error);
                    (Solution { linear, squared_error, ..solution }, true)
                }
                None => (solution, false),
            })
        };
        weights.iter().zip(solutions).map(refine).collect()
    }

    /// Says that damping which began at `damp` had to be raised.
    fn warn(&self, stage: &str, damp: f64, facts: &Factorization) {
        if facts.damp_raised > 0 {
            let text = format!(
                "{stage}: not positive definite at damping {damp}; raised {} times to {}",
                facts.damp_raised, facts.damp
            );
            self.around.progress.event(&Event::Warning(&text));
        }
    }
}
