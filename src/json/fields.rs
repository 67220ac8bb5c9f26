//! Typed reading of one JSON object, with errors that name the file and the key.

use std::{fmt::Display, path::Path};

use serde_json::{Map, Value};

use super::unique;
use crate::{
    error::{Error, Result},
    folder,
};

/// Sizes from outside stay below this (2³¹), so that the product of two of them fits 64 bits.
pub(crate) const SIZE_LIMIT: usize = 1 << 31;

/// One JSON object of a file. A key that is `null` counts as missing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fields<'a> {
    path: &'a Path,
    /// Key of this object inside the file, empty for the file itself.
    parent: &'a str,
    object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The object `value`, found under `parent` in the file at `path`.
    pub(crate) fn new(path: &'a Path, parent: &'a str, value: &'a Value) -> Result<Self> {
        let object = value.as_object().ok_or_else(|| Error::Config {
            path: path.into(),
            key: if parent.is_empty() { ".".into() } else { parent.into() },
            expected: "an object".into(),
            found: value.to_string(),
        })?;
        Ok(Self { path, parent, object })
    }

    /// An [`Error::Config`] about `key`.
    pub(crate) fn error(&self, key: &str, expected: impl Display, found: impl Display) -> Error {
        Error::Config {
            path: self.path.into(),
            key: if self.parent.is_empty() { key.into() } else { format!("{}.{key}", self.parent) },
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    /// All entries, in file order.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.object.iter()
    }

    /// Whether the key exists, even as `null`.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    /// The value of `key`, if there and not `null`.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.error(key, expected, value))
    }

    /// An integer from 1 to 2³¹ − 1.
    pub(crate) fn size(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "an integer from 1 to 2147483647", |value| {
            value.as_u64().and_then(|v| usize::try_from(v).ok()).filter(|v| (1..SIZE_LIMIT).contains(v))
        })
    }

    /// A size that must be there.
    pub(crate) fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.error(key, "an integer from 1 to 2147483647", "nothing"))
    }

    /// A finite number above 0.
    pub(crate) fn positive(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number above 0", |value| value.as_f64().filter(|v| v.is_finite() && *v > 0.0))
    }

    /// A positive number that must be there.
    pub(crate) fn required_positive(&self, key: &str) -> Result<f64> {
        self.positive(key)?.ok_or_else(|| self.error(key, "a number above 0", "nothing"))
    }

    /// A list of finite numbers above 0.
    pub(crate) fn positives(&self, key: &str) -> Result<Option<Vec<f64>>> {
        let number = |value: &Value| value.as_f64().filter(|v| v.is_finite() && *v > 0.0);
        self.typed(key, "a list of numbers above 0", |value| value.as_array()?.iter().map(number).collect())
    }

    /// `true` or `false`.
    pub(crate) fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A string.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// One token id, or a list of them.
    pub(crate) fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|v| u32::try_from(v).ok());
        let ids = self.typed(key, "a token id or a list of them", |value| match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|v| vec![v]),
        })?;
        Ok(ids.unwrap_or_default())
    }
}

/// Reads and parses the JSON file at `path`; a byte order mark in front is skipped.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let bytes = folder::read(path, folder::TEXT_LIMIT)?;
    unique::parse(folder::without_mark(&bytes)).map_err(|source| Error::Json { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_order_mark_before_json_is_skipped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, "\u{FEFF}{\"a\": 1}").unwrap();
        assert_eq!(read_json(&path).unwrap()["a"], 1);
    }
}
