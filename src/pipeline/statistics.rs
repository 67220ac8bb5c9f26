//! Calibration statistics of one group of linears: the Hessian of their inputs and the cross-covariance with the reference model's.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::phases::PhaseClock;
use crate::{
    architectures::GroupConfig,
    error::{Result, TorchContext},
    gptq::{CrossCovariance, Hessian},
    report::Phase,
};

/// Sums over the calibration tokens that reach a group of linears.
pub(super) struct CalibrationStatistics {
    hessian: Hessian,
    /// With the reference model's inputs, where that is run.
    cross_covariance: Option<CrossCovariance>,
    /// Whether the Hessian has the batch that the cross-covariance does not have yet.
    ahead: bool,
    /// The kind that inputs are multiplied in.
    kind: Kind,
}

impl CalibrationStatistics {
    /// Without tokens, for inputs of that width, which are multiplied in `kind`; with a cross-covariance for `weights`, which share
    /// them, if these are given.
    pub(super) fn new(width: usize, device: Device, weights: Option<&[&Tensor]>, kind: Kind) -> Result<Self> {
        let cross_covariance =
            weights.map(|weights| CrossCovariance::of_weights(weights, kind, device)).transpose()?;
        Ok(Self { hessian: Hessian::new(width, device)?, cross_covariance, ahead: false, kind })
    }

    /// Adds another device's sums over other tokens.
    pub(super) fn absorb(&mut self, other: Self) -> Result<()> {
        self.hessian.absorb(other.hessian)?;
        match (&mut self.cross_covariance, other.cross_covariance) {
            (Some(own), Some(other)) => own.absorb(other),
            _ => Ok(()),
        }
    }

    /// Adds a batch of inputs `[…, K]`, and the reference model's inputs of the same tokens. After an error it can be called again
    /// with the same batch: what was added of it is not added twice.
    pub(super) fn add(
        &mut self,
        inputs: &Tensor,
        reference: Option<&Tensor>,
        phases: &PhaseClock,
    ) -> Result<()> {
        if inputs.numel() == 0 {
            return Ok(()); // no token of the batch goes through this expert
        }
        let k = self.hessian.in_features() as f64;
        let tokens = inputs.numel() as f64 / k;
        if !self.ahead {
            phases.time(Phase::Hessian, tokens * k * k, || self.hessian.add(&in_kind(inputs, self.kind)?))?;
        }
        if let (Some(cross_covariance), Some(reference)) = (&mut self.cross_covariance, reference) {
            self.ahead = true;
            let operations = tokens * cross_covariance.operations();
            phases.time(Phase::CrossCovariance, operations, || cross_covariance.add(inputs, reference))?;
            self.ahead = false;
        }
        Ok(())
    }

    /// Keeps a batch instead of adding it; none if it has no tokens.
    pub(super) fn keep(&self, inputs: &Tensor, reference: Option<&Tensor>) -> Result<Option<Batch>> {
        let both = self.cross_covariance.as_ref().zip(reference);
        let difference = || both.map(|(sums, reference)| sums.difference(inputs, reference)).transpose();
        let keep = || Ok(Batch { inputs: in_kind(inputs, self.kind)?, difference: difference()? });
        (inputs.numel() > 0).then(keep).transpose()
    }

    /// Tokens of a batch that was kept.
    pub(super) fn tokens_of(&self, batch: &Batch) -> u64 {
        (batch.inputs.numel() / self.hessian.in_features()) as u64
    }

    /// All parts of the sums, each of which batches are added to by itself.
    pub(super) fn parts(&self) -> Vec<Part> {
        let kind = self.kind;
        let own = self.hessian.row_blocks(kind).into_iter().map(|rows| Part { of_hessian: true, rows });
        let others = self.cross_covariance.iter().flat_map(move |sums| sums.row_blocks(kind));
        own.chain(others.map(|rows| Part { of_hessian: false, rows })).collect()
    }

    /// A view of a part of the sums, fp32; of the Hessian only the triangle in whole blocks.
    pub(super) fn part(&self, part: &Part) -> Result<Tensor> {
        match (part.of_hessian, &self.cross_covariance) {
            (false, Some(sums)) => sums.row_block(&part.rows),
            _ => self.hessian.row_block(&part.rows),
        }
    }

    /// Adds batches to a part of the sums, which has the tokens of batches before if `begun`.
    pub(super) fn add_to_part(
        &mut self,
        part: &Part,
        batches: &[Batch],
        begun: bool,
        phases: &PhaseClock,
    ) -> Result<()> {
        let (k, rows) = (self.hessian.in_features() as f64, part.rows.end - part.rows.start);
        for (i, batch) in batches.iter().enumerate() {
            let (inputs, first) = (&batch.inputs, !begun && i == 0);
            let tokens = inputs.numel() as f64 / k;
            match (&batch.difference, &mut self.cross_covariance) {
                (Some(difference), Some(sums)) if !part.of_hessian => {
                    let operations = tokens * 2.0 * rows as f64 * k;
                    let add = || sums.add_to_block(difference, inputs, &part.rows, first);
                    phases.time(Phase::CrossCovariance, operations, add)?;
                }
                _ => {
                    let columns = (part.rows.start + part.rows.end) as f64 / 2.0;
                    let operations = tokens * 2.0 * rows as f64 * columns;
                    let add = || self.hessian.add_to_block(inputs, &part.rows, first);
                    phases.time(Phase::Hessian, operations, add)?;
                }
            }
        }
        Ok(())
    }

    /// Sets the number of tokens in sums that were added part by part.
    pub(super) fn count(&mut self, tokens: u64) {
        self.hessian.count(tokens);
        self.cross_covariance.iter_mut().for_each(|sums| sums.count(tokens));
    }

    /// Whether no batch was added in part.
    pub(super) fn is_between_batches(&self) -> bool {
        self.hessian.is_between_batches() && !self.ahead
    }

    /// The Hessian, not yet finished, and the cross-covariance.
    pub(super) fn into_parts(self) -> (Hessian, Option<CrossCovariance>) {
        (self.hessian, self.cross_covariance)
    }
}

fn in_kind(inputs: &Tensor, kind: Kind) -> Result<Tensor> {
    inputs.f_to_kind(kind).torch("convert activations")
}

/// A batch that is kept until the sums come to it.
pub(super) struct Batch {
    /// `[…, K]`.
    inputs: Tensor,
    /// Their factors in the cross-covariance.
    difference: Option<Tensor>,
}

/// Some rows of a Hessian or of a cross-covariance.
pub(super) struct Part {
    of_hessian: bool,
    rows: Range<i64>,
}

/// Calibration statistics of a stage on one worker, for each group of its linears: sums over its own batches. Batches are kept until
/// the sums over the earlier batches arrive.
#[derive(Default)]
pub(super) struct Captured {
    pub(super) sums: Vec<CalibrationStatistics>,
    pub(super) batches: Vec<Vec<Batch>>,
}

/// Fills up the Hessians of experts with fewer tokens than input features to that number of tokens, with the mean Hessian of all
/// experts. Returns each expert's own number of tokens, and `None` for other groups.
pub(super) fn blend_experts(
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
