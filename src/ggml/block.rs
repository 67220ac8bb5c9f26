//! One block: its scales and codes, and their bytes.

use half::f16;

use super::{BlockType, MAX_BLOCK, MAX_SUB_BLOCKS, ScaleForm};

/// Contents of a block. Sub-blocks and codes beyond those of its type are unused.
#[derive(Debug, Clone, PartialEq)]
pub struct Block {
    /// The scale.
    pub d: f16,
    /// The minimum, of types that have one.
    pub min: f16,
    /// The integer scale of each sub-block, of the K types.
    pub scales: [i8; MAX_SUB_BLOCKS],
    /// The integer minimum of each sub-block, of the K types that have one.
    pub mins: [u8; MAX_SUB_BLOCKS],
    /// The codes of the weights, from 0 up.
    pub codes: [u8; MAX_BLOCK],
}

/// A part of a block's bytes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Field {
    /// `d`, fp16.
    D,
    /// The minimum, fp16.
    Min,
    /// `bits` bits of each code, from `first_bit` on. Of `8 / bits · stride` codes in a row, the byte `i` of `stride` bytes holds the
    /// codes `i`, `i + stride`, `i + 2·stride`, …, the first in its lowest bits.
    Codes { first_bit: u8, bits: u8, stride: usize },
    /// A byte for each code, as a signed number: the code less 128.
    SignedCodes,
    /// A byte for each sub-block: the scale in the low, the minimum in the high 4 bits.
    FourBitPairs,
    /// 12 bytes with 8 scales and 8 minima of 6 bits. The low 6 bits of bytes 0 to 3 are scales 0 to 3, those of bytes 4 to 7
    /// minima 0 to 3. Bytes 8 to 11 have the low 4 bits of scales 4 to 7 in their low half. Those of minima 4 to 7 are in
    /// their high half. The upper 2 bits of these are the highest bits of the bytes 0 to 3 and 4 to 7.
    SixBitPairs,
    /// 12 bytes with 16 scales of 6 bits, each plus 32. Bytes 0 to 7 have the low 4 bits of scales 0 to 7 in their low half.
    /// Those of scales 8 to 15 are in their high half. Byte `8 + i` has the upper 2 bits of scales `i`, `4 + i`, `8 + i` and `12 + i`, the
    /// first in its lowest bits.
    SixBitSigned,
    /// A byte for each sub-block: the scale.
    EightBitSigned,
}

impl Field {
    /// Bytes in a block of `len` weights.
    pub(super) fn bytes(self, len: usize) -> usize {
        match self {
            Self::D | Self::Min => 2,
            Self::Codes { bits, .. } => len * usize::from(bits) / 8,
            Self::SignedCodes => len,
            Self::SixBitPairs | Self::SixBitSigned => 12,
            Self::FourBitPairs | Self::EightBitSigned => 16,
        }
    }
}

impl Block {
    /// All zero.
    pub const EMPTY: Self = Self {
        d: f16::ZERO,
        min: f16::ZERO,
        scales: [0; MAX_SUB_BLOCKS],
        mins: [0; MAX_SUB_BLOCKS],
        codes: [0; MAX_BLOCK],
    };

    /// Writes the bytes of a block of type `kind`.
    ///
    /// # Panics
    /// When `bytes` is not [`BlockType::block_bytes`] long. Values that the type cannot hold lose their upper bits.
    pub fn write(&self, kind: BlockType, mut bytes: &mut [u8]) {
        assert_eq!(bytes.len(), kind.block_bytes(), "the bytes of a block");
        let codes = &self.codes[..kind.block_len()];
        for field in kind.fields() {
            let (to, rest) = bytes.split_at_mut(field.bytes(codes.len()));
            bytes = rest;
            match *field {
                Field::D => to.copy_from_slice(&self.d.to_le_bytes()),
                Field::Min => to.copy_from_slice(&self.min.to_le_bytes()),
                Field::Codes { first_bit, bits, stride } => {
                    to.fill(0);
                    for (i, code) in codes.iter().enumerate() {
                        let (byte, bit) = place(i, bits, stride);
                        to[byte] |= (code >> first_bit & mask(bits)) << bit;
                    }
                }
                Field::SignedCodes => to.iter_mut().zip(codes).for_each(|(to, code)| *to = code ^ 0x80),
                Field::FourBitPairs => {
                    let pairs = self.scales.iter().zip(&self.mins);
                    to.iter_mut()
                        .zip(pairs)
                        .for_each(|(to, (&scale, min))| *to = scale as u8 & 15 | min << 4);
                }
                Field::SixBitPairs => {
                    for i in 0..4 {
                        let (scale, upper) = (self.scales[i] as u8 & 63, self.scales[i + 4] as u8 & 63);
                        let (min, upper_min) = (self.mins[i] & 63, self.mins[i + 4] & 63);
                        to[i] = scale | upper >> 4 << 6;
                        to[i + 4] = min | upper_min >> 4 << 6;
                        to[i + 8] = upper & 15 | upper_min << 4;
                    }
                }
                Field::SixBitSigned => {
                    to.fill(0);
                    for (i, &scale) in self.scales.iter().enumerate() {
                        let scale = (i16::from(scale) + 32) as u8 & 63;
                        to[i % 8] |= (scale & 15) << (i / 8 * 4);
                        to[8 + i % 4] |= (scale >> 4) << (i / 4 * 2);
                    }
                }
                Field::EightBitSigned => {
                    to.iter_mut().zip(self.scales).for_each(|(to, scale)| *to = scale as u8);
                }
            }
        }
    }

    /// Reads the bytes of a block of type `kind`.
    ///
    /// # Panics
    /// When `bytes` is not [`BlockType::block_bytes`] long.
    pub fn read(&mut self, kind: BlockType, mut bytes: &[u8]) {
        assert_eq!(bytes.len(), kind.block_bytes(), "the bytes of a block");
        let codes = &mut self.codes[..kind.block_len()];
        codes.fill(0);
        for field in kind.fields() {
            let (from, rest) = bytes.split_at(field.bytes(codes.len()));
            bytes = rest;
            match *field {
                Field::D => self.d = f16::from_le_bytes([from[0], from[1]]),
                Field::Min => self.min = f16::from_le_bytes([from[0], from[1]]),
                Field::Codes { first_bit, bits, stride } => {
                    for (i, code) in codes.iter_mut().enumerate() {
                        let (byte, bit) = place(i, bits, stride);
                        *code |= (from[byte] >> bit & mask(bits)) << first_bit;
                    }
                }
                Field::SignedCodes => codes.iter_mut().zip(from).for_each(|(code, from)| *code = from ^ 0x80),
                Field::FourBitPairs => {
                    for (i, from) in from.iter().enumerate() {
                        (self.scales[i], self.mins[i]) = ((from & 15) as i8, from >> 4);
                    }
                }
                Field::SixBitPairs => {
                    for i in 0..4 {
                        (self.scales[i], self.mins[i]) = ((from[i] & 63) as i8, from[i + 4] & 63);
                        self.scales[i + 4] = (from[i + 8] & 15 | from[i] >> 6 << 4) as i8;
                        self.mins[i + 4] = from[i + 8] >> 4 | from[i + 4] >> 6 << 4;
                    }
                }
                Field::SixBitSigned => {
                    for (i, scale) in self.scales.iter_mut().enumerate() {
                        let low = from[i % 8] >> (i / 8 * 4) & 15;
                        let high = from[8 + i % 4] >> (i / 4 * 2) & 3;
                        *scale = (low | high << 4) as i8 - 32;
                    }
                }
                Field::EightBitSigned => {
                    self.scales.iter_mut().zip(from).for_each(|(scale, &from)| *scale = from as i8);
                }
            }
        }
    }

    /// Scale and offset of each sub-block, in fp32. The scale is exact; the offset too.
    pub fn steps(&self, form: &ScaleForm) -> [(f32, f32); MAX_SUB_BLOCKS] {
        let (d, min) = (self.d.to_f32(), self.min.to_f32());
        std::array::from_fn(|i| match form {
            ScaleForm::Scale => (d, 0.0),
            ScaleForm::ScaleAndMin => (d, min),
            ScaleForm::Signed(_) => (d * f32::from(self.scales[i]), 0.0),
            ScaleForm::Pairs(_) => (d * f32::from(self.scales[i]), -(min * f32::from(self.mins[i]))),
        })
    }

    /// The weights of a block of type `kind`: each is exact but for one rounding to fp32, of the sum with an offset.
    ///
    /// # Panics
    /// When `weights` is not [`BlockType::block_len`] long, or the type is fp32 or fp16.
    pub fn weights(&self, kind: BlockType, weights: &mut [f32]) {
        assert_eq!(weights.len(), kind.block_len(), "the weights of a block");
        let grid = kind.grid().expect("a type with codes");
        let codes = self.codes[..kind.block_len()].chunks(grid.sub_len);
        let parts = weights.chunks_mut(grid.sub_len).zip(codes).zip(self.steps(&grid.scales));
        for ((weights, codes), (scale, offset)) in parts {
            for (weight, &code) in weights.iter_mut().zip(codes) {
                *weight = scale * grid.levels.level(code) + offset;
            }
        }
    }
}

/// The byte and the lowest bit of code `i` in [`Field::Codes`].
fn place(i: usize, bits: u8, stride: usize) -> (usize, usize) {
    let bits = usize::from(bits);
    let chunk = 8 / bits * stride;
    (i / chunk * stride + i % stride, i % chunk / stride * bits)
}

fn mask(bits: u8) -> u8 {
    (1 << bits) - 1
}
