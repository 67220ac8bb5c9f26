//! A Llama model, layer by layer and stage by stage.

use tch::{Device, Kind, Tensor};

use super::{Dense, KvCache, Linear, attention::Attention};
use crate::{
    checkpoint::{
        Checkpoint, Dtype, EMBED_TOKENS, FINAL_NORM, LM_HEAD, LinearId, LinearKind, LlamaConfig, TensorView,
        input_layernorm, post_attention_layernorm,
    },
    error::{Error, Result, TorchContext},
};

/// Linears of a layer that share their input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// q, k and v.
    AttentionInput,
    /// o.
    AttentionOutput,
    /// gate and up.
    MlpInput,
    /// down.
    MlpOutput,
}

impl Stage {
    /// In the order of the forward pass.
    pub const ALL: [Self; 4] = [Self::AttentionInput, Self::AttentionOutput, Self::MlpInput, Self::MlpOutput];

    /// Its linears.
    pub fn linears(self) -> &'static [LinearKind] {
        match self {
            Self::AttentionInput => &[LinearKind::Q, LinearKind::K, LinearKind::V],
            Self::AttentionOutput => &[LinearKind::O],
            Self::MlpInput => &[LinearKind::Gate, LinearKind::Up],
            Self::MlpOutput => &[LinearKind::Down],
        }
    }

    /// For reports and errors.
    pub fn name(self) -> &'static str {
        match self {
            Self::AttentionInput => "q/k/v",
            Self::AttentionOutput => "o",
            Self::MlpInput => "gate/up",
            Self::MlpOutput => "down",
        }
    }
}

/// What does not depend on the layer: the config, the rotary table, kind and device of the computation.
#[derive(Debug)]
pub struct Llama<'a> {
    checkpoint: &'a Checkpoint,
    attention: Attention,
    kind: Kind,
    device: Device,
}

/// The RMSNorm weights of one layer, fp32.
#[derive(Debug)]
pub struct Norms {
    /// Before attention.
    pub input: Tensor,
    /// Before the MLP.
    pub post_attention: Tensor,
}

impl Norms {
    /// The same tensors.
    pub fn shallow_clone(&self) -> Self {
        Self { input: self.input.shallow_clone(), post_attention: self.post_attention.shallow_clone() }
    }
}

/// A decoder layer that is ready to run.
pub struct Layer<'a> {
    pub(super) norms: Norms,
    /// In the order of [`LinearKind::ALL`].
    pub(super) linears: [Box<dyn Linear + 'a>; LinearKind::ALL.len()],
}

impl<'a> Layer<'a> {
    /// A layer of these linears, in the order of [`LinearKind::ALL`].
    pub fn new(norms: Norms, linears: [Box<dyn Linear + 'a>; LinearKind::ALL.len()]) -> Self {
        Self { norms, linears }
    }
}

impl<'a> Llama<'a> {
    /// Prepares forward passes over sequences of up to `seq_len` tokens.
    ///
    /// # Errors
    /// When the rotary table cannot be made.
    pub fn new(checkpoint: &'a Checkpoint, seq_len: usize, kind: Kind, device: Device) -> Result<Self> {
        let attention = Attention::new(checkpoint.config(), seq_len, device)?;
        Ok(Self { checkpoint, attention, kind, device })
    }

    /// The same, computing in another kind.
    ///
    /// # Errors
    /// When the rotary table cannot be made.
    pub fn in_kind(&self, seq_len: usize, kind: Kind) -> Result<Self> {
        Self::new(self.checkpoint, seq_len, kind, self.device)
    }

    /// The model's config.
    pub fn config(&self) -> &LlamaConfig {
        self.checkpoint.config()
    }

    /// Kind of weights and activations.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where it runs.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Token ids, `[B, S]` flattened, → hidden states `[B, S, hidden]`.
    ///
    /// # Errors
    /// When the embedding cannot be read.
    pub fn embed(&self, ids: &[i64], seq_len: usize) -> Result<Tensor> {
        let view = self.checkpoint.view(EMBED_TOKENS)?;
        let hidden = self.config().hidden_size;
        let row_bytes = view.bytes.len() / self.config().vocab_size;
        let mut rows = Vec::with_capacity(ids.len() * row_bytes);
        for &id in ids {
            rows.extend_from_slice(&view.bytes[id as usize * row_bytes..][..row_bytes]);
        }
        let size = [(ids.len() / seq_len) as i64, seq_len as i64, hidden as i64];
        let kind = tensor_kind(&view)?;
        let gathered = Tensor::f_from_data_size(&rows, &size, kind)
            .and_then(|t| t.f_to_device(self.device)?.f_to_kind(self.kind))
            .torch("embed tokens")?;
        let total = gathered.numel() as u64;
        let finite = gathered.f_isfinite().and_then(|t| i64::try_from(t.f_sum(Kind::Int64)?));
        let broken = total - finite.torch("check the embedding")? as u64;
        if broken > 0 {
            let place = format!("tensor `{EMBED_TOKENS}`");
            return Err(Error::NonFinite { place, count: broken, total, computed: false });
        }
        Ok(gathered)
    }

    /// The norms of a layer.
    ///
    /// # Errors
    /// When a tensor is missing, malformed or not finite.
    pub fn norms(&self, layer: usize) -> Result<Norms> {
        let norm =
            |name: &str| self.checkpoint.load(name, &[self.config().hidden_size], Kind::Float, self.device);
        Ok(Norms {
            input: norm(&input_layernorm(layer))?,
            post_attention: norm(&post_attention_layernorm(layer))?,
        })
    }

    /// The dense weight `[N, K]` and bias `[N]` of a linear.
    ///
    /// # Errors
    /// When a tensor is missing, malformed or not finite.
    pub fn weight(&self, id: LinearId, kind: Kind) -> Result<(Tensor, Option<Tensor>)> {
        let shape = id.kind.shape(self.config());
        let weight = self.checkpoint.load(&id.weight(), &shape, kind, self.device)?;
        let bias = match id.kind.has_bias(self.config()) {
            true => Some(self.checkpoint.load(&id.bias(), &shape[..1], kind, self.device)?),
            false => None,
        };
        Ok((weight, bias))
    }

    /// Refuses a linear's weight that fp16 cannot hold: whoever runs the quantized model computes with fp16.
    ///
    /// # Errors
    /// When the tensor is missing, not finite or beyond fp16.
    pub fn check_f16(&self, id: LinearId) -> Result<()> {
        self.checkpoint.check_f16(&id.weight())
    }

    /// The kind a linear's weight is stored in.
    ///
    /// # Errors
    /// When the tensor is missing or of a kind that is not read.
    pub fn source_kind(&self, id: LinearId) -> Result<Kind> {
        tensor_kind(&self.checkpoint.view(&id.weight())?)
    }

    /// Tells the system that a layer's part of the memory map is not needed any more.
    pub fn release(&self, layer: usize) {
        self.checkpoint.release_layer(layer);
    }

    /// A layer of these linears, in the order of [`LinearKind::ALL`].
    ///
    /// # Errors
    /// When a norm is missing, malformed or not finite.
    pub fn layer<'t>(
        &self,
        layer: usize,
        linears: [Box<dyn Linear + 't>; LinearKind::ALL.len()],
    ) -> Result<Layer<'t>> {
        Ok(Layer { norms: self.norms(layer)?, linears })
    }

    /// `x / rms(x) · weight`, computed in fp32, returned in the kind of the computation.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let norm = || -> Result<Tensor, tch::TchError> {
            let x = x.f_to_kind(Kind::Float)?;
            let mean = x.f_square()?.f_mean_dim(-1, true, Kind::Float)?;
            let scale = mean.f_add_scalar(self.config().rms_norm_eps)?.f_rsqrt()?;
            x.f_mul(&scale)?.f_mul(weight)?.f_to_kind(self.kind)
        };
        norm().torch("compute an RMSNorm")
    }

    /// Outputs of q, k and v → inputs of o, `[B, S, heads·head_dim]`.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        self.attention.forward(q, k, v)
    }

    /// Outputs of gate and up → inputs of down: `silu(gate) · up`.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn gated(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        gate.f_silu().and_then(|g| g.f_mul(up)).torch("compute the MLP's activation")
    }

    /// Runs a whole layer: hidden states `[B, S, hidden]` → the next ones.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn forward(&self, layer: &Layer<'_>, hidden: &Tensor) -> Result<Tensor> {
        self.forward_with(layer, hidden, |q, k, v| self.attend(q, k, v))
    }

    /// The same for the tokens `[1, S, hidden]` that follow those in the layer's `cache`, which takes them up. More than
    /// one only while the cache is empty.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn forward_cached(&self, layer: &Layer<'_>, hidden: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        self.forward_with(layer, hidden, |q, k, v| self.attention.forward_cached(q, k, v, cache))
    }

    /// An empty cache of a layer for `capacity` tokens.
    ///
    /// # Errors
    /// When memory ends.
    pub fn cache(&self, capacity: usize) -> Result<KvCache> {
        self.attention.cache(capacity, self.kind, self.device)
    }

    fn forward_with(
        &self,
        layer: &Layer<'_>,
        hidden: &Tensor,
        attend: impl FnOnce(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let [q, k, v, o, gate, up, down] = &layer.linears;
        let x = self.rms_norm(hidden, &layer.norms.input)?;
        let attended = attend(&q.forward(&x)?, &k.forward(&x)?, &v.forward(&x)?)?;
        let hidden = add(hidden, &o.forward(&attended)?)?;
        let x = self.rms_norm(&hidden, &layer.norms.post_attention)?;
        let activated = self.gated(&gate.forward(&x)?, &up.forward(&x)?)?;
        add(&hidden, &down.forward(&activated)?)
    }

    /// The last norm's weight and the output layer `[vocab, hidden]`, in the kind of the computation.
    ///
    /// # Errors
    /// When a tensor is missing, malformed or not finite, or a tied output layer is stored and is another one.
    pub fn head(&self) -> Result<(Tensor, Dense)> {
        self.checkpoint.check_tied()?;
        let config = self.config();
        let norm = self.checkpoint.load(FINAL_NORM, &[config.hidden_size], Kind::Float, self.device)?;
        let name = if config.tie_word_embeddings { EMBED_TOKENS } else { LM_HEAD };
        let shape = [config.vocab_size, config.hidden_size];
        let weight = self.checkpoint.load(name, &shape, self.kind, self.device)?;
        Ok((norm, Dense::new(weight, None)))
    }
}

/// The kind that a checkpoint's first linear is stored in, which stands for the others.
///
/// # Errors
/// When the tensor is missing or of a kind that is not read.
pub fn source_kind(checkpoint: &Checkpoint) -> Result<Kind> {
    tensor_kind(&checkpoint.view(&LinearId { layer: 0, kind: LinearKind::Q }.weight())?)
}

/// The kind of the embedding, which every checkpoint holds unquantized.
///
/// # Errors
/// When the tensor is missing or of a kind that is not read.
pub(super) fn embedding_kind(checkpoint: &Checkpoint) -> Result<Kind> {
    tensor_kind(&checkpoint.view(EMBED_TOKENS)?)
}

/// libtorch's name of a tensor's dtype.
fn tensor_kind(view: &TensorView<'_>) -> Result<Kind> {
    match view.dtype {
        Dtype::F16 => Ok(Kind::Half),
        Dtype::BF16 => Ok(Kind::BFloat16),
        Dtype::F32 => Ok(Kind::Float),
        other => Err(Error::TensorDtype {
            name: view.name.to_owned(),
            expected: "F16, BF16 or F32",
            found: format!("{other:?}"),
        }),
    }
}

/// Adds a stage's output to the residual stream.
///
/// # Errors
/// When libtorch fails.
pub fn add(hidden: &Tensor, output: &Tensor) -> Result<Tensor> {
    hidden.f_add(output).torch("add to the residual stream")
}
