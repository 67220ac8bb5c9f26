//! Calibration text: from a dataset's name to token windows `[samples, seq_len]`.
//!
//! ```text
//! CorpusSource ── load ──► Corpus ── + Tokenizer ──► Tokens ──► Windows
//!  recipe or path          rows of text              ids         [samples, seq_len]
//! ```
//!
//! A [`CorpusSource`] finds the files of a [`Recipe`] or of a local path, a [`Corpus`] holds their rows,
//! [`Tokens`] are the text's ids by the model's own tokenizer, and [`Windows`] are what the pipeline runs
//! and what perplexity is measured on. This module does not download, print or read weights.

mod corpus;
mod hub_layout;
mod objects;
mod parquet_pages;
mod parquet_rows;
mod pieces;
mod recipe;
mod sentencepiece;
mod source;
mod special_tokens;
mod text_rows;
mod tokenizer;
mod tokens;
mod windows;

pub use corpus::{Corpus, Provenance, ProvenanceFile, Refused};
pub use recipe::{Recipe, Sampling};
pub use sentencepiece::sentencepiece_scores;
pub use source::{CorpusSource, SourceOptions};
pub use special_tokens::tokenizer_notes;
pub use tokenizer::Tokenizer;
pub use tokens::Tokens;
pub use windows::{MAX_OVERLAP, Windows, check_seq_len, shares};

#[cfg(test)]
mod test_support {
    use super::Tokenizer;
    use std::path::{Path, PathBuf};

    /// The bundled demo corpus: `calibration.parquet` and `tokenizer.json`.
    pub(super) fn demo() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("calibration/demo")
    }

    pub(super) fn demo_tokenizer() -> Tokenizer {
        Tokenizer::open(&demo()).unwrap()
    }

    /// The folder of the larger test data, where there is one. Tests that need it end in `_with_test_data`.
    pub(super) fn test_data() -> Option<PathBuf> {
        std::env::var_os("GPTQ_TEST_DATA").map(PathBuf::from)
    }
}
