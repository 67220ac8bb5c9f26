//! What can be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use gptq::{accuracy::{Quality, ScaleSearch}, plan::ComputeDtype, variant::Variant};

/// Quantize Llama checkpoints with GPTQ: calibrate, solve, pack, verify, evaluate.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) command: Command,
    #[command(flatten)]
    pub(super) output: OutputArgs,
}

/// What is printed.
#[derive(Debug, Args)]
pub(super) struct OutputArgs {
    /// Print the result as JSON on standard output
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// A line for every linear
    #[arg(short, long, global = true)]
    pub(super) verbose: bool,
    /// Only errors and the result
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(super) quiet: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Make all variants of a model in one run
    Quantize(Box<QuantizeArgs>),
    /// Check a quantized folder: tensors, ranges, checksums, and who can load it
    Verify(VerifyArgs),
    /// Compare quantized folders with the unquantized model: perplexity, KL divergence, top-1
    Eval(EvalArgs),
    /// Go on with a text, to read what a quantized (or unquantized) model says
    Generate(GenerateArgs),
    /// Say what a folder holds
    Inspect(InspectArgs),
    /// Measure solver, packing and int4 matmul against this machine's limits
    Bench(BenchArgs),
    /// Quantize the built-in demo model into all four branches, verify and evaluate them
    Demo(DemoArgs),
}

#[derive(Debug, Args)]
pub(super) struct QuantizeArgs {
    /// Folder of the fp16, bf16 or fp32 checkpoint
    #[arg(long, value_name = "DIR")]
    pub(super) model: PathBuf,
    /// Folder for the branches; must not exist
    #[arg(long, value_name = "DIR")]
    pub(super) out: PathBuf,
    /// Settings from a file; flags go before them
    #[arg(long, value_name = "FILE")]
    pub(super) plan: Option<PathBuf>,
    #[command(flatten)]
    pub(super) text: TextArgs,
    /// Calibration windows [default: 128]
    #[arg(long, value_name = "N")]
    pub(super) samples: Option<usize>,
    /// Tokens a window [default: 2048]
    #[arg(long, value_name = "N")]
    pub(super) seq_len: Option<usize>,
    /// Where the windows begin [default: 0]
    #[arg(long, value_name = "N")]
    pub(super) seed: Option<u64>,
    /// A variant such as 4bit-128g, 4bit-32g-act, 3bit--1g-asym, 4bit-128g-static, 4bit-128g-gar; repeatable
    /// [default: the model card's four]
    #[arg(long = "variant", value_name = "VARIANT")]
    pub(super) variants: Vec<Variant>,
    /// Damping as a fraction of the Hessian's mean diagonal [default: 0.01]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(super) damp: Option<f64>,
    /// How much is done for accuracy: fast (plain GPTQ), standard, best [default: standard]
    #[arg(long, value_name = "PRESET")]
    pub(super) quality: Option<Quality>,
    /// Keep all scales positive
    #[arg(long)]
    pub(super) unsigned_scales: bool,
    /// How scales are searched for: off, diagonal, block [default: what the preset says]
    #[arg(long, value_name = "SEARCH")]
    pub(super) scale_search: Option<ScaleSearch>,
    /// Take all Hessians from the unquantized model: further variants cost little, and some accuracy
    #[arg(long)]
    pub(super) shared_hessian: bool,
    /// What forward passes are computed in: auto, fp32, bf16, fp16 [default: auto]
    #[arg(long, value_name = "DTYPE")]
    pub(super) compute_dtype: Option<ComputeDtype>,
    /// Where to compute: cpu, cuda, cuda:0,cuda:1, or auto [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    pub(super) device: Option<String>,
    /// Memory to use at most, e.g. 8GiB; activations that do not fit go to disk [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(super) max_memory: Option<u64>,
    /// Memory of each CUDA device to use at most; activations that do not fit go to memory [default: what is free]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(super) max_device_memory: Option<u64>,
    /// Largest weights file, e.g. 5GB [default: 10GB]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(super) max_shard_size: Option<u64>,
    /// Text to evaluate the branches on: recipe, file or folder [default: what the recipe says]
    #[arg(long, value_name = "DATASET")]
    pub(super) eval: Option<String>,
    /// Windows to evaluate on
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub(super) eval_windows: usize,
    /// Do not evaluate
    #[arg(long, conflicts_with = "eval")]
    pub(super) no_eval: bool,
}

/// Where a model is run, and in what.
#[derive(Debug, Args)]
pub(super) struct ComputeArgs {
    /// Where to compute: auto, cpu, cuda, cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub(super) device: String,
    /// What to compute in: auto, fp32, bf16, fp16; fp32 on the CPU, fp16 or bf16 on CUDA
    #[arg(long, value_name = "DTYPE", default_value_t = ComputeDtype::Auto)]
    pub(super) compute_dtype: ComputeDtype,
}

/// Where text comes from.
#[derive(Debug, Args)]
pub(super) struct TextArgs {
    /// A recipe (wikitext2, wikitext2-test, c4), a .parquet, .txt or .jsonl file, or a folder of parquet files
    #[arg(long, value_name = "DATASET")]
    pub(super) dataset: Option<String>,
    /// Where the recipes' files lie, laid out as on the Hub; repeatable. The Hugging Face cache is always looked into
    #[arg(long, value_name = "DIR")]
    pub(super) dataset_dir: Vec<PathBuf>,
    /// Split of a folder of parquet files
    #[arg(long, value_name = "NAME")]
    pub(super) split: Option<String>,
    /// Column with the text [default: text]
    #[arg(long, value_name = "NAME")]
    pub(super) text_column: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// The quantized folder
    pub(super) dir: PathBuf,
    /// The checkpoint it was made from: measure the distance of every linear
    #[arg(long, value_name = "DIR")]
    pub(super) against: Option<PathBuf>,
    /// Also put every linear through the int4 matmul of this device (auto, cpu, cuda, cuda:N) and compare it with fp64, on
    /// activations of a bundled text or of --dataset
    #[arg(long, value_name = "DEVICE")]
    pub(super) device: Option<String>,
    /// What that matmul computes in: auto, fp32, bf16, fp16; fp32 on the CPU, fp16 or bf16 on CUDA
    #[arg(long, value_name = "DTYPE", default_value_t = ComputeDtype::Auto, requires = "device")]
    pub(super) compute_dtype: ComputeDtype,
    #[command(flatten)]
    pub(super) text: TextArgs,
}

#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    /// Folder of the unquantized checkpoint
    #[arg(long, value_name = "DIR")]
    pub(super) model: PathBuf,
    /// A quantized folder; repeatable
    #[arg(long, value_name = "DIR")]
    pub(super) quantized: Vec<PathBuf>,
    #[command(flatten)]
    pub(super) text: TextArgs,
    /// Tokens a window
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub(super) seq_len: usize,
    /// Windows, from the front of the text [default: all]
    #[arg(long, value_name = "N")]
    pub(super) windows: Option<usize>,
    /// Also write tokens and the quantized model's logits to this safetensors file; one --quantized only
    #[arg(long, value_name = "FILE")]
    pub(super) dump_logits: Option<PathBuf>,
    #[command(flatten)]
    pub(super) compute: ComputeArgs,
}

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// A checkpoint folder, dense or quantized
    pub(super) dir: PathBuf,
    /// List every tensor
    #[arg(long)]
    pub(super) tensors: bool,
}

#[derive(Debug, Args)]
pub(super) struct GenerateArgs {
    /// Folder of a GPTQ checkpoint, or of a dense one
    pub(super) dir: PathBuf,
    #[command(flatten)]
    pub(super) compute: ComputeArgs,
    /// The text to go on with
    #[arg(long, value_name = "TEXT")]
    pub(super) prompt: String,
    /// Tokens to make at most
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(super) max_tokens: usize,
    /// How far less likely tokens have a chance; 0 takes the most likely one always
    #[arg(long, value_name = "X", default_value_t = 0.7, allow_negative_numbers = true)]
    pub(super) temperature: f64,
    /// Draw from the most likely tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 0.95, allow_negative_numbers = true)]
    pub(super) top_p: f64,
    /// Above 1: tokens that occurred become less likely
    #[arg(long, value_name = "X", default_value_t = 1.1, allow_negative_numbers = true)]
    pub(super) repetition_penalty: f64,
    /// Same seed, same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) seed: u64,
}

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// What to measure
    pub(super) what: BenchKind,
    /// Output and input features, N,K
    #[arg(long, value_name = "N,K", default_value = "4096,11008", value_parser = shape)]
    pub(super) shape: (usize, usize),
    /// The variant that is solved, packed or multiplied
    #[arg(long, default_value = "4bit-128g")]
    pub(super) variant: Variant,
    /// Repetitions; the fastest counts, of the matmul on CUDA the median
    #[arg(long, default_value_t = 5)]
    pub(super) repeat: usize,
    /// Where to measure solver and matmul: auto, cpu, cuda, cuda:N; on CUDA for the shape and for it turned around
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub(super) device: String,
    /// Also write the figures as JSON to this file
    #[arg(long, value_name = "FILE")]
    pub(super) out: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum BenchKind {
    /// Hessian, factorization and solve
    Solver,
    /// Codes to 32-bit words
    Pack,
    /// Packed weights times activations
    Matmul,
}

#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// Folder for the branches; must not exist [default: a temporary one]
    pub(super) out: Option<PathBuf>,
}

fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor: f64 = match &text[digits.len()..] {
        "" | "B" => 1.0,
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "MiB" => 1024.0 * 1024.0,
        "GiB" => 1024.0 * 1024.0 * 1024.0,
        unit => return Err(format!("unknown unit `{unit}`; use MB, GB, MiB or GiB")),
    };
    let number: f64 = digits.parse().map_err(|_| "expected a size such as 5GB".to_owned())?;
    Ok((number * factor) as u64)
}

fn shape(text: &str) -> Result<(usize, usize), String> {
    let parsed =
        text.split_once(',').and_then(|(n, k)| Some((n.trim().parse().ok()?, k.trim().parse().ok()?)));
    parsed.filter(|&(n, k): &(usize, usize)| n > 0 && k > 0).ok_or("expected N,K such as 4096,11008".into())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_and_shapes() {
        assert_eq!(size("5GB"), Ok(5_000_000_000));
        assert_eq!(size("1.5MiB"), Ok(1_572_864));
        assert!(size("5 potatoes").is_err());
        assert_eq!(shape("4096,11008"), Ok((4096, 11008)));
        assert!(shape("4096").is_err() && shape("0,8").is_err());
    }
}
