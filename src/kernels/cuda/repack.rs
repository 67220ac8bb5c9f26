//! Repacks a checkpoint's packed linear into the layout of `int4_matmul.cu`, once at load. Codes, zero points and scales keep
//! all their bits.

use rayon::prelude::*;

use super::layout::{
    CHUNK, LANES, PADDED_FEATURES, ROW_MULTIPLE, STRIP, TILE, TILES, chunk_bytes, code_bit, group_tiles,
    operand_column, operand_row, param_bytes, param_index, param_offset, weight_offset, word_offset,
};
use crate::{
    pack::PackedView,
    variant::{Bits, GroupSize},
};

/// Why the kernels cannot use a linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RepackError {
    /// Another width than 4 and 8 bits.
    #[error("the CUDA kernels take 4 and 8 bits, not {0}")]
    Bits(u32),
    /// With groups padded to whole tiles, the linear would need more memory than in fp16.
    #[error(
        "its {groups} groups over {in_features} input features are too small or too uneven for the CUDA kernels"
    )]
    Groups {
        /// G.
        groups: usize,
        /// K.
        in_features: usize,
    },
}

/// The input feature of x at each position of the kernels' K.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Features {
    /// The feature with the position's number.
    InPlace,
    /// The feature at each of K positions: act order.
    Permuted(Vec<u32>),
    /// The feature at each of more than K positions; the number K marks a position with zero input. For groups that do not
    /// fill whole tiles, and for rows of x whose size is not a multiple of 16 bytes.
    Spread(Vec<u32>),
}

/// A linear in the layout of the kernels, with their parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repacked {
    /// `[N'/16, K'/64, 64·16·b/8 bytes]`, with N' = N padded to 128 and K' = `positions` padded to 64; see
    /// [`weight_offset`] and [`word_offset`].
    pub weights: Vec<u32>,
    /// `[N'/16, G', 16 or 32]`: fp16 scales, then zero points if there are any; see [`param_offset`].
    pub params: Vec<u16>,
    /// The layout of x.
    pub features: Features,
    /// 4 or 8: the macro `BITS`.
    pub bits: usize,
    /// K, the features of x.
    pub in_features: usize,
    /// N.
    pub out_features: usize,
    /// The kernels' `k`: K, or more for [`Features::Spread`].
    pub positions: usize,
    /// The kernels' `n`: N, padded so that rows of y are multiples of 16 bytes.
    pub columns: usize,
    /// The kernels' `group`; padded `positions` when there is one group.
    pub group: usize,
    /// Zero points are explicit, not all `2^(b−1)`: the macro `ZEROS`.
    pub zeros: bool,
    /// The macro `GROUP_TILES`.
    pub group_tiles: usize,
}

impl Repacked {
    /// Chunks of K'.
    pub fn chunks(&self) -> usize {
        self.positions.div_ceil(CHUNK)
    }

    /// G', groups of K' positions; those in the padding have scale 0.
    pub fn groups(&self) -> usize {
        (self.chunks() * CHUNK).div_ceil(self.group)
    }

    /// Bytes of weights and parameters, which a product with few tokens reads.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.weights) + size_of_val(&*self.params)
    }
}

/// Repacks a linear.
///
/// # Errors
/// When the kernels cannot take it.
pub fn repack(view: &PackedView<'_>) -> Result<Repacked, RepackError> {
    let bits = match view.bits() {
        Bits::Four => 4,
        Bits::Eight => 8,
        other => return Err(RepackError::Bits(other.get())),
    };
    let n = view.out_features();
    let Placement { features, positions, group } = place(view)?;
    let stored = view.unpack_stored_zeros();
    // Up to 2^b: a v1 file can store 2^b − 1 for it.
    let zeros: Vec<u16> =
        stored.iter().map(|&z| u16::from(z) + u16::from(view.format().zero_offset())).collect();
    let explicit = zeros.iter().any(|&z| z != u16::from(view.bits().symmetric_zero()));
    let mut repacked = Repacked {
        weights: Vec::new(),
        params: Vec::new(),
        features,
        bits,
        in_features: view.in_features(),
        out_features: n,
        positions,
        columns: n.next_multiple_of(ROW_MULTIPLE),
        group,
        zeros: explicit,
        group_tiles: group_tiles(group),
    };
    repacked.weights = weights(view, &repacked);
    repacked.params = params(view, &zeros, &repacked);
    Ok(repacked)
}

/// [`Repacked::bytes`] of a linear with groups of one size, without its tensors; `None` if the kernels cannot use it. `zeros`:
/// zero points are explicit.
pub fn repacked_bytes(
    bits: Bits,
    out_features: usize,
    in_features: usize,
    group_size: GroupSize,
    zeros: bool,
) -> Option<usize> {
    if !matches!(bits, Bits::Four | Bits::Eight) {
        return None;
    }
    let (groups, size) = (group_size.groups(in_features), group_size.features(in_features));
    let spread = groups > 1 && !(size.is_multiple_of(TILE) && in_features.is_multiple_of(ROW_MULTIPLE));
    let positions = if spread { groups * size.next_multiple_of(TILE) } else { in_features };
    if positions * bits.get() as usize > in_features.next_multiple_of(ROW_MULTIPLE) * 16 {
        return None;
    }
    let padded = positions.next_multiple_of(CHUNK);
    let group = if groups > 1 { size.next_multiple_of(TILE) } else { padded };
    let features = out_features.next_multiple_of(PADDED_FEATURES);
    let params = features / STRIP * padded.div_ceil(group) * param_bytes(zeros);
    Some(features * padded * bits.get() as usize / 8 + params)
}

struct Placement {
    features: Features,
    positions: usize,
    group: usize,
}

/// Sorts input features by group, and pads groups to whole tiles.
fn place(view: &PackedView<'_>) -> Result<Placement, RepackError> {
    let (k, groups) = (view.in_features(), view.groups());
    let group_of = |feature: u32| view.g_idx()[feature as usize] as usize;
    let mut order: Vec<u32> = (0..k as u32).collect();
    order.sort_by_key(|&feature| group_of(feature)); // stable: neighbours stay neighbours within a group
    let mut counts = vec![0usize; groups];
    order.iter().for_each(|&feature| counts[group_of(feature)] += 1);

    let (&last, full) = counts.split_last().expect("a linear has at least one group");
    let size = counts[0];
    let alike = full.iter().all(|&count| count == size) && (1..=size).contains(&last);
    let whole = full.is_empty() || size.is_multiple_of(TILE);
    if alike && whole && k.is_multiple_of(ROW_MULTIPLE) {
        let in_place = order.iter().enumerate().all(|(position, &feature)| position == feature as usize);
        let features = if in_place { Features::InPlace } else { Features::Permuted(order) };
        let group = if full.is_empty() { k.next_multiple_of(CHUNK) } else { size };
        return Ok(Placement { features, positions: k, group });
    }

    let widest = counts.iter().copied().max().unwrap_or_default();
    let group = widest.next_multiple_of(if full.is_empty() { CHUNK } else { TILE });
    let positions = full.len() * group + last.max(1).next_multiple_of(ROW_MULTIPLE);
    if positions * view.bits().get() as usize > k.next_multiple_of(ROW_MULTIPLE) * 16 {
        return Err(RepackError::Groups { groups, in_features: k });
    }
    let mut spread = vec![k as u32; positions];
    let mut taken = vec![0; groups];
    for feature in order {
        let (g, nth) = (group_of(feature), &mut taken[group_of(feature)]);
        spread[g * group + *nth] = feature;
        *nth += 1;
    }
    Ok(Placement { features: Features::Spread(spread), positions, group })
}

/// Codes in the order of operands.
fn weights(view: &PackedView<'_>, to: &Repacked) -> Vec<u32> {
    let (k, n, bits, chunks) = (view.in_features(), view.out_features(), to.bits, to.chunks());
    let (per_word, neutral) = (32 / bits, view.bits().symmetric_zero());
    let source = |position: usize| match &to.features {
        Features::InPlace => (position < k).then_some(position),
        Features::Permuted(order) | Features::Spread(order) => {
            order.get(position).map(|&feature| feature as usize).filter(|&feature| feature < k)
        }
    };
    let sources: Vec<Option<usize>> = (0..chunks * CHUNK).map(source).collect();
    let strips = n.next_multiple_of(PADDED_FEATURES) / STRIP;
    let mut words = vec![0; strips * chunks * chunk_bytes(bits) / 4];
    words.par_chunks_mut(chunks * chunk_bytes(bits) / 4).enumerate().for_each(|(strip, words)| {
        let first = strip * STRIP;
        let width = n.saturating_sub(first).min(STRIP);
        for (chunk, sources) in sources.chunks_exact(CHUNK).enumerate() {
            // Padding is multiplied by activations or scales that are zero.
            let mut codes = [[neutral; STRIP]; CHUNK];
            for (codes, source) in codes.iter_mut().zip(sources) {
                let Some(feature) = source else { continue };
                let (row, shift) = (feature / per_word, feature % per_word * bits);
                let words = &view.qweight()[row * n + first.min(n)..][..width];
                for (code, &word) in codes.iter_mut().zip(words) {
                    *code = (word as u32 >> shift) as u8 & view.bits().max_code();
                }
            }
            for (tile, lane) in (0..TILES).flat_map(|tile| (0..LANES).map(move |lane| (tile, lane))) {
                let at = (weight_offset(bits, 0, chunk, chunks) + word_offset(bits, tile, lane)) / 4;
                for e in 0..8 {
                    let code = codes[tile * TILE + operand_column(lane, e)][operand_row(lane, e)];
                    let bit = code_bit(bits, e);
                    words[at + bit / 32] |= u32::from(code) << (bit % 32);
                }
            }
        }
    });
    words
}

/// Scales and zero points by strip and group.
fn params(view: &PackedView<'_>, zeros: &[u16], to: &Repacked) -> Vec<u16> {
    let (n, groups) = (view.out_features(), to.groups());
    let strips = n.next_multiple_of(PADDED_FEATURES) / STRIP;
    let mut params = vec![0; strips * groups * param_bytes(to.zeros) / 2];
    for (i, (scale, &zero)) in view.scales().iter().zip(zeros).enumerate() {
        let (group, feature) = (i / n, i % n);
        let at = param_offset(to.zeros, feature / STRIP, group, groups) / 2 + param_index(feature % STRIP);
        params[at] = scale.to_bits();
        if to.zeros {
            params[at + STRIP] = zero;
        }
    }
    params
}

#[cfg(test)]
#[path = "repack_tests.rs"]
mod tests;
