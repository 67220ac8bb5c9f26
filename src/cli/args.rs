//! What can be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use gptq::{
    plan::{ComputeDtype, DatasetShare, OnFailure},
    variant::{Variant, VariantSet},
};

use super::{accuracy_args::AccuracyArgs, card::CardArgs, publish::PublishArgs};

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
    // `report` has a flag of this name that takes a file: both must be of the same type.
    #[arg(
        long,
        global = true,
        value_name = "-",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "-",
        value_parser = standard_output
    )]
    pub(super) json: Option<PathBuf>,
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
    /// Compare runs and other checkpoints on one page: which branch to take, and why
    Report(ReportArgs),
    /// Fail when a run is worse than fp16 allows, or than a baseline, which is kept in a file
    Gate(super::gate::GateArgs),
    /// Generate text with a quantized or dense model
    Generate(GenerateArgs),
    /// Say what a folder holds
    Inspect(InspectArgs),
    /// Write the model card of a run's branches
    Card(CardArgs),
    /// Publish a run's branches on the Hub or on a git remote
    Publish(PublishArgs),
    /// Quantize the built-in demo model into all four branches, verify and evaluate them
    Demo(DemoArgs),
}

#[derive(Debug, Args)]
pub(super) struct QuantizeArgs {
    /// Folder of the fp16, bf16 or fp32 checkpoint, or its repository on the Hub: OWNER/NAME[@REVISION]
    #[arg(long, value_name = "MODEL")]
    pub(super) model: PathBuf,
    /// Folder for the branches; must not exist. A run that was interrupted goes on with the same command
    #[arg(long, value_name = "DIR")]
    pub(super) out: PathBuf,
    /// Folder for what is needed to go on after an interruption [default: in --out, until the run is complete]
    #[arg(long, value_name = "DIR")]
    pub(super) journal_dir: Option<PathBuf>,
    /// Throw away what an interrupted run left in --out, and begin anew
    #[arg(long)]
    pub(super) restart: bool,
    /// Settings from a file; flags go before them
    #[arg(long, value_name = "FILE")]
    pub(super) plan: Option<PathBuf>,
    /// Calibration text: a recipe (wikitext2, c4, ultrachat, smoltalk), a .parquet, .txt, .json or .jsonl file, or a folder of
    /// parquet files; conversations go through the model's chat template. Repeatable, with a weight: wikitext2:3 chat.jsonl:1
    /// [default: wikitext2]
    #[arg(long = "dataset", value_name = "DATASET[:WEIGHT]")]
    pub(super) datasets: Vec<DatasetShare>,
    #[command(flatten)]
    pub(super) places: TextPlaces,
    /// Calibration windows [default: 128]
    #[arg(long, value_name = "N")]
    pub(super) samples: Option<usize>,
    /// Tokens a window [default: 2048]
    #[arg(long, value_name = "N")]
    pub(super) seq_len: Option<usize>,
    /// Where the windows begin [default: 0]
    #[arg(long, value_name = "N")]
    pub(super) seed: Option<u64>,
    /// A list of variants: card, the four of the model cards of 2023; serve, what vLLM and all other living servers run; all
    /// [default: card, unless --variant is given]
    #[arg(long, value_name = "SET", value_enum)]
    pub(super) set: Option<SetArg>,
    /// A variant such as 4bit-128g, 4bit-32g-act, 3bit--1g-asym, 4bit-128g-static; repeatable
    #[arg(long = "variant", value_name = "VARIANT")]
    pub(super) variants: Vec<Variant>,
    /// Damping as a fraction of the Hessian's mean diagonal [default: 0.01]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(super) damp: Option<f64>,
    #[command(flatten)]
    pub(super) accuracy: AccuracyArgs,
    /// Take all Hessians from the unquantized model: further variants cost little, and some accuracy
    #[arg(long)]
    pub(super) shared_hessian: bool,
    /// What becomes of a linear that cannot be solved for the numbers in it: error, or rtn, which rounds it to nearest and
    /// says so [default: error]
    #[arg(long, value_name = "WHAT")]
    pub(super) on_failure: Option<OnFailure>,
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
    /// Text to evaluate the branches on: recipe, file or folder; repeatable [default: what the recipes say]
    #[arg(long, value_name = "DATASET")]
    pub(super) eval: Vec<String>,
    /// Windows to evaluate on
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub(super) eval_windows: usize,
    /// Do not evaluate
    #[arg(long, conflicts_with = "eval")]
    pub(super) no_eval: bool,
    #[command(flatten)]
    pub(super) cache: CacheArgs,
}

/// [`VariantSet`] as an argument.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum SetArg {
    /// The four branches of the model cards of 2023: 4bit-128g, and 32g, 64g and 128g with act order
    Card,
    /// Sequential g_idx, for vLLM and all other living servers: 4bit-128g, 4bit-64g, 4bit-32g, 8bit-128g
    Serve,
    /// Both
    All,
}

impl From<SetArg> for VariantSet {
    fn from(set: SetArg) -> Self {
        match set {
            SetArg::Card => Self::Card,
            SetArg::Serve => Self::Serve,
            SetArg::All => Self::All,
        }
    }
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

/// Where the unquantized model's predictions are kept.
#[derive(Debug, Args)]
pub(super) struct CacheArgs {
    /// Where the unquantized model's predictions are kept, so that it is not run again for the same text [default: gptq in
    /// $XDG_CACHE_HOME or ~/.cache]
    #[arg(long, value_name = "DIR")]
    pub(super) cache_dir: Option<PathBuf>,
    /// Neither keep predictions nor use kept ones
    #[arg(long, conflicts_with = "cache_dir")]
    pub(super) no_cache: bool,
}

/// Where text comes from.
#[derive(Debug, Args)]
pub(super) struct TextArgs {
    /// A recipe (wikitext2, wikitext2-test, c4, ultrachat, smoltalk), a .parquet, .txt, .json or .jsonl file, or a folder of parquet
    /// files
    #[arg(long, value_name = "DATASET")]
    pub(super) dataset: Option<String>,
    #[command(flatten)]
    pub(super) places: TextPlaces,
}

/// Where in a text's files to look, and where for these.
#[derive(Debug, Args)]
pub(super) struct TextPlaces {
    /// Where the recipes' files lie, laid out as on the Hub; repeatable. The Hugging Face cache is always looked into,
    /// and what is nowhere is fetched
    #[arg(long, value_name = "DIR")]
    pub(super) dataset_dir: Vec<PathBuf>,
    /// Split of a folder of parquet files
    #[arg(long, value_name = "NAME")]
    pub(super) split: Option<String>,
    /// Column with the text or the messages [default: text, else messages, conversations, or prompt with completion]
    #[arg(long, value_name = "NAME")]
    pub(super) text_column: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// The quantized folder, or OWNER/NAME[:BRANCH] on the Hub
    pub(super) dir: PathBuf,
    /// The checkpoint it was made from: measure the distance of every linear
    #[arg(long, value_name = "MODEL")]
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
    /// Folder of the unquantized checkpoint, or OWNER/NAME[@REVISION] on the Hub
    #[arg(long, value_name = "MODEL")]
    pub(super) model: PathBuf,
    /// A quantized folder, or OWNER/NAME:BRANCH on the Hub; repeatable
    #[arg(long, value_name = "MODEL")]
    pub(super) quantized: Vec<PathBuf>,
    /// A recipe (wikitext2-test, wikitext2, c4, ultrachat, smoltalk), a .parquet, .txt, .json or .jsonl file, or a folder of parquet
    /// files; repeatable [default: wikitext2-test]
    #[arg(long = "dataset", value_name = "DATASET")]
    pub(super) datasets: Vec<String>,
    #[command(flatten)]
    pub(super) places: TextPlaces,
    /// Tokens a window; repeatable
    #[arg(long, value_name = "N", default_value = "2048")]
    pub(super) seq_len: Vec<usize>,
    /// Windows, from the front of the text [default: all]
    #[arg(long, value_name = "N")]
    pub(super) windows: Option<usize>,
    /// Tokens from one window's begin to the next one's; less than --seq-len, windows overlap and only new tokens are
    /// scored [default: --seq-len]
    #[arg(long, value_name = "N")]
    pub(super) stride: Option<usize>,
    /// Do not write the figures into the quantized folders (eval.json)
    #[arg(long)]
    pub(super) no_save: bool,
    #[command(flatten)]
    pub(super) cache: CacheArgs,
    /// Also write tokens and the quantized model's logits to this safetensors file; one --quantized only
    #[arg(long, value_name = "FILE")]
    pub(super) dump_logits: Option<PathBuf>,
    #[command(flatten)]
    pub(super) compute: ComputeArgs,
}

#[derive(Debug, Args)]
pub(super) struct ReportArgs {
    /// Folder of a run (or its run.json); repeatable
    #[arg(value_name = "RUN", required_unless_present = "quantized")]
    pub(super) runs: Vec<PathBuf>,
    /// A quantized folder with figures of `gptq eval` (or its eval.json); repeatable
    #[arg(long, value_name = "DIR")]
    pub(super) quantized: Vec<PathBuf>,
    /// The unquantized checkpoint, a folder or OWNER/NAME[@REVISION] on the Hub: make sure that all figures are against it
    #[arg(long, value_name = "MODEL")]
    pub(super) model: Option<PathBuf>,
    /// Write the report as one HTML file
    #[arg(long, value_name = "FILE")]
    pub(super) html: Option<PathBuf>,
    /// Write it as Markdown that fits a comment on a pull request
    #[arg(long, value_name = "FILE")]
    pub(super) markdown: Option<PathBuf>,
    /// Write it as JSON; `-` is standard output
    // In place of the global flag of this name, which takes no separate word.
    #[arg(id = "json", long, value_name = "FILE")]
    pub(super) _json: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// A checkpoint, dense or quantized: a folder, or OWNER/NAME[:BRANCH] on the Hub
    pub(super) dir: PathBuf,
    /// List every tensor
    #[arg(long)]
    pub(super) tensors: bool,
}

#[derive(Debug, Args)]
pub(super) struct GenerateArgs {
    /// A GPTQ checkpoint, or a dense one: a folder, or OWNER/NAME[:BRANCH] on the Hub
    pub(super) dir: PathBuf,
    #[command(flatten)]
    pub(super) compute: ComputeArgs,
    /// The text to continue, or with --chat the user's message; `-` reads it from standard input
    #[arg(long, value_name = "TEXT")]
    pub(super) prompt: String,
    /// Render the prompt with the model's chat template, as the message of a user
    #[arg(long)]
    pub(super) chat: bool,
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
pub(super) struct DemoArgs {
    /// Folder for the branches; must not exist [default: a temporary one]
    pub(super) out: Option<PathBuf>,
}

fn standard_output(text: &str) -> Result<PathBuf, String> {
    if text == "-" { Ok(text.into()) } else { Err("only `report` writes its JSON to a file".into()) }
}

/// A size below this is a number whose unit was forgotten.
const SMALLEST_SIZE: f64 = 1e6;

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
    let bytes = number * factor;
    if bytes.is_nan() || bytes < SMALLEST_SIZE {
        return Err(format!("{bytes} bytes are too few for anything here; did you mean {digits}GB?"));
    }
    Ok(bytes as u64)
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
    fn sizes() {
        assert_eq!(size("5GB"), Ok(5_000_000_000));
        assert_eq!(size("1.5MiB"), Ok(1_572_864));
        assert!(size("5 potatoes").is_err() && size("NaN").is_err());
        assert_eq!(size("8").unwrap_err(), "8 bytes are too few for anything here; did you mean 8GB?");
    }
}
