//! Results of the gate's checks, and how they are recorded.

use serde::Serialize;
use serde_json::{Value, json};

use super::thresholds::Limits;
use crate::units::bytes;

/// Version of the JSON; it rises when a reader of older ones could misread a newer one.
pub const JUDGEMENT_SCHEMA: &str = "gptq-gate/1";

/// All results of the gate.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Judgement {
    /// Every check, in order.
    pub checks: Vec<Check>,
    /// Remarks that are no reason to fail.
    pub notes: Vec<String>,
    /// The branches beside the baseline's.
    pub branches: Vec<Comparison>,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// The branch; none where the check is of the run as a whole.
    pub branch: Option<String>,
    /// The threshold's key, or the name of a check without threshold.
    pub check: String,
    /// The figure that was found and its limit, in one line.
    pub finding: String,
    /// Whether the check failed.
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
    /// The change from the baseline's, as a fraction of it.
    pub growth: Option<Growth>,
    /// Perplexity minus fp16's.
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

/// Verdict of the gate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The run passes.
    Pass,
    /// The run fails, for these reasons.
    Fail(Vec<Check>),
}

impl Judgement {
    /// The JSON for programs: [`JUDGEMENT_SCHEMA`], the verdict, and the fields.
    pub fn to_json(&self) -> Value {
        let Self { checks, notes, branches } = self;
        let verdict = if self.verdict() == Verdict::Pass { "pass" } else { "fail" };
        json!({
            "schema": JUDGEMENT_SCHEMA, "verdict": verdict, "checks": checks, "notes": notes, "branches": branches,
        })
    }

    /// Passes only if there is a check and none failed.
    pub fn verdict(&self) -> Verdict {
        let breaches: Vec<Check> = self.breaches().cloned().collect();
        match breaches.is_empty() && !self.checks.is_empty() {
            true => Verdict::Pass,
            false => Verdict::Fail(breaches),
        }
    }

    /// The checks that failed.
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

/// Records the checks of one branch, or of the run.
pub(super) struct Checklist<'a> {
    judgement: &'a mut Judgement,
    branch: Option<&'a str>,
    pub(super) limits: &'a Limits,
}

impl<'a> Checklist<'a> {
    /// For a branch, or the run as a whole where it is none.
    pub(super) fn new(judgement: &'a mut Judgement, branch: Option<&'a str>, limits: &'a Limits) -> Self {
        Self { judgement, branch, limits }
    }

    /// A check with its result.
    pub(super) fn check(&mut self, check: &str, breached: bool, finding: String) {
        let branch = self.branch.map(str::to_owned);
        self.judgement.checks.push(Check { branch, check: check.into(), finding, breached });
    }

    /// A check that failed because it could not be made.
    pub(super) fn breach(&mut self, check: &str, finding: String) {
        self.check(check, true, finding);
    }

    /// A figure and the limit of the same key as the check. Keys that begin with `min-` have lower limits, and 0 is no limit;
    /// all others have upper limits, and infinity is none. `show` formats figures.
    pub(super) fn bounded(&mut self, check: &str, what: &str, found: Option<f64>, show: fn(f64) -> String) {
        let (limit, is_lower) = (self.limits[check], check.starts_with("min-"));
        let is_none = if is_lower { limit == 0.0 } else { limit.is_infinite() };
        if is_none {
            return;
        }
        let Some(found) = finite(found) else { return self.breach(check, missing(what)) };
        let (breached, allowed) = match is_lower {
            true => (found < limit, format!("at least {} needed", show(limit))),
            false => (found > limit, format!("at most {} allowed", show(limit))),
        };
        self.check(check, breached, format!("{what} {}; {allowed}", show(found)));
    }

    /// A figure that may exceed the baseline's by the limit, which is a fraction of the baseline's.
    pub(super) fn grows_at_most(
        &mut self,
        check: &str,
        what: &str,
        found: Option<f64>,
        baseline: Option<f64>,
        show: fn(f64) -> String,
    ) {
        let limit = self.limits[check];
        if limit.is_infinite() {
            return;
        }
        match (finite(found), finite(baseline).filter(|&b| b > 0.0)) {
            (None, _) => self.breach(check, missing(what)),
            (_, None) => self.breach(check, format!("the baseline has no {what}, or it is not a number")),
            (Some(found), Some(baseline)) => {
                let growth = found / baseline - 1.0;
                let (was, allowed) = (show(baseline), percent(limit));
                let change =
                    format!("the baseline's is {was}: {}; at most {allowed} allowed", percent(growth));
                self.check(check, growth > limit, format!("{what} {}, {change}", show(found)));
            }
        }
    }

    /// A change from the baseline over paired windows. One whose 95% interval includes 0 passes: the spread of the windows
    /// can explain it.
    pub(super) fn paired(&mut self, check: &str, what: &str, growth: Growth, show: fn(f64) -> String) {
        let limit = self.limits[check];
        if limit.is_infinite() {
            return;
        }
        let [value, low, high, allowed] = [growth.value, growth.low, growth.high, limit].map(show);
        let finding =
            format!("{what}: {value} (95% over paired windows {low} to {high}); at most {allowed} allowed");
        let within = growth.value <= limit || growth.low <= 0.0;
        self.check(check, !within || growth.value.is_nan(), finding);
    }
}

/// The finding where a figure is absent or NaN.
fn missing(what: &str) -> String {
    format!("the report has no {}, or it is not a number", what.trim_end_matches(':'))
}

pub(super) fn finite(number: Option<f64>) -> Option<f64> {
    number.filter(|n| n.is_finite())
}

/// Bytes.
pub(super) fn size(count: f64) -> String {
    bytes(count as u64)
}

/// `+12.3%`.
pub(super) fn percent(fraction: f64) -> String {
    signed(fraction, 1)
}

/// A fraction in percent with its sign; what rounds to zero is `+0.0%`, also from below.
pub(super) fn signed(fraction: f64, digits: usize) -> String {
    let text = format!("{:+.digits$}%", fraction * 100.0);
    let nothing = text.chars().all(|c| "-0.%".contains(c));
    if nothing { text.replace('-', "+") } else { text }
}
