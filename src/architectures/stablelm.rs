//! StableLM 2: LayerNorms with biases, and a rotary embedding of a part of each head.

use super::{
    ConfigFields, Family, LayerParts, ModelConfig, NormKind,
    common::{Defaults, LLAMA, Sizes},
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family { classes: &[("StableLmForCausalLM", "stablelm")], read };

const DEFAULTS: Defaults = Defaults {
    kv_heads: Some(32),
    max_positions: 4096,
    eps: ("layer_norm_eps", 1e-5),
    partial_rotary: Some(0.25),
    ..LLAMA
};

fn read(config: &ConfigFields<'_>) -> Result<ModelConfig> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    if sizes.flag("qk_layernorm", false)? {
        let expected = "false: models with norms of queries and keys are not read";
        return Err(config.decoder.error("qk_layernorm", expected, true));
    }
    let attention = sizes.attention(Some(sizes.rope()?), [sizes.flag("use_qkv_bias", false)?, false]);
    let parallel = sizes.flag("use_parallel_residual", false)?;
    let mut norms = sizes.pre_norms(NormKind::Layer, true);
    if parallel {
        norms.feed_forward = None;
    }
    let layer =
        |_| LayerParts { norms: norms.clone(), parallel, ..sizes.llama_layer(attention.clone(), false) };
    Ok(ModelConfig { final_norm: sizes.norm("norm", NormKind::Layer, true), ..sizes.model(layer)? })
}
