//! Whole forward passes, dense or packed, one layer in memory at a time.

use tch::{Kind, Tensor};

use super::{Compute, Dense, Layer, Linear, Llama, packed::PackedLinears};
use crate::{
    checkpoint::{Checkpoint, LinearId, LinearKind, PackedTensors, QuantizationConfig, packed},
    error::{Result, TorchContext},
};

/// Tokens that go through a layer together.
const BATCH_TOKENS: usize = 2048;

/// A model that can be run from tokens to logits.
pub struct Runner<'a> {
    checkpoint: &'a Checkpoint,
    llama: Llama<'a>,
    quantization: Option<(QuantizationConfig, PackedLinears)>,
    norm: Tensor,
    pub(super) head: Dense,
}

/// The packed tensors of a layer in the order of [`LinearKind::ALL`]; `None` where one is dense.
pub type PackedLayer<'a> = [Option<PackedTensors<'a>>; LinearKind::ALL.len()];

impl<'a> Runner<'a> {
    /// A checkpoint with dense weights.
    ///
    /// # Errors
    /// When it is a quantized one, or not whole.
    pub fn dense(checkpoint: &'a Checkpoint, seq_len: usize, compute: Compute) -> Result<Self> {
        checkpoint.check()?;
        Self::new(checkpoint, seq_len, compute, None)
    }

    /// A GPTQ checkpoint, whatever tool wrote it.
    ///
    /// # Errors
    /// When it is not one, or not whole, or its kernels do not run on this device in this kind.
    pub fn quantized(checkpoint: &'a Checkpoint, seq_len: usize, compute: Compute) -> Result<Self> {
        let quantization = QuantizationConfig::read(checkpoint)?;
        Self::new(checkpoint, seq_len, compute, Some((quantization, PackedLinears::new(compute)?)))
    }

    /// A checkpoint of either sort: quantized if anything shows that it is, else dense.
    ///
    /// # Errors
    /// As for the two.
    pub fn open(checkpoint: &'a Checkpoint, seq_len: usize, compute: Compute) -> Result<Self> {
        match checkpoint.quantization_mark() {
            Some(_) => Self::quantized(checkpoint, seq_len, compute),
            None => Self::dense(checkpoint, seq_len, compute),
        }
    }

    fn new(
        checkpoint: &'a Checkpoint,
        seq_len: usize,
        compute: Compute,
        quantization: Option<(QuantizationConfig, PackedLinears)>,
    ) -> Result<Self> {
        let llama = Llama::new(checkpoint, seq_len, compute.kind, compute.device)?;
        let (norm, head) = llama.head()?;
        Ok(Self { checkpoint, llama, quantization, norm, head })
    }

    /// What a user should know of how the layers run that were loaded since this was asked last.
    pub fn notes(&self) -> Vec<String> {
        self.quantization.as_ref().map_or_else(Vec::new, |(_, linears)| linears.notes())
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
        batches.iter().map(|batch| self.normalized(batch)).collect()
    }

    fn forward_layer(&self, layer: usize, batches: &mut [Tensor]) -> Result<()> {
        let packed = self.packed_layer(layer)?;
        self.forward_batches(&self.layer(layer, &packed)?, batches)
    }

    /// What [`Runner::layer`] borrows.
    ///
    /// # Errors
    /// When a tensor is malformed.
    pub fn packed_layer(&self, layer: usize) -> Result<PackedLayer<'a>> {
        let mut tensors = LinearKind::ALL.map(|_| None);
        if let Some((quantization, _)) = &self.quantization {
            for (tensor, kind) in tensors.iter_mut().zip(LinearKind::ALL) {
                *tensor = packed(self.checkpoint, LinearId { layer, kind }, quantization)?;
            }
        }
        Ok(tensors)
    }

    /// A layer that is ready to run. On CUDA the packed tensors have been copied and are not needed any more.
    ///
    /// # Errors
    /// When a tensor is malformed or memory ends.
    pub fn layer<'t>(&self, layer: usize, packed: &'t PackedLayer<'_>) -> Result<Layer<'t>> {
        self.layer_of(layer, packed, &mut |_, linear| linear)
    }

    /// The same, with each linear as `wrap` makes it.
    ///
    /// # Errors
    /// As for [`Runner::layer`].
    pub fn layer_of<'t>(
        &self,
        layer: usize,
        packed: &'t PackedLayer<'_>,
        wrap: &mut dyn FnMut(LinearId, Box<dyn Linear + 't>) -> Box<dyn Linear + 't>,
    ) -> Result<Layer<'t>> {
        let mut linears = Vec::with_capacity(LinearKind::ALL.len());
        for (kind, packed) in LinearKind::ALL.into_iter().zip(packed) {
            let id = LinearId { layer, kind };
            let linear = match (packed, &self.quantization) {
                (Some(packed), Some((_, linears))) => linears.linear(id, packed)?,
                _ => {
                    let (weight, bias) = self.llama.weight(id, self.llama.kind())?;
                    Box::new(Dense::new(weight, bias))
                }
            };
            linears.push(wrap(id, linear));
        }
        let linears = linears.try_into().unwrap_or_else(|_| unreachable!("one for each kind"));
        self.llama.layer(layer, linears)
    }

    /// The model without its layers.
    pub fn llama(&self) -> &Llama<'a> {
        &self.llama
    }

    /// The last norm, applied to hidden states.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn normalized(&self, hidden: &Tensor) -> Result<Tensor> {
        self.llama.rms_norm(hidden, &self.norm)
    }

    fn forward_batches(&self, layer: &Layer<'_>, batches: &mut [Tensor]) -> Result<()> {
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
