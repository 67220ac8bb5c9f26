//! The model's own tokenizer, as `tokenizer.json` defines it.

use crate::error::{Error, Result};
use crate::folder;
use std::fmt;
use std::path::{Path, PathBuf};
use tokenizers::ModelWrapper;

/// A tokenizer read from `tokenizer.json`. Special tokens are added where its post-processor adds them:
/// for Llama, one BOS at the very front of a text.
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Opens `tokenizer.json` in a model's folder.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = folder::file_in(dir, "tokenizer.json")?;
        match path.exists() {
            true => Self::parse(path.clone(), &folder::read(&path, folder::TEXT_LIMIT)?),
            false if dir.join("tokenizer.model").exists() => {
                Err(Error::TokenizerModelOnly { path: dir.into() })
            }
            false => Err(Error::NotACheckpoint { path: dir.into(), missing: "`tokenizer.json`".into() }),
        }
    }

    /// Reads a `tokenizer.json` that is already in memory.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::parse("tokenizer.json".into(), bytes)
    }

    fn parse(path: PathBuf, bytes: &[u8]) -> Result<Self> {
        let problem = |problem: String| Error::Tokenizer { path: path.clone(), problem };
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|error| problem(format!("it is not a tokenizer that can be read: {error}")))?;
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
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, true)
    }

    /// The ids of a text that a chat template rendered: special tokens are those that stand in it, none is added.
    pub fn encode_rendered(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, false)
    }

    fn encode_with(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(|error| {
            self.problem(format!("it cannot tokenize a text of {} bytes: {error}", text.len()))
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of ids, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner
            .decode(ids, true)
            .map_err(|error| self.problem(format!("it cannot decode {} tokens: {error}", ids.len())))
    }

    /// Turns ids that follow those of `prompt` into text one at a time, without special tokens: each call returns what has become
    /// whole, `None` while a character is incomplete. The decoder has seen the prompt, so that it does not take the space in front of
    /// the first word for the beginning of a text and drop it.
    ///
    /// # Errors
    /// When the prompt cannot be decoded.
    pub fn stream_after(&self, prompt: &[u32]) -> Result<impl FnMut(u32) -> Result<Option<String>> + '_> {
        let mut stream = self.inner.decode_stream(true);
        let mut step = move |id| {
            stream.step(id).map_err(|error| self.problem(format!("it cannot decode token {id}: {error}")))
        };
        for &id in prompt {
            step(id)?;
        }
        Ok(step)
    }

    fn problem(&self, problem: String) -> Error {
        Error::Tokenizer { path: self.path.clone(), problem }
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("path", &self.path).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibration::test_support::{demo, demo_tokenizer};
    use serde_json::{Value, json};

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
        let error = Tokenizer::from_bytes(b"{}").unwrap_err().to_string();
        assert!(error.starts_with("`tokenizer.json`: it is not a tokenizer that can be read: "), "{error}");
    }

    #[test]
    fn a_folder_without_tokenizer_json() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Tokenizer::open(folder.path()).unwrap_err();
        let path = folder.path().display();
        assert_eq!(
            open().to_string(),
            format!("`{path}` is not a checkpoint folder: `tokenizer.json` not found in it")
        );
        std::fs::write(folder.path().join("tokenizer.model"), "").unwrap();
        assert_eq!(open().to_string(), format!("`{path}` has `tokenizer.model` but no `tokenizer.json`"));
        assert!(open().hint().is_some());
    }
}
