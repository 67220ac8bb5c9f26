//! `gptq report`: runs and other checkpoints side by side, in all forms; the page in a browser.
//!
//! `tests/golden/report` has a run over `booklm` in the four variants of the model card, and what was measured of two
//! checkpoints that GPTQModel 7.7 made of the same windows with the same settings (`scripts/make-peers`).

mod browser;

use std::{fs, path::PathBuf};

use serde_json::Value;

use crate::helpers::{Lab, demo, read_json, repository, text_of, write_json};

fn golden(name: &str) -> PathBuf {
    repository().join("tests/golden/report").join(name)
}

/// The flags that name everything there is in the golden folder.
fn everything() -> Vec<String> {
    let peers = ["gptqmodel-4bit-128g.json", "gptqmodel-4bit-32g-act.json"];
    let peers = peers.iter().flat_map(|name| ["--quantized".to_owned(), text_of(&golden(name))]);
    ["report".to_owned(), text_of(&golden("run.json"))].into_iter().chain(peers).collect()
}

fn report(lab: &Lab, flags: &[&str]) -> crate::helpers::Output {
    let flags = flags.iter().map(|&flag| flag.to_owned());
    lab.run(&everything().into_iter().chain(flags).collect::<Vec<_>>())
}

#[test]
fn what_to_take_stands_in_front() {
    let output = report(&Lab::empty(), &[]).succeeds();
    assert_eq!(output.stderr, "");
    insta::assert_snapshot!(output.stdout);
}

#[test]
fn a_comment_has_everything_that_decides() {
    let lab = Lab::empty();
    let path = text_of(&lab.path("comment.md"));
    let output = report(&lab, &["--markdown", &path]).succeeds();
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("", "written: [LAB]/comment.md\n"));
    let comment = fs::read_to_string(path).unwrap();
    assert!(comment.len() < 16_000, "{} bytes", comment.len());
    insta::assert_snapshot!(comment);
}

#[test]
fn the_json_holds_what_is_shown() {
    let lab = Lab::empty();
    let path = text_of(&lab.path("report.json"));
    report(&lab, &["--json", &path]).succeeds();
    let found = read_json(&lab.path("report.json"));
    assert_eq!(found, report(&lab, &["--json", "-"]).json());
    assert_eq!(found["schema"], "gptq-comparison/2");
    let names: Vec<&str> =
        found["entries"].as_array().unwrap().iter().map(|e| e["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "main",
            "gptq-4bit-32g-actorder_True",
            "gptq-4bit-64g-actorder_True",
            "gptq-4bit-128g-actorder_True",
            "gptqmodel-4bit-128g",
            "gptqmodel-4bit-32g-act",
        ]
    );
    // The smallest file that is about as close as the closest.
    let best = &found["recommendation"];
    let entry = |key: &str| &found["entries"][best[key].as_u64().unwrap() as usize];
    let kl = |e: &Value| e["measured"][0]["kl_divergence"]["value"].as_f64().unwrap();
    let bytes = |e: &Value| e["checkpoint"]["bytes"].as_u64().unwrap();
    let entries = found["entries"].as_array().unwrap();
    let least = entries.iter().map(kl).fold(f64::INFINITY, f64::min);
    assert_eq!(kl(entry("closest")), least);
    let close = entries.iter().filter(|e| kl(e) <= gptq::report::CLOSE * least);
    assert_eq!(bytes(entry("take")), close.map(bytes).min().unwrap());
    assert_eq!(best["untold"], Value::Array(Vec::new()));
}

#[test]
fn a_run_is_reported_with_what_was_measured_later() {
    let lab = Lab::new();
    let text = text_of(&demo("evaluation.parquet"));
    lab.quantize(&[
        "--variant",
        "4bit-32g",
        "--variant",
        "4bit-32g-act",
        "--eval",
        &text,
        "--eval-windows",
        "2",
    ])
    .succeeds();
    let out = text_of(&lab.out());
    let short = lab.run(&["report", &out, "--json", "-"]).json();
    assert_eq!(short["protocols"].as_array().unwrap().len(), 1);
    let (model, branch) = (text_of(&lab.model()), lab.out().join("gptq-4bit-32g-actorder_True"));
    lab.eval(&[&branch]);
    let args = ["eval", "--model", &model, "--quantized", &text_of(&branch), "--dataset", &text];
    lab.run(&[&args[..], &["--seq-len", "32", "--windows", "2"]].concat()).succeeds();
    let long = lab.run(&["report", &out, "--model", &model, "--json", "-"]).json();
    let lengths: Vec<_> =
        long["protocols"].as_array().unwrap().iter().map(|p| p["seq_len"].as_u64()).collect();
    assert_eq!(lengths, [Some(64), Some(32)]);
    // What both have been measured by decides.
    assert_eq!(long["recommendation"], short["recommendation"]);
    for entry in long["entries"].as_array().unwrap() {
        let second = entry["name"] == "gptq-4bit-32g-actorder_True";
        assert_eq!(entry["measured"][1].is_object(), second, "{}", entry["name"]);
    }

    // Of other weights, figures are worth nothing.
    crate::safetensors_file::change(&branch, |tensors| {
        tensors.get_mut("model.norm.weight").unwrap().fill([0], 2.0)
    });
    lab.run(&["report", &out]).fails_with(
        "error: `[LAB]/out/gptq-4bit-32g-actorder_True/eval.json` was measured with other weights than those beside it\n\
         hint: measure again: gptq eval --model MODEL --quantized [LAB]/out/gptq-4bit-32g-actorder_True",
    );
}

#[test]
fn what_was_not_measured_is_said_to_be() {
    let lab = Lab::with_branch("4bit-32g");
    let branch = text_of(&lab.branch());
    let output = report(&lab, &["--quantized", &branch]).succeeds();
    assert_eq!(
        output.stderr,
        "`[LAB]/out/gptq-4bit-32g-actorder_False` has not been measured: gptq eval --model MODEL --quantized \
         [LAB]/out/gptq-4bit-32g-actorder_False does it\n"
    );
    let line = output.stdout.lines().find(|line| line.starts_with("gptq-4bit-32g-actorder_False")).unwrap();
    let cells: Vec<&str> = line.split_whitespace().skip(3).collect();
    assert_eq!(cells[..4], ["–"; 4], "{line}");
    let output = lab.run(&["report", &text_of(&lab.out())]).succeeds();
    assert!(output.stdout.starts_with("model: not measured yet\n"), "{}", output.stdout);
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let lab = Lab::empty();
    let mut other = read_json(&golden("gptqmodel-4bit-128g.json"));
    let known = other["evaluations"][0]["model_digest"].as_str().unwrap().to_owned();
    for evaluation in other["evaluations"].as_array_mut().unwrap() {
        evaluation["model_digest"] = "xxh3:0".into();
    }
    write_json(&lab.path("other.json"), &other);
    report(&lab, &["--quantized", &text_of(&lab.path("other.json"))]).fails_with(&format!(
        "error: `booklm` cannot be compared with `booklm`: figures against two unquantized models, with digests {known} \
         and xxh3:0"
    ));
    let model = Lab::new();
    let output = report(&lab, &["--model", &text_of(&model.model())]);
    assert!(output.stderr.contains("cannot be compared") && output.code == Some(2), "{}", output.stderr);
    let mut run = read_json(&golden("run.json"));
    run["model"]["layers"] = 7.into();
    write_json(&lab.path("run.json"), &run);
    let output = report(&lab, &[&text_of(&lab.path("run.json"))]);
    assert!(output.stderr.contains("they are of two models: 6 layers"), "{}", output.stderr);
    run["schema"] = "gptq-run/1".into();
    write_json(&lab.path("run.json"), &run);
    let output = lab.run(&["report", &text_of(&lab.path("run.json"))]);
    assert!(output.stderr.contains("`schema`") && output.stderr.contains("gptq-run/1"), "{}", output.stderr);
}

/// Names and texts from outside stay text.
#[test]
fn nothing_from_outside_becomes_markup() {
    let lab = Lab::empty();
    let evil = "</td><script>alert(1)</script>|`x`";
    let mut peer = read_json(&golden("gptqmodel-4bit-128g.json"));
    peer["name"] = evil.into();
    for evaluation in peer["evaluations"].as_array_mut().unwrap() {
        evaluation["models"][0]["name"] = evil.into();
    }
    peer["checkpoint"]["quantizer"] = evil.into();
    peer["checkpoint"]["dataset"] = evil.into();
    write_json(&lab.path("evil.json"), &peer);
    let [html, markdown] = ["r.html", "r.md"].map(|name| lab.path(name));
    let flags = ["--quantized", &text_of(&lab.path("evil.json")), "--html", &text_of(&html)];
    report(&lab, &[&flags[..], &["--markdown", &text_of(&markdown)]].concat()).succeeds();
    let (html, markdown) = (fs::read_to_string(html).unwrap(), fs::read_to_string(markdown).unwrap());
    assert!(html.contains("alert(1)") && !html.contains("<script>alert"), "escaped");
    let row = markdown.lines().find(|line| line.contains("alert(1)")).unwrap();
    let cells = row.replace("\\|", "").matches('|').count();
    let usual = markdown.lines().find(|line| line.starts_with("| `main`")).unwrap().matches('|').count();
    assert_eq!(cells, usual, "{row}");
}

#[test]
fn the_page_has_the_linears_that_the_run_names() {
    let lab = Lab::empty();
    let mut run = read_json(&golden("run.json"));
    let mut errors = Vec::new();
    for linear in run["branches"].as_array_mut().unwrap().iter_mut().flat_map(|branch| {
        let linears = branch["linears"].as_array_mut().unwrap();
        linears.iter_mut()
    }) {
        let name = linear["name"].as_str().unwrap();
        if errors.len() < 2 && (name.ends_with("0.mlp.gate_proj") || name.ends_with("0.mlp.up_proj")) {
            errors.push(linear["relative_error"].as_f64().unwrap());
        }
        let name = name
            .replace("mlp.gate_proj", "block_sparse_moe.experts.0.w1")
            .replace("mlp.up_proj", "block_sparse_moe.experts.1.w1")
            .replace("mlp.down_proj", "block_sparse_moe.experts.0.w2");
        linear["name"] = name.into();
    }
    write_json(&lab.path("run.json"), &run);
    let page = lab.path("report.html");
    lab.run(&["report", &text_of(&lab.path("run.json")), "--html", &text_of(&page)]).succeeds();
    let page = fs::read_to_string(page).unwrap();
    for part in [
        "6 layers from left to right, from top to bottom q, k, v, o, w1, w2. The largest is",
        "<button type=\"button\">w1</button>",
        "Of experts, the mean over all of a layer.",
        &format!("<td data-sort=\"{0}\">{0:.4}</td>", (errors[0] + errors[1]) / 2.0)[..26],
    ] {
        assert!(page.contains(part), "{part}");
    }
}

/// A text that is asked for decides, and the others are named.
#[test]
fn a_dataset_can_be_chosen_for_the_recommendation() {
    let lab = Lab::empty();
    let mut run = read_json(&golden("run.json"));
    let mut other = run["evaluations"][0].clone();
    for (key, value) in [("dataset", "books.txt"), ("sha256", "0")] {
        other[key] = value.into();
    }
    other["models"].as_array_mut().unwrap().remove(1);
    run["evaluations"].as_array_mut().unwrap().push(other);
    write_json(&lab.path("run.json"), &run);
    let run = text_of(&lab.path("run.json"));
    let own = lab.run(&["report", &run]).succeeds().stdout;
    assert!(own.contains("\neval.parquet, 16 windows of 1024 tokens\nbranch "), "{own}");
    assert!(
        own.contains(
            "books.txt, 16 windows of 1024 tokens (3 of 4 models); --dataset books.txt decides by it.\n"
        ),
        "{own}"
    );
    let books = lab.run(&["report", &run, "--dataset", "books.txt"]).succeeds().stdout;
    assert!(books.contains("\nbooks.txt, 16 windows of 1024 tokens\nbranch "), "{books}");
    // What was not measured there is named, and neither recommended nor compared.
    assert!(
        books.contains(
            "Without figures on books.txt, 16 windows of 1024 tokens, and so without a verdict: \
             gptq-4bit-32g-actorder_True.\n"
        ),
        "{books}"
    );
    lab.run(&["report", &run, "--dataset", "book.txt"]).fails_with(
        "error: dataset: expected a text that was evaluated: books.txt, eval.parquet, found `book.txt`",
    );
}

#[test]
fn few_windows_are_said_to_be_too_few() {
    let lab = Lab::empty();
    let mut run = read_json(&golden("run.json"));
    let evaluations = run["evaluations"].as_array_mut().unwrap();
    evaluations.truncate(1);
    evaluations[0]["windows"] = 2.into();
    let cut = |value: &mut Value| value.as_array_mut().unwrap().truncate(2);
    for key in ["window_tokens", "window_nll"] {
        cut(&mut evaluations[0][key]);
    }
    for model in evaluations[0]["models"].as_array_mut().unwrap() {
        for key in ["window_nll", "window_kl", "window_top1"] {
            cut(&mut model[key]);
        }
    }
    write_json(&lab.path("run.json"), &run);
    let text = lab.run(&["report", &text_of(&lab.path("run.json"))]).succeeds().stdout;
    assert!(text.lines().next().unwrap().contains(", but 2 windows are too few to tell it from "), "{text}");
}

#[test]
fn divergences_far_apart_stand_on_a_logarithmic_axis() {
    let lab = Lab::empty();
    let page = |name: &str, run: &Value| {
        let (run_path, page) = (lab.path("run.json"), lab.path(name));
        write_json(&run_path, run);
        lab.run(&["report", &text_of(&run_path), "--html", &text_of(&page)]).succeeds();
        fs::read_to_string(page).unwrap()
    };
    let mut run = read_json(&golden("run.json"));
    let near = page("near.html", &run);
    // The picture says the intervals that it draws.
    assert!(
        near.contains("12.10 MB, KL 0.000489 ±0.000023") && !near.contains("fp16, logarithmic"),
        "{near}"
    );
    let kl = &mut run["evaluations"][0]["models"][0]["kl_divergence"]["value"];
    *kl = (kl.as_f64().unwrap() * 20.0).into();
    assert!(page("far.html", &run).contains("mean KL to fp16, logarithmic"));
}
