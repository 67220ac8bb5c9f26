//! A linear in blocks of ggml.

use rayon::prelude::*;

use crate::ggml::BlockType;

/// A linear whose rows are blocks of ggml, as in a GGUF file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockLinear {
    kind: BlockType,
    in_features: usize,
    /// `[N]` rows of blocks.
    bytes: Vec<u8>,
}

impl BlockLinear {
    /// `bytes` are `N` rows of `in_features` weights.
    ///
    /// # Panics
    /// When a row is not a whole number of blocks, or `bytes` are not whole rows.
    pub fn new(kind: BlockType, in_features: usize, bytes: Vec<u8>) -> Self {
        let row = kind.bytes(in_features).expect("rows are whole blocks");
        assert!(row > 0 && bytes.len().is_multiple_of(row), "whole rows");
        Self { kind, in_features, bytes }
    }

    /// Joins `parts`: the `i`-th row of the concatenated parts becomes row `rows[i]`.
    ///
    /// # Panics
    /// When there are no parts, or they differ in type or length of rows, or their rows are not as many as `rows`.
    pub fn joined(parts: &[Self], rows: &[i64]) -> Self {
        let first = parts.first().expect("a linear has parts");
        assert!(parts.iter().all(|p| (p.kind, p.in_features) == (first.kind, first.in_features)));
        let len = first.row_bytes();
        let mut bytes = vec![0; rows.len() * len];
        let from: Vec<&[u8]> = parts.iter().flat_map(|part| part.bytes.chunks(len)).collect();
        assert_eq!(from.len(), rows.len());
        for (from, &row) in from.into_iter().zip(rows) {
            bytes[row as usize * len..][..len].copy_from_slice(from);
        }
        Self::new(first.kind, first.in_features, bytes)
    }

    /// Bytes of a row.
    fn row_bytes(&self) -> usize {
        self.kind.bytes(self.in_features).expect("rows are whole blocks")
    }

    /// The type of the blocks.
    pub fn kind(&self) -> BlockType {
        self.kind
    }

    /// `K`.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// `N`.
    pub fn out_features(&self) -> usize {
        self.bytes.len() / self.row_bytes()
    }

    /// The blocks, row by row.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The dense weight `[N, K]` in fp32, as ggml computes it.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut dense = vec![0.0; self.out_features() * self.in_features];
        let rows = self.bytes.par_chunks(self.row_bytes());
        rows.zip(dense.par_chunks_mut(self.in_features))
            .for_each(|(row, dense)| self.kind.decode(row, dense));
        dense
    }
}
