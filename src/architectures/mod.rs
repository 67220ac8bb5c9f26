//! Model families as data. A family is one file, which reads `config.json` with the defaults of transformers 5 and describes
//! the model's layers. The rest of the crate uses only that description.
//!
//! To add a family see "Add an architecture" in ARCHITECTURE.md.

mod cohere;
mod common;
mod feed_forward;
mod gemma;
mod glm4;
mod granite;
mod layer;
mod llama;
mod mistral;
mod mixtral;
mod olmo;
mod phi3;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;
mod rope;
mod seed_oss;
mod smollm3;
mod stablelm;
mod starcoder2;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{
    error::{Error, Result},
    folder::file_in,
    json::{Fields, read_json},
    units::hex,
};
pub use feed_forward::{Activation, FeedForward, FeedForwardConfig, RoutingConfig};
pub use layer::{
    AttentionConfig, GroupConfig, LayerConfig, LayerParts, LinearConfig, NormConfig, NormKind, NormPositions,
    StageConfig, StageKind,
};
pub use rope::{RopeConfig, RopeScaling, add_older_keys};

/// The model's config, in the checkpoint folder.
pub const CONFIG_FILE: &str = "config.json";

/// One model family.
struct Family {
    /// The class in `architectures`, and its `model_type`.
    classes: &'static [(&'static str, &'static str)],
    /// Reads the config of such a model.
    read: fn(&ConfigFields<'_>) -> Result<ModelConfig>,
}

/// All supported families.
const FAMILIES: &[&Family] = &[
    &llama::FAMILY,
    &mistral::FAMILY,
    &qwen2::FAMILY,
    &qwen3::FAMILY,
    &phi3::FAMILY,
    &smollm3::FAMILY,
    &granite::FAMILY,
    &seed_oss::FAMILY,
    &glm4::FAMILY,
    &olmo::FAMILY,
    &gemma::FAMILY,
    &starcoder2::FAMILY,
    &stablelm::FAMILY,
    &cohere::FAMILY,
    &mixtral::FAMILY,
    &qwen2_moe::FAMILY,
    &qwen3_moe::FAMILY,
];

/// The `config.json` of a decoder, or the `text_config` in that of a model with other inputs too.
#[derive(Clone, Copy)]
struct ConfigFields<'a> {
    path: &'a Path,
    /// The class in `architectures`.
    class: &'static str,
    /// The whole file.
    file: Fields<'a>,
    /// The decoder's part of it.
    decoder: Fields<'a>,
    raw: &'a Value,
}

/// A decoder-only model. [`ModelConfig::read`] and [`ModelConfig::from_json`] check every value.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The class in `architectures`, e.g. `LlamaForCausalLM`.
    pub class: &'static str,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest sequence, tokens.
    pub max_position_embeddings: usize,
    /// Decoder layers, in order.
    pub layers: Vec<LayerConfig>,
    /// Embeddings are multiplied by it.
    pub embedding_multiplier: EmbeddingMultiplier,
    /// The last norm; its path is below [`ModelConfig::prefix`].
    pub final_norm: NormConfig,
    /// Logits are multiplied by it.
    pub logits_multiplier: f64,
    /// Logits `x` become `cap · tanh(x / cap)`.
    pub logits_softcap: Option<f64>,
    /// Whether the output layer is the embedding, so that there is no `lm_head.weight`.
    pub tie_word_embeddings: bool,
    /// Prefix of the names of the decoder's tensors, e.g. `model.`.
    pub prefix: Arc<str>,
    /// Name of the output layer's weight, `[vocab, hidden]`.
    pub lm_head: String,
    /// Beginning-of-sequence token.
    pub bos_token_id: Option<u32>,
    /// End-of-sequence tokens; empty when the config names none.
    pub eos_token_ids: Vec<u32>,
    /// `dtype` or `torch_dtype` as written, e.g. `float16`.
    pub dtype: Option<String>,
    raw: Value,
}

/// The factor of embeddings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum EmbeddingMultiplier {
    /// A number.
    Exact(f64),
    /// A number that is rounded to the kind of the computation before the product (Gemma).
    Rounded(f64),
}

/// One linear of the model. Printed as its module name, `model.layers.3.self_attn.q_proj`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinearId {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// Inside the layer, `self_attn.q_proj`.
    pub path: Arc<str>,
    /// Prefix of the names of the decoder's tensors.
    prefix: Arc<str>,
}

impl LinearId {
    /// Name of the dense weight, `[out, in]`.
    pub fn weight(&self) -> String {
        format!("{self}.weight")
    }

    /// Name of the bias, `[out]`.
    pub fn bias(&self) -> String {
        format!("{self}.bias")
    }

    /// Name of the packed codes, `[in*bits/32, out]`.
    pub fn qweight(&self) -> String {
        format!("{self}.qweight")
    }

    /// Name of the packed zero points, `[groups, out*bits/32]`.
    pub fn qzeros(&self) -> String {
        format!("{self}.qzeros")
    }

    /// Name of the zero points of the oldest layout of GPTQ-for-LLaMa, floats.
    pub fn float_zeros(&self) -> String {
        format!("{self}.zeros")
    }

    /// Name of the scales, `[groups, out]`.
    pub fn scales(&self) -> String {
        format!("{self}.scales")
    }

    /// Name of the group of each input feature, `[in]`.
    pub fn g_idx(&self) -> String {
        format!("{self}.g_idx")
    }
}

impl fmt::Display for LinearId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}layers.{}.{}", self.prefix, self.layer, self.path)
    }
}

impl ModelConfig {
    /// Reads `config.json` in the folder `dir`.
    ///
    /// # Errors
    /// When the file is missing, the family is not supported, or a value is invalid.
    pub fn read(dir: &Path) -> Result<Self> {
        std::fs::metadata(dir).map_err(Error::io("read", dir))?;
        let path = file_in(dir, CONFIG_FILE)?;
        let value = read_json(&path).map_err(|error| match error {
            Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                Error::NotACheckpoint { path: dir.into(), missing: format!("`{CONFIG_FILE}`") }
            }
            other => other,
        })?;
        Self::from_json(path, &value)
    }

    /// Reads the parsed `config.json`; `path` is what errors name.
    ///
    /// # Errors
    /// As for [`ModelConfig::read`].
    pub fn from_json(path: impl Into<PathBuf>, value: &Value) -> Result<Self> {
        let path = &path.into();
        let file = Fields::new(path, "", value)?;
        let (family, class) = family(path, &file)?;
        let decoder = match file.get("text_config") {
            Some(section) => Fields::new(path, "text_config", section)?,
            None => file,
        };
        (family.read)(&ConfigFields { path, class, file, decoder, raw: value })
    }

    /// `config.json` as it was read, every key in its order.
    pub fn raw(&self) -> &Value {
        &self.raw
    }

    /// The same model with a separate output layer.
    #[must_use]
    pub fn untied(&self) -> Self {
        let mut raw = self.raw.clone();
        if self.tie_word_embeddings {
            raw["tie_word_embeddings"] = false.into();
            if let Some(decoder) = raw.get_mut("text_config").and_then(Value::as_object_mut) {
                decoder.insert("tie_word_embeddings".into(), false.into());
            }
        }
        Self { tie_word_embeddings: false, raw, ..self.clone() }
    }

    /// Decoder layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// The id of a layer's linear, by its position in [`LayerConfig::linears`].
    pub fn linear_id(&self, layer: usize, position: usize) -> LinearId {
        let path = Arc::clone(&self.layers[layer].linears[position].path);
        LinearId { layer, path, prefix: Arc::clone(&self.prefix) }
    }

    /// A layer's linears, in calibration order.
    pub fn layer_linears(&self, layer: usize) -> impl Iterator<Item = (LinearId, &LinearConfig)> {
        let linears = self.layers[layer].linears.iter().enumerate();
        linears.map(move |(position, linear)| (self.linear_id(layer, position), linear))
    }

    /// All linears of the model, layer by layer, in calibration order.
    pub fn linears(&self) -> impl Iterator<Item = (LinearId, &LinearConfig)> {
        (0..self.num_layers()).flat_map(|layer| self.layer_linears(layer))
    }

    /// Layer and position of every linear, in calibration order.
    pub fn linear_positions(&self) -> impl Iterator<Item = (usize, usize)> {
        let of =
            |(layer, config): (usize, &LayerConfig)| (0..config.linears.len()).map(move |at| (layer, at));
        self.layers.iter().enumerate().flat_map(of)
    }

    /// Name of the embedding, `[vocab, hidden]`.
    pub fn embedding(&self) -> String {
        format!("{}embed_tokens.weight", self.prefix)
    }

    /// The output layer's weight `[vocab, hidden]`: its own, or the embedding where they are tied.
    pub fn output_layer(&self) -> String {
        if self.tie_word_embeddings { self.embedding() } else { self.lm_head.clone() }
    }

    /// Prefix of the names of a layer's tensors, `model.layers.3.`.
    pub fn layer_prefix(&self, layer: usize) -> String {
        format!("{}layers.{layer}.", self.prefix)
    }

    /// Name of a tensor of a layer.
    pub fn layer_tensor(&self, layer: usize, path: &str) -> String {
        format!("{}{path}", self.layer_prefix(layer))
    }

    /// Names and shapes of the decoder's tensors that are never quantized, without biases of linears.
    ///
    /// The order is that of the forward pass: embedding, tensors of each layer, last norm. An output layer that is not tied comes
    /// last.
    pub fn dense_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, vocab) = (self.hidden_size, self.vocab_size);
        let mut tensors = vec![(self.embedding(), vec![vocab, hidden])];
        for (layer, config) in self.layers.iter().enumerate() {
            for (path, shape) in config.dense_tensors() {
                tensors.push((self.layer_tensor(layer, &path), shape));
            }
        }
        for (path, shape) in self.final_norm.tensors() {
            tensors.push((format!("{}{path}", self.prefix), shape));
        }
        if !self.tie_word_embeddings {
            tensors.push((self.lm_head.clone(), vec![vocab, hidden]));
        }
        tensors
    }

    /// Biases of all linears that have one, `[out]`.
    pub fn linear_biases(&self) -> Vec<String> {
        self.linears().filter(|(_, linear)| linear.bias).map(|(id, _)| id.bias()).collect()
    }

    /// Tokens of the longest window that the model can run: `max_position_embeddings`; with `allow_long` any number, if its rotary
    /// embeddings are scaled for long contexts.
    pub fn longest_window(&self, allow_long: bool) -> usize {
        let mut ropes = self.layers.iter().filter_map(|layer| layer.attention.rope.as_ref());
        match allow_long && ropes.any(|rope| rope.scaling != RopeScaling::None) {
            true => usize::MAX,
            false => self.max_position_embeddings,
        }
    }

    /// Whether layers have experts.
    pub fn has_experts(&self) -> bool {
        self.expert_layers() > 0
    }

    /// Number of layers with experts.
    pub fn expert_layers(&self) -> usize {
        self.layers.iter().filter(|layer| layer.feed_forward.routing.is_some()).count()
    }

    /// A digest of the config, as far as the forward pass depends on it.
    pub fn forward_digest(&self) -> String {
        let described = format!("{:?}", Self { raw: Value::Null, dtype: None, ..self.clone() });
        hex(&Sha256::digest(described))
    }

    /// The error for an option `what` that models of this family do not support.
    pub fn refused(&self, what: &str, reason: &str) -> Error {
        let expected = format!("off for {}: {reason}", self.class);
        Error::Value { what: what.into(), expected, found: "on".into() }
    }

    /// Why rotations cannot be folded into this model's weights; `None` if they can.
    pub fn rotation_refusal(&self) -> Option<String> {
        let norms = self.layers.iter().flat_map(|layer| layer.norms.all());
        let layer_norm = norms.chain([&self.final_norm]).find(|norm| norm.kind == NormKind::Layer);
        if let Some(norm) = layer_norm {
            return Some(format!("`{}` is a LayerNorm, which subtracts a mean", norm.path));
        }
        self.layers.iter().find_map(|layer| {
            let norm = layer.norms.attention_output.as_ref().or(layer.norms.feed_forward_output.as_ref())?;
            Some(format!("`{}` stands on the output of a block", norm.path))
        })
    }

    /// Why channels cannot be equalized between norms and linears; `None` if they can.
    pub fn equalization_refusal(&self) -> Option<String> {
        let mut norms = self.layers.iter().flat_map(|layer| layer.norm_readers()).map(|(norm, ..)| norm);
        let other = norms.find(|norm| norm.kind != NormKind::Rms || norm.bias)?;
        Some(format!("`{}` is not an RMSNorm that multiplies with its weight", other.path))
    }

    /// The same model with other names of the decoder's tensors, for files that were saved with the names in memory.
    #[must_use]
    pub fn with_prefix(self, prefix: &str, lm_head: &str) -> Self {
        Self { prefix: prefix.into(), lm_head: lm_head.into(), ..self }
    }

    /// Whether a tensor is not part of the decoder and is copied to branches unchanged: encoders of other inputs.
    pub fn is_passed_through(&self, name: &str) -> bool {
        self.raw.get("text_config").is_some()
            && !name.starts_with(&*self.prefix)
            && name != self.lm_head
            && !name.ends_with(".rotary_emb.inv_freq")
    }
}

/// The supported classes of `architectures`.
pub fn supported_classes() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().flat_map(|family| family.classes).map(|(class, _)| *class)
}

/// The family and the class of a config.
fn family(path: &Path, fields: &Fields<'_>) -> Result<(&'static Family, &'static str)> {
    let classes =
        || FAMILIES.iter().flat_map(|family| family.classes.iter().map(move |class| (*family, class)));
    let supported = || supported_classes().collect::<Vec<_>>().join(", ");
    let unsupported =
        |found: String| Error::UnsupportedArchitecture { path: path.into(), found, supported: supported() };
    let class = match fields.get("architectures") {
        None => None,
        Some(Value::Array(list)) if list.len() == 1 => list[0].as_str(),
        Some(other) => return Err(unsupported(other.to_string())),
    };
    let model_type = fields.text("model_type")?;
    let found = match (class, model_type) {
        (Some(class), _) => classes().find(|(_, (name, _))| *name == class),
        (None, Some(model_type)) => classes().find(|(_, (_, name))| *name == model_type),
        (None, None) => return Err(fields.error("architectures", supported(), "nothing")),
    };
    let Some((family, (name, own_type))) = found else {
        return Err(unsupported(class.or(model_type).unwrap_or_default().to_owned()));
    };
    match model_type {
        Some(other) if other != *own_type => {
            let expected = format!("the model type of `{name}`");
            Err(fields.error("model_type", expected, format_args!("`{other}`")))
        }
        _ => Ok((family, name)),
    }
}
