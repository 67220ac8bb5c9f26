//! A real model against figures of other software. The data is larger than belongs in the repository: it is read from
//! the folder in `GPTQ_TEST_DATA`, and without it these tests, whose names end in `_with_test_data`, only say so.

#![expect(clippy::print_stderr, reason = "a test that does nothing must say so")]

use std::{env, path::PathBuf};

use serde_json::Value;

use crate::{
    helpers::{Lab, read_json, repository, text_of},
    rounded,
};

/// Perplexities have four decimals in common.
const PERPLEXITY: f64 = 1e-4;
/// Of the KL divergence: what is kept of predictions has less than half of this.
const DIVERGENCE: f64 = 0.01;
/// Two tokens can be equally likely but for rounding.
const TOP1: f64 = 5e-4;

fn test_data(test: &str) -> Option<PathBuf> {
    let folder = env::var_os("GPTQ_TEST_DATA").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("{test} did nothing: GPTQ_TEST_DATA is not set");
    }
    folder
}

/// `booklm` and itself rounded to nearest on 16 windows of 1024 tokens of `text`, against what transformers computed of
/// dequantized weights with the whole vocabulary.
fn figures_are_those_of(golden: &str, data: &std::path::Path, text: &str) {
    let golden = read_json(&repository().join("tests/golden/eval").join(golden));
    let lab = Lab::empty();
    let (model, quantized) = (data.join("booklm"), lab.path("rounded"));
    rounded::write(&model, &quantized);
    let (model, quantized, text) = (text_of(&model), text_of(&quantized), text_of(&data.join(text)));
    let args =
        ["eval", "--model", &model, "--quantized", &quantized, "--dataset", &text, "--seq-len", "1024"];
    let more = ["--windows", "16", "--compute-dtype", "fp32", "--json"];
    let found = lab.run(&[&args[..], &more].concat()).json()["evaluations"][0].take();
    assert_eq!((&found["windows"], &found["seq_len"]), (&golden["windows"], &golden["seq_len"]));
    let number = |value: &Value| value.as_f64().unwrap();
    let (fp16, expected) = (number(&golden["fp16"]), &golden["models"]["round to nearest, 4bit-128g"]);
    let close = |what: &str, found: &Value, expected: f64, tolerance: f64| {
        let found = number(&found["value"]);
        assert!((found - expected).abs() < tolerance, "{what}: {found}, transformers {expected}");
    };
    close("fp16's perplexity", &found["reference_perplexity"], fp16, PERPLEXITY);
    let found = &found["models"][0];
    let [perplexity, kl, top1] = ["perplexity", "kl", "top1"].map(|key| number(&expected[key]));
    close("perplexity", &found["perplexity"], perplexity, PERPLEXITY);
    close("change", &found["perplexity_change"], perplexity - fp16, PERPLEXITY);
    close("KL divergence", &found["kl_divergence"], kl, DIVERGENCE * kl);
    close("top-1 agreement", &found["top1_agreement"], top1, TOP1);
}

#[test]
fn figures_on_wikitext_are_those_of_transformers_with_test_data() {
    if let Some(data) = test_data("figures_on_wikitext_are_those_of_transformers_with_test_data") {
        figures_are_those_of("booklm-wikitext.json", &data, "wikitext-2-v1/test-00000-of-00001.parquet");
    }
}

#[test]
fn figures_on_books_are_those_of_transformers_with_test_data() {
    if let Some(data) = test_data("figures_on_books_are_those_of_transformers_with_test_data") {
        figures_are_those_of("booklm-books.json", &data, "books/eval.parquet");
    }
}
