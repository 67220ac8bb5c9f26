//! The hidden states of all calibration windows between two layers.

use tch::Tensor;

use crate::{calibration::Windows, error::Result, model::Llama};

/// Tokens that go through the model together: enough to keep the processor busy, few enough to stay small.
const BATCH_TOKENS: usize = 1024;

/// Hidden states `[B, S, hidden]` of one variant, batch by batch.
#[derive(Debug)]
pub(super) struct HiddenStates {
    batches: Vec<Tensor>,
}

impl HiddenStates {
    /// The embeddings of all windows.
    pub(super) fn embed(llama: &Llama<'_>, windows: &Windows) -> Result<Self> {
        let per_batch = (BATCH_TOKENS / windows.seq_len()).max(1) * windows.seq_len();
        let batches = windows.ids().chunks(per_batch).map(|ids| llama.embed(ids, windows.seq_len()));
        Ok(Self { batches: batches.collect::<Result<_>>()? })
    }

    /// Another variant's states, equal until its first layer is solved. Tensors are replaced, never written to, so
    /// that the copies can share memory.
    pub(super) fn share(&self) -> Self {
        Self { batches: self.batches.iter().map(Tensor::shallow_clone).collect() }
    }

    pub(super) fn batches(&self) -> &[Tensor] {
        &self.batches
    }

    pub(super) fn batches_mut(&mut self) -> &mut [Tensor] {
        &mut self.batches
    }
}
