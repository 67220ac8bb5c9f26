//! Block formats of ggml: how llama.cpp stores the weights of a row in blocks of codes and scales.
//!
//! A row of weights is a run of blocks. A block has one scale `d` in fp16, and for some types a minimum in fp16. The blocks of
//! the K types have 256 weights in sub-blocks of 16 or 32, each with an integer scale, and for some types an integer minimum.
//! The layouts are those of `ggml-common.h` and `ggml-quants.c` of llama.cpp (MIT licence).

mod block;
mod fit;
mod grid;
mod mix;
mod rounding;
#[cfg(test)]
mod tests;

pub use block::Block;
pub use fit::{D_FACTORS, SubBlock, SubStep};
pub use grid::{BlockGrid, IQ4_NL_LEVELS, Levels, ScaleForm};
pub use mix::{Mix, MixModel};
pub use rounding::round_rows;

use block::Field;

/// The most weights in a block.
pub const MAX_BLOCK: usize = 256;

/// The most sub-blocks in a block.
pub const MAX_SUB_BLOCKS: usize = 16;

/// A type of a tensor's values in ggml.
#[allow(non_camel_case_types, reason = "the names of ggml")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BlockType {
    /// fp32.
    F32,
    /// fp16.
    F16,
    /// bf16.
    BF16,
    /// 32 weights, 4 bits, symmetric: 4.5 bits a weight.
    Q4_0,
    /// 32 weights, 4 bits, with a minimum: 5 bits a weight.
    Q4_1,
    /// 32 weights, 5 bits, symmetric: 5.5 bits a weight.
    Q5_0,
    /// 32 weights, 5 bits, with a minimum: 6 bits a weight.
    Q5_1,
    /// 32 weights, 8 bits, symmetric: 8.5 bits a weight.
    Q8_0,
    /// 16 sub-blocks of 16 weights, 2 bits, with 4-bit scales and minima: 2.625 bits a weight.
    Q2_K,
    /// 16 sub-blocks of 16 weights, 3 bits, symmetric, with 6-bit signed scales: 3.4375 bits a weight.
    Q3_K,
    /// 8 sub-blocks of 32 weights, 4 bits, with 6-bit scales and minima: 4.5 bits a weight.
    Q4_K,
    /// 8 sub-blocks of 32 weights, 5 bits, with 6-bit scales and minima: 5.5 bits a weight.
    Q5_K,
    /// 16 sub-blocks of 16 weights, 6 bits, symmetric, with 8-bit signed scales: 6.5625 bits a weight.
    Q6_K,
    /// 32 weights, 4 bits, with levels that are not evenly spaced: 4.5 bits a weight.
    IQ4_NL,
}

impl BlockType {
    /// All types: plain numbers, then blocks in ggml's order.
    pub const ALL: [Self; 14] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
        Self::IQ4_NL,
    ];

    /// Its number in files, of `enum ggml_type`.
    pub fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::BF16 => 30,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2_K => 10,
            Self::Q3_K => 11,
            Self::Q4_K => 12,
            Self::Q5_K => 13,
            Self::Q6_K => 14,
            Self::IQ4_NL => 20,
        }
    }

    /// The type with a number in files, if it is one of these.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.id() == id)
    }

    /// Its name in llama.cpp.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2_K => "Q2_K",
            Self::Q3_K => "Q3_K",
            Self::Q4_K => "Q4_K",
            Self::Q5_K => "Q5_K",
            Self::Q6_K => "Q6_K",
            Self::IQ4_NL => "IQ4_NL",
        }
    }

    /// Weights a block; rows are whole blocks.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
            _ => 32,
        }
    }

    /// Bytes a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            _ => self.fields().iter().map(|field| field.bytes(self.block_len())).sum(),
        }
    }

    /// Bytes of so many weights; `None` if these are not whole blocks, or beyond any memory.
    pub fn bytes(self, weights: usize) -> Option<usize> {
        let (len, bytes) = (self.block_len(), self.block_bytes());
        if weights.is_multiple_of(len) { (weights / len).checked_mul(bytes) } else { None }
    }

    /// Whether a weight is a number by itself.
    pub fn is_plain(self) -> bool {
        self.block_len() == 1
    }

    /// Bits of a code, or of a plain number.
    pub fn bits(self) -> u32 {
        match self.grid() {
            Some(grid) => grid.levels.count().next_power_of_two().ilog2(),
            None => 8 * self.block_bytes() as u32,
        }
    }

    /// Codes that share a scale; 1 for plain numbers.
    pub fn group_len(self) -> usize {
        self.grid().map_or(1, |grid| grid.sub_len)
    }

    /// Whether scales have no minima beside them.
    pub fn is_symmetric(self) -> bool {
        self.grid().is_none_or(|grid| !grid.has_offsets())
    }

    /// Decodes whole blocks to weights in fp32, as ggml computes them.
    ///
    /// # Panics
    /// When `bytes` and `weights` are not the same number of whole blocks.
    pub fn decode(self, bytes: &[u8], weights: &mut [f32]) {
        let (len, size) = (self.block_len(), self.block_bytes());
        assert_eq!((bytes.len() % size, weights.len()), (0, bytes.len() / size * len), "whole blocks");
        match self {
            Self::F32 => {
                let all = bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
                weights.iter_mut().zip(all).for_each(|(to, value)| *to = value);
            }
            Self::F16 => {
                let all = bytes.as_chunks().0.iter().map(|&bytes| half::f16::from_le_bytes(bytes).to_f32());
                weights.iter_mut().zip(all).for_each(|(to, value)| *to = value);
            }
            Self::BF16 => {
                let all = bytes.as_chunks().0.iter().map(|&bytes| half::bf16::from_le_bytes(bytes).to_f32());
                weights.iter_mut().zip(all).for_each(|(to, value)| *to = value);
            }
            _ => {
                let mut block = Block::EMPTY;
                for (bytes, weights) in bytes.chunks_exact(size).zip(weights.chunks_exact_mut(len)) {
                    block.read(self, bytes);
                    block.weights(self, weights);
                }
            }
        }
    }

    /// The parts of a block, in the order of its bytes; none for plain numbers.
    fn fields(self) -> &'static [Field] {
        const fn codes(first_bit: u8, bits: u8, stride: usize) -> Field {
            Field::Codes { first_bit, bits, stride }
        }
        match self {
            Self::F32 | Self::F16 | Self::BF16 => &[],
            Self::Q4_0 | Self::IQ4_NL => const { &[Field::D, codes(0, 4, 16)] },
            Self::Q4_1 => const { &[Field::D, Field::Min, codes(0, 4, 16)] },
            Self::Q5_0 => const { &[Field::D, codes(4, 1, 1), codes(0, 4, 16)] },
            Self::Q5_1 => const { &[Field::D, Field::Min, codes(4, 1, 1), codes(0, 4, 16)] },
            Self::Q8_0 => &[Field::D, Field::SignedCodes],
            Self::Q2_K => const { &[Field::FourBitPairs, codes(0, 2, 32), Field::D, Field::Min] },
            Self::Q3_K => const { &[codes(2, 1, 32), codes(0, 2, 32), Field::SixBitSigned, Field::D] },
            Self::Q4_K => const { &[Field::D, Field::Min, Field::SixBitPairs, codes(0, 4, 32)] },
            Self::Q5_K => {
                const { &[Field::D, Field::Min, Field::SixBitPairs, codes(4, 1, 32), codes(0, 4, 32)] }
            }
            Self::Q6_K => const { &[codes(0, 4, 64), codes(4, 2, 32), Field::EightBitSigned, Field::D] },
        }
    }
}

impl std::fmt::Display for BlockType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
