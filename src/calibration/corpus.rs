//! The rows of a dataset, in memory, and where they come from.

use super::recipe::Sampling;
use super::{hex_digest, parquet_rows};
use crate::error::{Error, Result};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::ops::Range;
use std::path::Path;

/// The text of a dataset, row by row. At least one row holds more than white space.
#[derive(Debug, Clone)]
pub struct Corpus {
    text: String,
    rows: Vec<Range<usize>>,
    provenance: Provenance,
}

/// Where a text comes from: what the report says about it. Names only, never a path on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// The recipe's name, or the name of the file or folder.
    pub dataset: String,
    /// The dataset repository on the Hub, for a recipe.
    pub repository: Option<String>,
    /// The commit the files come from, where they lie in a Hugging Face cache and it is known.
    pub revision: Option<String>,
    /// The files, in the order they were read.
    pub files: Vec<ProvenanceFile>,
    /// The column (or JSON key) of the text; plain text has none.
    pub text_column: Option<String>,
    /// How windows are taken from the rows.
    #[serde(flatten)]
    pub sampling: Sampling,
    /// Rows with a text, an empty one included.
    pub rows: usize,
    /// Rows without one (null); they are left out.
    pub nulls: usize,
}

/// One file a text was read from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProvenanceFile {
    /// Its path below the dataset's root.
    pub name: String,
    /// SHA-256 of the file as it is on disk, in hexadecimal.
    pub sha256: String,
}

impl Corpus {
    /// Reads a parquet file that is already in memory (the bundled demo text); rows are joined with an empty
    /// line.
    pub fn from_parquet_bytes(name: &str, bytes: impl Into<Bytes>, column: &str) -> Result<Corpus> {
        let bytes = bytes.into();
        let mut hasher = Sha256::new();
        hasher.update(&bytes);
        let sampling = Sampling::joined_by_empty_line();
        let mut rows = Rows::new(&sampling);
        parquet_rows::read(bytes, Path::new(name), column, &mut rows)?;
        rows.into_corpus(Provenance {
            dataset: name.to_owned(),
            repository: None,
            revision: None,
            files: vec![ProvenanceFile { name: name.to_owned(), sha256: hex_digest(hasher) }],
            text_column: Some(column.to_owned()),
            sampling,
            rows: 0,
            nulls: 0,
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

    /// How windows are taken from the rows.
    pub fn sampling(&self) -> &Sampling {
        &self.provenance.sampling
    }

    /// Where the text comes from.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }
}

/// Rows on their way into a [`Corpus`]. They are joined as they come, so that a text is in memory only once.
pub(super) struct Rows {
    text: String,
    rows: Vec<Range<usize>>,
    nulls: usize,
    join: String,
}

impl Rows {
    pub(super) fn new(sampling: &Sampling) -> Self {
        let join = match sampling {
            Sampling::Stream { join } => join.clone(),
            Sampling::Documents => String::new(),
        };
        Self { text: String::new(), rows: Vec::new(), nulls: 0, join }
    }

    pub(super) fn push(&mut self, row: &str) {
        if !self.rows.is_empty() {
            self.text.push_str(&self.join);
        }
        let start = self.text.len();
        self.text.push_str(row);
        self.rows.push(start..self.text.len());
    }

    pub(super) fn push_null(&mut self) {
        self.nulls += 1;
    }

    /// Checks that there is text; `provenance` gets the number of rows.
    pub(super) fn into_corpus(self, provenance: Provenance) -> Result<Corpus> {
        let provenance = Provenance { rows: self.rows.len(), nulls: self.nulls, ..provenance };
        let corpus = Corpus { text: self.text, rows: self.rows, provenance };
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
        Provenance {
            dataset: "mine".into(),
            repository: None,
            revision: None,
            files: vec![],
            text_column: text_column.map(str::to_owned),
            sampling: Sampling::joined_by_empty_line(),
            rows: 0,
            nulls: 0,
        }
    }

    #[test]
    fn rows_are_joined_unchanged_and_nulls_left_out() {
        let mut rows = Rows::new(&Sampling::joined_by_empty_line());
        for row in [Some(""), Some(" a \n"), None, Some(""), Some("b")] {
            match row {
                Some(row) => rows.push(row),
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
            let mut rows = Rows::new(&Sampling::Documents);
            rows.push(" \n");
            rows.push_null();
            rows.into_corpus(provenance(column)).unwrap_err().to_string()
        };
        assert_eq!(empty(Some("text")), "column `text` of mine holds no text in any of its 2 rows");
        assert_eq!(empty(None), "`mine`: it holds no text");
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
