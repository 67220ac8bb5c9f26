//! The quantization grid: maps a range of weights to a scale and a zero point, and a weight to a code.

use half::f16;

use crate::{accuracy::Scales, fp16::round_to_f16, variant::Bits};

/// Scale and zero point of one group of one row. A weight is `scale · (code − zero)`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Step {
    /// Rounded to fp16 before any code is chosen, because readers multiply by the fp16 scale. A negative scale turns the grid
    /// around, so that its longer side lies above zero.
    pub scale: f16,
    /// The true zero point, `1..=2^b−1`.
    pub zero: u8,
}

/// A grid of `2^b` levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    bits: Bits,
    symmetric: bool,
}

impl Grid {
    /// The grid of a variant.
    pub fn new(bits: Bits, symmetric: bool) -> Self {
        Self { bits, symmetric }
    }

    /// The zero point of a symmetric grid.
    pub fn symmetric_zero(self) -> Option<u8> {
        self.symmetric.then(|| self.bits.symmetric_zero())
    }

    /// The factors of a range's scale that a search tries.
    pub fn factors(self, scales: Scales) -> Vec<f64> {
        scales.factors(self.bits, self.symmetric)
    }

    /// The largest code.
    pub fn max_code(self) -> u8 {
        self.bits.max_code()
    }

    /// Fits scale and zero to weights in `min..=max`.
    ///
    /// Symmetric: `scale = 2·max|w|/(2^b−1)`, zero `2^(b−1)`. Asymmetric: the range is widened to contain 0, and the zero point
    /// is in `1..=2^b−1`. The v1 format stores `zero − 1`, and readers disagree about −1. A scale that fp16 would round to zero
    /// becomes the smallest fp16 number above zero. A scale above fp16's range becomes infinite; the caller must refuse it.
    pub fn fit(self, min: f64, max: f64) -> Step {
        let levels = f64::from(self.bits.max_code());
        if self.symmetric {
            let scale = self.symmetric_scale(min.abs().max(max.abs()));
            return Step { scale: f16::from_f32(scale), zero: self.bits.symmetric_zero() };
        }
        let (min, max) = (min.min(0.0), max.max(0.0));
        let scale = f16::from_f32(to_scale((max - min) / levels));
        let zero = (-min / f64::from(scale)).round_ties_even();
        if zero < 1.0 && scale.is_finite() {
            // All levels but one lie above zero.
            return Step { scale: f16::from_f32(to_scale(max / (levels - 1.0))), zero: 1 };
        }
        Step { scale, zero: zero.min(levels) as u8 }
    }

    /// The scale of a symmetric grid for weights of up to this size, as fp16 has it. Loops of it become vectors.
    #[inline(always)]
    pub fn symmetric_scale(self, largest: f64) -> f32 {
        to_scale(2.0 * largest / f64::from(self.bits.max_code()))
    }

    /// [`Grid::fit`] for `factor` times the range; a negative factor turns a symmetric grid around.
    pub fn fit_scaled(self, min: f64, max: f64, factor: f64) -> Step {
        let size = factor.abs();
        let step = self.fit(min * size, max * size);
        if factor < 0.0 { Step { scale: -step.scale, ..step } } else { step }
    }

    /// The code nearest to `weight`; ties go to the even offset from zero.
    pub fn code(self, weight: f64, step: Step) -> u8 {
        let offset = (weight / f64::from(step.scale)).round_ties_even();
        (offset + f64::from(step.zero)).clamp(0.0, f64::from(self.bits.max_code())) as u8
    }
}

impl Step {
    /// The weight of `code`, exact in f64.
    pub fn weight(self, code: u8) -> f64 {
        f64::from(self.scale) * (f64::from(code) - f64::from(self.zero))
    }
}

/// The scale of a group of zeros. Any scale that is finite and above zero would do.
const SCALE_OF_ZEROS: f64 = 2.0 / 15.0;

#[inline(always)]
fn to_scale(scale: f64) -> f32 {
    const SMALLEST: f32 = f16::MIN_POSITIVE_SUBNORMAL.to_f32_const();
    let rounded = round_to_f16(if scale == 0.0 { SCALE_OF_ZEROS } else { scale });
    if rounded > SMALLEST { rounded } else { SMALLEST }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// fp16 scales move the outermost level by up to 2⁻¹¹ of the range, i.e. by this many steps at 8 bits.
    const FP16_SLACK: f64 = 128.0 / 2048.0;

    proptest! {
        /// Symmetric grids reach −2^(b−1) but only 2^(b−1)−1: the scale leaves half a step at each end.
        #[test]
        fn error_is_at_most_half_a_step(
            bits in prop::sample::select(&Bits::ALL[..]),
            symmetric: bool,
            weights in prop::collection::vec(-3.0f64..3.0, 2..40),
        ) {
            let grid = Grid::new(bits, symmetric);
            let min = weights.iter().copied().fold(f64::INFINITY, f64::min);
            let max = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let step = grid.fit(min, max);
            // Rounding the zero point shifts an asymmetric grid by up to half a step at its ends.
            let limit = if symmetric { 0.5 } else { 1.0 } + FP16_SLACK;
            for w in weights {
                let error = (step.weight(grid.code(w, step)) - w).abs() / f64::from(step.scale);
                prop_assert!(error <= limit, "{w} is {error} steps off");
            }
        }
    }

    #[test]
    fn one_sided_groups_use_their_whole_range() {
        // AutoGPTQ gives this group scale max/15 with zero 8 and clips it at 7/15 of its range.
        let grid = Grid::new(Bits::Four, true);
        let step = grid.fit(0.1, 0.7);
        assert_eq!(step.zero, 8);
        assert!((step.weight(grid.code(0.7, step)) - 0.7).abs() <= 0.5 * f64::from(step.scale) + 1e-3);
    }

    #[test]
    fn asymmetric_zero_is_never_zero() {
        for (min, max) in [(0.1, 0.7), (0.0, 1.0), (-0.001, 5.0), (-1.0, -0.5), (0.0, 0.0)] {
            for bits in Bits::ALL {
                let grid = Grid::new(bits, false);
                let step = grid.fit(min, max);
                assert!((1..=bits.max_code()).contains(&step.zero), "{min} {max} {bits:?}");
                let top = step.weight(grid.code(max, step));
                assert!((top - max).abs() <= f64::from(step.scale), "{min} {max} {bits:?}: {top}");
            }
        }
    }

    #[test]
    fn scales_are_finite_and_positive_or_refusable() {
        let grid = Grid::new(Bits::Four, true);
        assert!(grid.fit(0.0, 0.0).scale > f16::ZERO);
        assert_eq!(grid.fit(-1e-12, 1e-12).scale, f16::MIN_POSITIVE_SUBNORMAL);
        assert!(grid.fit(-1e9, 1e9).scale.is_infinite());
        // Half of the range would fit, all of it does not.
        assert!(Grid::new(Bits::Four, false).fit(-6e5, 6e5).scale.is_infinite());
    }

    #[test]
    fn scales_are_rounded_once() {
        // Just above the middle of 1 and its neighbour, where fp32 rounds it to; 15 of these are the range.
        let scale = 1.0 + 2f64.powi(-11) + 2f64.powi(-30);
        let step = Grid::new(Bits::Four, true).fit(0.0, scale * 7.5);
        assert_eq!(f64::from(step.scale), 1.0 + 2f64.powi(-10));
    }
}
