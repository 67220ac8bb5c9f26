//! Rotary position embedding as `config.json` describes it, in the layouts of transformers 4
//! (`rope_theta` and `rope_scaling`) and 5 (`rope_parameters`).

use serde_json::{Map, Value};

use super::ConfigFields;
use crate::{
    error::{Error, Result},
    json::Fields,
};

/// Rotary position embedding: inverse frequency `i` is `theta^(−2i/rotary_dim)`, then scaled.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base θ, above 0.
    pub theta: f64,
    /// Scaling of the inverse frequencies.
    pub scaling: RopeScaling,
    /// Number of rotated features of a head, the first ones; even.
    pub rotary_dim: usize,
    /// Whether neighbouring features are rotated together, rather than feature `i` with `i + rotary_dim/2`.
    pub interleaved: bool,
}

/// Scaling of inverse frequencies for long contexts. Lengths are in tokens.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
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
        /// The model's `max_position_embeddings`. As in transformers, the length is compared with it, and the scaling's own
        /// `original_max_position_embeddings` is ignored.
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
    /// YaRN (arXiv 2309.00071): as Llama 3.1's, with a ramp over dimensions, and cosines and sines multiplied.
    Yarn {
        /// At least 1.
        factor: f64,
        /// Turns within the first context from which on a frequency is kept.
        beta_fast: f64,
        /// Turns up to which it is divided by `factor`.
        beta_slow: f64,
        /// Whether the ramp begins and ends at whole dimensions.
        truncate: bool,
        /// Context of the first training.
        original_max_position_embeddings: usize,
        /// Cosines and sines are multiplied by it.
        attention_factor: f64,
    },
    /// LongRoPE (arXiv 2402.13753): each frequency divided by a factor of its own.
    LongRope {
        /// For sequences within the first context, `rotary_dim/2` factors.
        short_factor: Vec<f64>,
        /// For longer ones.
        long_factor: Vec<f64>,
        /// Context of the first training.
        original_max_position_embeddings: usize,
        /// Cosines and sines are multiplied by it.
        attention_factor: f64,
    },
}

/// A family's defaults of the rotary embedding.
#[derive(Clone, Copy)]
pub(super) struct RopeDefaults {
    /// The base, if the config has none.
    pub(super) theta: f64,
    /// Features of a head.
    pub(super) head_dim: usize,
    /// The part of a head that is rotated, if the config has none; `None` if it always is the whole head.
    pub(super) partial: Option<f64>,
    /// Whether neighbouring features are rotated together.
    pub(super) interleaved: bool,
    /// The model's longest sequence.
    pub(super) max_positions: usize,
    /// Context of the first training, if the config has none; `None`: the longest sequence.
    pub(super) original_max: Option<usize>,
}

impl RopeConfig {
    /// Reads the keys of either layout.
    pub(super) fn read(config: &ConfigFields<'_>, defaults: RopeDefaults) -> Result<Self> {
        let fields = &config.decoder;
        let old = fields.get("rope_scaling").map(|value| ("rope_scaling", value));
        let new = fields.get("rope_parameters").map(|value| ("rope_parameters", value));
        let from_old = Self::from_layout(config, old, defaults)?;
        let Some(_) = new else { return Ok(from_old) };
        let from_new = Self::from_layout(config, new, defaults)?;
        // With `rope_scaling`, transformers ignores all of `rope_parameters`, including its theta.
        let old_differs = match old {
            Some(_) => from_old != from_new,
            None => fields.get("rope_theta").is_some() && from_old.theta != from_new.theta,
        };
        if old_differs {
            let expected = format!("the same rotary embedding as the older keys, {from_old:?}");
            return Err(fields.error("rope_parameters", expected, format_args!("{from_new:?}")));
        }
        Ok(from_new)
    }

    /// Reads `section`, e.g. `rope_parameters.full_attention`; without a section there is no scaling.
    pub(super) fn from_layout(
        config: &ConfigFields<'_>,
        section: Option<(&str, &Value)>,
        defaults: RopeDefaults,
    ) -> Result<Self> {
        let outer = &config.decoder;
        let theta = outer.positive("rope_theta")?.unwrap_or(defaults.theta);
        let part = outer.positive("partial_rotary_factor")?;
        let finish = |fields: &Fields<'_>, theta, scaling, part: Option<f64>| {
            let (rotary_dim, interleaved) = (rotary_dim(fields, defaults, part)?, defaults.interleaved);
            Ok(Self { theta, scaling, rotary_dim, interleaved })
        };
        let Some((key, value)) = section else { return finish(outer, theta, RopeScaling::None, part) };
        let fields = Fields::new(config.path, key, value)?;
        if let Some((name, value)) = fields.entries().find(|(_, value)| value.is_object()) {
            return Err(fields.error(name, "one rotary embedding for all layers", value));
        }
        let part = fields.positive("partial_rotary_factor")?.or(part);
        let theta = fields.positive("rope_theta")?.unwrap_or(theta);
        let rotary = rotary_dim(&fields, defaults, part)?;
        let scaling = RopeScaling::from_fields(&fields, outer, key, rotary, defaults)?;
        finish(&fields, theta, scaling, part)
    }
}

/// Number of rotated features of a head.
fn rotary_dim(fields: &Fields<'_>, defaults: RopeDefaults, part: Option<f64>) -> Result<usize> {
    let key = "partial_rotary_factor";
    match (defaults.partial, part) {
        (None, Some(part)) if part != 1.0 => Err(fields.error(key, "1: all of a head is rotated", part)),
        (None, _) => Ok(defaults.head_dim),
        (Some(default), part) => {
            let part = part.unwrap_or(default);
            let rotary = (defaults.head_dim as f64 * part) as usize;
            if part > 1.0 || rotary == 0 || !rotary.is_multiple_of(2) {
                let head_dim = defaults.head_dim;
                let expected =
                    format!("a part up to 1 that gives an even number of a head's {head_dim} features");
                return Err(fields.error(key, expected, part));
            }
            Ok(rotary)
        }
    }
}

/// Adds the keys of transformers 4 to the decoder's part of a config that has those of transformers 5. Programs that are built on
/// transformers 4 read only `rope_theta`, `rope_scaling` and `partial_rotary_factor`, and would compute with a base of 10000 without a
/// word. Keys that are there stay as they are.
///
/// Layers with a window can have parameters of their own. Of these, transformers 4 reads the base alone (`rope_local_base_freq`, in
/// Gemma 3), so the older keys describe the other layers.
pub fn add_older_keys(decoder: &mut Map<String, Value>) {
    let Some(Value::Object(parameters)) = decoder.get("rope_parameters").cloned() else { return };
    let section = |key: &str| parameters.get(key).and_then(Value::as_object);
    let main = section("full_attention").unwrap_or(&parameters);
    let Some(theta) = main.get("rope_theta") else { return };
    let mut older = vec![("rope_theta", theta.clone()), ("rope_scaling", older_scaling(main))];
    let near = section("sliding_attention").and_then(|near| near.get("rope_theta"));
    older.extend(near.map(|theta| ("rope_local_base_freq", theta.clone())));
    let beside = ["partial_rotary_factor", "original_max_position_embeddings"];
    // Phi 3 refuses a longer `rope_scaling`.
    let beside = &beside[..if is_longrope(main) { 2 } else { 1 }];
    older.extend(beside.iter().filter_map(|key| Some((*key, main.get(*key)?.clone()))));
    for (key, value) in older {
        decoder.entry(key).or_insert(value);
    }
}

fn kind(parameters: &Map<String, Value>) -> Option<&Value> {
    parameters.get("rope_type").or_else(|| parameters.get("type"))
}

fn is_longrope(parameters: &Map<String, Value>) -> bool {
    kind(parameters).is_some_and(|kind| kind == "longrope")
}

/// `rope_scaling` for these `rope_parameters`; null where there is no scaling.
fn older_scaling(parameters: &Map<String, Value>) -> Value {
    let Some(kind) = kind(parameters).filter(|kind| *kind != "default") else { return Value::Null };
    let mut scaling = parameters.clone();
    let elsewhere = ["rope_theta", "partial_rotary_factor"].into_iter();
    let of_longrope = ["rope_type", "original_max_position_embeddings"].into_iter();
    for key in elsewhere.chain(of_longrope.filter(|_| is_longrope(parameters))) {
        scaling.shift_remove(key);
    }
    // Until transformers 4.43 the key was `type`.
    scaling.insert("type".into(), kind.clone());
    Value::Object(scaling)
}

impl RopeScaling {
    fn from_fields(
        fields: &Fields<'_>,
        outer: &Fields<'_>,
        section: &str,
        rotary_dim: usize,
        defaults: RopeDefaults,
    ) -> Result<Self> {
        let key = if fields.has("rope_type") || !fields.has("type") { "rope_type" } else { "type" };
        let original = "original_max_position_embeddings";
        // transformers 5 prefers the one beside the section, transformers 4 the one in it.
        let original_max = |required: bool| -> Result<usize> {
            let inner = match required && outer.get(original).is_none() {
                true => Some(fields.required_size(original)?),
                false => fields.size(original)?,
            };
            match (inner, outer.size(original)?) {
                (Some(inner), Some(outside)) if inner != outside => {
                    Err(outer.error(original, format_args!("{inner}, as in `{section}`"), outside))
                }
                (inner, outside) => {
                    Ok(inner.or(outside).or(defaults.original_max).unwrap_or(defaults.max_positions))
                }
            }
        };
        Ok(match fields.text(key)?.unwrap_or("default") {
            "default" => Self::None,
            "linear" => Self::Linear { factor: factor(fields)? },
            "dynamic" => Self::Dynamic { factor: factor(fields)?, original_max: defaults.max_positions },
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
                    original_max_position_embeddings: original_max(true)?,
                }
            }
            "longrope" | "su" => {
                let original_max = original_max(false)?;
                let factors = |key: &str| {
                    let expected = format!("{} numbers above 0, one for each frequency", rotary_dim / 2);
                    let list =
                        fields.positives(key)?.ok_or_else(|| fields.error(key, &expected, "nothing"))?;
                    match list.len() == rotary_dim / 2 {
                        true => Ok(list),
                        false => Err(fields.error(key, &expected, format_args!("{} of them", list.len()))),
                    }
                };
                let stretch = stretch(fields, original_max, defaults)?;
                let longer = (1.0 + stretch.ln() / (original_max as f64).ln()).sqrt();
                Self::LongRope {
                    short_factor: factors("short_factor")?,
                    long_factor: factors("long_factor")?,
                    original_max_position_embeddings: original_max,
                    attention_factor: fields.positive("attention_factor")?.unwrap_or(if stretch <= 1.0 {
                        1.0
                    } else {
                        longer
                    }),
                }
            }
            "yarn" => {
                let original_max = original_max(false)?;
                let factor = stretch(fields, original_max, defaults)?;
                let grown = |by: f64| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
                let growth = match (fields.positive("mscale")?, fields.positive("mscale_all_dim")?) {
                    (Some(mscale), Some(all)) => grown(mscale) / grown(all),
                    _ => grown(1.0),
                };
                Self::Yarn {
                    factor,
                    beta_fast: fields.positive("beta_fast")?.unwrap_or(32.0),
                    beta_slow: fields.positive("beta_slow")?.unwrap_or(1.0),
                    truncate: fields.boolean("truncate")?.unwrap_or(true),
                    original_max_position_embeddings: original_max,
                    attention_factor: fields.positive("attention_factor")?.unwrap_or(growth),
                }
            }
            other => return Err(unknown_type(fields, key, other)),
        })
    }
}

/// `factor`, or how much longer the longest sequence is than those of the first training.
fn stretch(fields: &Fields<'_>, original_max: usize, defaults: RopeDefaults) -> Result<f64> {
    match fields.get("factor") {
        Some(_) => factor(fields),
        None => Ok(defaults.max_positions as f64 / original_max as f64),
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
    let expected = "`default`, `linear`, `dynamic`, `llama3`, `yarn` or `longrope`";
    fields.error(key, expected, format_args!("`{found}`"))
}
