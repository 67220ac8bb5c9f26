//! The tensors of a GGUF file, by the names that a Hugging Face folder gives them.

use std::path::Path;

use safetensors::Dtype;
use serde_json::Value;

use super::reader::Entry;
use crate::{
    error::{Error, Result},
    ggml::BlockType,
    gguf::{Header, LLAMA, Stored, model_config, names},
};

/// Tensors by name.
type Tensors = Vec<(String, Entry)>;

/// Parses the whole file `map`; returns the tensors and the `config.json` of its model.
pub(super) fn parse(path: &Path, map: &[u8]) -> Result<(Header, Tensors, Value)> {
    let header = Header::parse(path, map)?;
    let config = model_config(path, &header, map)?;
    let architecture = header.metadata.text("general.architecture");
    let heads = |key: &str| config[key].as_u64().map(|heads| heads as usize);
    let (q_heads, k_heads) = (heads("num_attention_heads"), heads("num_key_value_heads"));
    let mut entries = Vec::with_capacity(header.tensors.len());
    for tensor in header.tensors.iter().filter(|tensor| tensor.name != names::ROPE_FREQS) {
        let Some(name) = names::in_folder(&tensor.name) else {
            let found = &tensor.name;
            let problem = format!("tensor `{found}` is none of those that are read for this architecture");
            return Err(Error::Gguf { path: path.into(), problem });
        };
        let permuted = match architecture {
            Some(LLAMA) if names::is_q(&tensor.name) => q_heads,
            Some(LLAMA) if names::is_k(&tensor.name) => k_heads,
            _ => None,
        };
        let rows = tensor.shape.first().copied().unwrap_or(1);
        if let Some(heads) = permuted.filter(|heads| *heads == 0 || !rows.is_multiple_of(2 * heads)) {
            let problem =
                format!("tensor `{}` has {rows} rows, no even number for each of {heads} heads", tensor.name);
            return Err(Error::Gguf { path: path.into(), problem });
        }
        let stored = Stored { kind: tensor.kind, heads: permuted };
        let plain = match tensor.kind {
            BlockType::F32 => Some(Dtype::F32),
            BlockType::F16 => Some(Dtype::F16),
            BlockType::BF16 => Some(Dtype::BF16),
            _ => None,
        };
        let (dtype, stored) = match plain.filter(|_| permuted.is_none()) {
            Some(dtype) => (dtype, None),
            // Not to be taken for numbers in their order.
            None => (Dtype::U8, Some(stored)),
        };
        let (shape, range) = (tensor.shape.clone(), tensor.range.clone());
        entries.push((name, Entry { shard: 0, dtype, shape, range, stored }));
    }
    Ok((header, entries, config))
}
