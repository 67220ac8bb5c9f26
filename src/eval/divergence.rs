//! One window under two models.

use tch::{Kind, Tensor};

use crate::{
    error::{Error, Result, TorchContext},
    model::Runner,
};

/// Positions whose logits exist at the same time: 512 rows of 128 k logits are 256 MiB.
const POSITIONS: i64 = 512;

/// A window's figures, means over its scored tokens.
#[derive(Debug, Clone)]
pub(super) struct WindowScores {
    /// Mean negative log-likelihood of the next token, nats.
    pub(super) nll: f64,
    /// Mean `KL(reference ‖ candidate)`, nats.
    pub(super) kl_divergence: f64,
    /// Share of positions with the same most likely token.
    pub(super) top1_agreement: f64,
    /// `KL(reference ‖ candidate)` at each.
    pub(super) token_kl: Vec<f32>,
}

/// The reference model's view of one window, computed once for all candidates.
pub(super) struct Comparison {
    /// Log-probabilities, pieces of `[≤ POSITIONS, vocab]` fp32.
    log_probabilities: Vec<Tensor>,
    /// Next token at each position of each piece, `[≤ POSITIONS, 1]`.
    targets: Vec<Tensor>,
    nll: f64,
    /// The position that predicts the first scored token, and how many follow, itself included.
    first: i64,
    positions: i64,
}

impl Comparison {
    /// `hidden` `[S, hidden]` of the reference, `ids` `[S]`, of which those from `first_scored` on are scored.
    pub(super) fn new(
        runner: &Runner<'_>,
        hidden: &Tensor,
        ids: &[i64],
        first_scored: usize,
    ) -> Result<Self> {
        let first = first_scored as i64 - 1;
        let positions = ids.len() as i64 - 1 - first;
        let (log_probabilities_, targets) = (Vec::new(), Vec::new());
        let mut comparison =
            Self { log_probabilities: log_probabilities_, targets, nll: 0.0, first, positions };
        for start in (0..positions).step_by(POSITIONS as usize) {
            let count = POSITIONS.min(positions - start);
            let log_p = log_probabilities(runner, hidden, first + start, count)?;
            let next = &ids[(first + start) as usize + 1..][..count as usize];
            let target = Tensor::f_from_slice(next)
                .and_then(|t| t.f_to_device(log_p.device())?.f_unsqueeze(1))
                .torch("read tokens")?;
            comparison.nll += nll(&log_p, &target).torch("score a window")?;
            comparison.log_probabilities.push(log_p);
            comparison.targets.push(target);
        }
        comparison.nll /= positions as f64;
        finite("the unquantized model's logits", comparison.nll)?;
        Ok(comparison)
    }

    /// The reference's own mean negative log-likelihood.
    pub(super) fn reference_nll(&self) -> f64 {
        self.nll
    }

    /// A candidate's figures from its `hidden` `[S, hidden]`.
    pub(super) fn score(&self, runner: &Runner<'_>, hidden: &Tensor) -> Result<WindowScores> {
        let (mut loss, mut agreement) = (0.0, 0.0);
        let mut token_kl = Vec::with_capacity(self.positions as usize);
        for (piece, (log_p, target)) in self.log_probabilities.iter().zip(&self.targets).enumerate() {
            let log_q =
                log_probabilities(runner, hidden, self.first + piece as i64 * POSITIONS, log_p.size()[0])?;
            let mut scores = || -> Result<(), tch::TchError> {
                loss += nll(&log_q, target)?;
                let terms = log_p.f_exp()?.f_mul(&log_p.f_sub(&log_q)?)?;
                let each = terms.f_sum_dim_intlist([1].as_slice(), false, Kind::Double)?;
                token_kl.extend(Vec::<f64>::try_from(each)?);
                let same = log_p.f_argmax(1, false)?.f_eq_tensor(&log_q.f_argmax(1, false)?)?;
                agreement += f64::try_from(same.f_sum(Kind::Double)?)?;
                Ok(())
            };
            scores().torch("score a window")?;
        }
        finite("a quantized model's logits", loss)?;
        let positions = self.positions as f64;
        Ok(WindowScores {
            nll: loss / positions,
            kl_divergence: token_kl.iter().sum::<f64>() / positions,
            top1_agreement: agreement / positions,
            token_kl: token_kl.into_iter().map(|kl| kl as f32).collect(),
        })
    }
}

/// `[count, vocab]` fp32.
fn log_probabilities(runner: &Runner<'_>, hidden: &Tensor, start: i64, count: i64) -> Result<Tensor> {
    let rows = hidden.f_narrow(0, start, count).torch("select positions")?;
    runner.logits(&rows)?.f_log_softmax(-1, Kind::Float).torch("normalize logits")
}

/// Summed negative log-likelihood of `target` `[n, 1]`.
fn nll(log_p: &Tensor, target: &Tensor) -> Result<f64, tch::TchError> {
    f64::try_from(log_p.f_gather(1, target, false)?.f_sum(Kind::Double)?.f_neg()?)
}

fn finite(place: &str, value: f64) -> Result<()> {
    match value.is_finite() {
        true => Ok(()),
        false => Err(Error::NonFinite { place: place.into(), count: 1, total: 1 }),
    }
}
