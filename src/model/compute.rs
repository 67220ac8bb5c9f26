//! Device and precision of a forward pass.

use std::fmt;

use tch::{Device, Kind};

use super::transformer::embedding_kind;
use crate::{
    checkpoint::Checkpoint,
    error::{Error, Result},
    plan::ComputeDtype,
};

/// Device, and kind of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Compute {
    /// For libtorch.
    pub device: Device,
    /// fp32 on the CPU.
    pub kind: Kind,
}

impl Compute {
    /// The CPU, in fp32.
    pub const CPU: Self = Self { device: Device::Cpu, kind: Kind::Float };

    /// The kind of computation for a checkpoint on a device. [`ComputeDtype::Auto`] is fp32 on the CPU; on CUDA it is fp16 if
    /// the checkpoint's embedding is fp16, else bf16.
    ///
    /// # Errors
    /// When the device's kernels do not compute in `dtype`, or the embedding is missing.
    pub fn new(device: Device, dtype: ComputeDtype, checkpoint: &Checkpoint) -> Result<Self> {
        let kind = match (device, dtype) {
            (Device::Cpu, ComputeDtype::Auto | ComputeDtype::Fp32) => Kind::Float,
            (Device::Cpu, _) => return Err(refused("fp32 on the CPU", dtype)),
            (_, ComputeDtype::Fp16) => Kind::Half,
            (_, ComputeDtype::Bf16) => Kind::BFloat16,
            (_, ComputeDtype::Auto) => Self::half_of(embedding_kind(checkpoint)?),
            (_, ComputeDtype::Fp32) => return Err(refused("fp16 or bf16 on CUDA", dtype)),
        };
        Ok(Self { device, kind })
    }

    /// The 16-bit kind that keeps most of values of kind `source`: fp16 for fp16, else bf16, which has the range of fp32.
    pub fn half_of(source: Kind) -> Kind {
        if source == Kind::Half { Kind::Half } else { Kind::BFloat16 }
    }
}

impl fmt::Display for Compute {
    /// `fp16 on cuda:0`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let device = match self.device {
            Device::Cuda(index) => format!("cuda:{index}"),
            _ => "the CPU".to_owned(),
        };
        write!(f, "{} on {device}", kind_name(self.kind))
    }
}

/// The name of a kind in options and messages.
pub fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bf16",
        Kind::Half => "fp16",
        _ => "fp32",
    }
}

fn refused(expected: &str, found: ComputeDtype) -> Error {
    Error::Value { what: "compute-dtype".into(), expected: expected.into(), found: found.to_string() }
}
