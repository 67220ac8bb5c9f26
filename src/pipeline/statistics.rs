//! Calibration statistics of one group of linears: the Hessian of their inputs and the cross-covariance with the reference model's.

use tch::{Device, Kind, Tensor};

use super::phases::PhaseClock;
use crate::{
    architectures::GroupConfig,
    error::Result,
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
}

impl CalibrationStatistics {
    /// Without tokens, for inputs of that width; with a cross-covariance for `weights`, which share them, if these are given.
    pub(super) fn new(width: usize, device: Device, weights: Option<&[&Tensor]>, kind: Kind) -> Result<Self> {
        let cross_covariance =
            weights.map(|weights| CrossCovariance::of_weights(weights, kind, device)).transpose()?;
        Ok(Self { hessian: Hessian::new(width, device)?, cross_covariance, ahead: false })
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
            phases.time(Phase::Hessian, tokens * k * k, || self.hessian.add(inputs))?;
        }
        if let (Some(cross_covariance), Some(reference)) = (&mut self.cross_covariance, reference) {
            self.ahead = true;
            let operations = tokens * cross_covariance.operations();
            phases.time(Phase::CrossCovariance, operations, || cross_covariance.add(inputs, reference))?;
            self.ahead = false;
        }
        Ok(())
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
