//! The baseline: the figures of a run that was found good, in a file that is kept with the project.

use std::path::Path;

use serde_json::Value;

use super::figures::{BranchFigures, EvaluatedFigures, Figures, LinearFigures, Numbers};
use crate::{
    checkpoint::write_file_atomically,
    error::{Error, Result},
    report::read_schema,
};

/// Goes up when a reader of older baselines could misread a newer one.
pub const BASELINE_SCHEMA: &str = "gptq-baseline/1";

/// Digits that are kept: more than any figure is sure of, and few enough for a small file.
const DIGITS: usize = 6;

/// Reads a baseline.
///
/// # Errors
/// When it cannot be read, is no JSON, or of another schema.
pub fn read_baseline(path: &Path) -> Result<Figures> {
    if !path.exists() {
        return Err(Error::NoBaseline { path: path.into() });
    }
    read_schema(path, BASELINE_SCHEMA)
}

/// Writes a run's figures as a baseline.
///
/// # Errors
/// When the file cannot be written.
pub fn write_baseline(path: &Path, run: &Figures) -> Result<()> {
    let value =
        serde_json::to_value(baseline(run)).map_err(|source| Error::Json { path: path.into(), source })?;
    let mut text = String::new();
    write_value(&mut text, &value, 0);
    text.push('\n');
    write_file_atomically(path, text.as_bytes())
}

/// What a baseline holds of a run.
fn baseline(run: &Figures) -> Figures {
    let numbers = |numbers: &Numbers| numbers.iter().map(|n| n.map(rounded)).collect();
    let linear = |l: &LinearFigures| LinearFigures {
        name: l.name.clone(),
        relative_error: l.relative_error.map(rounded),
        ..LinearFigures::default()
    };
    let branch =
        |b: &BranchFigures| BranchFigures { linears: b.linears.iter().map(linear).collect(), ..b.clone() };
    let model = |m: &EvaluatedFigures| EvaluatedFigures {
        name: m.name.clone(),
        window_nll: numbers(&m.window_nll),
        window_kl: numbers(&m.window_kl),
        window_top1: numbers(&m.window_top1),
    };
    let mut figures = Figures { schema: BASELINE_SCHEMA.into(), ..run.clone() };
    figures.seconds = run.seconds.map(rounded);
    figures.branches = run.branches.iter().map(branch).collect();
    for evaluation in &mut figures.evaluations {
        evaluation.window_nll = numbers(&evaluation.window_nll);
        evaluation.models = evaluation.models.iter().map(model).collect();
    }
    figures
}

/// To [`DIGITS`] significant digits.
fn rounded(number: f64) -> f64 {
    format!("{number:.*e}", DIGITS - 1).parse().expect("a number that was printed")
}

/// A line for each element, but lists and objects of plain values in one: a few hundred lines that can be compared.
fn write_value(text: &mut String, value: &Value, depth: usize) {
    let nested = |value: &Value| value.is_array() || value.is_object();
    let elements: Vec<(Option<&String>, &Value)> = match value {
        Value::Array(list) if list.iter().any(nested) => list.iter().map(|value| (None, value)).collect(),
        Value::Object(map) if map.values().any(nested) => map.iter().map(|(key, v)| (Some(key), v)).collect(),
        plain => return text.push_str(&plain.to_string()),
    };
    let (open, close) = if value.is_array() { ('[', ']') } else { ('{', '}') };
    let line = |text: &mut String, depth: usize| {
        text.push('\n');
        text.push_str(&"  ".repeat(depth));
    };
    text.push(open);
    for (i, (key, value)) in elements.into_iter().enumerate() {
        if i > 0 {
            text.push(',');
        }
        line(text, depth + 1);
        if let Some(key) = key {
            text.push_str(&format!("{}: ", Value::from(key.as_str())));
        }
        write_value(text, value, depth + 1);
    }
    line(text, depth);
    text.push(close);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn six_digits_are_kept() {
        let numbers = [0.000_123_456_78, 4.123_456_78, 1.0, -2e-9, 0.0];
        assert_eq!(numbers.map(rounded), [0.000_123_457, 4.123_46, 1.0, -2e-9, 0.0]);
    }

    #[test]
    fn what_is_written_is_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let value = serde_json::json!({
            "schema": BASELINE_SCHEMA,
            "plan": { "damp": 0.01, "variants": ["4bit-128g"] },
            "branches": [{ "branch": "a \"b\"", "linears": [{ "name": "q", "relative_error": 0.5 }] }, {}],
            "evaluations": [{ "window_nll": [1.5, null], "window_tokens": [7, 8], "models": [] }],
        });
        let figures: Figures = serde_json::from_value(value).unwrap();
        write_baseline(file.path(), &figures).unwrap();
        assert_eq!(read_baseline(file.path()).unwrap(), figures);
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert!(text.contains("\n      \"window_nll\": [1.5,null],\n"), "{text}");
        assert!(text.contains("{\"name\":\"q\",\"relative_error\":0.5}\n"), "{text}");
    }
}
