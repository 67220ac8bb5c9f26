//! SmolLM3: Llama with layers that have no rotary embedding.

use super::{
    AttentionConfig, ConfigFields, Family, ModelConfig,
    common::{Defaults, LLAMA, Sizes},
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family { classes: &[("SmolLM3ForCausalLM", "smollm3")], read };

const DEFAULTS: Defaults =
    Defaults { kv_heads: Some(4), max_positions: 32_768, tied: true, theta: 2_000_000.0, ..LLAMA };

fn read(config: &ConfigFields<'_>) -> Result<ModelConfig> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let rotated = rotated(&sizes)?;
    let used = sizes.flag("use_sliding_window", false)?;
    let window = config.decoder.size("sliding_window")?.filter(|_| used);
    let windows = sizes.windows(window, |layer| !rotated[layer])?;
    let (rope, bias) = (sizes.rope()?, sizes.flag("mlp_bias", false)?);
    let attention = sizes.attention(None, [sizes.flag("attention_bias", false)?; 2]);
    sizes.model(|layer| {
        let rope = rotated[layer].then(|| rope.clone());
        sizes.llama_layer(AttentionConfig { rope, window: windows[layer], ..attention.clone() }, bias)
    })
}

/// Which layers have the rotary embedding; by default all but every fourth.
fn rotated(sizes: &Sizes<'_>) -> Result<Vec<bool>> {
    let (fields, key) = (&sizes.config.decoder, "no_rope_layers");
    let interval = fields.size("no_rope_layer_interval")?.unwrap_or(4);
    let Some(list) = fields.get(key) else {
        return Ok((1..=sizes.layers).map(|layer| !layer.is_multiple_of(interval)).collect());
    };
    // In spite of the key's name, 1 stands for a layer that has it.
    let all: Option<Vec<bool>> =
        list.as_array().and_then(|list| list.iter().map(|of| Some(of.as_u64()? != 0)).collect());
    all.filter(|all| all.len() == sizes.layers)
        .ok_or_else(|| fields.error(key, format_args!("0 or 1 for each of {} layers", sizes.layers), list))
}
