//! The figures of a run that the gate checks and a baseline holds.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    error::Result,
    report::{
        EVALUATION_FILE, EVALUATION_SCHEMA, REPORT_FILE, REPORT_SCHEMA, check_weights_beside,
        choice::{Candidate, taken},
        read_schema, title,
    },
};

/// The figures of a run. They are read leniently: a figure that is missing, or `null` because it was NaN, is `None`, and
/// the gate's checks report it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Figures {
    /// [`REPORT_SCHEMA`], or that of baselines.
    pub schema: String,
    /// `gptq 0.1.0`.
    pub generated_by: String,
    /// The source model.
    pub model: ModelFigures,
    /// The plan's settings: `damp`, `samples`, …
    pub plan: BTreeMap<String, Value>,
    /// The calibration text.
    pub calibration: CalibrationFigures,
    /// Device and data type of the computation.
    pub compute: ComputeFigures,
    /// The branches.
    pub branches: Vec<BranchFigures>,
    /// The whole run, without evaluation.
    pub seconds: Option<f64>,
    /// Largest resident memory, bytes.
    pub peak_memory_bytes: Option<f64>,
    /// Quality of the branches on each text.
    pub evaluations: Vec<EvaluationFigures>,
}

/// The source model.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelFigures {
    /// Its folder's name.
    pub name: String,
    /// Decoder layers.
    pub layers: usize,
    /// Linears of the decoder layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub linears: Option<usize>,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Parameters in all tensors.
    pub parameters: u64,
}

/// The calibration windows.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct CalibrationFigures {
    /// SHA-256 of their token ids.
    pub sha256: String,
}

/// Device and data type of the computation.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ComputeFigures {
    /// `cpu`.
    pub device: String,
    /// `fp32` or `bf16`, of the forward passes.
    pub dtype: String,
    /// Threads.
    pub threads: usize,
}

/// One branch.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct BranchFigures {
    /// Its folder and git branch.
    pub branch: String,
    /// `4bit-32g-act`.
    pub variant: String,
    /// Bytes of all files.
    pub bytes: Option<f64>,
    /// Significant bits that the scales of each linear use, of the linear that uses the fewest.
    pub scale_bits: Option<f64>,
    /// Every linear.
    pub linears: Vec<LinearFigures>,
}

/// One linear.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LinearFigures {
    /// `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// `‖(W−Ŵ)X‖/‖WX‖` on the calibration tokens.
    pub relative_error: Option<f64>,
    /// Number of times that damping rose.
    #[serde(skip_serializing)]
    pub damp_raised: Option<u32>,
    /// Input features that are zero for all calibration tokens.
    #[serde(skip_serializing)]
    pub dead_columns: Option<u32>,
    /// Why it was rounded to nearest instead of solved, if it was.
    #[serde(skip_serializing)]
    pub fallback: Option<String>,
}

/// Quality of the branches on one text.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct EvaluationFigures {
    /// Recipe or file name of the text.
    pub dataset: String,
    /// SHA-256 of the windows' token ids.
    pub sha256: String,
    /// Digest of the unquantized model's tensors.
    pub model_digest: String,
    /// Data type and device of the computation.
    pub compute: String,
    /// Windows.
    pub windows: usize,
    /// Tokens a window.
    pub seq_len: usize,
    /// Tokens from the start of one window to the start of the next.
    pub stride: usize,
    /// Tokens scored in each window.
    pub window_tokens: Vec<usize>,
    /// Mean negative log-likelihood of each window under the unquantized model, nats.
    pub window_nll: Numbers,
    /// The branches.
    pub models: Vec<EvaluatedFigures>,
    /// Whether it is in the branches' folders alone, and not in the run's report.
    #[serde(skip)]
    pub beside: bool,
}

/// One evaluated branch: means over each window's tokens.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct EvaluatedFigures {
    /// Branch.
    pub name: String,
    /// Negative log-likelihood, nats.
    pub window_nll: Numbers,
    /// KL divergence, nats.
    pub window_kl: Numbers,
    /// Top-1 agreement.
    pub window_top1: Numbers,
}

/// Numbers of which some may be missing.
pub type Numbers = Vec<Option<f64>>;

impl Figures {
    /// Reads a run from its folder or from its `run.json` alone. In a folder, the evaluations beside the branches replace those of
    /// the same protocol in `run.json`.
    ///
    /// # Errors
    /// When a file cannot be read, is not JSON, or has another schema.
    pub fn read(run: &Path) -> Result<Self> {
        if !run.is_dir() {
            return read_schema(run, REPORT_SCHEMA);
        }
        let mut figures: Self = read_schema(&run.join(REPORT_FILE), REPORT_SCHEMA)?;
        for branch in figures.branches.iter().map(|b| b.branch.clone()).collect::<Vec<_>>() {
            let path = run.join(&branch).join(EVALUATION_FILE);
            if path.exists() {
                let beside: Beside = read_schema(&path, EVALUATION_SCHEMA)?;
                check_weights_beside(&path, &beside.checkpoint.digest)?;
                for known in figures.branches.iter_mut().filter(|known| known.branch == branch) {
                    known.scale_bits = beside.checkpoint.scale_bits;
                }
                beside.evaluations.into_iter().for_each(|evaluation| figures.add(&branch, evaluation));
            }
        }
        Ok(figures)
    }

    /// Adds the figures of one branch from an evaluation.
    fn add(&mut self, branch: &str, mut evaluation: EvaluationFigures) {
        evaluation.models.retain(|model| model.name == branch);
        match self.evaluations.iter_mut().find(|old| old.same_protocol(&evaluation)) {
            Some(old) => {
                old.models.retain(|model| model.name != branch);
                old.models.append(&mut evaluation.models);
            }
            None => self.evaluations.push(EvaluationFigures { beside: true, ..evaluation }),
        }
    }

    /// Keeps the evaluations that are judged: on `datasets` if given, those of the run's report, else those that every branch
    /// shares, else all. Evaluations that `baseline` has are kept too. Returns a remark on each of the others.
    ///
    /// # Errors
    /// When nothing was evaluated on one of `datasets`.
    pub fn choose(&mut self, datasets: &[String], baseline: Option<&Self>) -> Result<Vec<String>> {
        let has = |evaluation: &EvaluationFigures, branch: &str| {
            evaluation.models.iter().any(|model| model.name == branch)
        };
        let candidate = |evaluation: &'_ EvaluationFigures| {
            let shared = self.branches.iter().all(|branch| has(evaluation, &branch.branch));
            (evaluation.dataset.clone(), !evaluation.beside, shared)
        };
        let candidates: Vec<_> = self.evaluations.iter().map(candidate).collect();
        let candidates: Vec<Candidate<'_>> = candidates
            .iter()
            .map(|(dataset, own, shared)| Candidate { dataset, own: *own, shared: *shared })
            .collect();
        let in_baseline = |evaluation: &EvaluationFigures| {
            let is_named = datasets.is_empty() || datasets.contains(&evaluation.dataset);
            let mut known = baseline.into_iter().flat_map(|baseline| &baseline.evaluations);
            is_named && known.any(|before| before.same_protocol(evaluation))
        };
        let taken = taken(&candidates, datasets)?;
        let (kept, others): (Vec<_>, Vec<_>) = self
            .evaluations
            .iter()
            .zip(taken)
            .map(|(evaluation, taken)| (evaluation, taken || in_baseline(evaluation)))
            .partition(|(_, taken)| *taken);
        let kept: Vec<EvaluationFigures> =
            kept.into_iter().map(|(evaluation, _)| evaluation.clone()).collect();
        let remark = |(evaluation, _): &(&EvaluationFigures, bool)| {
            let names: Vec<&str> = evaluation.models.iter().map(|model| model.name.as_str()).collect();
            let dataset = &evaluation.dataset;
            let hint = match kept.iter().any(|other| other.dataset == *dataset) {
                true => String::new(),
                false => format!("; --dataset {dataset} judges it"),
            };
            format!("not judged: {}, measured of {}{hint}", evaluation.title(), names.join(", "))
        };
        let remarks = others.iter().map(remark).collect();
        self.evaluations = kept;
        Ok(remarks)
    }

    /// An evaluation's text for messages: its name, with the windows and more where other evaluations have the same name.
    pub(super) fn text_of(&self, evaluation: &EvaluationFigures) -> String {
        let forms: [fn(&EvaluationFigures) -> String; 3] =
            [|e| e.dataset.clone(), EvaluationFigures::title, EvaluationFigures::in_full];
        let is_unique = |form: &fn(&EvaluationFigures) -> String| {
            self.evaluations.iter().filter(|other| form(other) == form(evaluation)).count() < 2
        };
        forms.into_iter().find(is_unique).unwrap_or(EvaluationFigures::in_full)(evaluation)
    }
}

impl EvaluationFigures {
    /// Whether both are of the same model on the same windows of the same tokens, computed in the same way.
    pub fn same_protocol(&self, other: &Self) -> bool {
        let windows = |e: &Self| (e.windows, e.seq_len, e.stride);
        self.model_digest == other.model_digest
            && self.compute == other.compute
            && self.sha256 == other.sha256
            && windows(self) == windows(other)
            && self.window_tokens == other.window_tokens
    }
}

impl EvaluationFigures {
    /// The text and the windows.
    pub(super) fn title(&self) -> String {
        title(&self.dataset, self.windows, self.seq_len, self.stride)
    }

    /// The same with the digest of the tokens and the type of the computation.
    pub(super) fn in_full(&self) -> String {
        let digest: String = self.sha256.chars().take(12).collect();
        format!("{} ({digest}), in {}", self.title(), self.compute)
    }
}

/// The parts of an evaluation file beside a branch that the gate uses.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Beside {
    checkpoint: BesideCheckpoint,
    evaluations: Vec<EvaluationFigures>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct BesideCheckpoint {
    digest: String,
    scale_bits: Option<f64>,
}
