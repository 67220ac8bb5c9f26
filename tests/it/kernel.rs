//! `gptq verify --device`: real branches through the matmul that runs them, and what it says of wrong ones.

use gptq::{
    architectures::LinearId,
    calibration::{Corpus, CorpusSource, SourceOptions},
    checkpoint::{Checkpoint, PackedTensors},
    plan::ComputeDtype,
    progress::Silent,
    verify::{KERNEL_TOKENS, KERNEL_TOLERANCE, KernelOptions, KernelReport, check_kernels},
};
use half::f16;
use tch::Device;

use crate::{
    helpers::{DOWN, Lab, Output, demo, text_of},
    tiny_model::Model,
};

/// By how much a fault has to exceed the tolerance.
const CLEARLY: f64 = 10.0;

type Fault = (&'static str, fn(&mut PackedTensors<'_>));

/// In the data that the matmul gets; fp64 keeps to what is on disk.
const FAULTS: [Fault; 4] = [
    ("the lowest bit of a code", |t| t.qweight.to_mut()[5] ^= 1),
    ("the lowest bit of a zero point", |t| t.qzeros.to_mut()[1] ^= 1),
    ("a bit of a scale", |t| t.scales.to_mut()[3] = f16::from_bits(t.scales[3].to_bits() ^ 16)),
    ("two entries of the permutation", |t| {
        let other = t.g_idx.iter().position(|&g| g != t.g_idx[0]).expect("several groups");
        t.g_idx.to_mut().swap(0, other);
    }),
];

fn corpus() -> Corpus {
    let source = CorpusSource::resolve(&text_of(&demo("evaluation.parquet")), &SourceOptions::default());
    source.unwrap().load(None).unwrap()
}

fn check(
    checkpoint: &Checkpoint,
    device: Device,
    seen: &dyn Fn(&LinearId, &mut PackedTensors<'_>),
) -> KernelReport {
    let options = KernelOptions { device, dtype: ComputeDtype::Auto, corpus: &corpus() };
    check_kernels(checkpoint, &options, seen, &Silent).unwrap()
}

/// A branch as it is passes; with any fault in one linear that linear, and no other, is clearly off.
fn faults_show(variant: &str, device: Device) {
    let lab = Lab::with_branch(variant);
    let checkpoint = Checkpoint::open(&lab.branch()).unwrap();
    let report = check(&checkpoint, device, &|_, _| ());
    assert_eq!((report.linears.len(), &report.tokens[..]), (14, &KERNEL_TOKENS[..]));
    for linear in &report.linears {
        assert!(linear.rounding > 0.0 && linear.rounding <= KERNEL_TOLERANCE, "{variant}: {linear:?}");
    }
    let wrong = checkpoint.config().linear_id(1, 6);
    for (name, fault) in FAULTS {
        let report = check(&checkpoint, device, &|id, tensors| {
            if *id == wrong {
                fault(tensors);
            }
        });
        for linear in &report.linears {
            let right = linear.rounding <= KERNEL_TOLERANCE;
            let clear = linear.rounding > CLEARLY * KERNEL_TOLERANCE;
            assert!(
                if linear.name == wrong.to_string() { clear } else { right },
                "{variant}, {name}: {linear:?}"
            );
        }
        assert_eq!(report.worst().unwrap().name, wrong.to_string());
    }
}

#[test]
fn every_fault_shows_on_the_cpu() {
    for variant in ["4bit-32g", "4bit-48g-act", "8bit-32g-act-asym", "3bit-64g-asym"] {
        faults_show(variant, Device::Cpu);
    }
}

#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn every_fault_shows_on_a_cuda_device() {
    let device = gptq::device::resolve("cuda").unwrap().device;
    for variant in ["4bit-32g", "4bit-48g-act", "4bit-32g-act-asym"] {
        faults_show(variant, device);
    }
}

#[test]
fn verify_puts_every_linear_through_the_matmul() {
    let lab = Lab::with(&Model { biases: true, ..Model::default() });
    lab.quantize(&["--variant", "4bit-32g-act"]).succeeds();
    let flags = ["--against", &text_of(&lab.model()), "--device", "cpu"];
    let output = lab.verify(&lab.branch(), &flags).succeeds();
    let line = output.stdout.lines().nth(1).unwrap();
    assert!(
        line.starts_with("int4 matmul in fp32 on the CPU against fp64, 1/7/16/64/2048 tokens: at most 0."),
        "{line}"
    );
    assert!(line.contains(" of what rounding explains over 14 linears (model.layers."), "{line}");
    let json = lab.verify(&lab.branch(), &["--device", "cpu", "--json"]).json();
    let kernel = &json["kernel"];
    assert_eq!((&kernel["computed"], &kernel["tolerance"]), (&"fp32 on the CPU".into(), &1.0.into()));
    assert_eq!(kernel["linears"][13]["name"], DOWN);
    assert!(
        kernel["linears"].as_array().unwrap().iter().all(|l| l["relative_error"].as_f64().unwrap() < 1e-5)
    );
    // Not asked for, not done.
    assert!(lab.verify(&lab.branch(), &["--json"]).json().get("kernel").is_none());
}

#[track_caller]
fn chose_the_cpu(output: &Output) {
    assert!(output.code == Some(0) && output.device.starts_with("device auto: the CPU"), "{output:?}");
    assert_eq!(output.device.lines().count(), 1, "{output:?}");
}

#[test]
fn a_device_that_is_not_there_is_named_by_every_command() {
    if gptq::device::resolve("cuda").is_ok() {
        return; // the tests of `cuda_device` are for such a machine
    }
    let lab = Lab::with_branch("4bit-32g");
    let (branch, model) = (text_of(&lab.branch()), text_of(&lab.model()));
    let text = text_of(&demo("evaluation.parquet"));
    let commands: [&[&str]; 3] = [
        &["verify", &branch],
        &["generate", &branch, "--prompt", "The"],
        &["eval", "--model", &model, "--quantized", &branch, "--dataset", &text, "--seq-len", "64"],
    ];
    for command in commands {
        let output = lab.run(&[command, &["--device", "cuda"]].concat());
        let named = output.stderr.starts_with("error: device `cuda` cannot be used: ");
        assert!(named && output.stdout.is_empty() && output.code == Some(2), "{command:?}: {output:?}");
    }
    // What `auto`, the default, chose is printed.
    for command in &commands[1..] {
        chose_the_cpu(&lab.run(command));
    }
    chose_the_cpu(&lab.verify(&lab.branch(), &["--device", "auto"]));
    assert_eq!(lab.verify(&lab.branch(), &[]).succeeds().device, "");
    let out = text_of(&lab.path("second"));
    chose_the_cpu(&lab.quantize(&["--variant", "4bit-32g", "--out", &out]));
}

#[test]
fn a_text_that_is_too_short_and_a_kind_that_is_not_there() {
    let lab = Lab::with_branch("4bit-32g");
    let short = lab.write("short.txt", &"word ".repeat(300));
    let output = lab.verify(&lab.branch(), &["--device", "cpu", "--dataset", &short]);
    assert!(output.stderr.starts_with("error: short.txt has "), "{}", output.stderr);
    assert!(
        output.stderr.contains(" the windows (16 of 128 tokens) need at least 2048"),
        "{}",
        output.stderr
    );
    lab.verify(&lab.branch(), &["--dataset", &short])
        .fails_with("error: --dataset is the text for --device, which is not given");
    lab.verify(&lab.branch(), &["--device", "cpu", "--compute-dtype", "bf16"])
        .fails_with("error: compute-dtype: expected fp32 on the CPU, found `bf16`");
}
