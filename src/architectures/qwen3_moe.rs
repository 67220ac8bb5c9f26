//! Qwen3-MoE: Qwen3 with experts.

use super::{
    AttentionConfig, ConfigFields, Family, LayerParts, ModelConfig,
    common::{Defaults, Sizes},
    qwen2, qwen2_moe, qwen3,
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family { classes: &[("Qwen3MoeForCausalLM", "qwen3_moe")], read };

const DEFAULTS: Defaults = Defaults { kv_heads: Some(4), ..qwen2::DEFAULTS };

fn read(config: &ConfigFields<'_>) -> Result<ModelConfig> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let used = sizes.flag("use_sliding_window", false)?;
    let window = if used { Some(config.decoder.size("sliding_window")?.unwrap_or(4096)) } else { None };
    let attention = AttentionConfig { window, ..qwen3::attention(&sizes)? };
    let width = config.decoder.size("moe_intermediate_size")?.unwrap_or(768);
    let experts = qwen2_moe::experts(&sizes, sizes.routing("mlp.gate.weight", [128, 8])?, width);
    let sparse = qwen2_moe::sparse(&sizes)?;
    sizes.model(|layer| {
        let plain = sizes.llama_layer(attention.clone(), false);
        if sparse[layer] { LayerParts { feed_forward: experts.clone(), ..plain } } else { plain }
    })
}
