//! The source model's card, a copy of which is kept beside the branches, and its metadata.

use std::{fs, path::Path};

use serde_json::{Map, Value};

use crate::{
    checkpoint::write_file_atomically,
    error::{Error, Result},
    hub::CARD_FILE,
};

/// File of the source model's card in the folder of a run.
pub const SOURCE_CARD_FILE: &str = "source-card.md";

/// A card: its metadata block and its text.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SourceCard {
    metadata: Map<String, Value>,
    /// The text behind the metadata.
    pub text: String,
}

/// Copies the card of the model in `source`, if it has one, to the folder of the run.
///
/// # Errors
/// When it cannot be read or written.
pub fn keep_source_card(source: &Path, run: &Path) -> Result<()> {
    let card = source.join(CARD_FILE);
    if !card.is_file() {
        return Ok(());
    }
    let text = fs::read(&card).map_err(Error::io("read", &card))?;
    write_file_atomically(&run.join(SOURCE_CARD_FILE), &text)
}

impl SourceCard {
    /// Reads the card of a run's source model; empty where there is none.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn read(run: &Path) -> Result<Self> {
        let path = run.join(SOURCE_CARD_FILE);
        match fs::read(&path) {
            Ok(bytes) => Ok(Self::parse(&String::from_utf8_lossy(&bytes))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(Error::io("read", path)(error)),
        }
    }

    /// Parses a card. Metadata that are not YAML, or not a mapping, are ignored: the card is not this project's.
    pub fn parse(card: &str) -> Self {
        let card = card.replace("\r\n", "\n");
        let block = card.strip_prefix("---\n").and_then(|rest| {
            let end = rest.find("\n---\n").or_else(|| rest.strip_suffix("\n---").map(str::len))?;
            Some((&rest[..end], rest.get(end + 5..).unwrap_or_default()))
        });
        let Some((metadata, text)) = block else {
            return Self { metadata: Map::new(), text: card.trim().to_owned() };
        };
        let metadata = serde_saphyr::from_str::<Value>(metadata).unwrap_or_default();
        let metadata = metadata.as_object().cloned().unwrap_or_default();
        Self { metadata, text: text.trim().to_owned() }
    }

    /// Replaces a value of the metadata, or removes it.
    pub(super) fn set(&mut self, key: &str, value: Option<Value>) {
        match value {
            Some(value) => _ = self.metadata.insert(key.to_owned(), value),
            None => _ = self.metadata.shift_remove(key),
        }
    }

    /// A text value of the metadata.
    pub fn text_of(&self, key: &str) -> Option<&str> {
        self.metadata.get(key)?.as_str().filter(|text| !text.is_empty())
    }

    /// A list of texts in the metadata; a single text is a list of one.
    pub fn list_of(&self, key: &str) -> Vec<String> {
        match self.metadata.get(key) {
            Some(Value::String(text)) => vec![text.clone()],
            Some(Value::Array(values)) => {
                values.iter().filter_map(Value::as_str).map(str::to_owned).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The licence's name: `license_name` where it is none of the usual licences, else `license`.
    pub fn licence(&self) -> Option<&str> {
        self.text_of("license_name").or_else(|| self.text_of("license"))
    }

    /// Whether the metadata set conditions for access to the files.
    pub fn is_gated(&self) -> bool {
        self.metadata.keys().any(|key| key.starts_with("extra_gated_"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_and_text() {
        let card = SourceCard::parse(
            "---\nlicense: other\nlicense_name: llama2\nlanguage:\n- en\n- no\nextra_gated_prompt: >-\n  Do you\n  agree?\n---\n\n# Llama\ntext\n",
        );
        assert_eq!(
            (card.text.as_str(), card.licence(), card.is_gated()),
            ("# Llama\ntext", Some("llama2"), true)
        );
        assert_eq!((card.text_of("license"), card.text_of("none")), (Some("other"), None));
        assert_eq!(card.list_of("license"), ["other"]);
        assert_eq!(card.list_of("language")[0], "en");
    }

    #[test]
    fn cards_without_usable_metadata() {
        for text in ["# A\n---\nb", "---\nnever closed", "---\n: [\n---\n# A", "---\n- a\n---\n# A", ""] {
            let card = SourceCard::parse(text);
            assert_eq!((card.licence(), card.is_gated()), (None, false), "{text}");
        }
        assert_eq!(SourceCard::parse("---\nlicense: mit\n---").licence(), Some("mit"));
        assert_eq!(SourceCard::parse("---\r\nlicense: mit\r\n---\r\nx").text, "x");
    }
}
