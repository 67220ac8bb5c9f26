//! How the scale of a group is chosen.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::variant::Bits;

/// How the scale of a group is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scales {
    /// Whether the scale of a symmetric grid may be negative. Such a grid has one level more on one side of zero than on
    /// the other; the sign says on which. Readers multiply by the scale and do not look at its sign.
    #[serde(rename = "signed_scales")]
    pub signed: bool,
    /// Which scales are tried.
    #[serde(rename = "scale_search")]
    pub search: ScaleSearch,
}

/// Which scales are tried for a group, and how they are judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScaleSearch {
    /// The one that the range of the weights gives.
    Off,
    /// That one and smaller ones, which clip the largest weights and round all others more finely; the best is where
    /// `Σ Ũ_ii² (q_i − w_i)²` is least. As in GPTQ's `mse` option and Marlin's quantizer (arXiv 2408.11743), but weighted by
    /// what an error of each column costs once the columns behind it have made good for it.
    Diagonal,
    /// The best few of those, each with the codes that the column loop would then choose in this group: the best is where
    /// `‖(q − w) Ũ_gg‖²`, what the group adds to the objective, is least.
    Block,
}

impl Scales {
    /// Plain GPTQ.
    pub const PLAIN: Self = Self { signed: false, search: ScaleSearch::Off };

    /// What the scale of the range is multiplied by, one after another; the first of equals counts. The first one is 1.
    /// A grid that is not symmetric has no sign to choose.
    pub fn factors(self, bits: Bits, symmetric: bool) -> Vec<f64> {
        let steps = if self.search == ScaleSearch::Off { 0 } else { shrink_steps(bits) };
        let shrunk = (0..=steps).map(|i| 1.0 - SHRINK_STEP * f64::from(i));
        if self.signed && symmetric { shrunk.flat_map(|f| [f, -f]).collect() } else { shrunk.collect() }
    }

    /// How many of the best by the diagonal are judged by the block; 0 where none are.
    pub fn finalists(self) -> usize {
        if self.search == ScaleSearch::Block { FINALISTS } else { 0 }
    }
}

/// The difference of neighbouring factors.
const SHRINK_STEP: f64 = 0.01;

/// Scales that the block decides between.
const FINALISTS: usize = 8;

/// How often a scale shrinks: the fewer levels there are, the more of a group's range is better clipped.
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
    fn the_scale_of_the_range_comes_first_and_signs_alternate() {
        let searched = Scales { signed: true, search: ScaleSearch::Diagonal };
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
        for search in [ScaleSearch::Off, ScaleSearch::Diagonal, ScaleSearch::Block] {
            let parsed = serde_json::from_value::<ScaleSearch>(search.to_string().into());
            assert_eq!(parsed.unwrap(), search);
        }
        assert!(serde_json::from_value::<ScaleSearch>("full".into()).is_err());
    }
}
