//! Weights that both benchmarks multiply and pack.

use gptq::{
    gptq::QuantizedLinear,
    variant::{Order, Variant},
};

/// A linear of `[out_features, in_features]` with arbitrary codes, scales and zeros, packed as the variant says.
pub(crate) fn linear((n, k): (usize, usize), variant: &Variant) -> QuantizedLinear {
    let groups = variant.group_size.groups(k);
    let size = variant.group_size.features(k);
    let hash = |i: usize| (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
    let codes = (0..n * k).map(|i| hash(i) as u8 & variant.bits.max_code()).collect();
    let scales = vec![half::f16::from_f32(0.01); groups * n];
    let zeros = vec![variant.bits.symmetric_zero(); groups * n];
    let mut order: Vec<usize> = (0..k).collect();
    if variant.order == Order::Act {
        order.sort_by_key(|&feature| hash(feature));
    }
    let mut g_idx = vec![0; k];
    order.into_iter().enumerate().for_each(|(position, feature)| g_idx[feature] = (position / size) as u32);
    QuantizedLinear::new(variant.bits, codes, scales, zeros, g_idx)
}
