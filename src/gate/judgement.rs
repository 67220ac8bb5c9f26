//! What the gate found.

use serde::Serialize;

/// Goes up when a reader of older judgements could misread a newer one.
pub const JUDGEMENT_SCHEMA: &str = "gptq-gate/1";

/// Everything the gate looked at.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Judgement {
    /// Every check, in order.
    pub checks: Vec<Check>,
    /// What is worth knowing and no reason to fail.
    pub notes: Vec<String>,
    /// The branches side by side with the baseline's.
    pub branches: Vec<Comparison>,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// The branch; none for what concerns the run as a whole.
    pub branch: Option<String>,
    /// The threshold's key, or the name of a check that has none because it is always made.
    pub check: String,
    /// What was found, with both numbers, in one line.
    pub finding: String,
    /// Whether that is a reason to fail.
    pub breached: bool,
}

/// A branch beside the baseline's, on one text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// The branch.
    pub branch: String,
    /// The text.
    pub dataset: String,
    /// Mean KL divergence, nats.
    pub kl_divergence: f64,
    /// The baseline's.
    pub baseline_kl_divergence: Option<f64>,
    /// By how much it is above the baseline's, as a fraction of it.
    pub growth: Option<Growth>,
    /// Perplexity less fp16's.
    pub perplexity_change: f64,
    /// Share of positions with the same most likely token.
    pub top1_agreement: f64,
}

/// A paired comparison: the change, and the 95% interval of it over windows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Growth {
    /// The change.
    pub value: f64,
    /// The interval's lower end.
    pub low: f64,
    /// The interval's upper end.
    pub high: f64,
}

/// Whether a run may pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It may.
    Pass,
    /// It may not, and why.
    Fail(Vec<Check>),
}

impl Judgement {
    /// [`JUDGEMENT_SCHEMA`] and the verdict in front, for programs.
    pub fn to_json(&self) -> impl Serialize {
        #[derive(Serialize)]
        struct Document {
            schema: &'static str,
            verdict: &'static str,
            #[serde(flatten)]
            judgement: Judgement,
        }
        let verdict = if self.verdict() == Verdict::Pass { "pass" } else { "fail" };
        Document { schema: JUDGEMENT_SCHEMA, verdict, judgement: self.clone() }
    }

    /// Pass only if something was checked and nothing was breached.
    pub fn verdict(&self) -> Verdict {
        let breaches: Vec<Check> = self.breaches().cloned().collect();
        match breaches.is_empty() && !self.checks.is_empty() {
            true => Verdict::Pass,
            false => Verdict::Fail(breaches),
        }
    }

    /// The checks that are reasons to fail.
    pub fn breaches(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| check.breached)
    }
}

impl Check {
    /// `main: KL divergence 0.02 … [max-kl]`.
    pub fn line(&self) -> String {
        match &self.branch {
            Some(branch) => format!("{branch}: {} [{}]", self.finding, self.check),
            None => format!("{} [{}]", self.finding, self.check),
        }
    }
}
