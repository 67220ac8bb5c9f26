//! Token windows: what the pipeline calibrates on and what perplexity is measured on.

use super::hex_digest;
use super::tokens::{Text, Tokens};
use crate::error::{Error, Result};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sha2::{Digest, Sha256};

/// How often, on average, random windows may cover the same text. Windows of a text that is shorter still
/// would be so alike that far fewer tokens than asked for would do the calibrating.
pub const MAX_OVERLAP: usize = 4;

/// Windows of the same length over a text: token ids, i64 as libtorch indexes with them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// `[count, seq_len]`, row-major.
    ids: Vec<i64>,
    seq_len: usize,
    /// From one begin to the next in the text; `seq_len` where windows have nothing to do with each other.
    stride: usize,
    digest: String,
}

/// Refuses windows longer than the model's context, before any text is read.
pub fn check_seq_len(seq_len: usize, max_position_embeddings: usize) -> Result<()> {
    at_least_one("sequence length", seq_len)?;
    if seq_len > max_position_embeddings {
        return Err(Error::SequenceTooLong { seq_len, max: max_position_embeddings });
    }
    Ok(())
}

impl Windows {
    /// `samples` random windows of `seq_len` tokens.
    ///
    /// Of a joined text, each window starts at a position drawn uniformly, and independently of the others,
    /// from `0..=count - seq_len`; a text that they would cover more than [`MAX_OVERLAP`] times is refused.
    /// Of a text sampled by documents, documents of at least `seq_len` bytes are drawn in random order, none
    /// twice; each with more than `seq_len` tokens gives one window, whose start is drawn likewise inside it.
    ///
    /// The same seed gives the same windows on every platform: draws are those of ChaCha8 keyed with the
    /// seed's 8 little-endian bytes and 24 zero bytes; below `n` they are `next_u64 % n`, drawn again while
    /// `next_u64` is at or above the largest multiple of `n` up to 2⁶⁴.
    pub fn random(tokens: &Tokens, samples: usize, seq_len: usize, seed: u64) -> Result<Windows> {
        at_least_one("samples", samples)?;
        at_least_one("sequence length", seq_len)?;
        let mut draws = Draws::new(seed);
        let mut windows = Builder::new(seq_len);
        match tokens.text() {
            Text::Stream(ids) => {
                let needed = samples.saturating_mul(seq_len).div_ceil(MAX_OVERLAP).max(seq_len);
                enough(tokens, ids.len(), samples, seq_len, needed)?;
                for _ in 0..samples {
                    let start = draws.below(ids.len() - seq_len + 1);
                    windows.push(&ids[start..start + seq_len]);
                }
            }
            Text::Documents { corpus, tokenizer } => {
                // A document has at most about one token a byte.
                let mut rows: Vec<usize> = corpus
                    .rows()
                    .enumerate()
                    .filter(|(_, row)| row.len() >= seq_len)
                    .map(|(row, _)| row)
                    .collect();
                for drawn in 0..rows.len() {
                    if windows.count() == samples {
                        break;
                    }
                    let other = drawn + draws.below(rows.len() - drawn);
                    rows.swap(drawn, other);
                    let ids = tokenizer.encode(corpus.row(rows[drawn]))?;
                    tokens.in_vocabulary(&ids)?;
                    if ids.len() > seq_len {
                        let start = draws.below(ids.len() - seq_len + 1);
                        windows.push(&ids[start..start + seq_len]);
                    }
                }
                if windows.count() < samples {
                    return Err(Error::Value {
                        what: "samples".into(),
                        expected: format!(
                            "at most {}, the documents of {} (of {}) with more than {seq_len} tokens",
                            windows.count(),
                            tokens.dataset(),
                            corpus.rows().len()
                        ),
                        found: samples.to_string(),
                    });
                }
            }
        }
        Ok(windows.finish())
    }

    /// Windows one after another from the front, none overlapping, at most `limit`; a last one that is not
    /// whole is dropped. Of a text sampled by documents, the documents follow each other in their order, each
    /// tokenized by itself.
    pub fn sequential(tokens: &Tokens, seq_len: usize, limit: Option<usize>) -> Result<Windows> {
        Self::strided(tokens, seq_len, seq_len, limit)
    }

    /// As [`Windows::sequential`], each beginning `stride` tokens after the one before: with less than `seq_len`, they
    /// overlap.
    pub fn strided(tokens: &Tokens, seq_len: usize, stride: usize, limit: Option<usize>) -> Result<Windows> {
        at_least_one("windows", limit.unwrap_or(1))?;
        at_least_one("sequence length", seq_len)?;
        if !(1..=seq_len).contains(&stride) {
            let expected = format!("1 to {seq_len}, the tokens of a window");
            return Err(Error::Value { what: "stride".into(), expected, found: stride.to_string() });
        }
        let limit = limit.unwrap_or(usize::MAX);
        let mut windows = Builder { stride, ..Builder::new(seq_len) };
        match tokens.text() {
            Text::Stream(ids) => {
                enough(tokens, ids.len(), 1, seq_len, seq_len)?;
                windows.push_all(ids, limit);
            }
            Text::Documents { corpus, tokenizer } => {
                let needed = (limit - 1).saturating_mul(stride).saturating_add(seq_len);
                let mut ids = Vec::new();
                for row in corpus.rows() {
                    if ids.len() >= needed {
                        break;
                    }
                    let document = tokenizer.encode(row)?;
                    tokens.in_vocabulary(&document)?;
                    ids.extend(document);
                }
                enough(tokens, ids.len(), 1, seq_len, seq_len)?;
                windows.push_all(&ids, limit);
            }
        }
        Ok(windows.finish())
    }

    /// How many windows there are.
    pub fn count(&self) -> usize {
        self.ids.len() / self.seq_len
    }

    /// Tokens a window.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// From one window's begin to the next one's.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The first token of a window that is scored: its first one has nothing to be predicted from, and what overlaps the
    /// window before was scored there.
    pub fn first_scored(&self, index: usize) -> usize {
        if index == 0 { 1 } else { (self.seq_len - self.stride).max(1) }
    }

    /// All ids, `[count, seq_len]`, row-major.
    pub fn ids(&self) -> &[i64] {
        &self.ids
    }

    /// The ids of one window.
    pub fn window(&self, index: usize) -> &[i64] {
        &self.ids[index * self.seq_len..][..self.seq_len]
    }

    /// SHA-256 over the ids as little-endian u32, window after window, in hexadecimal: two runs with the same
    /// digest saw the same tokens.
    pub fn digest(&self) -> &str {
        &self.digest
    }
}

fn at_least_one(what: &str, value: usize) -> Result<()> {
    if value == 0 {
        return Err(Error::Value { what: what.into(), expected: "at least 1".into(), found: "0".into() });
    }
    Ok(())
}

fn enough(tokens: &Tokens, found: usize, windows: usize, seq_len: usize, needed: usize) -> Result<()> {
    if found < needed {
        let dataset = tokens.dataset().to_owned();
        return Err(Error::TooLittleText { dataset, tokens: found, windows, seq_len, needed });
    }
    Ok(())
}

/// Windows on their way; the digest grows with them.
struct Builder {
    ids: Vec<i64>,
    seq_len: usize,
    stride: usize,
    hasher: Sha256,
}

impl Builder {
    fn new(seq_len: usize) -> Self {
        Self { ids: Vec::new(), seq_len, stride: seq_len, hasher: Sha256::new() }
    }

    fn push(&mut self, window: &[u32]) {
        debug_assert_eq!(window.len(), self.seq_len);
        for id in window {
            self.hasher.update(id.to_le_bytes());
            self.ids.push(i64::from(*id));
        }
    }

    fn push_all(&mut self, ids: &[u32], limit: usize) {
        let (seq_len, stride) = (self.seq_len, self.stride);
        ids.windows(seq_len).step_by(stride).take(limit).for_each(|window| self.push(window));
    }

    fn count(&self) -> usize {
        self.ids.len() / self.seq_len
    }

    fn finish(self) -> Windows {
        Windows { ids: self.ids, seq_len: self.seq_len, stride: self.stride, digest: hex_digest(self.hasher) }
    }
}

/// Uniform draws that do not depend on the platform or on how `rand` draws from ranges.
struct Draws(ChaCha8Rng);

impl Draws {
    fn new(seed: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        Self(ChaCha8Rng::from_seed(key))
    }

    /// Uniform in `0..n`; `n` is not 0.
    fn below(&mut self, n: usize) -> usize {
        let n = n as u64;
        // 2^64 mod n: what is left above the largest multiple of n.
        let rest = (u64::MAX % n + 1) % n;
        loop {
            let draw = self.0.next_u64();
            if draw <= u64::MAX - rest {
                return (draw % n) as usize;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibration::test_support::{demo_tokenizer, test_data};
    use crate::calibration::{Corpus, CorpusSource, SourceOptions, Tokenizer};

    fn counting(count: u32) -> Tokens<'static> {
        Tokens::from_ids("mine", (0..count).collect(), count as usize).unwrap()
    }

    fn starts(windows: &Windows) -> Vec<i64> {
        (0..windows.count()).map(|index| windows.window(index)[0]).collect()
    }

    /// A corpus sampled by documents of these lengths in words.
    fn documents(lengths: &[usize]) -> Corpus {
        let folder = tempfile::tempdir().unwrap();
        let line = |(row, words): (usize, &usize)| {
            let text: String = (0..*words).map(|word| format!("word {row} {word} ")).collect();
            format!("{{\"text\": \"{text}\"}}\n")
        };
        let recipe = "repository = 'a/b'\nrevision = 'main'\nconfig = ''\nsplit = 'train'\nfiles = ['x.jsonl']\n\
                      text_column = 'text'\nsampling = 'documents'\nevaluate = 'wikitext2-test'\n";
        std::fs::write(folder.path().join("pages.toml"), recipe).unwrap();
        let lines: String = lengths.iter().enumerate().map(line).collect();
        std::fs::write(folder.path().join("x.jsonl"), lines).unwrap();
        let options = SourceOptions { roots: vec![folder.path().into()], ..Default::default() };
        let path = folder.path().join("pages.toml");
        CorpusSource::resolve(path.to_str().unwrap(), &options).unwrap().load().unwrap()
    }

    /// The expected starts were made with an independent ChaCha8 in Python, from the rule in
    /// `Windows::random`.
    #[test]
    fn random_starts_are_fixed() {
        let windows = Windows::random(&counting(1000), 8, 10, 0).unwrap();
        assert_eq!(starts(&windows), STARTS_SEED_0);
        assert_eq!((windows.count(), windows.seq_len(), windows.ids().len()), (8, 10, 80));
        assert!((0..8).all(|index| windows.window(index).windows(2).all(|pair| pair[1] == pair[0] + 1)));
        assert_eq!(starts(&Windows::random(&counting(1000), 8, 10, u64::MAX).unwrap()), STARTS_SEED_MAX);
    }

    const STARTS_SEED_0: [i64; 8] = [501, 160, 618, 117, 926, 8, 518, 817];
    const STARTS_SEED_MAX: [i64; 8] = [955, 339, 377, 467, 797, 439, 957, 553];

    /// Also from Python; with this bound nearly every second draw is thrown away.
    #[test]
    fn draws_at_the_top_are_repeated() {
        let mut draws = Draws::new(1);
        let bound = (1 << 63) + 1;
        let drawn = [(); 3].map(|()| draws.below(bound) as u64);
        assert_eq!(drawn, [7_037_237_572_835_827_407, 5_440_448_899_038_119_230, 2_567_501_368_458_013_526]);
    }

    #[test]
    fn the_digest_is_that_of_the_ids() {
        let tokens = Tokens::from_ids("mine", vec![1, 0x0102, 3, 4], 1000).unwrap();
        let windows = Windows::sequential(&tokens, 2, None).unwrap();
        let mut hasher = Sha256::new();
        hasher.update([1, 0, 0, 0, 2, 1, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0]);
        assert_eq!(windows.digest(), hex_digest(hasher));
    }

    #[test]
    fn both_ends_of_the_text_are_drawn() {
        let windows = Windows::random(&counting(12), 4, 10, 3).unwrap();
        let all: Vec<_> =
            (0..64).flat_map(|seed| starts(&Windows::random(&counting(12), 4, 10, seed).unwrap())).collect();
        assert!([0, 1, 2].iter().all(|start| all.contains(start)));
        assert!(all.iter().all(|start| *start <= 2));
        assert_eq!(windows, Windows::random(&counting(12), 4, 10, 3).unwrap());
        // A text of one window's length has one start.
        assert_eq!(starts(&Windows::random(&counting(10), 4, 10, 7).unwrap()), [0; 4]);
    }

    #[test]
    fn too_little_text_is_an_error_with_the_numbers() {
        let random =
            |count, samples, seq_len| Windows::random(&counting(count), samples, seq_len, 0).unwrap_err();
        assert_eq!(random(9, 1, 10).to_string(), "mine has 9 tokens; 1 x 10 need at least 10");
        assert_eq!(random(319, 128, 10).to_string(), "mine has 319 tokens; 128 x 10 need at least 320");
        assert!(Windows::random(&counting(320), 128, 10, 0).is_ok());
        assert_eq!(random(9, 0, 10).to_string(), "samples: expected at least 1, found `0`");
        assert_eq!(random(9, 1, 0).to_string(), "sequence length: expected at least 1, found `0`");

        let sequential = Windows::sequential(&counting(9), 10, None).unwrap_err();
        assert_eq!(sequential.to_string(), "mine has 9 tokens; 1 x 10 need at least 10");
        let none = Windows::sequential(&counting(9), 3, Some(0)).unwrap_err();
        assert_eq!(none.to_string(), "windows: expected at least 1, found `0`");
    }

    #[test]
    fn sequential_windows_follow_each_other() {
        let all = Windows::sequential(&counting(35), 10, None).unwrap();
        assert_eq!(starts(&all), [0, 10, 20]);
        assert_eq!(starts(&Windows::sequential(&counting(35), 10, Some(2)).unwrap()), [0, 10]);
        assert_eq!(Windows::sequential(&counting(35), 10, Some(9)).unwrap(), all);
    }

    #[test]
    fn strided_windows_score_every_token_once() {
        let windows = Windows::strided(&counting(35), 10, 4, None).unwrap();
        assert_eq!(starts(&windows), [0, 4, 8, 12, 16, 20, 24]);
        let scored = |index: usize| windows.window(index)[windows.first_scored(index)..].to_vec();
        let all: Vec<i64> = (0..windows.count()).flat_map(scored).collect();
        assert_eq!(all, (1..34).collect::<Vec<_>>());
        let limited = Windows::strided(&counting(35), 10, 4, Some(2)).unwrap();
        assert_eq!((starts(&limited), limited.stride()), (vec![0, 4], 4));
        let apart = Windows::sequential(&counting(35), 10, None).unwrap();
        assert_eq!([0, 1, 2].map(|index| apart.first_scored(index)), [1; 3]);
        let refused = |stride| Windows::strided(&counting(35), 10, stride, None).unwrap_err().to_string();
        assert_eq!(refused(11), "stride: expected 1 to 10, the tokens of a window, found `11`");
        assert_eq!(refused(0), "stride: expected 1 to 10, the tokens of a window, found `0`");
    }

    #[test]
    fn a_window_longer_than_the_context_is_refused() {
        assert!(check_seq_len(2048, 2048).is_ok());
        assert_eq!(
            check_seq_len(4096, 2048).unwrap_err().to_string(),
            "sequence length 4096 is above the model's max_position_embeddings 2048"
        );
        assert!(check_seq_len(0, 2048).is_err());
    }

    #[test]
    fn documents_give_one_window_each() {
        let (corpus, tokenizer) = (documents(&[3, 40, 50, 0, 60, 2]), demo_tokenizer());
        let tokens = Tokens::new(&corpus, &tokenizer, 4096).unwrap();
        assert_eq!(tokens.count(), None);
        let windows = Windows::random(&tokens, 3, 100, 5).unwrap();
        assert_eq!(windows, Windows::random(&tokens, 3, 100, 5).unwrap());
        let texts: Vec<Vec<u32>> = corpus.rows().map(|row| tokenizer.encode(row).unwrap()).collect();
        let mut from: Vec<_> = (0..3)
            .map(|index| {
                let window: Vec<u32> = windows.window(index).iter().map(|id| *id as u32).collect();
                texts.iter().position(|text| text.windows(100).any(|part| part == window)).unwrap()
            })
            .collect();
        from.sort_unstable();
        assert_eq!(from, [1, 2, 4]);

        assert_eq!(
            Windows::random(&tokens, 4, 100, 5).unwrap_err().to_string(),
            "samples: expected at most 3, the documents of pages (of 6) with more than 100 tokens, found `4`"
        );
        assert!(matches!(
            Windows::random(&Tokens::new(&corpus, &tokenizer, 100).unwrap(), 1, 100, 5),
            Err(Error::TokenOutOfRange { .. })
        ));
    }

    #[test]
    fn documents_follow_each_other_in_sequence() {
        let (corpus, tokenizer) = (documents(&[3, 40, 50]), demo_tokenizer());
        let tokens = Tokens::new(&corpus, &tokenizer, 4096).unwrap();
        let ids: Vec<i64> =
            corpus.rows().flat_map(|row| tokenizer.encode(row).unwrap()).map(i64::from).collect();
        let windows = Windows::sequential(&tokens, 20, Some(4)).unwrap();
        assert_eq!((windows.count(), windows.ids()), (4, &ids[..80]));
        let all = Windows::sequential(&tokens, 20, None).unwrap();
        assert_eq!(all.ids(), &ids[..ids.len() / 20 * 20]);
        assert!(matches!(Windows::sequential(&tokens, 10_000, None), Err(Error::TooLittleText { .. })));
    }

    /// The windows of the reference perplexities: one BOS, at the very front.
    #[test]
    fn evaluation_windows_start_with_one_bos_with_test_data() {
        let Some(data) = test_data() else { return };
        let tokenizer = Tokenizer::open(&data.join("booklm")).unwrap();
        let path = data.join("books/eval.parquet");
        let corpus =
            CorpusSource::resolve(path.to_str().unwrap(), &SourceOptions::default()).unwrap().load().unwrap();
        let tokens = Tokens::new(&corpus, &tokenizer, 4096).unwrap();
        let windows = Windows::sequential(&tokens, 1024, Some(16)).unwrap();
        assert_eq!((windows.count(), windows.ids().iter().filter(|id| **id == 1).count()), (16, 1));
        assert_eq!(windows.ids()[0], 1);
    }
}
