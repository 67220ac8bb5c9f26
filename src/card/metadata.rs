//! The metadata block of a card: YAML that the Hub reads.

use serde_json::json;

use super::{CardOptions, source::SourceCard};
use crate::report::Report;

/// The lines between the `---`.
pub(super) fn block(report: &Report, is_gguf: bool, source: &SourceCard, options: &CardOptions) -> String {
    let mut lines = Lines::default();
    let base = options.base_model(report);
    if let Some(base) = base {
        lines.text("base_model", base);
        lines.text("base_model_relation", "quantized");
    }
    for key in ["license", "license_name", "license_link"] {
        if let Some(value) = source.text_of(key) {
            lines.text(key, value);
        }
    }
    lines.list("language", &source.list_of("language"));
    if !is_gguf {
        lines.text("library_name", "transformers");
    }
    lines.text("pipeline_tag", source.text_of("pipeline_tag").unwrap_or("text-generation"));
    lines.text("model_name", &report.model.name);
    if let Some(owner) = base.and_then(|base| base.split_once('/')).map(|(owner, _)| owner) {
        lines.text("model_creator", owner);
    }
    if let Some(by) = options.quantized_by() {
        lines.text("quantized_by", by);
    }
    lines.list("tags", &tags(report, source));
    lines.0
}

/// The source model's tags, and those of a quantized model.
fn tags(report: &Report, source: &SourceCard) -> Vec<String> {
    let mut tags = source.list_of("tags");
    let bits = report.branches.iter().map(|branch| format!("{}-bit", branch.variant.bits()));
    let gguf = report.branches.iter().find(|branch| branch.variant.gptq().is_none()).map(|_| "gguf");
    let kinds = ["gptq", "quantized"].into_iter().chain(gguf).map(str::to_owned);
    for tag in kinds.chain(bits) {
        if !tags.contains(&tag) {
            tags.push(tag);
        }
    }
    tags
}

#[derive(Default)]
struct Lines(String);

impl Lines {
    fn text(&mut self, key: &str, value: &str) {
        self.0 += &format!("{key}: {}\n", scalar(value));
    }

    fn list(&mut self, key: &str, values: &[String]) {
        if !values.is_empty() {
            self.0 += &format!("{key}:\n");
        }
        for value in values {
            self.0 += &format!("- {}\n", scalar(value));
        }
    }
}

/// A plain scalar where YAML reads the same text from it, else a JSON string, which is YAML too.
fn scalar(text: &str) -> String {
    let plain = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || " ._/-".contains(c))
        && !text.ends_with(' ')
        && !["true", "false", "null", "yes", "no", "on", "off", "y", "n"]
            .contains(&text.to_ascii_lowercase().as_str());
    if plain { text.to_owned() } else { json!(text).to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_comes_back_from_yaml() {
        for text in [
            "llama2",
            "Llama 2 7B",
            "no",
            "4-bit",
            "1.0",
            "a: b",
            "- x",
            "#",
            "line\nbreak",
            "Ünicode",
            "it's \"so\"",
            "null",
            "a ",
            "n",
        ] {
            let yaml = format!("key: {}\nlist:\n- {}\n", scalar(text), scalar(text));
            let value: serde_json::Value = serde_saphyr::from_str(&yaml).unwrap();
            assert_eq!(value, json!({ "key": text, "list": [text] }), "{yaml}");
        }
    }
}
