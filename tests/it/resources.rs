//! Limits of memory and several devices: how a run is done, never what it makes.

use crate::{
    helpers::{Lab, demo, digests, read_json, text_of},
    tiny_model::Model,
};

const FLAGS: [&str; 6] = ["--seq-len", "128", "--variant", "4bit-128g", "--variant", "4bit-32g-act"];
const FEW: [&str; 2] = ["--samples", "12"];

/// Digest of every file of the branches, and what the run said.
fn run(more: &[&str]) -> (Vec<(String, String)>, String) {
    let lab = Lab::empty();
    let (model, text) = (text_of(&demo("")), text_of(&demo("calibration.parquet")));
    let flags = [&["--model", &model, "--dataset", &text], &FLAGS[..], more].concat();
    let output = lab.quantize(&flags).succeeds();
    (digests(&lab.out()), output.estimate)
}

/// Bytes in `memory: about 123.4 MB at most…`.
fn estimate(said: &str) -> f64 {
    let line = said.lines().find(|line| line.starts_with("memory: about ")).expect("the estimate is printed");
    let mut words = line.split_whitespace().skip(2);
    let number: f64 = words.next().unwrap().parse().unwrap();
    number * if words.next().unwrap() == "GB" { 1e9 } else { 1e6 }
}

#[test]
fn activations_on_disk_make_the_same_branches() {
    // More activations than what the program itself holds differs from one run to the next, which is some megabytes.
    let (expected, said) = run(&["--samples", "64"]);
    assert!(!said.contains("on disk"), "{said}");
    let limit = format!("{}MB", estimate(&said) / 1e6 - 12.0);
    let (found, said) = run(&["--samples", "64", "--max-memory", &limit]);
    assert!(said.contains(" of activations on disk"), "{said}");
    assert_eq!(found, expected);
}

#[test]
fn too_little_memory_is_refused_with_the_numbers() {
    let lab = Lab::empty();
    let (model, text) = (text_of(&demo("")), text_of(&demo("calibration.parquet")));
    let output = lab.quantize(
        &[&["--model", &model, "--dataset", &text, "--max-memory", "1MB"], &FLAGS[..], &FEW].concat(),
    );
    assert_eq!(output.code, Some(2));
    assert!(
        output.stderr.contains("error: too little memory: available 1.0 MB, needed at least "),
        "{}",
        output.stderr
    );
    assert!(output.stderr.contains("hint: allow more with --max-memory"), "{}", output.stderr);
    assert!(!lab.out().exists());
}

/// The program itself takes more than this limit leaves once the text is there.
#[test]
fn too_little_memory_for_the_text_is_refused_before_it_is_tokenized() {
    let lab = Lab::new();
    // Enough for the model, and not for a text without a line break, which is tokenized as a whole: 8 MB.
    let text = lab.write("long.txt", &"word ".repeat(1_600_000));
    let output = lab.quantize(&["--variant", "4bit-32g", "--dataset", &text, "--max-memory", "600MB"]);
    assert_eq!(output.code, Some(2));
    assert!(
        output.stderr.contains("error: too little memory: available 600.0 MB, needed at least "),
        "{}",
        output.stderr
    );
    assert!(output.stderr.contains(" to tokenize the text"), "{}", output.stderr);
}

/// Wider than deep, deeper than wide, and with few heads of keys; large enough that what a run needs is more than what any
/// program does.
#[test]
fn the_estimate_is_within_a_fifth_of_the_peak() {
    let shapes = [(768, 2560, 6, 6), (512, 3072, 8, 2), (1024, 1024, 8, 8)];
    for (hidden, intermediate, heads, kv_heads) in shapes {
        let lab = Lab::with(&Model { hidden, intermediate, heads, kv_heads, ..Model::default() });
        let flags =
            ["--samples", "48", "--seq-len", "128", "--variant", "4bit-128g", "--variant", "4bit-32g-act"];
        let output = lab.quantize(&flags).succeeds();
        let peak = read_json(&lab.out().join("run.json"))["peak_memory_bytes"].as_f64().unwrap();
        let ratio = estimate(&output.estimate) / peak;
        assert!((0.8..1.2).contains(&ratio), "hidden {hidden}: estimated {ratio:.2} of {peak}");
    }
}

#[test]
fn several_devices_make_the_same_branches() {
    let (expected, _) = run(&FEW);
    // Variants are spread.
    assert_eq!(run(&[&FEW[..], &["--device", "cpu,cpu"]].concat()).0, expected);
    // Windows are: sums in another order, hence codes that may differ at ties, but the same every time.
    let shared = [&FEW[..], &["--device", "cpu,cpu,cpu", "--shared-hessian"]].concat();
    let (first, _) = run(&shared);
    assert_eq!(run(&shared).0, first);
    let names = |files: &[(String, String)]| files.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&first), names(&expected));
}
