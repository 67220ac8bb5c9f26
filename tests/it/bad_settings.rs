//! Plans, flags, texts and disks that cannot work: the error, the hint, exit code 2, nothing left behind.

use std::fs::{self, File};

use serde_json::json;

use crate::{
    helpers::{Lab, Output, demo, read_json, text_of, write_json},
    tiny_model::Model,
};

/// Requires that `gptq quantize` with these flags fails with `error` and leaves nothing.
#[track_caller]
fn refused(lab: &Lab, flags: &[&str], error: &str) {
    lab.quantize(flags).fails_with(error);
    assert!(!lab.out().exists(), "something was left in --out");
}

#[test]
fn plans_that_cannot_be_read() {
    let lab = Lab::new();
    let plan = |text: &str| lab.write("plan.toml", text);
    refused(
        &lab,
        &["--plan", &plan("sample = 3\n")],
        "error: unknown key `sample` in `[LAB]/plan.toml`\nhint: did you mean `samples`?",
    );
    refused(&lab, &["--plan", &plan("zebra = 3\n")], "error: unknown key `zebra` in `[LAB]/plan.toml`");
    for (text, problem) in [
        (
            "samples = 3\nvariants = [\"5bit-128g\"]\n",
            "line 2: variant: expected 2, 3, 4 or 8 bits, found `5bit-128g`",
        ),
        ("samples = \"many\"\n", "line 1: invalid type: string \"many\", expected usize"),
        ("samples = \n", "line 1: string values must be quoted, expected literal string"),
    ] {
        let error = format!("error: `[LAB]/plan.toml` is not the TOML expected here: {problem}");
        refused(&lab, &["--plan", &plan(text)], &error);
    }
    refused(
        &lab,
        &["--plan", &text_of(&lab.path("none.toml"))],
        "error: cannot read `[LAB]/none.toml`: No such file or directory (os error 2)",
    );
    refused(
        &lab,
        &["--plan", &plan("samples = 0\n"), "--samples", "0"],
        "error: samples: expected at least 1, found `0`",
    );
}

#[test]
fn values_that_make_no_sense() {
    let lab = Lab::new();
    for (flags, error) in [
        (["--damp", "1.5"], "damp: expected a fraction from 0 to 1, found `1.5`"),
        (["--damp", "nan"], "damp: expected a fraction from 0 to 1, found `NaN`"),
        (["--damp=-0.1", "-q"], "damp: expected a fraction from 0 to 1, found `-0.1`"),
        (["--samples", "0"], "samples: expected at least 1, found `0`"),
        (["--seq-len", "1"], "seq-len: expected at least 2, found `1`"),
        (
            ["--max-shard-size", "10"],
            "invalid value '10' for '--max-shard-size <SIZE>': 10 bytes are too few for anything here; did you mean \
             10GB?\n\nFor more information, try '--help'.",
        ),
        (["--device", "tpu"], "device `tpu` cannot be used: expected auto, cpu, cuda or cuda:N"),
    ] {
        refused(&lab, &flags, &format!("error: {error}"));
    }
    refused(
        &lab,
        &["--variant", "4bit-32g", "--variant", "8bit-32g", "--variant", "4bit-32g"],
        "error: variants: expected each variant once, found `4bit-32g twice`",
    );
    refused(
        &lab,
        &["--seq-len", "129", "--variant", "4bit-32g"],
        "error: sequence length 129 is above the model's max_position_embeddings 128\nhint: use --seq-len 128 or less; only a model whose rotary embedding is scaled takes more, with --allow-long-windows",
    );
}

#[test]
fn long_windows_need_a_scaled_rotary_embedding_and_a_word() {
    let lab = Lab::new();
    let text = text_of(&demo("evaluation.parquet"));
    let long = ["--seq-len", "160", "--variant", "4bit-32g"];
    let allowed = [&long[..], &["--allow-long-windows", "--eval", &text, "--eval-windows", "2"]].concat();
    let error = "error: sequence length 160 is above the model's max_position_embeddings 128";
    assert!(lab.quantize(&allowed).stderr.starts_with(error));

    let path = lab.model().join("config.json");
    let mut config = read_json(&path);
    config["rope_scaling"] = json!({"type": "linear", "factor": 2.0});
    write_json(&path, &config);
    assert!(lab.quantize(&long).stderr.starts_with(error));
    lab.quantize(&allowed).succeeds();
    let report = read_json(&lab.out().join("run.json"));
    assert_eq!(
        (&report["plan"]["allow-long-windows"], &report["plan"]["seq-len"]),
        (&true.into(), &160.into())
    );
    assert_eq!(report["evaluations"][0]["seq_len"], 160);
}

#[test]
fn variants_that_do_not_exist() {
    let lab = Lab::new();
    let form = "{bits}bit-{group}g[-act|-static][-asym], e.g. 4bit-32g-act";
    let any_form = format!("{form}, or a GGUF file: q2_k, q3_k_m, q4_0, q4_k_m, q5_k_m, q6_k, q8_0");
    for (variant, expected) in [
        ("5bit-128g", "2, 3, 4 or 8 bits"),
        ("4bit-8g", "a group size of -1 or 16 to 1024"),
        ("4bit-128g-fast", form),
        ("int4", &any_form),
    ] {
        let error = format!(
            "error: invalid value '{variant}' for '--variant <VARIANT>': variant: expected {expected}, found `{variant}`\n\n\
             For more information, try '--help'."
        );
        refused(&lab, &["--variant", variant], &error);
    }
}

#[test]
fn variants_that_do_not_fit_the_model() {
    let lab = Lab::new();
    refused(
        &lab,
        &["--variant", "4bit-32g", "--variant", "4bit-128g"],
        "error: `model.layers.0.self_attn.q_proj`: group size 128 is larger than its 64 input features\n\
         hint: use a group size up to 64, or -1 for one group a row",
    );
    let lab = Lab::with(&Model { intermediate: 100, ..Model::default() });
    let pack = |bits: u32, multiple: usize| {
        format!(
            "error: `model.layers.0.mlp.gate_proj`: out_features 100 is not a multiple of {multiple}, which {bits}-bit \
             packing needs"
        )
    };
    refused(&lab, &["--variant", "3bit-32g"], &pack(3, 32));
    refused(&lab, &["--variant", "4bit-32g"], &pack(4, 8));
    refused(&lab, &["--variant", "2bit-32g"], &pack(2, 16));
    // 8 bits pack by fours, and 100 is 25 of them.
    lab.quantize(&["--variant", "8bit-32g"]).succeeds();
}

#[test]
fn an_output_that_exists() {
    let lab = Lab::new();
    fs::create_dir(lab.out()).unwrap();
    fs::write(lab.out().join("mine.txt"), "keep me").unwrap();
    let error = "error: `[LAB]/out` exists already\nhint: choose another folder, or remove this one";
    lab.quantize(&["--variant", "4bit-32g"]).fails_with(error);
    assert_eq!(fs::read(lab.out().join("mine.txt")).unwrap(), b"keep me");
    fs::remove_dir_all(lab.out()).unwrap();
    fs::write(lab.out(), "a file").unwrap();
    lab.quantize(&["--variant", "4bit-32g"]).fails_with(error);
    assert_eq!(fs::read(lab.out()).unwrap(), b"a file");
}

/// The model is as large as a file can be, and nearly all of it is a hole: only its header is ever read.
#[test]
fn a_disk_that_is_too_small_is_known_before_the_run() {
    let lab = Lab::with(&Model { tied: true, ..Model::default() });
    let (vocab, hidden) = (2_000_000_000_u64, 64 * 50);
    let model = Model { hidden: hidden as usize, tied: true, ..Model::default() };
    let mut config = model.config();
    config["vocab_size"] = vocab.into();
    write_json(&lab.model().join("config.json"), &config);
    let mut header = serde_json::Map::new();
    let mut end = 0;
    let shapes = model.shapes();
    for (name, mut shape) in shapes {
        if name == "model.embed_tokens.weight" {
            shape[0] = vocab as usize;
        }
        let start = end;
        end += 2 * shape.iter().map(|&size| size as u64).product::<u64>();
        header.insert(name, json!({ "dtype": "F16", "shape": shape, "data_offsets": [start, end] }));
    }
    let header = serde_json::Value::Object(header).to_string();
    let path = lab.model().join("model.safetensors");
    fs::write(&path, [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(8 + header.len() as u64 + end).unwrap();

    let Output { code, stdout, stderr, .. } = lab.quantize(&["--variant", "4bit-32g"]);
    let (before, after) = stderr.split_once(" free").unwrap_or_else(|| panic!("{stderr}"));
    assert!(before.starts_with("error: `[LAB]` has "), "{stderr}");
    let expected =
        ", and the result needs 12800.05 GB\nhint: free some space or choose a folder on another disk\n";
    assert_eq!((after, stdout.as_str(), code), (expected, "", Some(2)));
    assert!(!lab.out().exists());
}

/// Files must not grow beyond a limit, which to the program is a disk that fills up while it writes.
#[test]
fn a_disk_that_fills_up_during_the_run() {
    // Weights fit below the limit, the tokenizer (196 kB), which is written last, does not.
    let lab = Lab::with(&Model { hidden: 16, intermediate: 32, tied: true, ..Model::default() });
    let run = |kilobytes: u32| {
        let args = lab.quantize_args(&["--variant", "4bit--1g", "--variant", "8bit--1g"]);
        let script = format!("trap '' XFSZ; ulimit -f {kilobytes}; exec \"$@\"");
        let mut bash = std::process::Command::new("bash");
        bash.args(["-c", &script, "bash", env!("CARGO_BIN_EXE_gptq")]).args(args);
        lab.read(&bash.env("HF_HOME", lab.path("hf-home")).output().unwrap())
    };
    for (kilobytes, file) in [(100, "model.safetensors"), (180, "tokenizer.json")] {
        let output = run(kilobytes);
        let expected = format!(
            "error: cannot write `[LAB]/out/.gptq-4bit--1g-actorder_False.partial/{file}`: File too large (os error 27)"
        );
        assert_eq!((output.stderr.lines().last(), output.code), (Some(expected.as_str()), Some(2)));
        // All layers were finished before the tokenizer came; nothing was before the weights had their room.
        assert_eq!(
            lab.out().exists(),
            file == "tokenizer.json",
            "what can be gone on with, and only that, is left"
        );
    }
}

#[test]
fn texts_that_are_not_there() {
    let lab = Lab::new();
    refused(
        &lab,
        &["--dataset", "wikitext", "--variant", "4bit-32g"],
        "error: dataset `wikitext` is neither a recipe (wikitext2, wikitext2-test, c4, ultrachat, smoltalk) nor a file or folder",
    );
    refused(
        &lab,
        &["--dataset", "wikitext2", "--variant", "4bit-32g"],
        "error: the files of dataset `wikitext2` are not on this machine: looked for \
         `wikitext-2-raw-v1/train-00000-of-00001.parquet` in `[LAB]/hf-home/hub`\n\
         hint: hf download Salesforce/wikitext wikitext-2-raw-v1/train-00000-of-00001.parquet --repo-type dataset \
         --revision b08601e04326c79dfdd32d625aee71d232d685c3",
    );
    let elsewhere = text_of(&lab.path("data"));
    refused(
        &lab,
        &["--dataset", "c4", "--dataset-dir", &elsewhere, "--variant", "4bit-32g"],
        "error: the files of dataset `c4` are not on this machine: looked for `en/c4-train.00000-of-01024.json.gz` in \
         `[LAB]/data`, `[LAB]/hf-home/hub`\n\
         hint: hf download allenai/c4 en/c4-train.00000-of-01024.json.gz --repo-type dataset \
         --revision 1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
    );
}

#[test]
fn texts_that_hold_too_little() {
    let lab = Lab::new();
    let refuse = |name: &str, text: &str, error: &str| {
        let path = lab.write(name, text);
        refused(&lab, &["--dataset", &path, "--variant", "4bit-32g"], error);
    };
    refuse(
        "short.txt",
        "one two three",
        "error: short.txt has 4 tokens; the windows (4 of 64 tokens) need at least 64\nhint: use fewer or shorter windows, or more text",
    );
    refuse("empty.txt", " \n", "error: `empty.txt`: it holds no text");
    refuse(
        "empty.jsonl",
        "{\"text\": \"\"}\n{\"text\": \" \"}\n",
        "error: column `text` of empty.jsonl holds no text in any of its 2 rows",
    );
    refuse(
        "rows.jsonl",
        "{\"text\": \"a\"}\n{\"text\": 3}\n",
        "error: `[LAB]/rows.jsonl`: line 2: `text` is a number, not a text or messages",
    );
    refuse(
        "rows.jsonl",
        "{\"text\": \"a\"}\n{\"body\": \"b\"}\n",
        "error: `[LAB]/rows.jsonl`: line 2 has no `text` (keys: body)",
    );
    refuse(
        "table.csv",
        "text\na\n",
        "error: `[LAB]/table.csv`: its name must end in .parquet, .txt, .jsonl, .json or .toml; .txt, .jsonl and .json may be packed as .gz or .zst",
    );
}

#[test]
fn columns_that_are_not_there() {
    let lab = Lab::new();
    refused(
        &lab,
        &["--text-column", "body", "--variant", "4bit-32g"],
        "error: `[REPO]/calibration/demo/evaluation.parquet` has no text column `body` (columns: text)\n\
         hint: name the column with --text-column",
    );
    let path = lab.path("damaged.parquet");
    let bytes = fs::read(demo("evaluation.parquet")).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    refused(
        &lab,
        &["--dataset", &text_of(&path), "--variant", "4bit-32g"],
        "error: `[LAB]/damaged.parquet`: it cannot be read as parquet: Parquet error: Invalid Parquet file. Corrupt footer",
    );
}

/// Text to evaluate on is looked at before the run, not after it.
#[test]
fn evaluation_that_cannot_work_is_known_before_the_run() {
    let lab = Lab::new();
    let short = lab.write("short.txt", "one two three");
    refused(
        &lab,
        &["--eval", &short, "--variant", "4bit-32g"],
        "error: short.txt has 4 tokens; the windows (1 of 64 tokens) need at least 64\nhint: use fewer or shorter windows, or more text",
    );
    refused(
        &lab,
        &["--eval", "nothing.parquet", "--variant", "4bit-32g"],
        "error: dataset `nothing.parquet` is neither a recipe (wikitext2, wikitext2-test, c4, ultrachat, smoltalk) nor a file or folder",
    );
}
