//! The unquantized model in an evaluation: run, or its stored predictions.

use std::path::Path;

use tch::Tensor;

use super::{
    cache::{Found, Key, Reader, Writer},
    divergence, flatten,
    prediction::Prediction,
};
use crate::{
    calibration::Windows,
    checkpoint::Checkpoint,
    error::Result,
    model::{Compute, Runner},
    progress::{Event, Progress},
    units::bytes,
};

/// The unquantized model, window by window.
pub(super) struct Reference<'a> {
    source: Source<'a>,
    progress: &'a dyn Progress,
}

enum Source<'a> {
    Kept(Reader),
    Run { runner: Box<Runner<'a>>, writer: Option<Writer> },
}

impl<'a> Reference<'a> {
    /// Reads predictions from `cache`; those that are missing there are computed and written to it.
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        digest: &str,
        windows: &Windows,
        compute: Compute,
        cache: Option<&Path>,
        progress: &'a dyn Progress,
    ) -> Result<Self> {
        let note = |text: String| progress.event(&Event::Note(&text));
        let mut writer = None;
        if let Some(dir) = cache {
            let key = key(checkpoint, digest, windows, compute);
            let path = key.path(dir);
            match Reader::open(dir, &key) {
                Found::Whole(reader) => {
                    note(format!(
                        "the unquantized model is not run: its predictions are in `{}`",
                        path.display()
                    ));
                    return Ok(Self { source: Source::Kept(reader), progress });
                }
                Found::Damaged(problem) => {
                    let path = path.display();
                    note(format!(
                        "the unquantized model is run again, as `{path}` cannot be used: {problem}"
                    ));
                }
                Found::Nothing => {}
            }
            // Without it the figures are the same.
            match Writer::create(dir, &key) {
                Ok(created) => writer = Some(created),
                Err(error) => note(format!("the unquantized model's predictions will not be kept: {error}")),
            }
        }
        let runner = Box::new(Runner::dense(checkpoint, windows.seq_len(), compute)?);
        Ok(Self { source: Source::Run { runner, writer }, progress })
    }

    /// Whether it is run.
    pub(super) fn is_run(&self) -> bool {
        matches!(self.source, Source::Run { .. })
    }

    /// Hidden states `[W, S, hidden]` of some windows, if it is run.
    pub(super) fn hidden_states(&self, ids: &[i64], seq_len: usize) -> Result<Option<Tensor>> {
        let Source::Run { runner, .. } = &self.source else { return Ok(None) };
        Ok(Some(flatten(runner.hidden_states(ids, seq_len, || self.progress.advance(1))?)?))
    }

    /// The predictions of the next window's tokens, from its hidden states `[S, hidden]` if it is run.
    ///
    /// # Errors
    /// When memory ends, or what was kept cannot be read any more.
    pub(super) fn window(
        &mut self,
        hidden: Option<Tensor>,
        ids: &[i64],
        first_scored: usize,
    ) -> Result<Vec<Prediction>> {
        let (runner, writer) = match &mut self.source {
            Source::Kept(reader) => return reader.window(ids.len() - first_scored),
            Source::Run { runner, writer } => (runner, writer),
        };
        let hidden = hidden.as_ref().expect("it is run");
        let predictions = divergence::predictions(runner, hidden, ids, first_scored)?;
        if let Some(Err(error)) = writer.as_mut().map(|writer| writer.window(&predictions)) {
            *writer = None;
            self.progress.event(&Event::Note(&format!("the predictions are not kept: {error}")));
        }
        Ok(predictions)
    }

    /// Completes the file of predictions.
    pub(super) fn finish(self) {
        let Source::Run { writer: Some(writer), .. } = self.source else { return };
        let text = match writer.finish() {
            Ok((path, size)) => {
                format!(
                    "the unquantized model's predictions are kept in `{}` ({})",
                    path.display(),
                    bytes(size)
                )
            }
            Err(error) => format!("the unquantized model's predictions are not kept: {error}"),
        };
        self.progress.event(&Event::Note(&text));
    }
}

fn key(checkpoint: &Checkpoint, digest: &str, windows: &Windows, compute: Compute) -> Key {
    let c = checkpoint.config();
    Key {
        model: digest.to_owned(),
        config: c.forward_digest(),
        tokens: windows.digest().to_owned(),
        windows: windows.count(),
        seq_len: windows.seq_len(),
        stride: windows.stride(),
        compute: compute.to_string(),
        vocab: c.vocab_size,
    }
}
