//! Quality of quantized models: data of `eval.json` and `run.json`.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{Report, json::read_schema};
use crate::{
    architectures::CONFIG_FILE,
    checkpoint::Checkpoint,
    error::{ReportError, Result},
};

/// File of the evaluations in the folder of a quantized model. The checkpoint's checksums do not cover it.
pub const EVALUATION_FILE: &str = "eval.json";

/// File of the evaluations of a quantized model: [`EVALUATION_FILE`] in its folder, or `NAME.gguf.eval.json` beside a GGUF
/// file.
pub fn evaluation_file(model: &Path) -> PathBuf {
    match model.file_name().filter(|_| model.is_file()) {
        Some(name) => model.with_file_name(format!("{}.{EVALUATION_FILE}", name.display())),
        None => model.join(EVALUATION_FILE),
    }
}

/// Version of the file; it rises when a reader of older evaluations could misread a newer one.
pub const EVALUATION_SCHEMA: &str = "gptq-eval/1";

/// Quality of one quantized model: the content of [`EVALUATION_FILE`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelEvaluations {
    /// [`EVALUATION_SCHEMA`].
    pub schema: String,
    /// `gptq 0.1.0`.
    pub generated_by: String,
    /// The model's folder's name.
    pub name: String,
    /// Metadata of the checkpoint.
    pub checkpoint: CheckpointReport,
    /// One evaluation for each text and protocol, each of this model alone.
    pub evaluations: Vec<Evaluation>,
}

/// Metadata of a quantized checkpoint of any tool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointReport {
    /// The tool named in the checkpoint, e.g. `gptqmodel:7.7.0`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantizer: Option<String>,
    /// Types of a GGUF file's linears, the most frequent first: `Q4_K, Q6_K`. None for a GPTQ folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gguf: Option<String>,
    /// Bits a code; of a GGUF file's most frequent type.
    pub bits: u32,
    /// Input features a group; -1 is one group a row.
    pub group_size: i64,
    /// `no`, `yes`, or `static` (act order with groups of neighbouring features).
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
    /// Digest of all tensors: figures of other weights are refused by it.
    pub digest: String,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Bits per quantized weight, with scales, zeros and group indices.
    pub bits_per_weight: f64,
    /// Significant bits that the scales of each linear use, of the linear that uses the fewest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_bits: Option<u32>,
    /// Which software loads it.
    pub readers: Vec<ReaderReport>,
    /// Over how many GPUs software can split it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tensor_parallel: Vec<SplitReport>,
    /// Inferred and ambiguous settings, with the choice for each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// One reader, and why it does not load a checkpoint, if so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReaderReport {
    /// The software and its versions.
    pub name: String,
    /// Whether these versions are maintained and read GPTQ.
    #[serde(default = "yes")]
    pub living: bool,
    /// Why it does not load the checkpoint, or computes something else; none when it does.
    pub refused: Option<String>,
}

impl ReaderReport {
    /// `yes`, or `no` with the reason, or `yes` with the numbers of parts in which tensor parallelism can split the checkpoint.
    pub fn verdict(&self, splits: &[SplitReport]) -> String {
        if let Some(why) = &self.refused {
            return format!("no: {why}");
        }
        match splits.iter().find(|split| split.name == self.name) {
            Some(split) => format!("yes, on {split}"),
            None => "yes".into(),
        }
    }
}

/// The numbers of GPUs over which a reader can split a checkpoint (tensor parallelism).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitReport {
    /// The reader, as [`ReaderReport::name`].
    pub name: String,
    /// Those of 1, 2, 4 and 8 that work; empty where the reader does not load the checkpoint at all.
    pub parts: Vec<usize>,
    /// Why the first number that is missing does not work; none where all work or none does.
    pub limit: Option<String>,
}

impl fmt::Display for SplitReport {
    /// `1 or 2 GPUs (not on 4: mlp.down_proj has 86 groups of 128)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self.parts.iter().map(ToString::to_string).collect();
        match &parts[..] {
            [before @ .., last] if !before.is_empty() => write!(f, "{} or {last} GPUs", before.join(", "))?,
            [one] => write!(f, "{one} GPU")?,
            _ => write!(f, "no GPU")?,
        }
        self.limit.as_ref().map_or(Ok(()), |limit| write!(f, " ({limit})"))
    }
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
    /// The protocol in words.
    pub protocol: String,
    /// Folder's name of the unquantized model.
    pub model: String,
    /// Digest of its tensors: the same for the same model in another folder.
    pub model_digest: String,
    /// Data type and device: `fp32`, `fp16 on cuda:0`.
    pub compute: String,
    /// Windows.
    pub windows: usize,
    /// Tokens a window.
    pub seq_len: usize,
    /// Tokens from the start of one window to the start of the next; if it is less than `seq_len`, windows overlap.
    pub stride: usize,
    /// Tokens scored in each window: all but the first, or those that the window before does not have. They are the weights of
    /// the windows in means over tokens.
    pub window_tokens: Vec<usize>,
    /// Perplexity of the unquantized model.
    pub reference_perplexity: Interval,
    /// Its mean negative log-likelihood in each window, nats.
    pub window_nll: Vec<f64>,
    /// The quantized models.
    pub models: Vec<EvaluatedModel>,
    /// Seconds of the whole evaluation.
    pub seconds: f64,
}

/// One evaluated model. Fields `window_…` have one value for each window, the mean over its scored tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluatedModel {
    /// Branch or folder name.
    pub name: String,
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// Perplexity.
    pub perplexity: Interval,
    /// Perplexity minus the unquantized model's; the interval is over paired windows.
    pub perplexity_change: Interval,
    /// Mean over positions of `KL(fp16 ‖ quantized)`, nats.
    pub kl_divergence: Interval,
    /// The 99th percentile of the divergence over positions: the smallest value that 99% of them do not exceed.
    pub kl_p99: f64,
    /// The largest divergence of any position.
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

impl Interval {
    /// The interval of a share, in percent.
    pub(crate) fn percent(self) -> Self {
        Self { value: self.value * 100.0, margin: self.margin.map(|margin| margin * 100.0) }
    }
}

/// `0.52 ±0.03`, with the precision and sign of the format.
impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.value, f)?;
        let digits = f.precision().unwrap_or(6);
        self.margin.map_or(Ok(()), |margin| write!(f, " ±{margin:.digits$}"))
    }
}

impl ModelEvaluations {
    /// Reads an [`EVALUATION_FILE`].
    ///
    /// # Errors
    /// When it is missing, not JSON, or has another schema.
    pub fn read(path: &Path) -> Result<Self> {
        read_schema(path, EVALUATION_SCHEMA)
    }

    /// Reads an [`EVALUATION_FILE`], and refuses it when its figures are not of the weights beside it, where there are any.
    ///
    /// # Errors
    /// As [`Self::read`] and [`check_weights_beside`].
    pub fn read_checked(path: &Path) -> Result<Self> {
        let figures = Self::read(path)?;
        check_weights_beside(path, &figures.checkpoint.digest)?;
        Ok(figures)
    }

    /// Reads the evaluations of a run's branches, whose folders are in `dir`, where they have any.
    ///
    /// # Errors
    /// As [`Self::read_checked`].
    pub fn of_branches(report: &Report, dir: &Path) -> Result<Vec<Self>> {
        let paths = report.branches.iter().map(|branch| evaluation_file(&dir.join(&branch.branch)));
        paths.filter(|path| path.exists()).map(|path| Self::read_checked(&path)).collect()
    }

    /// Gives the model another name, in its figures too.
    pub fn rename(&mut self, name: String) {
        for model in self.evaluations.iter_mut().flat_map(|evaluation| &mut evaluation.models) {
            if model.name == self.name {
                model.name.clone_from(&name);
            }
        }
        self.name = name;
    }

    /// Adds an evaluation; it replaces an older one of the same protocol.
    pub fn add(&mut self, evaluation: Evaluation) {
        match self.evaluations.iter_mut().find(|old| old.same_protocol(&evaluation)) {
            Some(old) => *old = evaluation,
            None => self.evaluations.push(evaluation),
        }
    }
}

/// Refuses the figures in `path` when they are not of the weights beside it, where there are any. `digest` is the digest of
/// the weights that were measured.
///
/// # Errors
/// When the weights are other ones, or cannot be read.
pub fn check_weights_beside(path: &Path, digest: &str) -> Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().map(|name| name.to_string_lossy());
    if let Some(file) = name.as_ref().and_then(|name| name.strip_suffix(&format!(".{EVALUATION_FILE}"))) {
        let file = dir.join(file);
        if file.is_file() && Checkpoint::open(&file)?.digest()? != digest {
            return Err(ReportError::Stale { path: path.into() }.into());
        }
        return Ok(());
    }
    if dir.join(CONFIG_FILE).exists() && Checkpoint::open(dir)?.digest()? != digest {
        return Err(ReportError::Stale { path: path.into() }.into());
    }
    Ok(())
}

impl Evaluation {
    /// Whether the figures of two evaluations can be compared: same model, same windows of the same tokens, same computation.
    pub fn same_protocol(&self, other: &Self) -> bool {
        let windows = |e: &Self| (e.windows, e.seq_len, e.stride);
        self.model_digest == other.model_digest
            && self.compute == other.compute
            && self.sha256 == other.sha256
            && windows(self) == windows(other)
    }

    /// The text and the windows: `wikitext2-test, 16 windows of 2048 tokens`.
    pub fn title(&self) -> String {
        title(&self.dataset, self.windows, self.seq_len, self.stride)
    }

    /// The figures of one model.
    pub fn model_named(&self, name: &str) -> Option<&EvaluatedModel> {
        self.models.iter().find(|model| model.name == name)
    }
}

/// The text and the windows of an evaluation, for people.
pub(crate) fn title(dataset: &str, windows: usize, seq_len: usize, stride: usize) -> String {
    let overlap = if stride == seq_len { String::new() } else { format!(", one every {stride} tokens") };
    let plural = if windows == 1 { "" } else { "s" };
    format!("{dataset}, {windows} window{plural} of {seq_len} tokens{overlap}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn margins_have_the_precision_of_their_value() {
        let interval = Interval { value: 0.01234, margin: Some(0.002) };
        assert_eq!(format!("{:.2}", interval.percent()), "1.23 ±0.20");
        assert_eq!(format!("{:+.3}", Interval { value: 0.5, margin: None }), "+0.500");
    }

    #[test]
    fn a_title_has_the_text_and_the_windows() {
        assert_eq!(title("mine.txt", 16, 512, 512), "mine.txt, 16 windows of 512 tokens");
        assert_eq!(title("mine.txt", 1, 64, 16), "mine.txt, 1 window of 64 tokens, one every 16 tokens");
    }

    #[test]
    fn an_interval_survives_json() {
        let interval = Interval { value: 1.5, margin: None };
        let text = serde_json::to_string(&interval).unwrap();
        assert_eq!(text, r#"{"value":1.5,"margin":null}"#);
        assert_eq!(serde_json::from_str::<Interval>(&text).unwrap(), interval);
    }
}
