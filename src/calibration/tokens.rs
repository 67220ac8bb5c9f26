//! A dataset as token ids.

use super::{Corpus, Sampling, Tokenizer};
use crate::error::{Error, Result};
use crate::progress::{Progress, Silent};

/// A dataset's token ids; every id is below the vocabulary's size.
#[derive(Debug)]
pub struct Tokens<'a> {
    dataset: String,
    vocab_size: usize,
    text: Text<'a>,
}

#[derive(Debug)]
pub(super) enum Text<'a> {
    /// The ids of the joined rows.
    Stream(Vec<u32>),
    /// Rows that are tokenized one by one, when they are drawn: documents or conversations.
    Rows { corpus: &'a Corpus, tokenizer: &'a Tokenizer },
}

impl<'a> Tokens<'a> {
    /// Tokenizes the joined text of a corpus for a model whose embedding has `vocab_size` rows. A corpus that is sampled by
    /// documents is tokenized later.
    pub fn new(corpus: &'a Corpus, tokenizer: &'a Tokenizer, vocab_size: usize) -> Result<Self> {
        Self::shown(corpus, tokenizer, vocab_size, &Silent)
    }

    /// [`Tokens::new`], with the progress of a long text.
    ///
    /// # Errors
    /// When the text cannot be tokenized, or has a token outside the vocabulary.
    pub fn shown(
        corpus: &'a Corpus,
        tokenizer: &'a Tokenizer,
        vocab_size: usize,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let dataset = corpus.name().to_owned();
        let text = match corpus.sampling() {
            Sampling::Stream { .. } => Text::Stream(tokenizer.encode_shown(corpus.text(), progress)?),
            Sampling::Documents | Sampling::Conversations => Text::Rows { corpus, tokenizer },
        };
        Self { dataset, vocab_size, text }.checked()
    }

    /// Bytes that the ids of a corpus will take, and that tokenizing it takes beside them for a while, before it is done. Both
    /// are 0 for a corpus whose rows are tokenized when they are drawn.
    pub fn memory(corpus: &Corpus, tokenizer: &Tokenizer) -> [u64; 2] {
        match corpus.sampling() {
            // Four bytes an id, which stands for about four of text.
            Sampling::Stream { .. } => [corpus.text().len() as u64, tokenizer.memory(corpus.text())],
            Sampling::Documents | Sampling::Conversations => [0; 2],
        }
    }

    /// The given ids as one text.
    pub fn from_ids(dataset: &str, ids: Vec<u32>, vocab_size: usize) -> Result<Tokens<'static>> {
        Tokens { dataset: dataset.to_owned(), vocab_size, text: Text::Stream(ids) }.checked()
    }

    /// The dataset's name.
    pub fn dataset(&self) -> &str {
        &self.dataset
    }

    /// How many tokens the whole text has; not known when documents are tokenized as they are drawn.
    pub fn count(&self) -> Option<usize> {
        match &self.text {
            Text::Stream(ids) => Some(ids.len()),
            Text::Rows { .. } => None,
        }
    }

    /// The ids of one row of a text whose rows are tokenized one by one.
    pub(super) fn row(&self, corpus: &Corpus, tokenizer: &Tokenizer, index: usize) -> Result<Vec<u32>> {
        let text = corpus.row(index);
        let ids = match corpus.sampling() {
            Sampling::Conversations => tokenizer.encode_rendered(text)?,
            _ => tokenizer.encode(text)?,
        };
        self.in_vocabulary(&ids)?;
        Ok(ids)
    }

    pub(super) fn text(&self) -> &Text<'a> {
        &self.text
    }

    /// Refuses an id that is not below the vocabulary's size.
    fn in_vocabulary(&self, ids: &[u32]) -> Result<()> {
        match ids.iter().position(|id| *id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(position) => Err(Error::TokenOutOfRange {
                dataset: self.dataset.clone(),
                id: ids[position],
                position,
                vocab: self.vocab_size,
            }),
        }
    }

    fn checked(self) -> Result<Self> {
        if let Text::Stream(ids) = &self.text {
            self.in_vocabulary(ids)?;
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibration::test_support::{demo, demo_tokenizer, test_data};
    use crate::calibration::{CorpusSource, SourceOptions};
    use sha2::{Digest, Sha256};

    fn parquet(path: std::path::PathBuf) -> Corpus {
        CorpusSource::resolve(path.to_str().unwrap(), &SourceOptions::default()).unwrap().load(None).unwrap()
    }

    #[test]
    fn the_joined_text_is_tokenized_as_a_whole() {
        let corpus = parquet(demo().join("calibration.parquet"));
        let tokenizer = demo_tokenizer();
        let tokens = Tokens::new(&corpus, &tokenizer, 4096).unwrap();
        let rows: Vec<_> = corpus.rows().collect();
        let Text::Stream(ids) = tokens.text() else { unreachable!() };
        assert_eq!(ids, &tokenizer.encode(&rows.join("\n\n")).unwrap());
        assert_eq!((tokens.count(), tokens.dataset()), (Some(ids.len()), "calibration.parquet"));
    }

    #[test]
    fn an_id_outside_the_vocabulary_is_an_error() {
        let corpus = parquet(demo().join("calibration.parquet"));
        let tokenizer = demo_tokenizer();
        let error = Tokens::new(&corpus, &tokenizer, 1).unwrap_err();
        assert_eq!(
            error.to_string(),
            "calibration.parquet: token id 1 at position 0 is outside the vocabulary of 1"
        );
        let error = Tokens::from_ids("mine", vec![3, 9, 10], 10).unwrap_err();
        assert_eq!(error.to_string(), "mine: token id 10 at position 2 is outside the vocabulary of 10");
    }

    /// The digests were made with Python's `tokenizers` 0.23.3: `encode("\n\n".join(rows)).ids` as
    /// little-endian u32.
    #[test]
    fn ids_are_those_of_python_with_test_data() {
        let Some(data) = test_data() else { return };
        let tokenizer = Tokenizer::open(&data.join("booklm")).unwrap();
        for (file, count, digest) in PYTHON_IDS {
            let corpus = parquet(data.join(file));
            let tokens = Tokens::new(&corpus, &tokenizer, 4096).unwrap();
            let Text::Stream(ids) = tokens.text() else { unreachable!() };
            let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            let mut hasher = Sha256::new();
            hasher.update(&bytes);
            assert_eq!(
                (ids.len(), crate::units::hex(&hasher.finalize()).as_str()),
                (count, digest),
                "{file}"
            );
        }
    }

    const PYTHON_IDS: [(&str, usize, &str); 2] = [
        (
            "wikitext-2-v1/test-00000-of-00001.parquet",
            414_802,
            "b244e671375dd8f2c8a77fa9c343de058119b7db1598f12b7396a28f9ca67dec",
        ),
        ("books/eval.parquet", 192_857, "f402e076a1bb68b41ff68a918a77169a20b385587910ac08b9ec6010feaa733a"),
    ];
}
