//! What people see: tables and lists, with the numbers of a run masked.

use crate::helpers::{Lab, demo, text_of};

/// Numbers as `0`, without sign, one space between words: sizes, errors and times of one machine are not those of
/// another.
fn masked(text: &str) -> String {
    let word = |word: &str| {
        if let Some((folder, _)) = word.split_once("/predictions-") {
            return format!("{folder}/…`");
        }
        let unsigned = word.trim_start_matches(['+', '-']);
        let mut masked = String::new();
        for c in unsigned.chars() {
            match c {
                c if !c.is_ascii_digit() => masked.push(c),
                _ if !masked.ends_with('0') => masked.push('0'),
                _ => {}
            }
        }
        masked
    };
    let line = |line: &str| line.split_whitespace().map(word).collect::<Vec<_>>().join(" ");
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn a_run_ends_with_its_tables() {
    let lab = Lab::new();
    let text = text_of(&demo("evaluation.parquet"));
    let flags = [
        "--variant",
        "4bit-32g",
        "--variant",
        "8bit-64g-static-asym",
        "--eval",
        &text,
        "--eval-windows",
        "2",
        // By default what is said of 8 bits depends on the processor.
        "--compute-dtype",
        "fp32",
    ];
    let output = lab.quantize(&flags).succeeds();
    // Two linears are about equally bad; which is worse depends on the processor.
    let table = masked(&output.stdout).replace("self_attn.q_proj", "self_attn.k_proj");
    insta::assert_snapshot!(table, @r"
    branch bits group act order size bits/weight mean error worst linear not loaded by
    gptq-0bit-0g-actorder_False 0 0 no 0.0 MB 0.0 0.0 0.0 0.self_attn.k_proj SGLang 0.0.0 and newer, mistral.rs 0.0
    gptq-0bit-0g-actorder_True-static-asym 0 0 static 0.0 MB 0.0 0.0 0.0 0.self_attn.k_proj GPTQModel 0, vLLM 0.0 and newer, SGLang 0.0.0 and newer, mistral.rs 0.0
    evaluation.parquet, 0 windows of 0 tokens
    model weights perplexity change KL divergence same top-0
    fp0 0.0
    gptq-0bit-0g-actorder_False 0.0 MB 0.0 0.0 ±0.0 0.0 ±0.0 0.0 ±0.0%
    gptq-0bit-0g-actorder_True-static-asym 0.0 MB 0.0 0.0 ±0.0 0.0 ±0.0 0.0 ±0.0%
    Protocol: evaluation.parquet, rows joined and tokenized once with the tokenizer's own BOS rule; the first 0 non-overlapping windows of 0 tokens; fp0. Perplexity is exp of the mean negative log-likelihood of each window's tokens but the first; KL(fp0 ‖ quantized) in nats and top-0 agreement are means over the same positions. ± is half the 0% interval over windows (paired for the change).
    0 branches in [LAB]/out (0.0 s)
    ");
    insta::assert_snapshot!(masked(&output.stderr), @r"
    quality standard: equalized norms, signed scales, scale search by block, group-aware order, asymmetric calibration at 0, damping by shrinkage
    layer 0/0: 0.0 s, 0.0 MB in use
    layer 0/0: 0.0 s, 0.0 MB in use
    the unquantized model's predictions are kept in `[LAB]/cache/gptq/…` (0.0 kB)
    ");
}

#[test]
fn quiet_runs_print_no_warnings_and_no_tables_of_readers() {
    let lab = Lab::new();
    // One window has fewer tokens than the widest linear has inputs.
    let few = ["--variant", "4bit-32g", "--samples", "1"];
    let loud = lab.quantize(&[&few[..], &["--out", &text_of(&lab.path("loud"))]].concat()).succeeds();
    assert!(loud.stderr.contains("warning: 64 distinct calibration tokens"), "{}", loud.stderr);
    let quiet = lab.quantize(&[&few[..], &["-q"]].concat()).succeeds();
    assert_eq!((quiet.stderr.as_str(), quiet.estimate.as_str()), ("", ""));
    let readers = |flags: &[&str]| lab.verify(&lab.branch(), flags).succeeds().stdout;
    assert!(readers(&[]).contains("llama.cpp's converter"));
    let short = readers(&["-q"]);
    assert!(short.lines().last().unwrap().starts_with("ok: ") && !short.contains("llama.cpp"), "{short}");
}

#[test]
fn inspect_says_what_a_folder_holds() {
    let lab = Lab::with_branch("4bit-32g-act");
    let quantized = lab.run(&["inspect", &text_of(&lab.branch())]).succeeds();
    insta::assert_snapshot!(quantized.stdout, @r"
    LlamaForCausalLM: 2 layers, hidden 64, intermediate 128, 2 heads (2 kv), vocabulary 4096, context 128, 1.1 MB
    GPTQ: 4 bits, group size 32, act order yes, symmetric, format gptq, 5.025 bits per weight
      transformers 5                       yes
      GPTQModel 7                          yes
      vLLM 0.30 and newer                  no: refuses act order (desc_act)
      vLLM 0.22 to 0.29                    no: needs N a multiple of 64 and K of 128, a linear here is 64 x 64
      vLLM up to 0.21                      yes
      SGLang 0.5.20 and newer              no: needs N a multiple of 64 and K of 128, a linear here is 64 x 64
      SGLang up to 0.5.19                  yes
      llama.cpp's converter                yes
      mistral.rs 0.9                       no: computes wrong results with act order
      text-generation-webui 4              no: has no loader for GPTQ since 4.0 (March 2026)
      text-generation-webui up to 3        yes
      ExLlamaV2                            yes
      ExLlama                              yes
      AutoGPTQ 0.4 to 0.7                  yes
      TGI 3                                no: needs N a multiple of 64 and K of 128, a linear here is 64 x 64
      GPTQ-for-LLaMa                       yes
      KoboldAI (Occ4m's fork)              yes
    ");
    let dense = lab.run(&["inspect", &text_of(&lab.model()), "--tensors"]).succeeds();
    let lines: Vec<&str> = dense.stdout.lines().take(4).collect();
    insta::assert_snapshot!(lines.join("\n"), @r"
    LlamaForCausalLM: 2 layers, hidden 64, intermediate 128, 2 heads (2 kv), vocabulary 4096, context 128, 1.2 MB
    not quantized
    lm_head.weight                                           F16   [4096, 64]  524.3 kB
    model.embed_tokens.weight                                F16   [4096, 64]  524.3 kB
    ");
}

#[test]
fn eval_compares_folders() {
    let lab = Lab::with_branch("4bit-32g");
    let (model, branch, text) =
        (text_of(&lab.model()), text_of(&lab.branch()), text_of(&demo("evaluation.parquet")));
    let args = [
        "eval",
        "--model",
        &model,
        "--quantized",
        &branch,
        "--dataset",
        &text,
        "--seq-len",
        "64",
        "--windows",
        "2",
    ];
    let output = lab.run(&args).succeeds();
    let kept = "the unquantized model's predictions are kept in `[LAB]/cache/gptq/…` (0.0 kB)";
    assert_eq!(masked(&output.stderr), kept);
    insta::assert_snapshot!(masked(&output.stdout), @r"
    evaluation.parquet, 0 windows of 0 tokens
    model weights perplexity change KL divergence same top-0
    fp0 0.0
    gptq-0bit-0g-actorder_False 0.0 MB 0.0 0.0 ±0.0 0.0 ±0.0 0.0 ±0.0%
    Protocol: evaluation.parquet, rows joined and tokenized once with the tokenizer's own BOS rule; the first 0 non-overlapping windows of 0 tokens; fp0. Perplexity is exp of the mean negative log-likelihood of each window's tokens but the first; KL(fp0 ‖ quantized) in nats and top-0 agreement are means over the same positions. ± is half the 0% interval over windows (paired for the change).
    ");
}

#[test]
fn commands_that_do_not_exist_are_usage_errors() {
    let lab = Lab::empty();
    let output = lab.run(&["quantise"]);
    assert_eq!((output.code, output.stdout.as_str()), (Some(2), ""));
    insta::assert_snapshot!(output.stderr, @r"
    error: unrecognized subcommand 'quantise'

      tip: a similar subcommand exists: 'quantize'

    Usage: gptq [OPTIONS] <COMMAND>

    For more information, try '--help'.
    ");
}
