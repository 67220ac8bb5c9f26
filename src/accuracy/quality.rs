//! The presets, and what they turn on.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{ScaleSearch, Scales};
use crate::variant::{Sorting, Variant};

/// How much is done for accuracy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quality {
    /// Plain GPTQ.
    Fast,
    /// What costs little beside it.
    #[default]
    Standard,
    /// All that was measured to help.
    Best,
}

/// What is done beyond plain GPTQ.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AccuracyOptions {
    /// How the scale of a group is chosen.
    #[serde(flatten)]
    pub scales: Scales,
    /// Group-aware reordering where there is no act order, as GPTQModel has it: groups are taken by their largest Hessian
    /// diagonal, and the features of a group by theirs. Groups stay runs of neighbouring features, so that to a reader it is
    /// as if there were no order.
    #[serde(rename = "act_group_aware")]
    pub group_aware: bool,
    /// Asymmetric calibration (GPTAQ, arXiv 2504.02692): how far a linear aims at what the unquantized model computes from
    /// *its* inputs, from 0, what the linear itself would compute from the inputs as they are, to 1.
    pub asymmetric: f64,
    /// The part of the calibration windows, from 0 to 1, on which gradients of the unquantized model say what errors in each
    /// output cost (YAQA, arXiv 2505.22988); rows then make good for the errors of rows before them.
    #[serde(default)]
    pub output_hessian: f64,
    /// Whether rotations are folded into the weights first (QuaRot, arXiv 2404.00456).
    #[serde(default)]
    pub rotate: bool,
    /// Whether what the norms make large and the linears behind them small again, or the other way round, is evened out first
    /// (cross-layer equalization, arXiv 1906.04721).
    #[serde(default)]
    pub equalize: bool,
    /// Whether damping is raised to what the spectrum of a Hessian asks for (oracle approximating shrinkage, arXiv 0907.4698).
    #[serde(default)]
    pub shrinkage: bool,
}

impl AccuracyOptions {
    /// Plain GPTQ.
    pub const NONE: Self = Self {
        scales: Scales::PLAIN,
        group_aware: false,
        asymmetric: 0.0,
        output_hessian: 0.0,
        rotate: false,
        equalize: false,
        shrinkage: false,
    };

    /// Whether the reference model is run beside the quantized ones.
    pub fn runs_reference(&self) -> bool {
        self.asymmetric > 0.0
    }

    /// The order that a variant's features are quantized in.
    pub fn sorting(&self, variant: &Variant) -> Sorting {
        variant.sorting(self.group_aware)
    }

    /// On how many of the calibration windows, from the first on, gradients are taken.
    pub fn gradient_windows(&self, windows: usize) -> usize {
        if self.output_hessian == 0.0 { 0 } else { part(self.output_hessian, windows) }
    }
}

/// At least one.
fn part(share: f64, windows: usize) -> usize {
    ((windows as f64 * share).ceil() as usize).max(1).min(windows)
}

impl Default for AccuracyOptions {
    fn default() -> Self {
        Self::NONE
    }
}

impl Quality {
    /// Damping, as a fraction of the mean diagonal of a Hessian. GPTQ's own 0.01; what goes beyond plain GPTQ gains from more on real models,
    /// most on text that it was not calibrated on (docs/accuracy.md).
    pub fn damp(self) -> f64 {
        match self {
            Self::Fast => 0.01,
            Self::Standard | Self::Best => 0.05,
        }
    }

    /// What the preset turns on.
    pub fn options(self) -> AccuracyOptions {
        let searched = |search| Scales { signed: true, search };
        match self {
            Self::Fast => AccuracyOptions::NONE,
            Self::Standard => AccuracyOptions {
                scales: searched(ScaleSearch::Block),
                group_aware: true,
                // On a real model this brings more than all the rest together (docs/accuracy.md).
                asymmetric: 1.0,
                equalize: true,
                shrinkage: true,
                ..AccuracyOptions::NONE
            },
            Self::Best => AccuracyOptions {
                scales: searched(ScaleSearch::Block),
                group_aware: true,
                asymmetric: 1.0,
                output_hessian: 1.0,
                rotate: true,
                equalize: true,
                shrinkage: true,
            },
        }
    }
}

impl fmt::Display for AccuracyOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut on = Vec::new();
        if self.rotate {
            on.push("folded rotations".to_owned());
        }
        if self.equalize && !self.rotate {
            on.push("equalized norms".to_owned());
        }
        if self.scales.signed {
            on.push("signed scales".to_owned());
        }
        if self.scales.search != ScaleSearch::Off {
            on.push(format!("scale search by {}", self.scales.search));
        }
        if self.group_aware {
            on.push("group-aware order".to_owned());
        }
        if self.asymmetric > 0.0 {
            on.push(format!("asymmetric calibration at {}", self.asymmetric));
        }
        if self.output_hessian > 0.0 {
            let share = (self.output_hessian * 100.0).round();
            on.push(format!("output Hessians from gradients on {share}% of the windows"));
        }
        if self.shrinkage {
            on.push("damping by shrinkage".to_owned());
        }
        f.write_str(&if on.is_empty() { "plain GPTQ".to_owned() } else { on.join(", ") })
    }
}

impl fmt::Display for Quality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_say_what_they_turn_on() {
        let said = [Quality::Fast, Quality::Standard, Quality::Best].map(|q| q.options().to_string());
        assert_eq!(
            said,
            [
                "plain GPTQ",
                "equalized norms, signed scales, scale search by block, group-aware order, \
                 asymmetric calibration at 1, damping by shrinkage",
                "folded rotations, signed scales, scale search by block, group-aware order, \
                 asymmetric calibration at 1, \
                 output Hessians from gradients on 100% of the windows, damping by shrinkage",
            ]
        );
    }

    #[test]
    fn presets_print_what_they_parse() {
        for quality in [Quality::Fast, Quality::Standard, Quality::Best] {
            let parsed = serde_json::from_value::<Quality>(quality.to_string().into());
            assert_eq!(parsed.unwrap(), quality);
        }
        assert!(serde_json::from_value::<Quality>("good".into()).is_err());
    }
}
