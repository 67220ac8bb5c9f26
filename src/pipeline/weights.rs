//! A layer's dense weights.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use crate::{
    checkpoint::Checkpoint,
    cuda::{HostMemory, HostPool},
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
    /// Page-locked memory of the weights; empty without it.
    memory: Vec<Arc<HostMemory>>,
}

impl Weights {
    /// Reads a layer into memory, with its weights in `page_locked` memory if there is a pool and the system locks enough, and releases
    /// its part of the memory map.
    ///
    /// # Errors
    /// When a tensor is missing, malformed, not finite, or beyond fp16.
    pub(super) fn read(
        checkpoint: &Checkpoint,
        layer: usize,
        page_locked: Option<&Arc<HostPool>>,
    ) -> Result<Self> {
        let transformer = Transformer::new(checkpoint, 1, Kind::Float, Device::Cpu)?;
        let config = checkpoint.config();
        let source = transformer.source_kind(&config.linear_id(layer, 0))?;
        if source != Kind::Half {
            for (id, _) in config.layer_linears(layer) {
                transformer.check_f16(&id)?;
            }
        }
        let mut memory = Vec::new();
        let read = |position: usize| {
            let plain = || transformer.weight(layer, position, source);
            let Some(pool) = page_locked else { return plain() };
            let locked = transformer.weight_into(layer, position, source, |size| {
                let locked = pool.empty(size, source)?;
                memory.push(locked.memory());
                Ok(locked.tensor().shallow_clone())
            });
            match locked {
                Err(error) if error.is_out_of_page_locked_memory() => plain(),
                locked => locked,
            }
        };
        let linears = (0..config.layers[layer].linears.len()).map(read).collect::<Result<_>>()?;
        let weights = Self { layer, parts: transformer.parts(layer)?, linears, memory };
        checkpoint.release_layer(layer);
        Ok(weights)
    }

    /// A copy on a device. Copies from page-locked memory are asynchronous; the copy keeps that memory too.
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
        Ok(Self { layer: self.layer, parts: self.parts.try_map(&on)?, linears, memory: self.memory.clone() })
    }

    /// Weight and bias of the linear at a position in the layer.
    pub(super) fn of(&self, position: usize) -> &(Tensor, Option<Tensor>) {
        &self.linears[position]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cuda_host::driver::with_driver, pipeline::tests::model};

    #[test]
    fn weights_that_the_system_locks_no_memory_for_are_read_all_the_same() {
        with_driver(
            "pipeline::weights::tests::weights_that_the_system_locks_no_memory_for_are_read_all_the_same",
            |driver| {
                driver.add_device("NVIDIA H200", (9, 0), 132, 227 << 10);
                let pool = HostPool::for_libtorch(&[Device::Cuda(0)]).unwrap();
                let checkpoint = model("llama3-gqa-rope");
                let read = || Weights::read(&checkpoint, 0, Some(&pool)).unwrap();
                let locked = read();
                driver.limit_page_locked(0);
                let plain = read();
                assert!(!locked.memory.is_empty() && plain.memory.is_empty());
                for (locked, plain) in locked.linears.iter().zip(&plain.linears) {
                    assert_eq!(locked.0, plain.0);
                }
            },
        );
    }
}
