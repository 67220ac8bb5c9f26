//! Mixes: which type each tensor of a GGUF file has, by the mix's name.
//!
//! The rules are those of `llama_tensor_get_type` in llama.cpp's `llama-quant.cpp` (MIT licence), for a quantization with an importance
//! matrix, so that a file has the size that llama.cpp gives it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::BlockType;
use crate::error::Error;

/// A mix of types, written as `q4_k_m`.
#[allow(non_camel_case_types, reason = "the names of llama.cpp")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mix {
    /// Mostly `Q2_K`.
    Q2_K,
    /// Mostly `Q3_K`.
    Q3_K_M,
    /// `Q4_0`.
    Q4_0,
    /// Mostly `Q4_K`.
    Q4_K_M,
    /// Mostly `Q5_K`.
    Q5_K_M,
    /// `Q6_K`.
    Q6_K,
    /// `Q8_0`.
    Q8_0,
}

/// Facts of a model that the rules need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MixModel {
    /// Decoder layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Experts of a layer, 0 without.
    pub experts: usize,
    /// Whether the output layer is tied to the embedding.
    pub tied: bool,
    /// Whether the architecture of the file is `llama`.
    pub llama: bool,
}

impl Mix {
    /// All mixes, by size.
    pub const ALL: [Self; 7] =
        [Self::Q2_K, Self::Q3_K_M, Self::Q4_0, Self::Q4_K_M, Self::Q5_K_M, Self::Q6_K, Self::Q8_0];

    /// Its name in llama.cpp and in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q2_K => "Q2_K",
            Self::Q3_K_M => "Q3_K_M",
            Self::Q4_0 => "Q4_0",
            Self::Q4_K_M => "Q4_K_M",
            Self::Q5_K_M => "Q5_K_M",
            Self::Q6_K => "Q6_K",
            Self::Q8_0 => "Q8_0",
        }
    }

    /// Its number in the metadata key `general.file_type`, of `enum llama_ftype`.
    pub fn file_type(self) -> u32 {
        match self {
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
            Self::Q2_K => 10,
            Self::Q3_K_M => 12,
            Self::Q4_K_M => 15,
            Self::Q5_K_M => 17,
            Self::Q6_K => 18,
        }
    }

    /// The type that most tensors have.
    pub fn main_type(self) -> BlockType {
        match self {
            Self::Q2_K => BlockType::Q2_K,
            Self::Q3_K_M => BlockType::Q3_K,
            Self::Q4_0 => BlockType::Q4_0,
            Self::Q4_K_M => BlockType::Q4_K,
            Self::Q5_K_M => BlockType::Q5_K,
            Self::Q6_K => BlockType::Q6_K,
            Self::Q8_0 => BlockType::Q8_0,
        }
    }

    /// The type of a tensor of two dimensions or more, by its name in GGUF and the length of its rows. Norms and routers stay in
    /// fp32.
    pub fn type_of(self, name: &str, columns: usize, model: &MixModel) -> BlockType {
        if !name.ends_with("weight")
            || name.ends_with("_norm.weight")
            || name.ends_with("ffn_gate_inp.weight")
        {
            return BlockType::F32;
        }
        fitting(self.preferred(name, columns, model), columns)
    }

    /// The type by the rules, whether or not rows are whole blocks of it.
    fn preferred(self, name: &str, columns: usize, model: &MixModel) -> BlockType {
        use BlockType::{Q3_K, Q4_1, Q4_K, Q5_K, Q6_K, Q8_0};
        let main = self.main_type();
        if name == "output.weight" || name == "token_embd.weight" && model.tied {
            let whole = columns.is_multiple_of(main.block_len());
            return if whole && main != Q8_0 { Q6_K } else { Q8_0 };
        }
        let number = |rest: &str| rest.split('.').next()?.parse::<usize>().ok();
        let layer = name.strip_prefix("blk.").and_then(number);
        let Some(layer) = layer else { return main };
        let (layers, experts) = (model.layers, model.experts == 8);
        let is = |part: &str| name.contains(part);
        let more_bits =
            layer < layers / 8 || layer >= 7 * layers / 8 || layer.saturating_sub(layers / 8) % 3 == 2;
        if is("attn_v.weight") || is("attn_qkv.weight") {
            let kind = match self {
                Self::Q2_K if model.heads / model.kv_heads.max(1) >= 4 => Q4_K,
                Self::Q2_K => Q3_K,
                Self::Q3_K_M if layer < 2 => Q5_K,
                Self::Q3_K_M => Q4_K,
                Self::Q4_K_M | Self::Q5_K_M if more_bits => Q6_K,
                _ => main,
            };
            // The 70B Llama: 8 heads share each value.
            let shared_values = model.llama && layers == 80 && model.heads != model.kv_heads;
            return match kind {
                _ if experts => Q8_0,
                Q3_K | Q4_K if shared_values => Q5_K,
                kind => kind,
            };
        }
        if is("attn_k.weight") && experts {
            return Q8_0;
        }
        if is("ffn_down") {
            return match self {
                Self::Q2_K => Q3_K,
                Self::Q3_K_M if layer < layers / 16 => Q5_K,
                Self::Q3_K_M => Q4_K,
                Self::Q4_K_M | Self::Q5_K_M if more_bits => Q6_K,
                Self::Q4_0 if layer < layers / 8 => Q4_1,
                _ => main,
            };
        }
        if is("attn_output.weight") {
            return match self {
                Self::Q2_K | Self::Q3_K_M | Self::Q4_K_M if experts => Q5_K,
                Self::Q2_K => Q3_K,
                Self::Q3_K_M => Q4_K,
                _ => main,
            };
        }
        main
    }
}

/// The type that takes the place of `kind` where rows are not whole blocks of it. llama.cpp took `IQ4_NL` for `Q2_K` and `Q3_K` until
/// 2026 and takes `Q4_0`, of the same size, since; `IQ4_NL` has the smaller error.
fn fitting(kind: BlockType, columns: usize) -> BlockType {
    if columns.is_multiple_of(kind.block_len()) {
        return kind;
    }
    let smaller = match kind {
        BlockType::Q2_K | BlockType::Q3_K => BlockType::IQ4_NL,
        BlockType::Q4_K => BlockType::Q5_0,
        BlockType::Q5_K => BlockType::Q5_1,
        BlockType::Q6_K => BlockType::Q8_0,
        other => other,
    };
    if columns.is_multiple_of(smaller.block_len()) { smaller } else { BlockType::F16 }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name().to_ascii_lowercase())
    }
}

impl FromStr for Mix {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let found = Self::ALL.into_iter().find(|mix| mix.name().eq_ignore_ascii_case(text));
        found.ok_or_else(|| Error::Value {
            what: "GGUF mix".into(),
            expected: format!("one of {}", Self::ALL.map(|mix| mix.to_string()).join(", ")),
            found: text.into(),
        })
    }
}

impl Serialize for Mix {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mix {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
