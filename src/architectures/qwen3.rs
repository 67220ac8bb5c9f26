//! Qwen3: Llama with norms of each head's queries and keys.

use super::{
    AttentionConfig, ConfigFields, Family, ModelConfig, NormKind,
    common::{Defaults, Sizes},
    qwen2,
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family { classes: &[("Qwen3ForCausalLM", "qwen3")], read };

pub(super) const DEFAULTS: Defaults = Defaults { head_dim: Some(128), ..qwen2::DEFAULTS };

fn read(config: &ConfigFields<'_>) -> Result<ModelConfig> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let windows = qwen2::windows(&sizes)?;
    let attention = attention(&sizes)?;
    sizes.model(|layer| {
        let attention = AttentionConfig { window: windows[layer], ..attention.clone() };
        sizes.llama_layer(attention, false)
    })
}

/// Attention with norms of queries and keys.
pub(super) fn attention(sizes: &Sizes<'_>) -> Result<AttentionConfig> {
    Ok(AttentionConfig { qk_norms: Some(sizes.qk_norms(NormKind::Rms)), ..sizes.llama_attention()? })
}
