//! All branches of a run while they grow.

use std::{path::Path, time::Instant};

use super::{
    journal::{BranchState, State},
    stage_solver::LinearStatistics,
    worker_group::Sink,
};
use crate::{
    architectures::LinearId,
    checkpoint::Checkpoint,
    emit::{self, BranchWriter, Provenance},
    error::Result,
    gptq::solver::Solved,
    plan::Plan,
    progress::Progress,
    report::{BranchReport, LinearReport, StageSeconds},
    variant::Variant,
    verify,
};

/// All branches while they grow.
pub(super) struct Branches {
    writers: Vec<BranchWriter>,
    reports: Vec<BranchReport>,
    warnings: Vec<String>,
    /// The parts that happen here: solving, as told, packing and finishing.
    seconds: StageSeconds,
}

impl Branches {
    /// Begins branches of the `checkpoint` that is quantized, which was made of the `original`.
    pub(super) fn create(
        plan: &Plan,
        checkpoint: &Checkpoint,
        original: &Checkpoint,
        out: &Path,
    ) -> Result<Self> {
        let (config, passed_through) = (checkpoint.config(), original.passed_through()?);
        let create =
            |v: &Variant| BranchWriter::create(out, *v, config, &passed_through, plan.max_shard_size);
        let report = |v: &Variant| BranchReport {
            branch: v.branch(),
            variant: *v,
            bytes: 0,
            weight_bytes: 0,
            bits_per_weight: bits_per_weight(v, checkpoint),
            scale_bits: None,
            seconds: 0.0,
            readers: Vec::new(),
            linears: Vec::new(),
        };
        Ok(Self {
            writers: plan.variants.iter().map(create).collect::<Result<_>>()?,
            reports: plan.variants.iter().map(report).collect(),
            warnings: Vec::new(),
            seconds: StageSeconds::default(),
        })
    }

    /// Goes on with branches that were committed to.
    pub(super) fn reopen(
        plan: &Plan,
        checkpoint: &Checkpoint,
        original: &Checkpoint,
        out: &Path,
        state: &State,
    ) -> Result<Self> {
        let (branches, config, passed_through) =
            (state.branches(), checkpoint.config(), original.passed_through()?);
        let reopen = |(variant, branch): (&Variant, &BranchState)| {
            let tensors = branch.tensors.clone();
            BranchWriter::reopen(out, *variant, config, &passed_through, plan.max_shard_size, tensors)
        };
        Ok(Self {
            writers: plan.variants.iter().zip(branches).map(reopen).collect::<Result<_>>()?,
            reports: branches.iter().map(|branch| branch.report.clone()).collect(),
            warnings: state.warnings().to_vec(),
            seconds: state.stage_seconds(),
        })
    }

    /// Makes what there is durable, to be gone on with.
    pub(super) fn commit(&mut self) -> Result<Vec<BranchState>> {
        let commit = |(writer, report): (&mut BranchWriter, &BranchReport)| {
            Ok(BranchState { report: report.clone(), tensors: writer.commit()? })
        };
        self.writers.iter_mut().zip(&self.reports).map(commit).collect()
    }

    /// What went otherwise than planned, as it came.
    pub(super) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Where the time went, as far as it went here.
    pub(super) fn seconds(&self) -> StageSeconds {
        self.seconds
    }

    /// Completes the branches and checks them.
    pub(super) fn seal(
        &mut self,
        checkpoint: &Checkpoint,
        original: &Checkpoint,
        provenance: &Provenance,
        progress: &dyn Progress,
    ) -> Result<()> {
        let begun = Instant::now();
        progress.begin("writing and checking", self.writers.len() as u64);
        for writer in &mut self.writers {
            let folder = writer.seal(checkpoint, original, provenance)?;
            verify::written(folder)?;
            progress.advance(1);
        }
        self.seconds.finishing = begun.elapsed().as_secs_f64();
        Ok(())
    }
}

/// What went otherwise than planned: as it came, and in sum.
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

/// Checks branches that an earlier part of the run completed and that are not in their places yet.
pub(super) fn check_sealed(out: &Path, variants: &[Variant]) -> Result<()> {
    let partial = variants.iter().map(|variant| emit::places(out, variant)[1].clone());
    partial.filter(|folder| folder.exists()).try_for_each(|folder| verify::written(&folder))
}

/// Moves sealed branches to their places, those that are not there already. Returns their reports, complete.
pub(super) fn publish(out: &Path, mut reports: Vec<BranchReport>) -> Result<Vec<BranchReport>> {
    for report in &mut reports {
        report.bytes = emit::publish(out, &report.variant)?;
        let written = Checkpoint::open(&out.join(&report.branch))?;
        report.weight_bytes = written.bytes_total();
        report.scale_bits = written.scale_bits()?;
        report.readers = verify::readers_of(&written)?;
    }
    Ok(reports)
}

impl Sink for Branches {
    fn warn(&mut self, text: String) {
        self.warnings.push(text);
    }

    fn take(
        &mut self,
        variant: usize,
        id: LinearId,
        linear: &Solved,
        record: LinearStatistics,
    ) -> Result<()> {
        let begun = Instant::now();
        self.writers[variant].write_linear(&id, linear)?;
        let report = &mut self.reports[variant];
        let packing = begun.elapsed().as_secs_f64();
        report.seconds += record.seconds + packing;
        self.seconds.solving += record.seconds;
        self.seconds.packing += packing;
        report.linears.push(LinearReport {
            name: id.to_string(),
            relative_error: record.relative_error,
            damp: record.facts.damp,
            damp_raised: record.facts.damp_raised,
            dead_columns: record.facts.dead_columns,
            outlier_ratio: record.facts.outlier_ratio,
            condition_estimate: record.facts.condition_estimate,
            seconds: record.seconds,
            uncompensated_features: record.uncompensated,
            fallback: record.fallback,
            tokens: record.tokens,
        });
        Ok(())
    }
}

/// Bits of codes, scales, zeros and group indices over the quantized weights.
fn bits_per_weight(variant: &Variant, checkpoint: &Checkpoint) -> f64 {
    let (mut bits, mut weights) = (0.0, 0.0);
    for (_, linear) in checkpoint.config().linears() {
        let [n, k] = linear.shape.map(|size| size as f64);
        let groups = variant.group_size.groups(k as usize) as f64;
        let code = f64::from(variant.bits.get());
        bits += n * k * code + groups * n * (16.0 + code) + 32.0 * k;
        weights += n * k;
    }
    bits / weights
}
