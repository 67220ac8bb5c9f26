//! Seed-OSS: Llama with biases of q, k and v.

use super::{
    ConfigFields, Family, ModelConfig,
    common::{Defaults, LLAMA, Sizes},
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family { classes: &[("SeedOssForCausalLM", "seed_oss")], read };

const DEFAULTS: Defaults =
    Defaults { kv_heads: Some(8), head_dim: Some(128), max_positions: 524_288, ..LLAMA };

fn read(config: &ConfigFields<'_>) -> Result<ModelConfig> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let biases = [sizes.flag("attention_bias", true)?, sizes.flag("attention_out_bias", false)?];
    let (attention, bias) = (sizes.attention(Some(sizes.rope()?), biases), sizes.flag("mlp_bias", false)?);
    sizes.model(|_| sizes.llama_layer(attention.clone(), bias))
}
