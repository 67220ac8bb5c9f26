//! Mixtral: Mistral with experts.

use super::{
    AttentionConfig, ConfigFields, Family, FeedForward, FeedForwardConfig, LayerParts, LinearConfig,
    ModelConfig, RoutingConfig,
    common::{Defaults, LLAMA, Sizes},
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family { classes: &[("MixtralForCausalLM", "mixtral")], read };

const DEFAULTS: Defaults = Defaults {
    kv_heads: Some(8),
    max_positions: 131_072,
    eps: ("rms_norm_eps", 1e-5),
    theta: 1_000_000.0,
    ..LLAMA
};

fn read(config: &ConfigFields<'_>) -> Result<ModelConfig> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let attention = AttentionConfig {
        window: config.decoder.size("sliding_window")?,
        ..sizes.attention(Some(sizes.rope()?), [false; 2])
    };
    let wide = [sizes.intermediate, sizes.hidden];
    let expert = FeedForwardConfig {
        inputs: vec![LinearConfig::new("w1", wide, false), LinearConfig::new("w3", wide, false)],
        down: LinearConfig::new("w2", [sizes.hidden, sizes.intermediate], false),
        ..sizes.gated(false)
    };
    let routing = sizes.routing("block_sparse_moe.gate.weight", [8, 2])?;
    let routing = RoutingConfig { renormalized: true, ..routing };
    let below = |i: usize| expert.below(&format!("block_sparse_moe.experts.{i}"));
    let feed_forward =
        FeedForward { blocks: (0..routing.experts).map(below).collect(), routing: Some(routing) };
    sizes.model(|_| LayerParts {
        feed_forward: feed_forward.clone(),
        ..sizes.llama_layer(attention.clone(), false)
    })
}
