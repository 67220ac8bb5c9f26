//! Rotary position embedding as `config.json` describes it, in the layouts of transformers 4
//! (`rope_theta` and `rope_scaling`) and 5 (`rope_parameters`).

use crate::{
    checkpoint::fields::Fields,
    error::{Error, Result},
};
use serde_json::Value;
use std::path::Path;

/// Base θ when the config names none, for Llama and Mistral alike.
const DEFAULT_THETA: f64 = 10_000.0;

/// Rotary position embedding: inverse frequency `i` is `theta^(−2i/head_dim)`, then scaled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base θ, above 0.
    pub theta: f64,
    /// What is done to the inverse frequencies.
    pub scaling: RopeScaling,
}

/// How inverse frequencies are scaled for long contexts. Lengths are in tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Inverse frequencies divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// NTK-aware: θ grows with the length of a sequence longer than `original_max`; shorter ones are unscaled.
    Dynamic {
        /// At least 1.
        factor: f64,
        /// The model's `max_position_embeddings`: what transformers compares the length with, whatever the
        /// scaling's own `original_max_position_embeddings` says.
        original_max: usize,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are scaled in full.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept; above
        /// `low_freq_factor`.
        high_freq_factor: f64,
        /// Context of the first training.
        original_max_position_embeddings: usize,
    },
}

impl Rope {
    /// Reads the keys of either layout from the fields of `config.json`.
    pub(super) fn from_fields(path: &Path, config: &Fields<'_>, max_positions: usize) -> Result<Self> {
        let old = config.get("rope_scaling").map(|value| ("rope_scaling", value));
        let new = config.get("rope_parameters").map(|value| ("rope_parameters", value));
        let from_old = Self::from_layout(path, config, old, max_positions)?;
        let Some(_) = new else { return Ok(from_old) };
        let from_new = Self::from_layout(path, config, new, max_positions)?;
        // Beside `rope_scaling`, transformers passes all of `rope_parameters` over, its theta too.
        let old_differs = match old {
            Some(_) => from_old != from_new,
            None => config.get("rope_theta").is_some() && from_old.theta != from_new.theta,
        };
        if old_differs {
            let expected = format!("the same rotary embedding as the older keys, {from_old:?}");
            return Err(config.error("rope_parameters", expected, format_args!("{from_new:?}")));
        }
        Ok(from_new)
    }

    fn from_layout(
        path: &Path,
        config: &Fields<'_>,
        section: Option<(&str, &Value)>,
        max_positions: usize,
    ) -> Result<Self> {
        let whole = |fields: &Fields<'_>| -> Result<()> {
            match fields.positive("partial_rotary_factor")? {
                Some(part) if part != 1.0 => {
                    Err(fields.error("partial_rotary_factor", "1: all of a head is rotated", part))
                }
                _ => Ok(()),
            }
        };
        whole(config)?;
        let theta = config.positive("rope_theta")?.unwrap_or(DEFAULT_THETA);
        let Some((key, value)) = section else { return Ok(Self { theta, scaling: RopeScaling::None }) };
        let fields = Fields::new(path, key, value)?;
        whole(&fields)?;
        if let Some((name, value)) = fields.entries().find(|(_, value)| value.is_object()) {
            return Err(fields.error(name, "one rotary embedding for all layers", value));
        }
        let theta = fields.positive("rope_theta")?.unwrap_or(theta);
        let scaling = RopeScaling::from_fields(&fields, max_positions)?;
        if let RopeScaling::Llama3 { original_max_position_embeddings: original, .. } = scaling {
            // transformers 5 prefers this one, transformers 4 the other.
            let name = "original_max_position_embeddings";
            if let Some(outer) = config.size(name)?.filter(|outer| *outer != original) {
                return Err(config.error(name, format_args!("{original}, as in `{key}`"), outer));
            }
        }
        Ok(Self { theta, scaling })
    }
}

impl RopeScaling {
    fn from_fields(fields: &Fields<'_>, max_positions: usize) -> Result<Self> {
        let key = if fields.has("rope_type") || !fields.has("type") { "rope_type" } else { "type" };
        Ok(match fields.text(key)?.unwrap_or("default") {
            "default" => Self::None,
            "linear" => Self::Linear { factor: factor(fields)? },
            "dynamic" => Self::Dynamic { factor: factor(fields)?, original_max: max_positions },
            "llama3" => {
                let low_freq_factor = fields.required_positive("low_freq_factor")?;
                let high_freq_factor = fields.required_positive("high_freq_factor")?;
                if high_freq_factor <= low_freq_factor {
                    let expected = format!("a number above low_freq_factor {low_freq_factor}");
                    return Err(fields.error("high_freq_factor", expected, high_freq_factor));
                }
                Self::Llama3 {
                    factor: factor(fields)?,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings: fields
                        .required_size("original_max_position_embeddings")?,
                }
            }
            other => return Err(unknown_type(fields, key, other)),
        })
    }
}

fn factor(fields: &Fields<'_>) -> Result<f64> {
    let factor = fields.required_positive("factor")?;
    if factor < 1.0 {
        return Err(fields.error("factor", "a number of at least 1", factor));
    }
    Ok(factor)
}

fn unknown_type(fields: &Fields<'_>, key: &str, found: &str) -> Error {
    fields.error(key, "`default`, `linear`, `dynamic` or `llama3`", format_args!("`{found}`"))
}
