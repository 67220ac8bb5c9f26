//! Contradictions of `tokenizer_config.json` and `tokenizer.json` about the special tokens around a text.

use std::path::Path;

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    error::{Error, Result},
    folder,
};

#[derive(Deserialize)]
struct TokenizerFile {
    post_processor: Option<Value>,
}

#[derive(Deserialize)]
struct TokenizerConfig {
    // Other types than a boolean say nothing.
    add_bos_token: Option<Value>,
    add_eos_token: Option<Value>,
}

/// Contradictions between `tokenizer_config.json` and `tokenizer.json` in `dir`, with the setting that is used; each a sentence
/// for the user. Programs differ in which of the two they follow. A `tokenizer_config.json` that cannot be read is such a sentence,
/// too; a `tokenizer.json` that cannot be read is an error of [`Tokenizer::open`](crate::calibration::Tokenizer::open).
pub fn tokenizer_notes(dir: &Path) -> Vec<String> {
    let Ok(Some(file)) = read::<TokenizerFile>(dir, "tokenizer.json") else { return Vec::new() };
    match read::<TokenizerConfig>(dir, "tokenizer_config.json") {
        Ok(config) => config.map_or_else(Vec::new, |config| disagreements(&file, config)),
        Err(error) => vec![error.to_string()],
    }
}

fn disagreements(file: &TokenizerFile, config: TokenizerConfig) -> Vec<String> {
    let (front, back) = file.post_processor.as_ref().map_or((false, false), added);
    let said =
        [("add_bos_token", config.add_bos_token, front), ("add_eos_token", config.add_eos_token, back)];
    let note = |(key, said, added): (&str, Option<Value>, bool)| {
        let said = said?.as_bool().filter(|said| *said != added)?;
        let does = if added { "adds one" } else { "adds none" };
        Some(format!(
            "tokenizer_config.json says `{key}`: {said}, and the post-processor of tokenizer.json {does}: tokenizer.json is used, \
             and other programs may follow tokenizer_config.json"
        ))
    };
    said.into_iter().filter_map(note).collect()
}

/// Whether a post-processor adds a special token in front of a text, and behind it.
fn added(processor: &Value) -> (bool, bool) {
    let list = |key: &str| processor.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    match processor.get("type").and_then(Value::as_str) {
        Some("TemplateProcessing") => {
            let special =
                |piece: Option<&Value>| piece.is_some_and(|piece| piece.get("SpecialToken").is_some());
            (special(list("single").first()), special(list("single").last()))
        }
        Some("BertProcessing" | "RobertaProcessing") => (true, true),
        Some("Sequence") => {
            let all = list("processors").iter().map(added);
            all.fold((false, false), |(front, back), (f, b)| (front || f, back || b))
        }
        _ => (false, false),
    }
}

/// A file of the folder, if it is there.
fn read<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<Option<T>> {
    let path = folder::file_in(dir, name)?;
    if !path.exists() {
        return Ok(None);
    }
    let text = folder::read(&path, folder::TEXT_LIMIT)?;
    serde_json::from_slice(folder::without_mark(&text))
        .map(Some)
        .map_err(|source| Error::Json { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibration::{Tokenizer, test_support::demo};
    use serde_json::json;

    #[test]
    fn a_bos_token_that_two_files_say_otherwise_is_named_with_what_is_used() {
        assert_eq!(tokenizer_notes(&demo()), [""; 0]);
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &[u8]| std::fs::write(folder.path().join(name), text).unwrap();
        assert_eq!(tokenizer_notes(folder.path()), [""; 0]);

        let mut file: Value =
            serde_json::from_slice(&std::fs::read(demo().join("tokenizer.json")).unwrap()).unwrap();
        write("tokenizer.json", file.to_string().as_bytes());
        write("tokenizer_config.json", br#"{"add_bos_token": false, "add_eos_token": null}"#);
        let used = "tokenizer.json is used, and other programs may follow tokenizer_config.json";
        let expected = "tokenizer_config.json says `add_bos_token`: false, and the post-processor of tokenizer.json adds one: ";
        assert_eq!(tokenizer_notes(folder.path()), [format!("{expected}{used}")]);
        // As it says.
        assert_eq!(Tokenizer::open(folder.path()).unwrap().encode("one").unwrap()[0], 1);

        file["post_processor"] = json!({"type": "Sequence", "processors": [{"type": "ByteLevel"}]});
        write("tokenizer.json", file.to_string().as_bytes());
        assert_eq!(tokenizer_notes(folder.path()), [""; 0]);
        write("tokenizer_config.json", br#"{"add_bos_token": true, "add_eos_token": true}"#);
        assert_eq!(tokenizer_notes(folder.path()).len(), 2);
        let marked = [b"\xEF\xBB\xBF", file.to_string().as_bytes()].concat();
        write("tokenizer.json", &marked);
        assert_eq!(tokenizer_notes(folder.path()).len(), 2);
        write("tokenizer_config.json", b"{");
        assert!(tokenizer_notes(folder.path())[0].contains("is not the JSON expected here"));
        // Opening the tokenizer is the error.
        write("tokenizer.json", b"{");
        assert_eq!(tokenizer_notes(folder.path()), [""; 0]);
    }
}
