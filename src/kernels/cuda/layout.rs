//! The memory layout of `int4_matmul.cu`: packed weights, their parameters, tiles of activations, values of lanes. The kernel's
//! source has an index function of the same name for each one here.
//!
//! K = input features, N = output features, M = tokens, b = bits. A *strip* is 16 output features, a *tile* 16 input
//! features, a *chunk* 64; one strip by one tile is one A operand of `mma.m16n8k16`.

/// Output features of a strip.
pub const STRIP: usize = 16;
/// Input features of a tile.
pub const TILE: usize = 16;
/// Input features of a chunk; weights are padded to whole ones.
pub const CHUNK: usize = 64;
/// Tiles of a chunk.
pub const TILES: usize = CHUNK / TILE;
/// Weights are padded to a multiple of this many output features, so that every block of them is whole.
pub const PADDED_FEATURES: usize = 128;
/// Threads of every kernel's blocks.
pub const THREADS: usize = 256;
/// Warps of a block.
pub const WARPS: usize = THREADS / LANES;
/// Lanes of a warp.
pub const LANES: usize = 32;
/// Activations and outputs are read and written 16 bytes at a time: their rows are multiples of this many values.
pub const ROW_MULTIPLE: usize = 8;

/// Bytes of one strip in one chunk.
pub const fn chunk_bytes(bits: usize) -> usize {
    STRIP * CHUNK * bits / 8
}

/// Bytes of the parameters of one strip in one group.
pub const fn param_bytes(zeros: bool) -> usize {
    if zeros { 64 } else { 32 }
}

/// Aligned runs of this many tiles lie in one group if groups are `group` input features: the macro `GROUP_TILES`.
pub const fn group_tiles(group: usize) -> usize {
    if group.is_multiple_of(64) {
        4
    } else if group.is_multiple_of(32) {
        2
    } else {
        1
    }
}

/// Bytes before the chunk of a strip.
pub const fn weight_offset(bits: usize, strip: usize, chunk: usize, chunks: usize) -> usize {
    (strip * chunks + chunk) * chunk_bytes(bits)
}

/// Bytes, within a chunk of a strip, before the b/4 words of a lane in a tile.
pub const fn word_offset(bits: usize, tile: usize, lane: usize) -> usize {
    if bits == 4 { lane * 16 + tile * 4 } else { tile / 2 * 512 + lane * 16 + tile % 2 * 8 }
}

/// Bytes before the parameters of a strip in a group.
pub const fn param_offset(zeros: bool, strip: usize, group: usize, groups: usize) -> usize {
    (strip * groups + group) * param_bytes(zeros)
}

/// Place of a row's value among the 16 of a strip: rows r and r + 8 share a word.
pub const fn param_index(row: usize) -> usize {
    row % 8 * 2 + row / 8
}

/// Row of element `e` = 0..8 of a lane's A operand, as the PTX ISA gives it for `mma.m16n8k16`.
pub const fn operand_row(lane: usize, e: usize) -> usize {
    lane / 4 + e / 2 % 2 * 8
}

/// Column of element `e` of a lane's A operand.
pub const fn operand_column(lane: usize, e: usize) -> usize {
    lane % 4 * 2 + e % 2 + e / 4 * 8
}

/// First bit of element `e` among a lane's words of a tile.
///
/// At 4 bits register i of the operand comes from nibbles i and i + 4, which lie 16 bits apart, so one mask takes both.
pub const fn code_bit(bits: usize, e: usize) -> usize {
    if bits == 4 { (e / 2 + e % 2 * 4) * 4 } else { e * 8 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes, within a tile of tokens in shared memory, before a 16-byte piece (8 features) of a token.
    fn token_offset(token: usize, piece: usize) -> usize {
        token * 128 + (piece ^ (token & 7)) * 16
    }

    /// Token and piece whose row a lane names to `ldmatrix.x4`: two adjacent tiles, or two blocks of 8 tokens.
    fn two_tiles(tile: usize, lane: usize) -> (usize, usize) {
        (lane % 8, tile * 2 + lane / 8)
    }

    fn two_blocks(tile: usize, lane: usize) -> (usize, usize) {
        (lane / 16 * 8 + lane % 8, tile * 2 + lane / 8 % 2)
    }

    #[test]
    fn every_code_has_a_place_of_its_own() {
        for bits in [4, 8] {
            let mut seen = vec![false; STRIP * CHUNK];
            for (tile, lane) in (0..TILES).flat_map(|tile| (0..LANES).map(move |lane| (tile, lane))) {
                let mut operand = [[false; TILE]; STRIP];
                for e in 0..8 {
                    let bit = word_offset(bits, tile, lane) * 8 + code_bit(bits, e);
                    assert!(!std::mem::replace(&mut seen[bit / bits], true));
                    let at = &mut operand[operand_row(lane, e)][operand_column(lane, e)];
                    assert!(!std::mem::replace(at, true));
                }
            }
            assert!(seen.iter().all(|&seen| seen));
        }
        let mut rows: Vec<usize> = (0..STRIP).map(param_index).collect();
        rows.sort_unstable();
        assert!(rows.into_iter().eq(0..STRIP));
    }

    /// The 8 lanes that one cycle of shared memory serves touch all 32 banks once.
    #[test]
    fn shared_memory_has_no_bank_conflicts() {
        let distinct = |offsets: Vec<usize>| {
            let mut banks: Vec<usize> = offsets.iter().map(|offset| offset / 16 % 8).collect();
            banks.sort_unstable();
            banks.dedup();
            banks.len() == 8
        };
        for (tile, quarter) in (0..TILES).flat_map(|tile| (0..4).map(move |quarter| (tile, quarter))) {
            let lanes = quarter * 8..quarter * 8 + 8;
            for bits in [4, 8] {
                let tile = if bits == 4 { 0 } else { tile / 2 * 2 };
                assert!(distinct(lanes.clone().map(|lane| word_offset(bits, tile, lane)).collect()));
            }
            let offset = |(token, piece)| token_offset(token, piece);
            assert!(distinct(lanes.clone().map(|lane| offset(two_blocks(tile, lane))).collect()));
            if tile % 2 == 0 {
                assert!(distinct(lanes.map(|lane| offset(two_tiles(tile, lane))).collect()));
            }
        }
    }
}
