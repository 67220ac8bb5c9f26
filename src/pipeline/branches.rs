//! All branches of a run while they are written.

use std::{path::Path, time::Instant};

use super::{
    journal::{BranchState, State},
    output_format::{Job, format_of},
    worker_group::Sink,
};
use crate::{
    architectures::LinearId,
    checkpoint::Checkpoint,
    emit::{self, OutputWriter, Provenance},
    error::Result,
    eval::bits_per_weight,
    gptq::solver::Solved,
    plan::Plan,
    progress::Progress,
    report::{BranchReport, LinearReport, StageSeconds},
    variant::Output,
};

/// All branches of a run while they are written.
pub(super) struct Branches {
    writers: Vec<Box<dyn OutputWriter>>,
    reports: Vec<BranchReport>,
    warnings: Vec<String>,
    /// Seconds of solving, as reported with each linear, of packing and of finishing.
    seconds: StageSeconds,
}

impl Branches {
    /// Begins branches of the `checkpoint` that is quantized, or reopens those that `state` has; `original` is the checkpoint
    /// that it was made of.
    pub(super) fn open(
        plan: &Plan,
        checkpoint: &Checkpoint,
        original: &Checkpoint,
        out: &Path,
        state: &State,
    ) -> Result<Self> {
        let job = Job { original, config: checkpoint.config(), max_shard_size: plan.max_shard_size };
        let mut branches = Self {
            writers: Vec::new(),
            reports: Vec::new(),
            warnings: state.warnings.clone(),
            seconds: state.stage_seconds(),
        };
        for (i, &variant) in plan.variants.iter().enumerate() {
            let branch = plan.branch(&variant);
            let format = format_of(&variant);
            let (writer, report) = match state.branches.get(i).cloned() {
                Some(BranchState { report, tensors }) => {
                    (format.open(&job, out, &branch, Some(tensors))?, report)
                }
                None => {
                    let writer = format.open(&job, out, &branch, None)?;
                    let report = BranchReport {
                        branch,
                        variant,
                        bytes: 0,
                        weight_bytes: 0,
                        bits_per_weight: 0.0,
                        scale_bits: None,
                        seconds: 0.0,
                        readers: Vec::new(),
                        tensor_parallel: Vec::new(),
                        linears: Vec::new(),
                    };
                    (writer, report)
                }
            };
            branches.writers.push(writer);
            branches.reports.push(report);
        }
        Ok(branches)
    }

    /// Syncs the branches to the disk, so that a run can resume from them.
    pub(super) fn commit(&mut self) -> Result<Vec<BranchState>> {
        let commit = |(writer, report): (&mut Box<dyn OutputWriter>, &BranchReport)| {
            Ok(BranchState { report: report.clone(), tensors: writer.commit()? })
        };
        self.writers.iter_mut().zip(&self.reports).map(commit).collect()
    }

    /// Warnings in the order they came.
    pub(super) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Seconds of solving, packing and finishing.
    pub(super) fn seconds(&self) -> StageSeconds {
        self.seconds
    }

    /// Completes the branches in the folder `out` and checks them.
    pub(super) fn seal(
        &mut self,
        out: &Path,
        checkpoint: &Checkpoint,
        original: &Checkpoint,
        provenance: &Provenance,
        progress: &dyn Progress,
    ) -> Result<()> {
        let begun = Instant::now();
        progress.begin("writing and checking", self.writers.len() as u64);
        for (writer, report) in self.writers.iter_mut().zip(&self.reports) {
            writer.finish(checkpoint, original, provenance)?;
            format_of(&report.variant).verify(out, &report.branch)?;
            progress.advance(1);
        }
        self.seconds.finishing = begun.elapsed().as_secs_f64();
        Ok(())
    }
}

/// Warnings in the order they came, then one a branch for damping that was raised and for linears that were rounded.
pub(super) fn warnings(reports: &[BranchReport], as_they_came: &[String]) -> Vec<String> {
    let raised = reports.iter().map(|r| (r, r.linears.iter().filter(|l| l.damp_raised > 0).count()));
    let raised = raised
        .filter(|(_, count)| *count > 0)
        .map(|(r, count)| format!("{}: damping was raised for {count} linears", r.branch));
    let rounded = reports.iter().map(|r| (r, r.linears.iter().filter(|l| l.fallback.is_some()).count()));
    let rounded = rounded
        .filter(|(_, count)| *count > 0)
        .map(|(r, count)| format!("{}: {count} linears were rounded to nearest, not solved", r.branch));
    as_they_came.iter().cloned().chain(raised).chain(rounded).collect()
}

/// Checks branches that an earlier part of the run completed but did not move to their places.
pub(super) fn check_sealed(out: &Path, plan: &Plan) -> Result<()> {
    for variant in &plan.variants {
        let branch = plan.branch(variant);
        if emit::places(out, &branch)[1].exists() && !out.join(&branch).is_file() {
            format_of(variant).verify(out, &branch)?;
        }
    }
    Ok(())
}

/// Moves sealed branches to their places, if they are not there already. Returns their complete reports.
pub(super) fn publish(out: &Path, mut reports: Vec<BranchReport>) -> Result<Vec<BranchReport>> {
    for report in &mut reports {
        report.bytes = emit::publish(out, &report.branch)?;
        let written = Checkpoint::open(&out.join(&report.branch))?;
        report.weight_bytes = written.bytes_total();
        report.bits_per_weight = bits_per_weight(&written)?;
        report.scale_bits = match report.variant {
            Output::Gptq(_) => written.scale_bits()?,
            Output::Gguf(_) => None,
        };
        (report.readers, report.tensor_parallel) = format_of(&report.variant).readers(&written)?;
    }
    Ok(reports)
}

impl Sink for Branches {
    fn warn(&mut self, text: String) {
        self.warnings.push(text);
    }

    fn take(&mut self, variant: usize, id: &LinearId, linear: &Solved, report: LinearReport) -> Result<()> {
        let begun = Instant::now();
        self.writers[variant].encode(id, linear)?;
        let packing = begun.elapsed().as_secs_f64();
        self.seconds.solving += report.seconds;
        self.seconds.packing += packing;
        let branch = &mut self.reports[variant];
        branch.seconds += report.seconds + packing;
        branch.linears.push(report);
        Ok(())
    }
}
