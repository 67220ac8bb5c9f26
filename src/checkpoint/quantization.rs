//! Quantization settings of a GPTQ checkpoint, whichever tool wrote it: `quantization_config` in `config.json`,
//! `quantize_config.json`, or both; else optimum's `quantization_config.json`, else AutoGPTQ's texts in the header of the
//! weights. Settings in none of them are inferred from the tensors.

use std::{borrow::Cow, fmt::Display, path::Path};

use serde_json::{Map, Value};

use crate::{
    architectures::CONFIG_FILE,
    checkpoint::{
        packed::{integers, stored_zeros},
        reader::Checkpoint,
    },
    error::{Error, Result},
    folder::file_in,
    json::{Fields, read_json},
    variant::{Bits, GroupSize},
};

/// The older of the two places, in the checkpoint folder.
pub const QUANTIZE_CONFIG_FILE: &str = "quantize_config.json";
/// Optimum's file; read if neither of the two others has settings.
pub const OPTIMUM_CONFIG_FILE: &str = "quantization_config.json";
/// The newer one, a key of `config.json`.
pub(super) const QUANTIZATION_KEY: &str = "quantization_config";

/// Format of zero points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckpointFormat {
    /// `gptq`, the default: files hold the zero point minus 1.
    Gptq,
    /// `gptq_v2`: files hold the zero point.
    GptqV2,
}

impl CheckpointFormat {
    /// Number that is added to a stored zero point.
    pub fn zero_offset(self) -> u8 {
        match self {
            Self::Gptq => 1,
            Self::GptqV2 => 0,
        }
    }

    /// As written in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gptq => "gptq",
            Self::GptqV2 => "gptq_v2",
        }
    }
}

/// Quantization of a GPTQ checkpoint's linears. Made only by [`QuantizationConfig::read`], which checks every value.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizationConfig {
    /// Bits a code.
    pub bits: Bits,
    /// Input features a group.
    pub group_size: GroupSize,
    /// Whether columns were quantized by descending Hessian diagonal; false if missing.
    pub desc_act: bool,
    /// Whether the grid is symmetric; true if missing.
    pub sym: bool,
    /// Whether groups stay runs of neighbouring features under act order; false if missing.
    pub static_groups: bool,
    /// Format of zero points.
    pub format: CheckpointFormat,
    /// Damping, as a part of the mean Hessian diagonal.
    pub damp_percent: Option<f64>,
    /// Provenance, as written; null when there is none.
    pub meta: Value,
    /// Inferred settings, and other tools' names for GPTQ, each a sentence for the user.
    pub notes: Vec<String>,
}

/// Settings of one file; `None` for a missing key.
#[derive(Debug, Default)]
struct Said {
    bits: Option<Bits>,
    group_size: Option<GroupSize>,
    desc_act: Option<bool>,
    sym: Option<bool>,
    static_groups: Option<bool>,
    format: Option<CheckpointFormat>,
    damp_percent: Option<f64>,
    meta: Value,
    notes: Vec<String>,
}

impl QuantizationConfig {
    /// Reads the settings in the folder of `checkpoint`. A key that `config.json` and `quantize_config.json` have must have the
    /// same value in both. Settings in no file are inferred from the tensors' shapes, `g_idx` and `qzeros`, with a note.
    ///
    /// # Errors
    /// When it is no GPTQ checkpoint, or a value is one that is not read.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self> {
        let dir = checkpoint.dir();
        if checkpoint.gguf().is_some() {
            let (path, found) = (dir.into(), "a GGUF file".into());
            return Err(Error::CheckpointKind { path, expected: "a GPTQ checkpoint", found });
        }
        let new_path = dir.join(CONFIG_FILE);
        let new = match checkpoint.config().raw().get(QUANTIZATION_KEY).filter(|value| !value.is_null()) {
            Some(value) => Some(Said::new(&Fields::new(&new_path, QUANTIZATION_KEY, value)?, true)?),
            None => None,
        };
        let old_path = file_in(dir, QUANTIZE_CONFIG_FILE)?;
        let old = if old_path.exists() {
            let value = read_json(&old_path)?;
            Some(Said::new(&Fields::new(&old_path, "", &value)?, false)?)
        } else {
            None
        };
        let said = match (new, old) {
            (Some(new), Some(old)) => Some(new.merge(old, &old_path)?),
            (new, old) => new.or(old),
        };
        let said = match said {
            Some(said) => Some(said),
            None => Said::of_optimum(dir)?,
        };
        let from_file = said.is_some();
        let said = match said {
            Some(said) => Some(said),
            None => Said::of_header(checkpoint)?,
        };
        if said.is_none() && !checkpoint.names().any(|name| name.ends_with(".qweight")) {
            return Err(Error::CheckpointKind {
                path: dir.into(),
                expected: "a GPTQ checkpoint",
                found: format!("no `{QUANTIZATION_KEY}` in `{CONFIG_FILE}` and no `{QUANTIZE_CONFIG_FILE}`"),
            });
        }
        said.unwrap_or_default().inferred(checkpoint, from_file)?.finish(&new_path)
    }

    /// Reads one such object; `path` is what errors name.
    #[cfg(test)]
    pub(crate) fn from_json(path: &Path, value: &Value) -> Result<Self> {
        Said::new(&Fields::new(path, "", value)?, false)?.finish(path)
    }

    /// Whether features of a group are neighbours, so that a missing `g_idx` means `k / group_size`.
    pub fn sequential_groups(&self) -> bool {
        !self.desc_act || self.static_groups || self.group_size == GroupSize::PerChannel
    }
}

impl Said {
    fn new(fields: &Fields<'_>, must_name_method: bool) -> Result<Self> {
        let mut notes = Vec::new();
        match fields.text("quant_method")? {
            Some("gptq") => {}
            None if !must_name_method => {}
            Some(method @ ("auto-round" | "intel/auto-round")) => {
                auto_round(fields)?;
                notes.push(format!(
                    "`quant_method` is `{method}` and `packing_format` `{AUTO_ROUND_GPTQ}`: the tensors are GPTQ's and are \
                     read as such; programs without AutoRound read them where `quant_method` is `gptq`"
                ));
            }
            other => return Err(fields.error("quant_method", "`gptq`", quoted(other))),
        }
        refuse_what_is_not_read(fields)?;
        let bits = match fields.get("bits") {
            None => None,
            Some(value) => {
                let bits = value.as_u64().and_then(|v| u32::try_from(v).ok()).and_then(Bits::new);
                Some(bits.ok_or_else(|| fields.error("bits", "2, 3, 4 or 8", value))?)
            }
        };
        let group_size = match fields.get("group_size") {
            None => None,
            Some(value) if value.as_i64() == Some(-1) => Some(GroupSize::PerChannel),
            Some(value) if value.as_i64().is_some_and(|v| v > 0) => {
                fields.size("group_size")?.map(GroupSize::Features)
            }
            Some(value) => return Err(fields.error("group_size", "-1 or a positive integer", value)),
        };
        let meta = fields.get("meta").cloned().unwrap_or(Value::Null);
        let damp_percent = fields.get("damp_percent").or_else(|| meta.get("damp_percent"));
        Ok(Self {
            bits,
            group_size,
            desc_act: fields.boolean("desc_act")?,
            sym: fields.boolean("sym")?,
            static_groups: fields.boolean("static_groups")?,
            format: format(fields)?,
            damp_percent: damp_percent.and_then(Value::as_f64),
            meta,
            notes,
        })
    }

    /// Optimum's file, if there is one.
    fn of_optimum(dir: &Path) -> Result<Option<Self>> {
        let path = file_in(dir, OPTIMUM_CONFIG_FILE)?;
        if !path.exists() {
            return Ok(None);
        }
        let value = read_json(&path)?;
        let mut said = Self::new(&Fields::new(&path, "", &value)?, false)?;
        said.notes.push(format!(
            "how it was quantized was read from `{OPTIMUM_CONFIG_FILE}`, as optimum writes it"
        ));
        Ok(Some(said))
    }

    /// The texts that AutoGPTQ wrote into the header of the weights, if there are any.
    fn of_header(checkpoint: &Checkpoint) -> Result<Option<Self>> {
        const KEYS: [(&str, &str); 5] = [
            ("gptq_bits", "bits"),
            ("gptq_group_size", "group_size"),
            ("gptq_groupsize", "group_size"),
            ("gptq_desc_act", "desc_act"),
            ("gptq_damp_percent", "damp_percent"),
        ];
        let mut settings = Map::new();
        for (key, name) in KEYS {
            let Some(text) = checkpoint.metadata().get(key) else { continue };
            // Python's names.
            let value = match text.as_str() {
                "None" => continue,
                "True" | "False" => Value::Bool(text == "True"),
                number => serde_json::from_str(number).unwrap_or_else(|_| Value::from(number)),
            };
            settings.insert(name.into(), value);
        }
        if settings.is_empty() {
            return Ok(None);
        }
        let value = Value::Object(settings);
        let mut said = Self::new(&Fields::new(checkpoint.dir(), "__metadata__", &value)?, false)?;
        said.notes.push(
            "how it was quantized was read from the header of the weights, as AutoGPTQ wrote it".into(),
        );
        Ok(Some(said))
    }

    /// Infers settings that are in no file from the tensors, with a note. Bits come from the shapes of `qweight`, group size
    /// from those of `scales`, act order from `g_idx`, and the grid from `qzeros`.
    fn inferred(mut self, checkpoint: &Checkpoint, from_file: bool) -> Result<Self> {
        // A file that says bits and group size leaves keys out that have their defaults.
        let scant = !from_file || self.bits.is_none() || self.group_size.is_none();
        if !scant && self.desc_act.is_some() {
            return Ok(self);
        }
        let shown = Shown::by(checkpoint)?;
        let mut facts = Vec::new();
        if let (None, Some(bits)) = (self.bits, shown.bits) {
            facts.push(format!("{} bits (shape of qweight)", bits.get()));
            self.bits = Some(bits);
        }
        if let (None, Some(size)) = (self.group_size, shown.group_size) {
            facts.push(match size {
                GroupSize::PerChannel => "one group a row (shape of scales)".into(),
                GroupSize::Features(size) => format!("group size {size} (shape of scales)"),
            });
            self.group_size = Some(size);
        }
        let static_groups = self.static_groups == Some(true);
        if let (None, Some(size), false) = (self.desc_act, self.group_size, static_groups) {
            let permuted = shown.is_permuted(size);
            if permuted || scant {
                facts.push(format!("{} (g_idx)", if permuted { "act order" } else { "no act order" }));
            }
            self.desc_act = Some(permuted);
        }
        if let (None, true, Some(bits)) = (self.sym, scant, self.bits) {
            let (symmetric, format) = shown.grid(bits);
            let grid = if symmetric { "symmetric" } else { "asymmetric" };
            facts.push(match self.format {
                Some(_) => format!("{grid} (qzeros)"),
                None => format!("{grid}, checkpoint_format {} (qzeros)", format.name()),
            });
            (self.sym, self.format) = (Some(symmetric), self.format.or(Some(format)));
        }
        if !facts.is_empty() {
            self.notes
                .push(format!("no file says it, so it was inferred from the tensors: {}", facts.join(", ")));
        }
        Ok(self)
    }

    /// Fills what `self` leaves open from `other`, read from `path`; a contradiction is an error.
    fn merge(self, other: Self, path: &Path) -> Result<Self> {
        fn one<T: PartialEq + Copy>(
            path: &Path,
            key: &str,
            new: Option<T>,
            old: Option<T>,
            show: impl Fn(T) -> String,
        ) -> Result<Option<T>> {
            match (new, old) {
                (Some(new), Some(old)) if new != old => Err(Error::Config {
                    path: path.into(),
                    key: key.into(),
                    expected: format!("{}, as `{QUANTIZATION_KEY}` of `{CONFIG_FILE}` says", show(new)),
                    found: show(old),
                }),
                _ => Ok(new.or(old)),
            }
        }
        let text = |value: bool| value.to_string();
        Ok(Self {
            bits: one(path, "bits", self.bits, other.bits, |bits| bits.get().to_string())?,
            group_size: one(path, "group_size", self.group_size, other.group_size, |size| {
                size.as_config().to_string()
            })?,
            desc_act: one(path, "desc_act", self.desc_act, other.desc_act, text)?,
            sym: one(path, "sym", self.sym, other.sym, text)?,
            static_groups: one(path, "static_groups", self.static_groups, other.static_groups, text)?,
            format: one(path, "checkpoint_format", self.format, other.format, |f| f.name().into())?,
            damp_percent: self.damp_percent.or(other.damp_percent),
            meta: if self.meta.is_null() { other.meta } else { self.meta },
            notes: [self.notes, other.notes].concat(),
        })
    }

    fn finish(self, path: &Path) -> Result<QuantizationConfig> {
        let missing = |key: &str, expected: &str| Error::Config {
            path: path.into(),
            key: key.into(),
            expected: expected.into(),
            found: "nothing".into(),
        };
        Ok(QuantizationConfig {
            bits: self.bits.ok_or_else(|| missing("bits", "2, 3, 4 or 8"))?,
            group_size: self.group_size.ok_or_else(|| missing("group_size", "-1 or a positive integer"))?,
            desc_act: self.desc_act.unwrap_or(false),
            sym: self.sym.unwrap_or(true),
            static_groups: self.static_groups.unwrap_or(false),
            format: self.format.unwrap_or(CheckpointFormat::Gptq),
            damp_percent: self.damp_percent,
            meta: self.meta,
            notes: self.notes,
        })
    }
}

/// Settings that the tensors of a checkpoint show.
struct Shown<'a> {
    /// Of all quantized linears; none where they differ.
    bits: Option<Bits>,
    group_size: Option<GroupSize>,
    /// The `g_idx` of the quantized linears that have one.
    g_idx: Vec<Cow<'a, [i32]>>,
    qzeros: Vec<Cow<'a, [i32]>>,
}

impl<'a> Shown<'a> {
    fn by(checkpoint: &'a Checkpoint) -> Result<Self> {
        let (mut bits, mut sizes) = (Vec::new(), Vec::new());
        let (mut g_idx, mut qzeros) = (Vec::new(), Vec::new());
        for (id, linear) in checkpoint.config().linears().filter(|(id, _)| checkpoint.contains(&id.qweight()))
        {
            let k = linear.shape[1];
            let rows = |name: &str| -> Result<usize> {
                Ok(checkpoint.view(name)?.shape.first().copied().unwrap_or(0))
            };
            let words = rows(&id.qweight())?.checked_mul(32).filter(|words| words.is_multiple_of(k));
            bits.push(words.and_then(|words| u32::try_from(words / k).ok()).and_then(Bits::new));
            sizes.push((k, rows(&id.scales())?));
            if checkpoint.contains(&id.g_idx()) {
                g_idx.push(integers(&checkpoint.view_shaped(&id.g_idx(), &[k])?)?);
            }
            qzeros.push(integers(&checkpoint.view(&id.qzeros())?)?);
        }
        let bits =
            bits.first().copied().flatten().filter(|one| bits.iter().all(|other| *other == Some(*one)));
        let group_size = group_size(&sizes, g_idx.iter().map(|groups| &**groups));
        Ok(Self { bits, group_size, g_idx, qzeros })
    }

    fn is_permuted(&self, group_size: GroupSize) -> bool {
        self.g_idx.iter().any(|groups| {
            let size = group_size.features(groups.len());
            groups.iter().enumerate().any(|(k, &group)| usize::try_from(group) != Ok(k / size))
        })
    }

    /// Whether the grid is symmetric, and how its zero points are stored. In a symmetric grid all are alike, as one of the
    /// formats stores them. Asymmetric ones are `gptq`, as tools wrote them when there were no configs.
    fn grid(&self, bits: Bits) -> (bool, CheckpointFormat) {
        let all = |format: CheckpointFormat| {
            let expected = bits.symmetric_zero() - format.zero_offset();
            self.qzeros.iter().all(|zeros| stored_zeros(zeros, bits).all(|zero| zero == expected))
        };
        let formats = [CheckpointFormat::Gptq, CheckpointFormat::GptqV2];
        let symmetric = formats.into_iter().find(|format| all(*format));
        (symmetric.is_some(), symmetric.unwrap_or(CheckpointFormat::Gptq))
    }
}

/// The group size by which all linears, as input features and number of groups, have the groups that they have. A number of groups
/// alone fits several sizes where the last group is short: `g_idx` shows which one, else it is the power of two.
fn group_size<'a>(sizes: &[(usize, usize)], g_idx: impl Iterator<Item = &'a [i32]>) -> Option<GroupSize> {
    let fits = |size: &usize| *size > 0 && sizes.iter().all(|(k, groups)| k.div_ceil(*size) == *groups);
    let &(k, groups) = sizes.iter().max_by_key(|(_, groups)| *groups)?;
    if groups == 1 {
        return Some(GroupSize::PerChannel);
    }
    let counted = g_idx.map(|groups| groups.iter().filter(|group| **group == 0).count()).min();
    let powers = (3..=12).map(|power| 1usize << power);
    let exact = k.checked_div(groups);
    counted.into_iter().chain(powers).chain(exact).find(fits).map(GroupSize::Features)
}

/// The packing of AutoRound whose tensors are those of GPTQ.
const AUTO_ROUND_GPTQ: &str = "auto_round:auto_gptq";

/// Refuses AutoRound's other packings and data types, and settings of single modules that are not those of all.
fn auto_round(fields: &Fields<'_>) -> Result<()> {
    match fields.text("packing_format")? {
        Some(AUTO_ROUND_GPTQ) => {}
        other => {
            return Err(fields.error("packing_format", format_args!("`{AUTO_ROUND_GPTQ}`"), quoted(other)));
        }
    }
    if let Some(other) = fields.text("data_type")?.filter(|kind| *kind != "int") {
        return Err(fields.error("data_type", "`int`", quoted(Some(other))));
    }
    let modules = fields.get("extra_config").and_then(Value::as_object);
    for (module, settings) in modules.into_iter().flatten() {
        // Modules of 16 and more bits are dense, which their tensors show.
        let dense = settings.get("bits").and_then(Value::as_u64).is_some_and(|bits| bits >= 16);
        let changed = ["bits", "group_size", "sym"]
            .into_iter()
            .find(|key| settings.get(key).is_some_and(|own| !own.is_null() && Some(own) != fields.get(key)));
        if let Some(key) = changed.filter(|_| !dense) {
            let found = format!("{key} {} for `{module}`", settings[key]);
            return Err(fields.error("extra_config", "one setting for all quantized modules", found));
        }
    }
    Ok(())
}

/// `checkpoint_format`, or `format` as GPTQModel also calls it.
fn format(fields: &Fields<'_>) -> Result<Option<CheckpointFormat>> {
    let mut formats = [None, None];
    for (format, key) in formats.iter_mut().zip(["checkpoint_format", "format"]) {
        *format = match fields.text(key)? {
            None => None,
            Some("gptq") => Some(CheckpointFormat::Gptq),
            Some("gptq_v2") => Some(CheckpointFormat::GptqV2),
            Some(other) => return Err(fields.error(key, "`gptq` or `gptq_v2`", quoted(Some(other)))),
        };
    }
    match formats {
        [Some(one), Some(other)] if one != other => {
            let expected = format!("`{}`, as `checkpoint_format` says", one.name());
            Err(fields.error("format", expected, quoted(Some(other.name()))))
        }
        [one, other] => Ok(one.or(other)),
    }
}

/// Settings that change what the tensors mean and are not understood here.
fn refuse_what_is_not_read(fields: &Fields<'_>) -> Result<()> {
    for key in ["is_marlin_format", "lm_head"] {
        if fields.boolean(key)? == Some(true) {
            return Err(fields.error(key, "false", "true"));
        }
    }
    if let Some(other @ ("int8" | "int16" | "int64")) = fields.text("pack_dtype")? {
        return Err(fields.error("pack_dtype", "`int32`", quoted(Some(other))));
    }
    if let Some(rotation) = fields.get("rotation") {
        return Err(fields.error("rotation", "none", rotation));
    }
    // Keys that start with `-:` only leave modules dense, which their tensors show; others change their settings.
    let changed = fields
        .get("dynamic")
        .and_then(Value::as_object)
        .and_then(|dynamic| dynamic.iter().find(|(pattern, _)| !pattern.starts_with("-:")));
    match changed {
        Some((pattern, value)) => Err(fields.error(
            "dynamic",
            "one setting for all quantized modules",
            format_args!("{value} for `{pattern}`"),
        )),
        None => Ok(()),
    }
}

fn quoted(text: Option<&str>) -> impl Display + use<> {
    text.map_or_else(|| "nothing".to_owned(), |text| format!("`{text}`"))
}
