//! Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts, and a block beside them that all tokens go through.

use super::{
    AttentionConfig, ConfigFields, Family, FeedForward, FeedForwardConfig, LayerParts, LinearConfig,
    ModelConfig, RoutingConfig,
    common::{Defaults, Sizes},
    qwen2,
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family { classes: &[("Qwen2MoeForCausalLM", "qwen2_moe")], read };

const DEFAULTS: Defaults = Defaults { kv_heads: Some(16), ..qwen2::DEFAULTS };

fn read(config: &ConfigFields<'_>) -> Result<ModelConfig> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let fields = &config.decoder;
    let used = sizes.flag("use_sliding_window", false)?;
    let window = if used { fields.size("sliding_window")?.unwrap_or(4096) } else { 4096 };
    let last = fields.get("max_window_layers").and_then(serde_json::Value::as_u64).unwrap_or(28);
    let windows =
        sizes.windows(Some(window), |layer| used && layer.is_multiple_of(2) && (layer as u64) < last)?;
    let attention = sizes.attention(Some(sizes.rope()?), [sizes.flag("qkv_bias", true)?, false]);
    let routing = RoutingConfig {
        shared_gate: Some("mlp.shared_expert_gate.weight"),
        ..sizes.routing("mlp.gate.weight", [60, 4])?
    };
    let width = fields.size("moe_intermediate_size")?.unwrap_or(1408);
    let mut experts = experts(&sizes, routing, width);
    let width = fields.size("shared_expert_intermediate_size")?.unwrap_or(5632);
    experts.blocks.push(block(&sizes, width).below("mlp.shared_expert"));
    let sparse = sparse(&sizes)?;
    sizes.model(|layer| {
        let attention = AttentionConfig { window: windows[layer], ..attention.clone() };
        let plain = sizes.llama_layer(attention, false);
        if sparse[layer] { LayerParts { feed_forward: experts.clone(), ..plain } } else { plain }
    })
}

/// A gated block of another width than the model's own.
fn block(sizes: &Sizes<'_>, width: usize) -> FeedForwardConfig {
    let wide = |path: &str| LinearConfig::new(path, [width, sizes.hidden], false);
    FeedForwardConfig {
        inputs: vec![wide("gate_proj"), wide("up_proj")],
        down: LinearConfig::new("down_proj", [sizes.hidden, width], false),
        ..sizes.gated(false)
    }
}

/// Experts of a width, under Qwen's names.
pub(super) fn experts(sizes: &Sizes<'_>, routing: RoutingConfig, width: usize) -> FeedForward {
    let expert = block(sizes, width);
    let below = |i: usize| expert.below(&format!("mlp.experts.{i}"));
    FeedForward { blocks: (0..routing.experts).map(below).collect(), routing: Some(routing) }
}

/// Which layers have experts.
pub(super) fn sparse(sizes: &Sizes<'_>) -> Result<Vec<bool>> {
    let (fields, key) = (&sizes.config.decoder, "mlp_only_layers");
    let step = fields.size("decoder_sparse_step")?.unwrap_or(1);
    let dense = fields.token_ids(key)?;
    Ok((0..sizes.layers)
        .map(|layer| !dense.contains(&(layer as u32)) && (layer + 1).is_multiple_of(step))
        .collect())
}
