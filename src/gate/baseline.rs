//! The baseline: figures of a run that passed, in a file that is kept with a project.

use std::path::Path;

use serde_json::Value;

use super::figures::Figures;
use crate::{
    checkpoint::write_file_atomically,
    error::{Error, ReportError, Result},
    report::read_schema,
};

/// Version of the file; it rises when a reader of older baselines could misread a newer one.
pub const BASELINE_SCHEMA: &str = "gptq-baseline/1";

/// Significant digits that are kept: more than any figure is exact to, and few enough for a small file.
const DIGITS: usize = 6;

/// Reads a baseline.
///
/// # Errors
/// When there is none, it cannot be read, is not JSON, or has another schema.
pub fn read_baseline(path: &Path) -> Result<Figures> {
    if !path.exists() {
        return Err(ReportError::NoBaseline { path: path.into() }.into());
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

/// A run's figures as a baseline holds them: floats rounded.
fn baseline(run: &Figures) -> Figures {
    let mut figures = Figures { schema: BASELINE_SCHEMA.into(), ..run.clone() };
    figures.seconds = run.seconds.map(rounded);
    for linear in figures.branches.iter_mut().flat_map(|branch| &mut branch.linears) {
        linear.relative_error = linear.relative_error.map(rounded);
    }
    for evaluation in &mut figures.evaluations {
        let models = evaluation.models.iter_mut();
        let of_models = models.flat_map(|m| [&mut m.window_nll, &mut m.window_kl, &mut m.window_top1]);
        for number in [&mut evaluation.window_nll].into_iter().chain(of_models).flatten().flatten() {
            *number = rounded(*number);
        }
    }
    figures
}

/// To [`DIGITS`] significant digits.
fn rounded(number: f64) -> f64 {
    format!("{number:.*e}", DIGITS - 1).parse().expect("a number that was printed")
}

/// Writes JSON with a line for each element, so that two baselines can be compared line by line. Lists and objects of plain
/// values are on one line.
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
