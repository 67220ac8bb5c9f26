//! Rotary position embedding as in transformers: inverse frequencies in fp32, then cosines and sines.

use std::f64::consts::TAU;

use tch::{Device, Kind, Tensor};

use crate::{
    architectures::{RopeConfig, RopeScaling},
    error::{Result, TorchContext},
};

/// Cosines and sines for the positions `0..seq_len`.
#[derive(Debug)]
pub(super) struct RopeTable {
    /// `[seq_len, rotary_dim/2]` fp32.
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
}

impl RopeTable {
    pub(super) fn new(rope: &RopeConfig, seq_len: usize, device: Device) -> Result<Self> {
        let frequencies: Vec<f32> =
            inverse_frequencies(rope, seq_len).into_iter().map(|f| f as f32).collect();
        let factor = match rope.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::LongRope { attention_factor, .. } => {
                attention_factor
            }
            _ => 1.0,
        };
        let table = || -> Result<Self, tch::TchError> {
            let positions = Tensor::f_arange(seq_len as i64, (Kind::Float, device))?;
            let angles = positions.f_outer(&Tensor::f_from_slice(&frequencies)?.f_to_device(device)?)?;
            let (mut cos, mut sin) = (angles.f_cos()?, angles.f_sin()?);
            if factor != 1.0 {
                (cos, sin) = (cos.f_mul_scalar(factor)?, sin.f_mul_scalar(factor)?);
            }
            Ok(Self { cos, sin, interleaved: rope.interleaved })
        };
        table().torch("make the rotary table")
    }

    /// Rotates the first `rotary_dim` features of `x` `[B, heads, S, head_dim]` in fp32; `first` is the position of the first
    /// token. Feature `i` is paired with `i + rotary_dim/2`, or with its neighbour if the table is interleaved.
    pub(super) fn rotate(&self, x: &Tensor, first: i64) -> Result<Tensor, tch::TchError> {
        let size = x.size();
        let (seq_len, half) = (size[2], self.cos.size()[1]);
        let (cos, sin) = (self.cos.f_narrow(0, first, seq_len)?, self.sin.f_narrow(0, first, seq_len)?);
        let wide = x.f_to_kind(Kind::Float)?;
        let pairs = |part: i64| match self.interleaved {
            true => wide.f_slice(3, part, 2 * half, 2),
            false => wide.f_narrow(3, part * half, half),
        };
        let (low, high) = (pairs(0)?, pairs(1)?);
        let rotated_low = low.f_mul(&cos)?.f_sub(&high.f_mul(&sin)?)?;
        let rotated_high = high.f_mul(&cos)?.f_add(&low.f_mul(&sin)?)?;
        let rotated = match self.interleaved {
            true => Tensor::f_stack(&[rotated_low, rotated_high], 4)?.f_flatten(3, 4)?,
            false => Tensor::f_cat(&[rotated_low, rotated_high], 3)?,
        };
        match size[3] - 2 * half {
            0 => rotated,
            rest => Tensor::f_cat(&[rotated, wide.f_narrow(3, 2 * half, rest)?], 3)?,
        }
        .f_to_kind(x.kind())
    }
}

/// `θ^(−2i/d)` for `i` in `0..d/2`, scaled by the config's rule.
fn inverse_frequencies(rope: &RopeConfig, seq_len: usize) -> Vec<f64> {
    let dim = rope.rotary_dim as f64;
    let theta = match rope.scaling {
        // NTK-aware: θ grows if the sequence is longer than the model's context.
        RopeScaling::Dynamic { factor, original_max } if seq_len > original_max => {
            let stretch = factor * seq_len as f64 / original_max as f64 - (factor - 1.0);
            rope.theta * stretch.powf(dim / (dim - 2.0))
        }
        _ => rope.theta,
    };
    let plain = (0..rope.rotary_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / dim));
    match &rope.scaling {
        RopeScaling::None | RopeScaling::Dynamic { .. } => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let context = *original_max_position_embeddings as f64;
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
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            truncate,
            original_max_position_embeddings,
            ..
        } => {
            let context = *original_max_position_embeddings as f64;
            // The dimension whose frequency makes so many turns within the original context.
            let dimension = |turns: f64| dim * (context / (turns * TAU)).ln() / (2.0 * theta.ln());
            let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
            if *truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            (low, high) = (low.max(0.0), high.min(dim - 1.0));
            if low == high {
                high += 0.001;
            }
            plain
                .enumerate()
                .map(|(i, f)| {
                    let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f / factor * divided + f * (1.0 - divided)
                })
                .collect()
        }
        RopeScaling::LongRope { short_factor, long_factor, original_max_position_embeddings, .. } => {
            let factors =
                if seq_len > *original_max_position_embeddings { long_factor } else { short_factor };
            plain.zip(factors).map(|(f, factor)| f / factor).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling, rotary_dim: usize) -> RopeConfig {
        RopeConfig { theta: 10_000.0, scaling, rotary_dim, interleaved: false }
    }

    #[test]
    fn plain_linear_and_dynamic() {
        let plain = inverse_frequencies(&rope(RopeScaling::None, 4), 8);
        assert_eq!(plain, [1.0, 0.01]);
        let linear = inverse_frequencies(&rope(RopeScaling::Linear { factor: 4.0 }, 4), 8);
        assert_eq!(linear, [0.25, 0.0025]);
        let dynamic = RopeScaling::Dynamic { factor: 2.0, original_max: 8 };
        assert_eq!(inverse_frequencies(&rope(dynamic.clone(), 4), 8), plain);
        // θ' = 10000 · (2·16/8 − 1)^(4/2) = 90000.
        assert!((inverse_frequencies(&rope(dynamic, 4), 16)[1] - 90_000f64.powf(-0.5)).abs() < 1e-12);
    }

    #[test]
    fn llama3_keeps_high_and_divides_low_frequencies() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let rope = RopeConfig { theta: 500_000.0, ..rope(scaling, 128) };
        let scaled = inverse_frequencies(&rope, 1);
        let plain = inverse_frequencies(&RopeConfig { scaling: RopeScaling::None, ..rope }, 1);
        assert_eq!(scaled[0], plain[0]);
        assert!((scaled[63] - plain[63] / 8.0).abs() < 1e-18);
        assert!(scaled.iter().zip(&plain).any(|(s, p)| *s < 0.9 * p && *s > p / 7.0), "a ramp lies between");
    }
}
