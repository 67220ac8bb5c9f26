//! Ten ways to make a model worse, each of which the gate sees by default thresholds; and what it must let pass.

use std::{
    fs,
    path::{Path, PathBuf},
};

use gptq::gate::{Figures, Verdict};
use gptq::gate::{Judgement, Thresholds, judge, judge_alone, read_baseline, write_baseline};
use serde_json::Value;

use super::damage;
use crate::helpers::{Lab, copy, demo, read_json, text_of, write_json};

/// The branch that is judged.
const BRANCH: &str = "gptq-4bit-32g-actorder_True";
/// It, and what is taken for it: a branch without act order, and one in larger groups.
const VARIANTS: [&str; 3] = ["4bit-32g-act", "4bit-32g", "4bit-128g-act"];

/// Windows that each is evaluated on: enough to tell a tenth of the divergence from chance.
const EVALUATED: &str = "8";

/// Where the demo model is made worse.
struct Workshop {
    lab: Lab,
}

impl Workshop {
    /// `gptq quantize` of the demo model into `name`, with `flags`.
    fn quantize(&self, name: &str, variables: &[(&str, &str)], flags: &[&str]) -> PathBuf {
        let out = self.lab.path(name);
        let (model, out_text) = (text_of(&demo("")), text_of(&out));
        let [calibration, evaluation] =
            ["calibration.parquet", "evaluation.parquet"].map(|n| text_of(&demo(n)));
        let mut args = vec!["quantize", "--model", &model, "--out", &out_text];
        let defaults = [
            ("--dataset", calibration.as_str()),
            ("--samples", "16"),
            ("--seq-len", "512"),
            ("--compute-dtype", "fp32"),
            ("--variant", VARIANTS[0]),
        ];
        args.extend(flags);
        for (name, value) in defaults.into_iter().filter(|(name, _)| !flags.contains(name)) {
            args.extend([name, value]);
        }
        if !flags.contains(&"--no-eval") {
            args.extend(["--eval", &evaluation, "--eval-windows", EVALUATED]);
        }
        self.lab.run_with(variables, &args).succeeds();
        out
    }

    /// A run's report with branch `index` alone, called [`BRANCH`].
    fn alone(&self, name: &str, report: &Value, index: usize) -> PathBuf {
        let mut report = report.clone();
        report["plan"]["variants"] = serde_json::json!([VARIANTS[0]]);
        let mut branch = report["branches"][index].take();
        branch["branch"] = BRANCH.into();
        branch["variant"] = VARIANTS[0].into();
        report["branches"] = vec![branch].into();
        let mut model = report["evaluations"][0]["models"][index].take();
        model["name"] = BRANCH.into();
        report["evaluations"][0]["models"] = vec![model].into();
        let dir = self.lab.path(name);
        fs::create_dir(&dir).unwrap();
        write_json(&dir.join("run.json"), &report);
        dir
    }

    /// A copy of the good run whose branch was damaged afterwards; to be evaluated.
    fn damaged(&self, name: &str, good: &Path, damage: fn(&Path)) -> PathBuf {
        let dir = self.lab.path(name);
        copy(good, &dir);
        damage(&dir.join(BRANCH));
        dir
    }

    /// `gptq eval` of all these runs' branches, by the protocol of [`Workshop::quantize`].
    fn eval(&self, runs: &[&Path]) {
        let (model, text) = (text_of(&demo("")), text_of(&demo("evaluation.parquet")));
        let mut args: Vec<String> = ["eval", "--model", &model, "--dataset", &text].map(str::to_owned).into();
        args.extend(
            ["--seq-len", "512", "--windows", EVALUATED, "--compute-dtype", "fp32"].map(str::to_owned),
        );
        args.extend(runs.iter().flat_map(|run| ["--quantized".to_owned(), text_of(&run.join(BRANCH))]));
        self.lab.run(&args).succeeds();
    }
}

/// A row of the table in docs/ci.md.
fn row(what: &str, judgement: &Judgement) -> String {
    let compared = &judgement.branches[0];
    let growth = compared.growth.unwrap();
    let percent = |fraction: f64| format!("{:+.0}%", 100.0 * fraction);
    let percent = |fraction| if percent(fraction) == "-0%" { "+0%".into() } else { percent(fraction) };
    let [value, low, high] = [growth.value, growth.low, growth.high].map(percent);
    let mut checks: Vec<&str> = judgement.breaches().map(|check| check.check.as_str()).collect();
    checks.sort_unstable();
    checks.dedup();
    let checks: Vec<String> = checks.into_iter().map(|check| format!("`{check}`")).collect();
    let seen = if checks.is_empty() { "passes".into() } else { checks.join(", ") };
    format!("| {what} | {:.6} | {value} ({low} to {high}) | {seen} |", compared.kl_divergence)
}

/// The longest test of the gate: seven runs of the demo model, and sixteen branches evaluated, which share the kept
/// predictions of the unquantized model.
#[test]
#[allow(clippy::print_stdout, reason = "the table of docs/ci.md")]
fn ten_sabotages_are_seen_and_noise_is_not() {
    let workshop = Workshop { lab: Lab::empty() };
    let flags: Vec<&str> = VARIANTS.iter().flat_map(|variant| ["--variant", variant]).collect();
    let all = workshop.quantize("all", &[], &flags);
    let report = read_json(&all.join("run.json"));
    let good = workshop.alone("good", &report, 0);
    copy(&all.join(BRANCH), &good.join(BRANCH));

    let random = workshop.lab.write("random.jsonl", &damage::random_tokens());
    let damaged = |name: &str, damage: fn(&Path)| workshop.damaged(name, &good, damage);
    let sabotages = [
        ("round to nearest instead of GPTQ", "max-kl-growth", damaged("rtn", damage::round_to_nearest)),
        ("no act order", "max-kl-growth", workshop.alone("sequential", &report, 1)),
        ("groups of 128 for 32", "max-kl-growth", workshop.alone("large-groups", &report, 2)),
        ("a damp of 1", "max-kl-growth", workshop.quantize("damp", &[], &["--damp", "1"])),
        ("zeros off by one in one linear", "max-kl-growth", damaged("zeros", damage::zeros_off_by_one)),
        ("one nibble in 1000 flipped", "max-kl-growth", damaged("nibbles", damage::flipped_nibbles)),
        ("g_idx shuffled in one linear", "max-kl-growth", damaged("groups", damage::shuffled_groups)),
        ("scales rounded to bf16", "min-scale-bits", damaged("scales", damage::coarse_scales)),
        (
            "calibrated on random tokens",
            "max-kl-growth",
            workshop.quantize("random", &[], &["--dataset", &random]),
        ),
        ("one layer left out", "max-kl-growth", damaged("layer", damage::layer_without_effect)),
    ];
    let greens = [
        ("the same again", workshop.quantize("again", &[], &[])),
        ("other windows (`--seed 1`)", workshop.quantize("seed", &[], &["--seed", "1"])),
        ("one thread", workshop.quantize("thread", &[("OMP_NUM_THREADS", "1")], &[])),
        ("calibrated in bf16", workshop.quantize("bf16", &[], &["--compute-dtype", "bf16", "--no-eval"])),
    ];
    let later: Vec<&Path> = sabotages
        .iter()
        .map(|(_, _, run)| run.as_path())
        .chain([greens[3].1.as_path()])
        .filter(|run| run.join(BRANCH).exists() && !run.join(BRANCH).join("eval.json").exists())
        .filter(|run| !["damp", "random"].iter().any(|name| run.ends_with(name)))
        .collect();
    workshop.eval(&later);

    let baseline = workshop.lab.path("baseline.json");
    let thresholds = Thresholds::default();
    let figures = Figures::read(&good).unwrap();
    assert_eq!(judge_alone(&figures, &thresholds).verdict(), Verdict::Pass);
    write_baseline(&baseline, &figures).unwrap();
    let baseline = read_baseline(&baseline).unwrap();
    let judged = |run: &Path| judge(&Figures::read(run).unwrap(), &baseline, &thresholds);
    let (mut rows, mut wrong) = (Vec::new(), Vec::new());
    for (what, check, run) in &sabotages {
        let judgement = judged(run);
        rows.push(row(what, &judgement));
        if !judgement.breaches().any(|breach| breach.check == *check) {
            wrong.push(format!(
                "{what} is not seen by {check}: {:#?}",
                judgement.breaches().collect::<Vec<_>>()
            ));
        }
    }
    for (what, run) in &greens {
        let judgement = judged(run);
        rows.push(row(what, &judgement));
        wrong.extend(judgement.breaches().map(|breach| format!("{what}: {}", breach.line())));
    }
    println!("{}", rows.join("\n"));
    assert_eq!(wrong, [""; 0]);

    // Also where a layer is left out of the quantization, so that the divergence is smaller.
    let mut shorter = read_json(&good.join("run.json"));
    let linears = shorter["branches"][0]["linears"].as_array_mut().unwrap();
    linears.retain(|linear| !linear["name"].as_str().unwrap().starts_with("model.layers.1."));
    write_json(&good.join("run.json"), &shorter);
    let left_out = judged(&good);
    let reasons: Vec<String> = left_out.breaches().map(|check| check.line()).collect();
    assert!(reasons[0].ends_with("21 of 28 linears were quantized [linears]"), "{reasons:?}");
}
