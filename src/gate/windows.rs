//! Figures over windows, and the changes between two runs over paired windows.

use super::{
    checklist::Growth,
    figures::{EvaluatedFigures, EvaluationFigures, Figures},
};
use crate::report::{
    Interval,
    statistics::{difference_of_exponentials, difference_of_means, mean},
};

/// One branch on one text, complete and in order.
pub(super) struct Measured {
    /// The text, for messages.
    pub(super) text: String,
    /// Tokens scored in each window.
    tokens: Vec<usize>,
    /// Of the unquantized model.
    reference_nll: Vec<f64>,
    nll: Vec<f64>,
    kl: Vec<f64>,
    top1: Vec<f64>,
}

impl Measured {
    /// The figures of `branch` in one of a run's evaluations, or the first problem with them.
    pub(super) fn of(run: &Figures, evaluation: &EvaluationFigures, branch: &str) -> Result<Self, String> {
        let text = run.text_of(evaluation);
        let on = format!("on {text}");
        let mut models = evaluation.models.iter().filter(|model| model.name == branch);
        let model: &EvaluatedFigures = models.next().ok_or_else(|| format!("was not evaluated {on}"))?;
        if models.next().is_some() {
            return Err(format!("was evaluated twice {on}"));
        }
        let count = evaluation.windows;
        if count < 2 {
            return Err(format!("{count} windows {on} are too few: an interval needs at least 2"));
        }
        let complete = |what: &str, values: &[Option<f64>]| {
            if values.len() != count {
                return Err(format!("has {what} of {} windows {on}, expected {count}", values.len()));
            }
            let finite = values.iter().map(|v| v.filter(|v| v.is_finite())).collect::<Option<Vec<f64>>>();
            finite.ok_or_else(|| format!("{what} {on} is missing or not a number in some windows"))
        };
        let tokens = &evaluation.window_tokens;
        if tokens.len() != count || tokens.iter().sum::<usize>() == 0 {
            return Err(format!("has {} windows with tokens {on}, expected {count}", tokens.len()));
        }
        let measured = Self {
            text,
            tokens: tokens.clone(),
            reference_nll: complete("fp16's likelihood", &evaluation.window_nll)?,
            nll: complete("likelihood", &model.window_nll)?,
            kl: complete("KL divergence", &model.window_kl)?,
            top1: complete("top-1 agreement", &model.window_top1)?,
        };
        // Models that differ have a divergence above 0: this one was compared with itself, or not at all.
        if measured.kl_divergence() <= 0.0 {
            return Err(format!(
                "KL divergence {on} is {}, as of a model that is not quantized",
                measured.kl_divergence()
            ));
        }
        if measured.top1.iter().any(|share| !(0.0..=1.0).contains(share)) {
            return Err(format!("top-1 agreement {on} is no share from 0 to 1 in some windows"));
        }
        Ok(measured)
    }

    pub(super) fn kl_divergence(&self) -> f64 {
        mean(&self.kl, &self.tokens).value
    }

    pub(super) fn top1_agreement(&self) -> f64 {
        mean(&self.top1, &self.tokens).value
    }

    pub(super) fn perplexity(&self) -> f64 {
        mean(&self.nll, &self.tokens).value.exp()
    }

    pub(super) fn reference_perplexity(&self) -> f64 {
        mean(&self.reference_nll, &self.tokens).value.exp()
    }

    /// KL divergence above the baseline's, as a fraction of it.
    pub(super) fn kl_growth(&self, baseline: &Self) -> Growth {
        Growth::of(difference_of_means(&self.kl, &baseline.kl, &self.tokens), baseline.kl_divergence())
    }

    /// Top-1 agreement below the baseline's.
    pub(super) fn top1_drop(&self, baseline: &Self) -> Growth {
        Growth::of(difference_of_means(&baseline.top1, &self.top1, &self.tokens), 1.0)
    }

    /// Perplexity above the baseline's, as a fraction of it.
    pub(super) fn perplexity_growth(&self, baseline: &Self) -> Growth {
        let change = difference_of_exponentials(&self.nll, &baseline.nll, &self.tokens);
        Growth::of(change, baseline.perplexity())
    }
}

impl Growth {
    /// A change as a fraction of `whole`. Without a margin, the interval is infinite.
    fn of(change: Interval, whole: f64) -> Self {
        let margin = change.margin.unwrap_or(f64::INFINITY);
        Self {
            value: change.value / whole,
            low: (change.value - margin) / whole,
            high: (change.value + margin) / whole,
        }
    }
}
