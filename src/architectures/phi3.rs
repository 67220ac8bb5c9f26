//! Phi-3, Phi-3.5 and Phi-4: Llama with fused projections, and a rotary embedding of a part of each head.

use super::{
    AttentionConfig, ConfigFields, Family, LayerParts, LinearConfig, ModelConfig, RopeConfig,
    common::{Defaults, LLAMA, Sizes},
    rope::RopeDefaults,
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family { classes: &[("Phi3ForCausalLM", "phi3")], read };

const DEFAULTS: Defaults =
    Defaults { max_positions: 4096, eps: ("rms_norm_eps", 1e-5), partial_rotary: Some(1.0), ..LLAMA };

fn read(config: &ConfigFields<'_>) -> Result<ModelConfig> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let defaults = RopeDefaults { original_max: Some(4096), ..sizes.rope_defaults() };
    let separate = sizes.attention(Some(RopeConfig::read(config, defaults)?), [false; 2]);
    let rows = separate.width() + 2 * separate.kv_width();
    let attention = AttentionConfig {
        projections: vec![LinearConfig::new("self_attn.qkv_proj", [rows, sizes.hidden], false)],
        window: config.decoder.size("sliding_window")?,
        ..separate
    };
    sizes.model(|_| LayerParts {
        feed_forward: sizes.fused_gated().into(),
        ..sizes.llama_layer(attention.clone(), false)
    })
}
