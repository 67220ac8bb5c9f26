//! The settings of a run: variants, calibration text, and how to compute. They are checked before any work.

use std::{fmt, path::Path};

use serde::{Deserialize, Serialize};

use crate::{
    accuracy::{AccuracyOptions, Quality, ScaleSearch, Scales},
    architectures::ModelConfig,
    error::{Error, Result, toml_error},
    folder,
    variant::{Output, Variant, VariantSet},
};

/// The settings that decide the content of the branches and their computation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Plan {
    /// Recipes, files or folders of text, each with its share of the windows. In a file: a string, or a list of them.
    #[serde(with = "one_or_many")]
    pub dataset: Vec<DatasetShare>,
    /// The split of a folder of parquet files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    /// The column of text in parquet and JSON lines.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_column: Option<String>,
    /// Calibration windows.
    pub samples: usize,
    /// Tokens a window.
    pub seq_len: usize,
    /// Whether windows may be longer than `max_position_embeddings`, if the model's rotary embedding is scaled.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub allow_long_windows: bool,
    /// Seed of the windows' places in the text.
    pub seed: u64,
    /// The branches to make.
    pub variants: Vec<Output>,
    /// The variant of the branch `main`; by default `4bit-128g`, if the run makes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub main: Option<Variant>,
    /// Damping, as a fraction of the Hessian's mean diagonal; overrides the preset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damp: Option<f64>,
    /// Preset of the accuracy options.
    pub quality: Quality,
    /// Whether scales may be negative; overrides the preset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signed_scales: Option<bool>,
    /// Search for scales; overrides the preset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale_search: Option<ScaleSearch>,
    /// Group-aware order in variants without act order; overrides the preset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub act_group_aware: Option<bool>,
    /// Strength of asymmetric calibration, from 0 to 1; overrides the preset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub asymmetric: Option<f64>,
    /// Part of the calibration windows, from 0 to 1, whose gradients give the output Hessians; overrides the preset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_hessian: Option<f64>,
    /// Folded rotations of the weights; overrides the preset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rotate: Option<bool>,
    /// Equalization of norms and the linears behind them; overrides the preset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub equalize: Option<bool>,
    /// Shrinkage: damping by the spectrum of each Hessian; overrides the preset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shrinkage: Option<bool>,
    /// Whether all variants share the Hessians of the unquantized model.
    pub shared_hessian: bool,
    /// Reaction to a linear without a numerical solution.
    pub on_failure: OnFailure,
    /// Data type of forward passes.
    pub compute_dtype: ComputeDtype,
    /// Device: `auto`, `cpu`, `cuda:N`, or several CUDA devices with commas between them.
    pub device: String,
    /// Largest weights file, bytes.
    pub max_shard_size: u64,
    /// Limit of host memory, bytes; activations that do not fit go to disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_memory: Option<u64>,
    /// Limit of each CUDA device's memory, bytes; activations that do not fit go to host memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_device_memory: Option<u64>,
}

impl Default for Plan {
    /// The model card's settings.
    fn default() -> Self {
        Self {
            dataset: vec!["wikitext2".into()],
            split: None,
            text_column: None,
            samples: 128,
            seq_len: 2048,
            allow_long_windows: false,
            seed: 0,
            variants: VariantSet::Card.variants().into_iter().map(Output::Gptq).collect(),
            damp: None,
            main: None,
            quality: Quality::default(),
            signed_scales: None,
            scale_search: None,
            act_group_aware: None,
            asymmetric: None,
            output_hessian: None,
            rotate: None,
            equalize: None,
            shrinkage: None,
            shared_hessian: false,
            on_failure: OnFailure::Error,
            compute_dtype: ComputeDtype::Auto,
            device: "auto".into(),
            max_shard_size: 10_000_000_000,
            max_memory: None,
            max_device_memory: None,
        }
    }
}

impl Plan {
    /// Reads a plan from a TOML file; missing keys keep the default settings.
    ///
    /// # Errors
    /// When the file cannot be read or holds an unknown key or value.
    pub fn read(path: &Path) -> Result<Self> {
        let text = folder::read_text(path)?;
        let fail = |e: toml::de::Error| toml_error(path, &text, &e);
        let table: toml::Table = toml::from_str(&text).map_err(fail)?;
        refuse_unknown(path, "", &table, &Self::keys())?;
        toml::from_str(&text).map_err(fail)
    }

    /// Damping, as a fraction of the Hessian's mean diagonal.
    pub fn damp(&self) -> f64 {
        self.damp.unwrap_or(self.quality.damp())
    }

    /// The keys a plan can have.
    fn keys() -> Vec<String> {
        let every = Self {
            allow_long_windows: true,
            split: Some(String::new()),
            damp: Some(0.0),
            text_column: Some(String::new()),
            main: Some(VariantSet::Card.variants()[0]),
            signed_scales: Some(true),
            scale_search: Some(ScaleSearch::Off),
            act_group_aware: Some(true),
            asymmetric: Some(0.0),
            output_hessian: Some(0.0),
            rotate: Some(true),
            equalize: Some(true),
            shrinkage: Some(true),
            max_memory: Some(0),
            max_device_memory: Some(0),
            ..Self::default()
        };
        let table = toml::Table::try_from(every).expect("a plan is a table of plain values");
        table.keys().cloned().collect()
    }

    /// The accuracy options for this model: those of the preset that the model supports, with the plan's overrides. A preset
    /// does not rotate a model whose output layer is tied to the embedding. It would need an output layer of its own, which
    /// makes its file larger.
    pub fn accuracy(&self, config: &ModelConfig) -> AccuracyOptions {
        let preset = self.quality.options();
        let scales = Scales {
            signed: self.signed_scales.unwrap_or(preset.scales.signed),
            search: self.scale_search.unwrap_or(preset.scales.search),
        };
        let group_aware = self.act_group_aware.unwrap_or(preset.group_aware);
        // With shared Hessians the inputs are those of the unquantized model already.
        let asymmetric = if self.shared_hessian { 0.0 } else { self.asymmetric.unwrap_or(preset.asymmetric) };
        let experts = config.has_experts();
        let output_hessian = self.output_hessian.unwrap_or(if experts { 0.0 } else { preset.output_hessian });
        let can_rotate = !config.tie_word_embeddings && config.rotation_refusal().is_none();
        let rotate = self.rotate.unwrap_or(preset.rotate && can_rotate);
        AccuracyOptions {
            scales,
            group_aware,
            asymmetric,
            output_hessian,
            rotate,
            // Rotations make equalization superfluous.
            equalize: !rotate
                && self.equalize.unwrap_or(preset.equalize && config.equalization_refusal().is_none()),
            shrinkage: self.shrinkage.unwrap_or(preset.shrinkage),
        }
    }

    /// Name of the branch of an output.
    pub fn branch(&self, output: &Output) -> String {
        output.branch(self.main)
    }

    /// Checks the values that do not depend on the model.
    ///
    /// # Errors
    /// When a value is out of its range, or two values exclude each other.
    pub fn check(&self) -> Result<()> {
        let refuse = |what: &str, expected: &str, found: String| {
            Err(Error::Value { what: what.into(), expected: expected.into(), found })
        };
        if self.dataset.is_empty() {
            return refuse("dataset", "at least one", "none".into());
        }
        if self.dataset.len() > 1 {
            for (what, value) in [("split", &self.split), ("text-column", &self.text_column)] {
                if let Some(value) = value {
                    let expected =
                        "none with several datasets; a recipe file (.toml) can say it of one of them";
                    return refuse(what, expected, value.clone());
                }
            }
        }
        if self.samples == 0 {
            return refuse("samples", "at least 1", "0".into());
        }
        if self.seq_len < 2 {
            return refuse("seq-len", "at least 2", self.seq_len.to_string());
        }
        let damp = self.damp();
        if !(0.0..=1.0).contains(&damp) {
            return refuse("damp", "a fraction from 0 to 1", damp.to_string());
        }
        if let Some(share) = self.output_hessian.filter(|share| !(0.0..=1.0).contains(share)) {
            return refuse("output-hessian", "a part of the windows, from 0 to 1", share.to_string());
        }
        if let Some(alpha) = self.asymmetric {
            if !(0.0..=1.0).contains(&alpha) {
                return refuse("asymmetric", "a strength from 0 to 1", alpha.to_string());
            }
            if alpha > 0.0 && self.shared_hessian {
                let expected = "0 with shared-hessian, whose inputs are the unquantized model's already";
                return refuse("asymmetric", expected, alpha.to_string());
            }
        }
        if self.variants.is_empty() {
            return refuse("variants", "at least one", "none".into());
        }
        for (i, variant) in self.variants.iter().enumerate() {
            if self.variants[..i].contains(variant) {
                return refuse("variants", "each variant once", format!("{variant} twice"));
            }
        }
        if let Some(main) = self.main.filter(|&main| !self.variants.contains(&main.into())) {
            let variants: Vec<String> = self.variants.iter().map(ToString::to_string).collect();
            return refuse("main", &format!("one of the variants {}", variants.join(", ")), main.to_string());
        }
        if self.max_shard_size < 1_000_000 {
            return refuse("max-shard-size", "at least 1 MB", self.max_shard_size.to_string());
        }
        Ok(())
    }

    /// Checks that the model supports the plan's accuracy options.
    ///
    /// # Errors
    /// When it does not support one.
    pub fn check_for(&self, config: &ModelConfig) -> Result<()> {
        if let (Some(true), Some(reason)) = (self.rotate, config.rotation_refusal()) {
            return Err(config.refused("rotate", &reason));
        }
        if let (Some(true), Some(reason)) = (self.equalize, config.equalization_refusal()) {
            return Err(config.refused("equalize", &reason));
        }
        if config.has_experts() && self.output_hessian.is_some_and(|share| share > 0.0) {
            return Err(config.refused("output-hessian", EXPERTS_TOO_FEW));
        }
        Ok(())
    }

    /// The preset's options that this model does not get, each with its reason.
    pub fn left_out(&self, config: &ModelConfig) -> Vec<String> {
        let preset = self.quality.options();
        let mut left_out = Vec::new();
        if preset.rotate && self.rotate.is_none() {
            match config.rotation_refusal() {
                Some(reason) => left_out.push(format!("no rotations: {reason}")),
                None if config.tie_word_embeddings => {
                    left_out.push("no rotations: the output layer is tied to the embedding".into());
                }
                None => {}
            }
        }
        if preset.equalize && self.equalize.is_none() && !self.accuracy(config).rotate {
            left_out.extend(config.equalization_refusal().map(|reason| format!("no equalization: {reason}")));
        }
        if preset.output_hessian > 0.0 && self.output_hessian.is_none() && config.has_experts() {
            left_out.push(format!("no output Hessians: {EXPERTS_TOO_FEW}"));
        }
        left_out
    }
}

/// The reason why models with experts have no output Hessians.
const EXPERTS_TOO_FEW: &str = "too few tokens go through each expert";

/// A text to calibrate on, and its share of the windows. Written as `wikitext2` or `wikitext2:64`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetShare {
    /// A recipe, or the path of a file or folder.
    pub name: String,
    /// Its share in proportion to the other datasets; 1 by default.
    pub weight: Option<u32>,
}

impl DatasetShare {
    /// The weight; 1 by default.
    pub fn weight(&self) -> u32 {
        self.weight.unwrap_or(1)
    }
}

impl From<&str> for DatasetShare {
    /// A number after the last colon is the weight. A file whose name ends like that needs a weight behind its name.
    fn from(text: &str) -> Self {
        let weighted = text.rsplit_once(':').and_then(|(name, weight)| Some((name, weight.parse().ok()?)));
        match weighted.filter(|&(name, weight)| weight > 0 && !name.is_empty()) {
            Some((name, weight)) => Self { name: name.into(), weight: Some(weight) },
            None => Self { name: text.into(), weight: None },
        }
    }
}

impl fmt::Display for DatasetShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        self.weight.map_or(Ok(()), |weight| write!(f, ":{weight}"))
    }
}

/// A list that is written as a single string if it has one element.
mod one_or_many {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::DatasetShare;

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }

    pub(super) fn serialize<S: Serializer>(all: &[DatasetShare], serializer: S) -> Result<S::Ok, S::Error> {
        match all {
            [one] => OneOrMany::One(one.to_string()),
            many => OneOrMany::Many(many.iter().map(ToString::to_string).collect()),
        }
        .serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<DatasetShare>, D::Error> {
        Ok(match OneOrMany::deserialize(from)? {
            OneOrMany::One(one) => vec![one.as_str().into()],
            OneOrMany::Many(many) => many.iter().map(|one| one.as_str().into()).collect(),
        })
    }
}

/// The known name that is most similar to `name`, if one is similar enough.
pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    known
        .map(|k| (strsim::jaro_winkler(&name.replace('_', "-"), k), k))
        .filter(|(similarity, _)| *similarity > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, k)| k.to_owned())
}

/// Refuses a key of a TOML table that is not in `known`; `place` is the prefix of the table's keys in the message.
pub(crate) fn refuse_unknown(path: &Path, place: &str, table: &toml::Table, known: &[String]) -> Result<()> {
    let Some(key) = table.keys().find(|key| !known.contains(key)) else { return Ok(()) };
    let nearest = nearest(key, known.iter().map(String::as_str));
    Err(Error::UnknownKey { path: path.into(), key: format!("{place}{key}"), nearest })
}

/// Reaction to a linear without a numerical solution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// End the run with an error.
    Error,
    /// Round it to nearest, and report that.
    Rtn,
}

/// Data type of forward passes. Hessians and solves are always fp32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeDtype {
    /// On a CPU with fast bf16 products bf16, else fp32; on CUDA fp16 for a model in fp16, else bf16.
    Auto,
    /// fp32.
    Fp32,
    /// bf16.
    Bf16,
    /// fp16.
    Fp16,
}

impl fmt::Display for ComputeDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

#[cfg(test)]
mod tests;
