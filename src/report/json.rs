//! The report of a run: the data of `run.json`.

use std::path::Path;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{Evaluation, ReaderReport, SplitReport};
use crate::{
    accuracy::AccuracyOptions,
    calibration::Provenance,
    error::{Error, Result},
    folder::{self, TEXT_LIMIT},
    plan::Plan,
    variant::Output,
};

/// The report's file in the output folder.
pub const REPORT_FILE: &str = "run.json";

/// Version of the file; it rises when a reader of older reports could misread a newer one.
pub const REPORT_SCHEMA: &str = "gptq-run/2";

/// `gptq 0.1.0`.
pub const GENERATED_BY: &str = concat!("gptq ", env!("CARGO_PKG_VERSION"));

/// One run of `gptq quantize`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`REPORT_SCHEMA`].
    pub schema: String,
    /// `gptq 0.1.0`.
    pub generated_by: String,
    /// The command, word by word; of paths only the last name. Empty when the library was used without the program.
    pub command: Vec<String>,
    /// The plan.
    pub plan: Plan,
    /// The accuracy options that the plan turned on.
    #[serde(default)]
    #[serde(alias = "refinements")]
    pub accuracy: AccuracyOptions,
    /// The source model.
    pub model: ModelReport,
    /// The calibration text.
    pub calibration: CalibrationReport,
    /// Device and data type; of an interrupted run, those of its last part.
    pub compute: ComputeReport,
    /// The parts of a run that was interrupted and resumed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub resumed: Vec<LayersComputed>,
    /// The branches, in the plan's order.
    pub branches: Vec<BranchReport>,
    /// Deviations from the plan.
    pub warnings: Vec<String>,
    /// The whole run, without evaluation.
    pub seconds: f64,
    /// Seconds of these that the journal took; flushing to the disk beside the computation is not counted.
    pub journal_seconds: f64,
    /// Seconds of each layer, all variants.
    pub layer_seconds: Vec<f64>,
    /// What the ranks of a run of several processes exchanged, layer by layer; empty in a run of one process.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exchanges: Vec<LayerExchange>,
    /// Time of each stage.
    pub stage_seconds: StageSeconds,
    /// Time and arithmetic of each phase of the work on layers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<PhaseReport>,
    /// Memory of each stage.
    #[serde(default)]
    pub stage_memory_bytes: StageMemory,
    /// Largest resident memory during the run, bytes; none where the system does not report it.
    pub peak_memory_bytes: Option<u64>,
    /// Quality of the branches, if it was measured: one for each text and protocol.
    pub evaluations: Vec<Evaluation>,
}

impl Report {
    /// Reads a [`REPORT_FILE`].
    ///
    /// # Errors
    /// When it is not there, not JSON, or of another schema.
    pub fn read(path: &Path) -> Result<Self> {
        read_schema(path, REPORT_SCHEMA)
    }
}

/// Reads a JSON file with a key `schema`; another schema is refused before anything else is parsed.
pub(crate) fn read_schema<T: DeserializeOwned>(path: &Path, schema: &str) -> Result<T> {
    let text = folder::read(path, TEXT_LIMIT)?;
    let json = |source| Error::Json { path: path.into(), source };
    let value: Value = serde_json::from_slice(&text).map_err(json)?;
    match value.get("schema").and_then(Value::as_str) {
        Some(found) if found == schema => serde_json::from_slice(&text).map_err(json),
        found => Err(Error::Config {
            path: path.into(),
            key: "schema".into(),
            expected: format!("`{schema}`"),
            found: found.map_or_else(|| "none".into(), |found| format!("`{found}`")),
        }),
    }
}

/// A value for each stage of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Stages<T> {
    /// Reading weights, forward passes and Hessians.
    pub calibrating: T,
    /// Factorizing Hessians and solving linears.
    pub solving: T,
    /// Packing and writing linears.
    pub packing: T,
    /// Writing all other files, syncing, reopening and checking.
    pub finishing: T,
}

/// Time of each stage, seconds, summed over devices that work at the same time: the sum can exceed the run's own time.
pub type StageSeconds = Stages<f64>;

/// Largest resident memory during each stage, bytes, sampled fifty times a second; none where the system does not report it.
/// Where devices work at the same time, a sample counts for the stage that began last.
pub type StageMemory = Stages<Option<u64>>;

/// What the ranks of a run exchanged in a layer: measured, and computed from shapes before the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerExchange {
    /// From 0.
    pub layer: usize,
    /// Bytes that each rank sent to the next one.
    pub sent_bytes: Vec<u64>,
    /// The most of these, as computed.
    pub computed_bytes: u64,
    /// How often all ranks waited for each other.
    pub barriers: u64,
    /// The same, as computed.
    pub computed_barriers: u64,
    /// Seconds that each rank waited for messages.
    pub waited_seconds: Vec<f64>,
}

/// A phase of the work on layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Gradients of the unquantized model, for output Hessians.
    Gradients,
    /// Weights: reading, converting, dequantizing.
    Weights,
    /// Activations: reading and writing them, in memory and on disk, and copies to a device.
    Activations,
    /// Forward passes.
    Forward,
    /// Accumulating Hessians.
    Hessian,
    /// Accumulating cross-covariances with the reference model.
    CrossCovariance,
    /// The lengths of the linears' outputs, which their errors are relative to.
    OutputEnergy,
    /// Factorizing Hessians.
    Factorization,
    /// The targets of asymmetric calibration.
    Targets,
    /// Scales and codes, the search for scales included.
    Solve,
    /// Packing linears, and writing them.
    Pack,
}

/// Time and arithmetic of a phase, summed over devices that work at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PhaseReport {
    /// Which.
    pub phase: Phase,
    /// Seconds.
    pub seconds: f64,
    /// Floating-point operations of its matrix products; 0 where there are none.
    pub operations: f64,
    /// `operations / seconds` over the speed of libtorch's largest matrix products on the same CPU, measured after the run.
    /// None on other devices, and in phases without products.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of_limit: Option<f64>,
}

/// The source model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelReport {
    /// Its folder's name, or its repository's.
    pub name: String,
    /// Its repository on the Hub, if it was fetched from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<ModelSource>,
    /// Decoder layers.
    pub layers: usize,
    /// Linears of the decoder layers, those of experts too; all are quantized. None in reports of older versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linears: Option<usize>,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Parameters in all tensors.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
}

/// A model's place on the Hub.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelSource {
    /// `owner/name`.
    pub repository: String,
    /// The commit.
    pub commit: String,
    /// Whether its files are only for users who accepted conditions; none without a request to the Hub.
    pub gated: Option<bool>,
}

/// The calibration text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CalibrationReport {
    /// The texts.
    #[serde(alias = "source", deserialize_with = "one_or_many")]
    pub sources: Vec<SourceReport>,
    /// SHA-256 of the windows' token ids as little-endian 32-bit integers.
    pub sha256: String,
    /// Windows.
    pub samples: usize,
    /// Tokens a window.
    pub seq_len: usize,
}

/// One calibration text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceReport {
    /// Source of the text: recipe or file name, repository, revision, files and their digests.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Windows drawn from it; none in reports of versions that took one text.
    #[serde(default)]
    pub samples: Option<usize>,
    /// Tokens of the whole text; none when its rows were tokenized as they were drawn.
    #[serde(default)]
    pub text_tokens: Option<usize>,
}

impl CalibrationReport {
    /// `wikitext2`, or `wikitext2 + chat.jsonl`.
    pub fn names(&self) -> String {
        let names: Vec<&str> = self.sources.iter().map(|source| source.provenance.dataset.as_str()).collect();
        names.join(" + ")
    }
}

/// Reads a list, or the single text that older versions wrote without a list.
fn one_or_many<'de, D: serde::Deserializer<'de>>(
    from: D,
) -> std::result::Result<Vec<SourceReport>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany {
        Many(Vec<SourceReport>),
        One(Box<SourceReport>),
    }
    Ok(match OneOrMany::deserialize(from)? {
        OneOrMany::Many(many) => many,
        OneOrMany::One(one) => vec![*one],
    })
}

/// Device and data type of a computation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ComputeReport {
    /// `cpu`.
    pub device: String,
    /// The solver: `cpu`.
    pub solver: String,
    /// `fp32` or `bf16`, of the forward passes.
    pub dtype: String,
    /// Number of threads.
    pub threads: usize,
}

/// Consecutive layers that were computed without an interruption.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayersComputed {
    /// Index of the first, from 0.
    pub first: usize,
    /// Number of layers.
    pub count: usize,
    /// Device and data type.
    pub compute: ComputeReport,
}

/// One branch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BranchReport {
    /// Its folder and git branch.
    pub branch: String,
    /// Its variant.
    pub variant: Output,
    /// Bytes of all files.
    pub bytes: u64,
    /// Bytes of all tensors.
    pub weight_bytes: u64,
    /// Bits per quantized weight, with scales, zeros and group indices.
    pub bits_per_weight: f64,
    /// Significant bits that the scales of each linear use, of the linear that uses the fewest; read from what was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_bits: Option<u32>,
    /// Seconds of factorizing, solving and packing; the time of a factorization that several variants use is divided among them.
    pub seconds: f64,
    /// Which software loads it.
    pub readers: Vec<ReaderReport>,
    /// Over how many GPUs software can split it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tensor_parallel: Vec<SplitReport>,
    /// Every linear, in the order in which they were solved.
    pub linears: Vec<LinearReport>,
}

/// One linear.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinearReport {
    /// `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// `‖(W−Ŵ)X‖/‖WX‖` on the calibration tokens.
    pub relative_error: f64,
    /// Damping used, as a fraction of the mean Hessian diagonal.
    pub damp: f64,
    /// Number of times that damping was raised.
    pub damp_raised: u32,
    /// Input features that are zero for all calibration tokens.
    pub dead_columns: usize,
    /// Largest over median diagonal element of the Hessian, without dead features; 0 when all are dead.
    pub outlier_ratio: f64,
    /// A lower bound of the condition number of the damped Hessian: the square of the largest over the smallest diagonal
    /// element of its Cholesky factor. 0 if there is no factor.
    pub condition_estimate: f64,
    /// Seconds of factorizing and solving.
    pub seconds: f64,
    /// Output features that are rounded to nearest, because compensation would have made their error larger.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub uncompensated_features: usize,
    /// Why it was rounded to nearest instead of solved, if it was; only with `--on-failure rtn`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
    /// Calibration tokens that the router sent to it, of an expert's linears.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

impl Report {
    /// Every linear that was rounded to nearest instead of solved, with its branch and the reason.
    pub fn fallbacks(&self) -> impl Iterator<Item = (&str, &str, &str)> {
        self.branches.iter().flat_map(|branch| {
            branch.linears.iter().filter_map(|l| Some((&*branch.branch, &*l.name, l.fallback.as_deref()?)))
        })
    }
}
