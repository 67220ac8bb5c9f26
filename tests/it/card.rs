//! The card of a run: everything that was made and measured is in it, and nothing else is claimed.

use std::fs;

use serde_json::Value;

use crate::helpers::{Lab, demo, read_json, text_of, write_json};

const SOURCE: &str = "---\nlicense: other\nlicense_name: llama2\nlicense_link: LICENSE.txt\nlanguage:\n- en\ntags:\n- llama\n---\n# Tiny\n\nThe original text.\n";
const ACT: &str = "gptq-4bit-16g-actorder_True";

/// A run of two branches of a model with a card and a licence.
fn run(flags: &[&str]) -> Lab {
    let lab = Lab::new();
    fs::write(lab.model().join("README.md"), SOURCE).unwrap();
    fs::write(lab.model().join("LICENSE.txt"), "the licence").unwrap();
    fs::write(lab.model().join("USE_POLICY.md"), "the policy").unwrap();
    lab.quantize(&[&["--variant", "4bit-32g", "--variant", "4bit-16g-act"], flags].concat()).succeeds();
    lab
}

fn card(lab: &Lab, flags: &[&str]) -> String {
    let out = text_of(&lab.out());
    lab.run(&[&["card", &out], flags].concat()).succeeds();
    fs::read_to_string(lab.out().join(ACT).join("README.md")).unwrap()
}

#[test]
fn everything_that_is_known_is_on_the_card() {
    let eval = text_of(&demo("evaluation.parquet"));
    let lab = run(&["--eval", &eval, "--eval-windows", "2"]);
    let card = card(&lab, &["--repository", "me/Tiny-GPTQ", "--base-model", "some/tiny"]);
    let report = read_json(&lab.out().join("run.json"));

    let (metadata, text) = card.strip_prefix("---\n").unwrap().split_once("\n---\n").unwrap();
    let metadata: Value = serde_saphyr::from_str(metadata).unwrap();
    let expected = serde_json::json!({
        "base_model": "some/tiny", "base_model_relation": "quantized", "license": "other", "license_name": "llama2",
        "license_link": "LICENSE.txt", "language": ["en"], "library_name": "transformers",
        "pipeline_tag": "text-generation", "model_name": "model", "model_creator": "some", "quantized_by": "me",
        "tags": ["llama", "gptq", "quantized", "4-bit"],
    });
    assert_eq!(metadata, expected);

    let head = "| Branch | Bits | GS | Act Order | Damp % | GPTQ Dataset | Seq Len | Size | ExLlama | Not loaded by | Perplexity | KL divergence | Desc |";
    let table: Vec<&str> =
        text.lines().skip_while(|line| *line != head).take_while(|line| !line.is_empty()).collect();
    assert_eq!(table.len(), 4, "{text}");
    let measured = &report["evaluations"][0]["models"][1];
    let figure = |value: &Value, digits: usize| {
        let [value, margin] = ["value", "margin"].map(|key| value[key].as_f64().unwrap());
        format!("{value:.digits$} ± {margin:.digits$}")
    };
    let row = format!(
        "| [{ACT}](https://huggingface.co/me/Tiny-GPTQ/tree/{ACT}) | 4 | 16 | Yes | 0.05 | evaluation.parquet | 64 | \
         {} | No | vLLM 0.30 and newer, SGLang 0.5.20 and newer, mistral.rs 0.9 | {} | {} | Act order: `g_idx` is a permutation.",
        gptq::units::bytes(report["branches"][1]["bytes"].as_u64().unwrap()),
        figure(&measured["perplexity"], 4),
        figure(&measured["kl_divergence"], 6),
    );
    assert!(table[3].starts_with(&row), "{}\n{row}", table[3]);
    // Every row of every table has as many cells as its head.
    for table in text.split("\n\n").filter(|part| part.starts_with("| ")) {
        let cells: Vec<usize> = table.lines().map(|line| line.matches('|').count()).collect();
        assert!(cells.iter().all(|count| *count == cells[0]), "{table}");
    }

    let of_report = |pointer: &str| report.pointer(pointer).unwrap().as_str().unwrap();
    for part in [
        "--quantized me/Tiny-GPTQ:gptq-4bit-16g-actorder_True\n",
        &format!("git clone --single-branch --branch {ACT} https://huggingface.co/me/Tiny-GPTQ\n"),
        &format!("name, revision = \"me/Tiny-GPTQ\", \"{ACT}\""),
        &format!("hf download me/Tiny-GPTQ --revision {ACT}"),
        "| vLLM 0.30 and newer | Yes | No: refuses act order (desc\\_act) |",
        "- For vLLM 0.30 and newer: `gptq-4bit-32g-actorder_False`\n",
        "- For SGLang 0.5.20 and newer, mistral.rs 0.9: none of these\n",
        "| llama.cpp's converter | Yes | Yes |",
        "- For transformers 5, GPTQModel 7, llama.cpp's converter: `",
        "This model has no chat template",
        of_report("/calibration/sha256"),
        of_report("/calibration/sources/0/files/0/sha256"),
        of_report("/evaluations/0/sha256"),
        "states the licence llama2 (LICENSE.txt)",
        "Copied from it: [`LICENSE.txt`](LICENSE.txt), [`USE_POLICY.md`](USE_POLICY.md).",
        "# The source model's card\n\n# Tiny\n\nThe original text.\n",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    assert!(!card.contains(&text_of(&lab.path(""))) && !card.contains("\n\n\n"), "{card}");
    // The licence went with the weights; a card in the folder does not disturb its checksums.
    assert_eq!(fs::read_to_string(lab.out().join("main").join("USE_POLICY.md")).ok(), None, "no such branch");
    let branch = lab.out().join(ACT);
    assert_eq!(fs::read_to_string(branch.join("USE_POLICY.md")).unwrap(), "the policy");
    lab.verify(&branch, &[]).succeeds();
}

#[test]
fn gguf_files_have_a_table_and_a_card_of_their_own() {
    let lab = Lab::new();
    let eval = text_of(&demo("evaluation.parquet"));
    let flags = ["--variant", "4bit-32g", "--variant", "q4_k_m", "--variant", "q2_k", "--eval", &eval];
    lab.quantize(&[&flags[..], &["--eval-windows", "2"]].concat()).succeeds();
    let out = text_of(&lab.out());
    lab.run(&["card", &out, "--repository", "me/Tiny-GPTQ"]).succeeds();
    let report = read_json(&lab.out().join("run.json"));
    let row = |at: usize, method: &str, bits: u32, use_case: &str| {
        let (file, measured) = (&report["branches"][at], &report["evaluations"][0]["models"][at]);
        assert_eq!(measured["name"], file["branch"]);
        let [value, margin] = ["value", "margin"].map(|key| measured["kl_divergence"][key].as_f64().unwrap());
        let per_weight = file["bits_per_weight"].as_f64().unwrap();
        let size = gptq::units::bytes(file["bytes"].as_u64().unwrap());
        format!(
            "| `model-{method}.gguf` | {method} | {bits} | {per_weight:.2} | {size} | {value:.6} ± {margin:.6} | {use_case} |"
        )
    };
    let expected = [
        "| Name | Quant method | Bits | Bits per weight | Size | KL divergence | Use case |".to_owned(),
        "| ---- | ------------ | ---- | --------------- | ---- | ------------- | -------- |".to_owned(),
        row(1, "Q4_K_M", 4, "a good balance of size and quality"),
        row(2, "Q2_K", 2, "the smallest; a large loss of quality"),
    ];
    let of_files = fs::read_to_string(lab.out().join("README.md")).unwrap();
    let of_branch = fs::read_to_string(lab.branch().join("README.md")).unwrap();
    for card in [&of_files, &of_branch] {
        let table: Vec<&str> = card
            .lines()
            .skip_while(|line| *line != expected[0])
            .take_while(|line| !line.is_empty())
            .collect();
        assert_eq!(table, expected);
        assert!(!card.contains("\n\n\n"), "{card}");
    }
    assert!(of_branch.contains(
        "one in each branch, and GGUF files in branch `gguf`. This is the card of branch `gptq-4bit-32g-"
    ));
    // What it says of its use is said of llama.cpp, and of the branch that `publish` makes.
    for part in [
        "# model - GGUF\n",
        "This is the card of branch `gguf`.",
        "hf download me/Tiny-GPTQ model-Q4_K_M.gguf --revision gguf --local-dir model-GGUF\n",
        "llama-cli -m model-GGUF/model-Q4_K_M.gguf ",
    ] {
        assert!(of_files.contains(part), "{part}\n{of_files}");
    }
    assert!(
        !of_files.contains("library_name")
            && !of_files.contains("AutoModel")
            && of_files.contains("\n- gguf\n")
    );
    let printed =
        lab.run(&["card", &out, "--repository", "me/Tiny-GPTQ", "--print", "gguf"]).succeeds().stdout;
    assert_eq!(printed, of_files);

    // Alone they are in the default branch.
    let alone = text_of(&lab.path("alone"));
    lab.quantize(&["--variant", "q8_0", "--out", &alone]).succeeds();
    let card = lab.run(&["card", &alone, "--print", "main"]).succeeds().stdout;
    assert!(
        card.contains("This repository has GGUF files of model. This is the card of branch `main`."),
        "{card}"
    );
    assert!(
        card.contains("| `model-Q8_0.gguf` | Q8_0 | 8 | 8.50 | ") && !card.contains("Compatibility"),
        "{card}"
    );
}

#[test]
fn figures_of_later_evaluations_are_on_the_card() {
    let lab = run(&[]);
    let branch = lab.out().join(ACT);
    let measured = lab.eval(&[&branch])["models"][0].take();
    let card_of = |branch: &str| {
        let out = text_of(&lab.out());
        lab.run(&["card", &out, "--print", branch])
    };
    let card = card_of(ACT).succeeds().stdout;
    let rows: Vec<&str> = card.lines().filter(|line| line.contains(" | 4 | ")).collect();
    let figure = |name: &str, key: &str, digits: usize| {
        let value = measured[name][key].as_f64().unwrap();
        format!("{value:.digits$}")
    };
    let perplexity = format!("{} ± {}", figure("perplexity", "value", 4), figure("perplexity", "margin", 4));
    let divergence =
        format!("{} ± {}", figure("kl_divergence", "value", 6), figure("kl_divergence", "margin", 6));
    assert!(rows[1].contains(&format!(" | {perplexity} | {divergence} | ")), "{rows:?}\n{perplexity}");
    // The other branch was not measured, and nothing is said of it or of which is the closest.
    assert!(!rows[0].contains('±') && !card.contains("closest"), "{rows:?}");

    // Figures of other weights are not taken.
    let mut figures = read_json(&branch.join("eval.json"));
    figures["checkpoint"]["digest"] = "0".repeat(64).into();
    write_json(&branch.join("eval.json"), &figures);
    card_of(ACT).fails_with(&format!(
        "error: `[LAB]/out/{ACT}/eval.json` was measured with other weights than those beside it\n\
         hint: measure again: gptq eval --model MODEL --quantized [LAB]/out/{ACT}",
    ));
}

#[test]
fn what_was_not_measured_is_not_claimed() {
    let lab = run(&[]);
    fs::remove_file(lab.out().join("source-card.md")).unwrap();
    let mut report = read_json(&lab.out().join("run.json"));
    report["calibration"]["sources"][0]["dataset"] = "odd|name".into();
    write_json(&lab.out().join("run.json"), &report);
    let card = card(&lab, &[]);
    for word in [
        "erplexity",
        "KL",
        "closest",
        "±",
        "license:",
        "base_model",
        "quantized_by",
        "source model's card below",
    ] {
        assert!(!card.contains(word), "{word}: {card}");
    }
    for part in [
        "| Size | ExLlama | Not loaded by | Desc |",
        "The quality of these branches was not measured.",
        "The licence of the source model is not known",
        "OWNER/REPOSITORY",
        r"| odd\|name |",
    ] {
        assert!(card.contains(part), "{part}: {card}");
    }
}

#[test]
fn licence_and_languages_can_be_given() {
    let lab = run(&[]);
    let of_source = card(&lab, &[]);
    assert!(of_source.contains("license: other\nlicense_name: llama2\n"), "{of_source}");
    let given = card(&lab, &["--license", "apache-2.0", "--language", "de", "--language", "fr"]);
    assert!(given.contains("\nlicense: apache-2.0\nlanguage:\n- de\n- fr\n"), "{given}");
    assert!(!given.contains("llama2"), "{given}");
    fs::remove_file(lab.out().join("source-card.md")).unwrap();
    let alone = card(&lab, &["--license", "mit", "--language", "en"]);
    assert!(alone.contains("\nlicense: mit\nlanguage:\n- en\n"), "{alone}");
}

#[test]
fn chat_templates_and_git_addresses() {
    let lab = run(&[]);
    let template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}";
    fs::write(lab.out().join(ACT).join("chat_template.jinja"), template).unwrap();
    let card = card(&lab, &["--repository", "https://git.example.org/me/tiny.git"]);
    assert!(card.contains("```\n[system] {system_message}\n[user] {prompt}\n```"), "{card}");
    let clone =
        format!("git clone --single-branch --branch {ACT} https://git.example.org/me/tiny.git model-GPTQ");
    assert!(card.contains(&clone) && !card.contains("huggingface.co"), "{card}");
    let out = text_of(&lab.out());
    let printed = lab.run(&["card", &out, "--print", ACT, "--prompt-template", "Q: {prompt} A:"]).succeeds();
    assert!(printed.stdout.contains("```\nQ: {prompt} A:\n```"), "{}", printed.stdout);
}

#[test]
fn a_template_of_ones_own_and_what_can_be_wrong_with_it() {
    let lab = run(&[]);
    let out = text_of(&lab.out());
    let template =
        lab.write("mine.jinja", "{{ model.name }}: {% for b in branches %}{{ b.variant }} {% endfor %}.\n");
    let made = card(&lab, &["--card-template", &template]);
    assert_eq!(made, "model: 4bit-32g 4bit-16g-act .\n");
    for (text, problem) in [
        ("a\n{{ perplexity_of_the_moon }}", "line 2: it uses an undefined value"),
        ("{% for %}", "line 1: syntax error"),
    ] {
        let template = lab.write("bad.jinja", text);
        let failed = lab.run(&["card", &out, "--card-template", &template]);
        assert_eq!(failed.code, Some(2));
        let expected = format!("error: `[LAB]/bad.jinja` cannot be rendered as a card: {problem}");
        assert!(failed.stderr.starts_with(&expected), "{}", failed.stderr);
    }
    lab.run(&["card", &out, "--card-template", "/none"])
        .fails_with("error: cannot read `/none`: No such file or directory (os error 2)");
    lab.run(&["card", &out, "--print", "dev"]).fails_with("error: the run has no branch `dev`");
}
