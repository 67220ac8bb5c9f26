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
#[path = "windows_tests.rs"]
mod tests;
