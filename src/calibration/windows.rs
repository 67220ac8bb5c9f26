//! Token windows: what the pipeline calibrates on and what perplexity is measured on.

use super::recipe::Sampling;
use super::tokens::{Text, Tokens};
use crate::error::{Error, Result};
use crate::units::hex;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sha2::{Digest, Sha256};

/// Number of random windows that may cover a token, on average. In a shorter text the windows would overlap so much that
/// calibration would use far fewer different tokens than requested.
pub const MAX_OVERLAP: usize = 4;

/// Windows of the same length over a text: token ids, i64 as libtorch indexes with them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// `[count, seq_len]`, row-major.
    ids: Vec<i64>,
    seq_len: usize,
    /// Tokens from the start of a window to the start of the next; `seq_len` for random windows.
    stride: usize,
    distinct: usize,
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
    /// In a joined text each window starts at a position drawn uniformly from `0..=count - seq_len`, independently of the
    /// others. It is an error if they would cover the text more than [`MAX_OVERLAP`] times. In a text sampled by documents,
    /// documents of at least `seq_len` bytes are drawn in random order, none twice. Each with more than `seq_len` tokens gives
    /// one window, whose start is drawn inside it. Conversations are drawn in random order, none twice; their tokens are
    /// joined, and windows cut from the front.
    ///
    /// The same seed gives the same windows on every platform. Draws come from ChaCha8; its key is the seed's 8 little-endian
    /// bytes and 24 zero bytes. A draw below `n` is `next_u64 % n`. It is repeated while `next_u64` is at or above the largest
    /// multiple of `n` up to 2⁶⁴.
    pub fn random(tokens: &Tokens, samples: usize, seq_len: usize, seed: u64) -> Result<Windows> {
        Self::mixed(&[(tokens, samples)], seq_len, seed)
    }

    /// Random windows of several texts, each with its number of windows, drawn as in [`Windows::random`]. The key of the draws
    /// has the position of the text, from 0, after the seed. They are interleaved: any number of the first windows has the
    /// texts in about these proportions.
    pub fn mixed(texts: &[(&Tokens, usize)], seq_len: usize, seed: u64) -> Result<Windows> {
        at_least_one("sequence length", seq_len)?;
        let (mut drawn, mut repeated) = (Vec::with_capacity(texts.len()), 0);
        for (position, &(tokens, samples)) in texts.iter().enumerate() {
            at_least_one("samples", samples)?;
            let (ids, repeats) = draw(tokens, samples, seq_len, &mut Draws::new(seed, position as u64))?;
            drawn.push(ids);
            repeated += repeats;
        }
        let mut windows = Builder::new(seq_len);
        let mut taken = vec![0; texts.len()];
        let total: usize = texts.iter().map(|&(_, samples)| samples).sum();
        for count in 1..=total {
            // What a text lacks of its part of `count` windows, times the total.
            let lacks = |i: &usize| (texts[*i].1 * count) as i128 - (taken[*i] * total) as i128;
            let left = (0..texts.len()).filter(|&i| taken[i] < texts[i].1);
            let next = left.max_by_key(|i| (lacks(i), std::cmp::Reverse(*i))).expect("windows are left");
            windows.push(&drawn[next][taken[next] * seq_len..][..seq_len]);
            taken[next] += 1;
        }
        windows.repeated = repeated;
        Ok(windows.finish())
    }

    /// Windows one after another from the front, none overlapping, at most `limit`; a last one that is not
    /// whole is dropped. Of a text sampled by documents or conversations, these follow each other in their order, each
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
            Text::Rows { corpus, tokenizer } => {
                let needed = (limit - 1).saturating_mul(stride).saturating_add(seq_len);
                let mut ids = Vec::new();
                for row in 0..corpus.rows().len() {
                    if ids.len() >= needed {
                        break;
                    }
                    ids.extend(tokens.row(corpus, tokenizer, row)?);
                }
                enough(tokens, ids.len(), 1, seq_len, seq_len)?;
                windows.push_all(&ids, limit);
            }
        }
        windows.repeated = (windows.ids.len() / seq_len).saturating_sub(1) * (seq_len - stride);
        Ok(windows.finish())
    }

    /// Number of windows.
    pub fn count(&self) -> usize {
        self.ids.len() / self.seq_len
    }

    /// Tokens a window.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// Tokens from the start of a window to the start of the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The first scored token of a window. Its first token has no context, and tokens that overlap the window before were
    /// scored there.
    pub fn first_scored(&self, index: usize) -> usize {
        if index == 0 { 1 } else { (self.seq_len - self.stride).max(1) }
    }

    /// Distinct tokens of the texts that the windows cover: each counts once, however many windows overlap there.
    pub fn distinct(&self) -> usize {
        self.distinct
    }

    /// All ids, `[count, seq_len]`, row-major.
    pub fn ids(&self) -> &[i64] {
        &self.ids
    }

    /// The ids of one window.
    pub fn window(&self, index: usize) -> &[i64] {
        &self.ids[index * self.seq_len..][..self.seq_len]
    }

    /// SHA-256 over the ids as little-endian u32, window after window, in hexadecimal: two runs with the same digest used the
    /// same tokens.
    pub fn digest(&self) -> &str {
        &self.digest
    }
}

/// Number of windows of each text, of `samples`, in proportion to its weight. Windows left by rounding down go to the largest
/// remainders.
///
/// # Errors
/// When there are too few for every text to get one.
pub fn shares(weights: &[u32], samples: usize) -> Result<Vec<usize>> {
    let total: u64 = weights.iter().map(|&weight| u64::from(weight)).sum::<u64>().max(1);
    let exact = |i: usize| samples as u128 * u128::from(weights[i]);
    let mut shares: Vec<usize> =
        (0..weights.len()).map(|i| (exact(i) / u128::from(total)) as usize).collect();
    let mut by_remainder: Vec<usize> = (0..weights.len()).collect();
    by_remainder.sort_by_key(|&i| std::cmp::Reverse(exact(i) % u128::from(total)));
    let left = samples - shares.iter().sum::<usize>();
    by_remainder.iter().take(left).for_each(|&i| shares[i] += 1);
    if shares.contains(&0) {
        let expected =
            "a window at least of each dataset; use more samples, or weights that are nearer to each other";
        return Err(Error::Value {
            what: "samples".into(),
            expected: expected.into(),
            found: samples.to_string(),
        });
    }
    Ok(shares)
}

/// The ids of the random windows of one text, `[samples, seq_len]`, and how many of them are tokens that another window has too.
fn draw(tokens: &Tokens, samples: usize, seq_len: usize, draws: &mut Draws) -> Result<(Vec<u32>, usize)> {
    let mut starts = Vec::new();
    let mut windows = Vec::with_capacity(samples.saturating_mul(seq_len).min(1 << 28));
    match tokens.text() {
        Text::Stream(ids) => {
            let needed = samples.saturating_mul(seq_len).div_ceil(MAX_OVERLAP).max(seq_len);
            enough(tokens, ids.len(), samples, seq_len, needed)?;
            for _ in 0..samples {
                let start = draws.below(ids.len() - seq_len + 1);
                windows.extend_from_slice(&ids[start..start + seq_len]);
                starts.push(start);
            }
        }
        Text::Rows { corpus, tokenizer } if *corpus.sampling() == Sampling::Conversations => {
            let needed = samples.saturating_mul(seq_len);
            let mut order: Vec<usize> = (0..corpus.rows().len()).collect();
            for drawn in 0..order.len() {
                if windows.len() >= needed {
                    break;
                }
                let other = drawn + draws.below(order.len() - drawn);
                order.swap(drawn, other);
                windows.extend(tokens.row(corpus, tokenizer, order[drawn])?);
            }
            enough(tokens, windows.len(), samples, seq_len, needed)?;
            windows.truncate(needed);
        }
        Text::Rows { corpus, tokenizer } => {
            // A document has at most about one token a byte.
            let long_enough = corpus.rows().enumerate().filter(|(_, row)| row.len() >= seq_len);
            let mut rows: Vec<usize> = long_enough.map(|(row, _)| row).collect();
            for drawn in 0..rows.len() {
                if windows.len() == samples * seq_len {
                    break;
                }
                let other = drawn + draws.below(rows.len() - drawn);
                rows.swap(drawn, other);
                let ids = tokens.row(corpus, tokenizer, rows[drawn])?;
                if ids.len() > seq_len {
                    let start = draws.below(ids.len() - seq_len + 1);
                    windows.extend_from_slice(&ids[start..start + seq_len]);
                }
            }
            let found = windows.len() / seq_len;
            if found < samples {
                return Err(Error::Value {
                    what: "samples".into(),
                    expected: format!(
                        "at most {found}, the documents of {} (of {}) with more than {seq_len} tokens",
                        tokens.dataset(),
                        corpus.rows().len()
                    ),
                    found: samples.to_string(),
                });
            }
        }
    }
    // Documents and conversations are drawn once each.
    starts.sort_unstable();
    let overlap = |pair: &[usize]| (pair[0] + seq_len).saturating_sub(pair[1]);
    Ok((windows, starts.windows(2).map(overlap).sum()))
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

/// Windows that are being collected, with their digest.
struct Builder {
    ids: Vec<i64>,
    seq_len: usize,
    stride: usize,
    /// Tokens that an earlier window has too.
    repeated: usize,
    hasher: Sha256,
}

impl Builder {
    fn new(seq_len: usize) -> Self {
        Self { ids: Vec::new(), seq_len, stride: seq_len, repeated: 0, hasher: Sha256::new() }
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

    fn finish(self) -> Windows {
        Windows {
            distinct: self.ids.len() - self.repeated,
            ids: self.ids,
            seq_len: self.seq_len,
            stride: self.stride,
            digest: hex(&self.hasher.finalize()),
        }
    }
}

/// Uniform draws that do not depend on the platform or on how `rand` draws from ranges.
struct Draws(ChaCha8Rng);

impl Draws {
    fn new(seed: u64, position: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&position.to_le_bytes());
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
