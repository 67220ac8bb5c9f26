//! What `gptq verify` says about a good branch and about every kind of damage.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    helpers::{DOWN, Lab, Output, Q, copy, read_json, text_of, write_json},
    safetensors_file,
};

impl Output {
    /// Requires exit code 1 and, first on standard output, this and no other finding.
    #[track_caller]
    fn finds(self, finding: &str) {
        let lines: Vec<&str> = self.stdout.lines().collect();
        let last = lines.last().copied();
        assert_eq!(
            (lines[0], last, self.code),
            (finding, Some("failed: 1 finding"), Some(1)),
            "{}",
            self.stdout
        );
    }
}

/// A copy of the lab's branch, changed.
fn damaged(lab: &Lab, damage: impl FnOnce(&Path)) -> PathBuf {
    let dir = lab.path("damaged");
    if dir.exists() {
        fs::remove_dir_all(&dir).unwrap();
    }
    copy(&lab.branch(), &dir);
    damage(&dir);
    dir
}

/// The same without checksums, as other tools and older files come.
fn damaged_unsummed(lab: &Lab, damage: impl FnOnce(&Path)) -> PathBuf {
    damaged(lab, |dir| {
        fs::remove_file(dir.join("checksums.json")).unwrap();
        damage(dir);
    })
}

#[test]
fn a_good_branch_passes_and_lists_its_readers() {
    let lab = Lab::with_branch("4bit-32g");
    let output = lab.verify(&lab.branch(), &[]).succeeds();
    assert_eq!(output.stderr, "");
    // How many are negative differs between processors.
    let (count, rest) = output.stdout.split_once(' ').unwrap();
    assert!((1000..1500).contains(&count.parse().unwrap()), "{count}");
    insta::assert_snapshot!(rest, @r"
    of 2560 scales are negative; readers multiply by them as by any other
    transformers 5                       yes
    GPTQModel 7                          yes
    vLLM 0.30 and newer                  yes, on 1 or 2 GPUs (not on 4: attention has 2 query heads)
    vLLM 0.22 to 0.29                    no: needs N a multiple of 64 and K of 128, a linear here is 64 x 64
    vLLM up to 0.21                      yes
    SGLang 0.5.20 and newer              no: needs N a multiple of 64 and K of 128, a linear here is 64 x 64
    SGLang up to 0.5.19                  yes
    llama.cpp's converter                yes
    mistral.rs 0.9                       no: takes group sizes 64 or 128, this has 32
    text-generation-webui 4              no: has no loader for GPTQ since 4.0 (March 2026)
    text-generation-webui up to 3        yes
    ExLlamaV2                            yes
    ExLlama                              yes
    AutoGPTQ 0.4 to 0.7                  yes
    TGI 3                                no: needs N a multiple of 64 and K of 128, a linear here is 64 x 64
    GPTQ-for-LLaMa                       yes
    KoboldAI (Occ4m's fork)              yes
    ok: 63 tensors
    ");
    let json = lab.verify(&lab.branch(), &["--json"]).json();
    assert_eq!((&json["tensors"], &json["checksums"]), (&63.into(), &true.into()));
    assert_eq!(json["findings"], serde_json::json!([]));
    let limit = "not on 4: attention has 2 query heads";
    assert_eq!(
        json["tensor_parallel"],
        serde_json::json!([
            {"name": "vLLM 0.30 and newer", "parts": [1, 2], "limit": limit},
            {"name": "SGLang 0.5.20 and newer", "parts": [], "limit": null},
        ])
    );
}

#[test]
fn a_byte_order_mark_is_left_out_of_branches_and_found_in_them() {
    let lab = Lab::new();
    let mark =
        |path: &Path| fs::write(path, [b"\xEF\xBB\xBF", &fs::read(path).unwrap()[..]].concat()).unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        mark(&lab.model().join(name));
    }
    lab.quantize(&["--variant", "4bit-32g"]).succeeds();
    lab.verify(&lab.branch(), &[]).succeeds();
    let dir = damaged_unsummed(&lab, |dir| mark(&dir.join("tokenizer.json")));
    lab.verify(&dir, &[]).finds("tokenizer.json: begins with a byte order mark, which transformers refuses");
}

#[test]
fn a_tokenizer_that_cannot_be_read_is_found() {
    let lab = Lab::with_branch("4bit-32g");
    let with =
        |text: &str| damaged_unsummed(&lab, |dir| fs::write(dir.join("tokenizer.json"), text).unwrap());
    lab.verify(&with("{"), &[])
        .finds("tokenizer.json: is not JSON: EOF while parsing an object at line 1 column 1");
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 10241234\n";
    lab.verify(&with(pointer), &[]).finds(
        "tokenizer.json: `[LAB]/damaged/tokenizer.json` is a pointer of git-lfs, not the file itself: this clone was made without \
         its large files",
    );
}

#[test]
fn what_all_linears_lack_is_one_finding() {
    let lab = Lab::with_branch("4bit-32g");
    let without = |layers: &[&str], float: bool| {
        damaged_unsummed(&lab, |dir| {
            safetensors_file::change(dir, |tensors| {
                let lost = |name: &String| {
                    layers.iter().any(|layer| name.contains(layer)) && name.ends_with(".qzeros")
                };
                let names: Vec<String> = tensors.keys().filter(|name| lost(name)).cloned().collect();
                for name in names {
                    let zeros = tensors.remove(&name).unwrap();
                    if float {
                        tensors.insert(name.replace(".qzeros", ".zeros"), zeros);
                    }
                }
            });
        })
    };
    let missing = format!("{Q}: tensor `{Q}.qzeros` is missing from `[LAB]/damaged`");
    lab.verify(&without(&["layers"], false), &[]).finds(&format!("{missing}; the same in 13 more linears"));
    lab.verify(&without(&["0.self_attn.q", "0.mlp.down"], false), &[])
        .finds(&format!("{missing}; the same in 1 more linear"));

    let old = without(&["layers"], true);
    let layout = format!(
        "`[LAB]/damaged`: expected a GPTQ checkpoint with packed zero points (`qzeros`), found the oldest layout of \
         GPTQ-for-LLaMa, with float zero points (`{Q}.zeros`)"
    );
    lab.verify(&old, &[]).finds(&format!("{Q}: {layout}; the same in 13 more linears"));
    let generated = lab.run(&["generate", &text_of(&old), "--prompt", "The"]);
    assert!(generated.stderr.contains(&format!("error: {layout}")), "{}", generated.stderr);
}

#[test]
fn the_distance_from_the_source_is_measured() {
    let lab = Lab::with_branch("4bit-32g");
    let source = text_of(&lab.model());
    let json = lab.verify(&lab.branch(), &["--against", &source, "--json"]).json();
    let distances = json["distances"].as_array().unwrap();
    assert_eq!((distances.len(), &distances[0]["name"]), (14, &Q.into()));
    assert!(
        distances.iter().all(|d| (0.01..0.3).contains(&d["relative_error"].as_f64().unwrap())),
        "{distances:?}"
    );
    let text = lab.verify(&lab.branch(), &["--against", &source]).succeeds().stdout;
    assert!(text.starts_with("distance from the source ‖W−Ŵ‖/‖W‖: mean 0."), "{text}");
}

#[test]
fn a_flipped_bit_is_named() {
    let lab = Lab::with_branch("4bit-32g");
    for tensor in ["qweight", "scales", "qzeros", "g_idx"] {
        let name = format!("{DOWN}.{tensor}");
        // The lowest bit of the last element leaves a valid code, and a scale as good as the right one.
        let dir = damaged(&lab, |dir| {
            safetensors_file::change(dir, |tensors| {
                let bytes = &mut tensors.get_mut(&name).unwrap().bytes;
                let last = bytes.len() - if tensor == "scales" { 2 } else { 4 };
                bytes[last] ^= 1;
            });
        });
        let output = lab.verify(&dir, &[]);
        let expected = format!("{name}: its bytes are not those that were written: sha256 ");
        assert!(output.stdout.lines().any(|line| line.starts_with(&expected)), "{}", output.stdout);
        assert_eq!(output.code, Some(1));
    }
    for (file, from, to) in [("config.json", "10000.0", "10001.0"), ("tokenizer_config.json", "</s>", "</t>")]
    {
        let dir = damaged(&lab, |dir| {
            let text = fs::read_to_string(dir.join(file)).unwrap();
            fs::write(dir.join(file), text.replacen(from, to, 1)).unwrap();
        });
        let output = lab.verify(&dir, &[]);
        assert!(
            output.stdout.starts_with(&format!("{file}: its bytes are not those that were written: sha256 "))
        );
        assert_eq!(output.stdout.lines().last(), Some("failed: 1 finding"));
        assert_eq!(output.code, Some(1));
    }
}

#[test]
fn files_that_are_gone_or_cut_short_are_named() {
    let lab = Lab::with_branch("4bit-32g");
    let dir = damaged(&lab, |dir| fs::remove_file(dir.join("tokenizer.json")).unwrap());
    lab.verify(&dir, &[]).finds(
        "tokenizer.json: cannot read `[LAB]/damaged/tokenizer.json`: No such file or directory (os error 2)",
    );
    let dir = damaged(&lab, |dir| fs::write(dir.join("checksums.json"), "{}").unwrap());
    lab.verify(&dir, &[]).finds("checksums.json: missing field `algorithm` at line 1 column 2");

    let dir = damaged_unsummed(&lab, |dir| {
        let path = dir.join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
    });
    lab.verify(&dir, &[]).finds(
        "[LAB]/damaged: `[LAB]/damaged/model.safetensors` is not a whole safetensors file: tensor `lm_head.weight` ends \
         at byte 1100672 of the data, and the file holds 1100572; the file is cut short",
    );
    let dir = damaged_unsummed(&lab, |dir| {
        safetensors_file::change(dir, |tensors| {
            tensors.remove(&format!("{Q}.scales"));
        });
    });
    lab.verify(&dir, &[]).finds(&format!("{Q}: tensor `{Q}.scales` is missing from `[LAB]/damaged`"));
    let dir = damaged_unsummed(&lab, |dir| fs::remove_file(dir.join("model.safetensors")).unwrap());
    lab.verify(&dir, &[]).finds(
        "[LAB]/damaged: `[LAB]/damaged` is not a checkpoint folder: it has no weights (`model.safetensors` or any other safetensors file, such as \
         `gptq_model-4bit-128g.safetensors`; an index of shards; `pytorch_model.bin`)",
    );
}

#[test]
fn shuffled_groups_are_named() {
    let swap = |dir: &Path| {
        safetensors_file::change(dir, |tensors| {
            tensors.get_mut(&format!("{DOWN}.g_idx")).unwrap().change_words(|groups| groups.swap(3, 40));
        });
    };
    let lab = Lab::with_branch("4bit-32g");
    let expected = format!("{DOWN}.g_idx: feature 3 is in group 1; without act order it must be in group 0");
    lab.verify(&damaged_unsummed(&lab, swap), &[]).finds(&expected);
    let lab = Lab::with_branch("4bit-32g-static");
    lab.verify(&damaged_unsummed(&lab, swap), &[]).finds(&expected);

    // With act order any permutation is right by itself; group sizes are not.
    let lab = Lab::with_branch("4bit-48g-act");
    let dir = damaged_unsummed(&lab, |dir| {
        safetensors_file::change(dir, |tensors| {
            tensors.get_mut(&format!("{DOWN}.g_idx")).unwrap().change_words(|groups| {
                let moved = groups.iter().position(|&g| g == 0).unwrap();
                groups[moved] = 2;
            });
        });
    });
    lab.verify(&dir, &[]).finds(&format!("{DOWN}.g_idx: group 0 has 47 features, expected 48"));
    let dir = damaged_unsummed(&lab, |dir| {
        safetensors_file::change(dir, |tensors| {
            tensors.get_mut(&format!("{DOWN}.g_idx")).unwrap().change_words(|groups| groups[5] = 3);
        });
    });
    let found = format!("{DOWN}: tensor `{DOWN}.g_idx`, element 5: expected a group from 0 to 2, found 3");
    lab.verify(&dir, &[]).finds(&found);
}

#[test]
fn zero_points_that_are_off_by_one_are_named() {
    let lab = Lab::with_branch("4bit-32g");
    let change = |word: usize, by: i32| {
        damaged_unsummed(&lab, |dir| {
            safetensors_file::change(dir, |tensors| {
                tensors.get_mut(&format!("{Q}.qzeros")).unwrap().change_words(|words| words[word] += by);
            });
        })
    };
    let found = |what: &str| format!("{Q}.qzeros: {what}, expected 8, the zero point of a symmetric grid");
    let one = found("1 of 128 zero points are wrong: group 1, output feature 9 has 9");
    lab.verify(&change(9, 0x10), &[]).finds(&one);
    let word = found("8 of 128 zero points are wrong: group 0, output feature 16 has 7");
    lab.verify(&change(2, -0x1111_1111), &[]).finds(&word);
}

#[test]
fn scales_that_are_not_numbers_are_named() {
    let lab = Lab::with_branch("4bit-32g");
    let filled = |value: f32| {
        damaged_unsummed(&lab, |dir| {
            safetensors_file::change(dir, |tensors| {
                tensors.get_mut(&format!("{Q}.scales")).unwrap().fill(7..9, value)
            });
        })
    };
    let found = format!("{Q}: tensor `{Q}.scales`: 2 of 128 values are NaN or infinite");
    lab.verify(&filled(f32::NAN), &[]).finds(&found);
    lab.verify(&filled(f32::INFINITY), &[]).finds(&found);
    lab.verify(&filled(0.0), &[]).finds(&format!("{Q}.scales: 2 of 128 scales are zero"));
    let dir = damaged_unsummed(&lab, |dir| {
        safetensors_file::change(dir, |tensors| {
            tensors.get_mut("model.norm.weight").unwrap().fill([1], f32::NAN)
        });
    });
    let found = "model.norm.weight: tensor `model.norm.weight`: 1 of 64 values are NaN or infinite";
    lab.verify(&dir, &[]).finds(found);
}

#[test]
fn what_checksums_would_see_is_said_when_there_are_none() {
    let lab = Lab::with_branch("4bit-32g");
    let output = lab.verify(&damaged_unsummed(&lab, |_| ()), &[]).succeeds();
    let lines: Vec<&str> = output.stdout.lines().rev().take(2).collect();
    let said = "no checksums in this folder: a flipped bit that leaves a valid code cannot be seen";
    assert_eq!(lines, ["ok: 63 tensors", said]);
}

#[test]
fn swapped_weights_are_seen_against_the_source() {
    let lab = Lab::with_branch("4bit-32g");
    let (gate, up) = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj");
    let dir = damaged_unsummed(&lab, |dir| {
        safetensors_file::change(dir, |tensors| {
            for suffix in ["qweight", "scales"] {
                let names = [gate, up].map(|linear| format!("{linear}.{suffix}"));
                let [first, second] = names.each_ref().map(|name| tensors[name].clone());
                tensors.insert(names[0].clone(), second);
                tensors.insert(names[1].clone(), first);
            }
        });
    });
    // By itself the folder is in order.
    lab.verify(&dir, &[]).succeeds();
    let output = lab.verify(&dir, &["--against", &text_of(&lab.model())]);
    assert_eq!(output.code, Some(1));
    let lines: Vec<&str> = output.stdout.lines().collect();
    for (line, linear) in lines.iter().zip([gate, up]) {
        assert!(line.starts_with(&format!("{linear}: is 1.")), "{line}");
        assert!(
            line.ends_with("away from the source's weight (relative, Frobenius), expected at most 0.4"),
            "{line}"
        );
    }
    assert_eq!(lines.last(), Some(&"failed: 2 findings"));
}

#[test]
fn configs_that_disagree_are_named() {
    let lab = Lab::with_branch("4bit-32g");
    let dir = damaged_unsummed(&lab, |dir| {
        let mut config = read_json(&dir.join("quantize_config.json"));
        config["group_size"] = 64.into();
        write_json(&dir.join("quantize_config.json"), &config);
    });
    lab.verify(&dir, &[]).finds(
        "[LAB]/damaged: `[LAB]/damaged/quantize_config.json`: key `group_size`: expected 32, as `quantization_config` of \
         `config.json` says, found 64",
    );
    let dir = damaged_unsummed(&lab, |dir| {
        for file in ["quantize_config.json", "config.json"] {
            let text = fs::read_to_string(dir.join(file)).unwrap();
            fs::write(dir.join(file), text.replace("\"group_size\": 32", "\"group_size\": 64")).unwrap();
        }
    });
    let output = lab.verify(&dir, &[]);
    let shape =
        format!("{Q}: tensor `{Q}.qzeros`: expected shape [1, 8], found [2, 8]; the same in 7 more linears");
    assert_eq!((output.stdout.lines().next(), output.code), (Some(shape.as_str()), Some(1)));
    assert_eq!(output.stdout.lines().last(), Some("failed: 3 findings"));
}

#[test]
fn a_folder_that_is_not_there_is_an_error_and_a_dense_one_fails() {
    let lab = Lab::new();
    lab.verify(&lab.path("nothing"), &[])
        .fails_with("error: model: expected a folder or file that exists, or OWNER/NAME on the Hub, found `[LAB]/nothing`");
    lab.verify(&lab.model(), &[]).finds(
        "[LAB]/model: `[LAB]/model`: expected a GPTQ checkpoint, found no `quantization_config` in `config.json` and no \
         `quantize_config.json`",
    );
}
