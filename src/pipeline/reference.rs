//! The reference model's activations of a layer, kept beside the quantized ones: what linears are solved for in asymmetric
//! calibration.

use std::sync::Arc;

use super::{stream::Stream, window_file::WindowFile, worker::Worker};
use crate::{error::Result, model::Between};

/// Activations of the reference model in one layer, of all windows of a worker.
pub(super) struct ReferenceLayer {
    /// By stage, what the stage before leaves for it.
    stored: Vec<Vec<Stream>>,
    /// The residual stream between the layer's blocks, where it changes inside the layer.
    middle: Option<Stream>,
    /// The residual stream behind the layer.
    next: Stream,
}

impl ReferenceLayer {
    pub(super) fn streams_mut(&mut self) -> impl Iterator<Item = &mut Stream> {
        self.stored.iter_mut().flatten().chain(&mut self.middle).chain([&mut self.next])
    }
}

impl Worker<'_> {
    /// Runs a layer as it is on the reference model's hidden states, which are stream `reference`, and keeps what its stages
    /// get. What comes out goes into the journal's `file` too; in the `last` layer nothing does.
    pub(super) fn run_reference(
        &mut self,
        reference: usize,
        file: Option<&Arc<WindowFile>>,
        last: bool,
    ) -> Result<()> {
        let config = self.layer();
        let hidden = self.config().hidden_size;
        let stages = config.stages.len();
        let stored = (0..stages).map(|stage| {
            let widths = config.stored_widths(stage).into_iter();
            widths.map(|width| self.stream_like(reference, width)).collect()
        });
        let changes = config.stages[..stages - 1].iter().any(|stage| stage.kind.writes());
        self.reference = Some(ReferenceLayer {
            stored: stored.collect(),
            middle: changes.then(|| self.stream_like(reference, hidden)),
            next: self.stream_like(reference, hidden),
        });
        for stage in 0..if last { stages - 1 } else { stages } {
            self.set_dense(stage)?;
            let changes = config.stages[stage].kind.writes();
            self.each_batch(
                reference,
                |worker, i| {
                    let windows = worker.hidden[reference].batches()[i].clone();
                    let at = worker.reference_at(stage, reference, &windows, true)?;
                    worker.advance(stage, at)
                },
                |worker, i, after| {
                    let layer = worker.reference_layer();
                    if stage + 1 == stages {
                        return match file {
                            Some(file) => layer.next.put_in_journal(i, after.hidden, file),
                            None => layer.next.put(i, after.hidden),
                        };
                    }
                    for (stream, tensor) in layer.stored[stage + 1].iter_mut().zip(after.stored) {
                        stream.put(i, tensor)?;
                    }
                    match &mut layer.middle {
                        Some(middle) if changes => middle.put(i, after.hidden),
                        _ => Ok(()),
                    }
                },
            )?;
        }
        self.forget_linears();
        Ok(())
    }

    /// The layer is done: the reference model's hidden states, stream `reference`, are those behind it.
    pub(super) fn leave_reference(&mut self, reference: usize) {
        if let Some(layer) = self.reference.take() {
            self.hidden[reference] = layer.next;
        }
    }

    /// What the reference model, stream `reference`, has in front of a stage in some windows. The residual stream is read only where
    /// the stage's inputs depend on it, or `whole` asks for it.
    pub(super) fn reference_at(
        &mut self,
        stage: usize,
        reference: usize,
        windows: &std::ops::Range<usize>,
        whole: bool,
    ) -> Result<Between> {
        let config = self.layer();
        let changed = config.stages[..stage].iter().any(|stage| stage.kind.writes());
        let reads_hidden = !config.stages[stage].kind.writes() || config.feed_forward.routing.is_some();
        let hidden = match (&mut self.reference, reads_hidden || whole) {
            (_, false) => tch::Tensor::new(),
            (Some(ReferenceLayer { middle: Some(middle), .. }), true) if changed => {
                middle.of_windows(windows)?
            }
            _ => self.hidden[reference].of_windows(windows)?,
        };
        let stored = self.reference_layer().stored[stage].iter_mut().map(|stream| stream.of_windows(windows));
        Ok(Between { hidden, stored: stored.collect::<Result<_>>()? })
    }

    fn reference_layer(&mut self) -> &mut ReferenceLayer {
        self.reference.as_mut().expect("the reference model runs through a layer first")
    }
}
