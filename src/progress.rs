//! Progress of the library's work, for the caller to show.

/// Receives the progress of a run, from several threads if the run has several devices.
pub trait Progress: Sync {
    /// A phase of `total` steps begins, e.g. `layer 3/32`.
    fn begin(&self, phase: &str, total: u64);
    /// `steps` more steps of the current phase are done.
    fn advance(&self, steps: u64);
    /// An event happened.
    fn event(&self, event: &Event<'_>);
}

/// An event of a run.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A remark.
    Note(&'a str),
    /// Something did not go as planned; the result holds it too.
    Warning(&'a str),
    /// Work on a stage of a decoder layer begins.
    Stage {
        /// The variant, or `all variants`.
        variant: &'a str,
        /// `q/k/v`, `o`, `gate/up` or `down`.
        stage: &'a str,
    },
    /// A linear has been solved.
    Linear {
        /// `model.layers.0.self_attn.q_proj`.
        name: &'a str,
        /// The variant it was solved for.
        variant: &'a str,
        /// `‖(W−Ŵ)X‖/‖WX‖`.
        relative_error: f64,
    },
    /// A decoder layer is done for all variants; sent once before the first, with the layers of earlier parts of the run.
    Layer {
        /// Layers done.
        done: usize,
        /// Of how many.
        total: usize,
        /// Seconds for this layer; `None` for those of earlier parts of the run.
        seconds: Option<f64>,
        /// Resident memory now, bytes.
        memory: u64,
    },
}

/// Ignores everything.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _phase: &str, _total: u64) {}
    fn advance(&self, _steps: u64) {}
    fn event(&self, _event: &Event<'_>) {}
}
