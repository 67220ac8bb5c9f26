//! `gptq gate` as people and CI servers meet it.

mod damage;
mod sabotage;

use std::fs;

use serde_json::Value;

use crate::helpers::{Lab, Output, demo, entries, read_json, text_of, write_json};

/// What the tiny model, whose weights are random, can be held to.
pub(crate) const LOOSE: &str = "max-kl = 10\nmax-perplexity-increase = 10\nmin-top1 = 0\nmax-linear-error = 10\n\
                     max-dead-columns = inf\n";

/// A lab with a run of one branch that was evaluated, and thresholds that it keeps.
fn lab() -> Lab {
    let lab = Lab::new();
    let text = text_of(&demo("evaluation.parquet"));
    lab.quantize(&["--variant", "4bit-32g", "--eval", &text, "--eval-windows", "4"]).succeeds();
    lab.write("thresholds.toml", LOOSE);
    lab
}

fn gate(lab: &Lab, flags: &[&str]) -> Output {
    gate_with(lab, &[], flags)
}

fn gate_with(lab: &Lab, variables: &[(&str, &str)], flags: &[&str]) -> Output {
    let [run, baseline, thresholds] =
        ["out", "baseline.json", "thresholds.toml"].map(|name| text_of(&lab.path(name)));
    let mut args = vec!["gate", &run, "--baseline", &baseline];
    if !flags.contains(&"--thresholds") {
        args.extend(["--thresholds", &thresholds]);
    }
    args.extend(flags);
    lab.run_with(variables, &args)
}

/// Changes a JSON file.
fn change(path: &std::path::Path, change: impl FnOnce(&mut Value)) {
    let mut value = read_json(path);
    change(&mut value);
    write_json(path, &value);
}

#[test]
fn from_the_first_baseline_to_a_red_job() {
    let lab = lab();
    gate(&lab, &[]).fails_with(
        "error: the baseline `[LAB]/baseline.json` does not exist\nhint: write it from a good run: gptq gate RUN --baseline FILE --update",
    );
    let output = gate(&lab, &["--update"]).succeeds();
    assert!(
        output.stdout.contains("note   the baseline is this run now: [LAB]/baseline.json\n"),
        "{}",
        output.stdout
    );
    let passed = gate(&lab, &[]).succeeds();
    assert!(passed.stdout.contains(": +0.0% (") && passed.stdout.contains("\npassed: "), "{}", passed.stdout);
    let all = gate(&lab, &["-v"]).succeeds();
    let checks = all.stdout.lines().filter(|line| line.starts_with("ok     ")).count();
    assert!(checks > 15 && all.stdout.ends_with(&format!("\npassed: {checks} checks\n")), "{}", all.stdout);

    // A run that is worse.
    change(&lab.out().join("run.json"), |run| {
        let windows = run["evaluations"][0]["models"][0]["window_kl"].as_array_mut().unwrap();
        windows.iter_mut().for_each(|kl| *kl = (kl.as_f64().unwrap() * 1.5).into());
    });
    let failed = gate(&lab, &[]);
    assert_eq!((failed.code, failed.stderr.as_str()), (Some(1), ""));
    let reasons: Vec<&str> = failed.stdout.lines().filter(|line| line.starts_with("FAILED")).collect();
    assert!(
        reasons.len() == 1 && reasons[0].ends_with("at most +10.0% allowed [max-kl-growth]"),
        "{reasons:?}"
    );
    assert!(failed.stdout.ends_with(&format!("\nfailed: 1 of {checks} checks\n")), "{}", failed.stdout);
    // That is accepted, and said.
    let accepted = gate(&lab, &["--update"]).succeeds();
    assert!(
        accepted.stdout.contains("note   accepted: gptq-4bit-32g-actorder_False: KL divergence"),
        "{}",
        accepted.stdout
    );
    gate(&lab, &[]).succeeds();
}

#[test]
fn every_form_has_the_same_exit_code() {
    let lab = lab();
    let summary = text_of(&lab.path("summary.md"));
    let variables = [("GITHUB_STEP_SUMMARY", summary.as_str())];
    fs::write(&summary, "from an earlier step\n").unwrap();
    gate_with(&lab, &variables, &["--update"]).succeeds();
    let strict = lab.write("strict.toml", &format!("{LOOSE}max-size = 10\n"));
    for flags in [&[][..], &["--thresholds", &strict]] {
        let code = Some(i32::from(!flags.is_empty()));
        let form = |form: &str| gate_with(&lab, &variables, &[flags, &["--format", form]].concat());
        assert_eq!(form("text").code, code);
        let github = form("github");
        assert_eq!(
            (github.code, github.stdout.contains("::error title=gptq gate%3A max-size::")),
            (code, !flags.is_empty())
        );
        let junit = form("junit");
        assert_eq!((junit.code, junit.stdout.matches("<failure ").count()), (code, flags.len() / 2));
        let json = form("json");
        let value: Value = serde_json::from_str(&json.stdout).unwrap();
        let verdict = if flags.is_empty() { "pass" } else { "fail" };
        assert_eq!(
            (json.code, &value["verdict"], &value["schema"]),
            (code, &verdict.into(), &"gptq-gate/1".into())
        );
        assert_eq!(
            serde_json::from_str::<Value>(&gate(&lab, &[flags, &["--json"]].concat()).stdout).unwrap(),
            value
        );
    }
    let found = fs::read_to_string(&summary).unwrap();
    assert!(found.starts_with("from an earlier step\n### gptq gate: passed"), "{found}");
    assert_eq!(
        (found.matches("### gptq gate: passed").count(), found.matches("### gptq gate: failed").count()),
        (5, 4)
    );
}

#[test]
fn a_run_that_fails_or_is_incomplete_makes_no_baseline() {
    let lab = lab();
    let files = entries(&lab.path(""));
    let refused = |flags: &[&str], reason: &str, note: &str| {
        let output = gate(&lab, &[&["--update"], flags].concat());
        assert_eq!(output.code, Some(1), "{}{}", output.stdout, output.stderr);
        assert!(output.stdout.contains(reason), "{}", output.stdout);
        assert!(output.stdout.contains(&format!("note   {note}: ")), "{}", output.stdout);
    };
    let strict = lab.write("thresholds.toml", &format!("{LOOSE}max-size = 10\n"));
    refused(&["--thresholds", &strict], "at most 10 B allowed [max-size]", "no baseline was written");
    assert_eq!(entries(&lab.path("")), files);
    lab.write("thresholds.toml", LOOSE);
    gate(&lab, &["--update"]).succeeds();
    let before = fs::read(lab.path("baseline.json")).unwrap();
    let good = read_json(&lab.out().join("run.json"));
    type Damage = fn(&mut Value);
    let damages: [(Damage, &str); 4] = [
        (|run| run["evaluations"] = Value::Array(Vec::new()), "the report has no evaluation [evaluation]"),
        (|run| run["branches"] = Value::Array(Vec::new()), "the report has no branches [branches]"),
        (
            |run| run["evaluations"][0]["models"][0]["window_nll"][1] = Value::Null,
            "is missing or not a number",
        ),
        (
            |run| run["plan"]["variants"].as_array_mut().unwrap().push("2bit-32g".into()),
            "1 of 2 branches of the plan",
        ),
    ];
    for (damage, reason) in damages {
        let mut run = good.clone();
        damage(&mut run);
        write_json(&lab.out().join("run.json"), &run);
        refused(&[], reason, "the baseline was left as it was");
        assert_eq!(fs::read(lab.path("baseline.json")).unwrap(), before);
        assert_eq!(gate(&lab, &[]).code, Some(1));
    }
}

#[test]
fn the_documentation_has_every_limit_with_its_default() {
    let text = fs::read_to_string(crate::helpers::repository().join("docs/ci.md")).unwrap();
    let row = |line: &str| {
        Some(line.strip_prefix("| `")?.split_once(" |")?.0.to_owned() + "|" + line.split(" | ").nth(1)?)
    };
    let mut documented: Vec<String> = text.lines().filter_map(row).filter(|row| row.contains("`|")).collect();
    let mut expected: Vec<String> = gptq::gate::Thresholds::defaults()
        .into_iter()
        .map(|(key, default)| format!("{key}`|{default}"))
        .collect();
    documented.sort();
    expected.sort();
    assert_eq!(documented, expected);
}

#[test]
fn what_cannot_be_read_is_exit_code_2() {
    let lab = lab();
    gate(&lab, &["--update"]).succeeds();
    let bad = |flags: &[&str], error: &str| {
        let output = gate(&lab, flags);
        assert_eq!((output.code, output.stdout.as_str()), (Some(2), ""), "{}", output.stderr);
        assert!(output.stderr.starts_with(error), "{}", output.stderr);
    };
    let unknown = lab.write("unknown.toml", "max-kl-grow = 1\n");
    bad(
        &["--thresholds", &unknown],
        "error: unknown key `max-kl-grow` in `[LAB]/unknown.toml`\nhint: did you mean `max-kl-growth`?",
    );
    let negative = lab.write("negative.toml", "max-kl = -1\n");
    bad(&["--thresholds", &negative], "error: max-kl: expected a number from 0 up");
    bad(&["--thresholds", &text_of(&lab.path("none.toml"))], "error: cannot read `[LAB]/none.toml`");
    bad(&["--format", "xml"], "error: invalid value 'xml' for '--format <FORMAT>'");

    // Figures of other weights than those that are there now.
    lab.eval(&[&lab.branch()]);
    crate::safetensors_file::change(&lab.branch(), |tensors| {
        tensors.get_mut("model.norm.weight").unwrap().fill([0], 2.0);
    });
    bad(
        &[],
        "error: `[LAB]/out/gptq-4bit-32g-actorder_False/eval.json` was measured with other weights than those beside it",
    );

    fs::write(lab.path("baseline.json"), "{ \"schema\": \"gptq-baseline/1\", ").unwrap();
    fs::remove_file(lab.branch().join("eval.json")).unwrap();
    bad(&[], "error: `[LAB]/baseline.json` is not the JSON expected here: ");
    fs::copy(lab.out().join("run.json"), lab.path("baseline.json")).unwrap();
    bad(&[], "error: `[LAB]/baseline.json`: key `schema`: expected");
    fs::write(lab.out().join("run.json"), "{}").unwrap();
    bad(&[], "error: `[LAB]/out/run.json`: key `schema`: expected");
    fs::remove_file(lab.out().join("run.json")).unwrap();
    bad(&[], "error: cannot read `[LAB]/out/run.json`");
}

/// A trial on another text does not touch the gate or the card of a run; both say that it is there, and take it if asked.
#[test]
fn a_trial_on_another_text_is_left_out_and_named() {
    let lab = lab();
    gate(&lab, &["--update"]).succeeds();
    let text = lab.write("trial.txt", &"The old house stood by the river. ".repeat(60));
    let (model, branch, out) = (text_of(&lab.model()), text_of(&lab.branch()), text_of(&lab.out()));
    let args = ["eval", "--model", &model, "--quantized", &branch, "--dataset", &text];
    lab.run(&[&args[..], &["--seq-len", "32", "--windows", "3"]].concat()).succeeds();
    let passed = gate(&lab, &[]).succeeds();
    let note = "note   not judged: trial.txt, 3 windows of 32 tokens, measured of gptq-4bit-32g-actorder_False; --dataset \
                trial.txt judges it\n";
    assert!(passed.stdout.contains(note), "{}", passed.stdout);
    assert!(!passed.stdout.contains("on trial.txt"), "{}", passed.stdout);
    let trial = gate(&lab, &["--dataset", "trial.txt"]);
    assert_eq!(trial.code, Some(1));
    assert!(
        trial.stdout.contains("FAILED evaluated on trial.txt, 3 windows of 32 tokens ("),
        "{}",
        trial.stdout
    );
    assert!(
        trial.stdout.contains(", and the baseline on evaluation.parquet, 4 windows of 64 tokens ("),
        "{}",
        trial.stdout
    );
    gate(&lab, &["--dataset", "trail.txt"]).fails_with(
        "error: dataset: expected a text that was evaluated: evaluation.parquet, trial.txt, found `trail.txt`",
    );

    let card = |flags: &[&str]| {
        let name = "gptq-4bit-32g-actorder_False";
        lab.run(&[&["card", &out, "--print", name], flags].concat()).succeeds()
    };
    let own = card(&[]);
    assert!(own.stdout.contains("on evaluation.parquet, 4 windows of 64 tokens;"), "{}", own.stdout);
    assert!(!own.stdout.contains("trial.txt"), "{}", own.stdout);
    assert_eq!(
        own.stderr,
        "not on the card: trial.txt, 3 windows of 32 tokens; --dataset trial.txt takes it\n"
    );
    let asked = card(&["--dataset", "trial.txt"]);
    assert!(asked.stdout.contains("on trial.txt, 3 windows of 32 tokens;"), "{}", asked.stdout);
    assert!(asked.stderr.starts_with("not on the card: evaluation.parquet, "), "{}", asked.stderr);
}
