//! A layer's dense weights.

use tch::{Device, Kind, Tensor};

use crate::{
    checkpoint::Checkpoint,
    error::{Result, TorchContext},
    model::{DenseParts, Transformer},
};

/// A layer's dense weights, read once for all variants and devices.
pub(super) struct Weights {
    /// Which layer, from 0.
    pub(super) layer: usize,
    pub(super) parts: DenseParts,
    /// Weight `[N, K]` and bias `[N]` of each of the layer's linears, in the checkpoint's own kind.
    linears: Vec<(Tensor, Option<Tensor>)>,
}

impl Weights {
    /// Reads a layer into memory, page-locked for copies to `pinned_for`, and releases its part of the memory map.
    ///
    /// # Errors
    /// When a tensor is missing, malformed, not finite, or beyond fp16.
    pub(super) fn read(checkpoint: &Checkpoint, layer: usize, pinned_for: Option<Device>) -> Result<Self> {
        let transformer = Transformer::new(checkpoint, 1, Kind::Float, Device::Cpu)?;
        let config = checkpoint.config();
        let source = transformer.source_kind(&config.linear_id(layer, 0))?;
        if source != Kind::Half {
            for (id, _) in config.layer_linears(layer) {
                transformer.check_f16(&id)?;
            }
        }
        let pin = |tensor: Tensor| match pinned_for {
            Some(device) => tensor.f_pin_memory(device).torch("lock memory for copies"),
            None => Ok(tensor),
        };
        let read = |position: usize| {
            let (weight, bias) = transformer.weight(layer, position, source)?;
            Ok((pin(weight)?, bias))
        };
        let linears = (0..config.layers[layer].linears.len()).map(read).collect::<Result<_>>()?;
        let weights = Self { layer, parts: transformer.parts(layer)?, linears };
        checkpoint.release_layer(layer);
        Ok(weights)
    }

    /// A copy on a device. Copies from page-locked memory are asynchronous.
    pub(super) fn on(&self, device: Device) -> Result<Self> {
        let on = |tensor: &Tensor| match device {
            Device::Cpu => Ok(tensor.shallow_clone()),
            _ => tensor.f_to_device_(device, tensor.kind(), true, false).torch("copy weights to the device"),
        };
        let linears = self.linears.iter().map(|(weight, bias)| {
            let bias = bias.as_ref().map(on).transpose()?;
            Ok((on(weight)?, bias))
        });
        let linears = linears.collect::<Result<_>>()?;
        Ok(Self { layer: self.layer, parts: self.parts.try_map(&on)?, linears })
    }

    /// Weight and bias of the linear at a position in the layer.
    pub(super) fn of(&self, position: usize) -> &(Tensor, Option<Tensor>) {
        &self.linears[position]
    }
}
