//! OLMo 2 and 3: no norms before the blocks but on their outputs, and norms over all queries and all keys.

use super::{
    AttentionConfig, ConfigFields, Family, LayerParts, ModelConfig, NormConfig, NormKind, NormPositions,
    common::{Defaults, LLAMA, Sizes},
};
use crate::error::Result;

pub(super) const FAMILY: Family =
    Family { classes: &[("Olmo2ForCausalLM", "olmo2"), ("Olmo3ForCausalLM", "olmo3")], read };

const DEFAULTS: Defaults = Defaults { eps: ("rms_norm_eps", 1e-5), ..LLAMA };

fn read(config: &ConfigFields<'_>) -> Result<ModelConfig> {
    let third = config.class == "Olmo3ForCausalLM";
    let theta = if third { 500_000.0 } else { DEFAULTS.theta };
    let sizes = Sizes::read(config, Defaults { theta, ..DEFAULTS })?;
    let (windows, [near, far]) = if third {
        let window = config.decoder.size("sliding_window")?.unwrap_or(4096);
        let windows = sizes.windows(Some(window), |layer| !(layer + 1).is_multiple_of(4))?;
        (windows, sizes.ropes_by_window(None, theta)?)
    } else {
        (vec![None; sizes.layers], [sizes.rope()?, sizes.rope()?])
    };
    let plain = sizes.attention(None, [sizes.flag("attention_bias", false)?; 2]);
    let norm = |path: &'static str, features: usize| NormConfig {
        shape: vec![features],
        ..sizes.norm(path, NormKind::Rms, false)
    };
    let qk_norms =
        Some([norm("self_attn.q_norm", plain.width()), norm("self_attn.k_norm", plain.kv_width())]);
    sizes.model(|layer| {
        let (window, qk_norms) = (windows[layer], qk_norms.clone());
        let rope = Some(if window.is_some() { near.clone() } else { far.clone() });
        let norms = NormPositions {
            attention_output: Some(sizes.norm("post_attention_layernorm", NormKind::Rms, false)),
            feed_forward_output: Some(sizes.norm("post_feedforward_layernorm", NormKind::Rms, false)),
            ..NormPositions::default()
        };
        let attention = AttentionConfig { window, rope, qk_norms, ..plain.clone() };
        LayerParts { norms, ..sizes.llama_layer(attention, false) }
    })
}
