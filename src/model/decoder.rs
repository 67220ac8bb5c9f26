//! Decodes one sequence token by token, with all layers in memory and cached keys and values.

use tch::Device;

use super::{KvCache, Layer, PackedLayer, Runner};
use crate::error::{Result, TorchContext};

/// Decodes one sequence. Packed weights stay packed: on the CPU in the memory map, on CUDA on the device.
pub struct Decoder<'a> {
    runner: &'a Runner<'a>,
    layers: Vec<(Layer<'a>, KvCache)>,
}

impl<'a> Decoder<'a> {
    /// Loads all layers, for up to `capacity` tokens. `packed` holds [`Runner::packed_layer`] of every layer.
    ///
    /// # Errors
    /// When a tensor is malformed or memory is exhausted.
    pub fn new(runner: &'a Runner<'a>, packed: &'a [PackedLayer<'a>], capacity: usize) -> Result<Self> {
        let layers = packed.iter().enumerate().map(|(layer, packed)| {
            let ready = runner.layer(layer, packed)?;
            let transformer = runner.transformer();
            if transformer.device() != Device::Cpu {
                transformer.release(layer); // it has been copied
            }
            Ok((ready, transformer.cache(layer, capacity)?))
        });
        Ok(Self { runner, layers: layers.collect::<Result<_>>()? })
    }

    /// Runs tokens, first the whole prompt, then one at a time; returns the logits `[vocab]` of the next token.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn advance(&mut self, ids: &[i64]) -> Result<Vec<f32>> {
        let transformer = self.runner.transformer();
        let mut hidden = transformer.embed(ids, ids.len())?;
        for (layer, cache) in &mut self.layers {
            hidden = transformer.forward(layer, &hidden, Some(cache))?;
        }
        let last = hidden.f_narrow(1, ids.len() as i64 - 1, 1).torch("take the last token")?;
        let logits = self.runner.logits(&self.runner.normalized(&last)?)?;
        let flat = logits.f_flatten(0, -1).torch("read logits")?;
        Vec::<f32>::try_from(&flat).torch("read logits")
    }
}
