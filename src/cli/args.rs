//! The arguments of every command.

use std::path::{Path, PathBuf};

use clap::{
    ArgAction, Args, Parser, Subcommand,
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

/// Quantize language models with GPTQ, and check, compare and publish the results.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, after_help = START)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) command: Command,
    #[command(flatten)]
    pub(super) output: OutputArgs,
}

/// Place of the options that all commands have, in lists of options: after the command's own.
const LAST: usize = 900;

/// What a newcomer does first.
const START: &str = "First steps:
  gptq demo                               try it on a built-in model
  gptq quantize --model FOLDER --out RUN  quantize a model of your own
  gptq report RUN --html report.html      see which result to take";

// Headings of the options of `quantize`.
const TEXT: &str = "Calibration text";
const VARIANTS: &str = "Variants";
const ACCURACY: &str = "Accuracy";
const MACHINE: &str = "Devices and memory";
const EVALUATION: &str = "Evaluation";

/// Options of the output.
#[derive(Debug, Args)]
pub(super) struct OutputArgs {
    /// Print the result as JSON on standard output
    // `report` has an option of this name that takes a file, so the flag's value is a path too.
    #[arg(long, global = true, display_order = LAST, action = ArgAction::SetTrue, value_parser = standard_output)]
    json: Option<PathBuf>,
    /// Print a line for every linear, that is for every weight matrix of a layer
    #[arg(short, long, global = true, display_order = LAST)]
    pub(super) verbose: bool,
    /// Print only errors and the result, without progress and warnings
    #[arg(short, long, global = true, display_order = LAST, conflicts_with = "verbose")]
    pub(super) quiet: bool,
}

impl OutputArgs {
    /// Prints errors only.
    pub(super) fn silent() -> Self {
        Self { json: None, verbose: false, quiet: true }
    }

    /// The place of the JSON, if it was requested: a file, or `-` for standard output.
    pub(super) fn json(&self) -> Option<&Path> {
        self.json.as_deref().filter(|path| !path.as_os_str().is_empty())
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Make GPTQ branches and GGUF files of a model
    Quantize(Box<QuantizeArgs>),
    /// Check quantized models, and list the programs that load them
    Verify(VerifyArgs),
    /// Measure perplexity and KL divergence of quantized models against the unquantized one
    Eval(EvalArgs),
    /// Compare the results of runs and of other tools, and recommend one
    Report(ReportArgs),
    /// Fail if a run is worse than a baseline or than fixed limits
    Gate(GateArgs),
    /// Convert a branch to a GGUF file for llama.cpp without changing its codes
    Gguf(GgufArgs),
    /// Generate text with a quantized or unquantized model
    Generate(GenerateArgs),
    /// Show a checkpoint's architecture, format and tensors
    Inspect(InspectArgs),
    /// List or remove the predictions of unquantized models that `eval` stores
    Cache(StoredArgs),
    /// Write the model card of a run's branches
    Card(CardArgs),
    /// Publish a run's branches to the Hub or to a git remote
    Publish(PublishArgs),
    /// Quantize, verify and evaluate the built-in demo model
    Demo(DemoArgs),
    /// Print the completion script of a shell
    Completions(CompletionsArgs),
    /// Write the manual pages into a folder
    #[command(hide = true)]
    Man(ManArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "Example:  gptq quantize --model Llama-2-7b-hf --out Llama-2-7B-GPTQ --set serve")]
pub(super) struct QuantizeArgs {
    /// The fp16, bf16 or fp32 model: a folder, or OWNER/NAME[@REVISION] on the Hub
    #[arg(long, value_name = "MODEL")]
    pub(super) model: PathBuf,
    /// Folder for the results; must not exist. The same command resumes an interrupted run
    #[arg(long, value_name = "DIR")]
    pub(super) out: PathBuf,
    /// Folder for the state that an interrupted run resumes from [default: in --out]
    #[arg(long, value_name = "DIR")]
    pub(super) journal_dir: Option<PathBuf>,
    /// Discard the state of an interrupted run in --out, and start again
    #[arg(long)]
    pub(super) restart: bool,
    /// TOML file with settings; options on the command line override them
    #[arg(long, value_name = "FILE")]
    pub(super) plan: Option<PathBuf>,
    /// A recipe (wikitext2, c4, ultrachat, smoltalk), a .parquet, .txt, .json or .jsonl file, or a folder of parquet files;
    /// repeatable. Several texts share the windows, by weight if given: wikitext2:3 chat.jsonl:1. The model's chat template
    /// renders conversations [default: wikitext2]
    #[arg(long = "dataset", value_name = "DATASET[:WEIGHT]", help_heading = TEXT)]
    pub(super) datasets: Vec<DatasetShare>,
    #[command(flatten, next_help_heading = TEXT)]
    pub(super) places: TextPlaces,
    /// Number of windows [default: 128]
    #[arg(long, value_name = "N", help_heading = TEXT)]
    pub(super) samples: Option<usize>,
    /// Tokens of a window [default: 2048]
    #[arg(long, value_name = "N", help_heading = TEXT)]
    pub(super) seq_len: Option<usize>,
    /// Allow windows longer than the model's max_position_embeddings, if its rotary embedding is scaled
    #[arg(long, help_heading = TEXT)]
    pub(super) allow_long_windows: bool,
    /// Seed of the windows' positions in the text [default: 0]
    #[arg(long, value_name = "N", help_heading = TEXT)]
    pub(super) seed: Option<u64>,
    /// A list of variants. card: 4bit-128g, and 4bit-32g-act, 4bit-64g-act and 4bit-128g-act. serve: 4bit-128g, 4bit-64g,
    /// 4bit-32g and 8bit-128g, which every maintained server loads. all: both [default: card, unless --variant is given]
    #[arg(long, value_name = "SET", help_heading = VARIANTS, value_parser = words::<VariantSet>(&["card", "serve", "all"]))]
    pub(super) set: Option<VariantSet>,
    /// A branch, {2,3,4,8}bit-{16..1024 or -1}g[-act|-static][-asym], such as 4bit-32g-act; or a GGUF file: q2_k, q3_k_m, q4_0,
    /// q4_k_m, q5_k_m, q6_k or q8_0. g: input features that share a scale, -1 for all. act: quantize columns by falling
    /// activation size. static: the same, with a sequential g_idx. asym: a zero point for each group. Repeatable
    #[arg(long = "variant", value_name = "VARIANT", help_heading = VARIANTS)]
    pub(super) variants: Vec<Output>,
    /// A program that must load every variant, such as vllm, sglang, transformers, gptqmodel or llama.cpp. A variant that it
    /// does not load is an error before the run begins. Repeatable
    #[arg(long = "require-reader", value_name = "READER", help_heading = VARIANTS)]
    pub(super) require_readers: Vec<String>,
    /// The variant of branch `main`, which programs load by default [default: 4bit-128g, if it is made]
    #[arg(long, value_name = "VARIANT", help_heading = VARIANTS)]
    pub(super) main: Option<Variant>,
    /// Preset of all options below. fast: plain GPTQ. best: more accurate than standard, and slower [default: standard]
    #[arg(long, value_name = "PRESET", help_heading = ACCURACY, value_parser = words::<Quality>(&["fast", "standard", "best"]))]
    pub(super) quality: Option<Quality>,
    /// Damping, as a fraction of the mean of the Hessian's diagonal [default: 0.01 with fast, 0.05 with standard and best]
    #[arg(long, value_name = "X", help_heading = ACCURACY, allow_negative_numbers = true)]
    pub(super) damp: Option<f64>,
    /// Allow negative scales, so that the extra level of the grid can be on either side of zero [default: by --quality]
    #[arg(long, help_heading = ACCURACY, conflicts_with = "unsigned_scales")]
    pub(super) signed_scales: bool,
    /// Keep all scales positive
    #[arg(long, help_heading = ACCURACY)]
    pub(super) unsigned_scales: bool,
    /// Search for the scales with the smallest error. off: take the range of a group's weights. block: compare smaller
    /// ones by the Hessian of the group [default: by --quality]
    #[arg(long, value_name = "SEARCH", help_heading = ACCURACY, value_parser = words::<ScaleSearch>(&["off", "block"]))]
    pub(super) scale_search: Option<ScaleSearch>,
    /// Group-aware order, in variants without act order: sort columns within groups, and groups among each other. g_idx stays
    /// sequential [default: by --quality]
    #[arg(long, value_name = "BOOL", help_heading = ACCURACY)]
    pub(super) act_group_aware: Option<bool>,
    /// Strength of asymmetric calibration (GPTAQ), from 0 to 1: at 1 each linear approximates its output in the unquantized
    /// model [default: by --quality]
    #[arg(long, value_name = "X", help_heading = ACCURACY, allow_negative_numbers = true)]
    pub(super) asymmetric: Option<f64>,
    /// Share of the calibration windows, from 0 to 1, whose gradients weigh the errors of outputs (YAQA) and the tokens
    /// [default: by --quality]
    #[arg(long, value_name = "X", help_heading = ACCURACY, allow_negative_numbers = true)]
    pub(super) output_hessian: Option<f64>,
    /// Fold rotations into the weights. They spread outliers, and the model's function stays the same [default: by --quality]
    #[arg(long, value_name = "BOOL", help_heading = ACCURACY, num_args = 0..=1, default_missing_value = "true")]
    pub(super) rotate: Option<bool>,
    /// Move scale between outlier channels of norms and the linears that read them. The model's function stays the same
    /// [default: by --quality]
    #[arg(long, value_name = "BOOL", help_heading = ACCURACY, num_args = 0..=1, default_missing_value = "true")]
    pub(super) equalize: Option<bool>,
    /// Raise the damping of Hessians that come from few tokens [default: by --quality]
    #[arg(long, value_name = "BOOL", help_heading = ACCURACY, num_args = 0..=1, default_missing_value = "true")]
    pub(super) shrinkage: Option<bool>,
    /// Compute one set of Hessians, from the unquantized model, for all variants: faster, and less accurate
    #[arg(long, help_heading = ACCURACY)]
    pub(super) shared_hessian: bool,
    /// If the Hessian of a linear has no solution: stop with an error, or round the linear to nearest (rtn) and report it
    /// [default: error]
    #[arg(long, value_name = "WHAT", help_heading = ACCURACY, value_parser = words::<OnFailure>(&["error", "rtn"]))]
    pub(super) on_failure: Option<OnFailure>,
    /// Data type of forward passes. auto: on the CPU bf16 if it has instructions for it, but fp32 for asymmetric calibration of
    /// 8-bit variants; on CUDA fp16 or bf16 [default: auto]
    #[arg(long, value_name = "DTYPE", help_heading = MACHINE, value_parser = dtypes())]
    pub(super) compute_dtype: Option<ComputeDtype>,
    /// auto, cpu, cuda, or several GPUs as cuda:0,cuda:1. auto is the CPU, because no test of the CUDA code has run on a GPU
    /// yet [default: auto]
    #[arg(long, value_name = "DEVICE", help_heading = MACHINE)]
    pub(super) device: Option<String>,
    /// Limit of memory, such as 8GiB; activations that do not fit go to disk [default: no limit]
    #[arg(long, value_name = "SIZE", help_heading = MACHINE, value_parser = size)]
    pub(super) max_memory: Option<u64>,
    /// Limit of memory of each CUDA device; activations that do not fit go to main memory [default: what is free]
    #[arg(long, value_name = "SIZE", help_heading = MACHINE, value_parser = size)]
    pub(super) max_device_memory: Option<u64>,
    /// Size of the largest weights file of a branch, such as 5GB [default: 10GB]
    #[arg(long, value_name = "SIZE", help_heading = VARIANTS, value_parser = size)]
    pub(super) max_shard_size: Option<u64>,
    /// Text for the evaluation of the branches: a recipe, file or folder; repeatable [default: the test text of each recipe]
    #[arg(long, value_name = "DATASET", help_heading = EVALUATION)]
    pub(super) eval: Vec<String>,
    /// Number of windows to evaluate on
    #[arg(long, value_name = "N", help_heading = EVALUATION, default_value_t = 16)]
    pub(super) eval_windows: usize,
    /// Do not evaluate the branches
    #[arg(long, help_heading = EVALUATION, conflicts_with = "eval")]
    pub(super) no_eval: bool,
    #[command(flatten, next_help_heading = EVALUATION)]
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
    /// auto, cpu, cuda or cuda:N. auto is the CPU, because no test of the CUDA code has run on a GPU yet
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub(super) device: String,
    /// Data type of the computation: fp32 on the CPU, fp16 or bf16 on CUDA
    #[arg(long, value_name = "DTYPE", default_value = "auto", value_parser = dtypes())]
    pub(super) compute_dtype: ComputeDtype,
}

/// The cache of the unquantized model's predictions.
#[derive(Debug, Args)]
pub(super) struct CacheArgs {
    /// Folder that keeps predictions of the unquantized model, for later evaluations on the same text [default: gptq in
    /// $XDG_CACHE_HOME or ~/.cache]
    #[arg(long, value_name = "DIR")]
    pub(super) cache_dir: Option<PathBuf>,
    /// Do not read or store these predictions
    #[arg(long, conflicts_with = "cache_dir")]
    pub(super) no_cache: bool,
}

/// Place of a text's files, and the part of them to read.
#[derive(Debug, Args)]
pub(super) struct TextPlaces {
    /// Folder with the recipes' files, laid out as on the Hub; repeatable. The program downloads files that are neither here nor in the
    /// Hugging Face cache
    #[arg(long, value_name = "DIR")]
    pub(super) dataset_dir: Vec<PathBuf>,
    /// Split of a folder of parquet files
    #[arg(long, value_name = "NAME")]
    pub(super) split: Option<String>,
    /// Column with the text or the messages [default: text, messages, conversations, or prompt and completion]
    #[arg(long, value_name = "NAME")]
    pub(super) text_column: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:  gptq verify Llama-2-7B-GPTQ/main --against Llama-2-7b-hf")]
pub(super) struct VerifyArgs {
    /// A branch, the folder of a run for all its branches, OWNER/NAME[:BRANCH] on the Hub, or a GGUF file
    pub(super) dir: PathBuf,
    /// The unquantized model: measure the distance of every linear from it
    #[arg(long, value_name = "MODEL")]
    pub(super) against: Option<PathBuf>,
    /// Also run the int4 matmul of this device (auto, cpu, cuda, cuda:N) on every linear, and compare it with fp64. Its inputs
    /// are activations of a built-in text, or of --dataset
    #[arg(long, value_name = "DEVICE")]
    pub(super) device: Option<String>,
    /// Data type of that matmul: fp32 on the CPU, fp16 or bf16 on CUDA
    #[arg(long, value_name = "DTYPE", default_value = "auto", value_parser = dtypes(), requires = "device")]
    pub(super) compute_dtype: ComputeDtype,
    /// Text for --device: a recipe (wikitext2, wikitext2-test, c4, ultrachat, smoltalk), a .parquet, .txt, .json or .jsonl file,
    /// or a folder of parquet files
    #[arg(long, value_name = "DATASET")]
    pub(super) dataset: Option<String>,
    #[command(flatten)]
    pub(super) places: TextPlaces,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:  gptq eval --model Llama-2-7b-hf --quantized Llama-2-7B-GPTQ --windows 16")]
pub(super) struct EvalArgs {
    /// The unquantized model: a folder, or OWNER/NAME[@REVISION] on the Hub
    #[arg(long, value_name = "MODEL")]
    pub(super) model: PathBuf,
    /// A branch, the folder of a run for all its branches, OWNER/NAME:BRANCH on the Hub, or a GGUF file; repeatable
    #[arg(long, value_name = "MODEL")]
    pub(super) quantized: Vec<PathBuf>,
    /// A recipe (wikitext2-test, wikitext2, c4, ultrachat, smoltalk), a .parquet, .txt, .json or .jsonl file, or a folder of parquet
    /// files; repeatable [default: wikitext2-test]
    #[arg(long = "dataset", value_name = "DATASET")]
    pub(super) datasets: Vec<String>,
    #[command(flatten)]
    pub(super) places: TextPlaces,
    /// Tokens of a window; repeatable
    #[arg(long, value_name = "N", default_value = "2048")]
    pub(super) seq_len: Vec<usize>,
    /// Allow windows that are longer than the model's max_position_embeddings, if its rotary embedding is scaled
    #[arg(long)]
    pub(super) allow_long_windows: bool,
    /// Number of windows, from the start of the text [default: all]
    #[arg(long, value_name = "N")]
    pub(super) windows: Option<usize>,
    /// Distance between the starts of windows, in tokens. Below --seq-len windows overlap, and each token counts once [default:
    /// --seq-len]
    #[arg(long, value_name = "N")]
    pub(super) stride: Option<usize>,
    /// Do not write the figures to eval.json in the branches
    #[arg(long)]
    pub(super) no_save: bool,
    #[command(flatten)]
    pub(super) cache: CacheArgs,
    /// Also write tokens and the quantized model's logits to this safetensors file; for a single --quantized
    #[arg(long, value_name = "FILE")]
    pub(super) dump_logits: Option<PathBuf>,
    #[command(flatten)]
    pub(super) compute: ComputeArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:  gptq report Llama-2-7B-GPTQ --html report.html")]
pub(super) struct ReportArgs {
    /// The folder of a run, or its run.json; repeatable
    #[arg(value_name = "RUN", required_unless_present = "quantized")]
    pub(super) runs: Vec<PathBuf>,
    /// A quantized folder or GGUF file that `gptq eval` has measured, or its eval.json; repeatable
    #[arg(long, value_name = "DIR")]
    pub(super) quantized: Vec<PathBuf>,
    /// The unquantized model, a folder or OWNER/NAME[@REVISION] on the Hub: require that all figures compare with it
    #[arg(long, value_name = "MODEL")]
    pub(super) model: Option<PathBuf>,
    /// Text whose figures to show; repeatable, and the first decides the recommendation [default: the text of most
    /// evaluations]
    #[arg(long = "dataset", value_name = "NAME")]
    pub(super) datasets: Vec<String>,
    /// Write the report as one HTML file
    #[arg(long, value_name = "FILE")]
    pub(super) html: Option<PathBuf>,
    /// Write the report as Markdown that fits a comment on a pull request
    #[arg(long, value_name = "FILE")]
    pub(super) markdown: Option<PathBuf>,
    /// Write the report as JSON; `-` is standard output
    // Replaces the global flag of this name, which takes no separate word.
    #[arg(id = "json", long, value_name = "FILE")]
    pub(super) _json: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// A model, quantized or not: a folder, the folder of a run for all its branches, OWNER/NAME[:BRANCH] on the Hub, or a GGUF
    /// file
    pub(super) dir: PathBuf,
    /// List every tensor, and the metadata of a GGUF file
    #[arg(long)]
    pub(super) tensors: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:  gptq generate Llama-2-7B-GPTQ/main --prompt \"The old house\"")]
pub(super) struct GenerateArgs {
    /// A model, quantized or not: a folder, OWNER/NAME[:BRANCH] on the Hub, or a GGUF file
    pub(super) dir: PathBuf,
    /// Folder or repository with the tokenizer [default: the model]. A GGUF file needs it
    #[arg(long, value_name = "DIR")]
    pub(super) tokenizer: Option<PathBuf>,
    #[command(flatten)]
    pub(super) compute: ComputeArgs,
    /// Text to continue, or with --chat the user's message; `-` reads it from standard input
    #[arg(long, value_name = "TEXT")]
    pub(super) prompt: String,
    /// Render the prompt with the model's chat template, as a user's message
    #[arg(long)]
    pub(super) chat: bool,
    /// Largest number of tokens
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(super) max_tokens: usize,
    /// Sampling temperature: higher gives more varied text, 0 always takes the most likely token
    #[arg(long, value_name = "X", default_value_t = 0.7, allow_negative_numbers = true)]
    pub(super) temperature: f64,
    /// Sample only from the most likely tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 0.95, allow_negative_numbers = true)]
    pub(super) top_p: f64,
    /// Above 1, tokens of the text so far become less likely
    #[arg(long, value_name = "X", default_value_t = 1.1, allow_negative_numbers = true)]
    pub(super) repetition_penalty: f64,
    /// Seed of the sampling: the same seed gives the same text
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

/// The value of the flag `--json`, which is `true` if the flag is there.
fn standard_output(text: &str) -> Result<PathBuf, String> {
    Ok(if text == "true" { "-".into() } else { PathBuf::new() })
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
