//! Formats of outputs, chosen by the variant: folders in GPTQ's format, and GGUF files.

use std::{collections::BTreeMap, path::Path};

use crate::{
    architectures::ModelConfig,
    checkpoint::{Checkpoint, QuantizationConfig},
    emit::{self, BranchWriter, GgufBranchWriter, OutputWriter, places},
    error::Result,
    ggml::Mix,
    report::{ReaderReport, SplitReport},
    variant::{Output, Variant},
    verify,
};

/// Inputs of a format to plan and to open an output.
pub(super) struct Job<'a> {
    /// The checkpoint that it is made of, before it was changed.
    pub(super) original: &'a Checkpoint,
    /// The config of the checkpoint that is quantized.
    pub(super) config: &'a ModelConfig,
    /// Largest weights file of a folder, bytes.
    pub(super) max_shard_size: u64,
}

/// A format of outputs.
pub(super) trait OutputFormat {
    /// Bytes on the disk while the output is made.
    ///
    /// # Errors
    /// When the variant does not fit the model.
    fn plan(&self, job: &Job<'_>) -> Result<u64>;

    /// Creates the output `name` in the folder `out`, or reopens what was committed with the digests `written`.
    ///
    /// # Errors
    /// When it exists, or is not what was committed, or the disk fails.
    fn open(
        &self,
        job: &Job<'_>,
        out: &Path,
        name: &str,
        written: Option<BTreeMap<String, String>>,
    ) -> Result<Box<dyn OutputWriter>>;

    /// Checks an output that is finished and not yet at its place.
    ///
    /// # Errors
    /// When it is not what was written.
    fn verify(&self, out: &Path, name: &str) -> Result<()>;

    /// Which software loads an output, and over how many GPUs it can split it.
    ///
    /// # Errors
    /// When the output cannot be read.
    fn readers(&self, written: &Checkpoint) -> Result<(Vec<ReaderReport>, Vec<SplitReport>)>;
}

/// The format of an output.
pub(super) fn format_of(output: &Output) -> Box<dyn OutputFormat> {
    match *output {
        Output::Gptq(variant) => Box::new(variant),
        Output::Gguf(mix) => Box::new(mix),
    }
}

impl OutputFormat for Variant {
    fn plan(&self, job: &Job<'_>) -> Result<u64> {
        emit::planned_bytes(self, job.config, job.original, job.max_shard_size)
    }

    fn open(
        &self,
        job: &Job<'_>,
        out: &Path,
        name: &str,
        written: Option<BTreeMap<String, String>>,
    ) -> Result<Box<dyn OutputWriter>> {
        let (config, passed, size) = (job.config, job.original.passed_through()?, job.max_shard_size);
        Ok(Box::new(match written {
            Some(written) => BranchWriter::reopen(out, name, *self, config, &passed, size, written)?,
            None => BranchWriter::create(out, name, *self, config, &passed, size)?,
        }))
    }

    fn verify(&self, out: &Path, name: &str) -> Result<()> {
        verify::written(&places(out, name)[1])
    }

    fn readers(&self, written: &Checkpoint) -> Result<(Vec<ReaderReport>, Vec<SplitReport>)> {
        let quantization = QuantizationConfig::read(written)?;
        let readers = verify::readers(written.config(), &quantization, written);
        Ok((readers, verify::tensor_parallel(written.config(), &quantization, written)))
    }
}

impl OutputFormat for Mix {
    fn plan(&self, job: &Job<'_>) -> Result<u64> {
        GgufBranchWriter::planned_bytes(*self, job.original, job.config)
    }

    fn open(
        &self,
        job: &Job<'_>,
        out: &Path,
        name: &str,
        written: Option<BTreeMap<String, String>>,
    ) -> Result<Box<dyn OutputWriter>> {
        let Job { original, config, .. } = *job;
        Ok(Box::new(match written {
            Some(written) => GgufBranchWriter::reopen(out, name, *self, original, config, written)?,
            None => GgufBranchWriter::create(out, name, *self, original, config)?,
        }))
    }

    fn verify(&self, out: &Path, name: &str) -> Result<()> {
        verify::written(&places(out, name)[1].join(name))
    }

    fn readers(&self, _written: &Checkpoint) -> Result<(Vec<ReaderReport>, Vec<SplitReport>)> {
        Ok((vec![verify::llama_cpp()], Vec::new()))
    }
}
