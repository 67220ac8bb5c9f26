//! Choosing the next token.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

use crate::error::{Error, Result};

/// Choice of the next token from its logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divisor of the logits; 0 takes the most likely token always.
    pub temperature: f64,
    /// Only the most likely tokens that together reach this probability (nucleus sampling, arXiv 1904.09751).
    pub top_p: f64,
    /// Logits of tokens that occurred are divided by it if positive, else multiplied (arXiv 1909.05858); 1 changes
    /// nothing.
    pub repetition_penalty: f64,
    /// Same seed, same logits: same tokens.
    pub seed: u64,
}

/// Chooses tokens.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
}

impl Sampler {
    /// # Errors
    /// When a setting is out of its range.
    pub fn new(sampling: &Sampling) -> Result<Self> {
        let Sampling { temperature, top_p, repetition_penalty, seed } = *sampling;
        let checks = [
            ("temperature", temperature, temperature >= 0.0, "a number from 0"),
            ("top-p", top_p, top_p > 0.0 && top_p <= 1.0, "a number above 0 and up to 1"),
            ("repetition-penalty", repetition_penalty, repetition_penalty > 0.0, "a number above 0"),
        ];
        for (what, value, right, expected) in checks {
            if !right || !value.is_finite() {
                return Err(Error::Value {
                    what: what.into(),
                    expected: expected.into(),
                    found: value.to_string(),
                });
            }
        }
        Ok(Self { sampling: *sampling, random: ChaCha8Rng::seed_from_u64(seed) })
    }

    /// The next token after `history`, from its logits `[vocab]`. It changes the logits.
    ///
    /// # Errors
    /// When a logit is NaN or infinite.
    pub fn next(&mut self, logits: &mut [f32], history: &[u32]) -> Result<u32> {
        let broken = logits.iter().filter(|l| !l.is_finite()).count() as u64;
        if broken > 0 || logits.is_empty() {
            let total = logits.len() as u64;
            let place = "logits of the next token".into();
            return Err(Error::NonFinite { place, count: broken, total, computed: true });
        }
        self.penalize(logits, history);
        if self.sampling.temperature == 0.0 {
            let likelier =
                |best: usize, id: usize| if logits[id].total_cmp(&logits[best]).is_gt() { id } else { best };
            return Ok((1..logits.len()).fold(0, likelier) as u32);
        }
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        // Equal logits in the order of their ids, so that nothing depends on a sorting algorithm.
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        let top = f64::from(logits[order[0] as usize]);
        let weight = |id: u32| ((f64::from(logits[id as usize]) - top) / self.sampling.temperature).exp();
        let weights: Vec<f64> = order.iter().map(|&id| weight(id)).collect();
        let nucleus = self.sampling.top_p * weights.iter().sum::<f64>();
        let mut sum = 0.0;
        let kept = weights.iter().position(|w| {
            sum += w;
            sum >= nucleus
        });
        let kept = kept.map_or(weights.len(), |last| last + 1);
        // 53 bits: every value from 0 to below 1 that a double can hold evenly spaced.
        let uniform = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = uniform * weights[..kept].iter().sum::<f64>();
        let chosen = weights[..kept].iter().position(|w| {
            left -= w;
            left < 0.0
        });
        Ok(order[chosen.unwrap_or(kept - 1)])
    }

    fn penalize(&self, logits: &mut [f32], history: &[u32]) {
        let penalty = self.sampling.repetition_penalty as f32;
        if penalty == 1.0 {
            return;
        }
        let mut seen = history.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            let Some(logit) = logits.get_mut(id as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Sampling = Sampling { temperature: 1.0, top_p: 1.0, repetition_penalty: 1.0, seed: 1 };

    /// Counts of four tokens in 20 000 draws.
    fn frequencies(sampling: Sampling, history: &[u32]) -> [f64; 4] {
        let probabilities = [0.5f32, 0.1, 0.3, 0.1];
        let mut sampler = Sampler::new(&sampling).unwrap();
        let mut counts = [0.0; 4];
        for _ in 0..20_000 {
            // Shifted below zero and above it, which a penalty tells apart.
            let mut logits = probabilities.map(|p| p.ln() + 1.0);
            counts[sampler.next(&mut logits, history).unwrap() as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    #[track_caller]
    fn close(found: [f64; 4], expected: [f64; 4]) {
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() < 0.015, "{found:?} {expected:?}");
        }
    }

    #[test]
    fn draws_follow_the_probabilities() {
        close(frequencies(PLAIN, &[]), [0.5, 0.1, 0.3, 0.1]);
    }

    #[test]
    fn temperature_sharpens() {
        let squares = [0.25, 0.01, 0.09, 0.01].map(|s| s / 0.36);
        close(frequencies(Sampling { temperature: 0.5, ..PLAIN }, &[]), squares);
        close(frequencies(Sampling { temperature: 0.0, ..PLAIN }, &[]), [1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn the_nucleus_is_the_smallest_that_reaches_top_p() {
        close(frequencies(Sampling { top_p: 0.75, ..PLAIN }, &[]), [0.625, 0.0, 0.375, 0.0]);
        close(frequencies(Sampling { top_p: 0.45, ..PLAIN }, &[]), [1.0, 0.0, 0.0, 0.0]);
        // Of two equal tokens the one with the smaller id.
        close(frequencies(Sampling { top_p: 0.85, ..PLAIN }, &[]), [5.0 / 9.0, 1.0 / 9.0, 1.0 / 3.0, 0.0]);
    }

    #[test]
    fn repeated_tokens_lose() {
        let penalty = Sampling { repetition_penalty: 2.0, temperature: 0.0, ..PLAIN };
        let next = |history: &[u32], mut logits: [f32; 3]| {
            Sampler::new(&penalty).unwrap().next(&mut logits, history).unwrap()
        };
        assert_eq!(next(&[], [3.0, 2.0, -1.0]), 0);
        assert_eq!(next(&[0, 0], [3.0, 2.0, -1.0]), 1);
        // Halved once, not once an occurrence; a negative logit falls.
        assert_eq!(next(&[0, 0, 0], [3.0, 1.0, -1.0]), 0);
        assert_eq!(next(&[0], [-1.0, -1.5, -9.0]), 1);
    }

    #[test]
    fn wrong_settings_and_logits_are_named() {
        for (sampling, found) in [
            (Sampling { temperature: -1.0, ..PLAIN }, "temperature: expected a number from 0, found `-1`"),
            (Sampling { top_p: 0.0, ..PLAIN }, "top-p: expected a number above 0 and up to 1, found `0`"),
            (
                Sampling { repetition_penalty: f64::NAN, ..PLAIN },
                "repetition-penalty: expected a number above 0, found `NaN`",
            ),
        ] {
            assert_eq!(Sampler::new(&sampling).unwrap_err().to_string(), found);
        }
        let error = Sampler::new(&PLAIN).unwrap().next(&mut [0.0, f32::NAN], &[]).unwrap_err();
        assert_eq!(error.to_string(), "logits of the next token: 1 of 2 values are NaN or infinite");
    }
}
