//! Every malformed checkpoint: the error names the thing, what was expected and what was found; exit code 2; nothing is
//! left behind.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
};

use safetensors::Dtype;

use crate::{
    helpers::{Lab, Q, entries, read_json, text_of, write_json},
    safetensors_file::{self, Tensor, Tensors},
    tiny_model::Model,
};

const VARIANT: [&str; 2] = ["--variant", "4bit-32g"];

/// Requires that quantizing the lab's model fails with `error` before the first layer is done, and leaves nothing.
#[track_caller]
fn refused(lab: &Lab, error: &str) {
    lab.quantize(&[&VARIANT[..], &["--quiet"]].concat()).fails_with(error);
    assert!(!lab.out().exists(), "something was left in --out");
}

/// The same for what is found only when a later layer is read or computed: what was finished before can be gone on with.
#[track_caller]
fn stopped(lab: &Lab, error: &str) {
    lab.quantize(&[&VARIANT[..], &["--quiet"]].concat()).fails_with(error);
    assert!(entries(&lab.out()).iter().all(|name| name.ends_with(".partial")), "{:?}", entries(&lab.out()));
}

/// How an error ends that a file's numbers are to blame for.
const BROKEN: &str =
    "are NaN or infinite\nhint: the file contains them: download it again, or use another copy";

/// The tiny model in three shards.
fn sharded() -> Lab {
    let lab = Lab::empty();
    Model::default().write_sharded(&lab.model());
    lab
}

/// The tiny model with changed tensors.
fn changed(model: &Model, change: impl FnOnce(&mut Tensors)) -> Lab {
    let lab = Lab::with(model);
    safetensors_file::change(&lab.model(), change);
    lab
}

/// The tiny model with one key of its config changed.
fn configured(key: &str, value: impl Into<serde_json::Value>) -> Lab {
    let lab = Lab::new();
    let path = lab.model().join("config.json");
    let mut config = read_json(&path);
    config[key] = value.into();
    write_json(&path, &config);
    lab
}

fn write_at(path: &Path, offset: u64, bytes: &[u8]) {
    File::options().write(true).open(path).unwrap().write_all_at(bytes, offset).unwrap();
}

#[test]
fn a_missing_shard() {
    let lab = sharded();
    fs::remove_file(lab.model().join("model-00002-of-00003.safetensors")).unwrap();
    refused(
        &lab,
        "error: `[LAB]/model/model.safetensors.index.json` says tensor `model.embed_tokens.weight` is in \
         `model-00002-of-00003.safetensors`, but there is no such file\nhint: download the file again",
    );
}

#[test]
fn a_shard_that_is_cut_short() {
    let lab = sharded();
    let path = lab.model().join("model-00003-of-00003.safetensors");
    let bytes = fs::read(&path).unwrap();
    for (left, problem) in [
        (
            bytes.len() - 10,
            "tensor `model.norm.weight` ends at byte 49536 of the data, and the file holds 49526; the file is cut short",
        ),
        (100, "it says its header has 704 bytes, and only 92 follow; the file is cut short"),
        (0, "it has 0 bytes, and the header's length alone takes 8"),
    ] {
        fs::write(&path, &bytes[..left]).unwrap();
        refused(
            &lab,
            &format!(
                "error: `[LAB]/model/model-00003-of-00003.safetensors` is not a whole safetensors file: {problem}\n\
                 hint: download the file again"
            ),
        );
    }
}

#[test]
fn a_clone_without_git_lfs() {
    for name in ["model.safetensors", "tokenizer.json"] {
        let lab = Lab::new();
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
        fs::write(lab.model().join(name), pointer).unwrap();
        refused(
            &lab,
            &format!(
                "error: `[LAB]/model/{name}` is a pointer of git-lfs, not the file itself: this clone was made without its \
                 large files\nhint: fetch the files: git -C '[LAB]/model' lfs pull (`git lfs install` once before)"
            ),
        );
    }
}

#[test]
fn an_index_that_points_nowhere() {
    let lab = sharded();
    let path = lab.model().join("model.safetensors.index.json");
    let good = read_json(&path);
    let point = |shard: &str| {
        let mut index = good.clone();
        index["weight_map"]["lm_head.weight"] = shard.into();
        write_json(&path, &index);
    };
    let says = |shard: &str, problem: &str| {
        format!(
            "error: `[LAB]/model/model.safetensors.index.json` says tensor `lm_head.weight` is in `{shard}`, but {problem}\n\
             hint: download the file again"
        )
    };
    for (shard, problem) in [
        ("model-00002-of-00003.safetensors", "that file does not hold it"),
        ("model-00004-of-00003.safetensors", "there is no such file"),
        ("../model-00001-of-00003.safetensors", "that is not a plain file name"),
    ] {
        point(shard);
        refused(&lab, &says(shard, problem));
    }
}

#[test]
fn a_header_that_lies() {
    let lab = Lab::new();
    let path = lab.model().join("model.safetensors");
    let good = fs::read(&path).unwrap();
    let header = String::from_utf8_lossy(&good[8..4096]).into_owned();
    let replaced = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = header.find(from).unwrap_or_else(|| panic!("no {from} in {header}"));
        write_at(&path, 8 + at as u64, to.as_bytes());
    };
    let found = |problem: &str| {
        refused(
            &lab,
            &format!(
                "error: `[LAB]/model/model.safetensors` is not a whole safetensors file: {problem}\n\
                 hint: download the file again"
            ),
        );
        fs::write(&path, &good).unwrap();
    };
    replaced("[4096,64]", "[4095,64]");
    found(
        "tensor `lm_head.weight`: shape [4095, 64] of F16 takes 524160 bytes, and its offsets 0..524288 hold 524288",
    );
    write_at(&path, 0, &u64::MAX.to_le_bytes());
    found("it says its header has 18446744073709551615 bytes; at most 100000000 are allowed");
    write_at(&path, 8, b"[");
    found(
        "its header is not the JSON expected: invalid type: sequence, expected struct HashMetadata at line 1 column 0",
    );
}

#[test]
fn numbers_that_are_none() {
    for value in [f32::NAN, f32::INFINITY] {
        let lab = changed(&Model::default(), |tensors| {
            tensors.get_mut("model.layers.1.mlp.down_proj.weight").unwrap().fill([17, 4711], value);
        });
        stopped(
            &lab,
            &format!("error: tensor `model.layers.1.mlp.down_proj.weight`: 2 of 8192 values {BROKEN}"),
        );
    }
    for (name, total) in
        [("lm_head.weight", 262_144), ("model.norm.weight", 64), ("model.embed_tokens.weight", 262_144)]
    {
        // Calibration looks at none of these: the last row of the embedding is of a token that the text does not hold.
        let lab = changed(&Model::default(), |tensors| {
            let tensor = tensors.get_mut(name).unwrap();
            let last = tensor.len() - 1;
            tensor.fill([last], f32::NAN);
        });
        refused(&lab, &format!("error: tensor `{name}`: 1 of {total} values {BROKEN}"));
    }
}

#[test]
fn numbers_that_fp16_cannot_hold() {
    let single = Model { dtype: Dtype::F32, ..Model::default() };
    let lab = changed(&single, |tensors| tensors.get_mut("lm_head.weight").unwrap().fill([3], 70_000.0));
    refused(
        &lab,
        "error: tensor `lm_head.weight`, element 3 (first of 1): value 70000 does not fit fp16 (largest 65504)",
    );
    let biased = Model { biases: true, ..single.clone() };
    let bias = "model.layers.1.mlp.down_proj.bias";
    let lab = changed(&biased, |tensors| tensors.get_mut(bias).unwrap().fill([63], -1e5));
    let found = format!(
        "error: tensor `{bias}`, element 63 (first of 1): value -100000 does not fit fp16 (largest 65504)"
    );
    refused(&lab, &found);
    let lab = changed(&single, |tensors| tensors.get_mut(&format!("{Q}.weight")).unwrap().fill([65], 1e7));
    let found = format!(
        "error: tensor `{Q}.weight`, element 65 (first of 1): value 10000000 does not fit fp16 (largest 65504)"
    );
    refused(&lab, &found);
}

/// Every weight is a good fp16 number; their products are beyond fp32.
#[test]
fn activations_that_overflow() {
    let lab = changed(&Model::default(), |tensors| {
        tensors.get_mut("model.layers.1.post_attention_layernorm.weight").unwrap().fill(0..64, 60_000.0);
        for name in ["gate_proj", "up_proj"] {
            tensors
                .get_mut(&format!("model.layers.1.mlp.{name}.weight"))
                .unwrap()
                .fill(0..64 * 128, 60_000.0);
        }
    });
    stopped(
        &lab,
        "error: inputs of layer 1, down: 128 of 128 values are NaN or infinite\nhint: the model itself produces them: check \
         the weights of the layers before, or use --compute-dtype fp32",
    );
}

#[test]
fn inputs_that_carry_nothing() {
    let lab = changed(&Model::default(), |tensors| {
        tensors.get_mut("model.layers.0.input_layernorm.weight").unwrap().fill(0..64, 0.0);
    });
    let flags = [&VARIANT[..], &["--on-failure", "rtn"]].concat();
    refused(
        &lab,
        "error: the Hessian of layer 0, q/k/v is zero: all its inputs were zero\nhint: look for a norm or a linear \
         before it whose weights are all zero; --on-failure rtn rounds such linears to nearest",
    );

    // Asked for, and said everywhere.
    let output = lab.quantize(&flags).succeeds();
    assert!(output.stdout.contains("Rounded to nearest, as they could not be solved:"), "{}", output.stdout);
    assert!(
        output.stdout.contains("; 4 linears could not be solved and were rounded to nearest"),
        "{}",
        output.stdout
    );
    let named = "warning: model.layers.0.self_attn.q_proj, 4bit-32g: rounded to nearest: the Hessian of layer 0, q/k/v";
    assert!(output.stderr.contains(named), "{}", output.stderr);
    let report = read_json(&lab.out().join("run.json"));
    let linears = report["branches"][0]["linears"].as_array().unwrap();
    let rounded: Vec<_> = linears.iter().filter(|l| !l["fallback"].is_null()).map(|l| &l["name"]).collect();
    let expected =
        ["q_proj", "k_proj", "v_proj", "o_proj"].map(|name| format!("model.layers.0.self_attn.{name}"));
    assert_eq!(rounded, expected.each_ref().map(|name| name.as_str()));
    assert!(
        report["warnings"][0].as_str().unwrap().contains("4 linears were rounded to nearest, not solved")
    );
    lab.verify(&lab.branch(), &[]).succeeds();
}

#[test]
fn a_dtype_that_is_not_read() {
    for (dtype, name, width) in [(Dtype::I32, "I32", 4), (Dtype::F64, "F64", 8)] {
        let lab = changed(&Model::default(), |tensors| {
            let tensor = Tensor { dtype, shape: vec![64, 64], bytes: vec![0; 64 * 64 * width] };
            tensors.insert(format!("{Q}.weight"), tensor);
        });
        refused(&lab, &format!("error: tensor `{Q}.weight`: expected dtype F16, BF16 or F32, found {name}"));
    }
}

#[test]
fn tensors_that_the_config_does_not_expect() {
    let lab = changed(&Model::default(), |tensors| {
        tensors.get_mut("model.layers.1.mlp.down_proj.weight").unwrap().shape = vec![128, 64];
    });
    refused(
        &lab,
        "error: tensor `model.layers.1.mlp.down_proj.weight`: expected shape [64, 128], found [128, 64]",
    );
    let lab =
        changed(&Model::default(), |tensors| drop(tensors.remove("model.layers.1.input_layernorm.weight")));
    refused(&lab, "error: tensor `model.layers.1.input_layernorm.weight` is missing from `[LAB]/model`");
    refused(
        &configured("attention_bias", true),
        "error: tensor `model.layers.0.self_attn.q_proj.bias` is missing from `[LAB]/model`",
    );
}

/// They were left out with a warning once, and the branches were of another model.
#[test]
fn biases_that_the_config_does_not_announce() {
    let with = |value: f32| {
        changed(&Model::default(), |tensors| {
            let mut bias = tensors["model.norm.weight"].clone();
            bias.fill(0..64, value);
            tensors.insert("model.layers.1.self_attn.o_proj.bias".into(), bias);
        })
    };
    refused(
        &with(0.5),
        "error: tensor `model.layers.1.self_attn.o_proj.bias` of `[LAB]/model` is not zero, and the config does not describe \
         it: the model would compute other results\n\
         hint: if the model has biases, say so in `[LAB]/model/config.json`: `attention_bias` or `mlp_bias` (or the key of its \
         family)",
    );
    with(0.0).quantize(&["--variant", "4bit-32g", "--quiet"]).succeeds();
}

/// `eval`, `generate` and `inspect` were silent about them: in a dense folder, and in a packed one, where zeros are usual.
#[test]
fn undeclared_biases_are_named_by_every_command() {
    let dense = Lab::new();
    let packed = Lab::with_branch("4bit-32g");
    for (lab, dir) in [(&dense, dense.model()), (&packed, packed.branch())] {
        let dir_text = text_of(&dir);
        let text = text_of(&crate::helpers::demo("evaluation.parquet"));
        let model = text_of(&lab.model());
        let eval = ["eval", "--model", &model, "--quantized", &dir_text, "--dataset", &text];
        let eval = [&eval[..], &["--seq-len", "64", "--windows", "1"]].concat();
        let generate = ["generate", &dir_text, "--prompt", "The", "--max-tokens", "1"];
        let with = |value: f32| {
            safetensors_file::change(&dir, |tensors| {
                let mut bias = tensors["model.norm.weight"].clone();
                bias.fill(0..64, value);
                tensors.insert(format!("{Q}.bias"), bias);
            });
        };
        with(0.0);
        lab.run(&generate).succeeds();
        with(0.5);
        let problem = format!("tensor `{Q}.bias` of `");
        for args in [&eval[..], &generate] {
            let output = lab.run(args);
            assert!(output.stderr.contains(&problem) && output.code == Some(2), "{args:?} {output:?}");
        }
        let inspected = lab.run(&["inspect", &dir_text]).succeeds().stdout;
        assert!(inspected.contains(&problem) && inspected.contains("is not zero"), "{inspected}");
    }
    let found = packed.verify(&packed.branch(), &[]);
    assert!(found.code == Some(1) && found.stdout.contains(&format!("{Q}.bias")), "{found:?}");
}

#[test]
fn configs_that_make_no_model() {
    refused(
        &configured("architectures", serde_json::json!(["GPTNeoXForCausalLM"])),
        &format!(
            "error: `[LAB]/model/config.json` holds architecture `GPTNeoXForCausalLM`, which is not supported \
             (supported: {})",
            gptq::architectures::supported_classes().collect::<Vec<_>>().join(", ")
        ),
    );
    refused(
        &configured("num_key_value_heads", 3),
        "error: `[LAB]/model/config.json`: key `num_key_value_heads`: expected a divisor of num_attention_heads 2, found 3",
    );
    refused(
        &configured("hidden_size", "64"),
        "error: `[LAB]/model/config.json`: key `hidden_size`: expected an integer from 1 to 2147483647, found \"64\"",
    );
    refused(
        &configured("rope_scaling", serde_json::json!({"type": "magic", "factor": 2.0})),
        "error: `[LAB]/model/config.json`: key `rope_scaling.type`: expected `default`, `linear`, `dynamic`, \
         `llama3`, `yarn` or `longrope`, found `magic`",
    );
    let lab = Lab::new();
    fs::write(lab.model().join("config.json"), "{").unwrap();
    refused(
        &lab,
        "error: `[LAB]/model/config.json` is not the JSON expected here: EOF while parsing an object at line 1 column 1",
    );
}

#[test]
fn a_vocabulary_smaller_than_the_tokenizers() {
    let lab = changed(&Model::default(), |tensors| {
        for name in ["lm_head.weight", "model.embed_tokens.weight"] {
            let tensor = tensors.get_mut(name).unwrap();
            tensor.shape[0] = 1000;
            tensor.bytes.truncate(1000 * 64 * 2);
        }
    });
    let path = lab.model().join("config.json");
    let mut config = read_json(&path);
    config["vocab_size"] = 1000.into();
    write_json(&path, &config);
    refused(&lab, "error: evaluation.parquet: token id 1004 at position 1 is outside the vocabulary of 1000");
}

#[test]
fn folders_that_are_not_checkpoints() {
    let lab = Lab::empty();
    refused(
        &lab,
        "error: model: expected a folder or file that exists, or OWNER/NAME on the Hub, found `[LAB]/model`",
    );
    fs::create_dir(lab.model()).unwrap();
    refused(&lab, "error: `[LAB]/model` is not a checkpoint folder: it has no `config.json`");

    let lab = Lab::new();
    fs::remove_file(lab.model().join("model.safetensors")).unwrap();
    refused(
        &lab,
        "error: `[LAB]/model` is not a checkpoint folder: it has no weights (`model.safetensors` or any other safetensors file, such as \
         `gptq_model-4bit-128g.safetensors`; an index of shards; `pytorch_model.bin`)",
    );
    fs::write(lab.model().join("tf_model.h5"), "PK").unwrap();
    refused(
        &lab,
        "error: `[LAB]/model` has only `tf_model.h5`; expected safetensors or `pytorch_model.bin`\n\
         hint: convert it: python -c \"from transformers import AutoModelForCausalLM as M; \
         M.from_pretrained('[LAB]/model', from_tf=True).save_pretrained('[LAB]/model-safetensors')\" (transformers 4 with \
         TensorFlow)",
    );
    fs::write(lab.model().join("llama-4bit.pt"), "PK").unwrap();
    refused(
        &lab,
        "error: `[LAB]/model` has only `llama-4bit.pt`; expected safetensors or `pytorch_model.bin`\n\
         hint: convert it: python -c \"import torch; from safetensors.torch import save_file; \
         d = torch.load('[LAB]/model/llama-4bit.pt', map_location='cpu', weights_only=True); \
         save_file({k: v.contiguous().clone() for k, v in d.items()}, '[LAB]/model/model.safetensors')\"",
    );

    let lab = Lab::new();
    fs::remove_file(lab.model().join("tokenizer.json")).unwrap();
    fs::write(lab.model().join("tokenizer.model"), "").unwrap();
    refused(
        &lab,
        "error: `[LAB]/model/tokenizer.model` cannot be used, and there is no `tokenizer.json`: it is not a SentencePiece \
         model: it has no pieces\n\
         hint: convert it: python -c \"from transformers import AutoTokenizer as T; \
         T.from_pretrained('[LAB]/model').save_pretrained('[LAB]/model')\"",
    );
    fs::remove_file(lab.model().join("tokenizer.model")).unwrap();
    refused(&lab, "error: `[LAB]/model` is not a checkpoint folder: it has no `tokenizer.json`");
}

#[test]
fn a_model_that_is_quantized_already() {
    let lab = Lab::with_branch("4bit-32g");
    let (branch, out) = (text_of(&lab.branch()), text_of(&lab.path("again")));
    let again = |lab: &Lab| lab.quantize(&["--model", &branch, "--out", &out, "--variant", "4bit-32g"]);
    again(&lab).fails_with(
        "error: `[LAB]/out/gptq-4bit-32g-actorder_False`: expected an unquantized fp16, bf16 or fp32 model, found a quantized \
         one (quant_method `gptq` in `config.json`)\nhint: name the unquantized model that it was made from",
    );
    // Also when only the old config file says so.
    let path = lab.branch().join("config.json");
    let mut config = read_json(&path);
    config.as_object_mut().unwrap().remove("quantization_config");
    write_json(&path, &config);
    again(&lab).fails_with(
        "error: `[LAB]/out/gptq-4bit-32g-actorder_False`: expected an unquantized fp16, bf16 or fp32 model, found a quantized \
         one (tensor `model.layers.0.mlp.down_proj.qweight`)\nhint: name the unquantized model that it was made from",
    );
    assert!(!lab.path("again").exists());
}
