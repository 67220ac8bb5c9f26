//! A layer's dense weights.

use tch::{Device, Kind, Tensor};

use crate::{
    checkpoint::{Checkpoint, LinearId, LinearKind},
    error::{Result, TorchContext},
    model::{Llama, Norms},
};

/// A layer's dense weights, read once for all variants and devices.
pub(super) struct Weights {
    pub(super) norms: Norms,
    /// In the order of [`LinearKind::ALL`], in the checkpoint's own kind.
    linears: Vec<(Tensor, Option<Tensor>)>,
}

impl Weights {
    /// Reads a layer into memory, page-locked for copies to `pinned_for`, and lets go of its part of the memory map.
    ///
    /// # Errors
    /// When a tensor is missing, malformed, not finite, or beyond fp16.
    pub(super) fn read(checkpoint: &Checkpoint, layer: usize, pinned_for: Option<Device>) -> Result<Self> {
        let llama = Llama::new(checkpoint, 1, Kind::Float, Device::Cpu)?;
        let source = llama.source_kind(LinearId { layer, kind: LinearKind::Q })?;
        if source != Kind::Half {
            for kind in LinearKind::ALL {
                llama.check_f16(LinearId { layer, kind })?;
            }
        }
        let pin = |tensor: Tensor| match pinned_for {
            Some(device) => tensor.f_pin_memory(device).torch("lock memory for copies"),
            None => Ok(tensor),
        };
        let mut linears = Vec::with_capacity(LinearKind::ALL.len());
        for kind in LinearKind::ALL {
            let (weight, bias) = llama.weight(LinearId { layer, kind }, source)?;
            linears.push((pin(weight)?, bias));
        }
        let weights = Self { norms: llama.norms(layer)?, linears };
        checkpoint.release_layer(layer);
        Ok(weights)
    }

    /// On a device. Copies from page-locked memory are not waited for.
    ///
    /// # Errors
    /// When the device's memory ends.
    pub(super) fn on(&self, device: Device) -> Result<Self> {
        let on = |tensor: &Tensor| match device {
            Device::Cpu => Ok(tensor.shallow_clone()),
            _ => tensor.f_to_device_(device, tensor.kind(), true, false).torch("copy weights to the device"),
        };
        let norms = Norms { input: on(&self.norms.input)?, post_attention: on(&self.norms.post_attention)? };
        let linears = self.linears.iter().map(|(weight, bias)| {
            let bias = bias.as_ref().map(on).transpose()?;
            Ok((on(weight)?, bias))
        });
        Ok(Self { norms, linears: linears.collect::<Result<_>>()? })
    }

    pub(super) fn of(&self, kind: LinearKind) -> &(Tensor, Option<Tensor>) {
        let position = LinearKind::ALL.iter().position(|&k| k == kind);
        &self.linears[position.expect("ALL holds every kind")]
    }
}
