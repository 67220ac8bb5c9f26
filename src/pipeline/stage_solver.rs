//! Solving a stage: from statistics and weights to quantized linears.

use std::time::Instant;

use tch::{Device, Kind};

use super::{
    output_hessians::{LayerFactors, TokenWeights},
    phases::{of_targets, shape_of},
    shared_rows::{is_worth_sharing, solve_shared, solve_strands_shared, spread_experts},
    solution_message::{MessageReader, write_linear, write_numbers},
    stage_memory::At,
    statistics::{CalibrationStatistics, blend_experts},
    weights::Weights,
    worker::RunContext,
    worker_group::{SharedSink, Task, lock},
};
use crate::{
    architectures::{GroupConfig, LinearId, ModelConfig},
    emit::linear_type,
    error::{Error, Result},
    ggml::BlockType,
    gptq::{
        Hessian,
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
        let on_cpu = match task.kinds.usual {
            Kind::BFloat16 => CpuSolver::for_bf16_inputs().with_scales(scales),
            _ => CpuSolver::new().with_scales(scales),
        };
        let solver: Box<dyn Solver + Send> = match (device, task.on_failure) {
            (Device::Cpu, OnFailure::Error) => Box::new(on_cpu),
            (Device::Cpu, OnFailure::Rtn) => Box::new(OrRounded(on_cpu)),
            (_, OnFailure::Error) => Box::new(CudaSolver::new(device)?.with_scales(scales)),
            (_, OnFailure::Rtn) => Box::new(OrRounded(CudaSolver::new(device)?.with_scales(scales))),
        };
        Ok(Self { config, device, solver, task, context, outputs: None })
    }

    /// The solver's name, for reports.
    pub(super) fn name(&self) -> &'static str {
        self.solver.name()
    }

    /// Weights of the tokens in the Hessians of the layer, where output Hessians are used.
    pub(super) fn token_weights(&self) -> Option<&TokenWeights> {
        self.outputs.as_ref().map(|outputs| &outputs.token_weights)
    }

    /// Factorizes the output Hessians of a layer, where they are used.
    pub(super) fn enter_layer(&mut self, layer: usize) -> Result<()> {
        let all = self.task.output_hessians;
        self.outputs = all.map(|all| all.factors(self.config, layer, self.device)).transpose()?;
        Ok(())
    }

    /// Solves a stage for some of the run's variants, given by index. Returns the quantized linears of each variant, after the sink
    /// took them. If the device runs out of memory, `free` is called and the operation is repeated.
    pub(super) fn solve_stage(
        &self,
        weights: &Weights,
        stage: usize,
        mut statistics: Vec<CalibrationStatistics>,
        variants: &[usize],
        sink: &SharedSink<'_>,
        free: &mut FreeMemory<'_>,
    ) -> Result<Vec<Vec<Solved>>> {
        let layer = &self.config.layers[weights.layer];
        let stage = &layer.stages[stage];
        let groups = &stage.groups;
        let tokens = blend_experts(groups, &mut statistics)?;
        let mut statistics = statistics.into_iter().zip(tokens);
        let mut solved: Vec<Vec<Solved>> = variants.iter().map(|_| Vec::new()).collect();
        let cluster = self.context.cluster;
        // Each rank solves one of some experts, which come first.
        let spread = match self.device {
            Device::Cpu => spread_experts(layer, stage, cluster.ranks()),
            _ => 0,
        };
        for round in groups[..spread].chunks(cluster.ranks()) {
            return_free_memory();
            let mut own = None;
            for (rank, (group, (statistics, tokens))) in round.iter().zip(statistics.by_ref()).enumerate() {
                if rank == cluster.rank() {
                    own = Some(self.solve_group(weights, group, statistics, tokens, variants, false, free)?);
                }
            }
            let own = own.map(|own| own.message()).transpose()?.unwrap_or_default();
            for (group, message) in round.iter().zip(cluster.all_gather(own)?) {
                let solution = GroupSolution::of_message(&message)?;
                self.deliver(weights, group, solution, variants, sink, &mut solved)?;
            }
        }
        for (group, (statistics, tokens)) in groups[spread..].iter().zip(statistics) {
            return_free_memory();
            let solution = self.solve_group(weights, group, statistics, tokens, variants, true, free)?;
            self.deliver(weights, group, solution, variants, sink, &mut solved)?;
        }
        return_free_memory();
        Ok(solved)
    }

    /// Gives the linears of a group to the sink, and keeps them for each variant.
    fn deliver(
        &self,
        weights: &Weights,
        group: &GroupConfig,
        solution: GroupSolution,
        variants: &[usize],
        sink: &SharedSink<'_>,
        solved: &mut [Vec<Solved>],
    ) -> Result<()> {
        let (progress, phases) = (self.context.progress, self.context.phases);
        for (text, of_report) in solution.warnings {
            progress.event(&Event::Warning(&text));
            if of_report {
                lock(sink).warn(text);
            }
        }
        self.context.memory.enter(At::Packing);
        for SolvedLinear { position, index, linear, report } in solution.linears {
            let id = self.config.linear_id(weights.layer, group.linears.start + index);
            let variant = self.task.variants[variants[position]].to_string();
            if let Some(reason) = &report.fallback {
                let text = format!("{}, {variant}: rounded to nearest: {reason}", report.name);
                progress.event(&Event::Warning(&text));
            }
            let (name, relative_error) = (&report.name, report.relative_error);
            progress.event(&Event::Linear { name, variant: &variant, relative_error });
            phases.time(Phase::Pack, 0.0, || lock(sink).take(variants[position], &id, &linear, report))?;
            solved[position].push(linear);
        }
        progress.advance(variants.len() as u64);
        self.context.memory.enter(At::Calibrating);
        Ok(())
    }

    /// Solves the linears of a group, which share a Hessian; with `together`, all ranks of the run do so.
    fn solve_group(
        &self,
        weights: &Weights,
        group: &GroupConfig,
        statistics: CalibrationStatistics,
        tokens: Option<u64>,
        variants: &[usize],
        together: bool,
        free: &mut FreeMemory<'_>,
    ) -> Result<GroupSolution> {
        let mut solved = GroupSolution::default();
        let ids: Vec<LinearId> =
            group.linears.clone().map(|position| self.config.linear_id(weights.layer, position)).collect();
        let name = format!("layer {}, {}", weights.layer, group.name);
        let (hessian, cross_covariance) = statistics.into_parts();
        solved.warnings.extend(hessian.warning().map(|text| (text.to_owned(), true)));
        self.context.memory.enter(At::Solving);
        let hessian = hessian.finish(&name)?;
        let mut cross_covariance = cross_covariance
            .filter(|sums| sums.tokens() > 0)
            .map(|sums| sums.finish(self.task.accuracy.asymmetric, &name))
            .transpose()?;
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
            let values: Vec<_> = dense.iter().map(|w| w.values).collect();
            or_again(free, || hessian.output_energies(&values))
        })?;
        let mut hessian = Some(hessian);

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
                    or_again(free, || self.solver.factorize(hessian, order, damp, &name))
                })?
            };
            if i + 1 == orders && outputs.is_none() {
                hessian = None;
            }
            let of_order = list.iter().map(|&position| self.task.variants[variants[position]]);
            let raised = raised(&name, &of_order.collect::<Vec<_>>(), damp, factor.facts());
            solved.warnings.extend(raised.map(|text| (text, false)));
            let operations = if cross_covariance.is_some() { of_targets(n, k) } else { 0.0 };
            let targets = phases.time(Phase::Targets, operations, || {
                let sums = cross_covariance.as_ref();
                let targets = or_again(free, || sums.map(|sums| targets(&*factor, sums, &dense)).transpose());
                if i + 1 == orders {
                    cross_covariance = None;
                }
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
                let solve = || self.solve_formats(&*factor, &weights, &formats, outputs, together);
                let solutions = or_again(free, solve)?;
                let solving = begun.elapsed().as_secs_f64();
                phases.add(Phase::Solve, solving, n * k * k);
                let seconds = solving + factor_seconds;
                let size = |linear: &Solved| linear.in_features() * linear.out_features();
                let total: usize = solutions.iter().map(|solution| size(&solution.linear)).sum();
                for (index, (solution, energy)) in solutions.into_iter().zip(&energies).enumerate() {
                    let relative_error =
                        if *energy > 0.0 { (solution.squared_error / energy).sqrt() } else { 0.0 };
                    let share = size(&solution.linear) as f64 / total as f64;
                    let facts = factor.facts();
                    let report = LinearReport {
                        name: ids[index].to_string(),
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
                    solved.linears.push(SolvedLinear { position, index, linear: solution.linear, report });
                }
            }
        }
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
    /// Hessian of the inputs, rows are solved in turn. With `together`, each rank of the run solves some rows.
    fn solve_formats(
        &self,
        factor: &dyn Factorized,
        weights: &[Weight<'_>],
        formats: &[LinearFormat],
        outputs: Option<(&[&[OutputFactor]], &Hessian)>,
        together: bool,
    ) -> Result<Vec<Solution>> {
        let cluster = self.context.cluster;
        // A linear that cannot be solved is rounded as a whole, and the codes of a device stay there.
        let together = together && self.device == Device::Cpu && !factor.rounds_failures();
        let mut solutions: Vec<Option<Solution>> = weights.iter().map(|_| None).collect();
        for (first, &format) in formats.iter().enumerate() {
            if solutions[first].is_some() {
                continue;
            }
            let own: Vec<usize> = (first..weights.len()).filter(|&i| formats[i] == format).collect();
            let of_format: Vec<Weight<'_>> = own.iter().map(|&i| weights[i]).collect();
            let together = together && is_worth_sharing(&of_format, cluster);
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
                    match together {
                        true => solve_strands_shared(hessian, &of_format, &outputs, cluster, &solve)?,
                        false => solve_by_rows(hessian, &of_format, &outputs, &solve)?,
                    }
                }
                None if together => solve_shared(&of_format, cluster, solve)?,
                None => solve(&of_format)?,
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
}

/// Frees memory of the device. False when there is nothing more to free.
pub(super) type FreeMemory<'f> = dyn FnMut() -> Result<bool> + 'f;

/// Computes a result; once more if the device runs out of memory and `free` frees some. `compute` must leave its inputs unchanged.
fn or_again<T>(free: &mut FreeMemory<'_>, compute: impl Fn() -> Result<T>) -> Result<T> {
    let attempt = || {
        #[cfg(test)]
        crate::error::TorchContext::torch(crate::gptq::fault::check(), "solve")?;
        compute()
    };
    match attempt() {
        Err(error) if error.is_out_of_device_memory() && free()? => attempt(),
        result => result,
    }
}

/// What solving a group gives.
#[derive(Default)]
struct GroupSolution {
    /// With whether the report has it too.
    warnings: Vec<(String, bool)>,
    linears: Vec<SolvedLinear>,
}

struct SolvedLinear {
    /// Among the variants that are solved.
    position: usize,
    /// Among the linears of the group.
    index: usize,
    linear: Solved,
    report: LinearReport,
}

/// The part of a [`GroupSolution`] that is sent as JSON: the warnings, and the place and the report of each linear.
type Header = (Vec<(String, bool)>, Vec<(usize, usize, LinearReport)>);

impl GroupSolution {
    /// As a message: the length of the JSON, that, and the linears.
    fn message(self) -> Result<Vec<u8>> {
        let mut linears = Vec::new();
        let mut reports = Vec::new();
        for SolvedLinear { position, index, linear, report } in self.linears {
            write_linear(&mut linears, &linear)?;
            reports.push((position, index, report));
        }
        let header: Header = (self.warnings, reports);
        let json = serde_json::to_vec(&header).map_err(unreadable)?;
        let mut message = Vec::new();
        write_numbers(&mut message, [json.len() as u64]);
        message.extend(json);
        message.extend(linears);
        Ok(message)
    }

    fn of_message(message: &[u8]) -> Result<Self> {
        let mut rest = MessageReader::new(message);
        let length = rest.number() as usize;
        let (warnings, reports): Header = serde_json::from_slice(rest.bytes(length)).map_err(unreadable)?;
        let linear = |(position, index, report)| {
            let linear = rest.linear();
            SolvedLinear { position, index, linear, report }
        };
        Ok(Self { warnings, linears: reports.into_iter().map(linear).collect() })
    }
}

fn unreadable(source: serde_json::Error) -> Error {
    Error::Json { path: "message of a rank".into(), source }
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
