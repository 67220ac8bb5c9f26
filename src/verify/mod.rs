//! Reopens what is on disk and reports what is wrong with it, how far it is from the source, and which software loads it.

mod gguf;
mod kernel;
mod numeric;
mod readers;
mod rounding;
mod structure;
mod tensor_parallel;
mod zero_points;

use std::path::Path;

use serde::Serialize;

use crate::{
    calibration::tokenizer_notes,
    checkpoint::{Checkpoint, QuantizationConfig},
    error::{Error, Result},
    progress::{Event, Progress, Silent},
    report::{ReaderReport, SplitReport},
};
pub use gguf::llama_cpp;
pub use kernel::{KERNEL_TOKENS, KernelError, KernelOptions, KernelReport, check_kernels};
pub use numeric::LinearDistance;
pub use readers::{LostReader, lost_readers, readers, readers_markdown, require_readers, tensor_parallel};
pub use rounding::KERNEL_TOLERANCE;
pub use structure::ScaleSigns;
use structure::Structure;
use zero_points::ZeroPoints;

/// One defect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The file or tensor.
    pub subject: String,
    /// The problem, with numbers.
    pub problem: String,
}

/// Result of the checks of a quantized checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verification {
    /// All faults.
    pub findings: Vec<Finding>,
    /// Number of checked tensors.
    pub tensors: usize,
    /// Whether the folder has checksums. Without them no check finds a flipped bit that leaves a valid code.
    pub checksums: bool,
    /// Whether scales are negative.
    pub scales: ScaleSigns,
    /// Which software loads it.
    pub readers: Vec<ReaderReport>,
    /// Over how many GPUs software can split it.
    pub tensor_parallel: Vec<SplitReport>,
    /// Inferred settings, and contradictions between files with the chosen setting.
    pub notes: Vec<String>,
    /// Distance of every linear from the source, if there is one.
    pub distances: Vec<LinearDistance>,
    /// Errors of the int4 matmul; `None` without a check of it, or after another finding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelReport>,
}

impl Verification {
    /// Whether there are no findings.
    pub fn passed(&self) -> bool {
        self.findings.is_empty()
    }
}

/// Verifies the checkpoint in `dir`, a folder or a GGUF file. With its dense source, it also measures the distance of every
/// linear; with `KernelOptions`, it runs the int4 matmul on them.
///
/// # Errors
/// When `dir` or the source cannot be read, or the device cannot be used. A defect *in* `dir` is a finding, not an error.
pub fn verify(
    dir: &Path,
    against: Option<&Checkpoint>,
    kernel: Option<&KernelOptions<'_>>,
    progress: &dyn Progress,
) -> Result<Verification> {
    std::fs::metadata(dir).map_err(Error::io("read", dir))?;
    let broken = |error: &Error| {
        let finding = Finding { subject: dir.display().to_string(), problem: error.to_string() };
        let (findings, readers, distances) = (vec![finding], Vec::new(), Vec::new());
        let scales = ScaleSigns::default();
        Verification {
            findings,
            tensors: 0,
            checksums: false,
            scales,
            readers,
            tensor_parallel: Vec::new(),
            notes: Vec::new(),
            distances,
            kernel: None,
        }
    };
    let checkpoint = match Checkpoint::open(dir) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return Ok(broken(&error)),
    };
    if let Some((header, file)) = checkpoint.gguf() {
        if kernel.is_some() {
            return Err(Error::CheckpointKind {
                path: dir.into(),
                expected: "a GPTQ folder, whose codes the int4 matmul takes",
                found: "a GGUF file".into(),
            });
        }
        return gguf::verify(&checkpoint, header, file, against, progress);
    }
    let quantization = match QuantizationConfig::read(&checkpoint) {
        Ok(quantization) => quantization,
        Err(error) => return Ok(broken(&error)),
    };
    if let Some(warning) = checkpoint.absent() {
        progress.event(&Event::Warning(&warning));
    }
    let Structure { mut findings, checksums, scales } =
        structure::check(&checkpoint, &quantization, progress);
    structure::json_files(&checkpoint, &mut findings);
    let distances = match against {
        Some(source) if findings.is_empty() => {
            numeric::compare(&checkpoint, &quantization, source, &mut findings, progress)?
        }
        _ => Vec::new(),
    };
    let kernel = match kernel {
        Some(options) if findings.is_empty() => {
            let report = check_kernels(&checkpoint, options, &|_, _| (), progress)?;
            findings.extend(kernel::findings(&report));
            Some(report)
        }
        _ => None,
    };
    let mut notes = [quantization.notes.clone(), tokenizer_notes(dir)].concat();
    notes.retain(|note| !findings.iter().any(|finding| finding.problem == *note));
    Ok(Verification {
        findings,
        tensors: checkpoint.names().count(),
        checksums,
        scales,
        readers: readers(checkpoint.config(), &quantization, &checkpoint),
        tensor_parallel: tensor_parallel(checkpoint.config(), &quantization, &checkpoint),
        notes,
        distances,
        kernel,
    })
}

/// Remarks on the quantized tensors, each a sentence. They name inferred settings, zero points in another format's convention, and
/// zero points that programs read differently. Reads only `qzeros`.
///
/// # Errors
/// When `qzeros` is of another type.
pub fn notes(checkpoint: &Checkpoint, quantization: &QuantizationConfig) -> Result<Vec<String>> {
    let causes = ZeroPoints::of(checkpoint, quantization)?.causes();
    Ok(quantization.notes.iter().cloned().chain(causes).collect())
}

/// Checks a written branch or GGUF file; the first defect is an error.
///
/// # Errors
/// When a check fails.
pub fn written(path: &Path) -> Result<()> {
    let checkpoint = Checkpoint::open(path)?;
    let findings = match checkpoint.gguf() {
        Some((header, file)) => gguf::verify(&checkpoint, header, file, None, &Silent)?.findings,
        None => structure::check(&checkpoint, &QuantizationConfig::read(&checkpoint)?, &Silent).findings,
    };
    let Some(Finding { subject, problem }) = findings.into_iter().next() else { return Ok(()) };
    let problem = format!("{problem} after writing");
    Err(match checkpoint.gguf() {
        Some(_) => Error::Gguf { path: path.into(), problem: format!("{subject}: {problem}") },
        None => Error::Safetensors { path: path.join(subject), problem },
    })
}
