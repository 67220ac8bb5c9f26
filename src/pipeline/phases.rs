//! Time of a run: seconds and arithmetic of each phase.

use std::{
    sync::{Mutex, PoisonError},
    time::Instant,
};

use super::compute_kinds::ComputeKinds;
use crate::{
    architectures::{GroupConfig, LayerConfig},
    error::Result,
    gptq::CrossCovariance,
    report::{Phase, PhaseReport},
};

/// Sums of each phase, over all workers of a run.
pub(super) struct PhaseClock(Mutex<Vec<PhaseReport>>);

impl PhaseClock {
    /// Begins with the phases of earlier parts of the run.
    pub(super) fn begin(before: &[PhaseReport]) -> Self {
        Self(Mutex::new(before.to_vec()))
    }

    /// Does some work of a phase, which takes so many floating-point operations; returns its result.
    pub(super) fn time<T>(&self, phase: Phase, operations: f64, work: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let result = work();
        self.add(phase, begun.elapsed().as_secs_f64(), operations);
        result
    }

    /// Adds time and arithmetic to a phase.
    pub(super) fn add(&self, phase: Phase, seconds: f64, operations: f64) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match all.iter_mut().find(|sum| sum.phase == phase) {
            Some(sum) => {
                sum.seconds += seconds;
                sum.operations += operations;
            }
            None => all.push(PhaseReport { phase, seconds, operations, of_limit: None }),
        }
    }

    /// The phases so far, in their usual order.
    pub(super) fn so_far(&self) -> Vec<PhaseReport> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        all.sort_by_key(|sum| sum.phase);
        all
    }
}

/// Adds to each phase its share of the speed of libtorch's largest matrix products on this CPU, in the kind that the phase
/// computes in.
///
/// # Errors
/// If libtorch cannot compute the products.
pub(super) fn compare_with_limits(phases: &mut [PhaseReport], kinds: ComputeKinds) -> Result<()> {
    let [usual, fp32] = kinds.product_speeds()?;
    for phase in phases.iter_mut().filter(|phase| phase.operations > 0.0 && phase.seconds > 0.0) {
        let limit = match phase.phase {
            Phase::Forward | Phase::Hessian | Phase::CrossCovariance | Phase::Gradients => usual,
            _ => fp32,
        };
        phase.of_limit = Some(phase.operations / phase.seconds / limit);
    }
    Ok(())
}

/// Floating-point operations of a token in a group: of its linears, of its Hessian, and of its cross-covariance. For an expert, those
/// of the average token.
#[derive(Debug, Clone, Copy)]
pub(super) struct TokenOperations {
    pub(super) forward: f64,
    pub(super) hessian: f64,
    pub(super) cross_covariance: f64,
}

/// Rows of a group's linears together, and their columns.
pub(super) fn shape_of(layer: &LayerConfig, group: &GroupConfig) -> (f64, f64) {
    let rows = layer.linears[group.linears.clone()].iter().map(|linear| linear.shape[0]).sum::<usize>();
    (rows as f64, group.width as f64)
}

/// The part of all tokens that a group has: of an expert's, the average.
pub(super) fn part_of_tokens(layer: &LayerConfig, group: &GroupConfig) -> f64 {
    match &layer.feed_forward.routing {
        Some(routing) if group.expert.is_some() => routing.per_token as f64 / routing.experts as f64,
        _ => 1.0,
    }
}

/// Operations of one token of all tokens of the run.
pub(super) fn per_token(layer: &LayerConfig, group: &GroupConfig) -> TokenOperations {
    let (n, k) = shape_of(layer, group);
    let part = part_of_tokens(layer, group);
    TokenOperations {
        forward: part * 2.0 * n * k,
        // The lower triangle alone.
        hessian: part * k * k,
        cross_covariance: part * if sums_products(n, k) { 4.0 * n * k } else { 2.0 * k * k },
    }
}

pub(super) fn sums_products(n: f64, k: f64) -> bool {
    CrossCovariance::sums_products(n as u64, k as u64)
}

/// Operations of a group's targets: the product with the cross-covariance, and two triangular systems for the product or for the
/// cross-covariance.
pub(super) fn of_targets(n: f64, k: f64) -> f64 {
    let product = if sums_products(n, k) { 0.0 } else { 2.0 * n * k * k };
    product + 2.0 * n.min(k) * k * k
}
