//! Checkpoints as other tools write them: each is a made branch in another tool's form, and means the same to the last
//! digit.

use std::{
    fs,
    path::{Path, PathBuf},
};

use safetensors::Dtype;
use serde_json::Value;

use crate::{
    helpers::{DOWN, Lab, copy, demo, read_json, text_of, write_json},
    safetensors_file::{self, Tensor, Tensors},
};

/// Copies the lab's only branch to `name`, without its checksums, and changes the copy.
fn rewritten(lab: &Lab, name: &str, change: impl FnOnce(&Path)) -> PathBuf {
    let dir = lab.path(name);
    copy(&lab.branch(), &dir);
    fs::remove_file(dir.join("checksums.json")).unwrap();
    change(&dir);
    dir
}

/// Changes `config.json`'s `quantization_config`.
fn change_quantization(dir: &Path, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let path = dir.join("config.json");
    let mut config = read_json(&path);
    change(config["quantization_config"].as_object_mut().unwrap());
    write_json(&path, &config);
}

/// A 1 in each of a word's `bits`-bit fields.
fn ones(bits: u32) -> i32 {
    (u32::MAX / ((1 << bits) - 1)) as i32
}

/// Zero points as they are, not less 1, which is how GPTQModel holds them and says so.
fn as_gptq_v2(dir: &Path, bits: u32) {
    safetensors_file::change(dir, |tensors| {
        for (_, zeros) in tensors.iter_mut().filter(|(name, _)| name.ends_with(".qzeros")) {
            zeros.change_words(|words| {
                words.iter_mut().for_each(|word| *word = word.wrapping_add(ones(bits)))
            });
        }
    });
    change_quantization(dir, |quantization| {
        quantization.insert("checkpoint_format".into(), "gptq_v2".into());
    });
}

/// The perplexities of `dirs`, all from one evaluation.
fn perplexities(lab: &Lab, dirs: &[&Path]) -> Vec<f64> {
    let evaluation = lab.eval(dirs);
    let models = evaluation["models"].as_array().unwrap();
    models.iter().map(|model| model["perplexity"]["value"].as_f64().unwrap()).collect()
}

#[test]
fn gptq_v2_files_of_every_width_and_grid() {
    for variant in ["4bit-32g-act-asym", "8bit-32g", "2bit-32g-asym"] {
        let lab = Lab::with_branch(variant);
        let bits = variant[..1].parse().unwrap();
        let v2 = rewritten(&lab, "v2", |dir| as_gptq_v2(dir, bits));
        // The same zero points taken for v1 are another model.
        let misread = rewritten(&lab, "misread", |dir| {
            as_gptq_v2(dir, bits);
            change_quantization(dir, |quantization| {
                quantization.remove("checkpoint_format");
            });
        });
        let found = perplexities(&lab, &[&lab.branch(), &v2, &misread]);
        assert_eq!(found[0], found[1], "{variant}");
        // With eight bits, zero points one off change little: signed scales err both ways.
        assert!((found[0] - found[2]).abs() > 2e-5 * found[0], "{variant}: {found:?}");
        lab.verify(&v2, &["--against", &text_of(&lab.model())]).succeeds();
    }
}

#[test]
fn files_of_autogptq_in_every_era() {
    let lab = Lab::with_branch("4bit-32g");
    let without_g_idx = rewritten(&lab, "without-g_idx", |dir| {
        safetensors_file::change(dir, |tensors| tensors.retain(|name, _| !name.ends_with(".g_idx")));
    });
    let with_zero_biases = rewritten(&lab, "with-zero-biases", |dir| {
        safetensors_file::change(dir, add_zero_biases);
    });
    let freely_named = rewritten(&lab, "freely-named", |dir| {
        fs::rename(dir.join("model.safetensors"), dir.join("gptq_model-4bit-32g.safetensors")).unwrap();
    });
    let old_config_only = rewritten(&lab, "old-config-only", |dir| {
        let mut config = read_json(&dir.join("config.json"));
        config.as_object_mut().unwrap().remove("quantization_config");
        write_json(&dir.join("config.json"), &config);
    });
    let new_config_only = rewritten(&lab, "new-config-only", |dir| {
        fs::remove_file(dir.join("quantize_config.json")).unwrap();
        change_quantization(dir, |quantization| {
            quantization
                .retain(|key, _| ["bits", "group_size", "desc_act", "quant_method"].contains(&key.as_str()));
        });
    });
    let everything_at_once = rewritten(&lab, "everything", |dir| {
        safetensors_file::change(dir, |tensors| {
            tensors.retain(|name, _| !name.ends_with(".g_idx"));
            add_zero_biases(tensors);
            let frequencies = Tensor::floats(Dtype::F32, &[16], &[0.5; 16]);
            tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), frequencies);
        });
        fs::rename(dir.join("model.safetensors"), dir.join("llama-4bit.safetensors")).unwrap();
    });
    let made =
        [without_g_idx, with_zero_biases, freely_named, old_config_only, new_config_only, everything_at_once];
    let branch = lab.branch();
    let all: Vec<&Path> =
        std::iter::once(branch.as_path()).chain(made.iter().map(|dir| dir.as_path())).collect();
    let found = perplexities(&lab, &all);
    for (dir, perplexity) in all.iter().zip(&found) {
        assert_eq!(*perplexity, found[0], "{}", dir.display());
        lab.verify(dir, &["--against", &text_of(&lab.model())]).succeeds();
    }
}

fn add_zero_biases(tensors: &mut Tensors) {
    let linears: Vec<(String, usize)> = tensors
        .iter()
        .filter_map(|(name, t)| Some((name.strip_suffix(".qweight")?.to_owned(), t.shape[1])))
        .collect();
    assert_eq!(linears.len(), 14);
    for (linear, n) in linears {
        tensors.insert(format!("{linear}.bias"), Tensor::floats(Dtype::F16, &[n], &vec![0.0; n]));
    }
}

#[test]
fn folders_without_a_config_and_with_other_labels_mean_the_same() {
    for variant in ["4bit-32g-act", "3bit-32g-asym"] {
        let lab = Lab::with_branch(variant);
        let without_configs = |dir: &Path| {
            fs::remove_file(dir.join("quantize_config.json")).unwrap();
            let mut config = read_json(&dir.join("config.json"));
            let settings = config.as_object_mut().unwrap().remove("quantization_config").unwrap();
            write_json(&dir.join("config.json"), &config);
            settings
        };
        let bare = rewritten(&lab, "bare", |dir| {
            without_configs(dir);
        });
        let of_optimum = rewritten(&lab, "of-optimum", |dir| {
            let settings = without_configs(dir);
            write_json(&dir.join("quantization_config.json"), &settings);
        });
        let of_auto_round = rewritten(&lab, "of-auto-round", |dir| {
            fs::remove_file(dir.join("quantize_config.json")).unwrap();
            change_quantization(dir, |quantization| {
                quantization.insert("quant_method".into(), "auto-round".into());
                quantization.insert("packing_format".into(), "auto_round:auto_gptq".into());
            });
        });
        let branch = lab.branch();
        let found = perplexities(&lab, &[&branch, &bare, &of_optimum, &of_auto_round]);
        assert!(found.iter().all(|perplexity| *perplexity == found[0]), "{variant}: {found:?}");
        for (dir, said) in [
            (&bare, format!("{} bits (shape of qweight), group size 32 (shape of scales)", &variant[..1])),
            (&of_optimum, "was read from `quantization_config.json`".into()),
            (&of_auto_round, "`quant_method` is `auto-round`".into()),
        ] {
            let verified = lab.verify(dir, &["--against", &text_of(&lab.model())]).succeeds();
            assert!(verified.stdout.contains(&said), "{}", verified.stdout);
            let inspected = lab.run(&["inspect", &text_of(dir)]).succeeds();
            assert!(inspected.stdout.contains(&said), "{}", inspected.stdout);
        }
    }
}

#[test]
fn zero_points_of_the_other_format_are_named_once() {
    let lab = Lab::with_branch("4bit-32g");
    let misread = rewritten(&lab, "misread", |dir| {
        as_gptq_v2(dir, 4);
        change_quantization(dir, |quantization| {
            quantization.remove("checkpoint_format");
        });
    });
    let cause = "the zero points of 14 of 14 linears (first: model.layers.0.self_attn.q_proj) are stored as 8; `gptq` stores \
                 the zero point 8 of a symmetric grid as 7. They are stored like `gptq_v2`, ";
    let verified = lab.verify(&misread, &[]);
    assert!(verified.stdout.starts_with(&format!("qzeros: {cause}")), "{}", verified.stdout);
    assert_eq!((verified.stdout.lines().last(), verified.code), (Some("failed: 1 finding"), Some(1)));

    let (model, text) = (text_of(&lab.model()), text_of(&demo("evaluation.parquet")));
    let dir = text_of(&misread);
    let eval = ["eval", "--model", &model, "--quantized", &dir, "--dataset", &text, "--windows", "1"];
    let eval = [&eval[..], &["--seq-len", "64", "--seq-len", "32"]].concat();
    let generate = ["generate", &dir, "--prompt", "The old", "--max-tokens", "1"];
    let report = ["report", "--quantized", &dir];
    for args in [&eval[..], &generate, &report] {
        let output = lab.run(args).succeeds();
        assert_eq!(output.stderr.matches(cause).count(), 1, "{}", output.stderr);
    }
    // As the warning says.
    change_quantization(&misread, |quantization| {
        quantization.insert("checkpoint_format".into(), "gptq_v2".into());
    });
    lab.verify(&misread, &["--against", &model]).succeeds();
}

#[test]
fn a_linear_left_dense_is_read_as_it_is() {
    let lab = Lab::with_branch("4bit-32g");
    let source = safetensors_file::read_folder(&lab.model());
    let mixed = rewritten(&lab, "mixed", |dir| {
        safetensors_file::change(dir, |tensors| {
            tensors.retain(|name, _| !name.starts_with(DOWN));
            let weight = format!("{DOWN}.weight");
            tensors.insert(weight.clone(), source[&weight].clone());
        });
        change_quantization(dir, |quantization| {
            quantization
                .insert("dynamic".into(), serde_json::json!({ "-:model.layers.1.mlp.down_proj": {} }));
        });
    });
    lab.verify(&mixed, &[]).succeeds();
    let evaluation = lab.eval(&[&lab.branch(), &mixed]);
    let [whole, mixed] = [0, 1].map(|i| evaluation["models"][i]["kl_divergence"]["value"].as_f64().unwrap());
    assert!(mixed < whole, "{mixed} and {whole}");
}

#[test]
fn formats_that_mean_something_else_are_refused() {
    let lab = Lab::with_branch("4bit-32g");
    let cases = [
        ("checkpoint_format", Value::from("marlin"), "expected `gptq` or `gptq_v2`, found `marlin`"),
        ("quant_method", "awq".into(), "expected `gptq`, found `awq`"),
        ("bits", 5.into(), "expected 2, 3, 4 or 8, found 5"),
        ("pack_dtype", "int64".into(), "expected `int32`, found `int64`"),
        ("lm_head", true.into(), "expected false, found true"),
    ];
    for (key, value, expected) in cases {
        let dir = rewritten(&lab, key, |dir| {
            change_quantization(dir, |quantization| {
                quantization.insert(key.into(), value);
            });
        });
        let error = format!("error: `[LAB]/{key}/config.json`: key `quantization_config.{key}`: {expected}");
        let (model, text) = (text_of(&lab.model()), text_of(&demo("evaluation.parquet")));
        let dir = text_of(&dir);
        let args = ["eval", "--model", &model, "--quantized", &dir, "--dataset", &text, "--seq-len", "64"];
        lab.run(&args).fails_with(&error);
    }
}
