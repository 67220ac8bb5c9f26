//! Whole models on a CUDA device against the CPU. `scripts/gpu-check` runs these; without a device they fail.

use gptq::{
    calibration::{CorpusSource, SourceOptions, Tokenizer, Tokens, Windows},
    checkpoint::Checkpoint,
    model::{Compute, Decoder, Runner},
};
use tch::{Device, Kind, Tensor};

use crate::helpers::{Lab, Output, demo, text_of};

/// Tokens of a window.
const SEQ_LEN: usize = 128;
/// Largest difference of a logit that fp16 activations over the demo model's layers explain; logits have a standard
/// deviation of about 2. bf16 has 8 times the unit roundoff.
const FP16_LOGITS: f64 = 0.05;

fn cuda() -> Device {
    gptq::device::resolve("cuda").expect("a CUDA device").device
}

/// The demo model and some branches of it.
fn branches(variants: &[&str]) -> Lab {
    let lab = Lab::empty();
    let model = text_of(&demo(""));
    let mut flags = vec!["--model", &model];
    flags.extend(variants.iter().flat_map(|variant| ["--variant", variant]));
    lab.quantize(&flags).succeeds();
    lab
}

fn folders(lab: &Lab) -> Vec<std::path::PathBuf> {
    crate::helpers::entries(&lab.out())
        .into_iter()
        .map(|n| lab.out().join(n))
        .filter(|p| p.is_dir())
        .collect()
}

fn logits(checkpoint: &Checkpoint, windows: &Windows, compute: Compute) -> Tensor {
    let runner = Runner::open(checkpoint, SEQ_LEN, compute).unwrap();
    let hidden = runner.hidden_states(windows.ids(), SEQ_LEN, || ()).unwrap();
    let logits: Vec<Tensor> = hidden.iter().map(|batch| runner.logits(batch).unwrap()).collect();
    Tensor::cat(&logits, 0).to_device(Device::Cpu)
}

#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_logits_are_those_of_the_cpu() {
    // Before libtorch computes anything on the CPU.
    let device = cuda();
    let lab = branches(&["4bit-128g", "4bit-32g-act", "8bit-64g-asym", "3bit-128g"]);
    let corpus = CorpusSource::resolve(&text_of(&demo("evaluation.parquet")), &SourceOptions::default());
    let corpus = corpus.unwrap().load(None).unwrap();
    let tokenizer = Tokenizer::open(&demo("")).unwrap();
    for dir in folders(&lab).into_iter().chain([demo("")]) {
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let tokens = Tokens::new(&corpus, &tokenizer, checkpoint.config().vocab_size).unwrap();
        let windows = Windows::sequential(&tokens, SEQ_LEN, Some(4)).unwrap();
        let expected = logits(&checkpoint, &windows, Compute::CPU);
        for (kind, limit) in [(Kind::Half, FP16_LOGITS), (Kind::BFloat16, 8.0 * FP16_LOGITS)] {
            let found = logits(&checkpoint, &windows, Compute { device, kind });
            let difference = (&found - &expected).abs().max().double_value(&[]);
            assert!(difference < limit, "{}: {kind:?} logits differ by {difference}", dir.display());
            assert!(difference > 0.0, "another computation");
            // Token by token, all layers on the device.
            let runner = Runner::open(&checkpoint, SEQ_LEN, Compute { device, kind }).unwrap();
            let layers = 0..checkpoint.config().num_layers();
            let packed: Vec<_> = layers.map(|layer| runner.packed_layer(layer).unwrap()).collect();
            let mut decoder = Decoder::new(&runner, &packed, SEQ_LEN).unwrap();
            let ids = windows.window(0);
            let mut last = decoder.advance(&ids[..40]).unwrap();
            for position in 40..60 {
                let right = expected.get(0).get(position as i64 - 1);
                let difference = (Tensor::from_slice(&last) - right).abs().max().double_value(&[]);
                assert!(difference < limit, "{}: decoded {kind:?} logits: {difference}", dir.display());
                last = decoder.advance(&ids[position..=position]).unwrap();
            }
        }
    }
}

fn said(lab: &Lab, dir: &str, device: &str) -> Output {
    let flags = ["generate", dir, "--prompt", "The", "--max-tokens", "24", "--temperature", "0"];
    lab.run(&[&flags[..], &["--repetition-penalty", "1", "--device", device]].concat()).succeeds()
}

#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_says_the_same_words() {
    let lab = branches(&["4bit-128g", "4bit-32g-act", "3bit-128g"]);
    for dir in folders(&lab).iter().map(|dir| text_of(dir)).chain([text_of(&demo(""))]) {
        let on_device = said(&lab, &dir, "cuda");
        assert_eq!(on_device.stdout, said(&lab, &dir, "cpu").stdout, "{dir}");
        assert!(on_device.stderr.contains("cuda:0: about "), "{}", on_device.stderr);
        // What does not run on the kernels is told.
        assert_eq!(on_device.stderr.contains("multiplied as dense fp16"), dir.contains("3bit"));
    }
}

#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_evaluates_and_verifies() {
    let lab = branches(&["4bit-32g-act"]);
    let (model, text) = (text_of(&demo("")), text_of(&demo("evaluation.parquet")));
    let branch = text_of(&folders(&lab)[0]);
    let eval = |device: &str| {
        let flags = ["eval", "--model", &model, "--quantized", &branch, "--dataset", &text, "--windows", "8"];
        lab.run(&[&flags[..], &["--seq-len", "256", "--json", "--device", device]].concat()).json()
    };
    let (cpu, cuda) = (eval("cpu"), eval("cuda"));
    let figure = |of: &serde_json::Value| of["models"][0]["perplexity"]["value"].as_f64().unwrap();
    let relative = figure(&cuda) / figure(&cpu) - 1.0;
    assert!(relative.abs() < 0.002, "perplexity {} and {}", figure(&cuda), figure(&cpu));
    let output = lab.run(&["verify", &branch, "--against", &model, "--device", "cuda"]).succeeds();
    assert!(output.stdout.contains("int4 matmul in fp16 on cuda:0 against fp64"), "{}", output.stdout);
}
