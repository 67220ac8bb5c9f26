//! The numbers in a tensor's blocks, and the order of rows in llama.cpp's Llama.

use rayon::prelude::*;

use crate::ggml::BlockType;

/// Elements that one task dequantizes; a multiple of every block.
const CHUNK: usize = 1 << 16;

/// Layouts of tensors in a GGUF file that differ from a Hugging Face folder's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Element type.
    pub kind: BlockType,
    /// Heads whose rows are permuted, if they are: the linear is q or k of a Llama.
    pub heads: Option<usize>,
}

impl Stored {
    /// The numbers of a whole tensor in the order of a Hugging Face folder, row by row.
    pub fn decode(&self, shape: &[usize], bytes: &[u8]) -> Vec<f32> {
        let elements: usize = shape.iter().product();
        let mut numbers = vec![0.0; elements];
        dequantize(self.kind, bytes, &mut numbers);
        match self.heads {
            None => numbers,
            Some(heads) => {
                let rows = shape.first().copied().unwrap_or(1).max(1);
                reordered(&numbers, rows, |row| in_llama_cpp(row, rows / heads.max(1)))
            }
        }
    }
}

/// Numbers of blocks. `bytes` holds just the blocks of `numbers`.
///
/// # Panics
/// When the lengths do not fit each other.
pub fn dequantize(kind: BlockType, bytes: &[u8], numbers: &mut [f32]) {
    assert_eq!(kind.bytes(numbers.len()), Some(bytes.len()), "whole blocks");
    let chunk_bytes = CHUNK / kind.block_len() * kind.block_bytes();
    let chunks = numbers.par_chunks_mut(CHUNK).zip(bytes.par_chunks(chunk_bytes));
    chunks.for_each(|(numbers, bytes)| kind.decode(bytes, numbers));
}

/// The rows of q or k, of `row` bytes each, in the order of llama.cpp's Llama. Features that rotate together are neighbours; in
/// transformers they are half a head apart. `LlamaModel.permute` of llama.cpp's converter.
pub fn permuted(bytes: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    reordered(bytes, rows, |row| in_transformers(row, rows / heads.max(1)))
}

/// The row in transformers that is row `row` in llama.cpp.
fn in_transformers(row: usize, head_dim: usize) -> usize {
    let (head, at) = (row / head_dim, row % head_dim);
    head * head_dim + at % 2 * (head_dim / 2) + at / 2
}

/// The row in llama.cpp that is row `row` in transformers.
fn in_llama_cpp(row: usize, head_dim: usize) -> usize {
    let (head, at) = (row / head_dim, row % head_dim);
    head * head_dim + at % (head_dim / 2) * 2 + at / (head_dim / 2)
}

/// Row `source(i)` of `values` at place `i`, for each of `rows`.
fn reordered<T: Copy>(values: &[T], rows: usize, source: impl Fn(usize) -> usize) -> Vec<T> {
    let width = values.len() / rows;
    (0..rows).flat_map(|row| values[source(row) * width..][..width].iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn rows_of_heads_are_permuted_as_by_the_converter() {
        // Two heads of four rows: `reshape(2, 2, 2).swapaxes(1, 2)`.
        let rows: Vec<u8> = (0..8).collect();
        let moved = permuted(&rows, 8, 2);
        assert_eq!(moved, [0, 2, 1, 3, 4, 6, 5, 7]);
        let shape = [8, 1];
        let floats: Vec<u8> = moved.iter().flat_map(|&row| f32::from(row).to_le_bytes()).collect();
        let back = Stored { kind: BlockType::F32, heads: Some(2) }.decode(&shape, &floats);
        assert_eq!(back, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    }

    #[test]
    fn plain_numbers_and_blocks() {
        let one = f16::ONE.to_le_bytes();
        let mut numbers = [0.0; 2];
        dequantize(BlockType::F16, &[one, one].concat(), &mut numbers);
        dequantize(BlockType::BF16, &[0x80, 0x3F, 0x00, 0xC0], &mut numbers);
        assert_eq!(numbers, [1.0, -2.0]);
        // Code 1 in the low half is element 0, code 15 in the high half element 16; the others are 8, which is zero.
        let mut block = [&f16::from_f32(-0.5).to_le_bytes()[..], &[0x88; 16]].concat();
        block[2] = 0xF1;
        let mut numbers = [1.0; 32];
        dequantize(BlockType::Q4_0, &block, &mut numbers);
        assert_eq!((numbers[0], numbers[16], numbers[1]), (3.5, -3.5, 0.0));
        let block = [&f16::from_f32(0.25).to_le_bytes()[..], &[0x80; 32]].concat();
        dequantize(BlockType::Q8_0, &block, &mut numbers);
        assert_eq!(numbers, [-32.0; 32]);
    }
}
