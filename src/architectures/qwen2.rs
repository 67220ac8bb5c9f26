//! Qwen2 and Qwen2.5: Llama with biases of q, k and v.

use super::{
    AttentionConfig, ConfigFields, Family, ModelConfig,
    common::{Defaults, LLAMA, Sizes},
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family { classes: &[("Qwen2ForCausalLM", "qwen2")], read };

pub(super) const DEFAULTS: Defaults = Defaults { kv_heads: Some(32), max_positions: 32_768, ..LLAMA };

fn read(config: &ConfigFields<'_>) -> Result<ModelConfig> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let windows = windows(&sizes)?;
    let attention = sizes.attention(Some(sizes.rope()?), [true, false]);
    sizes.model(|layer| {
        let attention = AttentionConfig { window: windows[layer], ..attention.clone() };
        sizes.llama_layer(attention, false)
    })
}

/// The window of each layer; with `use_sliding_window`, by default of the layers from `max_window_layers` on.
pub(super) fn windows(sizes: &Sizes<'_>) -> Result<Vec<Option<usize>>> {
    let fields = &sizes.config.decoder;
    let used = sizes.flag("use_sliding_window", false)?;
    // Without windows the key may hold anything, also 0.
    let window = match used && fields.has("sliding_window") {
        true => fields.size("sliding_window")?,
        false => Some(4096),
    };
    let first = fields.get("max_window_layers").and_then(serde_json::Value::as_u64).unwrap_or(28);
    let windows = sizes.windows(window, |layer| used && layer as u64 >= first)?;
    if !used && windows.iter().any(Option::is_some) {
        return Err(fields.error(
            "use_sliding_window",
            "true, as `layer_types` has sliding windows",
            "false",
        ));
    }
    Ok(windows)
}
