//! What `eval` keeps and takes again: the unquantized model's predictions, `eval.json`; texts, lengths and windows.

use std::fs;

use serde_json::Value;

use crate::{
    helpers::{DOWN, Lab, Output, copy, demo, entries, read_json, text_of},
    safetensors_file,
};

/// `gptq eval` of the lab's branch with `flags`; on 2 windows of 64 tokens where they do not say otherwise.
fn eval(lab: &Lab, flags: &[&str]) -> Output {
    let (model, branch, text) =
        (text_of(&lab.model()), text_of(&lab.branch()), text_of(&demo("evaluation.parquet")));
    let mut args = vec!["eval", "--model", &model, "--quantized", &branch];
    for (name, value) in [("--dataset", text.as_str()), ("--seq-len", "64"), ("--windows", "2")] {
        if !flags.contains(&name) {
            args.extend([name, value]);
        }
    }
    args.extend(flags);
    lab.run(&args)
}

/// Everything that was measured, without the time it took.
fn figures(output: Output) -> Value {
    let mut evaluations = output.json()["evaluations"].take();
    for evaluation in evaluations.as_array_mut().unwrap() {
        evaluation.as_object_mut().unwrap().remove("seconds");
    }
    evaluations
}

#[test]
fn stored_predictions_are_listed_and_cleared() {
    let lab = Lab::with_branch("4bit-32g");
    let none = lab.run(&["cache", "list"]).succeeds();
    assert_eq!(none.stdout, "0 B in 0 files of `[LAB]/cache/gptq`\n");
    eval(&lab, &["--no-save"]).succeeds();
    let cache = lab.path("cache/gptq");
    fs::write(cache.join("notes.txt"), "mine").unwrap();
    let listed = lab.run(&["cache", "list"]).succeeds().stdout;
    assert!(
        listed.contains("kB  [LAB]/cache/gptq/predictions-") && listed.contains(" in 1 file of "),
        "{listed}"
    );
    let json = lab.run(&["cache", "list", "--json"]).json();
    let size = cache.join(&entries(&cache)[1]).metadata().unwrap().len();
    assert_eq!(json[0]["bytes"], size);
    let cleared = lab.run(&["cache", "clear", "--cache-dir", &text_of(&cache)]).succeeds().stdout;
    assert!(cleared.ends_with("in 1 file of `[LAB]/cache/gptq` removed\n"), "{cleared}");
    assert_eq!(entries(&cache), ["notes.txt"]);
}

#[test]
fn predictions_are_kept_and_figures_are_the_same() {
    let lab = Lab::with_branch("4bit-32g");
    let first = eval(&lab, &["--json", "--no-save"]);
    assert!(first.stderr.contains("the unquantized model's predictions are kept in"), "{}", first.stderr);
    let kept = lab.path("cache/gptq").join(&entries(&lab.path("cache/gptq"))[0]);
    let again = eval(&lab, &["--json", "--no-save"]);
    assert!(again.stderr.contains("the unquantized model is not run"), "{}", again.stderr);
    let without = eval(&lab, &["--json", "--no-save", "--no-cache"]);
    assert_eq!(without.stderr, "");
    let first = figures(first);
    assert_eq!(figures(again), first);
    assert_eq!(figures(without), first);

    // Less than logits in fp16 would take, which is what the file is for.
    let bytes = fs::read(&kept).unwrap();
    assert!(bytes.len() < 2 * 63 * 4096 * 2, "{}", bytes.len());
    let mut damaged = bytes.clone();
    damaged[bytes.len() / 2] ^= 1;
    fs::write(&kept, damaged).unwrap();
    let repaired = eval(&lab, &["--json", "--no-save"]);
    assert!(repaired.stderr.contains("cannot be used: a checksum does not fit"), "{}", repaired.stderr);
    assert_eq!(figures(repaired), first);
    assert_eq!(fs::read(&kept).unwrap(), bytes);

    // Another number of windows is another file.
    eval(&lab, &["--windows", "1", "--no-save"]).succeeds();
    assert_eq!(entries(&lab.path("cache/gptq")).len(), 2);
    let elsewhere = text_of(&lab.path("elsewhere"));
    eval(&lab, &["--cache-dir", &elsewhere, "--no-save"]).succeeds();
    assert_eq!(fs::read(lab.path("elsewhere").join(kept.file_name().unwrap())).unwrap(), bytes);
}

#[test]
fn figures_stay_beside_the_model() {
    let lab = Lab::with_branch("4bit-32g-act");
    let file = lab.branch().join("eval.json");
    eval(&lab, &["--no-save"]).succeeds();
    assert!(!file.exists());
    let measured = eval(&lab, &["--json"]).json()["evaluations"].take();
    let kept = read_json(&file);
    assert_eq!(kept["schema"], "gptq-eval/1");
    assert_eq!(kept["evaluations"], measured);
    let checkpoint = &kept["checkpoint"];
    let described = (&checkpoint["bits"], &checkpoint["group_size"], &checkpoint["act_order"]);
    assert_eq!(described, (&4.into(), &32.into(), &"yes".into()));
    assert_eq!((&checkpoint["damp"], &checkpoint["samples"]), (&0.05.into(), &4.into()));
    assert_eq!(checkpoint["dataset"], "evaluation.parquet");
    // The checkpoint is as good as before.
    lab.verify(&lab.branch(), &[]).succeeds();

    // The same once more takes the place of the old; another protocol stands beside it.
    eval(&lab, &[]).succeeds();
    eval(&lab, &["--seq-len", "32"]).succeeds();
    let kept = read_json(&file);
    let lengths: Vec<&Value> =
        kept["evaluations"].as_array().unwrap().iter().map(|e| &e["seq_len"]).collect();
    assert_eq!(lengths, [&Value::from(64), &Value::from(32)]);
}

#[test]
fn several_texts_and_lengths_in_one_call() {
    let lab = Lab::with_branch("4bit-32g");
    let mine = lab.write("mine.txt", &"The old house stood by the river. ".repeat(60));
    let text = text_of(&demo("evaluation.parquet"));
    let flags = ["--dataset", &text, "--dataset", &mine, "--seq-len", "64", "--seq-len", "32", "--json"];
    let found = figures(eval(&lab, &flags));
    let of = |e: &Value| (e["dataset"].clone(), e["seq_len"].as_u64(), e["windows"].as_u64());
    let all: Vec<_> = found.as_array().unwrap().iter().map(of).collect();
    let expected = [
        ("evaluation.parquet", 64, 2),
        ("evaluation.parquet", 32, 4),
        ("mine.txt", 64, 2),
        ("mine.txt", 32, 4),
    ];
    let expected = expected.map(|(name, length, count)| (Value::from(name), Some(length), Some(count)));
    assert_eq!(all, expected);
    // What was measured together is what is measured alone.
    assert_eq!(figures(eval(&lab, &["--seq-len", "32", "--windows", "4", "--json"]))[0], found[1]);
}

#[test]
fn windows_that_overlap_score_new_tokens() {
    let lab = Lab::with_branch("4bit-32g");
    let apart = figures(eval(&lab, &["--stride", "64", "--json"]))[0].take();
    assert_eq!(apart, figures(eval(&lab, &["--json"]))[0]);
    let overlapping = figures(eval(&lab, &["--stride", "16", "--windows", "3", "--json"]))[0].take();
    assert_eq!(overlapping["window_tokens"], serde_json::json!([63, 16, 16]));
    assert_eq!(overlapping["window_nll"][0], apart["window_nll"][0], "the first window is the same");
    assert!(overlapping["protocol"].as_str().unwrap().contains("each beginning 16 after the one before"));
    // The mean is over tokens, not over windows.
    let [nll, tokens] =
        ["window_nll", "window_tokens"].map(|key| overlapping[key].as_array().unwrap().clone());
    let number = |value: &Value| value.as_f64().unwrap();
    let sum: f64 = nll.iter().zip(&tokens).map(|(nll, n)| number(nll) * number(n)).sum();
    let perplexity = number(&overlapping["reference_perplexity"]["value"]);
    assert!((perplexity.ln() - sum / 95.0).abs() < 1e-9, "{perplexity}");
    for stride in ["0", "65"] {
        let error = format!("error: stride: expected 1 to 64, the tokens of a window, found `{stride}`");
        eval(&lab, &["--stride", stride]).fails_with(&error);
    }
}

#[test]
fn every_model_is_checked_before_any_is_computed() {
    let lab = Lab::with_branch("4bit-32g");
    let bad = lab.path("bad");
    copy(&lab.branch(), &bad);
    safetensors_file::change(&bad, |tensors| drop(tensors.remove(&format!("{DOWN}.qweight"))));
    let output = eval(&lab, &["--quantized", &text_of(&bad)]);
    assert_eq!(
        output.stderr,
        format!(
            "error: `[LAB]/model` cannot be compared with `[LAB]/bad`: tensor `{DOWN}.qweight` is missing from \
             `[LAB]/bad`; gptq verify [LAB]/bad lists every defect\n"
        )
    );
    assert_eq!((output.code, output.stdout.as_str()), (Some(2), ""));
    assert!(!lab.branch().join("eval.json").exists());
    assert!(!lab.path("cache/gptq").exists(), "the unquantized model was not run");
}

#[test]
fn folders_of_the_same_name_have_their_parents_names_in_the_table() {
    let lab = Lab::with_branch("4bit-32g");
    for run in ["first", "second"] {
        copy(&lab.branch(), &lab.path(run).join("main"));
    }
    let [first, second] = ["first", "second"].map(|run| text_of(&lab.path(run).join("main")));
    let flags = ["--quantized", &first, "--quantized", &second];
    let table = eval(&lab, &flags).succeeds().stdout;
    assert!(table.starts_with("evaluation.parquet, 2 windows of 64 tokens\nmodel "), "{table}");
    let names: Vec<&str> =
        table.lines().skip(2).take(4).filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(names, ["fp16", "gptq-4bit-32g-actorder_False", "first/main", "second/main"]);
    // Beside the model, the figures have the folder's own name.
    assert_eq!(read_json(&lab.path("first/main/eval.json"))["name"], "main");
    let out = text_of(&lab.out());
    let report = lab.run(&[&["report", &out], &flags[..]].concat()).succeeds().stdout;
    for name in ["first/main", "second/main"] {
        assert!(report.lines().any(|line| line.split_whitespace().next() == Some(name)), "{report}");
    }
}
