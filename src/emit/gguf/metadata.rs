//! The model as GGUF metadata: sizes, rotary embedding, sampling, provenance. Keys are those of llama.cpp's converter.

use std::{f64::consts::TAU, path::Path};

use serde_json::Value;

use crate::{
    architectures::{Activation, ModelConfig, RopeConfig, RopeScaling},
    error::{Error, Result},
    folder::file_in,
    gguf::{ARCHITECTURES, LLAMA, Metadata, MetadataValue},
    json::read_json,
    report::GENERATED_BY,
};

/// Version of ggml's block formats.
const QUANTIZATION_VERSION: u32 = 2;

/// Keys of `generation_config.json`, and those of llama.cpp.
const SAMPLING: [(&str, &str); 5] = [
    ("top_k", "top_k"),
    ("top_p", "top_p"),
    ("min_p", "min_p"),
    ("temperature", "temp"),
    ("repetition_penalty", "penalty_repeat"),
];

/// llama.cpp's name of a model's architecture.
///
/// # Errors
/// When the family is another one, or the model has what that architecture lacks.
pub(super) fn architecture(dir: &Path, config: &ModelConfig) -> Result<&'static str> {
    let refuse = |problem: String, instead: &str| Error::NotForGguf {
        path: dir.into(),
        problem,
        instead: instead.to_owned(),
    };
    let class = match config.class {
        "LLaMAForCausalLM" | "MistralForCausalLM" => "LlamaForCausalLM",
        other => other,
    };
    let Some((architecture, ..)) = ARCHITECTURES.into_iter().find(|(_, known, _)| *known == class) else {
        let taken = "GGUF files are written of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM";
        return Err(refuse(
            format!("it is a {class}"),
            &format!("{taken}; llama.cpp's convert_hf_to_gguf.py converts others, without their codes"),
        ));
    };
    for layer in &config.layers {
        let block = &layer.feed_forward.blocks[0];
        if block.activation != Activation::Silu || !block.gated {
            let problem = format!(
                "its activation is {:?}, and llama.cpp's `{architecture}` has silu",
                block.activation
            );
            return Err(refuse(problem, "no file of this architecture computes the same"));
        }
    }
    if let Some(rope) = &config.layers[0].attention.rope {
        let problem = match &rope.scaling {
            RopeScaling::LongRope { .. } => "its rotary embedding is scaled by LongRoPE",
            RopeScaling::Yarn { truncate: false, .. } => {
                "YaRN's ramp does not begin and end at whole dimensions (`truncate` is false), as llama.cpp's does"
            }
            RopeScaling::Llama3 { .. } if architecture != LLAMA => {
                "its rotary embedding is scaled as Llama 3.1's, which llama.cpp does for `llama` alone"
            }
            _ => return Ok(architecture),
        };
        return Err(refuse(problem.to_owned(), "no file of this architecture computes the same"));
    }
    Ok(architecture)
}

/// Warnings about a file: where llama.cpp computes something else than transformers.
pub(super) fn notes(config: &ModelConfig) -> Vec<String> {
    let windows = config.layers.iter().filter_map(|layer| layer.attention.window);
    let shortest = windows.min().filter(|window| *window < config.max_position_embeddings);
    let mut notes: Vec<String> = shortest
        .map(|window| {
            format!("llama.cpp attends to all tokens, the model to the last {window}: longer texts differ")
        })
        .into_iter()
        .collect();
    let ropes = config.layers.iter().filter_map(|layer| layer.attention.rope.as_ref());
    if let Some(RopeScaling::Dynamic { original_max, .. }) = ropes.map(|rope| &rope.scaling).next() {
        notes.push(format!(
            "llama.cpp does not scale the rotary embedding by length: texts of more than {original_max} tokens differ"
        ));
    }
    notes
}

/// All keys but those of the tokenizer. `parameters` is the number of all tensors' elements.
///
/// # Errors
/// When `generation_config.json` cannot be read.
pub(super) fn model(
    dir: &Path,
    config: &ModelConfig,
    architecture: &str,
    name: &str,
    file_type: u32,
    parameters: usize,
) -> Result<Metadata> {
    let mut metadata = Metadata::default();
    let text = |text: &str| MetadataValue::String(text.to_owned());
    let size = |size: usize| MetadataValue::U32(u32::try_from(size).unwrap_or(u32::MAX));
    metadata.set("general.architecture", text(architecture));
    metadata.set("general.type", text("model"));
    sampling(dir, &mut metadata)?;
    metadata.set("general.name", text(name));
    metadata.set("general.size_label", text(&size_label(parameters)));

    let first = &config.layers[0];
    let attention = &first.attention;
    let mut set = |key: &str, value| metadata.set(format!("{architecture}.{key}"), value);
    set("block_count", size(config.num_layers()));
    set("context_length", size(config.max_position_embeddings));
    set("embedding_length", size(config.hidden_size));
    set("feed_forward_length", size(first.feed_forward.blocks[0].width()));
    set("attention.head_count", size(attention.num_heads));
    set("attention.head_count_kv", size(attention.num_kv_heads));
    if let Some(rope) = &attention.rope {
        rope_scaling(rope, &mut set);
        set("rope.freq_base", MetadataValue::F32(rope.theta as f32));
    }
    set("attention.layer_norm_rms_epsilon", MetadataValue::F32(config.final_norm.eps as f32));
    set("attention.key_length", size(attention.head_dim));
    set("attention.value_length", size(attention.head_dim));
    if architecture == LLAMA {
        set("vocab_size", size(config.vocab_size));
        set("rope.dimension_count", size(attention.head_dim));
    }
    metadata.set("general.file_type", MetadataValue::U32(file_type));
    metadata.set("general.quantization_version", MetadataValue::U32(QUANTIZATION_VERSION));
    metadata.set("gptq.generated_by", text(GENERATED_BY));
    if let Some(quantization) = config.raw().get("quantization_config") {
        metadata.set("gptq.quantization_config", text(&quantization.to_string()));
    }
    Ok(metadata)
}

fn rope_scaling(rope: &RopeConfig, set: &mut impl FnMut(&str, MetadataValue)) {
    let text = |text: &str| MetadataValue::String(text.to_owned());
    let number = |number: f64| MetadataValue::F32(number as f32);
    match &rope.scaling {
        RopeScaling::Linear { factor } => {
            set("rope.scaling.type", text("linear"));
            set("rope.scaling.factor", number(*factor));
        }
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            original_max_position_embeddings,
            attention_factor,
            ..
        } => {
            set("rope.scaling.type", text("yarn"));
            set("rope.scaling.factor", number(*factor));
            let context = u32::try_from(*original_max_position_embeddings).unwrap_or(u32::MAX);
            set("rope.scaling.original_context_length", MetadataValue::U32(context));
            set("rope.scaling.yarn_beta_fast", number(*beta_fast));
            set("rope.scaling.yarn_beta_slow", number(*beta_slow));
            // llama.cpp multiplies by this growth itself.
            let more = attention_factor / (1.0 + 0.1 * factor.ln());
            if (more - 1.0).abs() > 1e-6 {
                set("rope.scaling.attn_factor", number(more));
            }
        }
        // The factors of Llama 3.1 are a tensor.
        RopeScaling::None
        | RopeScaling::Dynamic { .. }
        | RopeScaling::Llama3 { .. }
        | RopeScaling::LongRope { .. } => {}
    }
}

/// The number by which llama.cpp divides each rotary frequency of a Llama 3.1; `None` for other scalings.
pub(super) fn rope_factors(rope: &RopeConfig) -> Option<Vec<f32>> {
    let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } =
        &rope.scaling
    else {
        return None;
    };
    let context = *original_max_position_embeddings as f64;
    let of = |at: usize| {
        let frequency = rope.theta.powf(-2.0 * at as f64 / rope.rotary_dim as f64);
        let turns = context * frequency / TAU;
        let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
        (1.0 / ((1.0 - kept) / factor + kept)) as f32
    };
    Some((0..rope.rotary_dim / 2).map(of).collect())
}

/// Settings of sampling that `generation_config.json` recommends.
fn sampling(dir: &Path, metadata: &mut Metadata) -> Result<()> {
    let path = file_in(dir, "generation_config.json")?;
    if !path.exists() {
        return Ok(());
    }
    let config: Value = read_json(&path)?;
    for (theirs, own) in SAMPLING {
        let value = match own {
            "top_k" => config[theirs].as_i64().and_then(|k| i32::try_from(k).ok()).map(MetadataValue::I32),
            _ => config[theirs].as_f64().map(|number| MetadataValue::F32(number as f32)),
        };
        if let Some(value) = value {
            metadata.set(format!("general.sampling.{own}"), value);
        }
    }
    Ok(())
}

/// A number of parameters as files are named by it: `135M`, `1.1B`.
fn size_label(parameters: usize) -> String {
    let (scaled, unit) = match parameters as f64 {
        count if count > 1e12 => (count * 1e-12, "T"),
        count if count > 1e9 => (count * 1e-9, "B"),
        count if count > 1e6 => (count * 1e-6, "M"),
        count => (count * 1e-3, "K"),
    };
    let digits = if scaled.round() < 10.0 { 1 } else { 0 };
    format!("{scaled:.digits$}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_rounded_to_two_digits() {
        let labels = [5_114_112, 134_515_008, 1_100_048_384, 8_030_261_248, 12_345].map(size_label);
        assert_eq!(labels, ["5.1M", "135M", "1.1B", "8.0B", "12K"]);
    }

    #[test]
    fn factors_of_llama_3_keep_high_frequencies() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let rope = RopeConfig { theta: 500_000.0, scaling, rotary_dim: 128, interleaved: false };
        let factors = rope_factors(&rope).unwrap();
        assert_eq!((factors.len(), factors[0], factors[63]), (64, 1.0, 8.0));
        assert!(factors.is_sorted() && factors.iter().any(|factor| (1.5..7.0).contains(factor)));
        assert_eq!(rope_factors(&RopeConfig { scaling: RopeScaling::None, ..rope }), None);
    }
}
