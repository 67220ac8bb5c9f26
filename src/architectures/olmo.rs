//! OLMo 2 and 3: no norms before the blocks but on their outputs, and norms over all queries and all keys.

use super::{
    AttentionConfig, ConfigFields, Family, LayerParts, ModelConfig, NormConfig, NormKind, NormPositions,
    RopeConfig, RopeScaling,
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
    let windowed = if third {
        sizes.windowed(|layer| !(layer + 1).is_multiple_of(4))?
    } else {
        vec![false; sizes.layers]
    };
    let window = if third { config.decoder.size("sliding_window")?.unwrap_or(4096) } else { 0 };
    let [near, far] = if third { ropes(&sizes)? } else { [sizes.rope()?, sizes.rope()?] };
    let plain = sizes.attention(None, [sizes.flag("attention_bias", false)?; 2]);
    let norm = |path: &'static str, features: usize| NormConfig {
        shape: vec![features],
        ..sizes.norm(path, NormKind::Rms, false)
    };
    let qk_norms =
        Some([norm("self_attn.q_norm", plain.width()), norm("self_attn.k_norm", plain.kv_width())]);
    sizes.model(|layer| {
        let (window, rope) = if windowed[layer] { (Some(window), &near) } else { (None, &far) };
        let (rope, qk_norms) = (Some(rope.clone()), qk_norms.clone());
        let norms = NormPositions {
            attention_output: Some(sizes.norm("post_attention_layernorm", NormKind::Rms, false)),
            feed_forward_output: Some(sizes.norm("post_feedforward_layernorm", NormKind::Rms, false)),
            ..NormPositions::default()
        };
        let attention = AttentionConfig { window, rope, qk_norms, ..plain.clone() };
        LayerParts { norms, ..sizes.llama_layer(attention, false) }
    })
}

/// OLMo 3: the rotary embeddings of layers with a window and of the others. Scaling is for the others alone.
fn ropes(sizes: &Sizes<'_>) -> Result<[RopeConfig; 2]> {
    let (config, defaults) = (&sizes.config, sizes.rope_defaults());
    let nested = config.decoder.get("rope_parameters").filter(|value| value.get("full_attention").is_some());
    let Some(nested) = nested else {
        let far = RopeConfig::read(config, defaults)?;
        return Ok([RopeConfig { theta: defaults.theta, scaling: RopeScaling::None, ..far.clone() }, far]);
    };
    let of = |key: &str| RopeConfig::from_layout(config, nested.get(key).map(|value| (key, value)), defaults);
    Ok([of("sliding_attention")?, of("full_attention")?])
}
