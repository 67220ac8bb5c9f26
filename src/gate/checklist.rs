//! Writing checks down.

use super::judgement::{Check, Judgement};
use crate::units::bytes;

/// Takes the checks of one branch, or of the run.
pub(super) struct Checklist<'a> {
    judgement: &'a mut Judgement,
    branch: Option<String>,
}

impl<'a> Checklist<'a> {
    pub(super) fn of_run(judgement: &'a mut Judgement) -> Self {
        Self { judgement, branch: None }
    }

    pub(super) fn of_branch(judgement: &'a mut Judgement, branch: &str) -> Self {
        Self { judgement, branch: Some(branch.to_owned()) }
    }

    /// A check with its outcome.
    pub(super) fn check(&mut self, check: &str, breached: bool, finding: String) {
        let branch = self.branch.clone();
        self.judgement.checks.push(Check { branch, check: check.into(), finding, breached });
    }

    /// A check that could not be made, which is a reason to fail.
    pub(super) fn breach(&mut self, check: &str, finding: String) {
        self.check(check, true, finding);
    }

    /// A number that must not be above `limit`; nothing is asked for when that is infinite. `show` writes numbers.
    pub(super) fn at_most(
        &mut self,
        check: &str,
        what: &str,
        found: Option<f64>,
        limit: f64,
        show: impl Fn(f64) -> String,
    ) {
        if !limit.is_infinite() {
            let words = |found, limit| format!("{what} {}; at most {} allowed", show(found), show(limit));
            self.bounded(check, what, found, limit, |found| found > limit, words);
        }
    }

    /// A number that must not be below `limit`; nothing is asked for when that is 0.
    pub(super) fn at_least(
        &mut self,
        check: &str,
        what: &str,
        found: Option<f64>,
        limit: f64,
        show: impl Fn(f64) -> String,
    ) {
        if limit != 0.0 {
            let words = |found, limit| format!("{what} {}; at least {} needed", show(found), show(limit));
            self.bounded(check, what, found, limit, |found| found < limit, words);
        }
    }

    fn bounded(
        &mut self,
        check: &str,
        what: &str,
        found: Option<f64>,
        limit: f64,
        breached: impl Fn(f64) -> bool,
        words: impl Fn(f64, f64) -> String,
    ) {
        match finite(found) {
            None => self.breach(check, missing(what)),
            Some(found) => self.check(check, breached(found), words(found, limit)),
        }
    }

    /// A number that must not be above the baseline's by more than this fraction of it.
    pub(super) fn grows_at_most(
        &mut self,
        check: &str,
        what: &str,
        found: Option<f64>,
        baseline: Option<f64>,
        limit: f64,
        show: impl Fn(f64) -> String,
    ) {
        if limit.is_infinite() {
            return;
        }
        match (finite(found), finite(baseline).filter(|&b| b > 0.0)) {
            (None, _) => self.breach(check, missing(what)),
            (_, None) => self.breach(check, format!("the baseline has no {what}, or it is no number")),
            (Some(found), Some(baseline)) => {
                let growth = found / baseline - 1.0;
                let finding = format!(
                    "{what} {}, the baseline's is {}: {}; at most {} allowed",
                    show(found),
                    show(baseline),
                    percent(growth),
                    percent(limit)
                );
                self.check(check, growth > limit, finding);
            }
        }
    }
}

/// The finding for a figure that is not there.
pub(super) fn missing(what: &str) -> String {
    format!("the report has no {}, or it is no number", what.trim_end_matches(':'))
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

/// A fraction in percent with its sign; what rounds to nothing is `+0.0%`, from whichever side.
pub(super) fn signed(fraction: f64, digits: usize) -> String {
    let text = format!("{:+.digits$}%", fraction * 100.0);
    let nothing = text.chars().all(|c| "-0.%".contains(c));
    if nothing { text.replace('-', "+") } else { text }
}
