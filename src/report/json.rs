//! The report's data.

use serde::{Deserialize, Serialize};

use crate::{calibration::Provenance, plan::Plan, variant::Variant};

/// The report's file in the output folder.
pub const REPORT_FILE: &str = "run.json";

/// Goes up when a reader of older reports could misread a newer one.
pub const REPORT_SCHEMA: &str = "gptq-run/1";

/// One run of `gptq quantize`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`REPORT_SCHEMA`].
    pub schema: String,
    /// `gptq 0.1.0`.
    pub generated_by: String,
    /// What was asked for.
    pub plan: Plan,
    /// The source model.
    pub model: ModelReport,
    /// The calibration text.
    pub calibration: CalibrationReport,
    /// How it was computed, at last if the run was interrupted.
    pub compute: ComputeReport,
    /// How which layers were computed, if the run was interrupted and gone on with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub resumed: Vec<LayersComputed>,
    /// What was made, in the plan's order.
    pub branches: Vec<BranchReport>,
    /// Whatever went otherwise than planned.
    pub warnings: Vec<String>,
    /// The whole run, without evaluation.
    pub seconds: f64,
    /// Of these, what it took to be able to go on after an interruption; flushing to the disk beside the computation is not
    /// counted.
    pub journal_seconds: f64,
    /// Each layer, all variants.
    pub layer_seconds: Vec<f64>,
    /// Largest resident memory during the run, bytes; none where the system does not say.
    pub peak_memory_bytes: Option<u64>,
    /// What the branches cost, if it was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<Evaluation>,
}

/// The source model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelReport {
    /// Its folder's name.
    pub name: String,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Parameters in all tensors.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
}

/// The calibration text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CalibrationReport {
    /// Where the text comes from: recipe or file name, repository, revision, files and their digests.
    pub source: Provenance,
    /// SHA-256 of the windows' token ids as little-endian 32-bit integers.
    pub sha256: String,
    /// Tokens of the whole text; none when documents were tokenized as they were drawn.
    pub text_tokens: Option<usize>,
    /// Windows.
    pub samples: usize,
    /// Tokens a window.
    pub seq_len: usize,
}

/// How it was computed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ComputeReport {
    /// `cpu`.
    pub device: String,
    /// `cpu`: which solver.
    pub solver: String,
    /// `fp32` or `bf16`, of the forward passes.
    pub dtype: String,
    /// Threads.
    pub threads: usize,
}

/// Layers that were computed without a break.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayersComputed {
    /// The first of them, from 0.
    pub first: usize,
    /// How many.
    pub count: usize,
    /// How.
    pub compute: ComputeReport,
}

/// One branch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BranchReport {
    /// Its folder and git branch.
    pub branch: String,
    /// What it is.
    pub variant: Variant,
    /// Bytes of all files.
    pub bytes: u64,
    /// Bits per quantized weight, with scales, zeros and group indices.
    pub bits_per_weight: f64,
    /// Factorizing, solving and packing; a factorization that several variants use is shared out among them.
    pub seconds: f64,
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
    /// How often damping had to be raised.
    pub damp_raised: u32,
    /// Input features that carried nothing.
    pub dead_columns: usize,
    /// Factorizing and solving.
    pub seconds: f64,
    /// Output features that are rounded to nearest, as compensation would have made their error larger.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub uncompensated_features: usize,
    /// Why it was rounded to nearest instead of solved, if it was; only where `--on-failure rtn` was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
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

/// Quality against the unquantized model, on the same tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Recipe or file name of the text.
    pub dataset: String,
    /// SHA-256 of the windows' token ids.
    pub sha256: String,
    /// How the figures are computed, in words.
    pub protocol: String,
    /// Windows.
    pub windows: usize,
    /// Tokens a window.
    pub seq_len: usize,
    /// Perplexity of the unquantized model.
    pub reference_perplexity: Interval,
    /// The quantized ones.
    pub models: Vec<EvaluatedModel>,
    /// The whole evaluation.
    pub seconds: f64,
}

/// One evaluated model.
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
    /// Share of positions at which both models' most likely token is the same.
    pub top1_agreement: Interval,
}

/// A value with its 95% interval over windows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The value over all windows.
    pub value: f64,
    /// Half the width of the interval; none with a single window.
    pub margin: Option<f64>,
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
