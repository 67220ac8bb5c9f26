//! Mistral and Ministral: Llama with a sliding window in all layers, in some, or in none, and without biases.

use super::{
    AttentionConfig, ConfigFields, Family, ModelConfig,
    common::{Defaults, LLAMA, Sizes},
};
use crate::error::Result;

pub(super) const FAMILY: Family =
    Family { classes: &[("MistralForCausalLM", "mistral"), ("MinistralForCausalLM", "ministral")], read };

const DEFAULTS: Defaults = Defaults { kv_heads: Some(8), max_positions: 131_072, ..LLAMA };

fn read(config: &ConfigFields<'_>) -> Result<ModelConfig> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let fields = &config.decoder;
    let window = if fields.has("sliding_window") { fields.size("sliding_window")? } else { Some(4096) };
    let windows = sizes.windows(window, |_| true)?;
    let attention = sizes.attention(Some(sizes.rope()?), [false; 2]);
    sizes.model(|layer| {
        sizes.llama_layer(AttentionConfig { window: windows[layer], ..attention.clone() }, false)
    })
}
