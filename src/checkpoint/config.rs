//! `config.json` of a Llama or Mistral model, checked once.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{
    checkpoint::{
        fields::{Fields, SIZE_LIMIT, read_json},
        rope_config::Rope,
    },
    error::{Error, Result},
    folder::file_in,
};

/// The model's config, in the checkpoint folder.
pub const CONFIG_FILE: &str = "config.json";

const SUPPORTED: &str = "LlamaForCausalLM, MistralForCausalLM";

/// More decoder layers than any model has; keeps a wrong number from filling the memory with names.
const MAX_LAYERS: usize = 4096;

/// The model families that can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `LlamaForCausalLM`.
    Llama,
    /// `MistralForCausalLM`: Llama with an optional sliding attention window and no biases.
    Mistral,
}

impl Architecture {
    fn of(path: &Path, fields: &Fields<'_>) -> Result<Self> {
        let unsupported =
            |found: String| Error::UnsupportedArchitecture { path: path.into(), found, supported: SUPPORTED };
        let class = match fields.get("architectures") {
            None => None,
            Some(Value::Array(list)) if list.len() == 1 => list[0].as_str(),
            Some(other) => return Err(unsupported(other.to_string())),
        };
        let model_type = fields.text("model_type")?;
        let found = match (class, model_type) {
            (Some("LlamaForCausalLM"), Some("llama") | None) | (None, Some("llama")) => Self::Llama,
            (Some("MistralForCausalLM"), Some("mistral") | None) | (None, Some("mistral")) => Self::Mistral,
            (Some(class @ ("LlamaForCausalLM" | "MistralForCausalLM")), Some(other)) => {
                return Err(fields.error(
                    "model_type",
                    format_args!("the model type of `{class}`"),
                    format_args!("`{other}`"),
                ));
            }
            (Some(other), _) | (None, Some(other)) => return Err(unsupported(other.to_owned())),
            (None, None) => return Err(fields.error("architectures", SUPPORTED, "nothing")),
        };
        Ok(found)
    }
}

/// A decoder-only model of the Llama family. Made only by [`LlamaConfig::read`] and [`LlamaConfig::from_json`],
/// which check every value; keys that are missing take the defaults of transformers.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Model family.
    pub architecture: Architecture,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Features a head, even; `num_heads * head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest sequence the model is made for, tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Whether the output layer is the embedding, so that there is no `lm_head.weight`.
    pub tie_word_embeddings: bool,
    /// Whether q, k, v and o have biases.
    pub attention_bias: bool,
    /// Whether gate, up and down have biases.
    pub mlp_bias: bool,
    /// Mistral: a token sees this many tokens, itself included. `None`: all before it.
    pub sliding_window: Option<usize>,
    /// Mistral: whether only some layers have the window. Such a model runs on sequences that fit into it, where
    /// that makes no difference.
    pub mixed_windows: bool,
    /// Beginning-of-sequence token.
    pub bos_token_id: Option<u32>,
    /// End-of-sequence tokens; empty when the config names none.
    pub eos_token_ids: Vec<u32>,
    /// `dtype` or `torch_dtype` as written, e.g. `float16`.
    pub dtype: Option<String>,
    raw: Value,
}

impl LlamaConfig {
    /// Reads `config.json` in the folder `dir`.
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
    pub fn from_json(path: impl Into<PathBuf>, value: &Value) -> Result<Self> {
        let path = &path.into();
        let fields = &Fields::new(path, "", value)?;
        let architecture = Architecture::of(path, fields)?;
        let mistral = architecture == Architecture::Mistral;

        let activation = fields.text("hidden_act")?.unwrap_or("silu");
        if !matches!(activation, "silu" | "swish") {
            return Err(fields.error("hidden_act", "`silu`", format_args!("`{activation}`")));
        }
        let hidden_size = fields.required_size("hidden_size")?;
        let num_layers = fields.required_size("num_hidden_layers")?;
        if num_layers > MAX_LAYERS {
            return Err(fields.error("num_hidden_layers", format_args!("at most {MAX_LAYERS}"), num_layers));
        }
        let num_heads = fields.required_size("num_attention_heads")?;
        let num_kv_heads = num_kv_heads(fields, mistral, num_heads)?;
        let head_dim = head_dim(fields, hidden_size, num_heads)?;
        let max_position_embeddings =
            fields.size("max_position_embeddings")?.unwrap_or(if mistral { 131_072 } else { 2048 });
        let (sliding_window, mixed_windows) =
            if mistral { sliding_window(fields, num_layers)? } else { (None, false) };
        Ok(Self {
            architecture,
            hidden_size,
            intermediate_size: fields.required_size("intermediate_size")?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            vocab_size: fields.required_size("vocab_size")?,
            max_position_embeddings,
            rms_norm_eps: fields.positive("rms_norm_eps")?.unwrap_or(1e-6),
            rope: Rope::from_fields(path, fields, max_position_embeddings)?,
            tie_word_embeddings: fields.boolean("tie_word_embeddings")?.unwrap_or(false),
            attention_bias: !mistral && fields.boolean("attention_bias")?.unwrap_or(false),
            mlp_bias: !mistral && fields.boolean("mlp_bias")?.unwrap_or(false),
            sliding_window,
            mixed_windows,
            bos_token_id: fields.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: fields.token_ids("eos_token_id")?,
            dtype: fields.text("dtype")?.or(fields.text("torch_dtype")?).map(str::to_owned),
            raw: value.clone(),
        })
    }

    /// `config.json` as it was read, every key in its order.
    pub fn raw(&self) -> &Value {
        &self.raw
    }

    /// The same with an output layer of its own.
    pub fn untied(&self) -> Self {
        let mut raw = self.raw.clone();
        if self.tie_word_embeddings {
            raw["tie_word_embeddings"] = false.into();
        }
        Self { tie_word_embeddings: false, raw, ..self.clone() }
    }

    /// Features of all query heads: rows of `q_proj`, columns of `o_proj`.
    pub fn attention_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Features of all key heads, and of all value heads.
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }
}

fn num_kv_heads(fields: &Fields<'_>, mistral: bool, num_heads: usize) -> Result<usize> {
    let key = "num_key_value_heads";
    // A Mistral config without the key means 8; with the key set to null, as many as query heads.
    let default = if mistral && !fields.has(key) { 8 } else { num_heads };
    let num_kv_heads = fields.size(key)?.unwrap_or(default);
    if !num_heads.is_multiple_of(num_kv_heads) {
        return Err(fields.error(
            key,
            format_args!("a divisor of num_attention_heads {num_heads}"),
            num_kv_heads,
        ));
    }
    Ok(num_kv_heads)
}

/// Mistral's window, and whether only some layers have it: transformers reads a Mistral config with `layer_types`
/// as Ministral's.
fn sliding_window(fields: &Fields<'_>, num_layers: usize) -> Result<(Option<usize>, bool)> {
    let window = if fields.has("sliding_window") { fields.size("sliding_window")? } else { Some(4096) };
    let Some(types) = fields.get("layer_types") else { return Ok((window, false)) };
    let windowed: Option<Vec<bool>> = types.as_array().and_then(|types| {
        let windowed = |of: &Value| match of.as_str()? {
            "sliding_attention" => Some(true),
            "full_attention" => Some(false),
            _ => None,
        };
        types.iter().map(windowed).collect()
    });
    match windowed.filter(|windowed| windowed.len() == num_layers) {
        Some(windowed) if windowed.iter().all(|windowed| *windowed) => Ok((window, false)),
        Some(windowed) if windowed.contains(&true) => Ok((window, true)),
        Some(_) => Ok((None, false)),
        None => {
            let expected = format!("`sliding_attention` or `full_attention` for each of {num_layers} layers");
            Err(fields.error("layer_types", expected, types))
        }
    }
}

fn head_dim(fields: &Fields<'_>, hidden_size: usize, num_heads: usize) -> Result<usize> {
    let head_dim = match fields.size("head_dim")? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            let expected = format!("a divisor of hidden_size {hidden_size}");
            return Err(fields.error("num_attention_heads", expected, num_heads));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(fields.error("head_dim", "an even number", head_dim));
    }
    match head_dim.checked_mul(num_heads) {
        Some(width) if width < SIZE_LIMIT => Ok(head_dim),
        _ => Err(fields.error("head_dim", "num_attention_heads * head_dim below 2147483648", head_dim)),
    }
}
