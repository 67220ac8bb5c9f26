//! `scripts/gpu-check run` without a GPU: its order, its lines, its JSON and the README's section, with programs and figures that
//! are made up (`tests/gpu_check_made_up`).

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use crate::helpers::repository;

const STEPS: [&str; 20] = [
    "tests-solver",
    "tests-product",
    "tests-models",
    "memcheck",
    "racecheck",
    "solver-fast",
    "solver-standard",
    "plain-loop",
    "product",
    "make-model",
    "four-branches",
    "one-branch",
    "make-small-model",
    "best-one",
    "best-other",
    "same-bytes",
    "verify",
    "two-devices",
    "in-6GiB",
    "memory-estimate",
];

struct Run {
    folder: tempfile::TempDir,
    code: i32,
    stdout: String,
}

fn made_up() -> PathBuf {
    repository().join("tests/gpu_check_made_up")
}

/// A folder of made-up programs with these names.
fn programs(folder: &Path, names: &[&str]) -> PathBuf {
    let bin = folder.join("bin");
    fs::create_dir(&bin).unwrap();
    for name in names {
        fs::copy(made_up().join("program"), bin.join(name)).unwrap();
        fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    bin
}

/// Runs the script on made-up programs, with further variables.
fn run(parts: &[&str], variables: &[(&str, &str)]) -> Run {
    let folder = tempfile::tempdir().unwrap();
    let made_up = made_up();
    let names =
        ["gptq", "cuda-bench", "lib-tests", "it-tests", "compute-sanitizer", "nvidia-smi", "make-llama"];
    let bin = programs(folder.path(), &names);
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
        in_order(steps.filter_map(|line| line.split(' ').next()).collect())
    }
}

/// Puts the first steps, which run at the same time, into the order of [`STEPS`].
fn in_order(mut steps: Vec<&str>) -> Vec<&str> {
    let place = |step: &&str| STEPS[..5].iter().position(|name| name == step);
    let together = steps.iter().take_while(|step| place(step).is_some()).count();
    steps[..together].sort_by_key(place);
    steps
}

#[test]
fn gpu_check_runs_its_steps_in_order_and_gathers_them() {
    let run = run(&[], &[("LD_LIBRARY_PATH", "/driver")]);
    assert_eq!(run.code, 0, "{}", run.stdout);
    let libraries = fs::read_to_string(run.folder.path().join("out/device.log")).unwrap();
    assert_eq!(libraries, format!("{}:/driver\n", run.folder.path().join("bin").display()));
    assert_eq!(run.steps(), STEPS);
    let calls = fs::read_to_string(run.folder.path().join("calls")).unwrap();
    for call in [
        "gptq quantize --model",
        "--device cuda --quality standard --variant 4bit-128g",
        "--device cuda:0,cuda:0 --samples 16 --variant 4bit-128g --variant 4bit-32g",
        "--max-device-memory 6GiB",
        "--tool racecheck --error-exitcode 9",
    ] {
        assert!(calls.contains(call), "{call}: {calls}");
    }
    let json = run.json();
    let steps = json["steps"].as_array().unwrap();
    assert_eq!(in_order(steps.iter().map(|step| step["step"].as_str().unwrap()).collect()), STEPS);

    // Four branches have their time when every step before them takes all of its own.
    let at_most = |names: &[&str]| -> u64 {
        let steps = steps.iter().filter(|step| names.contains(&step["step"].as_str().unwrap()));
        steps.map(|step| step["at_most"].as_u64().unwrap()).sum()
    };
    let together = STEPS[..3].iter().map(|&step| at_most(&[step])).max().unwrap().max(at_most(&STEPS[3..5]));
    let device = 30; // the check of the device, which is not a step
    assert!(device + together + at_most(&STEPS[5..9]) <= 260);
    assert!(260 + at_most(&["make-model", "four-branches"]) <= 525);
    assert_eq!(json["device"], "made-up GPU");
    assert_eq!(json["runs"]["four-branches"]["device_memory_peak_mib"], 18000);
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
        "| 7B's shape, one branch, `standard` | 123 s | at most 60 s |",
        "| solve 4096 × 11008, `standard` | 11.1 ms, the plain loop 987 ms | |",
        "| int4 product 4096 × 11008, 1 tokens | 81% of a copy's bandwidth | 75% |",
        "| int4 product 4096 × 11008, 2048 tokens | 52% of cuBLAS in fp16 | 70% |\n\
         | the same by wgmma | 72% of cuBLAS in fp16 | 70% |",
        "| device memory of four-branches | 18000 MiB, estimated 18406 MiB | |",
        "| device memory of in-6GiB | 18000 MiB, estimated 18406 MiB | at most the estimate |",
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
        run.stdout.contains("memcheck                    0 s  FAILED (3)\nmade up to fail"),
        "{}",
        run.stdout
    );
    assert!(run.stdout.contains("racecheck                   0 s  ok"), "{}", run.stdout);
    assert!(run.stdout.contains("not memcheck."), "{}", run.stdout);
    assert!(!run.steps().contains(&"product") && run.steps().contains(&"same-bytes"), "{}", run.stdout);
}

#[test]
fn gpu_check_compares_the_bytes_of_two_runs() {
    let run = run(&["bytes"], &[("GPTQ_MADE_UP_DIFFERS", "1")]);
    assert_eq!(run.code, 1, "{}", run.stdout);
    assert!(run.stdout.contains("not same-bytes.") && run.stdout.contains("| different bytes | equal |"));
}

#[test]
fn gpu_check_fails_when_a_run_takes_more_memory_than_estimated() {
    let run = run(&["memory"], &[("GPTQ_MADE_UP_PEAK", "19407")]);
    assert_eq!(run.code, 1, "{}", run.stdout);
    assert!(
        run.stdout.contains("FAILED (1)\n18407 MiB of device memory, estimated 18406 MiB\n"),
        "{}",
        run.stdout
    );
}

/// What does not depend on the step that failed still runs.
#[test]
fn gpu_check_goes_on_after_any_step_that_fails() {
    for (fails, left_out) in [
        ("gptq quantize", &["memory-estimate"][..]),
        ("make-llama", &[&STEPS[10..12], &STEPS[13..]].concat()),
        ("lib-tests", &[]),
        ("cuda-bench solver --repeat 3", &[]),
    ] {
        let run = run(&[], &[("GPTQ_MADE_UP_FAILS", fails)]);
        assert_eq!(run.code, 1, "{}", run.stdout);
        let expected = STEPS.iter().filter(|step| !left_out.contains(step));
        let mut steps = run.steps();
        steps.dedup(); // the next part tries to make the model again
        assert!(expected.eq(&steps), "{fails}: {steps:?}");
        assert_eq!(run.json()["driver"], "0.0 (made up)", "{fails}");
    }
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

/// Runs `pack` with a made-up cargo.
fn pack(variables: &[(&str, &str)]) -> (tempfile::TempDir, Output) {
    let folder = tempfile::tempdir().unwrap();
    let bin = programs(folder.path(), &["cargo", "strip"]);
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let output = Command::new(repository().join("scripts/gpu-check"))
        .arg("pack")
        .arg(folder.path().join("packed.tar.xz"))
        .env("PATH", path)
        .env("GPTQ_MADE_UP", made_up())
        .env("GPTQ_MADE_UP_CALLS", folder.path().join("calls"))
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    (folder, output)
}

#[test]
fn gpu_check_packs_its_programs() {
    let (folder, output) = pack(&[]);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let file = folder.path().join("packed.tar.xz");
    let list = Command::new("tar").arg("-tJf").arg(&file).output().unwrap();
    let mut names: Vec<String> = text(&list.stdout).lines().map(str::to_owned).collect();
    names.sort();
    assert_eq!(names, ["bin/", "bin/cuda-bench", "bin/gptq", "bin/it-tests", "bin/lib-tests"]);
    let bytes = fs::metadata(&file).unwrap().len();
    assert!(text(&output.stdout).ends_with(&format!("packed.tar.xz: {bytes} bytes\n")));
    let calls = fs::read_to_string(folder.path().join("calls")).unwrap();
    assert!(calls.contains("cargo build --quiet --release") && calls.contains("strip "), "{calls}");
}

#[test]
fn gpu_check_refuses_a_pack_that_is_too_large_or_not_whole() {
    let refused = |variables: &[(&str, &str)]| {
        let (folder, output) = pack(variables);
        assert_eq!(output.status.code(), Some(2));
        assert!(!folder.path().join("packed.tar.xz").exists(), "nothing is left to be carried");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let error = refused(&[("GPTQ_GPU_CHECK_BYTES", "100")]);
    assert!(error.starts_with("error: the programs have "), "{error}");
    let numbers = error.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok());
    let [packed, tracked, 100] = numbers.collect::<Vec<u64>>()[..] else { panic!("{error}") };
    // They count together; packed again, the programs have a few bytes more or less.
    refused(&[("GPTQ_GPU_CHECK_BYTES", &(tracked.max(packed) + tracked.min(packed) / 2).to_string())]);
    let error = refused(&[("GPTQ_MADE_UP_NO_BENCH", "1")]);
    assert!(error.contains("error: cargo built no program for cuda-bench"), "{error}");
}
