//! Granite 3: Llama with multipliers of embeddings, residuals, attention scores and logits.

use super::{
    AttentionConfig, ConfigFields, EmbeddingMultiplier, Family, LayerParts, ModelConfig,
    common::{LLAMA, Sizes},
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family { classes: &[("GraniteForCausalLM", "granite")], read };

fn read(config: &ConfigFields<'_>) -> Result<ModelConfig> {
    let sizes = Sizes::read(config, LLAMA)?;
    let attention =
        AttentionConfig { scale: sizes.number("attention_multiplier", 1.0)?, ..sizes.llama_attention()? };
    let bias = sizes.flag("mlp_bias", false)?;
    let residual_multiplier = sizes.number("residual_multiplier", 1.0)?;
    let layer = |_| LayerParts { residual_multiplier, ..sizes.llama_layer(attention.clone(), bias) };
    Ok(ModelConfig {
        embedding_multiplier: EmbeddingMultiplier::Exact(sizes.number("embedding_multiplier", 1.0)?),
        logits_multiplier: sizes.number("logits_scaling", 1.0)?.recip(),
        ..sizes.model(layer)?
    })
}
