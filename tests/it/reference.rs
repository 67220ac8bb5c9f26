//! A real model against figures of other software. The data is larger than belongs in the repository: it is read from
//! the folder in `GPTQ_TEST_DATA`, and without it these tests, whose names end in `_with_test_data`, only say so.

#![expect(clippy::print_stderr, reason = "a test that does nothing must say so")]

use std::{env, path::PathBuf};

use crate::helpers::{Lab, text_of};

fn test_data(test: &str) -> Option<PathBuf> {
    let folder = env::var_os("GPTQ_TEST_DATA").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("{test} did nothing: GPTQ_TEST_DATA is not set");
    }
    folder
}

/// Perplexity of `booklm` on 16 windows of 1024 tokens of `text`, with 4 digits.
fn perplexity(test: &str, text: &str) -> Option<String> {
    let data = test_data(test)?;
    let (model, text) = (text_of(&data.join("booklm")), text_of(&data.join(text)));
    let args =
        ["eval", "--model", &model, "--dataset", &text, "--seq-len", "1024", "--windows", "16", "--json"];
    let evaluation = Lab::empty().run(&args).json()["evaluations"][0].take();
    assert_eq!((&evaluation["windows"], &evaluation["seq_len"]), (&16.into(), &1024.into()));
    Some(format!("{:.4}", evaluation["reference_perplexity"]["value"].as_f64().unwrap()))
}

/// transformers in fp32, the file's rows joined with an empty line, one BOS at the very front.
#[test]
fn perplexity_on_wikitext_is_that_of_transformers_with_test_data() {
    let test = "perplexity_on_wikitext_is_that_of_transformers_with_test_data";
    if let Some(found) = perplexity(test, "wikitext-2-v1/test-00000-of-00001.parquet") {
        assert_eq!(found, "60.8228");
    }
}

/// As above.
#[test]
fn perplexity_on_books_is_that_of_transformers_with_test_data() {
    let test = "perplexity_on_books_is_that_of_transformers_with_test_data";
    if let Some(found) = perplexity(test, "books/eval.parquet") {
        assert_eq!(found, "62.9837");
    }
}
