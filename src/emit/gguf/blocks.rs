//! Blocks of GGUF tensors: the codes of a GPTQ linear moved into them as they are, and dense numbers rounded into them.

use half::f16;
use rayon::prelude::*;

use crate::{
    architectures::LinearId,
    checkpoint::{PackedTensors, stored_zeros},
    error::Result,
    ggml::BlockType,
    gguf::dequantize,
    pack::PackedView,
    variant::Bits,
};

/// Features of a block of Q4_0 and Q8_0.
const BLOCK: usize = 32;
/// Rows that one task packs.
const ROWS: usize = 64;
/// Elements that one task rounds; a multiple of a block.
const CHUNK: usize = 1 << 16;

/// Why no GGUF type holds a linear's codes, and what would do.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) problem: String,
    pub(super) instead: &'static str,
}

/// Hint with variants that convert to a GGUF file.
const SEQUENTIAL: &str = "make a branch with a sequential g_idx: gptq quantize --variant 4bit-128g (or 32g, 64g; 8bit-128g for Q8_0)";

/// The type whose blocks hold the codes and scales of a linear as they are. Values of Q4_0 are `d · (q − 8)` and those of Q8_0
/// `d · q`, both with an fp16 `d` of either sign. These are the symmetric grids of 4 and 8 bits.
pub(super) fn lossless_type(id: &LinearId, linear: &PackedTensors<'_>) -> Result<BlockType, Refusal> {
    let refuse = |problem: String, instead| Err(Refusal { problem: format!("`{id}` {problem}"), instead });
    let kind = match linear.bits {
        Bits::Four => BlockType::Q4_0,
        Bits::Eight => BlockType::Q8_0,
        bits => {
            let problem = format!("has {} bits, and blocks with such codes have another grid", bits.get());
            return refuse(problem, "use 4 or 8 bits: gptq quantize --variant 4bit-128g");
        }
    };
    if !linear.in_features.is_multiple_of(BLOCK) {
        let problem = format!("has {} input features, no multiple of {BLOCK}", linear.in_features);
        return refuse(problem, "no block of llama.cpp holds such rows: use `f16` files of its converter");
    }
    let one_group = |block: &[i32]| block.iter().all(|group| *group == block[0]);
    if !linear.g_idx.chunks(BLOCK).all(one_group) {
        let rises = linear.g_idx.is_sorted();
        let problem = match rises {
            true => format!("has groups that are no multiple of {BLOCK} features, the block of {kind}"),
            false => format!("has act order: {BLOCK} neighbouring features are in several groups"),
        };
        return refuse(problem, SEQUENTIAL);
    }
    let expected = u16::from(linear.bits.symmetric_zero());
    let offset = u16::from(linear.format.zero_offset());
    if stored_zeros(&linear.qzeros, linear.bits).any(|zero| u16::from(zero) + offset != expected) {
        let problem = format!("is asymmetric: zero points are not all {expected}");
        return refuse(problem, "make a symmetric branch: gptq quantize --variant 4bit-128g, without -asym");
    }
    Ok(kind)
}

/// A linear's codes and scales in blocks of its [`lossless_type`], `[N, K]` row by row.
pub(super) fn lossless(linear: &PackedTensors<'_>, kind: BlockType) -> Vec<u8> {
    let (n, k) = (linear.out_features, linear.in_features);
    let codes = PackedView::from(linear).unpack_codes();
    let row_bytes = k / BLOCK * kind.block_bytes();
    let mut out = vec![0u8; n * row_bytes];
    out.par_chunks_mut(ROWS * row_bytes).enumerate().for_each(|(tile, out)| {
        let first = tile * ROWS;
        for block in 0..k / BLOCK {
            let group = linear.g_idx[block * BLOCK] as usize;
            for (row, out) in out.chunks_exact_mut(row_bytes).enumerate() {
                let column = first + row;
                let out = &mut out[block * kind.block_bytes()..][..kind.block_bytes()];
                out[..2].copy_from_slice(&linear.scales[group * n + column].to_le_bytes());
                let code = |feature: usize| codes[(block * BLOCK + feature) * n + column];
                for (at, byte) in out[2..].iter_mut().enumerate() {
                    *byte = match kind {
                        BlockType::Q4_0 => code(at) | code(at + BLOCK / 2) << 4,
                        // From 0..=255 around 128 to a signed byte.
                        _ => code(at) ^ 0x80,
                    };
                }
            }
        }
    });
    out
}

/// Dense numbers `bytes` of a plain type, as `kind`: fp32, or rounded to fp16 or to Q8_0 as llama.cpp rounds.
///
/// # Errors
/// When memory is exhausted.
///
/// # Panics
/// For other types, and when the numbers are no whole blocks.
pub(super) fn converted(bytes: &[u8], from: BlockType, kind: BlockType) -> Result<Vec<u8>> {
    let elements = bytes.len() / from.block_bytes();
    let mut out = vec![0u8; kind.bytes(elements).expect("whole blocks")];
    let out_chunk = CHUNK / kind.block_len() * kind.block_bytes();
    bytes.par_chunks(CHUNK * from.block_bytes()).zip(out.par_chunks_mut(out_chunk)).try_for_each(
        |(bytes, out)| -> Result<()> {
            let mut numbers = vec![0.0; bytes.len() / from.block_bytes()];
            dequantize(from, bytes, &mut numbers);
            match kind {
                BlockType::F32 => out.copy_from_slice(bytemuck::cast_slice(&numbers)),
                BlockType::F16 => {
                    let halves = numbers.iter().map(|number| f16::from_f32(*number).to_le_bytes());
                    out.as_chunks_mut().0.iter_mut().zip(halves).for_each(|(out, half)| *out = half);
                }
                BlockType::Q8_0 => {
                    let blocks = numbers.as_chunks().0.iter();
                    blocks.zip(out.as_chunks_mut().0).for_each(|(numbers, out)| *out = q8_0(numbers));
                }
                other => unreachable!("dense tensors are not written as {other}"),
            }
            Ok(())
        },
    )?;
    Ok(out)
}

/// A block of Q8_0: the scale is the largest magnitude over 127, rounded to fp16 after the codes were chosen, as in ggml's
/// `quantize_row_q8_0_ref`.
fn q8_0(numbers: &[f32; BLOCK]) -> [u8; 34] {
    let largest = numbers.iter().fold(0f32, |largest, number| largest.max(number.abs()));
    let scale = largest / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let mut block = [0; 34];
    block[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    for (byte, number) in block[2..].iter_mut().zip(numbers) {
        *byte = ((number * inverse).round() as i8) as u8;
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_of_q8_0_has_the_largest_number_at_127() {
        let mut numbers = [0f32; BLOCK];
        (numbers[3], numbers[4], numbers[31]) = (-2.54, 1.27, 0.01);
        let block = q8_0(&numbers);
        assert_eq!(f16::from_le_bytes([block[0], block[1]]), f16::from_f32(0.02));
        // 63.5 is rounded away from zero.
        assert_eq!([3, 4, 31, 0].map(|at| block[2 + at] as i8), [-127, 64, 1, 0]);
        assert_eq!(q8_0(&[0.0; BLOCK]), [0; 34]);
    }
}
