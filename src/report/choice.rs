//! Which evaluations of a run its gate and its card take.

use crate::error::{Error, Result};

/// One evaluation of a run.
pub(crate) struct Candidate<'a> {
    /// Name of the text.
    pub(crate) dataset: &'a str,
    /// Whether the run made it itself.
    pub(crate) own: bool,
    /// Whether every branch has figures in it.
    pub(crate) shared: bool,
}

/// Whether each evaluation is chosen. Candidates are all, or those on `datasets` if given. The run's own are chosen; if there
/// are none, those that every branch shares; else all.
///
/// # Errors
/// When nothing was evaluated on one of `datasets`.
pub(crate) fn taken(all: &[Candidate<'_>], datasets: &[String]) -> Result<Vec<bool>> {
    known(all.iter().map(|candidate| candidate.dataset), datasets)?;
    let rules: [fn(&Candidate<'_>) -> bool; 3] = [|c| c.own, |c| c.shared, |_| true];
    // On one text, or on all of them.
    let first = |dataset: Option<&String>| -> Vec<bool> {
        let fits = |c: &Candidate<'_>| dataset.is_none_or(|name| name == c.dataset);
        let by = |rule: fn(&Candidate<'_>) -> bool| all.iter().map(|c| fits(c) && rule(c)).collect();
        let mut found = rules.into_iter().map(by);
        found.find(|taken: &Vec<bool>| taken.contains(&true)).unwrap_or_else(|| vec![false; all.len()])
    };
    if datasets.is_empty() {
        return Ok(first(None));
    }
    let mut taken = vec![false; all.len()];
    for dataset in datasets {
        first(Some(dataset)).into_iter().zip(&mut taken).for_each(|(one, taken)| *taken |= one);
    }
    Ok(taken)
}

/// Refuses a name in `datasets` that is not one of `all`.
///
/// # Errors
/// When there is one.
pub(crate) fn known<'a>(all: impl Iterator<Item = &'a str>, datasets: &[String]) -> Result<()> {
    let mut names: Vec<&str> = all.collect();
    names.sort_unstable();
    names.dedup();
    match datasets.iter().find(|dataset| !names.contains(&dataset.as_str())) {
        None => Ok(()),
        Some(dataset) => Err(Error::Value {
            what: "dataset".into(),
            expected: match names.is_empty() {
                true => "nothing, as nothing was evaluated".into(),
                false => format!("a text that was evaluated: {}", names.join(", ")),
            },
            found: dataset.clone(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_s_own_evaluations_are_taken_then_shared_ones_then_all() {
        let candidate =
            |&(dataset, own, shared): &(&'static str, bool, bool)| Candidate { dataset, own, shared };
        let of = |all: &[(&'static str, bool, bool)], datasets: &[&str]| {
            let all: Vec<_> = all.iter().map(candidate).collect();
            taken(&all, &datasets.iter().map(|&name| name.to_owned()).collect::<Vec<_>>())
        };
        let [own, shared, trial] = [("wiki", true, true), ("books", false, true), ("trial", false, false)];
        assert_eq!(of(&[own, shared, trial], &[]).unwrap(), [true, false, false]);
        assert_eq!(of(&[shared, trial], &[]).unwrap(), [true, false]);
        assert_eq!(of(&[trial], &[]).unwrap(), [true]);
        assert_eq!(of(&[own, shared, trial], &["trial"]).unwrap(), [false, false, true]);
        assert_eq!(of(&[own, shared, trial], &["trial", "wiki"]).unwrap(), [true, false, true]);
        // A trial on the run's own text.
        assert_eq!(of(&[("wiki", false, false), own], &["wiki"]).unwrap(), [false, true]);
        assert_eq!(of(&[], &[]).unwrap(), [false; 0]);
        assert_eq!(
            of(&[own, trial], &["trail"]).unwrap_err().to_string(),
            "dataset: expected a text that was evaluated: trial, wiki, found `trail`"
        );
    }
}
