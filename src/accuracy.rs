//! Accuracy options, which are everything beyond plain GPTQ, and the presets that choose among them.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::variant::{Bits, Sorting, Variant};

/// A preset of accuracy options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quality {
    /// Plain GPTQ.
    Fast,
    /// Options that take little time beside plain GPTQ.
    #[default]
    Standard,
    /// All options that improve accuracy by measurement.
    Best,
}

/// Accuracy options: everything beyond plain GPTQ.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AccuracyOptions {
    /// Choice of a group's scale.
    #[serde(flatten)]
    pub scales: Scales,
    /// Group-aware order for variants without act order, as in GPTQModel: groups are sorted by their largest Hessian diagonal,
    /// and features by theirs within each group. Groups stay runs of neighbouring features, so that readers see no order.
    #[serde(rename = "act_group_aware")]
    pub group_aware: bool,
    /// Asymmetric calibration (GPTAQ, arXiv 2504.02692): strength from 0 to 1. At 0 the target is the weight, at 1 the one
    /// whose outputs come nearest to the reference model's.
    pub asymmetric: f64,
    /// The part of the calibration windows, from 0 to 1, on which gradients of the reference model give output Hessians (YAQA,
    /// arXiv 2505.22988) and weights of tokens. Rows are then solved against targets that compensate the errors of the rows before them.
    #[serde(default)]
    pub output_hessian: f64,
    /// Whether to fold rotations into the weights before calibration (QuaRot, arXiv 2404.00456).
    #[serde(default)]
    pub rotate: bool,
    /// Whether to equalize channels between norms and the linears that read them, before calibration (cross-layer
    /// equalization, arXiv 1906.04721).
    #[serde(default)]
    pub equalize: bool,
    /// Whether to raise damping to that of the oracle approximating shrinkage estimator (arXiv 0907.4698).
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

    /// Whether the reference model runs beside the quantized ones.
    pub fn runs_reference(&self) -> bool {
        self.asymmetric > 0.0
    }

    /// Order of a variant's features in the solver.
    pub fn sorting(&self, variant: &Variant) -> Sorting {
        variant.sorting(self.group_aware)
    }

    /// Number of calibration windows, from the first on, for gradients: at least one, if any.
    pub fn gradient_windows(&self, windows: usize) -> usize {
        match self.output_hessian {
            0.0 => 0,
            share => ((windows as f64 * share).ceil() as usize).max(1).min(windows),
        }
    }
}

impl Default for AccuracyOptions {
    fn default() -> Self {
        Self::NONE
    }
}

impl Quality {
    /// Damping, as a fraction of the mean diagonal of a Hessian: 0.01 for `fast` as in GPTQ, 0.05 for the others. The larger
    /// value lowers the divergence of real models, most on other text than the calibration's (docs/accuracy.md).
    pub fn damp(self) -> f64 {
        match self {
            Self::Fast => 0.01,
            Self::Standard | Self::Best => 0.05,
        }
    }

    /// The options of the preset.
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
            on.push(format!("output Hessians and token weights from gradients on {share}% of the windows"));
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

/// Choice of a group's scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scales {
    /// Whether the scale of a symmetric grid may be negative. Such a grid has one level more on one side of zero; the sign
    /// chooses the side. Readers multiply by the scale, whatever its sign.
    #[serde(rename = "signed_scales")]
    pub signed: bool,
    /// Candidates for the scale.
    #[serde(rename = "scale_search")]
    pub search: ScaleSearch,
}

/// Candidates for a group's scale, and the measure of their error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScaleSearch {
    /// The scale of the weights' range.
    Off,
    /// That scale and smaller scales, which clip the largest weights and round all others more finely. The few with the least
    /// `Σ Ũ_ii² (q_i − w_i)²` are compared, each with the codes that the column loop chooses in this group. The best scale has the
    /// least `‖(q − w) Ũ_gg‖²`, the group's part of the objective. GPTQ's `mse` option weighs all columns alike. Marlin's
    /// quantizer (arXiv 2408.11743) also weighs by a block of the Hessian.
    Block,
}

impl Scales {
    /// Plain GPTQ.
    pub const PLAIN: Self = Self { signed: false, search: ScaleSearch::Off };

    /// The factors of the range's scale to try, in order; the first of equal candidates wins. The first factor is 1.
    /// Asymmetric grids have no signed factors.
    pub fn factors(self, bits: Bits, symmetric: bool) -> Vec<f64> {
        let steps = if self.search == ScaleSearch::Off { 0 } else { shrink_steps(bits) };
        let shrunk = (0..=steps).map(|i| 1.0 - SHRINK_STEP * f64::from(i));
        if self.signed && symmetric { shrunk.flat_map(|f| [f, -f]).collect() } else { shrunk.collect() }
    }

    /// Number of the best candidates by the diagonal that the block compares; 0 without that comparison.
    pub fn finalists(self) -> usize {
        if self.search == ScaleSearch::Block { FINALISTS } else { 0 }
    }
}

/// The difference of neighbouring factors.
const SHRINK_STEP: f64 = 0.01;

/// Candidates that the block compares.
const FINALISTS: usize = 8;

/// Number of smaller scales. With fewer levels, the best scale clips more of a group's range.
fn shrink_steps(bits: Bits) -> u32 {
    match bits {
        Bits::Two => 75,
        Bits::Three => 60,
        Bits::Four | Bits::Eight => 45,
    }
}

impl fmt::Display for ScaleSearch {
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
                 output Hessians and token weights from gradients on 100% of the windows, damping by shrinkage",
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

    #[test]
    fn the_scale_of_the_range_comes_first_and_signs_alternate() {
        let searched = Scales { signed: true, search: ScaleSearch::Block };
        let factors = searched.factors(Bits::Four, true);
        assert_eq!(factors.len(), 92);
        assert_eq!(factors[..3], [1.0, -1.0, 0.99]);
        assert!(factors.iter().all(|f| f.abs() >= 0.54));
        assert_eq!(searched.factors(Bits::Four, false).len(), 46);
        assert_eq!(Scales::PLAIN.factors(Bits::Two, true), [1.0]);
        assert_eq!(Scales { signed: true, ..Scales::PLAIN }.factors(Bits::Four, true), [1.0, -1.0]);
    }

    #[test]
    fn searches_print_what_they_parse() {
        for search in [ScaleSearch::Off, ScaleSearch::Block] {
            let parsed = serde_json::from_value::<ScaleSearch>(search.to_string().into());
            assert_eq!(parsed.unwrap(), search);
        }
        assert!(serde_json::from_value::<ScaleSearch>("full".into()).is_err());
    }
}
