//! The kinds that a run computes in.

use tch::{Device, Kind};

use crate::{
    amx,
    checkpoint::Checkpoint,
    error::Result,
    machine::product_speed,
    model::{Compute, source_kind},
    plan::{ComputeDtype, Plan},
    variant::Output,
};

/// Bits from which rounding to bf16 in forward passes is as large as what asymmetric calibration corrects: the difference of the
/// quantized model's activations to the reference model's.
const EXACT_FROM_BITS: u32 = 8;

/// Kinds of forward passes and statistics. They depend on the output alone, so that its bytes do not depend on others of the run.
#[derive(Debug, Clone, Copy)]
pub(super) struct ComputeKinds {
    /// Of weights and activations in forward passes; and for all outputs the kind that activations are multiplied in, for Hessians and
    /// cross-covariances.
    pub(super) usual: Kind,
    /// Of forward passes for outputs of many bits.
    exact: Kind,
}

impl ComputeKinds {
    pub(super) fn of(plan: &Plan, checkpoint: &Checkpoint, device: Device) -> Result<Self> {
        let auto = match device {
            Device::Cpu if amx::has_bf16_products() => Kind::BFloat16,
            Device::Cpu => Kind::Float,
            _ => Compute::half_of(source_kind(checkpoint)?),
        };
        let usual = match plan.compute_dtype {
            ComputeDtype::Auto => auto,
            ComputeDtype::Fp32 => Kind::Float,
            ComputeDtype::Bf16 => Kind::BFloat16,
            ComputeDtype::Fp16 => Kind::Half,
        };
        let asymmetric = plan.accuracy(checkpoint.config()).runs_reference();
        let exact = plan.compute_dtype == ComputeDtype::Auto && device == Device::Cpu && asymmetric;
        Ok(Self { usual, exact: if exact { Kind::Float } else { usual } })
    }

    /// Of the products that gradients are taken through. fp16 has not the range for gradients.
    pub(super) fn of_gradients(self) -> Kind {
        if self.usual == Kind::Float { Kind::Float } else { Kind::BFloat16 }
    }

    /// One kind for all.
    #[cfg(test)]
    pub(super) fn all(kind: Kind) -> Self {
        Self { usual: kind, exact: kind }
    }

    /// Of weights and activations in forward passes for an output.
    pub(super) fn of_output(self, output: &Output) -> Kind {
        if output.bits() >= EXACT_FROM_BITS { self.exact } else { self.usual }
    }

    /// [`ComputeKinds::of_output`] of some outputs, each kind once. Each has a reference model of its own, where that is run.
    pub(super) fn of_outputs(self, outputs: &[Output]) -> Vec<Kind> {
        let mut kinds = Vec::new();
        for output in outputs {
            let kind = self.of_output(output);
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        kinds
    }

    /// The kind of each activation stream for some outputs: those that are solved with, one for all with shared Hessians, then those
    /// of the reference model, one for each kind, if it is run beside them.
    pub(super) fn of_streams(self, outputs: &[Output], shared_hessian: bool, reference: bool) -> Vec<Kind> {
        let solved = if shared_hessian { &outputs[..1] } else { outputs };
        let mut kinds: Vec<Kind> = solved.iter().map(|output| self.of_output(output)).collect();
        if reference {
            kinds.extend(self.of_outputs(outputs));
        }
        kinds
    }

    /// What the user should know of the kinds of these outputs.
    pub(super) fn note(self, outputs: &[Output]) -> Option<&'static str> {
        let slower = self.exact != self.usual && self.of_outputs(outputs).contains(&self.exact);
        slower.then_some(
            "8 bits: forward passes in fp32, because bf16 is too coarse to calibrate them asymmetrically",
        )
    }

    /// Operations a second of large products on the CPU: in the usual kind, and in fp32.
    pub(super) fn product_speeds(self) -> Result<[f64; 2]> {
        let fp32 = product_speed(Kind::Float)?;
        Ok([if self.usual == Kind::Float { fp32 } else { product_speed(self.usual)? }, fp32])
    }
}
