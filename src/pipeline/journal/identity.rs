//! All inputs that the content of the branches depends on. A run resumes from a journal only if they are the same.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{super::GENERATED_BY, state::sha256};
use crate::{
    calibration::Windows,
    checkpoint::Checkpoint,
    error::{Error, Result},
    plan::Plan,
};

/// Settings that do not change the content of finished layers: they may differ when a run resumes.
const FREE: [&str; 4] = ["device", "max-memory", "max-device-memory", "on-failure"];

/// Identity of a run: program, settings and digests of its inputs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(in crate::pipeline) struct Identity {
    /// `gptq 0.1.0`.
    version: String,
    /// The plan's keys, but for [`FREE`]; `dataset` holds the texts' names, wherever they lie.
    plan: Map<String, Value>,
    /// SHA-256 of the calibration windows' token ids.
    tokens: String,
    /// SHA-256 of `config.json`.
    config: String,
    /// [`Checkpoint::fingerprint`].
    weights: String,
}

impl Identity {
    pub(in crate::pipeline) fn new(plan: &Plan, checkpoint: &Checkpoint, windows: &Windows) -> Result<Self> {
        let json = |source| Error::Json { path: "plan".into(), source };
        let Value::Object(mut settings) = serde_json::to_value(plan).map_err(json)? else {
            unreachable!("a plan is a table");
        };
        settings.retain(|key, _| !FREE.contains(&key.as_str()));
        Ok(Self {
            version: GENERATED_BY.into(),
            plan: settings,
            tokens: windows.digest().to_owned(),
            config: sha256(&checkpoint.config().raw().to_string()),
            weights: checkpoint.fingerprint()?,
        })
    }

    /// Differences between the interrupted run and this one, in words; empty if there are none.
    pub(super) fn differences(&self, now: &Self) -> Vec<String> {
        self.differences_in_words(now, ["then", "now"])
    }

    /// Differences between the root's run and another rank's, in words; empty if there are none.
    pub(in crate::pipeline) fn differences_of_rank(&self, other: &Self, rank: usize) -> Vec<String> {
        self.differences_in_words(other, ["on rank 0", &format!("on rank {rank}")])
    }

    fn differences_in_words(&self, now: &Self, [of_self, of_other]: [&str; 2]) -> Vec<String> {
        let mut found = Vec::new();
        if self.version != now.version {
            found.push(format!("version ({} {of_self}, {} {of_other})", self.version, now.version));
        }
        let keys = self.plan.keys().chain(now.plan.keys().filter(|key| !self.plan.contains_key(*key)));
        for key in keys {
            let show = |plan: &Map<String, Value>| plan.get(key).map_or("unset".to_owned(), plain);
            if self.plan.get(key) != now.plan.get(key) {
                found.push(format!("{key} ({} {of_self}, {} {of_other})", show(&self.plan), show(&now.plan)));
            }
        }
        for (what, then, now) in [
            ("the calibration tokens", &self.tokens, &now.tokens),
            ("the model's config.json", &self.config, &now.config),
            ("the model's weights", &self.weights, &now.weights),
        ] {
            if then != now {
                found.push(format!("{what} ({then:.12}… {of_self}, {now:.12}… {of_other})"));
            }
        }
        found
    }
}

/// A value as a plan file has it, without quotation marks.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(plain).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(plan: &Plan) -> Identity {
        let Value::Object(plan) = serde_json::to_value(plan).unwrap() else { unreachable!() };
        Identity {
            version: "gptq 1".into(),
            plan,
            tokens: "a".into(),
            config: "b".into(),
            weights: "0123456789abcdef".into(),
        }
    }

    #[test]
    fn every_difference_is_named() {
        let then = identity(&Plan::default());
        assert!(then.differences(&then).is_empty());
        let plan = Plan {
            damp: Some(0.05),
            variants: vec!["3bit-64g-act".parse().unwrap()],
            split: Some("test".into()),
            ..Plan::default()
        };
        let now = Identity { version: "gptq 2".into(), weights: "9".into(), ..identity(&plan) };
        assert_eq!(
            then.differences(&now),
            [
                "version (gptq 1 then, gptq 2 now)",
                "variants (4bit-128g, 4bit-32g-act, 4bit-64g-act, 4bit-128g-act then, 3bit-64g-act now)",
                "split (unset then, test now)",
                "damp (unset then, 0.05 now)",
                "the model's weights (0123456789ab… then, 9… now)",
            ]
        );
    }
}
