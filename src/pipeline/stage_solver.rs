//! Solving a stage: from statistics and weights to quantized linears.

use std::time::Instant;

use tch::{Device, Tensor};

use super::{
    output_hessians::LayerFactors,
    phases::{of_targets, shape_of},
    shared_rows::{is_worth_sharing, solve_shared},
    stage_memory::At,
    statistics::{CalibrationStatistics, blend_experts},
    weights::Weights,
    worker::RunContext,
    worker_group::{SharedSink, Task, lock},
};
use crate::{
    architectures::{GroupConfig, LinearId, ModelConfig},
    emit::linear_type,
    error::Result,
    ggml::BlockType,
    gptq::{
        CrossCovariance, Hessian,
        solver::{
            CpuSolver, CudaSolver, Factorization, Factorized, OrRounded, OutputFactor, Solution, Solved,
            Solver, Weight, solve_by_rows, targets,
        },
    },
    machine::return_free_memory,
    plan::OnFailure,
    progress::Event,
    report::{LinearReport, Phase},
    variant::{Output, Sorting, Variant},
};

/// Solves the stages of a layer on one device.
pub(super) struct StageSolver<'a> {
    config: &'a ModelConfig,
    device: Device,
    solver: Box<dyn Solver + Send>,
    task: Task<'a>,
    context: RunContext<'a>,
    /// Factorized output Hessians of the current layer, where they are used.
    outputs: Option<LayerFactors>,
}

impl<'a> StageSolver<'a> {
    /// With the fastest solver for the device.
    pub(super) fn new(
        config: &'a ModelConfig,
        device: Device,
        task: Task<'a>,
        context: RunContext<'a>,
    ) -> Result<Self> {
        let scales = task.accuracy.scales;
        let solver: Box<dyn Solver + Send> = match (device, task.on_failure) {
            (Device::Cpu, OnFailure::Error) => Box::new(CpuSolver::new().with_scales(scales)),
            (Device::Cpu, OnFailure::Rtn) => Box::new(OrRounded(CpuSolver::new().with_scales(scales))),
            (_, OnFailure::Error) => Box::new(CudaSolver::new(device)?.with_scales(scales)),
            (_, OnFailure::Rtn) => Box::new(OrRounded(CudaSolver::new(device)?.with_scales(scales))),
        };
        Ok(Self { config, device, solver, task, context, outputs: None })
    }

    /// The solver's name, for reports.
    pub(super) fn name(&self) -> &'static str {
        self.solver.name()
    }

    /// Factorizes the output Hessians of a layer, where they are used.
    pub(super) fn enter_layer(&mut self, layer: usize) -> Result<()> {
        let all = self.task.output_hessians;
        self.outputs = all.map(|all| all.factors(self.config, layer, self.device)).transpose()?;
        Ok(())
    }

    /// Solves a stage for some of the run's variants, given by index. Returns the quantized linears of each variant, after the sink
    /// took them.
    pub(super) fn solve_stage(
        &self,
        weights: &Weights,
        stage: usize,
        mut statistics: Vec<CalibrationStatistics>,
        variants: &[usize],
        sink: &SharedSink<'_>,
    ) -> Result<Vec<Vec<Solved>>> {
        let groups = &self.config.layers[weights.layer].stages[stage].groups;
        let tokens = blend_experts(groups, &mut statistics)?;
        let mut solved: Vec<Vec<Solved>> = variants.iter().map(|_| Vec::new()).collect();
        for ((group, statistics), tokens) in groups.iter().zip(statistics).zip(tokens) {
            return_free_memory();
            let of_group = self.solve_group(weights, group, statistics, tokens, variants, sink)?;
            solved.iter_mut().zip(of_group).for_each(|(all, own)| all.extend(own));
        }
        return_free_memory();
        Ok(solved)
    }

    /// Solves the linears of a group, which share a Hessian.
    fn solve_group(
        &self,
        weights: &Weights,
        group: &GroupConfig,
        statistics: CalibrationStatistics,
        tokens: Option<u64>,
        variants: &[usize],
        sink: &SharedSink<'_>,
    ) -> Result<Vec<Vec<Solved>>> {
        let progress = self.context.progress;
        let ids: Vec<LinearId> =
            group.linears.clone().map(|position| self.config.linear_id(weights.layer, position)).collect();
        let name = format!("layer {}, {}", weights.layer, group.name);
        let (hessian, cross_covariance) = statistics.into_parts();
        if let Some(text) = hessian.warning() {
            progress.event(&Event::Warning(text));
            lock(sink).warn(text.to_owned());
        }
        self.context.memory.enter(At::Solving);
        let hessian = hessian.finish(&name)?;
        let damp = self.damp(&hessian)?;
        let names: Vec<String> = ids.iter().map(LinearId::to_string).collect();
        let dense: Vec<Weight<'_>> = group
            .linears
            .clone()
            .zip(&names)
            .map(|(position, name)| Weight { name, values: &weights.of(position).0 })
            .collect();
        let (n, k) = shape_of(&self.config.layers[weights.layer], group);
        let phases = self.context.phases;
        let energies = phases.time(Phase::OutputEnergy, 0.0, || {
            hessian.output_energies(&dense.iter().map(|w| w.values).collect::<Vec<_>>())
        })?;
        let mut hessian = Some(hessian);
        let mut solved: Vec<Vec<Solved>> = variants.iter().map(|_| Vec::new()).collect();

        let mut by_order: Vec<(Sorting, Vec<usize>)> = Vec::new();
        for (position, &variant) in variants.iter().enumerate() {
            let order = self.task.variants[variant].sorting(self.task.accuracy.group_aware);
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
                let operations = k.powi(3) / 3.0;
                phases.time(Phase::Factorization, operations, || {
                    self.solver.factorize(hessian, order, damp, &name)
                })?
            };
            if i + 1 == orders && outputs.is_none() {
                hessian = None;
            }
            let of_order = list.iter().map(|&position| self.task.variants[variants[position]]);
            self.warn(&name, &of_order.collect::<Vec<_>>(), damp, factor.facts());
            let operations = if cross_covariance.is_some() { of_targets(n, k) } else { 0.0 };
            let targets = phases.time(Phase::Targets, operations, || {
                let targets = self.targets(&*factor, cross_covariance.as_ref(), &dense, &name);
                return_free_memory();
                targets
            })?;
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
                let formats = ids.iter().zip(&dense).map(|(id, w)| self.format(variant, id, w));
                let formats = formats.collect::<Result<Vec<_>>>()?;
                let outputs = outputs.as_deref().zip(hessian.as_ref());
                let solutions = self.solve_formats(&*factor, &weights, &formats, outputs)?;
                let solving = begun.elapsed().as_secs_f64();
                phases.add(Phase::Solve, solving, n * k * k);
                let seconds = solving + factor_seconds;
                let size = |linear: &Solved| linear.in_features() * linear.out_features();
                let total: usize = solutions.iter().map(|solution| size(&solution.linear)).sum();
                for ((id, solution), energy) in ids.iter().zip(solutions).zip(&energies) {
                    let relative_error =
                        if *energy > 0.0 { (solution.squared_error / energy).sqrt() } else { 0.0 };
                    let (name, share) = (id.to_string(), size(&solution.linear) as f64 / total as f64);
                    if let Some(reason) = &solution.fallback {
                        let text = format!("{name}, {variant}: rounded to nearest: {reason}");
                        progress.event(&Event::Warning(&text));
                    }
                    let text = variant.to_string();
                    progress.event(&Event::Linear { name: &name, variant: &text, relative_error });
                    let facts = factor.facts();
                    let report = LinearReport {
                        name,
                        relative_error,
                        damp: facts.damp,
                        damp_raised: facts.damp_raised,
                        dead_columns: facts.dead_columns,
                        outlier_ratio: facts.outlier_ratio,
                        condition_estimate: facts.condition_estimate,
                        seconds: seconds * share,
                        uncompensated_features: solution.uncompensated,
                        fallback: solution.fallback,
                        tokens,
                    };
                    self.context.memory.enter(At::Packing);
                    phases.time(Phase::Pack, 0.0, || {
                        lock(sink).take(variants[position], id, &solution.linear, report)
                    })?;
                    self.context.memory.enter(At::Solving);
                    solved[position].push(solution.linear);
                }
                progress.advance(1);
            }
        }
        self.context.memory.enter(At::Calibrating);
        Ok(solved)
    }

    /// The format of a linear in an output.
    fn format(&self, output: &Output, id: &LinearId, weight: &Weight<'_>) -> Result<LinearFormat> {
        Ok(match *output {
            Output::Gptq(variant) => LinearFormat::Gptq(variant),
            Output::Gguf(mix) => {
                let columns = weight.values.size()[1] as usize;
                LinearFormat::Blocks(linear_type(mix, self.config, id, columns)?)
            }
        })
    }

    /// Solves the weights of a group, those of one format together. With `outputs`, the factors of each weight's output Hessian and the
    /// Hessian of the inputs, rows are solved in turn.
    fn solve_formats(
        &self,
        factor: &dyn Factorized,
        weights: &[Weight<'_>],
        formats: &[LinearFormat],
        outputs: Option<(&[&[OutputFactor]], &Hessian)>,
    ) -> Result<Vec<Solution>> {
        let mut solutions: Vec<Option<Solution>> = weights.iter().map(|_| None).collect();
        for (first, &format) in formats.iter().enumerate() {
            if solutions[first].is_some() {
                continue;
            }
            let own: Vec<usize> = (first..weights.len()).filter(|&i| formats[i] == format).collect();
            let of_format: Vec<Weight<'_>> = own.iter().map(|&i| weights[i]).collect();
            let solve = |rows: &[Weight<'_>]| {
                self.context.check_cancelled()?;
                match format {
                    LinearFormat::Gptq(variant) => factor.solve(rows, &variant),
                    LinearFormat::Blocks(kind) => factor.solve_blocks(rows, kind),
                }
            };
            let solved = match outputs {
                Some((outputs, hessian)) => {
                    let outputs: Vec<&[OutputFactor]> = own.iter().map(|&i| outputs[i]).collect();
                    solve_by_rows(hessian, &of_format, &outputs, &solve)?
                }
                None => match format {
                    // A linear that cannot be solved is rounded as a whole, and the codes of a device stay there.
                    LinearFormat::Gptq(variant)
                        if self.device == Device::Cpu
                            && !factor.rounds_failures()
                            && is_worth_sharing(&of_format, self.context.cluster) =>
                    {
                        solve_shared(&of_format, variant.bits, self.context.cluster, solve)?
                    }
                    _ => solve(&of_format)?,
                },
            };
            own.into_iter().zip(solved).for_each(|(i, solution)| solutions[i] = Some(solution));
        }
        Ok(solutions.into_iter().flatten().collect())
    }

    /// The damping that is tried first: the plan's, or the shrinkage where that is larger.
    fn damp(&self, hessian: &Hessian) -> Result<f64> {
        let least = self.task.damp;
        if self.task.accuracy.shrinkage { Ok(hessian.shrinkage()?.max(least)) } else { Ok(least) }
    }

    /// The targets of asymmetric calibration, where the reference model is run.
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

    /// Warns where damping had to be raised above `damp` for the variants that share a column order.
    fn warn(&self, stage: &str, variants: &[Output], damp: f64, facts: &Factorization) {
        if let Some(text) = raised(stage, variants, damp, facts) {
            self.context.progress.event(&Event::Warning(&text));
        }
    }
}

/// Format of a quantized linear.
#[derive(Debug, Clone, Copy, PartialEq)]
enum LinearFormat {
    /// On the grid of a variant.
    Gptq(Variant),
    /// In blocks of ggml.
    Blocks(BlockType),
}

/// The warning where damping was raised above `damp`. Each column order is factorized by itself, so that the warning names the
/// variants of the order.
fn raised(stage: &str, variants: &[Output], damp: f64, facts: &Factorization) -> Option<String> {
    let names: Vec<String> = variants.iter().map(ToString::to_string).collect();
    let times = match facts.damp_raised {
        0 => return None,
        1 => "once".to_owned(),
        times => format!("{times} times"),
    };
    let names = names.join(" and ");
    Some(format!(
        "{stage}, {names}: not positive definite at damping {damp}; raised {times} to {}",
        facts.damp
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_of_raised_damping_names_the_variants() {
        let facts = |damp_raised| Factorization {
            damp: 0.0001,
            damp_raised,
            dead_columns: 0,
            outlier_ratio: 1.0,
            condition_estimate: 1.0,
        };
        let warning = |names: &[&str], times| {
            let variants: Vec<Output> = names.iter().map(|name| name.parse().unwrap()).collect();
            raised("layer 0, qkv", &variants, 0.0, &facts(times))
        };
        let [sequential, act] = [["4bit-128g", "4bit-64g"].as_slice(), &["4bit-32g-act"]];
        assert_eq!(
            warning(sequential, 2).unwrap(),
            "layer 0, qkv, 4bit-128g and 4bit-64g: not positive definite at damping 0; raised 2 times to 0.0001"
        );
        assert!(warning(act, 1).unwrap().ends_with("; raised once to 0.0001"));
        assert_ne!(warning(sequential, 2), warning(act, 2));
        assert_eq!(warning(act, 0), None);
    }
}
