//! Whole forward passes, dense or packed, one layer in memory at a time.

use tch::{Device, Kind, Tensor};

use super::{Dense, Linear, Llama};
use crate::{
    checkpoint::{Checkpoint, LinearId, LinearKind, QuantizationConfig, packed},
    error::{Result, TorchContext},
};

/// Tokens that go through a layer together.
const BATCH_TOKENS: usize = 2048;

/// A model that can be run from tokens to logits; fp32 on the CPU if it is packed.
pub struct Runner<'a> {
    checkpoint: &'a Checkpoint,
    llama: Llama<'a>,
    quantization: Option<QuantizationConfig>,
    norm: Tensor,
    head: Dense,
}

impl<'a> Runner<'a> {
    /// A checkpoint with dense weights.
    ///
    /// # Errors
    /// When it is a quantized one, or not whole.
    pub fn dense(checkpoint: &'a Checkpoint, seq_len: usize, kind: Kind, device: Device) -> Result<Self> {
        checkpoint.check()?;
        Self::new(checkpoint, seq_len, kind, device, None)
    }

    /// A GPTQ checkpoint, whatever tool wrote it.
    ///
    /// # Errors
    /// When it is not one, or not whole.
    pub fn quantized(checkpoint: &'a Checkpoint, seq_len: usize) -> Result<Self> {
        let quantization = QuantizationConfig::read(checkpoint)?;
        Self::new(checkpoint, seq_len, Kind::Float, Device::Cpu, Some(quantization))
    }

    fn new(
        checkpoint: &'a Checkpoint,
        seq_len: usize,
        kind: Kind,
        device: Device,
        quantization: Option<QuantizationConfig>,
    ) -> Result<Self> {
        let llama = Llama::new(checkpoint, seq_len, kind, device)?;
        let (norm, head) = llama.head()?;
        Ok(Self { checkpoint, llama, quantization, norm, head })
    }

    /// Token ids, `[W, seq_len]` flattened, → normalized last hidden states, batches of `[B, seq_len, hidden]`.
    /// `step` is called after each layer.
    ///
    /// # Errors
    /// When a tensor is malformed or memory ends.
    pub fn hidden_states(&self, ids: &[i64], seq_len: usize, mut step: impl FnMut()) -> Result<Vec<Tensor>> {
        let per_batch = (BATCH_TOKENS / seq_len).max(1) * seq_len;
        let mut batches: Vec<Tensor> =
            ids.chunks(per_batch).map(|ids| self.llama.embed(ids, seq_len)).collect::<Result<_>>()?;
        for layer in 0..self.llama.config().num_layers {
            self.forward_layer(layer, &mut batches)?;
            self.checkpoint.release_layer(layer);
            step();
        }
        batches.iter().map(|batch| self.llama.rms_norm(batch, &self.norm)).collect()
    }

    fn forward_layer(&self, layer: usize, batches: &mut [Tensor]) -> Result<()> {
        let Some(quantization) = &self.quantization else {
            let layer = self.llama.dense_layer(layer)?;
            return self.forward_batches(&layer, batches);
        };
        let tensors =
            LinearKind::ALL.map(|kind| packed(self.checkpoint, LinearId { layer, kind }, quantization));
        let tensors = tensors.into_iter().collect::<Result<Vec<_>>>()?;
        self.forward_batches(&self.llama.packed_layer(layer, &tensors)?, batches)
    }

    fn forward_batches(&self, layer: &super::Layer<'_>, batches: &mut [Tensor]) -> Result<()> {
        for batch in batches {
            *batch = self.llama.forward(layer, batch)?;
        }
        Ok(())
    }

    /// Normalized hidden states `[…, hidden]` → logits `[…, vocab]` fp32.
    ///
    /// # Errors
    /// When memory ends.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head.forward(hidden)?.f_to_kind(Kind::Float).torch("convert logits")
    }
}
