//! The unquantized model's prediction at one position in a compact form, and the divergence of a quantized model's prediction from
//! it.
//!
//! Kept are the most likely tokens that together have all but [`TAIL`] of the probability, at most, each with its
//! log-probability in steps of [`STEP`] nats; of the others only how many of 1 they have together. Over these (the tail counts
//! as one token) the divergence falls short by the tail's mass times the divergence *within* the tail. That is taken to be
//! what the kept tokens have for the same mass: the sum is divided by 1 less the tail's mass. What remains is an error of
//! less than 0.25% of the divergence where the tail is off by 0.7 to 1.3 times as much as the rest, and at most a shortfall of
//! the tail's mass times its own divergence where it is off by more. On real text it is 0.1% (a test compares with the
//! whole vocabulary), in `the_error_is_as_stated` less than 0.4%. Kept probabilities are scaled so that they add up again,
//! so that the steps' rounding enters only in second order.

use bytemuck::cast_slice;

/// The largest probability that is kept only as a sum.
pub(super) const TAIL: f64 = 1.0 / 128.0;

/// Nats; 65535 of them are 32 nats below the most likely token.
const STEP: f32 = 1.0 / 2048.0;

/// Steps of a class, by which the tail is found.
const CLASS: usize = 16;

/// A prediction over a vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Prediction {
    /// Log-probability of the token that came, exactly.
    pub(super) target: f32,
    /// The most likely token.
    top: u32,
    /// Its log-probability.
    top_log_p: f32,
    /// Probability of all tokens that are not kept.
    tail: f32,
    /// Kept tokens, ascending.
    ids: Vec<u32>,
    /// Distance of each below the most likely one, in steps.
    steps: Vec<u16>,
}

impl Prediction {
    /// From log-probabilities over the vocabulary; `target` is the token that came.
    pub(super) fn new(log_p: &[f32], target: usize) -> Self {
        let top = most_likely(log_p);
        let top_log_p = log_p[top];
        // A NaN lands in the first class; the check of the mean finds it.
        let step = |l: f32| ((top_log_p - l) / STEP).round() as u16;
        let mut masses = [0.0; (u16::MAX as usize + 1) / CLASS];
        for &l in log_p {
            masses[usize::from(step(l)) / CLASS] += f64::from(l.exp());
        }
        let (mut kept, mut tail) = (masses.len(), 0.0);
        while kept > 0 && tail + masses[kept - 1] <= TAIL {
            kept -= 1;
            tail += masses[kept];
        }
        let in_front = |l: f32| usize::from(step(l)) / CLASS < kept;
        let ids = (0..log_p.len()).filter(|&i| in_front(log_p[i])).map(|i| i as u32).collect();
        let steps = log_p.iter().filter(|l| in_front(**l)).map(|l| step(*l)).collect();
        Self { target: log_p[target], top: top as u32, top_log_p, tail: tail as f32, ids, steps }
    }

    /// `KL(this ‖ log_q)`, nats, and whether both have the same most likely token.
    pub(super) fn compare(&self, log_q: &[f32]) -> (f64, bool) {
        let log_p = |step: u16| f64::from(self.top_log_p - f32::from(step) * STEP);
        let sum: f64 = self.steps.iter().map(|&s| log_p(s).exp()).sum();
        let scale = ((1.0 - f64::from(self.tail)) / sum).ln();
        let (mut divergence, mut rest, mut next) = (0.0, 0.0, 0);
        for (&id, &step) in self.ids.iter().zip(&self.steps) {
            let id = id as usize;
            rest += log_q[next..id].iter().map(|l| f64::from(l.exp())).sum::<f64>();
            next = id + 1;
            let log_p = log_p(step) + scale;
            divergence += log_p.exp() * (log_p - f64::from(log_q[id]));
        }
        rest += log_q[next..].iter().map(|l| f64::from(l.exp())).sum::<f64>();
        if self.tail > 0.0 {
            let tail = f64::from(self.tail);
            divergence += tail * (tail / rest).ln();
        }
        (divergence / (1.0 - f64::from(self.tail)), most_likely(log_q) == self.top as usize)
    }

    /// Appends it to a file's bytes: of kept tokens the ids, or a bit for each token of the vocabulary where that is less.
    pub(super) fn write(&self, vocab: usize, bytes: &mut Vec<u8>) {
        bytes.extend(self.target.to_le_bytes());
        bytes.extend(self.top.to_le_bytes());
        bytes.extend(self.top_log_p.to_le_bytes());
        bytes.extend(self.tail.to_le_bytes());
        let count = self.ids.len();
        bytes.extend((count as u32).to_le_bytes());
        if as_bits(vocab, count) {
            let mut bits = vec![0u8; vocab.div_ceil(8)];
            self.ids.iter().for_each(|&id| bits[id as usize / 8] |= 1 << (id % 8));
            bytes.extend(bits);
        } else if id_bytes(vocab) == 4 {
            bytes.extend_from_slice(cast_slice(&self.ids));
        } else {
            self.ids.iter().for_each(|&id| bytes.extend((id as u16).to_le_bytes()));
        }
        bytes.extend_from_slice(cast_slice(&self.steps));
    }

    /// Reads it from the front of a file's bytes; `None` when they are no prediction over `vocab` tokens.
    pub(super) fn read(vocab: usize, bytes: &mut &[u8]) -> Option<Self> {
        fn word(bytes: &mut &[u8]) -> Option<[u8; 4]> {
            let (word, rest) = bytes.split_first_chunk()?;
            *bytes = rest;
            Some(*word)
        }
        let target = f32::from_le_bytes(word(bytes)?);
        let top = u32::from_le_bytes(word(bytes)?);
        let top_log_p = f32::from_le_bytes(word(bytes)?);
        let tail = f32::from_le_bytes(word(bytes)?);
        let count = u32::from_le_bytes(word(bytes)?) as usize;
        if count > vocab {
            return None;
        }
        let halves = |bytes: &[u8]| -> Vec<u16> {
            bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect()
        };
        let bits = as_bits(vocab, count);
        let length = if bits { vocab.div_ceil(8) } else { count * id_bytes(vocab) };
        let (ids, rest) = bytes.split_at_checked(length)?;
        let ids: Vec<u32> = if bits {
            let set = |id: &u32| ids[*id as usize / 8] >> (id % 8) & 1 == 1;
            (0..ids.len() as u32 * 8).filter(set).collect()
        } else if id_bytes(vocab) == 4 {
            ids.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        } else {
            halves(ids).into_iter().map(u32::from).collect()
        };
        if ids.len() != count {
            return None;
        }
        let (steps, rest) = rest.split_at_checked(count * 2)?;
        *bytes = rest;
        let ascending = ids.is_sorted_by(|a, b| a < b);
        let inside = ids.last().is_none_or(|&id| (id as usize) < vocab) && (top as usize) < vocab;
        (ascending && inside).then(|| Self { target, top, top_log_p, tail, ids, steps: halves(steps) })
    }
}

/// Bytes of an id.
fn id_bytes(vocab: usize) -> usize {
    if vocab > usize::from(u16::MAX) + 1 { 4 } else { 2 }
}

/// Whether a bit for every token of the vocabulary takes less than `count` ids.
fn as_bits(vocab: usize, count: usize) -> bool {
    vocab.div_ceil(8) < count * id_bytes(vocab)
}

/// The first of the largest.
fn most_likely(log_p: &[f32]) -> usize {
    log_p.iter().enumerate().fold(0, |best, (i, l)| if *l > log_p[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use rand_chacha::{
        ChaCha8Rng,
        rand_core::{RngCore, SeedableRng},
    };

    use super::*;

    /// Standard normal numbers.
    fn normal(rng: &mut ChaCha8Rng) -> f64 {
        let mut uniform = || (rng.next_u32() as f64 + 0.5) / (f64::from(u32::MAX) + 1.0);
        (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()
    }

    fn log_softmax(logits: &[f64]) -> Vec<f32> {
        let sum = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
        logits.iter().map(|l| (l - sum) as f32).collect()
    }

    fn exact(log_p: &[f32], log_q: &[f32]) -> f64 {
        let terms = log_p.iter().zip(log_q).map(|(&p, &q)| f64::from(p).exp() * f64::from(p - q));
        terms.sum()
    }

    /// Vocabularies, spreads of the logits and noises as models have them.
    #[test]
    fn the_error_is_as_stated() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for (vocab, spread, noise) in
            [(4096, 3.0, 0.03), (4096, 1.0, 0.1), (32000, 4.0, 0.02), (32000, 3.0, 1.0)]
        {
            let (mut found, mut expected, mut kept) = (0.0, 0.0, 0);
            const POSITIONS: usize = 40;
            for _ in 0..POSITIONS {
                let logits: Vec<f64> = (0..vocab).map(|_| normal(&mut rng) * spread).collect();
                let moved: Vec<f64> = logits.iter().map(|l| l + normal(&mut rng) * noise).collect();
                let (log_p, log_q) = (log_softmax(&logits), log_softmax(&moved));
                let prediction = Prediction::new(&log_p, 7);
                assert_eq!(prediction.target, log_p[7]);
                assert!(f64::from(prediction.tail) <= TAIL);
                found += prediction.compare(&log_q).0;
                expected += exact(&log_p, &log_q);
                kept += prediction.ids.len();
            }
            let short = 1.0 - found / expected;
            assert!(short.abs() < 0.004, "{vocab} {spread} {noise}: short by {short}");
            assert!(kept <= POSITIONS * vocab);
        }
    }

    #[test]
    fn a_prediction_is_not_away_from_itself() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let log_p = log_softmax(&(0..4096).map(|_| normal(&mut rng) * 3.0).collect::<Vec<_>>());
        let prediction = Prediction::new(&log_p, 0);
        let (divergence, same) = prediction.compare(&log_p);
        assert!(divergence.abs() < 1e-7 && same, "{divergence}");
        let mut other = log_p.clone();
        other[(prediction.top as usize + 1) % 4096] = 0.0;
        assert!(!prediction.compare(&other).1);
    }

    #[test]
    fn bytes_and_back() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        // Few of many tokens, many of few.
        for (vocab, spread) in [(300, 20.0), (300, 1.0), (70_000, 20.0), (70_000, 1.0)] {
            let logits: Vec<f64> = (0..vocab).map(|_| normal(&mut rng) * spread).collect();
            let prediction = Prediction::new(&log_softmax(&logits), 5);
            assert_eq!(as_bits(vocab, prediction.ids.len()), spread == 1.0);
            let mut bytes = Vec::new();
            prediction.write(vocab, &mut bytes);
            let mut rest = &bytes[..];
            assert_eq!(Prediction::read(vocab, &mut rest), Some(prediction.clone()));
            assert!(rest.is_empty());
            for end in (0..bytes.len()).step_by(bytes.len().div_ceil(500)) {
                assert_eq!(Prediction::read(vocab, &mut &bytes[..end]), None);
            }
            // A token that the vocabulary does not have.
            let last = *prediction.ids.last().unwrap() as usize;
            assert_eq!(Prediction::read(last, &mut &bytes[..]), None);
        }
    }
}
