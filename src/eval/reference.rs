//! The unquantized model in an evaluation: run, or its stored predictions.

use std::path::Path;

use tch::Tensor;

use super::{
    cache::{Found, Key, Reader, Writer, bytes_of},
    divergence, flatten,
    prediction::Prediction,
};
use crate::{
    calibration::Windows,
    checkpoint::Checkpoint,
    cluster::{Cluster, message},
    error::Result,
    model::{Compute, Runner},
    progress::{Event, Progress},
    units::bytes,
};

/// The unquantized model, window by window of this rank.
pub(super) struct Reference<'a> {
    source: Source<'a>,
    /// Where the predictions are written.
    file: Option<File>,
    vocab: usize,
    cluster: &'a Cluster,
    progress: &'a dyn Progress,
}

enum Source<'a> {
    Kept(Reader),
    Run(Box<Runner<'a>>),
}

/// Predictions on their way to the cache.
enum File {
    /// On the root, which has the first windows.
    Own(Box<Writer>),
    /// On another rank: those of its windows, which the root writes behind its own. Each is a length (u64) and the bytes.
    OfRoot(Vec<u8>),
}

impl<'a> Reference<'a> {
    /// Reads predictions from `cache`, from the window `first` on; those that are missing there are computed and written to it.
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        digest: &str,
        windows: &Windows,
        first: usize,
        compute: Compute,
        cache: Option<&Path>,
        cluster: &'a Cluster,
        progress: &'a dyn Progress,
    ) -> Result<Self> {
        let note = |text: String| progress.event(&Event::Note(&text));
        let key = key(checkpoint, digest, windows, compute);
        let mut kept = None;
        let mut file = None;
        if let Some(dir) = cache {
            let path = key.path(dir);
            match Reader::open(dir, &key) {
                Found::Whole(mut reader) => {
                    note(format!(
                        "the unquantized model is not run: its predictions are in `{}`",
                        path.display()
                    ));
                    reader.skip(first)?;
                    kept = Some(reader);
                }
                Found::Damaged(problem) => {
                    let path = path.display();
                    note(format!(
                        "the unquantized model is run again, as `{path}` cannot be used: {problem}"
                    ));
                }
                Found::Nothing => {}
            }
            if kept.is_none() && cluster.is_root() {
                // Without it the figures are the same.
                match Writer::create(dir, &key) {
                    Ok(created) => file = Some(File::Own(Box::new(created))),
                    Err(error) => {
                        note(format!("the unquantized model's predictions will not be kept: {error}"));
                    }
                }
            }
        }
        let writes = cluster.broadcast(cluster.is_root().then(|| vec![u8::from(file.is_some())]))?;
        if writes == [1] && !cluster.is_root() {
            file = Some(File::OfRoot(Vec::new()));
        }
        let source = match kept {
            Some(reader) => Source::Kept(reader),
            None => Source::Run(Box::new(Runner::dense(checkpoint, windows.seq_len(), compute)?)),
        };
        Ok(Self { source, file, vocab: key.vocab, cluster, progress })
    }

    /// Whether it is run.
    pub(super) fn is_run(&self) -> bool {
        matches!(self.source, Source::Run(_))
    }

    /// Hidden states `[W, S, hidden]` of some windows, if it is run.
    pub(super) fn hidden_states(&self, ids: &[i64], seq_len: usize) -> Result<Option<Tensor>> {
        let Source::Run(runner) = &self.source else { return Ok(None) };
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
        let predictions = match &mut self.source {
            Source::Kept(reader) => reader.window(ids.len() - first_scored)?,
            Source::Run(runner) => {
                let hidden = hidden.as_ref().expect("it is run");
                divergence::predictions(runner, hidden, ids, first_scored)?
            }
        };
        match &mut self.file {
            Some(File::Own(writer)) => {
                let written = writer.window(&predictions);
                self.check(written);
            }
            Some(File::OfRoot(bytes)) => {
                let own = bytes_of(&predictions, self.vocab);
                bytes.extend(message::of_numbers(&[own.len() as u64]));
                bytes.extend(own);
            }
            None => {}
        }
        Ok(predictions)
    }

    /// Leaves the file of predictions where one was not written.
    fn check(&mut self, written: Result<()>) {
        if let Err(error) = written {
            self.file = None;
            self.progress.event(&Event::Note(&format!("the predictions are not kept: {error}")));
        }
    }

    /// Completes the file of predictions.
    pub(super) fn finish(mut self) -> Result<()> {
        let own = match &mut self.file {
            Some(File::OfRoot(bytes)) => std::mem::take(bytes),
            _ => Vec::new(),
        };
        for of_rank in self.cluster.gather(own)?.into_iter().flatten() {
            let mut rest = &of_rank[..];
            while let Some((length, others)) = rest.split_at_checked(message::NUMBER) {
                let (content, others) = others.split_at(message::number(length) as usize);
                rest = others;
                if let Some(File::Own(writer)) = &mut self.file {
                    let written = writer.window_bytes(content);
                    self.check(written);
                }
            }
        }
        let Some(File::Own(writer)) = self.file else { return Ok(()) };
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
        Ok(())
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
