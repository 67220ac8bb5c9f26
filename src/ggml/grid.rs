//! The grid of a block type: its levels, and the scales that it can store.

use std::ops::RangeInclusive;

use super::BlockType;

/// The levels of `IQ4_NL`, in units of the scale.
pub const IQ4_NL_LEVELS: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The grid of a block type. A weight is `scale · level(code) + offset`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockGrid {
    /// Weights that share one scale and offset.
    pub sub_len: usize,
    /// The levels of the codes.
    pub levels: Levels,
    /// Format of scale and offset.
    pub scales: ScaleForm,
}

/// The levels of codes, in units of the scale.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Levels {
    /// `code − zero`.
    Uniform {
        /// The code of level 0.
        zero: u8,
        /// The codes that are used.
        codes: RangeInclusive<u8>,
    },
    /// Those of a table, ascending.
    Table(&'static [i8; 16]),
}

/// Format of the scale and the offset of a sub-block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ScaleForm {
    /// The scale is `d` in fp16, of either sign; there is no offset.
    Scale,
    /// The scale is `d`, the offset is the minimum, both in fp16.
    ScaleAndMin,
    /// The scale is `d` times an integer in this range; there is no offset.
    Signed(RangeInclusive<i8>),
    /// The scale is `d` times an integer from 0 to this, the offset is minus the minimum times another such integer.
    Pairs(u8),
}

impl BlockType {
    /// The grid; `None` for plain numbers.
    pub fn grid(self) -> Option<BlockGrid> {
        let (sub_len, zero, codes, scales) = match self {
            Self::F32 | Self::F16 | Self::BF16 => return None,
            Self::Q4_0 => (32, 8, 0..=15, ScaleForm::Scale),
            Self::Q4_1 => (32, 0, 0..=15, ScaleForm::ScaleAndMin),
            Self::Q5_0 => (32, 16, 0..=31, ScaleForm::Scale),
            Self::Q5_1 => (32, 0, 0..=31, ScaleForm::ScaleAndMin),
            // −128 is not used by ggml either.
            Self::Q8_0 => (32, 128, 1..=255, ScaleForm::Scale),
            Self::Q2_K => (16, 0, 0..=3, ScaleForm::Pairs(15)),
            Self::Q3_K => (16, 4, 0..=7, ScaleForm::Signed(-32..=31)),
            Self::Q4_K => (32, 0, 0..=15, ScaleForm::Pairs(63)),
            Self::Q5_K => (32, 0, 0..=31, ScaleForm::Pairs(63)),
            Self::Q6_K => (16, 32, 0..=63, ScaleForm::Signed(-128..=127)),
            Self::IQ4_NL => {
                let levels = Levels::Table(&IQ4_NL_LEVELS);
                return Some(BlockGrid { sub_len: 32, levels, scales: ScaleForm::Scale });
            }
        };
        Some(BlockGrid { sub_len, levels: Levels::Uniform { zero, codes }, scales })
    }
}

impl Levels {
    /// The level of a code.
    pub fn level(&self, code: u8) -> f32 {
        match self {
            Self::Uniform { zero, .. } => f32::from(code) - f32::from(*zero),
            Self::Table(levels) => f32::from(levels[usize::from(code)]),
        }
    }

    /// The lowest and the highest level.
    pub fn ends(&self) -> [f32; 2] {
        match self {
            Self::Uniform { codes, .. } => [*codes.start(), *codes.end()].map(|code| self.level(code)),
            Self::Table(levels) => [levels[0], levels[levels.len() - 1]].map(f32::from),
        }
    }

    /// The code whose level is nearest to `x`. Ties go to the even level of a uniform grid, to the lower level of a table. NaN
    /// gives the lowest code.
    pub fn code(&self, x: f64) -> u8 {
        match self {
            Self::Uniform { zero, codes } => {
                let code = x.round_ties_even() + f64::from(*zero);
                code.clamp(f64::from(*codes.start()), f64::from(*codes.end())) as u8
            }
            Self::Table(levels) => {
                let middles = levels.windows(2).map(|pair| (f64::from(pair[0]) + f64::from(pair[1])) / 2.0);
                middles.filter(|&middle| x > middle).count() as u8
            }
        }
    }
}
