//! StarCoder2: LayerNorms, biases everywhere, and a feed-forward block without a gate.

use super::{
    AttentionConfig, ConfigFields, Family, LayerParts, ModelConfig, NormKind,
    common::{Defaults, LLAMA, Sizes},
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family { classes: &[("Starcoder2ForCausalLM", "starcoder2")], read };

const DEFAULTS: Defaults = Defaults {
    kv_heads: Some(2),
    max_positions: 4096,
    eps: ("norm_epsilon", 1e-5),
    tied: true,
    activation: ("hidden_act", "gelu_pytorch_tanh"),
    ..LLAMA
};

fn read(config: &ConfigFields<'_>) -> Result<ModelConfig> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let bias = sizes.flag("use_bias", true)?;
    let attention = AttentionConfig {
        window: config.decoder.size("sliding_window")?,
        ..sizes.attention(Some(sizes.rope()?), [bias; 2])
    };
    let layer = |_| LayerParts {
        feed_forward: sizes.plain(["mlp.c_fc", "mlp.c_proj"], bias).into(),
        norms: sizes.pre_norms(NormKind::Layer, true),
        ..sizes.llama_layer(attention.clone(), bias)
    };
    Ok(ModelConfig { final_norm: sizes.norm("norm", NormKind::Layer, true), ..sizes.model(layer)? })
}
