//! Solving a stage: from statistics and weights to quantized linears.

use std::time::Instant;

use tch::Tensor;

use super::{
    stage_memory::At,
    statistics::CalibrationStatistics,
    worker_group::{SharedSink, WorkerGroup, lock},
};
use crate::{
    architectures::{GroupConfig, LinearId},
    error::Result,
    gptq::{
        CrossCovariance, Hessian,
        solver::{Factorization, Factorized, Solved, Weight, solve_by_rows, targets},
    },
    machine::return_free_memory,
    progress::Event,
    variant::Sorting,
};

/// Statistics of one solved linear.
#[derive(Debug, Clone)]
pub(super) struct LinearStatistics {
    pub(super) relative_error: f64,
    pub(super) facts: Factorization,
    /// The linear's share of its stage's time, by size.
    pub(super) seconds: f64,
    /// Output features that were rounded to nearest, as that is better.
    pub(super) uncompensated: usize,
    /// Why all of it was, if it was.
    pub(super) fallback: Option<String>,
    /// Of an expert, the calibration tokens that went through it.
    pub(super) tokens: Option<u64>,
}

impl WorkerGroup<'_> {
    /// Solves a stage for some variants; returns the quantized linears of each, after the sink took them.
    pub(super) fn solve_stage(
        &self,
        stage: usize,
        mut statistics: Vec<CalibrationStatistics>,
        variants: &[usize],
        sink: &SharedSink<'_>,
    ) -> Result<Vec<Vec<Solved>>> {
        let groups = &self.layer().stages[stage].groups;
        let tokens = blend_experts(groups, &mut statistics)?;
        let mut solved: Vec<Vec<Solved>> = variants.iter().map(|_| Vec::new()).collect();
        for ((group, statistics), tokens) in groups.iter().zip(statistics).zip(tokens) {
            return_free_memory();
            for (all, own) in
                solved.iter_mut().zip(self.solve_group(group, statistics, tokens, variants, sink)?)
            {
                all.extend(own);
            }
        }
        Ok(solved)
    }

    /// Solves the linears of a group, which share a Hessian.
    fn solve_group(
        &self,
        group: &GroupConfig,
        statistics: CalibrationStatistics,
        tokens: Option<u64>,
        variants: &[usize],
        sink: &SharedSink<'_>,
    ) -> Result<Vec<Vec<Solved>>> {
        let progress = self.context.progress;
        let weights = self.workers[0].weights();
        let layer = weights.layer;
        let config = self.workers[0].config();
        let ids: Vec<LinearId> =
            group.linears.clone().map(|position| config.linear_id(layer, position)).collect();
        let name = format!("layer {layer}, {}", group.name);
        let CalibrationStatistics { hessian, cross_covariance } = statistics;
        if let Some(text) = hessian.warning() {
            progress.event(&Event::Warning(text));
            lock(sink).warn(text.to_owned());
        }
        self.context.memory.enter(At::Solving);
        let hessian = hessian.finish(&name)?;
        let damp = self.damp(&hessian)?;
        let mut hessian = Some(hessian);
        let names: Vec<String> = ids.iter().map(LinearId::to_string).collect();
        let dense: Vec<Weight<'_>> = group
            .linears
            .clone()
            .zip(&names)
            .map(|(position, name)| Weight { name, values: &weights.of(position).0 })
            .collect();
        let energies = dense.iter().map(|w| hessian.as_ref().map_or(Ok(0.0), |h| h.output_energy(w.values)));
        let energies = energies.collect::<Result<Vec<_>>>()?;
        let mut solved: Vec<Vec<Solved>> = variants.iter().map(|_| Vec::new()).collect();

        let mut by_order: Vec<(Sorting, Vec<usize>)> = Vec::new();
        for (position, &variant) in variants.iter().enumerate() {
            let order = self.task.accuracy.sorting(&self.task.variants[variant]);
            match by_order.iter_mut().find(|(o, _)| *o == order) {
                Some((_, list)) => list.push(position),
                None => by_order.push((order, vec![position])),
            }
        }
        let orders = by_order.len();
        let outputs = self.outputs.as_ref();
        let outputs: Option<Vec<_>> =
            outputs.map(|layer| group.linears.clone().map(|position| layer.of(position)).collect());
        for (i, (order, list)) in by_order.into_iter().enumerate() {
            let begun = Instant::now();
            let factor = {
                let hessian = hessian.as_ref().expect("kept until the last order");
                self.solver.factorize(hessian, order, damp, &name)?
            };
            if i + 1 == orders && outputs.is_none() {
                hessian = None;
            }
            self.warn(&name, damp, factor.facts());
            let targets = self.targets(&*factor, cross_covariance.as_ref(), &dense, &name)?;
            let weights: Vec<Weight<'_>> = match &targets {
                Some(targets) => {
                    dense.iter().zip(targets).map(|(w, values)| Weight { values, ..*w }).collect()
                }
                None => dense.clone(),
            };
            // The factorization is shared by this order's variants, and so is its time.
            let factor_seconds = begun.elapsed().as_secs_f64() / list.len() as f64;
            for position in list {
                self.context.check_cancelled()?;
                let variant = &self.task.variants[variants[position]];
                let begun = Instant::now();
                let solutions = match (&outputs, &hessian) {
                    (Some(outputs), Some(hessian)) => {
                        let check = || self.context.check_cancelled();
                        solve_by_rows(&*factor, hessian, &weights, outputs, variant, &check)?
                    }
                    _ => factor.solve(&weights, variant)?,
                };
                let seconds = begun.elapsed().as_secs_f64() + factor_seconds;
                let size = |linear: &Solved| linear.in_features() * linear.out_features();
                let total: usize = solutions.iter().map(|solution| size(&solution.linear)).sum();
                for ((id, solution), energy) in ids.iter().zip(solutions).zip(&energies) {
                    let relative_error =
                        if *energy > 0.0 { (solution.squared_error / energy).sqrt() } else { 0.0 };
                    let share = size(&solution.linear) as f64 / total as f64;
                    if let Some(reason) = &solution.fallback {
                        progress.event(&Event::Warning(&format!(
                            "{id}, {variant}: rounded to nearest: {reason}"
                        )));
                    }
                    let statistics = LinearStatistics {
                        relative_error,
                        facts: factor.facts().clone(),
                        seconds: seconds * share,
                        uncompensated: solution.uncompensated,
                        fallback: solution.fallback,
                        tokens,
                    };
                    progress.event(&Event::Linear {
                        name: &id.to_string(),
                        variant: &variant.to_string(),
                        relative_error,
                    });
                    self.context.memory.enter(At::Packing);
                    lock(sink).take(variants[position], id.clone(), &solution.linear, statistics)?;
                    self.context.memory.enter(At::Solving);
                    solved[position].push(solution.linear);
                }
                progress.advance(1);
            }
        }
        self.context.memory.enter(At::Calibrating);
        Ok(solved)
    }

    /// The damping that is tried first: the plan's, or what the spectrum asks for where that is more.
    fn damp(&self, hessian: &Hessian) -> Result<f64> {
        let least = self.task.damp;
        if self.task.accuracy.shrinkage { Ok(hessian.shrinkage()?.max(least)) } else { Ok(least) }
    }

    /// The weights whose outputs come nearest to the reference model's, where that is run.
    fn targets(
        &self,
        factor: &dyn Factorized,
        cross_covariance: Option<&CrossCovariance>,
        dense: &[Weight<'_>],
        stage: &str,
    ) -> Result<Option<Vec<Tensor>>> {
        let Some(known) = cross_covariance.filter(|known| known.tokens() > 0) else { return Ok(None) };
        targets(factor, known, dense, self.task.accuracy.asymmetric, stage).map(Some)
    }

    /// Says that damping which began at `damp` had to be raised.
    fn warn(&self, stage: &str, damp: f64, facts: &Factorization) {
        if facts.damp_raised > 0 {
            let text = format!(
                "{stage}: not positive definite at damping {damp}; raised {} times to {}",
                facts.damp_raised, facts.damp
            );
            self.context.progress.event(&Event::Warning(&text));
        }
    }
}

/// Experts that fewer tokens went through than they have input features are solved with the Hessian of all experts blended in, up to so
/// many tokens. Returns how many tokens each expert had; `None` for what is no expert.
fn blend_experts(
    groups: &[GroupConfig],
    statistics: &mut [CalibrationStatistics],
) -> Result<Vec<Option<u64>>> {
    let (experts, others) =
        statistics.split_at_mut(groups.iter().filter(|group| group.expert.is_some()).count());
    let tokens: Vec<u64> = experts.iter().map(|statistics| statistics.hessian.tokens()).collect();
    let few = experts.iter().any(|s| s.hessian.tokens() < s.hessian.in_features() as u64);
    if few {
        let pooled = Hessian::sum_of(experts.iter().map(|statistics| &statistics.hessian))?;
        for statistics in experts.iter_mut() {
            let least = statistics.hessian.in_features() as u64;
            if let Some(cross_covariance) = &mut statistics.cross_covariance {
                cross_covariance.spread_over(least)?;
            }
            statistics.hessian.fill_up(&pooled, least)?;
        }
    }
    Ok(tokens.into_iter().map(Some).chain(others.iter().map(|_| None)).collect())
}
