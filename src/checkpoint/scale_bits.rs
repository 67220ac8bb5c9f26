//! Precision of a quantized model's scales, whatever type they are stored in.

use super::{Checkpoint, Dtype};
use crate::error::Result;

impl Checkpoint {
    /// The fewest significant bits that the scales of a linear use; none without quantized linears. Scales that were fitted in
    /// fp16 use its 11. Those that were rounded to bf16 use at most 8; the divergence does not show that loss.
    ///
    /// # Errors
    /// When a tensor is malformed.
    pub fn scale_bits(&self) -> Result<Option<u32>> {
        let mut fewest = None;
        for name in self.config().linears().map(|(id, _)| id.scales()) {
            if self.contains(&name) {
                let view = self.view(&name)?;
                let used = most_bits(view.dtype, view.bytes);
                fewest = Some(fewest.map_or(used, |fewest: u32| fewest.min(used)));
            }
        }
        Ok(fewest)
    }
}

/// The most bits that any of the values needs.
fn most_bits(dtype: Dtype, bytes: &[u8]) -> u32 {
    // Bits of one number, from its mantissa's width; an exponent of 0 means zero or a number without the implicit bit.
    let of = |word: u32, mantissa: u32, sign: u32| {
        let (fraction, exponent) = (word & ((1 << mantissa) - 1), (word & !sign) >> mantissa);
        match (exponent, fraction) {
            (0, 0) => 0,
            (0, _) => 32 - fraction.leading_zeros() - fraction.trailing_zeros(),
            _ => mantissa + 1 - fraction.trailing_zeros().min(mantissa),
        }
    };
    let halves = |mantissa| {
        let words = bytes.as_chunks().0.iter().map(|&b| u32::from(u16::from_le_bytes(b)));
        words.map(|word| of(word, mantissa, 1 << 15)).max()
    };
    let most = match dtype {
        Dtype::F16 => halves(10),
        Dtype::BF16 => halves(7),
        Dtype::F32 => bytes.as_chunks().0.iter().map(|&b| of(u32::from_le_bytes(b), 23, 1 << 31)).max(),
        _ => None,
    };
    most.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn bits_that_are_used_are_counted() {
        let f16_bits = |values: &[f32]| {
            let bytes: Vec<u8> = values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
            most_bits(Dtype::F16, &bytes)
        };
        assert_eq!(f16_bits(&[1.0, -0.5, 4.0]), 1);
        assert_eq!(f16_bits(&[1.0, 1.5]), 2);
        assert_eq!(f16_bits(&[-(1.0 + 1.0 / 1024.0)]), 11);
        assert_eq!(f16_bits(&[0.0, -0.0]), 0);
        // 3 of the smallest subnormal: two bits.
        assert_eq!(most_bits(Dtype::F16, &[3, 0]), 2);
        assert_eq!(f16_bits(&[]), 0);

        let scale = 0.012_345_f32;
        let through_bf16 = bf16::from_f32(scale);
        assert!(f16_bits(&[through_bf16.to_f32()]) <= 8);
        assert_eq!(most_bits(Dtype::BF16, &bf16::from_f32(1.0 + 1.0 / 128.0).to_le_bytes()), 8);
        assert_eq!(most_bits(Dtype::F32, &1.000_000_1_f32.to_le_bytes()), 24);
        assert_eq!(most_bits(Dtype::F32, &f16::from_f32(scale).to_f32().to_le_bytes()), f16_bits(&[scale]));
        assert_eq!(most_bits(Dtype::I32, &[1, 2, 3, 4]), 0);
    }
}
