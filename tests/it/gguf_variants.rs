//! GGUF files that a run solves beside its branches.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::{
    helpers::{Lab, digests, entries, read_json, text_of},
    tiny_model::Model,
};

/// Rows of `down_proj` and of the embedding are whole superblocks; those of the others are not if `hidden` is 64.
fn model(hidden: usize) -> Model {
    Model { hidden, intermediate: 256, heads: 4, kv_heads: 2, ..Model::default() }
}

/// The type of each tensor of a GGUF file.
fn types(lab: &Lab, name: &str) -> BTreeMap<String, String> {
    let file = text_of(&lab.out().join(name));
    let found = lab.run(&["inspect", &file, "--tensors", "--json"]).json();
    let text = |tensor: &Value, key: &str| tensor[key].as_str().unwrap().to_owned();
    found["tensors"].as_array().unwrap().iter().map(|t| (text(t, "name"), text(t, "dtype"))).collect()
}

#[test]
fn one_run_leaves_branches_and_gguf_files() {
    let lab = Lab::with(&model(64));
    let alone = lab.path("alone");
    lab.quantize(&["--variant", "4bit-32g", "--out", &text_of(&alone)]).succeeds();
    let flags = ["--variant", "q2_k", "--variant", "4bit-32g", "--variant", "q4_k_m", "--variant", "q8_0"];
    lab.quantize(&flags).succeeds();
    let branch = "gptq-4bit-32g-actorder_False";
    let files = ["model-Q2_K.gguf", "model-Q4_K_M.gguf", "model-Q8_0.gguf"];
    assert_eq!(entries(&lab.out()), [&[branch], &files[..], &["run.json"]].concat());

    // The branch is what it is without the files.
    let of_branch = |all: Vec<(String, String)>| -> Vec<_> {
        all.into_iter().filter(|(name, _)| name.ends_with(".safetensors")).collect()
    };
    assert_eq!(of_branch(digests(&lab.out())), of_branch(digests(&alone)));

    let report = read_json(&lab.out().join("run.json"));
    for (i, (variant, bits)) in [("q2_k", 2), ("4bit-32g", 4), ("q4_k_m", 4), ("q8_0", 8)].iter().enumerate()
    {
        let branch = &report["branches"][i];
        assert_eq!(
            (branch["variant"].as_str().unwrap(), branch["linears"].as_array().unwrap().len()),
            (*variant, 14)
        );
        assert!(branch["bits_per_weight"].as_f64().unwrap() > f64::from(*bits));
    }
    for name in files {
        lab.verify(&lab.out().join(name), &[]).succeeds();
    }
    // Files have no folder for a card.
    lab.run(&["card", &text_of(&lab.out())]).succeeds();
    assert!(lab.out().join(branch).join("README.md").is_file());
    let paths = files.map(|name| lab.out().join(name));
    let evaluation = lab.eval(&paths.each_ref().map(|path| path.as_path()));
    let divergence = |i: usize| evaluation["models"][i]["kl_divergence"]["value"].as_f64().unwrap();
    let [low, middle, high] = [0, 1, 2].map(divergence);
    assert!(high < 0.2 * middle && middle < 0.5 * low, "{low} {middle} {high}");
}

/// The types that llama.cpp gives a Llama of two layers with these shapes, whose output layer has rows of 64.
#[test]
fn types_are_those_of_the_mix() {
    let lab = Lab::with(&model(64));
    let flags = ["--variant", "q2_k", "--variant", "q3_k_m", "--variant", "q4_k_m", "--variant", "q4_0"];
    lab.quantize(&flags).succeeds();
    let expect = |name: &str, expected: [&str; 5]| {
        let types = types(&lab, name);
        let found = [
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.self_attn.v_proj",
            "model.layers.1.mlp.down_proj",
        ]
        .map(|name| types[&format!("{name}.weight")].as_str());
        let outside = ["model.embed_tokens.weight", "lm_head.weight"].map(|name| types[name].as_str());
        assert_eq!([&found[..], &outside].concat(), expected, "{name}");
    };
    expect("model-Q2_K.gguf", ["IQ4_NL", "IQ4_NL", "Q3_K", "IQ4_NL", "Q8_0"]);
    expect("model-Q3_K_M.gguf", ["IQ4_NL", "Q5_1", "Q4_K", "IQ4_NL", "Q8_0"]);
    expect("model-Q4_K_M.gguf", ["Q5_0", "Q8_0", "Q6_K", "Q5_0", "Q8_0"]);
    expect("model-Q4_0.gguf", ["Q4_0", "Q4_0", "Q4_0", "Q4_0", "Q8_0"]);
}

/// Files of 8 bits are close to the model only if rotations, rows in turn and the order of rows in the file fit each other.
#[test]
fn best_quality_rotates_and_solves_rows_in_turn() {
    let lab = Lab::with(&model(256));
    lab.quantize(&["--variant", "q3_k_m", "--variant", "q8_0", "--quality", "best"]).succeeds();
    let files = ["model-Q3_K_M.gguf", "model-Q8_0.gguf"].map(|name| lab.out().join(name));
    files.iter().for_each(|file| drop(lab.verify(file, &[]).succeeds()));
    let evaluation = lab.eval(&files.each_ref().map(|path| path.as_path()));
    let divergence = |i: usize| evaluation["models"][i]["kl_divergence"]["value"].as_f64().unwrap();
    assert!(divergence(1) < 0.1 * divergence(0), "{} {}", divergence(0), divergence(1));
}

#[test]
fn what_a_gguf_file_cannot_be_of_is_refused_before_work() {
    let lab = Lab::with(&Model { hidden: 80, heads: 5, kv_heads: 5, ..Model::default() });
    let output = lab.quantize(&["--variant", "q4_k_m"]);
    assert_eq!(output.code, Some(2));
    assert!(output.stderr.contains("rows of 80 weights are not whole blocks"), "{}", output.stderr);
    assert!(!lab.out().exists());
    let output = lab.quantize(&["--variant", "q4_k_s"]);
    assert!(output.stderr.contains("q4_k_m"), "{}", output.stderr);
}
