//! GLM-4-0414: norms before and after both blocks, neighbouring features rotated together, gate and up in one linear.

use super::{
    ConfigFields, Family, LayerParts, ModelConfig, NormKind, NormPositions,
    common::{Defaults, LLAMA, Sizes},
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family { classes: &[("Glm4ForCausalLM", "glm4")], read };

const DEFAULTS: Defaults = Defaults {
    kv_heads: Some(2),
    head_dim: Some(128),
    max_positions: 131_072,
    eps: ("rms_norm_eps", 1.5625e-7),
    partial_rotary: Some(0.5),
    interleaved: true,
    ..LLAMA
};

fn read(config: &ConfigFields<'_>) -> Result<ModelConfig> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let attention = sizes.attention(Some(sizes.rope()?), [sizes.flag("attention_bias", true)?, false]);
    let norms = NormPositions {
        attention_output: Some(sizes.norm("post_self_attn_layernorm", NormKind::Rms, false)),
        feed_forward_output: Some(sizes.norm("post_mlp_layernorm", NormKind::Rms, false)),
        ..sizes.pre_norms(NormKind::Rms, false)
    };
    sizes.model(|_| LayerParts {
        feed_forward: sizes.fused_gated().into(),
        norms: norms.clone(),
        ..sizes.llama_layer(attention.clone(), false)
    })
}
