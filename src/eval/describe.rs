//! Describes a quantized checkpoint from its config and files.

use std::{cmp::Reverse, collections::BTreeMap};

use serde_json::Value;

use crate::{
    checkpoint::{Checkpoint, QuantizationConfig},
    error::Result,
    ggml::BlockType,
    gguf::Metadata,
    report::CheckpointReport,
    verify::{llama_cpp, notes, readers, tensor_parallel},
};

/// Describes a GPTQ checkpoint or a GGUF file, whatever tool wrote it.
///
/// # Errors
/// When it is neither.
pub fn describe(checkpoint: &Checkpoint) -> Result<CheckpointReport> {
    if let Some((header, _)) = checkpoint.gguf() {
        return describe_gguf(checkpoint, &header.metadata);
    }
    let config = checkpoint.config();
    let quantization = QuantizationConfig::read(checkpoint)?;
    let meta = |key: &str| quantization.meta.get(key);
    let count = |key: &str| meta(key).and_then(Value::as_u64).map(|count| count as usize);
    Ok(CheckpointReport {
        quantizer: meta("quantizer").and_then(first_text),
        gguf: None,
        bits: quantization.bits.get(),
        group_size: quantization.group_size.as_config(),
        digest: checkpoint.digest()?,
        act_order: match (quantization.desc_act, quantization.static_groups) {
            (_, true) => "static",
            (true, false) => "yes",
            (false, false) => "no",
        }
        .into(),
        symmetric: quantization.sym,
        damp: quantization.damp_percent,
        dataset: meta("dataset").and_then(first_text),
        seq_len: count("seq_len"),
        samples: count("samples"),
        bytes: checkpoint.bytes_total(),
        bits_per_weight: bits_per_weight(checkpoint)?,
        scale_bits: checkpoint.scale_bits()?,
        readers: readers(config, &quantization, checkpoint),
        tensor_parallel: tensor_parallel(config, &quantization, checkpoint),
        notes: notes(checkpoint, &quantization)?,
    })
}

fn describe_gguf(checkpoint: &Checkpoint, metadata: &Metadata) -> Result<CheckpointReport> {
    let types = gguf_types(checkpoint)?;
    let main = types.first().copied().unwrap_or(BlockType::F32);
    let text = |key: &str| metadata.text(key).map(str::to_owned);
    let ours = text("gptq.quantization_config").and_then(|text| serde_json::from_str::<Value>(&text).ok());
    let ours = ours.unwrap_or(Value::Null);
    let dataset = ours["meta"].get("dataset").and_then(first_text);
    let count = |key: &str| ours["meta"][key].as_u64().map(|count| count as usize);
    Ok(CheckpointReport {
        quantizer: text("gptq.generated_by").or(text("general.quantized_by")),
        gguf: Some(types.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")),
        bits: main.bits(),
        group_size: main.group_len() as i64,
        digest: checkpoint.digest()?,
        act_order: "no".into(),
        symmetric: main.is_symmetric(),
        damp: ours["damp_percent"].as_f64(),
        dataset: dataset.or(text("quantize.imatrix.dataset")),
        seq_len: count("seq_len"),
        samples: count("samples"),
        bytes: checkpoint.bytes_total(),
        bits_per_weight: bits_per_weight(checkpoint)?,
        scale_bits: None,
        readers: vec![llama_cpp()],
        tensor_parallel: Vec::new(),
        notes: Vec::new(),
    })
}

/// The types of a GGUF file's linears, by the number of their weights.
///
/// # Errors
/// When a tensor is missing.
pub fn gguf_types(checkpoint: &Checkpoint) -> Result<Vec<BlockType>> {
    let mut weights: BTreeMap<BlockType, usize> = BTreeMap::new();
    for (id, linear) in checkpoint.config().linears() {
        let view = checkpoint.view(&id.weight())?;
        let kind = BlockType::ALL.into_iter().find(|kind| kind.to_string() == view.type_name());
        *weights.entry(kind.unwrap_or(BlockType::F32)).or_default() += linear.weights();
    }
    let mut types: Vec<(BlockType, usize)> = weights.into_iter().collect();
    types.sort_by_key(|(_, weights)| Reverse(*weights));
    Ok(types.into_iter().map(|(kind, _)| kind).collect())
}

/// A text, or the first of several.
fn first_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get(0)?.as_str()).map(str::to_owned)
}

/// Bits of codes, scales, zeros and group indices over the quantized weights; of a GGUF file those of all linears over their
/// weights.
///
/// # Errors
/// When a tensor is malformed.
pub fn bits_per_weight(checkpoint: &Checkpoint) -> Result<f64> {
    let config = checkpoint.config();
    let (mut bits, mut weights) = (0, 0);
    for (id, linear) in config.linears() {
        for name in [id.qweight(), id.qzeros(), id.scales(), id.g_idx()] {
            if checkpoint.contains(&name) {
                bits += checkpoint.view(&name)?.bytes.len() * 8;
            }
        }
        if checkpoint.gguf().is_some() {
            bits += checkpoint.view(&id.weight())?.bytes.len() * 8;
        }
        if checkpoint.gguf().is_some() || checkpoint.contains(&id.qweight()) {
            weights += linear.weights();
        }
    }
    Ok(bits as f64 / weights.max(1) as f64)
}
