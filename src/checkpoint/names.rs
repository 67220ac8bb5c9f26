//! Names and shapes of every tensor of a model. Nothing else in the crate spells a tensor name.

use std::fmt;

use crate::checkpoint::config::LlamaConfig;

/// The embedding, `[vocab, hidden]`.
pub const EMBED_TOKENS: &str = "model.embed_tokens.weight";
/// The last RMSNorm, `[hidden]`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// The output layer, `[vocab, hidden]`; absent when tied to the embedding.
pub const LM_HEAD: &str = "lm_head.weight";

/// One of the seven linears of a decoder layer, in calibration order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LinearKind {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention output.
    O,
    /// MLP gate.
    Gate,
    /// MLP up.
    Up,
    /// MLP down.
    Down,
}

impl LinearKind {
    /// All seven, in calibration order.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// The module's name inside its layer, e.g. `self_attn.q_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// Shape of the dense weight, `[out, in]`.
    pub fn shape(self, config: &LlamaConfig) -> [usize; 2] {
        match self {
            Self::Q => [config.attention_width(), config.hidden_size],
            Self::K | Self::V => [config.kv_width(), config.hidden_size],
            Self::O => [config.hidden_size, config.attention_width()],
            Self::Gate | Self::Up => [config.intermediate_size, config.hidden_size],
            Self::Down => [config.hidden_size, config.intermediate_size],
        }
    }

    /// Whether the model gives this linear a bias, `[out]`.
    pub fn has_bias(self, config: &LlamaConfig) -> bool {
        match self {
            Self::Q | Self::K | Self::V | Self::O => config.attention_bias,
            Self::Gate | Self::Up | Self::Down => config.mlp_bias,
        }
    }
}

impl fmt::Display for LinearKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Shape of the dense weight of a linear, `[out, in]`.
pub fn linear_shape(config: &LlamaConfig, kind: LinearKind) -> [usize; 2] {
    kind.shape(config)
}

/// One linear of the model. Printed as its module name, `model.layers.3.self_attn.q_proj`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinearId {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// Which of its linears.
    pub kind: LinearKind,
}

impl LinearId {
    /// All linears of the model, layer by layer, in calibration order.
    pub fn all(config: &LlamaConfig) -> impl Iterator<Item = Self> + use<> {
        (0..config.num_layers).flat_map(|layer| LinearKind::ALL.map(|kind| Self { layer, kind }))
    }

    /// Name of the dense weight, `[out, in]`.
    pub fn weight(self) -> String {
        format!("{self}.weight")
    }

    /// Name of the bias, `[out]`.
    pub fn bias(self) -> String {
        format!("{self}.bias")
    }

    /// Name of the packed codes, `[in*bits/32, out]`.
    pub fn qweight(self) -> String {
        format!("{self}.qweight")
    }

    /// Name of the packed zero points, `[groups, out*bits/32]`.
    pub fn qzeros(self) -> String {
        format!("{self}.qzeros")
    }

    /// Name of the scales, `[groups, out]`.
    pub fn scales(self) -> String {
        format!("{self}.scales")
    }

    /// Name of the group of each input feature, `[in]`.
    pub fn g_idx(self) -> String {
        format!("{self}.g_idx")
    }
}

impl fmt::Display for LinearId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", layer_prefix(self.layer), self.kind)
    }
}

/// What the names of all tensors of a layer start with, `model.layers.3.`.
pub fn layer_prefix(layer: usize) -> String {
    format!("model.layers.{layer}.")
}

/// Name of the RMSNorm before attention, `[hidden]`.
pub fn input_layernorm(layer: usize) -> String {
    format!("{}input_layernorm.weight", layer_prefix(layer))
}

/// Name of the RMSNorm before the MLP, `[hidden]`.
pub fn post_attention_layernorm(layer: usize) -> String {
    format!("{}post_attention_layernorm.weight", layer_prefix(layer))
}

/// Every tensor that is never quantized, with its shape: the embedding, the norms of each layer, the last norm
/// and, when not tied, the output layer. In the order of the forward pass.
pub fn dense_tensors(config: &LlamaConfig) -> Vec<(String, Vec<usize>)> {
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    let mut tensors = vec![(EMBED_TOKENS.to_owned(), vec![vocab, hidden])];
    for layer in 0..config.num_layers {
        tensors.push((input_layernorm(layer), vec![hidden]));
        tensors.push((post_attention_layernorm(layer), vec![hidden]));
    }
    tensors.push((FINAL_NORM.to_owned(), vec![hidden]));
    if !config.tie_word_embeddings {
        tensors.push((LM_HEAD.to_owned(), vec![vocab, hidden]));
    }
    tensors
}
