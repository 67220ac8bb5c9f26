//! One window under two models.

use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::prediction::Prediction;
use crate::{
    error::{Error, Result, TorchContext},
    model::Runner,
};

/// Positions whose logits exist at the same time: 512 rows of 128 k logits are 256 MiB.
const POSITIONS: usize = 512;

/// A window's figures, means over its scored tokens.
#[derive(Debug, Clone)]
pub(super) struct WindowScores {
    /// Mean negative log-likelihood of the token, nats.
    pub(super) nll: f64,
    /// Mean `KL(reference ‖ candidate)`, nats.
    pub(super) kl_divergence: f64,
    /// Share of tokens at which both models have the same most likely token.
    pub(super) top1_agreement: f64,
    /// `KL(reference ‖ candidate)` at each.
    pub(super) token_kl: Vec<f32>,
}

impl WindowScores {
    /// Appends the figures to numbers that are sent between ranks.
    pub(super) fn write(&self, numbers: &mut Vec<f64>) {
        numbers.extend([self.nll, self.kl_divergence, self.top1_agreement]);
        numbers.extend(self.token_kl.iter().copied().map(f64::from));
    }

    /// The figures of a window with so many scored `positions`.
    pub(super) fn read(numbers: &mut impl Iterator<Item = f64>, positions: usize) -> Self {
        let mut next = || numbers.next().expect("a window's figures are whole");
        let (nll, kl_divergence, top1_agreement) = (next(), next(), next());
        let token_kl = (0..positions).map(|_| next() as f32).collect();
        Self { nll, kl_divergence, top1_agreement, token_kl }
    }
}

/// The unquantized model's predictions of the tokens of a window, `ids` `[S]`, from `first_scored` on; `hidden` `[S, hidden]`.
pub(super) fn predictions(
    runner: &Runner<'_>,
    hidden: &Tensor,
    ids: &[i64],
    first_scored: usize,
) -> Result<Vec<Prediction>> {
    let mut predictions = Vec::with_capacity(ids.len() - first_scored);
    each_piece(runner, hidden, ids, first_scored, |log_p, vocab, targets| {
        let rows = log_p.par_chunks(vocab).zip(targets);
        predictions.par_extend(rows.map(|(row, &target)| Prediction::new(row, target as usize)));
    })?;
    finite("the unquantized model's logits", mean_nll(&predictions))?;
    Ok(predictions)
}

/// Mean negative log-likelihood of the tokens that came.
pub(super) fn mean_nll(predictions: &[Prediction]) -> f64 {
    predictions.iter().map(|p| -f64::from(p.target)).sum::<f64>() / predictions.len() as f64
}

/// Figures of the candidate `name` from its hidden states `[S, hidden]`, against the reference's predictions.
///
/// # Errors
/// When its logits are not finite, or libtorch fails.
pub(super) fn score(
    predictions: &[Prediction],
    runner: &Runner<'_>,
    hidden: &Tensor,
    ids: &[i64],
    first_scored: usize,
    name: &str,
) -> Result<WindowScores> {
    let mut scores: Vec<(f64, f64, bool)> = Vec::with_capacity(predictions.len());
    each_piece(runner, hidden, ids, first_scored, |log_q, vocab, targets| {
        let expected = &predictions[scores.len()..][..targets.len()];
        let rows = log_q.par_chunks(vocab).zip(targets).zip(expected);
        scores.par_extend(rows.map(|((row, &target), expected)| {
            let (divergence, same) = expected.compare(row);
            (-f64::from(row[target as usize]), divergence, same)
        }));
    })?;
    let mean = |of: fn(&(f64, f64, bool)) -> f64| scores.iter().map(of).sum::<f64>() / scores.len() as f64;
    let (nll, kl_divergence) = (mean(|s| s.0), mean(|s| s.1));
    finite(&format!("the logits of `{name}`"), nll + kl_divergence)?;
    Ok(WindowScores {
        nll,
        kl_divergence,
        top1_agreement: mean(|s| f64::from(u8::from(s.2))),
        token_kl: scores.iter().map(|s| s.1 as f32).collect(),
    })
}

/// Calls `use_piece` with log-probabilities `[n, vocab]`, the vocabulary size and the tokens that came, `[n]`, piece by piece.
fn each_piece(
    runner: &Runner<'_>,
    hidden: &Tensor,
    ids: &[i64],
    first_scored: usize,
    mut use_piece: impl FnMut(&[f32], usize, &[i64]),
) -> Result<()> {
    let mut start = first_scored;
    for targets in ids[first_scored..].chunks(POSITIONS) {
        // A token is predicted at the position before it.
        let rows = hidden.f_narrow(0, start as i64 - 1, targets.len() as i64).torch("select positions")?;
        let logits = runner.logits(&rows)?;
        let log_p = logits
            .f_log_softmax(-1, Kind::Float)
            .and_then(|l| l.f_to_device(Device::Cpu)?.f_contiguous()?.f_view(-1))
            .and_then(Vec::<f32>::try_from)
            .torch("normalize logits")?;
        use_piece(&log_p, log_p.len() / targets.len(), targets);
        start += targets.len();
    }
    Ok(())
}

fn finite(place: &str, value: f64) -> Result<()> {
    match value.is_finite() {
        true => Ok(()),
        false => Err(Error::NonFinite { place: place.into(), count: 1, total: 1, computed: true }),
    }
}
