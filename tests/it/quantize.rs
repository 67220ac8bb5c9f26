//! A run from end to end: what it leaves, and that it leaves the same every time.

use std::{collections::BTreeSet, fs, path::Path};

use gptq::report::{REPORT_SCHEMA, Report};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{
    helpers::{Lab, demo, entries, files_below, read_json, repository, text_of, write_json},
    safetensors_file,
    tiny_model::Model,
};

/// Every file of a branch of the demo model.
const BRANCH_FILES: [&str; 8] = [
    "checksums.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "quantize_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// The demo model in two variants, evaluated.
fn demo_run(lab: &Lab) -> Value {
    let (model, text) =
        (text_of(&repository().join("calibration/demo")), text_of(&demo("calibration.parquet")));
    let eval = text_of(&demo("evaluation.parquet"));
    let flags =
        ["--model", &model, "--dataset", &text, "--samples", "8", "--seq-len", "128", "--eval", &eval];
    let more = ["--eval-windows", "2", "--variant", "4bit-128g", "--variant", "4bit-32g-act", "--json"];
    lab.quantize(&[&flags[..], &more].concat()).json()
}

#[test]
fn a_run_leaves_complete_branches_and_a_report() {
    let lab = Lab::empty();
    let printed = demo_run(&lab);
    let out = lab.out();
    assert_eq!(entries(&out), ["gptq-4bit-32g-actorder_True", "main", "run.json"]);
    for branch in ["gptq-4bit-32g-actorder_True", "main"] {
        assert_eq!(entries(&out.join(branch)), BRANCH_FILES);
        for name in
            ["generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
        {
            assert_eq!(
                fs::read(out.join(branch).join(name)).unwrap(),
                fs::read(demo(name)).unwrap(),
                "{name}"
            );
        }
        checksums_cover_everything(&out.join(branch));
        lab.verify(&out.join(branch), &[]).succeeds();
    }
    names_no_place_on_this_machine(&out, &lab);
    the_report_says_what_was_done(&printed, &out);
    configs_are_what_loaders_read(&out);
}

#[test]
fn a_sentencepiece_tokenizer_alone_is_read_and_copied() {
    let lab = Lab::new();
    fs::remove_file(lab.model().join("tokenizer.json")).unwrap();
    let tokenizer = repository().join("tests/golden/sentencepiece/bpe/tokenizer.model");
    fs::copy(&tokenizer, lab.model().join("tokenizer.model")).unwrap();
    lab.quantize(&["--variant", "4bit-32g"]).succeeds();
    assert_eq!(fs::read(lab.branch().join("tokenizer.model")).unwrap(), fs::read(tokenizer).unwrap());
    assert!(!lab.branch().join("tokenizer.json").exists());
    lab.verify(&lab.branch(), &[]).succeeds();
}

fn the_report_says_what_was_done(printed: &Value, out: &Path) {
    assert_eq!(*printed, read_json(&out.join("run.json")), "what is printed is what is written");
    let report: Report = serde_json::from_value(printed.clone()).unwrap();
    assert_eq!((report.schema.as_str(), REPORT_SCHEMA), ("gptq-run/2", "gptq-run/2"));
    assert_eq!(report.generated_by, concat!("gptq ", env!("CARGO_PKG_VERSION")));
    assert_eq!((report.model.layers, report.model.parameters), (4, 5_114_112));
    assert_eq!((report.calibration.samples, report.calibration.seq_len), (8, 128));
    assert_eq!(report.calibration.sources[0].provenance.dataset, "calibration.parquet");
    assert_eq!(report.layer_seconds.len(), 4);
    let branches: Vec<&str> = report.branches.iter().map(|b| b.branch.as_str()).collect();
    assert_eq!(branches, ["main", "gptq-4bit-32g-actorder_True"]);
    for branch in &report.branches {
        let sizes = entries(&out.join(&branch.branch)).into_iter().map(|f| out.join(&branch.branch).join(f));
        assert_eq!(branch.bytes, sizes.map(|f| f.metadata().unwrap().len()).sum::<u64>());
        assert_eq!(branch.linears.len(), 4 * 7);
        assert!(branch.linears.iter().all(|l| l.outlier_ratio >= 1.0 && l.condition_estimate >= 1.0));
        assert!(branch.readers.iter().any(|r| r.refused.is_none()) && branch.weight_bytes < branch.bytes);
        assert_eq!(branch.linears[0].name, "model.layers.0.self_attn.q_proj");
        assert!(
            branch.linears.iter().all(|l| l.relative_error > 0.0 && l.relative_error < 0.5 && l.damp >= 0.01)
        );
    }
    let stages = report.stage_seconds;
    let all = [stages.calibrating, stages.solving, stages.packing, stages.finishing];
    assert!(all.iter().all(|&s| s > 0.0) && all.iter().sum::<f64>() <= report.seconds, "{stages:?}");
    assert_eq!(report.command[..4], ["gptq", "quantize", "--model", "demo"]);
    assert!(report.command.iter().all(|word| !word.contains('/')), "{:?}", report.command);
    let [evaluation] = &report.evaluations[..] else { panic!("evaluated once") };
    assert_eq!((evaluation.windows, evaluation.seq_len, evaluation.models.len()), (2, 128, 2));
    assert_eq!((&evaluation.window_tokens[..], evaluation.window_nll.len()), (&[127, 127][..], 2));
    assert!(evaluation.models.iter().all(|m| m.window_nll.len() == 2 && m.kl_p99 <= m.kl_max));
    assert!(evaluation.models.iter().all(|m| m.kl_divergence.value > 0.0 && m.kl_divergence.value < 0.2));
}

fn configs_are_what_loaders_read(out: &Path) {
    // The first is what AutoGPTQ of the model cards' era passes to a constructor: not one key more.
    let expected = "{\n  \"bits\": 4,\n  \"group_size\": 128,\n  \"damp_percent\": 0.05,\n  \"desc_act\": false,\n  \
                    \"sym\": true,\n  \"true_sequential\": true,\n  \"model_name_or_path\": null,\n  \
                    \"model_file_base_name\": \"model\"\n}\n";
    assert_eq!(fs::read_to_string(out.join("main/quantize_config.json")).unwrap(), expected);

    let (source, config) = (read_json(&demo("config.json")), read_json(&out.join("main/config.json")));
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    // What readers built on transformers 4 know, beside the newer spelling.
    let added = ["torch_dtype", "rope_theta", "rope_scaling", "quantization_config"].map(str::to_owned);
    assert_eq!(keys(&config), [keys(&source), added.to_vec()].concat());
    assert_eq!(
        (&config["torch_dtype"], &config["rope_theta"]),
        (&"float16".into(), &source["rope_parameters"]["rope_theta"])
    );
    assert_eq!(config["dtype"], "float16");
    let mut quantization = config["quantization_config"].clone();
    let digest = quantization["meta"]["dataset_sha256"].take();
    assert_eq!(digest, read_json(&out.join("run.json"))["calibration"]["sha256"]);
    let expected = json!({
        "bits": 4, "group_size": 128, "damp_percent": 0.05, "desc_act": false, "static_groups": false, "sym": true,
        "true_sequential": true, "lm_head": false, "quant_method": "gptq", "checkpoint_format": "gptq",
        "pack_dtype": "int32", "act_group_aware": true,
        "meta": {
            "quantizer": [concat!("gptq:", env!("CARGO_PKG_VERSION"))], "dataset": "calibration.parquet",
            "dataset_sha256": null, "samples": 8, "seq_len": 128, "seed": 0, "damp_percent": 0.05,
            "shared_hessian": false, "quality": "standard", "signed_scales": true, "scale_search": "block",
            "act_group_aware": true, "asymmetric": 1.0, "output_hessian": 0.0, "rotate": false,
            "equalize": true, "shrinkage": true,
        },
    });
    assert_eq!(quantization, expected);
    let act = &read_json(&out.join("gptq-4bit-32g-actorder_True/config.json"))["quantization_config"];
    assert_eq!((&act["desc_act"], &act["group_size"]), (&true.into(), &32.into()));
}

fn checksums_cover_everything(branch: &Path) {
    let checksums = read_json(&branch.join("checksums.json"));
    let digest = |bytes: &[u8]| {
        Value::from(Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>())
    };
    let tensors = safetensors_file::read_folder(branch).into_iter().map(|(name, t)| (name, digest(&t.bytes)));
    assert_eq!(checksums["tensors"], Value::Object(tensors.collect()));
    let others =
        entries(branch).into_iter().filter(|n| n != "checksums.json" && !n.ends_with(".safetensors"));
    let others = others.map(|name| (name.clone(), digest(&fs::read(branch.join(&name)).unwrap())));
    assert_eq!(checksums["files"], Value::Object(others.collect()));
}

fn names_no_place_on_this_machine(out: &Path, lab: &Lab) {
    let places = [text_of(&lab.path("")), text_of(repository())];
    for file in files_below(out) {
        let bytes = fs::read(out.join(&file)).unwrap();
        for place in &places {
            let place = place.trim_end_matches('/').as_bytes();
            assert!(!bytes.windows(place.len()).any(|w| w == place), "{} holds {place:?}", file.display());
        }
    }
}

/// Every file of every branch; `run.json` holds times.
fn branch_bytes(out: &Path) -> Vec<(String, Vec<u8>)> {
    let files = files_below(out).into_iter().filter(|file| file != Path::new("run.json"));
    files.map(|file| (text_of(&file), fs::read(out.join(&file)).unwrap())).collect()
}

#[test]
fn two_runs_make_the_same_bytes() {
    let lab = Lab::new();
    let flags =
        ["--variant", "4bit-32g", "--variant", "3bit-32g-act-asym", "--variant", "8bit--1g-static", "--out"];
    for out in ["first", "second"] {
        let out = text_of(&lab.path(out));
        lab.quantize(&[&flags[..], &[&out]].concat()).succeeds();
    }
    let (first, second) = (branch_bytes(&lab.path("first")), branch_bytes(&lab.path("second")));
    assert_eq!(first.len(), 3 * BRANCH_FILES.len());
    for ((name, first), (other, second)) in first.iter().zip(&second) {
        assert_eq!(name, other);
        assert!(first == second, "{name} differs");
    }
    // And the seed is not for show.
    let out = text_of(&lab.path("third"));
    lab.quantize(&[&flags[..], &[&out, "--seed", "1"]].concat()).succeeds();
    assert_ne!(branch_bytes(&lab.path("third")), first);
}

#[test]
fn shards_hold_the_same_tensors() {
    let lab = Lab::new();
    lab.quantize(&["--variant", "4bit-32g"]).succeeds();
    let out = text_of(&lab.path("sharded"));
    lab.quantize(&["--variant", "4bit-32g", "--max-shard-size", "1MB", "--out", &out]).succeeds();
    let sharded = lab.path("sharded/gptq-4bit-32g-actorder_False");
    let files: BTreeSet<String> =
        entries(&sharded).into_iter().filter(|name| name.starts_with("model")).collect();
    let expected = ["-00001-of-00002.safetensors", "-00002-of-00002.safetensors", ".safetensors.index.json"];
    assert_eq!(files, expected.map(|end| format!("model{end}")).into());
    assert!(safetensors_file::read_folder(&sharded) == safetensors_file::read_folder(&lab.branch()));
    let index = read_json(&sharded.join("model.safetensors.index.json"));
    for (tensor, file) in index["weight_map"].as_object().unwrap() {
        assert!(
            safetensors_file::read(&sharded.join(file.as_str().unwrap())).contains_key(tensor),
            "{tensor}"
        );
    }
    checksums_cover_everything(&sharded);
    lab.verify(&sharded, &["--against", &text_of(&lab.model())]).succeeds();
    let evaluation = lab.eval(&[&sharded, &lab.branch()]);
    let [sharded, whole] = [0, 1].map(|i| &evaluation["models"][i]["perplexity"]["value"]);
    assert_eq!(sharded, whole);
}

#[test]
fn json_stands_alone_and_quiet_is_quiet() {
    let lab = Lab::new();
    let quiet = lab.quantize(&["--variant", "4bit-32g", "--json", "--quiet"]);
    assert_eq!(quiet.stderr, "");
    assert_eq!(quiet.json()["branches"][0]["branch"], "gptq-4bit-32g-actorder_False");

    let out = text_of(&lab.path("loud"));
    let loud = lab.quantize(&["--variant", "4bit-32g", "--out", &out, "--verbose"]).succeeds();
    let lines: Vec<&str> = loud.stderr.lines().collect();
    assert!(lines[0].starts_with("quality standard: equalized norms, signed scales, "), "{lines:?}");
    assert!(
        lines[1].starts_with("4bit-32g         model.layers.0.self_attn.q_proj          error 0."),
        "{lines:?}"
    );
    assert_eq!(lines.iter().filter(|line| line.contains(" error 0.")).count(), 14);
    assert_eq!(lines.iter().filter(|line| line.starts_with("layer ")).count(), 2);
    assert!(loud.stdout.starts_with("branch "), "{}", loud.stdout);
    assert!(
        loud.stdout.trim_end().lines().last().unwrap().starts_with("1 branch in [LAB]/loud ("),
        "{}",
        loud.stdout
    );
}

#[test]
fn readers_that_do_not_take_a_variant_are_named_before_any_work() {
    let lab = Lab::with(&Model { hidden: 320, intermediate: 432, heads: 5, kv_heads: 5, ..Model::default() });
    let flags = ["--variant", "4bit-128g", "--variant", "4bit-128g-asym", "--dataset", "no-such-text"];
    // The text is looked for after that.
    let output = lab.quantize(&flags);
    assert_eq!(output.code, Some(2));
    let linears =
        "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj and self_attn.o_proj (N = 320, K = 320)";
    let lines: Vec<&str> = output.readers.lines().collect();
    let expected = format!(
        "warning: vLLM 0.30 and newer does not load 4bit-128g: {linears}: needs whole groups, K = 320 ends in a \
         partial one; it takes group size -1"
    );
    assert!(lines.contains(&expected.as_str()), "{lines:#?}");
    let expected =
        "GPTQModel 7 does not load 4bit-128g-asym: takes asymmetric v1 files only where GPTQModel wrote them";
    assert!(lines.contains(&expected), "{lines:#?}");
    assert!(!output.readers.contains("transformers") && !output.readers.contains("llama.cpp"), "{lines:#?}");
    assert!(!lab.out().exists());
}

#[test]
fn a_bos_token_on_which_two_files_disagree_is_said_by_the_run_and_by_verify() {
    let lab = Lab::new();
    let path = lab.model().join("tokenizer_config.json");
    let mut config = read_json(&path);
    config["add_bos_token"] = false.into();
    write_json(&path, &config);
    let output = lab.quantize(&["--variant", "4bit-32g"]).succeeds();
    let said = "tokenizer_config.json says `add_bos_token`: false, and the post-processor of tokenizer.json adds one: \
                tokenizer.json is used";
    assert_eq!(output.stderr.matches(said).count(), 1, "{}", output.stderr);
    let warning = read_json(&lab.out().join("run.json"))["warnings"][0].clone();
    assert!(warning.as_str().unwrap().starts_with(said), "{warning}");
    let verified = lab.verify(&lab.branch(), &[]).succeeds().stdout;
    assert_eq!(verified.matches(said).count(), 1, "{verified}");
}

#[test]
fn a_required_reader_is_checked_before_any_work() {
    let lab = Lab::new();
    lab.quantize(&["--variant", "4bit-32g-act", "--require-reader", "VLLM"]).fails_with(
        "error: variant 4bit-32g-act: vLLM 0.30 and newer (--require-reader) does not load it: it refuses act order \
          (desc_act)\nhint: it loads --variant 4bit--1g-act, 4bit-64g, 4bit-32g",
    );
    lab.quantize(&["--variant", "4bit-32g", "--require-reader", "vlm"]).fails_with(
        "error: --require-reader: expected the name of a reader (transformers 5, GPTQModel 7, vLLM 0.30 and newer, SGLang \
         0.5.20 and newer, llama.cpp's converter, mistral.rs 0.9, or another of docs/readers.md), found `vlm`",
    );
    assert!(!lab.out().exists());
    lab.quantize(&["--variant", "4bit-32g", "--require-reader", "vllm", "--require-reader", "transformers"])
        .succeeds();
}

#[test]
fn a_plan_is_followed_and_flags_go_before_it() {
    let lab = Lab::new();
    let text = text_of(&demo("evaluation.parquet"));
    let plan = format!(
        "dataset = {text:?}\nsamples = 4\nseq-len = 32\nseed = 7\nvariants = [\"4bit-32g\", \"8bit-64g\"]\ndamp = 0.05\n\
         shared-hessian = true\n"
    );
    let plan = lab.write("plan.toml", &plan);
    let (model, out) = (text_of(&lab.model()), text_of(&lab.out()));
    let args = ["quantize", "--model", &model, "--out", &out, "--plan", &plan, "--no-eval", "--json"];
    let report = lab.run(&[&args[..], &["--damp", "0.02"]].concat()).json();
    assert_eq!(
        entries(&lab.out()),
        ["gptq-4bit-32g-actorder_False", "gptq-8bit-64g-actorder_False", "run.json"]
    );
    let found =
        ["samples", "seq-len", "seed", "damp", "shared-hessian"].map(|key| report["plan"][key].clone());
    assert_eq!(found, [json!(4), json!(32), json!(7), json!(0.02), json!(true)]);
    let quantize_config = read_json(&lab.out().join("gptq-4bit-32g-actorder_False/quantize_config.json"));
    assert_eq!(quantize_config["damp_percent"], 0.02);
    // All Hessians come from the unquantized model, and the files say so.
    assert_eq!(quantize_config["true_sequential"], false);
    let config = read_json(&lab.out().join("gptq-8bit-64g-actorder_False/config.json"));
    let quantization = &config["quantization_config"];
    assert_eq!(
        (&quantization["true_sequential"], &quantization["meta"]["shared_hessian"]),
        (&false.into(), &true.into())
    );
}

#[test]
fn what_a_run_without_a_journal_left_needs_a_word() {
    let lab = Lab::new();
    let partial = lab.out().join(".gptq-4bit-32g-actorder_False.partial");
    fs::create_dir_all(&partial).unwrap();
    fs::write(partial.join("model.safetensors"), "half of it").unwrap();
    lab.quantize(&["--variant", "4bit-32g"]).fails_with(
        "error: `[LAB]/out` cannot be resumed: it holds a run that was begun, whose journal is not in \
         `[LAB]/out/.journal.partial`\nhint: --restart discards the unfinished run; if its journal is in another folder, \
         name that with --journal-dir",
    );
    lab.quantize(&["--variant", "4bit-32g", "--restart"]).succeeds();
    assert_eq!(entries(&lab.out()), ["gptq-4bit-32g-actorder_False", "run.json"]);
    assert_eq!(entries(&lab.branch()), BRANCH_FILES);
    // Even that of another variant, and behind a link to another disk, which stays one.
    let out = lab.path("other");
    let disk = lab.path("disk");
    fs::create_dir_all(disk.join(".main.partial")).unwrap();
    std::os::unix::fs::symlink(&disk, &out).unwrap();
    lab.quantize(&["--variant", "4bit-32g", "--restart", "--out", &text_of(&out)]).succeeds();
    assert_eq!(entries(&disk), ["gptq-4bit-32g-actorder_False", "run.json"]);
}

#[test]
fn tensors_nobody_knows_are_named_and_left_out() {
    let lab = Lab::with(&Model::default());
    safetensors_file::change(&lab.model(), |tensors| {
        let copy = tensors["model.norm.weight"].clone();
        tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), copy.clone());
        tensors.insert("extra.weight".into(), copy);
    });
    let output = lab.quantize(&["--variant", "4bit-32g"]).succeeds();
    let warning = "warning: tensors that are not part of the model are left out (1): extra.weight\n";
    assert!(output.stderr.contains(warning), "{}", output.stderr);
    assert!(!safetensors_file::read_folder(&lab.branch()).contains_key("extra.weight"));
    // A config without the keys that have defaults is read as transformers reads it.
    let mut config = read_json(&lab.model().join("config.json"));
    for key in [
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
        "hidden_act",
        "num_key_value_heads",
        "architectures",
    ] {
        config.as_object_mut().unwrap().remove(key);
    }
    write_json(&lab.model().join("config.json"), &config);
    let out = text_of(&lab.path("again"));
    lab.quantize(&["--variant", "4bit-32g", "--out", &out]).succeeds();
    let again = lab.path("again/gptq-4bit-32g-actorder_False");
    assert!(safetensors_file::read_folder(&again) == safetensors_file::read_folder(&lab.branch()));
}

#[test]
fn windows_that_overlap_much_are_warned_of() {
    let lab = Lab::new();
    // At least 72 tokens, and fewer than half of those of the windows.
    let text = lab.write("short.txt", &"The old house stood by the river. ".repeat(9));
    let output = lab.quantize(&["--variant", "4bit-32g", "--dataset", &text]).succeeds();
    let warning = "warning: the 4 windows overlap: of their 256 tokens ";
    assert!(
        output.stderr.contains(warning) && output.stderr.contains(" are distinct; use more text"),
        "{}",
        output.stderr
    );
    let report = read_json(&lab.out().join("run.json"));
    assert!(report["warnings"][0].as_str().unwrap().contains("windows overlap"), "{}", report["warnings"]);
}
