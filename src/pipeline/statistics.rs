//! Calibration statistics of one group of linears: the Hessian of their inputs and the cross-covariance with the reference model's.

use tch::{Device, Tensor};

use crate::{
    error::Result,
    gptq::{CrossCovariance, Hessian},
};

/// Sums over the calibration tokens that reach a group of linears.
pub(super) struct CalibrationStatistics {
    pub(super) hessian: Hessian,
    /// With the reference model's inputs, where that is run.
    pub(super) cross_covariance: Option<CrossCovariance>,
}

impl CalibrationStatistics {
    /// Without tokens, for inputs of that width.
    pub(super) fn new(width: usize, device: Device, reference: bool) -> Result<Self> {
        let cross_covariance = reference.then(|| CrossCovariance::new(width, device)).transpose()?;
        Ok(Self { hessian: Hessian::new(width, device)?, cross_covariance })
    }

    /// Adds another device's sums over other tokens.
    pub(super) fn absorb(&mut self, other: Self) -> Result<()> {
        self.hessian.absorb(other.hessian)?;
        match (&mut self.cross_covariance, other.cross_covariance) {
            (Some(own), Some(other)) => own.absorb(other),
            _ => Ok(()),
        }
    }

    /// Adds a batch of inputs `[…, K]`, and what the reference model has in their place.
    pub(super) fn add(&mut self, inputs: &Tensor, reference: Option<&Tensor>) -> Result<()> {
        if inputs.numel() == 0 {
            return Ok(()); // no token of the batch goes through this expert
        }
        self.hessian.add(inputs)?;
        match (&mut self.cross_covariance, reference) {
            (Some(cross_covariance), Some(reference)) => cross_covariance.add(inputs, reference),
            _ => Ok(()),
        }
    }
}
