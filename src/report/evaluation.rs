//! What was measured of models: data of `eval.json`, and of `run.json`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::json::read_schema;
use crate::{
    architectures::CONFIG_FILE,
    checkpoint::Checkpoint,
    error::{ReportError, Result},
};

/// The evaluations' file in the folder of a quantized model. It is not part of the checkpoint and has no checksum there.
pub const EVALUATION_FILE: &str = "eval.json";

/// Goes up when a reader of older evaluations could misread a newer one.
pub const EVALUATION_SCHEMA: &str = "gptq-eval/1";

/// All that is known of one quantized model's quality: the content of [`EVALUATION_FILE`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelEvaluations {
    /// [`EVALUATION_SCHEMA`].
    pub schema: String,
    /// `gptq 0.1.0`.
    pub generated_by: String,
    /// The model's folder's name.
    pub name: String,
    /// What the checkpoint says of itself.
    pub checkpoint: CheckpointReport,
    /// One for each text and protocol, each with this model alone in it.
    pub evaluations: Vec<Evaluation>,
}

/// What a quantized checkpoint says of itself, whatever tool wrote it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointReport {
    /// The tool that says it wrote it, e.g. `gptqmodel:7.7.0`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantizer: Option<String>,
    /// Bits a code.
    pub bits: u32,
    /// Input features a group; -1 is one group a row.
    pub group_size: i64,
    /// `no`, `yes`, or `static` (the order of act order, groups as without).
    pub act_order: String,
    /// Whether zero points are in the middle of the grid.
    pub symmetric: bool,
    /// Damping, as a fraction of the mean Hessian diagonal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damp: Option<f64>,
    /// The calibration text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dataset: Option<String>,
    /// Tokens of a calibration window.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq_len: Option<usize>,
    /// Calibration windows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub samples: Option<usize>,
    /// Digest of all tensors, so that figures are not taken for those of other weights.
    pub digest: String,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Bits per quantized weight, with scales, zeros and group indices.
    pub bits_per_weight: f64,
    /// Significant bits that the scales of each linear use, of the linear that uses the fewest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_bits: Option<u32>,
    /// Which software takes it.
    pub readers: Vec<ReaderReport>,
}

/// One reader and why it does not take a checkpoint, if so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReaderReport {
    /// The software and its versions.
    pub name: String,
    /// Whether it is maintained in these versions, and reads GPTQ.
    #[serde(default = "yes")]
    pub living: bool,
    /// None when it loads and computes what was meant.
    pub refused: Option<String>,
}

fn yes() -> bool {
    true
}

/// Quality against the unquantized model, on the same tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Recipe or file name of the text.
    pub dataset: String,
    /// SHA-256 of the windows' token ids.
    pub sha256: String,
    /// How the figures are computed, in words.
    pub protocol: String,
    /// Folder's name of the unquantized model.
    pub model: String,
    /// Digest of its tensors: the same for the same model in another folder.
    pub model_digest: String,
    /// What it was computed in, and where: `fp32`, `fp16 on cuda:0`.
    pub compute: String,
    /// Windows.
    pub windows: usize,
    /// Tokens a window.
    pub seq_len: usize,
    /// Tokens from one window's begin to the next one's; smaller than `seq_len`, windows overlap.
    pub stride: usize,
    /// Tokens scored in each window: all but the first; of windows that overlap the one before, the new ones. Means over
    /// tokens are means over windows with these as weights.
    pub window_tokens: Vec<usize>,
    /// Perplexity of the unquantized model.
    pub reference_perplexity: Interval,
    /// Its mean negative log-likelihood in each window, nats.
    pub window_nll: Vec<f64>,
    /// The quantized ones.
    pub models: Vec<EvaluatedModel>,
    /// The whole evaluation.
    pub seconds: f64,
}

/// One evaluated model. What begins with `window_` has a value for each window, the mean over its scored tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluatedModel {
    /// Branch or folder name.
    pub name: String,
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// Perplexity.
    pub perplexity: Interval,
    /// Perplexity less the unquantized model's; the interval is over paired windows.
    pub perplexity_change: Interval,
    /// Mean over positions of `KL(fp16 ‖ quantized)`, nats.
    pub kl_divergence: Interval,
    /// The smallest value that 99% of all positions do not exceed.
    pub kl_p99: f64,
    /// The largest of any position.
    pub kl_max: f64,
    /// Share of positions at which both models' most likely token is the same.
    pub top1_agreement: Interval,
    /// Negative log-likelihood, nats.
    pub window_nll: Vec<f64>,
    /// KL divergence, nats.
    pub window_kl: Vec<f64>,
    /// Top-1 agreement.
    pub window_top1: Vec<f64>,
}

/// A value with its 95% interval over windows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The value over all windows.
    pub value: f64,
    /// Half the width of the interval; none with a single window.
    pub margin: Option<f64>,
}

impl ModelEvaluations {
    /// Reads an [`EVALUATION_FILE`].
    ///
    /// # Errors
    /// When it is not there, not JSON, or of another schema.
    pub fn read(path: &Path) -> Result<Self> {
        read_schema(path, EVALUATION_SCHEMA)
    }

    /// Adds an evaluation, in place of an older one of the same protocol.
    pub fn add(&mut self, evaluation: Evaluation) {
        match self.evaluations.iter_mut().find(|old| old.same_protocol(&evaluation)) {
            Some(old) => *old = evaluation,
            None => self.evaluations.push(evaluation),
        }
    }
}

/// Refuses the figures in `path` when they are not of the weights beside it, where there are any. `digest` is that of the
/// weights they were measured of.
///
/// # Errors
/// When there are other weights, or they cannot be read.
pub fn check_weights_beside(path: &Path, digest: &str) -> Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if dir.join(CONFIG_FILE).exists() && Checkpoint::open(dir)?.digest()? != digest {
        return Err(ReportError::Stale { path: path.into() }.into());
    }
    Ok(())
}

impl Evaluation {
    /// Whether two evaluations measured the same: their figures can be compared.
    pub fn same_protocol(&self, other: &Self) -> bool {
        self.same_text(other) && (&self.model_digest, &self.compute) == (&other.model_digest, &other.compute)
    }

    /// Whether two evaluations are over the same windows of the same tokens.
    pub fn same_text(&self, other: &Self) -> bool {
        let of = |e: &Self| (e.windows, e.seq_len, e.stride);
        self.sha256 == other.sha256 && of(self) == of(other)
    }

    /// The figures of one model.
    pub fn model_named(&self, name: &str) -> Option<&EvaluatedModel> {
        self.models.iter().find(|model| model.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_survives_json() {
        let interval = Interval { value: 1.5, margin: None };
        let text = serde_json::to_string(&interval).unwrap();
        assert_eq!(text, r#"{"value":1.5,"margin":null}"#);
        assert_eq!(serde_json::from_str::<Interval>(&text).unwrap(), interval);
    }
}
