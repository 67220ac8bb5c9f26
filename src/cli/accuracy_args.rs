//! What is done for accuracy, as flags.

use clap::Args;
use gptq::{
    accuracy::{Quality, ScaleSearch},
    plan::Plan,
};

/// A preset, and what is to be otherwise than it says.
#[derive(Debug, Args)]
pub(super) struct AccuracyArgs {
    /// How much is done for accuracy: fast (plain GPTQ), standard, best [default: standard]
    #[arg(long, value_name = "PRESET")]
    pub(super) quality: Option<Quality>,
    /// Let scales be negative where that puts the grid's longer side to use [default: what the preset says]
    #[arg(long, conflicts_with = "unsigned_scales")]
    pub(super) signed_scales: bool,
    /// Keep all scales positive
    #[arg(long)]
    pub(super) unsigned_scales: bool,
    /// How scales are searched for: off, diagonal, block [default: what the preset says]
    #[arg(long, value_name = "SEARCH")]
    pub(super) scale_search: Option<ScaleSearch>,
    /// Whether features are sorted group by group where there is no act order; files look the same [default: what the
    /// preset says]
    #[arg(long, value_name = "BOOL")]
    pub(super) act_group_aware: Option<bool>,
    /// How far linears aim at the unquantized model's outputs, from 0 to 1 [default: what the preset says]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(super) asymmetric: Option<f64>,
    /// The part of the calibration windows, from 0 to 1, on which gradients say what errors in outputs cost; rows then make
    /// good for each other [default: what the preset says]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(super) output_hessian: Option<f64>,
    /// Fold rotations into the weights before they are quantized: the model computes the same, and outliers are spread [default:
    /// what the preset says]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub(super) rotate: Option<bool>,
    /// Even out channels that the norms make large and the linears behind them small again, or the other way round [default: what
    /// the preset says]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub(super) equalize: Option<bool>,
    /// Raise damping to what the spectrum of a Hessian and the number of tokens ask for [default: what the preset says]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub(super) shrinkage: Option<bool>,
}

impl AccuracyArgs {
    /// Puts what was given into a plan.
    pub(super) fn apply(&self, plan: &mut Plan) {
        let signed = self.signed_scales.then_some(true).or(self.unsigned_scales.then_some(false));
        plan.quality = self.quality.unwrap_or(plan.quality);
        plan.signed_scales = signed.or(plan.signed_scales);
        plan.scale_search = self.scale_search.or(plan.scale_search);
        plan.act_group_aware = self.act_group_aware.or(plan.act_group_aware);
        plan.asymmetric = self.asymmetric.or(plan.asymmetric);
        plan.rotate = self.rotate.or(plan.rotate);
        plan.equalize = self.equalize.or(plan.equalize);
        plan.shrinkage = self.shrinkage.or(plan.shrinkage);
        plan.output_hessian = self.output_hessian.or(plan.output_hessian);
    }
}
