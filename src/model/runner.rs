//! Whole forward passes, dense or packed, one layer in memory at a time.

use tch::{Kind, Tensor};

use super::{Compute, Dense, Layer, Linear, Norm, Transformer, packed::PackedLinears};
use crate::{
    architectures::{LinearId, ModelConfig},
    checkpoint::{Checkpoint, PackedTensors, QuantizationConfig, packed},
    error::{Result, TorchContext},
};

/// Tokens that go through a layer together.
const BATCH_TOKENS: usize = 2048;

/// A model that can be run from tokens to logits.
pub struct Runner<'a> {
    checkpoint: &'a Checkpoint,
    transformer: Transformer<'a>,
    quantization: Option<(QuantizationConfig, PackedLinears)>,
    norm: Norm,
    pub(super) head: Dense,
    /// The kind of dense linears.
    products: Kind,
}

/// The packed tensors of a layer's linears in their order; `None` where one is dense.
pub type PackedLayer<'a> = Vec<Option<PackedTensors<'a>>>;

impl<'a> Runner<'a> {
    /// A checkpoint with dense weights.
    ///
    /// # Errors
    /// When it is quantized or incomplete.
    pub fn dense(checkpoint: &'a Checkpoint, seq_len: usize, compute: Compute) -> Result<Self> {
        checkpoint.check()?;
        Self::new(checkpoint, seq_len, compute, compute.kind, None)
    }

    /// As [`Runner::dense`] in fp32, but the products of linears are of kind `compute.kind`.
    ///
    /// # Errors
    /// As for [`Runner::dense`].
    pub fn for_gradients(checkpoint: &'a Checkpoint, seq_len: usize, compute: Compute) -> Result<Self> {
        checkpoint.check()?;
        Self::new(checkpoint, seq_len, Compute { kind: Kind::Float, ..compute }, compute.kind, None)
    }

    /// A GPTQ checkpoint written by any tool, or a GGUF file, whose linears become dense.
    ///
    /// # Errors
    /// When it is no GPTQ checkpoint or incomplete, or its kernels do not run on this device in this kind.
    pub fn quantized(checkpoint: &'a Checkpoint, seq_len: usize, compute: Compute) -> Result<Self> {
        if checkpoint.gguf().is_some() {
            return Self::new(checkpoint, seq_len, compute, compute.kind, None);
        }
        let quantization = QuantizationConfig::read(checkpoint)?;
        checkpoint.check_undeclared()?;
        let linears = PackedLinears::new(compute)?;
        Self::new(checkpoint, seq_len, compute, compute.kind, Some((quantization, linears)))
    }

    /// A quantized or a dense checkpoint, by [`Checkpoint::quantization_mark`].
    ///
    /// # Errors
    /// As for [`Runner::quantized`] and [`Runner::dense`].
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
        products: Kind,
        quantization: Option<(QuantizationConfig, PackedLinears)>,
    ) -> Result<Self> {
        let transformer = Transformer::new(checkpoint, seq_len, compute.kind, compute.device)?;
        let (norm, head) = transformer.head(products)?;
        Ok(Self { checkpoint, transformer, quantization, norm, head, products })
    }

    /// Notes for the user on how layers run; each note is returned once.
    pub fn notes(&self) -> Vec<String> {
        self.quantization.as_ref().map_or_else(Vec::new, |(_, linears)| linears.notes())
    }

    /// Windows that go through a layer together.
    pub fn windows_per_batch(seq_len: usize) -> usize {
        (BATCH_TOKENS / seq_len).max(1)
    }

    /// Token ids, `[W, seq_len]` flattened, → normalized last hidden states, batches of `[B, seq_len, hidden]`.
    /// `step` is called after each layer.
    ///
    /// # Errors
    /// When a tensor is malformed or memory is exhausted.
    pub fn hidden_states(&self, ids: &[i64], seq_len: usize, mut step: impl FnMut()) -> Result<Vec<Tensor>> {
        let per_batch = Self::windows_per_batch(seq_len) * seq_len;
        let mut batches: Vec<Tensor> =
            ids.chunks(per_batch).map(|ids| self.transformer.embed(ids, seq_len)).collect::<Result<_>>()?;
        for layer in 0..self.transformer.config().num_layers() {
            let packed = self.packed_layer(layer)?;
            let ready = self.layer(layer, &packed)?;
            for batch in &mut batches {
                *batch = self.transformer.forward(&ready, batch, None)?;
            }
            self.checkpoint.release_layer(layer);
            step();
        }
        batches.iter().map(|batch| self.normalized(batch)).collect()
    }

    /// The packed tensors of a layer, which [`Runner::layer`] borrows.
    ///
    /// # Errors
    /// When a tensor is malformed.
    pub fn packed_layer(&self, layer: usize) -> Result<PackedLayer<'a>> {
        let of = |(id, linear)| match &self.quantization {
            Some((quantization, _)) => packed(self.checkpoint, &id, linear, quantization),
            None => Ok(None),
        };
        self.transformer.config().layer_linears(layer).map(of).collect()
    }

    /// A layer that is ready to run. On CUDA it holds copies of the packed tensors, which can then be dropped.
    ///
    /// # Errors
    /// When a tensor is malformed or memory is exhausted.
    pub fn layer<'t>(&self, layer: usize, packed: &'t PackedLayer<'_>) -> Result<Layer<'t>> {
        self.layer_of(layer, packed, &mut |_, linear| linear)
    }

    /// As [`Runner::layer`], with each linear replaced by the result of `wrap`.
    ///
    /// # Errors
    /// As for [`Runner::layer`].
    pub fn layer_of<'t>(
        &self,
        layer: usize,
        packed: &'t PackedLayer<'_>,
        wrap: &mut dyn FnMut(LinearId, Box<dyn Linear + 't>) -> Box<dyn Linear + 't>,
    ) -> Result<Layer<'t>> {
        let transformer = &self.transformer;
        let mut linears = Vec::with_capacity(packed.len());
        for (position, packed) in packed.iter().enumerate() {
            let id = transformer.config().linear_id(layer, position);
            let linear = match (packed, &self.quantization) {
                (Some(packed), Some((_, linears))) => linears.linear(&id, packed)?,
                _ => {
                    let (weight, bias) = transformer.weight(layer, position, self.products)?;
                    Box::new(Dense::new(weight, bias))
                }
            };
            linears.push(wrap(id, linear));
        }
        Ok(Layer::new(layer, transformer.parts(layer)?, linears))
    }

    /// The model without its layers.
    pub fn transformer(&self) -> &Transformer<'a> {
        &self.transformer
    }

    /// The last norm, applied to hidden states.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn normalized(&self, hidden: &Tensor) -> Result<Tensor> {
        self.norm.apply(hidden, self.transformer.kind())
    }

    /// Normalized hidden states `[…, hidden]` → logits `[…, vocab]` fp32.
    ///
    /// # Errors
    /// When memory is exhausted.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = self.head.forward(hidden)?.f_to_kind(Kind::Float).torch("convert logits")?;
        shaped(self.transformer.config(), logits)
    }
}

/// Applies the model's multiplier and softcap to logits.
pub(super) fn shaped(config: &ModelConfig, logits: Tensor) -> Result<Tensor> {
    let multiplied = match config.logits_multiplier {
        1.0 => logits,
        by => logits.f_mul_scalar(by).torch("multiply logits")?,
    };
    match config.logits_softcap {
        None => Ok(multiplied),
        Some(cap) => {
            let capped = multiplied.f_div_scalar(cap).and_then(|x| x.f_tanh()?.f_mul_scalar(cap));
            capped.torch("cap logits")
        }
    }
}
