//! Rounding without a Hessian: a block has the scales with the least squared error, and a weight has the nearest level.

use rayon::prelude::*;

use super::{Block, BlockGrid, BlockType, MAX_BLOCK, SubBlock};

/// Rounds rows of `columns` weights to blocks of type `kind`. `costs` is the cost of a unit of squared error of each column, by default 1.
///
/// # Panics
/// When a row is not a whole number of blocks, or `costs` has another length.
pub fn round_rows(kind: BlockType, weights: &[f32], columns: usize, costs: Option<&[f32]>) -> Vec<u8> {
    let row_bytes = kind.bytes(columns).expect("rows are whole blocks");
    assert!(costs.is_none_or(|costs| costs.len() == columns), "a cost for each column");
    let mut bytes = vec![0; weights.len() / columns * row_bytes];
    let rows = bytes.par_chunks_mut(row_bytes).zip(weights.par_chunks(columns));
    let Some(grid) = kind.grid() else {
        rows.for_each(|(to, row)| {
            for (to, &weight) in to.chunks_mut(kind.block_bytes()).zip(row) {
                match kind {
                    BlockType::F16 => to.copy_from_slice(&half::f16::from_f32(weight).to_le_bytes()),
                    BlockType::BF16 => to.copy_from_slice(&half::bf16::from_f32(weight).to_le_bytes()),
                    _ => to.copy_from_slice(&weight.to_le_bytes()),
                }
            }
        });
        return bytes;
    };
    let factors = grid.factors(true, true);
    rows.for_each(|(to, row)| {
        let (mut wide, mut wide_costs) = ([0.0; MAX_BLOCK], [1.0; MAX_BLOCK]);
        let len = kind.block_len();
        for (i, (to, weights)) in to.chunks_mut(kind.block_bytes()).zip(row.chunks(len)).enumerate() {
            wide.iter_mut().zip(weights).for_each(|(to, &weight)| *to = f64::from(weight));
            if let Some(costs) = costs {
                let costs = costs[i * len..].iter();
                wide_costs.iter_mut().zip(costs).for_each(|(to, &cost)| *to = f64::from(cost));
            }
            round_block(&grid, &factors, &wide[..len], &wide_costs[..len]).write(kind, to);
        }
    });
    bytes
}

/// A block with the least squared error that the candidates have.
fn round_block(grid: &BlockGrid, factors: &[f64], weights: &[f64], costs: &[f64]) -> Block {
    let chunks = weights.chunks(grid.sub_len).zip(costs.chunks(grid.sub_len));
    let parts: Vec<SubBlock<'_>> = chunks.map(|(weights, costs)| SubBlock { weights, costs }).collect();
    let mut block = Block::EMPTY;
    let units = if grid.has_sub_scales() { grid.block_scales(&parts, factors) } else { [half::f16::ZERO; 2] };
    [block.d, block.min] = units;
    for (i, part) in parts.iter().enumerate() {
        let step = grid.candidates(part, factors, |step| grid.stored(step, units))[0].1;
        let codes = &mut block.codes[i * grid.sub_len..][..grid.sub_len];
        codes.iter_mut().zip(part.weights).for_each(|(code, &weight)| *code = grid.code(weight, step));
        block.set_step(&grid.scales, i, step);
    }
    block
}
