//! Every input that a fuzzer found something with, through the functions that the fuzzers run.

use std::{fs, path::Path};

use crate::helpers::{entries, repository};

#[path = "../../fuzz/bodies.rs"]
mod bodies;

/// What a target does with an input.
type Body = fn(&[u8]);

const TARGETS: [(&str, Body); 12] = [
    ("safetensors_header", bodies::safetensors_header),
    ("safetensors_index", bodies::safetensors_index),
    ("config", bodies::config),
    ("quantize_config", bodies::quantize_config),
    ("parquet", bodies::parquet),
    ("jsonl", bodies::jsonl),
    ("chat_template", bodies::chat_template),
    ("plan", bodies::plan),
    ("verify", bodies::verify),
    ("gguf", bodies::gguf),
    ("tokenizer", bodies::tokenizer),
    ("pytorch", bodies::pytorch),
];

/// Inputs of a target: files in a folder of its name.
fn inputs(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let names = if folder.is_dir() { entries(folder) } else { Vec::new() };
    names.into_iter().map(|name| (name.clone(), fs::read(folder.join(&name)).unwrap())).collect()
}

#[test]
fn what_was_found_once_is_not_found_again() {
    let findings = repository().join("fuzz/findings");
    for (name, target) in TARGETS {
        inputs(&findings.join(name)).iter().for_each(|(_, data)| target(data));
        // Nothing at all, and noise.
        target(&[]);
        target(&[0xFF; 64]);
    }
    let known = TARGETS.map(|(name, _)| name);
    for folder in if findings.is_dir() { entries(&findings) } else { Vec::new() } {
        assert!(known.contains(&folder.as_str()), "findings of `{folder}`, which is no target");
    }
}
