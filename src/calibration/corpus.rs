//! The rows of a dataset, in memory, and where they come from.

use super::parquet_rows;
use super::recipe::Sampling;
use crate::chat::{ChatTemplate, Message};
use crate::error::{Error, ResourceError, Result};
use crate::units::{bytes, hex};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt::Display;
use std::ops::Range;
use std::path::Path;

/// The text of a dataset, row by row. At least one row holds more than white space.
#[derive(Debug, Clone)]
pub struct Corpus {
    text: String,
    rows: Vec<Range<usize>>,
    provenance: Provenance,
}

/// Origin of a text, for the report. It has names only, no paths of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// The recipe's name, or the name of the file or folder.
    pub dataset: String,
    /// The dataset repository on the Hub, for a recipe.
    pub repository: Option<String>,
    /// Commit of the repository, if the files are in a Hugging Face cache that records it.
    pub revision: Option<String>,
    /// The files, in the order they were read.
    pub files: Vec<ProvenanceFile>,
    /// The column (or JSON key) of the text; plain text has none.
    pub text_column: Option<String>,
    /// Rule that makes windows of the rows.
    #[serde(flatten)]
    pub sampling: Sampling,
    /// Rows with a text, an empty one included.
    pub rows: usize,
    /// Rows without one (null); they are left out.
    pub nulls: usize,
    /// Conversations that the chat template refuses; they are left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refused>,
}

/// Conversations that are left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Their number.
    pub count: usize,
    /// The first of them, counted from 1.
    pub first: usize,
    /// The chat template's reason for refusing it.
    pub reason: String,
}

/// One file a text was read from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProvenanceFile {
    /// Its path below the dataset's root.
    pub name: String,
    /// SHA-256 of the file as it is on disk, in hexadecimal.
    pub sha256: String,
}

impl Provenance {
    /// Provenance of a file or folder on this machine, or of a bundled text, before its files and rows are read.
    pub(super) fn local(dataset: &str) -> Self {
        Self {
            dataset: dataset.to_owned(),
            repository: None,
            revision: None,
            files: Vec::new(),
            text_column: None,
            sampling: Sampling::joined_by_empty_line(),
            rows: 0,
            nulls: 0,
            refused: None,
        }
    }
}

impl Corpus {
    /// Reads a parquet file that is already in memory (the bundled demo text); rows are joined with an empty
    /// line.
    pub fn from_parquet_bytes(name: &str, bytes: impl Into<Bytes>, column: &str) -> Result<Corpus> {
        let bytes = bytes.into();
        let sha256 = hex(&Sha256::digest(&bytes));
        let sampling = Sampling::joined_by_empty_line();
        let mut rows = Rows::new(&sampling, None);
        parquet_rows::read([bytes.clone(), bytes], Path::new(name), Some(column), &mut rows)?;
        rows.into_corpus(Provenance {
            files: vec![ProvenanceFile { name: name.to_owned(), sha256 }],
            text_column: Some(column.to_owned()),
            ..Provenance::local(name)
        })
    }

    /// The recipe's name, or the name of the file or folder.
    pub fn name(&self) -> &str {
        &self.provenance.dataset
    }

    /// The rows, unchanged, in the order of the files.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &str> {
        self.rows.iter().map(|row| &self.text[row.clone()])
    }

    /// One row.
    pub(super) fn row(&self, index: usize) -> &str {
        &self.text[self.rows[index].clone()]
    }

    /// All rows as one text, joined by the dataset's rule.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Rule that makes windows of the rows.
    pub fn sampling(&self) -> &Sampling {
        &self.provenance.sampling
    }

    /// Source of the text.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }
}

/// Bytes that a file may unpack to whatever its size.
const ORDINARY: u64 = 64 << 20;
/// Largest size of what a file unpacks to over its own, above [`ORDINARY`] bytes. Text that people wrote stays below 20.
const LARGEST_FACTOR: u64 = 256;

/// Bytes that a file of `packed` bytes may unpack to.
pub(super) fn unpacked_limit(packed: u64) -> u64 {
    ORDINARY.max(packed.saturating_mul(LARGEST_FACTOR))
}

/// Problem of a file that unpacks to more than `limit` bytes.
pub(super) fn unpacks_to_too_much(limit: u64) -> String {
    let [ordinary, limit] = [ORDINARY, limit].map(bytes);
    format!(
        "it unpacks to more than {limit}; at most {LARGEST_FACTOR} times the size of the file, or {ordinary}, is read: unpack it \
         yourself if that is right"
    )
}

/// Rows that become a [`Corpus`]. They are joined while they are read, so that the text is in memory only once.
pub(super) struct Rows<'a> {
    text: String,
    rows: Vec<Range<usize>>,
    nulls: usize,
    sampling: Sampling,
    /// Whether rows are conversations, not plain text, once one was there.
    conversations: Option<bool>,
    chat: Option<&'a ChatTemplate>,
    refused: Option<Refused>,
    column: Option<String>,
    /// Bytes of `text` and `rows` that the current file may fill them to, and that it may add.
    limit: [u64; 2],
    /// Bytes that `text` and `rows` may take.
    memory: u64,
}

impl<'a> Rows<'a> {
    /// No rows yet. `chat` is the model's template, for rows that are conversations.
    pub(super) fn new(sampling: &Sampling, chat: Option<&'a ChatTemplate>) -> Self {
        Self {
            text: String::new(),
            rows: Vec::new(),
            nulls: 0,
            sampling: sampling.clone(),
            conversations: None,
            chat,
            refused: None,
            column: None,
            limit: [u64::MAX; 2],
            memory: u64::MAX,
        }
    }

    /// The same with a limit of memory, bytes.
    pub(super) fn within(self, memory: Option<u64>) -> Self {
        Self { memory: memory.unwrap_or(u64::MAX), ..self }
    }

    /// Refuses rows that take more than the memory they may, with `more` bytes that come.
    pub(super) fn check_memory(&self, path: &Path, more: u64) -> Result<()> {
        let needed = self.size().saturating_add(more);
        if needed <= self.memory {
            return Ok(());
        }
        Err(ResourceError::Memory {
            memory: "memory".into(),
            available: bytes(self.memory),
            needed: format!("{} for the text of `{}`", bytes(needed), path.display()),
            flag: None,
        }
        .into())
    }

    /// Bytes of a file that are worth reading: one more than the memory they may take.
    pub(super) fn worth_reading(&self) -> u64 {
        self.memory.saturating_sub(self.size()).saturating_add(1)
    }

    /// Begins a file of `packed` bytes that is compressed: it may add [`unpacked_limit`] to the rows.
    pub(super) fn begin_compressed(&mut self, packed: u64) {
        let limit = unpacked_limit(packed);
        self.limit = [self.size().saturating_add(limit), limit];
    }

    fn size(&self) -> u64 {
        (self.text.len() + (self.rows.len() + self.nulls) * size_of::<Range<usize>>()) as u64
    }

    /// Refuses a compressed file whose rows are more than it can hold.
    pub(super) fn check_size(&self, path: &Path) -> Result<()> {
        let [end, limit] = self.limit;
        match self.size() > end {
            true => Err(Error::Dataset { path: path.into(), problem: unpacks_to_too_much(limit) }),
            false => Ok(()),
        }
    }

    /// Sets the column that the rows come from, for provenance and errors.
    pub(super) fn set_column(&mut self, name: &str) {
        self.column = Some(name.to_owned());
    }

    /// Appends a plain text; `place` is its place in the file: `line 3`.
    ///
    /// # Errors
    /// When conversations came before.
    pub(super) fn push_text(&mut self, path: &Path, place: impl Display, text: &str) -> Result<()> {
        self.check_kind(false, path, place)?;
        self.push(path, text)
    }

    fn push(&mut self, path: &Path, row: &str) -> Result<()> {
        self.check_memory(path, row.len() as u64)?;
        if let (Sampling::Stream { join }, false) = (&self.sampling, self.rows.is_empty()) {
            self.text.push_str(join);
        }
        let start = self.text.len();
        self.text.push_str(row);
        self.rows.push(start..self.text.len());
        Ok(())
    }

    pub(super) fn push_null(&mut self) {
        self.nulls += 1;
    }

    /// Appends a conversation as the chat template renders it. One that the template refuses is counted and left out.
    ///
    /// # Errors
    /// When the model has no template, or plain text came before.
    pub(super) fn push_conversation(
        &mut self,
        path: &Path,
        place: impl Display,
        messages: &[Message],
    ) -> Result<()> {
        let what = || format!("`{}`", path.display());
        let template = self.chat.ok_or_else(|| Error::NoChatTemplate { what: what() })?;
        self.check_kind(true, path, place)?;
        self.sampling = Sampling::Conversations;
        match template.render(messages, false) {
            Ok(text) => self.push(path, &text)?,
            Err(error) => {
                let seen = self.rows.len() + self.nulls + self.refused.as_ref().map_or(0, |r| r.count);
                let first = || Refused { count: 0, first: seen + 1, reason: error.to_string() };
                self.refused.get_or_insert_with(first).count += 1;
            }
        }
        Ok(())
    }

    fn check_kind(&mut self, conversation: bool, path: &Path, place: impl Display) -> Result<()> {
        if *self.conversations.get_or_insert(conversation) == conversation {
            return Ok(());
        }
        let [this, before] = match conversation {
            true => ["a conversation", "plain text"],
            false => ["plain text", "conversations"],
        };
        let problem =
            format!("{place} is {this}, and rows before it are {before}: one dataset cannot hold both");
        Err(Error::Dataset { path: path.into(), problem })
    }

    /// The corpus of these rows; their numbers are added to `provenance`. A corpus without text is an error.
    pub(super) fn into_corpus(self, provenance: Provenance) -> Result<Corpus> {
        let Self { text, rows, nulls, sampling, refused, column, .. } = self;
        if let (true, Some(Refused { count, first, reason })) = (rows.is_empty(), &refused) {
            let problem = format!("none of its {count} conversations can be used: row {first}: {reason}");
            return Err(Error::Dataset { path: provenance.dataset.into(), problem });
        }
        let text_column = provenance.text_column.or(column);
        let provenance = Provenance { rows: rows.len(), nulls, sampling, refused, text_column, ..provenance };
        let corpus = Corpus { text, rows, provenance };
        if corpus.rows().all(|row| row.trim().is_empty()) {
            let Provenance { dataset, text_column, rows, nulls, .. } = corpus.provenance;
            return Err(match text_column {
                Some(column) => Error::EmptyColumn { dataset, column, rows: rows + nulls },
                None => Error::Dataset { path: dataset.into(), problem: "it holds no text".into() },
            });
        }
        Ok(corpus)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibration::test_support::demo;

    fn provenance(text_column: Option<&str>) -> Provenance {
        Provenance { text_column: text_column.map(str::to_owned), ..Provenance::local("mine") }
    }

    #[test]
    fn rows_are_joined_unchanged_and_nulls_left_out() {
        let mut rows = Rows::new(&Sampling::joined_by_empty_line(), None);
        for row in [Some(""), Some(" a \n"), None, Some(""), Some("b")] {
            match row {
                Some(row) => rows.push(Path::new("mine"), row).unwrap(),
                None => rows.push_null(),
            }
        }
        let corpus = rows.into_corpus(provenance(Some("text"))).unwrap();
        assert_eq!(corpus.text(), "\n\n a \n\n\n\n\nb");
        assert_eq!(corpus.rows().collect::<Vec<_>>(), ["", " a \n", "", "b"]);
        assert_eq!((corpus.row(3), corpus.provenance().rows, corpus.provenance().nulls), ("b", 4, 1));
    }

    #[test]
    fn no_text_is_an_error_with_the_number_of_rows() {
        let empty = |column| {
            let mut rows = Rows::new(&Sampling::Documents, None);
            rows.push(Path::new("mine"), " \n").unwrap();
            rows.push_null();
            rows.into_corpus(provenance(column)).unwrap_err().to_string()
        };
        assert_eq!(empty(Some("text")), "column `text` of mine holds no text in any of its 2 rows");
        assert_eq!(empty(None), "`mine`: it holds no text");
    }

    #[test]
    fn plain_text_and_conversations_do_not_mix() {
        let template = ChatTemplate::of("{{ messages[0].content }}");
        let (path, messages) = (Path::new("a.jsonl"), [Message::new("user", "Hi")]);
        let mut rows = Rows::new(&Sampling::joined_by_empty_line(), Some(&template));
        // A row without a text is neither.
        rows.push_null();
        rows.push_conversation(path, "line 2", &messages).unwrap();
        assert_eq!(
            rows.push_text(path, "line 3", "plain").unwrap_err().to_string(),
            "`a.jsonl`: line 3 is plain text, and rows before it are conversations: one dataset cannot hold both"
        );
        assert_eq!(rows.into_corpus(provenance(None)).unwrap().text(), "Hi");
    }

    #[test]
    fn provenance_is_read_back_from_its_json() {
        let bytes = std::fs::read(demo().join("calibration.parquet")).unwrap();
        let corpus = Corpus::from_parquet_bytes("demo", bytes, "text").unwrap();
        assert_eq!(corpus.name(), "demo");
        assert_eq!(corpus.rows().len(), corpus.provenance().rows);
        let json = serde_json::to_value(corpus.provenance()).unwrap();
        assert_eq!((&json["sampling"], &json["join"]), (&"stream".into(), &"\n\n".into()));
        assert_eq!(json["files"][0]["sha256"].as_str().map(str::len), Some(64));
        assert_eq!(&serde_json::from_value::<Provenance>(json).unwrap(), corpus.provenance());
    }
}
