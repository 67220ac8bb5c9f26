//! Gemma 1, 2 and 3 (the decoder; encoders of images stay as they are).

use super::{
    Activation, AttentionConfig, ConfigFields, EmbeddingMultiplier, Family, LayerParts, ModelConfig,
    NormKind, NormPositions,
    common::{Defaults, LLAMA, Sizes},
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family {
    classes: &[
        ("GemmaForCausalLM", "gemma"),
        ("Gemma2ForCausalLM", "gemma2"),
        ("Gemma3ForCausalLM", "gemma3_text"),
        ("Gemma3ForConditionalGeneration", "gemma3"),
    ],
    read,
};

/// Gemma 1.
const FIRST: Defaults = Defaults {
    kv_heads: Some(16),
    head_dim: Some(256),
    max_positions: 8192,
    tied: true,
    activation: ("hidden_act", "gelu_pytorch_tanh"),
    ..LLAMA
};
const SECOND: Defaults =
    Defaults { kv_heads: Some(4), activation: ("hidden_activation", "gelu_pytorch_tanh"), ..FIRST };
/// The published configs with images leave out what is the default.
const THIRD: Defaults = Defaults {
    sizes: Some([2304, 9216, 26, 8, 262_208]),
    max_positions: 131_072,
    theta: 1_000_000.0,
    ..SECOND
};

fn read(config: &ConfigFields<'_>) -> Result<ModelConfig> {
    let (second, third) = (config.class == "Gemma2ForCausalLM", config.class.starts_with("Gemma3"));
    let defaults = if third {
        THIRD
    } else if second {
        SECOND
    } else {
        FIRST
    };
    let mut sizes = Sizes::read(config, defaults)?;
    if !second && !third && sizes.activation == Activation::Gelu {
        // transformers has always computed Gemma 1 with tanh, whatever the config says.
        sizes.activation = Activation::GeluTanh;
    }
    let mut model = match third {
        true => third_layers(&sizes)?,
        false if second => second_layers(&sizes)?,
        false => {
            let attention = sizes.llama_attention()?;
            sizes.model(|_| LayerParts {
                norms: sizes.pre_norms(NormKind::RmsPlusOne, false),
                ..sizes.llama_layer(attention.clone(), false)
            })?
        }
    };
    model.embedding_multiplier = EmbeddingMultiplier::Rounded((sizes.hidden as f64).sqrt());
    if config.class == "Gemma3ForConditionalGeneration" {
        model.prefix = "language_model.model.".into();
        model.lm_head = "language_model.lm_head.weight".into();
    } else {
        let cap = if second { Some(30.0) } else { None };
        model.logits_softcap = softcap(config, "final_logit_softcapping", cap)?;
    }
    Ok(model)
}

fn second_layers(sizes: &Sizes<'_>) -> Result<ModelConfig> {
    let config = &sizes.config;
    let window = config.decoder.size("sliding_window")?.unwrap_or(4096);
    let windows = sizes.windows(Some(window), |layer| layer.is_multiple_of(2))?;
    let attention = AttentionConfig {
        scale: sizes.number("query_pre_attn_scalar", 256.0)?.powf(-0.5),
        softcap: softcap(config, "attn_logit_softcapping", Some(50.0))?,
        ..sizes.llama_attention()?
    };
    sizes.model(|layer| {
        let attention = AttentionConfig { window: windows[layer], ..attention.clone() };
        LayerParts { norms: four_norms(sizes), ..sizes.llama_layer(attention, false) }
    })
}

fn third_layers(sizes: &Sizes<'_>) -> Result<ModelConfig> {
    let fields = &sizes.config.decoder;
    if sizes.flag("use_bidirectional_attention", false)? {
        return Err(fields.error("use_bidirectional_attention", "false: only causal models are read", true));
    }
    let window = fields.size("sliding_window")?.unwrap_or(4096);
    let pattern = fields.size("sliding_window_pattern")?.unwrap_or(6);
    let windowed = sizes.windowed(|layer| !(layer + 1).is_multiple_of(pattern))?;
    let [near, far] = sizes.ropes_by_window(Some("rope_local_base_freq"), 10_000.0)?;
    let attention = AttentionConfig {
        scale: sizes.number("query_pre_attn_scalar", 256.0)?.powf(-0.5),
        qk_norms: Some(sizes.qk_norms(NormKind::RmsPlusOne)),
        ..sizes.attention(None, [sizes.flag("attention_bias", false)?; 2])
    };
    sizes.model(|layer| {
        let (window, rope) = if windowed[layer] { (Some(window), &near) } else { (None, &far) };
        let attention = AttentionConfig { window, rope: Some(rope.clone()), ..attention.clone() };
        LayerParts { norms: four_norms(sizes), ..sizes.llama_layer(attention, false) }
    })
}

/// Norms before both blocks and on the outputs of both.
fn four_norms(sizes: &Sizes<'_>) -> NormPositions {
    let norm = |path: &'static str| Some(sizes.norm(path, NormKind::RmsPlusOne, false));
    NormPositions {
        input: norm("input_layernorm"),
        attention_output: norm("post_attention_layernorm"),
        feed_forward: norm("pre_feedforward_layernorm"),
        feed_forward_output: norm("post_feedforward_layernorm"),
    }
}

/// `null` means none.
fn softcap(config: &ConfigFields<'_>, key: &str, missing: Option<f64>) -> Result<Option<f64>> {
    if config.decoder.has(key) { config.decoder.positive(key) } else { Ok(missing) }
}
