//! The reference model's activations of a layer, kept beside the quantized ones: asymmetric calibration computes its targets
//! from them.

use std::{ops::Range, sync::Arc};

use tch::Tensor;

use super::{stream::Stream, window_file::WindowFile};
use crate::{architectures::LayerConfig, error::Result, model::Between};

/// Activations of the reference model in one layer, of all windows of a worker.
pub(super) struct ReferenceLayer<'a> {
    config: &'a LayerConfig,
    /// By stage, what the stage before leaves for it.
    stored: Vec<Vec<Stream>>,
    /// The residual stream between the layer's blocks, where it changes inside the layer.
    middle: Option<Stream>,
    /// The residual stream behind the layer.
    next: Stream,
}

impl<'a> ReferenceLayer<'a> {
    /// Empty, with batches as those of `hidden`, the residual stream before the layer; `window` is `[S, hidden]`.
    pub(super) fn new(config: &'a LayerConfig, hidden: &Stream, window: [usize; 2]) -> Self {
        let empty = |width: usize| hidden.empty_like([window[0], width]);
        let last = config.stages.len() - 1;
        let stored =
            (0..=last).map(|stage| config.stored_widths(stage).into_iter().map(empty).collect()).collect();
        let changes = config.stages[..last].iter().any(|stage| stage.kind.writes());
        Self { config, stored, middle: changes.then(|| empty(window[1])), next: empty(window[1]) }
    }

    pub(super) fn streams_mut(&mut self) -> impl Iterator<Item = &mut Stream> {
        self.stored.iter_mut().flatten().chain(&mut self.middle).chain([&mut self.next])
    }

    /// Keeps batch `i` of what a stage left; behind the last stage also in the journal's `file`.
    pub(super) fn put(
        &mut self,
        stage: usize,
        i: usize,
        after: Between,
        file: Option<&Arc<WindowFile>>,
    ) -> Result<()> {
        let Some(stored) = self.stored.get_mut(stage + 1) else {
            return match file {
                Some(file) => self.next.put_in_journal(i, after.hidden, file),
                None => self.next.put(i, after.hidden),
            };
        };
        for (stream, tensor) in stored.iter_mut().zip(after.stored) {
            stream.put(i, tensor)?;
        }
        match &mut self.middle {
            Some(middle) if self.config.stages[stage].kind.writes() => middle.put(i, after.hidden),
            _ => Ok(()),
        }
    }

    /// Writes what [`ReferenceLayer::put`] has not written to the journal yet.
    pub(super) fn finish_journal(&mut self) -> Result<()> {
        self.next.finish_journal()
    }

    /// The activations in front of a stage in some windows; `hidden` is the residual stream before the layer. The residual
    /// stream is read only if the stage's inputs depend on it, or if `whole` is set.
    pub(super) fn at(
        &mut self,
        stage: usize,
        hidden: &mut Stream,
        windows: &Range<usize>,
        whole: bool,
    ) -> Result<Between> {
        let config = self.config;
        let changed = config.stages[..stage].iter().any(|stage| stage.kind.writes());
        let reads_hidden = !config.stages[stage].kind.writes() || config.feed_forward.routing.is_some();
        let hidden = match &mut self.middle {
            _ if !(reads_hidden || whole) => Tensor::new(),
            Some(middle) if changed => middle.of_windows(windows)?,
            _ => hidden.of_windows(windows)?,
        };
        let stored = self.stored[stage].iter_mut().map(|stream| stream.of_windows(windows));
        Ok(Between { hidden, stored: stored.collect::<Result<_>>()? })
    }

    /// The residual stream behind the layer.
    pub(super) fn into_next(self) -> Stream {
        self.next
    }
}
