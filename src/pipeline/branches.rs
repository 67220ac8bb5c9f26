//! All branches of a run while they grow.

use std::{path::Path, time::Instant};

use super::team::{Record, Sink};
use crate::{
    checkpoint::{Checkpoint, LinearId},
    emit::{BranchWriter, Provenance},
    error::Result,
    gptq::solver::Solved,
    plan::Plan,
    progress::Progress,
    report::{BranchReport, LinearReport},
    variant::Variant,
    verify,
};

/// All branches while they grow.
pub(super) struct Branches {
    writers: Vec<BranchWriter>,
    reports: Vec<BranchReport>,
    warnings: Vec<String>,
}

impl Branches {
    pub(super) fn create(plan: &Plan, checkpoint: &Checkpoint, out: &Path) -> Result<Self> {
        let create = |v: &Variant| BranchWriter::create(out, *v, checkpoint.config(), plan.max_shard_size);
        let report = |v: &Variant| BranchReport {
            branch: v.branch(),
            variant: *v,
            bytes: 0,
            bits_per_weight: bits_per_weight(v, checkpoint),
            seconds: 0.0,
            linears: Vec::new(),
        };
        Ok(Self {
            writers: plan.variants.iter().map(create).collect::<Result<_>>()?,
            reports: plan.variants.iter().map(report).collect(),
            warnings: Vec::new(),
        })
    }

    pub(super) fn warnings(&self) -> Vec<String> {
        let raised = self.reports.iter().map(|r| (r, r.linears.iter().filter(|l| l.damp_raised > 0).count()));
        let raised = raised
            .filter(|(_, count)| *count > 0)
            .map(|(r, count)| format!("{}: damping was raised for {count} linears", r.branch));
        let rounded = self.reports.iter().map(|r| (r, r.linears.iter().filter(|l| l.fallback.is_some()).count()));
        let rounded = rounded
            .filter(|(_, count)| *count > 0)
            .map(|(r, count)| format!("{}: {count} linears were rounded to nearest, not solved", r.branch));
        self.warnings.iter().cloned().chain(raised).chain(rounded).collect()
    }

    /// Seals, checks and publishes the branches. They appear together: a failure in the last leaves none.
    pub(super) fn finish(
        mut self,
        checkpoint: &Checkpoint,
        provenance: &Provenance,
        progress: &dyn Progress,
    ) -> Result<Vec<BranchReport>> {
        progress.begin("writing and checking", self.writers.len() as u64);
        for writer in &mut self.writers {
            let folder = writer.seal(checkpoint, provenance)?;
            verify::written(folder)?;
            progress.advance(1);
        }
        for (writer, report) in self.writers.into_iter().zip(&mut self.reports) {
            report.bytes = writer.publish()?.1;
        }
        Ok(self.reports)
    }
}

impl Sink for Branches {
    fn warn(&mut self, text: String) {
        self.warnings.push(text);
    }

    fn take(&mut self, variant: usize, id: LinearId, linear: &Solved, record: Record) -> Result<()> {
        let begun = Instant::now();
        self.writers[variant].write_linear(id, linear)?;
        let report = &mut self.reports[variant];
        report.seconds += record.seconds + begun.elapsed().as_secs_f64();
        report.linears.push(LinearReport {
            name: id.to_string(),
            relative_error: record.relative_error,
            damp: record.facts.damp,
            damp_raised: record.facts.damp_raised,
            dead_columns: record.facts.dead_columns,
            seconds: record.seconds,
            uncompensated_features: record.uncompensated,
            fallback: record.fallback,
        });
        Ok(())
    }
}

/// Bits of codes, scales, zeros and group indices over the quantized weights.
fn bits_per_weight(variant: &Variant, checkpoint: &Checkpoint) -> f64 {
    let (mut bits, mut weights) = (0.0, 0.0);
    for id in LinearId::all(checkpoint.config()) {
        let [n, k] = id.kind.shape(checkpoint.config()).map(|size| size as f64);
        let groups = variant.group_size.groups(k as usize) as f64;
        let code = f64::from(variant.bits.get());
        bits += n * k * code + groups * n * (16.0 + code) + 32.0 * k;
        weights += n * k;
    }
    bits / weights
}
