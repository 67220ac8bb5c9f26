//! The model's own tokenizer, as `tokenizer.json` or else `tokenizer.model` defines it.

use super::{pieces, sentencepiece};
use crate::error::{Error, Result};
use crate::folder;
use crate::progress::{Event, Progress, Silent};
use crate::units::bytes;
use serde::{Deserialize, de::Error as _};
use serde_json::Value;
use std::path::{Path, PathBuf};
use tokenizers::{ModelWrapper, normalizers::Precompiled};

/// A model's tokenizer. Special tokens are added where its post-processor adds them: for Llama, one BOS at the very front of a
/// text.
#[derive(Debug)]
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Opens `tokenizer.json` in a model's folder, or SentencePiece's `tokenizer.model` where it is missing.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = folder::file_in(dir, "tokenizer.json")?;
        if path.exists() {
            return Self::parse(path.clone(), &folder::read(&path, folder::TEXT_LIMIT)?);
        }
        let path = folder::file_in(dir, "tokenizer.model")?;
        if path.exists() {
            return Ok(Self { inner: sentencepiece::read(dir, &path)?, path });
        }
        Err(Error::NotACheckpoint { path: dir.into(), missing: "`tokenizer.json`".into() })
    }

    /// Reads a `tokenizer.json` that is already in memory.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::parse("tokenizer.json".into(), bytes)
    }

    fn parse(path: PathBuf, bytes: &[u8]) -> Result<Self> {
        let problem = |problem: String| Error::Tokenizer { path: path.clone(), problem };
        let unreadable = |error: String| problem(format!("it is not a tokenizer that can be read: {error}"));
        let bytes = folder::without_mark(bytes);
        check_parts(bytes).map_err(|error| unreadable(error.to_string()))?;
        let mut inner =
            tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| unreadable(error.to_string()))?;
        if let ModelWrapper::BPE(bpe) = inner.get_model()
            && let Some(dropout) = bpe.dropout.filter(|dropout| *dropout != 0.0)
        {
            return Err(problem(format!(
                "its model drops merges at random (dropout {dropout}); 0 is needed"
            )));
        }
        // A file may carry the limits it was last used with; a text is one sequence here, however long.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| problem(format!("its truncation cannot be lifted: {error}")))?;
        Ok(Self { path, inner })
    }

    /// The ids of a text, tokenized as a whole, with the special tokens that the tokenizer adds.
    /// A long text is tokenized in pieces on all cores where that gives the same ids.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, true, &Silent)
    }

    /// [`Tokenizer::encode`], with the progress of a long text.
    pub fn encode_shown(&self, text: &str, progress: &dyn Progress) -> Result<Vec<u32>> {
        self.encode_with(text, true, progress)
    }

    /// The ids of a text that a chat template rendered: special tokens are those that stand in it, none is added.
    pub fn encode_rendered(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, false, &Silent)
    }

    fn encode_with(&self, text: &str, add_special_tokens: bool, progress: &dyn Progress) -> Result<Vec<u32>> {
        /// Bytes of a text whose tokenization as a whole is worth a word.
        const LARGE: usize = 16 << 20;
        let unusable =
            |error| self.problem(format!("it cannot tokenize a text of {} bytes: {error}", text.len()));
        if pieces::is_long(text.len())
            && let Some([front, end]) = self.added(add_special_tokens).map_err(unusable)?
        {
            if let Some(ids) = pieces::encode(&self.inner, text, progress).map_err(unusable)? {
                return Ok([front, ids, end].concat());
            }
            if text.len() >= LARGE {
                let size = bytes(text.len() as u64);
                let note = format!(
                    "{size} of text are tokenized as a whole, which needs about 100 times as much memory"
                );
                progress.event(&Event::Note(&note));
            }
        }
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(unusable)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The tokenizer as `tokenizer.json` has it, also where it was read from `tokenizer.model`.
    ///
    /// # Errors
    /// When it cannot be written as JSON.
    pub fn to_json(&self) -> Result<Value> {
        serde_json::to_value(&self.inner)
            .map_err(|error| self.problem(format!("it cannot be written as JSON: {error}")))
    }

    /// The special tokens before and after every text; `None` if they depend on the text.
    ///
    /// # Errors
    /// When it cannot tokenize a text.
    pub fn special_tokens_of_texts(&self) -> Result<Option<[Vec<u32>; 2]>> {
        self.added(true).map_err(|error| self.problem(format!("it cannot tokenize a text: {error}")))
    }

    /// The file that it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of memory that tokenizing a text takes for a while.
    pub(super) fn memory(&self, text: &str) -> u64 {
        pieces::memory(&self.inner, text)
    }

    /// The special tokens that are added in front of a text and at its end; `None` where they are not those of every text.
    fn added(&self, add_special_tokens: bool) -> tokenizers::Result<Option<[Vec<u32>; 2]>> {
        const TEXT: &str = "a";
        let encoding = self.inner.encode_fast(TEXT, add_special_tokens)?;
        let plain = self.inner.encode_fast(TEXT, false)?;
        let (ids, mask) = (encoding.get_ids(), encoding.get_special_tokens_mask());
        let front = mask.iter().take_while(|&&special| special == 1).count();
        let rest = ids[front..].strip_prefix(plain.get_ids());
        Ok(rest.map(|end| [ids[..front].to_vec(), end.to_vec()]))
    }

    /// The text of ids, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner
            .decode(ids, true)
            .map_err(|error| self.problem(format!("it cannot decode {} tokens: {error}", ids.len())))
    }

    /// Turns ids that follow those of `prompt` into text one at a time, without special tokens. Each call returns the text that has become
    /// complete, or `None` while a character is incomplete. New ids are decoded together with the ones before them, because
    /// decoders drop the space in front of the first word of a text. Bytes that never make a character become `\u{fffd}`.
    ///
    /// # Errors
    /// When an id cannot be decoded.
    pub fn stream_after(&self, prompt: &[u32]) -> Result<impl FnMut(u32) -> Result<Option<String>> + '_> {
        /// Ids of the prompt that are enough for a decoder to see a text in front.
        const CONTEXT: usize = 8;
        let mut ids = prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec();
        // Ids up to `read` have become text; decoding begins at `first`.
        let (mut first, mut read) = (0, ids.len());
        Ok(move |id| {
            ids.push(id);
            let before = self.decode(&ids[first..read])?;
            let all = self.decode(&ids[first..])?;
            if all.len() <= before.len() || all.ends_with('\u{fffd}') {
                return Ok(None);
            }
            let new = match all.strip_prefix(&before) {
                Some(new) => new.to_owned(),
                // The new bytes have completed a character that was taken for broken.
                None => self.decode(&ids[read..])?,
            };
            (first, read) = (read, ids.len());
            Ok(Some(new).filter(|new| !new.is_empty()))
        })
    }

    fn problem(&self, problem: String) -> Error {
        Error::Tokenizer { path: self.path.clone(), problem }
    }
}

/// The parts of a `tokenizer.json` that the tokenizers crate does not check.
#[derive(Deserialize)]
struct Parts {
    normalizer: Option<Value>,
    decoder: Option<Value>,
    post_processor: Option<Value>,
}

/// Checks what the tokenizers crate panics about: text that is not JSON, and tables of normalizers.
fn check_parts(bytes: &[u8]) -> serde_json::Result<()> {
    let Parts { normalizer, decoder, post_processor } = serde_json::from_slice(bytes)?;
    // That it could be parsed is all that is checked.
    drop(decoder);
    normalizer.as_ref().map_or(Ok(()), check_normalizer)?;
    post_processor.as_ref().map_or(Ok(()), check_template)
}

/// Checks that a template defines the special tokens that it adds.
fn check_template(processor: &Value) -> serde_json::Result<()> {
    let list = |key: &str| processor.get(key).and_then(Value::as_array).into_iter().flatten();
    let known = |id: &str| processor.get("special_tokens").is_some_and(|tokens| tokens.get(id).is_some());
    let added = list("single").filter_map(|piece| piece.pointer("/SpecialToken/id")?.as_str());
    match added.into_iter().find(|id| !known(id)) {
        Some(id) => Err(serde_json::Error::custom(format!("its post-processor does not define `{id}`"))),
        None => list("processors").try_for_each(check_template),
    }
}

fn check_normalizer(normalizer: &Value) -> serde_json::Result<()> {
    match normalizer.get("type").and_then(Value::as_str) {
        Some("Precompiled") => Precompiled::deserialize(normalizer).map(drop),
        Some("Sequence") => {
            let parts = normalizer.get("normalizers").and_then(Value::as_array);
            parts.into_iter().flatten().try_for_each(check_normalizer)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibration::test_support::{demo, demo_tokenizer};
    use serde_json::json;

    fn demo_json(change: impl FnOnce(&mut Value)) -> Vec<u8> {
        let mut json =
            serde_json::from_slice(&std::fs::read(demo().join("tokenizer.json")).unwrap()).unwrap();
        change(&mut json);
        serde_json::to_vec(&json).unwrap()
    }

    #[test]
    fn bos_comes_from_the_post_processor_alone() {
        let ids = demo_tokenizer().encode("one two\n\nthree").unwrap();
        assert_eq!((ids[0], ids.iter().filter(|id| **id == 1).count()), (1, 1));
        assert_eq!(demo_tokenizer().decode(&ids).unwrap(), "one two\n\nthree");

        let bare = demo_json(|json| json["post_processor"] = Value::Null);
        assert_eq!(Tokenizer::from_bytes(&bare).unwrap().encode("one two\n\nthree").unwrap(), ids[1..]);
    }

    #[test]
    fn an_eos_that_the_tokenizer_adds_is_kept() {
        let with_eos = demo_json(|json| {
            let post = &mut json["post_processor"];
            post["single"]
                .as_array_mut()
                .unwrap()
                .push(json!({"SpecialToken": {"id": "</s>", "type_id": 0}}));
            post["special_tokens"]["</s>"] = json!({"id": "</s>", "ids": [2], "tokens": ["</s>"]});
        });
        let ids = Tokenizer::from_bytes(&with_eos).unwrap().encode("one").unwrap();
        assert_eq!((ids.first(), ids.last()), (Some(&1), Some(&2)));
    }

    #[test]
    fn a_long_text_has_the_ids_of_the_whole_and_its_special_tokens() {
        let with_eos = demo_json(|json| {
            let post = &mut json["post_processor"];
            let eos = json!({"SpecialToken": {"id": "</s>", "type_id": 0}});
            post["single"].as_array_mut().unwrap().push(eos);
            post["special_tokens"]["</s>"] = json!({"id": "</s>", "ids": [2], "tokens": ["</s>"]});
        });
        let text = "The old house stood by the river.\n = Heading = \n\n\n".repeat(6000);
        for tokenizer in [Tokenizer::from_bytes(&with_eos).unwrap(), demo_tokenizer()] {
            assert!(pieces::encode(&tokenizer.inner, &text, &Silent).unwrap().is_some());
            for special in [true, false] {
                let whole = tokenizer.inner.encode_fast(text.as_str(), special).unwrap();
                assert!(tokenizer.encode_with(&text, special, &Silent).unwrap() == whole.get_ids());
            }
        }
    }

    #[test]
    fn limits_stored_in_the_file_are_lifted() {
        let limited = demo_json(|json| {
            json["truncation"] =
                json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
            json["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"});
        });
        let text = "a text of more than four tokens";
        let ids = Tokenizer::from_bytes(&limited).unwrap().encode(text).unwrap();
        assert_eq!(ids, demo_tokenizer().encode(text).unwrap());
    }

    #[test]
    fn dropout_and_other_files_are_refused() {
        let random = demo_json(|json| json["model"]["dropout"] = json!(0.1));
        assert_eq!(
            Tokenizer::from_bytes(&random).unwrap_err().to_string(),
            "`tokenizer.json`: its model drops merges at random (dropout 0.1); 0 is needed"
        );
        // The crate panics about all but the first.
        let table = json!({"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": "AA"}]});
        let normalizer = demo_json(|json| json["normalizer"] = table);
        let decoder = |text: &str| format!(r#"{{"version": "1.0", "decoder": {{"type"{text}"#).into_bytes();
        let template = demo_json(|json| json["post_processor"]["special_tokens"] = json!({}));
        for bytes in [b"{}".to_vec(), decoder("}"), decoder(r#": "\ud800"}}"#), normalizer, template] {
            let error = Tokenizer::from_bytes(&bytes).unwrap_err().to_string();
            let expected = "`tokenizer.json`: it is not a tokenizer that can be read: ";
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn a_byte_order_mark_before_a_tokenizer_is_skipped() {
        let marked = [b"\xEF\xBB\xBF", &demo_json(|_| ())[..]].concat();
        let ids = Tokenizer::from_bytes(&marked).unwrap().encode("one two").unwrap();
        assert_eq!(ids, demo_tokenizer().encode("one two").unwrap());
    }

    #[test]
    fn broken_characters_do_not_stop_a_stream() {
        let tokenizer = demo_tokenizer();
        let byte = |byte: u8| {
            let json = demo_json(|_| ());
            let json: Value = serde_json::from_slice(&json).unwrap();
            json["model"]["vocab"][format!("<0x{byte:02X}>")].as_u64().map(|id| id as u32)
        };
        let mut stream = tokenizer.stream_after(&tokenizer.encode("The old").unwrap()).unwrap();
        let words = tokenizer.encode(" house").unwrap();
        // The beginning of a character of three bytes that never ends, where the vocabulary has bytes.
        let broken = [0xe2, 0x82].into_iter().filter_map(byte);
        let text: String =
            broken.chain(words[1..].iter().copied()).filter_map(|id| stream(id).unwrap()).collect();
        assert!(text.ends_with("house"), "{text:?}");
    }

    #[test]
    fn a_folder_without_tokenizer_json() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Tokenizer::open(folder.path()).unwrap_err();
        let path = folder.path().display();
        assert_eq!(
            open().to_string(),
            format!("`{path}` is not a checkpoint folder: it has no `tokenizer.json`")
        );
        std::fs::write(folder.path().join("tokenizer.model"), "").unwrap();
        let problem = "it is not a SentencePiece model: it has no pieces";
        assert_eq!(
            open().to_string(),
            format!("`{path}/tokenizer.model` cannot be used, and there is no `tokenizer.json`: {problem}")
        );
        assert!(open().hint().is_some());
    }
}
