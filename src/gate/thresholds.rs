//! What the gate lets pass: a TOML file, every key with a default.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result, toml_error},
    folder,
    plan::refuse_unknown,
};

/// The table with limits of single branches.
const BRANCHES: &str = "branch";

/// What the gate lets pass.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Thresholds {
    /// Of the run as a whole.
    pub run: RunLimits,
    /// Of each branch.
    pub each: BranchLimits,
    /// Of single branches, instead of those of each.
    pub branches: BTreeMap<String, BranchLimits>,
}

/// Limits of a run as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct RunLimits {
    /// Branches that the baseline or the plan has, and the run has not.
    pub max_missing_branches: f64,
    /// Whether the plan and the calibration text must be the baseline's.
    pub same_plan: bool,
    /// Seconds of the run.
    pub max_seconds: f64,
    /// Seconds above the baseline's, as a fraction of them.
    pub max_seconds_growth: f64,
    /// Peak memory, bytes.
    pub max_memory: f64,
    /// Peak memory above the baseline's, as a fraction of it.
    pub max_memory_growth: f64,
}

/// Limits of one branch.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct BranchLimits {
    /// Perplexity above fp16's.
    pub max_perplexity_change: f64,
    /// Perplexity above fp16's, as a fraction of it.
    pub max_perplexity_increase: f64,
    /// Mean KL divergence from fp16, nats.
    pub max_kl: f64,
    /// Share of positions with the same most likely token.
    pub min_top1: f64,
    /// Relative error of the worst linear.
    pub max_linear_error: f64,
    /// Linears whose damping was raised.
    pub max_damp_raised: f64,
    /// Input features that carried nothing, over all linears.
    pub max_dead_columns: f64,
    /// Linears that were rounded because they could not be solved.
    pub max_fallbacks: f64,
    /// Significant bits that the scales of each linear must use, of fp16's 11.
    pub min_scale_bits: f64,
    /// Bytes of all files.
    pub max_size: f64,
    /// Perplexity above the baseline's, as a fraction of it, outside the paired interval.
    pub max_perplexity_growth: f64,
    /// Mean KL divergence above the baseline's, as a fraction of it, outside the paired interval.
    pub max_kl_growth: f64,
    /// Top-1 agreement below the baseline's, outside the paired interval.
    pub max_top1_drop: f64,
    /// Relative error of any linear above the baseline's, as a fraction of it.
    pub max_linear_error_growth: f64,
    /// Mean relative error over all linears above the baseline's, as a fraction of it.
    pub max_mean_error_growth: f64,
    /// Bytes above the baseline's, as a fraction of them.
    pub max_size_growth: f64,
}

impl Default for RunLimits {
    fn default() -> Self {
        Self {
            max_missing_branches: 0.0,
            same_plan: false,
            max_seconds: f64::INFINITY,
            max_seconds_growth: f64::INFINITY,
            max_memory: f64::INFINITY,
            max_memory_growth: f64::INFINITY,
        }
    }
}

impl Default for BranchLimits {
    /// The relative ones stand between what a change of seed does and what known mistakes do: see `docs/ci.md`.
    fn default() -> Self {
        Self {
            max_perplexity_change: f64::INFINITY,
            max_perplexity_increase: 0.05,
            max_kl: 0.05,
            min_top1: 0.9,
            max_linear_error: 0.5,
            max_damp_raised: 0.0,
            max_dead_columns: 0.0,
            max_fallbacks: 0.0,
            min_scale_bits: 10.0,
            max_size: f64::INFINITY,
            max_perplexity_growth: 0.01,
            max_kl_growth: 0.1,
            max_top1_drop: 0.005,
            max_linear_error_growth: 0.25,
            max_mean_error_growth: 0.05,
            max_size_growth: 0.01,
        }
    }
}

impl Thresholds {
    /// Reads a thresholds file; keys that are missing keep their defaults. A table `[branch.NAME]` has keys that are
    /// meant for that branch alone.
    ///
    /// # Errors
    /// When the file cannot be read or holds an unknown key, or a value that makes no sense.
    pub fn read(path: &Path) -> Result<Self> {
        let text = folder::read_text(path)?;
        let fail = |e: toml::de::Error| toml_error(path, &text, &e);
        let mut table: toml::Table = toml::from_str(&text).map_err(fail)?;
        let (of_run, of_branch) = (keys(&RunLimits::default()), keys(&BranchLimits::default()));
        let all = [&of_run[..], &of_branch[..], &[BRANCHES.to_owned()]].concat();
        refuse_unknown(path, "", &table, &all)?;
        let own = match table.remove(BRANCHES) {
            None => toml::Table::new(),
            Some(toml::Value::Table(own)) => own,
            Some(other) => return Err(value(BRANCHES, "tables such as [branch.main]", &other.to_string())),
        };
        check_values(&table)?;
        let convert = |table: &toml::Table| toml::Value::Table(table.clone()).try_into().map_err(fail);
        let (run, each) = (toml::Value::Table(table.clone()).try_into().map_err(fail)?, convert(&table)?);
        let mut branches = BTreeMap::new();
        for (name, limits) in own {
            let toml::Value::Table(limits) = limits else {
                return Err(value(&format!("{BRANCHES}.{name}"), "a table of limits", &limits.to_string()));
            };
            refuse_unknown(path, &format!("{BRANCHES}.{name}."), &limits, &of_branch)?;
            check_values(&limits)?;
            let mut merged = table.clone();
            merged.extend(limits);
            branches.insert(name, convert(&merged)?);
        }
        Ok(Self { run, each, branches })
    }

    /// The limits of a branch.
    pub fn of(&self, branch: &str) -> &BranchLimits {
        self.branches.get(branch).unwrap_or(&self.each)
    }

    /// Every key with its default, as the file would have it.
    pub fn defaults() -> Vec<(String, String)> {
        let tables = [table_of(&RunLimits::default()), table_of(&BranchLimits::default())];
        tables.into_iter().flatten().map(|(key, value)| (key, value.to_string())).collect()
    }
}

fn table_of(limits: &impl Serialize) -> toml::Table {
    toml::Table::try_from(limits).expect("limits are a table of plain values")
}

fn keys(limits: &impl Serialize) -> Vec<String> {
    table_of(limits).keys().cloned().collect()
}

/// Limits are numbers from 0 up; `inf` asks for nothing.
fn check_values(table: &toml::Table) -> Result<()> {
    for (key, found) in table {
        let number = match found {
            toml::Value::Float(number) => *number,
            toml::Value::Integer(number) => *number as f64,
            toml::Value::Boolean(_) if key == "same-plan" => continue,
            _ if key == "same-plan" => return Err(value(key, "true or false", &found.to_string())),
            _ => return Err(value(key, "a number", &found.to_string())),
        };
        if number.is_nan() || number < 0.0 {
            return Err(value(key, "a number from 0 up, or inf for no limit", &found.to_string()));
        }
        match key.as_str() {
            "min-top1" if number > 1.0 => return Err(value(key, "a share from 0 to 1", &found.to_string())),
            "min-scale-bits" if number > 11.0 => {
                return Err(value(
                    key,
                    "a number from 0 to 11, which is all that fp16 has",
                    &found.to_string(),
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

fn value(what: &str, expected: &str, found: &str) -> Error {
    Error::Value { what: what.into(), expected: expected.into(), found: found.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Thresholds> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Thresholds::read(file.path())
    }

    #[test]
    fn what_is_not_said_keeps_its_default() {
        assert_eq!(read("").unwrap(), Thresholds::default());
        let found = read("max-kl = 0.1\nsame-plan = true\nmax-damp-raised = 3\nmax-seconds = inf").unwrap();
        let expected = Thresholds {
            run: RunLimits { same_plan: true, ..RunLimits::default() },
            each: BranchLimits { max_kl: 0.1, max_damp_raised: 3.0, ..BranchLimits::default() },
            branches: BTreeMap::new(),
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn a_branch_can_have_limits_of_its_own() {
        let found =
            read("max-kl = 0.1\n[branch.main]\nmin-top1 = 0.5\n[branch.\"2bit\"]\nmax-kl = 1").unwrap();
        let each = BranchLimits { max_kl: 0.1, ..BranchLimits::default() };
        assert_eq!(*found.of("other"), each);
        assert_eq!(*found.of("main"), BranchLimits { min_top1: 0.5, ..each });
        assert_eq!(*found.of("2bit"), BranchLimits { max_kl: 1.0, ..each });
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
