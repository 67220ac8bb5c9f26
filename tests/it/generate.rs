//! `gptq generate`: what the demo model says, quantized or not.

use std::fs;

use serde_json::{Map, Value};

use crate::{
    helpers::{Lab, Output, copy, demo, read_json, text_of, write_json},
    safetensors_file,
};

const PROMPT: &str = "The";

fn generate(lab: &Lab, dir: &str, flags: &[&str]) -> Output {
    let mut args = vec!["generate".to_owned(), dir.to_owned()];
    for (flag, value) in [("--prompt", PROMPT), ("--max-tokens", "12")] {
        if !flags.contains(&flag) {
            args.extend([flag.to_owned(), value.to_owned()]);
        }
    }
    args.extend(flags.iter().map(|&flag| flag.to_owned()));
    lab.run(&args)
}

fn made(lab: &Lab, dir: &str, flags: &[&str]) -> Value {
    let output = generate(lab, dir, &[flags, &["--json"]].concat()).succeeds();
    serde_json::from_str(&output.stdout).unwrap()
}

#[test]
fn a_model_and_its_branches_speak() {
    let lab = Lab::empty();
    let model = text_of(&demo(""));
    let flags = ["--model", &model, "--variant", "8bit-32g", "--variant", "4bit-32g-act"];
    lab.quantize(&flags).succeeds();
    let greedy = ["--temperature", "0", "--repetition-penalty", "1"];
    let dense = made(&lab, &model, &greedy);
    assert_eq!((&dense["tokens"], &dense["stop"]), (&12.into(), &"max-tokens".into()));
    assert!(dense["tokens_per_second"].as_f64().unwrap() > 0.0);
    // Eight bits are close enough for the same words.
    let branch = text_of(&lab.out().join("gptq-8bit-32g-actorder_False"));
    assert_eq!(made(&lab, &branch, &greedy)["text"], dense["text"]);
    let branch = text_of(&lab.out().join("gptq-4bit-32g-actorder_True"));
    assert!(!made(&lab, &branch, &greedy)["text"].as_str().unwrap().is_empty());
}

#[test]
fn tensors_that_the_index_lists_in_vain_are_named_by_generate_and_inspect() {
    let lab = Lab::with_branch("4bit-32g");
    let (branch, index) = (lab.branch(), "model.safetensors.index.json");
    let shard = "model-00001-of-00001.safetensors";
    fs::rename(branch.join("model.safetensors"), branch.join(shard)).unwrap();
    let dir = text_of(&branch);
    let names = safetensors_file::read(&branch.join(shard)).into_keys().chain(["model.ghost".to_owned()]);
    let map: Map<String, Value> = names.map(|name| (name, shard.into())).collect();
    write_json(&branch.join(index), &serde_json::json!({ "weight_map": map }));
    let note = format!(
        "`{index}` lists tensors that no shard holds (1): `model.ghost`; the model does not need them"
    );
    let spoken = generate(&lab, &dir, &["--max-tokens", "1"]).succeeds();
    assert!(spoken.stderr.contains(&format!("warning: {note}")), "{}", spoken.stderr);
    assert!(lab.run(&["inspect", &dir]).succeeds().stdout.contains(&note));
    assert_eq!(lab.run(&["inspect", &dir, "--json"]).json()["notes"], serde_json::json!([note]));
}

#[test]
fn a_seed_decides_and_the_text_is_streamed_after_the_prompt() {
    let lab = Lab::empty();
    let model = text_of(&demo(""));
    let text = |seed: &str| made(&lab, &model, &["--seed", seed, "--temperature", "1.5"])["text"].clone();
    assert_eq!(text("1"), text("1"));
    assert_ne!(text("1"), text("2"));
    let plain = generate(&lab, &model, &["--seed", "1", "--temperature", "1.5"]).succeeds();
    assert_eq!(plain.stdout, format!("{PROMPT}{}\n", text("1").as_str().unwrap()));
    assert!(plain.stderr.contains("tokens/s"), "{}", plain.stderr);
}

#[test]
fn a_prompt_is_read_from_standard_input() {
    let lab = Lab::empty();
    let model = text_of(&demo(""));
    let flags = ["--prompt", "-", "--max-tokens", "12"];
    let piped = lab.run_with_input(PROMPT, &[&["generate", &model], &flags[..]].concat()).succeeds();
    assert_eq!(piped.stdout, generate(&lab, &model, &[]).succeeds().stdout);
}

/// The demo model in a folder of its own.
fn own_demo(lab: &Lab) -> String {
    let model = lab.path("demo");
    copy(&demo(""), &model);
    text_of(&model)
}

#[test]
fn the_stop_tokens_of_both_files_end_it() {
    let lab = Lab::empty();
    let model = own_demo(&lab);
    let greedy = ["--temperature", "0", "--repetition-penalty", "1"];
    let ids: Vec<u64> = serde_json::from_value(made(&lab, &model, &greedy)["token_ids"].take()).unwrap();
    let at = (1..ids.len()).find(|&i| !ids[..i].contains(&ids[i])).expect("another token than the first");
    let path = lab.path("demo").join("generation_config.json");
    let mut config = read_json(&path);
    config["eos_token_id"] = serde_json::json!([2, ids[at]]);
    write_json(&path, &config);
    let stopped = made(&lab, &model, &greedy);
    assert_eq!((&stopped["stop"], &stopped["tokens"]), (&"end-of-sequence".into(), &at.into()));
    config["eos_token_id"] = "two".into();
    write_json(&path, &config);
    generate(&lab, &model, &greedy).fails_with(
        "error: `[LAB]/demo/generation_config.json`: key `eos_token_id`: expected a token id or a list of them, found \"two\"",
    );
}

/// The decoder of a Llama drops the space in front of a text's first word, and what is made is no beginning of a text.
#[test]
fn the_space_after_the_prompt_is_kept() {
    let lab = Lab::empty();
    let model = text_of(&demo(""));
    let found = made(&lab, &model, &["--temperature", "0", "--prompt", "The old house"]);
    let tokenizer = gptq::calibration::Tokenizer::open(&demo("")).unwrap();
    let made: Vec<u32> = serde_json::from_value(found["token_ids"].clone()).unwrap();
    let all = [tokenizer.encode("The old house").unwrap(), made].concat();
    assert_eq!(format!("The old house{}", found["text"].as_str().unwrap()), tokenizer.decode(&all).unwrap());
}

#[test]
fn the_context_ends_it() {
    let lab = Lab::empty();
    let context = 512;
    let long = "word ".repeat(context);
    let model = text_of(&demo(""));
    let refused = generate(&lab, &model, &["--prompt", &long]);
    assert!(
        refused.stderr.starts_with("error: prompt: expected 1 to 511 tokens, found `"),
        "{}",
        refused.stderr
    );
    assert_eq!((refused.code, refused.stdout.as_str()), (Some(2), ""));
    let found = made(&lab, &model, &["--prompt", &"a ".repeat(250), "--max-tokens", "500"]);
    let total = found["prompt_tokens"].as_u64().unwrap() + found["tokens"].as_u64().unwrap();
    assert!(found["stop"] == "context" && total == 512 || found["stop"] == "end-of-sequence", "{found}");
}

#[test]
fn settings_that_cannot_work() {
    let lab = Lab::empty();
    let model = text_of(&demo(""));
    for (flags, error) in [
        (["--temperature", "-1"], "error: temperature: expected a number from 0, found `-1`"),
        (["--top-p", "0"], "error: top-p: expected a number above 0 and up to 1, found `0`"),
        (["--repetition-penalty", "0"], "error: repetition-penalty: expected a number above 0, found `0`"),
    ] {
        generate(&lab, &model, &flags).fails_with(error);
    }
}
