//! Rotary position embedding, as transformers computes it: inverse frequencies in fp32, then cosines and sines.

use std::f64::consts::TAU;

use tch::{Device, Kind, Tensor};

use crate::{
    checkpoint::{Rope, RopeScaling},
    error::{Result, TorchContext},
};

/// Cosines and sines for the positions `0..seq_len`.
#[derive(Debug)]
pub(super) struct RopeTable {
    /// `[seq_len, head_dim/2]` fp32.
    cos: Tensor,
    sin: Tensor,
}

impl RopeTable {
    pub(super) fn new(rope: &Rope, head_dim: usize, seq_len: usize, device: Device) -> Result<Self> {
        let frequencies: Vec<f32> =
            inverse_frequencies(rope, head_dim, seq_len).into_iter().map(|f| f as f32).collect();
        let table = || -> Result<Self, tch::TchError> {
            let positions = Tensor::f_arange(seq_len as i64, (Kind::Float, device))?;
            let angles = positions.f_outer(&Tensor::f_from_slice(&frequencies)?.f_to_device(device)?)?;
            Ok(Self { cos: angles.f_cos()?, sin: angles.f_sin()? })
        };
        table().torch("make the rotary table")
    }

    /// Rotates `x` `[B, heads, S, head_dim]`, whose first token stands at position `first`; feature `i` is paired with
    /// `i + head_dim/2`. Computed in fp32.
    pub(super) fn rotate(&self, x: &Tensor, first: i64) -> Result<Tensor, tch::TchError> {
        let size = x.size();
        let (seq_len, half) = (size[2], size[3] / 2);
        let (cos, sin) = (self.cos.f_narrow(0, first, seq_len)?, self.sin.f_narrow(0, first, seq_len)?);
        let wide = x.f_to_kind(Kind::Float)?;
        let (low, high) = (wide.f_narrow(3, 0, half)?, wide.f_narrow(3, half, half)?);
        let rotated_low = low.f_mul(&cos)?.f_sub(&high.f_mul(&sin)?)?;
        let rotated_high = high.f_mul(&cos)?.f_add(&low.f_mul(&sin)?)?;
        Tensor::f_cat(&[rotated_low, rotated_high], 3)?.f_to_kind(x.kind())
    }
}

/// `θ^(−2i/d)` for `i` in `0..d/2`, scaled as the config says.
fn inverse_frequencies(rope: &Rope, head_dim: usize, seq_len: usize) -> Vec<f64> {
    let dim = head_dim as f64;
    let theta = match rope.scaling {
        // NTK-aware: θ grows once the sequence is longer than the model was made for.
        RopeScaling::Dynamic { factor, original_max } if seq_len > original_max => {
            let stretch = factor * seq_len as f64 / original_max as f64 - (factor - 1.0);
            rope.theta * stretch.powf(dim / (dim - 2.0))
        }
        _ => rope.theta,
    };
    let plain = (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / dim));
    match rope.scaling {
        RopeScaling::None | RopeScaling::Dynamic { .. } => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let context = original_max_position_embeddings as f64;
            plain
                .map(|f| {
                    // Turns of this frequency within the original context.
                    let turns = context * f / TAU;
                    let kept =
                        ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    (1.0 - kept) * f / factor + kept * f
                })
                .collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> Rope {
        Rope { theta: 10_000.0, scaling }
    }

    #[test]
    fn plain_linear_and_dynamic() {
        let plain = inverse_frequencies(&rope(RopeScaling::None), 4, 8);
        assert_eq!(plain, [1.0, 0.01]);
        let linear = inverse_frequencies(&rope(RopeScaling::Linear { factor: 4.0 }), 4, 8);
        assert_eq!(linear, [0.25, 0.0025]);
        let dynamic = RopeScaling::Dynamic { factor: 2.0, original_max: 8 };
        assert_eq!(inverse_frequencies(&rope(dynamic), 4, 8), plain);
        // θ' = 10000 · (2·16/8 − 1)^(4/2) = 90000.
        assert!((inverse_frequencies(&rope(dynamic), 4, 16)[1] - 90_000f64.powf(-0.5)).abs() < 1e-12);
    }

    #[test]
    fn llama3_keeps_high_and_divides_low_frequencies() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let rope = Rope { theta: 500_000.0, scaling };
        let scaled = inverse_frequencies(&rope, 128, 1);
        let plain = inverse_frequencies(&Rope { scaling: RopeScaling::None, ..rope }, 128, 1);
        assert_eq!(scaled[0], plain[0]);
        assert!((scaled[63] - plain[63] / 8.0).abs() < 1e-18);
        assert!(scaled.iter().zip(&plain).any(|(s, p)| *s < 0.9 * p && *s > p / 7.0), "a ramp lies between");
    }
}
