//! The arguments of every command.

use std::path::PathBuf;

use clap::{
    Args, Parser, Subcommand,
    builder::{PossibleValuesParser, TypedValueParser},
};
use clap_complete::Shell;
use gptq::{
    accuracy::{Quality, ScaleSearch},
    plan::{ComputeDtype, DatasetShare, OnFailure},
    variant::{Output, Variant, VariantSet},
};
use serde::de::{DeserializeOwned, IntoDeserializer, value::Error as WordError};

use super::{cache::StoredArgs, card::CardArgs, gate::GateArgs, gguf::GgufArgs, publish::PublishArgs};

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
    // `report` has a flag of this name that takes a file, so both are of the same type.
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
    /// No remarks, warnings or tables of readers: only errors and the result
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
    /// Compare runs and other checkpoints on one page, and recommend a branch
    Report(ReportArgs),
    /// Fail when a run is too far from fp16, or worse than the baseline in a file
    Gate(GateArgs),
    /// Write a branch as a GGUF file for llama.cpp, with the same codes
    Gguf(GgufArgs),
    /// Generate text with a quantized or dense model
    Generate(GenerateArgs),
    /// Show a checkpoint's architecture, format and tensors
    Inspect(InspectArgs),
    /// List or remove the unquantized models' predictions, which evaluations store
    Cache(StoredArgs),
    /// Write the model card of a run's branches
    Card(CardArgs),
    /// Publish a run's branches on the Hub or on a git remote
    Publish(PublishArgs),
    /// Quantize the built-in demo model into all four branches, verify and evaluate them
    Demo(DemoArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
    /// Write the manual pages into a folder
    #[command(hide = true)]
    Man(ManArgs),
}

#[derive(Debug, Args)]
pub(super) struct QuantizeArgs {
    /// Folder of the fp16, bf16 or fp32 checkpoint, or its repository on the Hub: OWNER/NAME[@REVISION]
    #[arg(long, value_name = "MODEL")]
    pub(super) model: PathBuf,
    /// Folder for the branches; must not exist. The same command resumes an interrupted run
    #[arg(long, value_name = "DIR")]
    pub(super) out: PathBuf,
    /// Folder for the journal, from which an interrupted run resumes [default: in --out, until the run is complete]
    #[arg(long, value_name = "DIR")]
    pub(super) journal_dir: Option<PathBuf>,
    /// Discard what an interrupted run left in --out, and start again
    #[arg(long)]
    pub(super) restart: bool,
    /// Settings from a TOML file; flags override them
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
    /// Allow windows that are longer than the model's max_position_embeddings, if its rotary embedding is scaled
    #[arg(long)]
    pub(super) allow_long_windows: bool,
    /// Where the windows begin [default: 0]
    #[arg(long, value_name = "N")]
    pub(super) seed: Option<u64>,
    /// A list of variants: card is 4bit-128g, and 32g, 64g and 128g with act order, as on the model cards of 2023; serve is
    /// 4bit-128g, 4bit-64g, 4bit-32g and 8bit-128g, for vLLM and all other maintained servers; all is both [default: card,
    /// unless --variant is given]
    #[arg(long, value_name = "SET", value_parser = words::<VariantSet>(&["card", "serve", "all"]))]
    pub(super) set: Option<VariantSet>,
    /// A variant such as 4bit-128g, 4bit-32g-act, 3bit--1g-asym, 4bit-128g-static, or a GGUF file for llama.cpp: q2_k, q3_k_m,
    /// q4_0, q4_k_m, q5_k_m, q6_k or q8_0; repeatable
    #[arg(long = "variant", value_name = "VARIANT")]
    pub(super) variants: Vec<Output>,
    /// A reader that must take every variant, e.g. vllm, sglang, transformers, gptqmodel or llama.cpp: otherwise the run is
    /// refused before any work; repeatable
    #[arg(long = "require-reader", value_name = "READER")]
    pub(super) require_readers: Vec<String>,
    /// The variant of the branch `main`, which readers load by default [default: 4bit-128g, if it is made]
    #[arg(long, value_name = "VARIANT")]
    pub(super) main: Option<Variant>,
    /// Damping as a fraction of the Hessian's mean diagonal [default: 0.01 with fast, 0.05 with standard and best]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(super) damp: Option<f64>,
    /// Preset of the accuracy options below; fast is plain GPTQ [default: standard]
    #[arg(long, value_name = "PRESET", value_parser = words::<Quality>(&["fast", "standard", "best"]))]
    pub(super) quality: Option<Quality>,
    /// Let scales be negative, so that the side of the grid with one level more can be either [default: by --quality]
    #[arg(long, conflicts_with = "unsigned_scales")]
    pub(super) signed_scales: bool,
    /// Keep all scales positive
    #[arg(long)]
    pub(super) unsigned_scales: bool,
    /// How scales are searched for [default: by --quality]
    #[arg(long, value_name = "SEARCH", value_parser = words::<ScaleSearch>(&["off", "diagonal", "block"]))]
    pub(super) scale_search: Option<ScaleSearch>,
    /// Sort features group by group in variants without act order; readers see no difference [default: by --quality]
    #[arg(long, value_name = "BOOL")]
    pub(super) act_group_aware: Option<bool>,
    /// Strength of asymmetric calibration (GPTAQ), from 0 to 1: at 1 a linear's target is its output in the unquantized
    /// model [default: by --quality]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(super) asymmetric: Option<f64>,
    /// Part of the calibration windows, from 0 to 1, on which gradients measure the cost of output errors (YAQA); rows then
    /// compensate the errors of the rows before them [default: by --quality]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(super) output_hessian: Option<f64>,
    /// Fold rotations into the weights before they are quantized, which spreads outliers and leaves the model's function
    /// unchanged [default: by --quality]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub(super) rotate: Option<bool>,
    /// Scale channels of norms and of the linears behind them against each other until they are alike in size [default: by
    /// --quality]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub(super) equalize: Option<bool>,
    /// Raise damping by the spectrum of each Hessian and the number of tokens [default: by --quality]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub(super) shrinkage: Option<bool>,
    /// Take all Hessians from the unquantized model: further variants cost little time, and some accuracy is lost
    #[arg(long)]
    pub(super) shared_hessian: bool,
    /// What to do with a linear that cannot be solved numerically: end the run, or round the linear to nearest (rtn) and
    /// report that [default: error]
    #[arg(long, value_name = "WHAT", value_parser = words::<OnFailure>(&["error", "rtn"]))]
    pub(super) on_failure: Option<OnFailure>,
    /// Data type of forward passes [default: auto]
    #[arg(long, value_name = "DTYPE", value_parser = dtypes())]
    pub(super) compute_dtype: Option<ComputeDtype>,
    /// Where to compute: auto, cpu, cuda, or several GPUs as cuda:0,cuda:1. auto is the CPU, because the CUDA code has not been
    /// tested on a GPU yet [default: auto]
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
    /// Text to evaluate the branches on: recipe, file or folder; repeatable [default: the texts that the recipes name]
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

impl Command {
    /// The device that it computes on, `cpu` where it needs no other; `None` if a plan may name it.
    pub(super) fn device(&self) -> Option<&str> {
        match self {
            Self::Quantize(args) => args.device.as_deref(),
            Self::Eval(args) => Some(&args.compute.device),
            Self::Generate(args) => Some(&args.compute.device),
            Self::Verify(args) => args.device.as_deref().or(Some("cpu")),
            _ => Some("cpu"),
        }
    }
}

/// The device that runs a model, and the data type there.
#[derive(Debug, Args)]
pub(super) struct ComputeArgs {
    /// Where to compute: auto, cpu, cuda, cuda:N. auto is the CPU, because the CUDA code has not been tested on a GPU yet
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub(super) device: String,
    /// Data type to compute in: fp32 on the CPU, fp16 or bf16 on CUDA
    #[arg(long, value_name = "DTYPE", default_value = "auto", value_parser = dtypes())]
    pub(super) compute_dtype: ComputeDtype,
}

/// The cache of the unquantized model's predictions.
#[derive(Debug, Args)]
pub(super) struct CacheArgs {
    /// Folder for the unquantized model's predictions, so that it runs once for the same text [default: gptq in
    /// $XDG_CACHE_HOME or ~/.cache]
    #[arg(long, value_name = "DIR")]
    pub(super) cache_dir: Option<PathBuf>,
    /// Neither write nor read that cache
    #[arg(long, conflicts_with = "cache_dir")]
    pub(super) no_cache: bool,
}

/// Where the files of a text are, and which part of them is read.
#[derive(Debug, Args)]
pub(super) struct TextPlaces {
    /// Folder with the recipes' files, laid out as on the Hub; repeatable. The Hugging Face cache is searched too, and a file
    /// that is in neither is fetched
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
    /// The quantized folder, or that of a run for all its branches, or OWNER/NAME[:BRANCH] on the Hub, or a GGUF file
    pub(super) dir: PathBuf,
    /// The checkpoint it was made from: measure the distance of every linear
    #[arg(long, value_name = "MODEL")]
    pub(super) against: Option<PathBuf>,
    /// Also put every linear through the int4 matmul of this device (auto, cpu, cuda, cuda:N) and compare it with fp64, on
    /// activations of a bundled text or of --dataset
    #[arg(long, value_name = "DEVICE")]
    pub(super) device: Option<String>,
    /// Data type of that matmul: fp32 on the CPU, fp16 or bf16 on CUDA
    #[arg(long, value_name = "DTYPE", default_value = "auto", value_parser = dtypes(), requires = "device")]
    pub(super) compute_dtype: ComputeDtype,
    /// A recipe (wikitext2, wikitext2-test, c4, ultrachat, smoltalk), a .parquet, .txt, .json or .jsonl file, or a folder of
    /// parquet files
    #[arg(long, value_name = "DATASET")]
    pub(super) dataset: Option<String>,
    #[command(flatten)]
    pub(super) places: TextPlaces,
}

#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    /// Folder of the unquantized checkpoint, or OWNER/NAME[@REVISION] on the Hub
    #[arg(long, value_name = "MODEL")]
    pub(super) model: PathBuf,
    /// A quantized folder, or that of a run for all its branches, or OWNER/NAME:BRANCH on the Hub, or a GGUF file; repeatable
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
    /// Allow windows that are longer than the model's max_position_embeddings, if its rotary embedding is scaled
    #[arg(long)]
    pub(super) allow_long_windows: bool,
    /// Windows, from the front of the text [default: all]
    #[arg(long, value_name = "N")]
    pub(super) windows: Option<usize>,
    /// Tokens from the start of one window to the start of the next; below --seq-len, windows overlap and only new tokens
    /// are scored [default: --seq-len]
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
    /// A quantized folder or GGUF file with figures of `gptq eval` (or its eval.json); repeatable
    #[arg(long, value_name = "DIR")]
    pub(super) quantized: Vec<PathBuf>,
    /// The unquantized checkpoint, a folder or OWNER/NAME[@REVISION] on the Hub: check that all figures are against it
    #[arg(long, value_name = "MODEL")]
    pub(super) model: Option<PathBuf>,
    /// Recommend by the figures on this text; repeatable, the first decides [default: the text that most models were
    /// evaluated on]
    #[arg(long = "dataset", value_name = "NAME")]
    pub(super) datasets: Vec<String>,
    /// Write the report as one HTML file
    #[arg(long, value_name = "FILE")]
    pub(super) html: Option<PathBuf>,
    /// Write it as Markdown that fits a comment on a pull request
    #[arg(long, value_name = "FILE")]
    pub(super) markdown: Option<PathBuf>,
    /// Write it as JSON; `-` is standard output
    // Replaces the global flag of this name, which takes no separate word.
    #[arg(id = "json", long, value_name = "FILE")]
    pub(super) _json: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// A checkpoint, dense or quantized: a folder, or that of a run for all its branches, or OWNER/NAME[:BRANCH] on the Hub, or a
    /// GGUF file
    pub(super) dir: PathBuf,
    /// List every tensor, and the metadata of a GGUF file
    #[arg(long)]
    pub(super) tensors: bool,
}

#[derive(Debug, Args)]
pub(super) struct GenerateArgs {
    /// A GPTQ checkpoint, or a dense one: a folder, or OWNER/NAME[:BRANCH] on the Hub; or a GGUF file
    pub(super) dir: PathBuf,
    /// Folder or repository with the tokenizer [default: the checkpoint]; a GGUF file needs it, such as the dense model's
    #[arg(long, value_name = "DIR")]
    pub(super) tokenizer: Option<PathBuf>,
    #[command(flatten)]
    pub(super) compute: ComputeArgs,
    /// The text to continue, or with --chat the user's message; `-` reads it from standard input
    #[arg(long, value_name = "TEXT")]
    pub(super) prompt: String,
    /// Render the prompt with the model's chat template, as the message of a user
    #[arg(long)]
    pub(super) chat: bool,
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(super) max_tokens: usize,
    /// Sampling temperature: higher makes less likely tokens more frequent; 0 always takes the most likely one
    #[arg(long, value_name = "X", default_value_t = 0.7, allow_negative_numbers = true)]
    pub(super) temperature: f64,
    /// Sample from the most likely tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 0.95, allow_negative_numbers = true)]
    pub(super) top_p: f64,
    /// Above 1, tokens that occurred before become less likely
    #[arg(long, value_name = "X", default_value_t = 1.1, allow_negative_numbers = true)]
    pub(super) repetition_penalty: f64,
    /// Seed of the sampling; the same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) seed: u64,
}

#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// Folder for the branches; must not exist [default: a temporary one]
    pub(super) out: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "In bash:  source <(gptq completions bash)")]
pub(super) struct CompletionsArgs {
    /// The shell
    pub(super) shell: Shell,
}

#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// The folder
    pub(super) dir: PathBuf,
}

fn standard_output(text: &str) -> Result<PathBuf, String> {
    if text == "-" { Ok(text.into()) } else { Err("only `report` writes its JSON to a file".into()) }
}

/// A parser of `words`, which a plan spells the same.
fn words<T>(words: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: DeserializeOwned + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(words.iter().copied())
        .try_map(|word| T::deserialize(IntoDeserializer::<WordError>::into_deserializer(word)))
}

fn dtypes() -> impl TypedValueParser<Value = ComputeDtype> {
    words(&["auto", "fp32", "bf16", "fp16"])
}

/// A smaller size is refused: its unit was probably forgotten.
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
