//! Cohere's Command R and Aya: attention and feed-forward block in parallel after one LayerNorm.

use super::{
    AttentionConfig, ConfigFields, Family, LayerParts, ModelConfig, NormConfig, NormKind, NormPositions,
    common::{Defaults, LLAMA, Sizes},
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family { classes: &[("CohereForCausalLM", "cohere")], read };

const DEFAULTS: Defaults = Defaults {
    max_positions: 8192,
    eps: ("layer_norm_eps", 1e-5),
    tied: true,
    theta: 500_000.0,
    interleaved: true,
    ..LLAMA
};

fn read(config: &ConfigFields<'_>) -> Result<ModelConfig> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    // Each head has weights of its own.
    let norm = |path, heads| NormConfig {
        shape: vec![heads, sizes.head_dim],
        ..sizes.norm(path, NormKind::Layer, false)
    };
    let qk_norms = sizes
        .flag("use_qk_norm", false)?
        .then(|| [norm("self_attn.q_norm", sizes.heads), norm("self_attn.k_norm", sizes.kv_heads)]);
    let attention = AttentionConfig { qk_norms, ..sizes.llama_attention()? };
    let norms = NormPositions {
        input: Some(sizes.norm("input_layernorm", NormKind::Layer, false)),
        ..NormPositions::default()
    };
    let layer = |_| LayerParts {
        norms: norms.clone(),
        parallel: true,
        ..sizes.llama_layer(attention.clone(), false)
    };
    Ok(ModelConfig { logits_multiplier: sizes.number("logit_scale", 0.0625)?, ..sizes.model(layer)? })
}
