//! `scripts/gpu-check run` without a GPU: its order, its lines, its JSON and the README's section, with programs and figures that
//! are made up (`tests/gpu_check_made_up`).

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, process::Command};

use crate::helpers::repository;

const STEPS: [&str; 20] = [
    "tests-solver",
    "tests-product",
    "tests-models",
    "memcheck-solver",
    "memcheck-product",
    "racecheck-solver",
    "racecheck-product",
    "solver-fast",
    "solver-standard",
    "plain-loop",
    "product",
    "make-model",
    "four-branches",
    "make-small-model",
    "best-one",
    "best-other",
    "same-bytes",
    "verify",
    "two-devices",
    "in-6GiB",
];

struct Run {
    folder: tempfile::TempDir,
    code: i32,
    stdout: String,
}

/// Runs the script on made-up programs, with further variables.
fn run(parts: &[&str], variables: &[(&str, &str)]) -> Run {
    let folder = tempfile::tempdir().unwrap();
    let made_up = repository().join("tests/gpu_check_made_up");
    let bin = folder.path().join("bin");
    fs::create_dir(&bin).unwrap();
    for name in
        ["gptq", "cuda-bench", "lib-tests", "it-tests", "compute-sanitizer", "nvidia-smi", "make-llama"]
    {
        fs::copy(made_up.join("program"), bin.join(name)).unwrap();
        fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let out = folder.path().join("out");
    let output = Command::new(repository().join("scripts/gpu-check"))
        .arg("run")
        .arg(&out)
        .args(parts)
        .env("GPTQ_GPU_CHECK_BIN", &bin)
        .env("GPTQ_MADE_UP", &made_up)
        .env("GPTQ_MADE_UP_CALLS", folder.path().join("calls"))
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let code = output.status.code().unwrap_or(-1);
    assert!(output.stderr.is_empty() || code != 0, "{}", String::from_utf8_lossy(&output.stderr));
    Run { folder, code, stdout }
}

impl Run {
    fn json(&self) -> serde_json::Value {
        let text = fs::read_to_string(self.json_path()).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    fn json_path(&self) -> PathBuf {
        self.folder.path().join("out/gpu-check.json")
    }

    /// Names of steps, as their lines were printed.
    fn steps(&self) -> Vec<&str> {
        let steps = self.stdout.lines().filter(|line| line.contains(" s  "));
        steps.filter_map(|line| line.split(' ').next()).collect()
    }
}

#[test]
fn gpu_check_runs_its_steps_in_order_and_gathers_them() {
    let run = run(&[], &[]);
    assert_eq!(run.code, 0, "{}", run.stdout);
    assert_eq!(run.steps(), STEPS);
    let calls = fs::read_to_string(run.folder.path().join("calls")).unwrap();
    for call in [
        "gptq quantize --model",
        "--device cuda --quality standard",
        "--device cuda:0,cuda:0 --samples 16 --variant 4bit-128g --variant 4bit-32g",
        "--max-device-memory 6GiB",
        "--tool racecheck --error-exitcode 9",
    ] {
        assert!(calls.contains(call), "{call}: {calls}");
    }
    let json = run.json();
    let names: Vec<&str> =
        json["steps"].as_array().unwrap().iter().map(|step| step["step"].as_str().unwrap()).collect();
    assert_eq!(names, STEPS);
    assert_eq!(json["device"], "made-up GPU");
    assert_eq!(json["runs"]["four-branches"]["device_memory_peak_mib"], 20480);
    assert_eq!(json["runs"]["four-branches"]["estimate_mib"], 18406);

    // The README's section.
    let readme = run.folder.path().join("README.md");
    fs::write(&readme, "before\n<!-- gpu -->\nold\n<!-- end of gpu -->\nbehind\n").unwrap();
    let table = Command::new(repository().join("scripts/gpu-check-table"))
        .arg("--readme")
        .args([&run.json_path(), &readme])
        .output()
        .unwrap();
    assert!(table.status.success(), "{}", String::from_utf8_lossy(&table.stderr));
    let text = fs::read_to_string(&readme).unwrap();
    for line in [
        "before\n<!-- gpu -->\n\n**GPU.** On one made-up GPU, driver 0.0 (made up), ",
        "20 of 20 steps passed.",
        "| 7B's shape, four branches, `standard` | 123 s | at most 150 s |",
        "| solve 4096 × 11008, `standard` | 11.1 ms, the plain loop 987 ms | |",
        "| int4 product 4096 × 11008, 1 tokens | 81% of a copy's bandwidth | 75% |",
        "| int4 product 4096 × 11008, 2048 tokens | 72% of cuBLAS in fp16 | 70% |",
        "| device memory of four-branches | 20480 MiB, estimated 18406 MiB | |",
        "| two runs with `--quality best` | equal bytes | equal |",
        "<!-- end of gpu -->\nbehind\n",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    assert!(!text.contains("old") && !text.contains("256 tokens"), "{text}");
}

#[test]
fn gpu_check_names_what_fails_and_goes_on() {
    let run = run(&["tests", "bytes"], &[("GPTQ_MADE_UP_FAILS", "memcheck")]);
    assert_eq!(run.code, 1, "{}", run.stdout);
    assert!(
        run.stdout.contains("memcheck-solver             0 s  FAILED (3)\nmade up to fail"),
        "{}",
        run.stdout
    );
    assert!(run.stdout.contains("racecheck-product           0 s  ok"), "{}", run.stdout);
    assert!(run.stdout.contains("not memcheck-solver, memcheck-product."), "{}", run.stdout);
    assert!(!run.steps().contains(&"product") && run.steps().contains(&"same-bytes"), "{}", run.stdout);
}

#[test]
fn gpu_check_ends_in_time() {
    let run = run(&["solver", "product"], &[("GPTQ_GPU_CHECK_SECONDS", "0")]);
    assert_eq!(run.code, 1, "{}", run.stdout);
    assert!(
        run.stdout.contains("product                     0 s  LEFT OUT: the time is over"),
        "{}",
        run.stdout
    );
    assert!(!fs::read_to_string(run.folder.path().join("calls")).unwrap().contains("matmul"));
}

#[test]
fn gpu_check_knows_its_parts() {
    let run = run(&["bench"], &[]);
    assert_eq!(run.code, 2, "{}", run.stdout);
}
