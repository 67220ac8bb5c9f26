//! Limits of the gate: a TOML file, every key with a default. `docs/ci.md` lists the keys.

use std::{collections::BTreeMap, path::Path};

use crate::{
    error::{Error, Result, toml_error},
    folder,
    plan::refuse_unknown,
};

/// The table with limits of single branches.
const BRANCHES: &str = "branch";

/// Whether the plan and the calibration tokens must be the baseline's.
const SAME_PLAN: &str = "same-plan";

/// Limits of a run as a whole: key and default.
const OF_RUN: [(&str, f64); 5] = [
    ("max-missing-branches", 0.0),
    ("max-seconds", f64::INFINITY),
    ("max-seconds-growth", f64::INFINITY),
    ("max-memory", f64::INFINITY),
    ("max-memory-growth", f64::INFINITY),
];

/// Limits of each branch: key and default. The defaults of those that end in `growth` and `drop` lie between the effect of
/// another seed and the effect of known mistakes: see `docs/ci.md`.
const OF_BRANCH: [(&str, f64); 16] = [
    ("max-perplexity-change", f64::INFINITY),
    ("max-perplexity-increase", 0.05),
    ("max-kl", 0.05),
    ("min-top1", 0.9),
    ("max-linear-error", 0.5),
    ("max-damp-raised", 0.0),
    ("max-dead-columns", 0.0),
    ("max-fallbacks", 0.0),
    ("min-scale-bits", 10.0),
    ("max-size", f64::INFINITY),
    ("max-perplexity-growth", 0.01),
    ("max-kl-growth", 0.1),
    ("max-top1-drop", 0.005),
    ("max-linear-error-growth", 0.25),
    ("max-mean-error-growth", 0.05),
    ("max-size-growth", 0.01),
];

/// Each key with its limit: shares and growths are fractions, sizes bytes, times seconds, divergences nats.
pub type Limits = BTreeMap<String, f64>;

/// Limits of a run and of its branches.
#[derive(Debug, Clone, PartialEq)]
pub struct Thresholds {
    /// Whether another plan or other calibration tokens than the baseline's are a reason to fail.
    pub same_plan: bool,
    /// Limits of the run and of each branch.
    pub limits: Limits,
    /// All limits of the branches that have some of their own.
    pub branches: BTreeMap<String, Limits>,
}

impl Default for Thresholds {
    fn default() -> Self {
        let limits = OF_RUN.iter().chain(&OF_BRANCH).map(|&(key, limit)| (key.to_owned(), limit)).collect();
        Self { same_plan: false, limits, branches: BTreeMap::new() }
    }
}

impl Thresholds {
    /// Reads a thresholds file; missing keys keep their defaults. A table `[branch.NAME]` holds limits of that branch alone.
    ///
    /// # Errors
    /// When the file cannot be read, or has an unknown key or a value out of range.
    pub fn read(path: &Path) -> Result<Self> {
        let text = folder::read_text(path)?;
        let mut table: toml::Table = toml::from_str(&text).map_err(|e| toml_error(path, &text, &e))?;
        let mut thresholds = Self::default();
        let own_keys = [SAME_PLAN, BRANCHES].map(str::to_owned);
        let known: Vec<String> = thresholds.limits.keys().cloned().chain(own_keys).collect();
        refuse_unknown(path, "", &table, &known)?;
        let of_branches = match table.remove(BRANCHES) {
            None => toml::Table::new(),
            Some(toml::Value::Table(of_branches)) => of_branches,
            Some(other) => return Err(value(BRANCHES, "tables such as [branch.main]", &other)),
        };
        if let Some(found) = table.remove(SAME_PLAN) {
            let same = found.as_bool();
            thresholds.same_plan = same.ok_or_else(|| value(SAME_PLAN, "true or false", &found))?;
        }
        set(&mut thresholds.limits, &table)?;
        let known = OF_BRANCH.map(|(key, _)| key.to_owned());
        for (name, found) in of_branches {
            let toml::Value::Table(table) = found else {
                return Err(value(&format!("{BRANCHES}.{name}"), "a table of limits", &found));
            };
            refuse_unknown(path, &format!("{BRANCHES}.{name}."), &table, &known)?;
            let mut limits = thresholds.limits.clone();
            set(&mut limits, &table)?;
            thresholds.branches.insert(name, limits);
        }
        Ok(thresholds)
    }

    /// The limits of a branch.
    pub fn of(&self, branch: &str) -> &Limits {
        self.branches.get(branch).unwrap_or(&self.limits)
    }

    /// Every key with its default, as the file would have it.
    pub fn defaults() -> Vec<(String, String)> {
        let limits =
            OF_RUN.iter().chain(&OF_BRANCH).map(|(key, limit)| ((*key).to_owned(), format!("{limit:?}")));
        limits.chain([(SAME_PLAN.to_owned(), "false".to_owned())]).collect()
    }
}

/// Takes the limits of a table: numbers from 0 up; `inf` is no limit.
fn set(limits: &mut Limits, table: &toml::Table) -> Result<()> {
    for (key, found) in table {
        let number = found.as_float().or_else(|| found.as_integer().map(|number| number as f64));
        let number = number.ok_or_else(|| value(key, "a number", found))?;
        if number.is_nan() || number < 0.0 {
            return Err(value(key, "a number from 0 up, or inf for no limit", found));
        }
        match key.as_str() {
            "min-top1" if number > 1.0 => return Err(value(key, "a share from 0 to 1", found)),
            "min-scale-bits" if number > 11.0 => {
                return Err(value(key, "a number from 0 to 11, the significant bits of fp16", found));
            }
            _ => limits.insert(key.clone(), number),
        };
    }
    Ok(())
}

fn value(what: &str, expected: &str, found: &toml::Value) -> Error {
    Error::Value { what: what.into(), expected: expected.into(), found: found.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Thresholds> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Thresholds::read(file.path())
    }

    /// The default limits with some changed.
    fn limits(changed: &[(&str, f64)]) -> Limits {
        let mut limits = Thresholds::default().limits;
        for &(key, limit) in changed {
            *limits.get_mut(key).unwrap() = limit;
        }
        limits
    }

    #[test]
    fn missing_keys_keep_their_defaults() {
        assert_eq!(read("").unwrap(), Thresholds::default());
        let found = read("max-kl = 0.1\nsame-plan = true\nmax-damp-raised = 3\nmax-seconds = inf").unwrap();
        let expected = Thresholds {
            same_plan: true,
            limits: limits(&[("max-kl", 0.1), ("max-damp-raised", 3.0)]),
            branches: BTreeMap::new(),
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn a_branch_can_have_limits_of_its_own() {
        let found =
            read("max-kl = 0.1\n[branch.main]\nmin-top1 = 0.5\n[branch.\"2bit\"]\nmax-kl = 1").unwrap();
        assert_eq!(*found.of("other"), limits(&[("max-kl", 0.1)]));
        assert_eq!(*found.of("main"), limits(&[("max-kl", 0.1), ("min-top1", 0.5)]));
        assert_eq!(*found.of("2bit"), limits(&[("max-kl", 1.0)]));
    }

    #[test]
    fn unknown_keys_are_refused_with_the_nearest() {
        for (text, key, hint) in [
            ("max_kl = 1", "max_kl", Some("did you mean `max-kl`?")),
            ("[branch.main]\nmin-top-1 = 1", "branch.main.min-top-1", Some("did you mean `min-top1`?")),
            ("[branch.main]\nmax-seconds = 1", "branch.main.max-seconds", None),
            ("zebra = 1", "zebra", None),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.to_string().starts_with(&format!("unknown key `{key}` in")), "{error}");
            if let Some(hint) = hint {
                assert_eq!(error.hint().unwrap(), hint);
            }
        }
    }

    #[test]
    fn values_that_make_no_sense_are_refused() {
        for text in [
            "max-kl = -0.1",
            "max-kl = nan",
            "max-kl = \"0.1\"",
            "max-kl = true",
            "min-top1 = 90",
            "same-plan = 1",
            "branch = 3",
            "branch.main = 3",
            "[branch.main]\nmax-kl = -1",
            "max-kl = ",
        ] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
