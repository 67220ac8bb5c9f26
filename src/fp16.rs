//! Numbers rounded to fp16.

use half::f16;

/// The nearest fp16 value, ties to even, rounded once; `half`'s conversion from f64 rounds twice or drops bits, depending on the
/// processor. Beyond fp16's range it is infinite.
pub fn nearest_f16(x: f64) -> f16 {
    f16::from_f32(round_to_f16(x))
}

/// The same as an fp32 number. Without branches, so that loops of it become vectors.
#[inline(always)]
pub fn round_to_f16(x: f64) -> f32 {
    let near = x as f32;
    // Towards zero, and the last bit set if anything was lost: the next rounding then sees which side of a tie it was.
    let bits = near.to_bits() - u32::from(f64::from(near).abs() > x.abs());
    let size = f32::from_bits(bits | u32::from(f64::from(near) != x)).abs();
    // fp16 has 13 bits less, and below 2⁻¹⁴ a step of 2⁻²⁴, which is that of fp32 from 0.5 on.
    let bits = size.to_bits();
    let normal = f32::from_bits((bits + 0xFFF + (bits >> 13 & 1)) & !0x1FFF);
    let subnormal = (size + 0.5) - 0.5;
    let rounded = if size < 2f32.powi(-14) { subnormal } else { normal };
    (if rounded > 65504.0 { f32::INFINITY } else { rounded }).copysign(near)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn fp16_is_the_nearest(exponent in -30i32..17, fraction in 1.0f64..2.0, negative: bool) {
            let x = fraction * 2f64.powi(exponent);
            let found = if negative { -nearest_f16(-x) } else { nearest_f16(x) };
            prop_assert_eq!(nearest_f16(-x).to_bits(), (-nearest_f16(x)).to_bits());
            let distance = |bits: u16| (f64::from(f16::from_bits(bits)) - x).abs();
            if found.is_infinite() {
                prop_assert!(x >= 65520.0);
            } else {
                let bits = found.to_bits();
                prop_assert!(distance(bits) <= distance(bits + 1) || x < 65520.0 && bits == 0x7BFF);
                prop_assert!(bits == 0 || distance(bits) <= distance(bits - 1));
            }
        }
    }
}
