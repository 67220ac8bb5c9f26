//! Quantization settings of a GPTQ checkpoint, whichever tool wrote it: `quantization_config` in `config.json`,
//! `quantize_config.json`, or both.

use std::{fmt::Display, path::Path};

use serde_json::Value;

use crate::{
    architectures::CONFIG_FILE,
    checkpoint::reader::Checkpoint,
    error::{Error, Result},
    folder::file_in,
    json::{Fields, read_json},
    variant::{Bits, GroupSize},
};

/// The older of the two places, in the checkpoint folder.
pub const QUANTIZE_CONFIG_FILE: &str = "quantize_config.json";
/// The newer one, a key of `config.json`.
pub(super) const QUANTIZATION_KEY: &str = "quantization_config";

/// How zero points are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckpointFormat {
    /// `gptq`, the default: files hold the zero point minus 1.
    Gptq,
    /// `gptq_v2`: files hold the zero point.
    GptqV2,
}

impl CheckpointFormat {
    /// What is added to a stored zero point.
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

/// How the linears of a GPTQ checkpoint were quantized. Made only by [`QuantizationConfig::read`], which checks every value.
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
    /// How zero points are stored.
    pub format: CheckpointFormat,
    /// Damping, as a part of the mean Hessian diagonal.
    pub damp_percent: Option<f64>,
    /// Provenance, as written; null when there is none.
    pub meta: Value,
}

/// Settings of one file; `None` for a missing key.
#[derive(Debug)]
struct Said {
    bits: Option<Bits>,
    group_size: Option<GroupSize>,
    desc_act: Option<bool>,
    sym: Option<bool>,
    static_groups: Option<bool>,
    format: Option<CheckpointFormat>,
    damp_percent: Option<f64>,
    meta: Value,
}

impl QuantizationConfig {
    /// Reads both places in the folder of `checkpoint`. A key that both have must have the same value in both.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self> {
        let dir = checkpoint.dir();
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
        match (new, old) {
            (Some(new), Some(old)) => new.merge(old, &old_path)?.finish(&new_path),
            (Some(new), None) => new.finish(&new_path),
            (None, Some(old)) => old.finish(&old_path),
            (None, None) => Err(Error::CheckpointKind {
                path: dir.into(),
                expected: "a GPTQ checkpoint",
                found: format!("no `{QUANTIZATION_KEY}` in `{CONFIG_FILE}` and no `{QUANTIZE_CONFIG_FILE}`"),
            }),
        }
    }

    /// Reads one such object; `path` is what errors name.
    #[cfg(test)]
    pub(super) fn from_json(path: &Path, value: &Value) -> Result<Self> {
        Said::new(&Fields::new(path, "", value)?, false)?.finish(path)
    }

    /// Whether features of a group are neighbours, so that a missing `g_idx` means `k / group_size`.
    pub fn sequential_groups(&self) -> bool {
        !self.desc_act || self.static_groups || self.group_size == GroupSize::PerChannel
    }
}

impl Said {
    fn new(fields: &Fields<'_>, must_name_method: bool) -> Result<Self> {
        match fields.text("quant_method")? {
            Some("gptq") => {}
            None if !must_name_method => {}
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
        })
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
        })
    }
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
