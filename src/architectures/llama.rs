//! Llama 1, 2 and 3, and InternLM3, which is a Llama under other keys.

use super::{
    ConfigFields, Family, ModelConfig,
    common::{Defaults, LLAMA, Sizes},
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family {
    classes: &[
        ("LlamaForCausalLM", "llama"),
        // As the first conversions of 2023 spell it.
        ("LLaMAForCausalLM", "llama"),
        ("InternLM3ForCausalLM", "internlm3"),
    ],
    read,
};

const INTERNLM3: Defaults = Defaults {
    kv_heads: Some(2),
    head_dim: Some(128),
    max_positions: 32_768,
    eps: ("rms_norm_eps", 1e-5),
    ..LLAMA
};

fn read(config: &ConfigFields<'_>) -> Result<ModelConfig> {
    let internlm = config.class == "InternLM3ForCausalLM";
    let sizes = Sizes::read(config, if internlm { INTERNLM3 } else { LLAMA })?;
    let [of_attention, of_mlp] = if internlm { ["qkv_bias", "bias"] } else { ["attention_bias", "mlp_bias"] };
    let attention = sizes.attention(Some(sizes.rope()?), [sizes.flag(of_attention, false)?; 2]);
    let bias = sizes.flag(of_mlp, false)?;
    sizes.model(|_| sizes.llama_layer(attention.clone(), bias))
}
