//! Describes a quantized checkpoint from its config and files.

use serde_json::Value;

use crate::{
    checkpoint::{Checkpoint, QuantizationConfig},
    error::Result,
    report::CheckpointReport,
    verify::{notes, readers, tensor_parallel},
};

/// Describes a GPTQ checkpoint, whatever tool wrote it.
///
/// # Errors
/// When it is not one.
pub fn describe(checkpoint: &Checkpoint) -> Result<CheckpointReport> {
    let config = checkpoint.config();
    let quantization = QuantizationConfig::read(checkpoint)?;
    let meta = |key: &str| quantization.meta.get(key);
    let count = |key: &str| meta(key).and_then(Value::as_u64).map(|count| count as usize);
    Ok(CheckpointReport {
        quantizer: meta("quantizer").and_then(first_text),
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

/// A text, or the first of several.
fn first_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get(0)?.as_str()).map(str::to_owned)
}

/// Bits of codes, scales, zeros and group indices over the quantized weights.
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
        if checkpoint.contains(&id.qweight()) {
            weights += linear.weights();
        }
    }
    Ok(bits as f64 / weights.max(1) as f64)
}
