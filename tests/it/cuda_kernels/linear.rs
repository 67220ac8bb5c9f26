//! A packed linear, what the product with it is by definition, and how far a kernel may be from that.

use gptq::{
    gptq::QuantizedLinear,
    kernels::{Repacked, repack},
    pack::PackedLinear,
    variant::Bits,
};
use half::{bf16, f16};

use super::Random;

/// What one test is about.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spec {
    pub(crate) bits: Bits,
    pub(crate) bf16: bool,
    pub(crate) zeros: bool,
    pub(crate) act: bool,
    pub(crate) k: usize,
    pub(crate) n: usize,
    /// Input features of a group.
    pub(crate) group: usize,
}

/// A linear with activations for it.
pub(crate) struct Linear {
    pub(crate) spec: Spec,
    pub(crate) quantized: QuantizedLinear,
}

/// Where a kernel rounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rounding {
    /// Codes less zero points are exact; scales apply to sums in fp32.
    Sums,
    /// Scales apply to weights, which are rounded to 16 bits.
    Weights,
}

impl Linear {
    pub(crate) fn random(spec: Spec, random: &mut Random) -> Self {
        let Spec { bits, k, n, group, .. } = spec;
        let levels = usize::from(bits.max_code()) + 1;
        let groups = k.div_ceil(group);
        let codes = (0..k * n).map(|_| random.below(levels) as u8).collect();
        // As trained weights have them: about 0.02 / 2^(b−1).
        let scale = |random: &mut Random| f16::from_f64((0.5 + random.fraction()) * 0.04 / levels as f64);
        let scales = (0..groups * n).map(|_| scale(random)).collect();
        let zero = |random: &mut Random| match spec.zeros {
            true => 1 + random.below(levels - 1) as u8,
            false => bits.symmetric_zero(),
        };
        let zeros = (0..groups * n).map(|_| zero(random)).collect();
        let mut g_idx: Vec<u32> = (0..k).map(|feature| (feature / group) as u32).collect();
        if spec.act {
            g_idx = random.order(k).into_iter().map(|feature| g_idx[feature]).collect();
        }
        Self { spec, quantized: QuantizedLinear::new(bits, codes, scales, zeros, g_idx) }
    }

    pub(crate) fn repacked(&self) -> Repacked {
        repack(&PackedLinear::new(&self.quantized).view())
            .unwrap_or_else(|error| panic!("{:?}: {error}", self.spec))
    }

    /// Activations `[M, K]`.
    pub(crate) fn activations(&self, m: usize, random: &mut Random) -> Vec<u16> {
        (0..m * self.spec.k).map(|_| self.narrow(random.normal())).collect()
    }

    /// To the type of activations.
    fn narrow(&self, x: f64) -> u16 {
        if self.spec.bf16 { bf16::from_f32(x as f32).to_bits() } else { f16::from_f32(x as f32).to_bits() }
    }

    pub(crate) fn widen(&self, bits: u16) -> f64 {
        if self.spec.bf16 { bf16::from_bits(bits).to_f64() } else { f16::from_bits(bits).to_f64() }
    }

    /// Half a unit in the last place of activations and outputs, relatively.
    fn unit(&self) -> f64 {
        if self.spec.bf16 { 1.0 / 256.0 } else { 1.0 / 2048.0 }
    }

    /// The weight `[K, N]` as a kernel multiplies with it, exact or as it says that it rounds.
    fn dense(&self, rounding: Rounding) -> Vec<f64> {
        let (n, q) = (self.spec.n, &self.quantized);
        let weight = |i: usize| {
            let at = q.g_idx()[i / n] as usize * n + i % n;
            let (scale, difference) =
                (q.scales()[at].to_f64(), f64::from(q.codes()[i]) - f64::from(q.zeros()[at]));
            match (rounding, self.spec.bf16) {
                (Rounding::Sums, _) => scale * difference,
                // 11 and 9 bits: the product is exact in fp32.
                (Rounding::Weights, false) => f16::from_f32((scale * difference) as f32).to_f64(),
                (Rounding::Weights, true) => {
                    // The scale is a sum of two bf16.
                    let high = bf16::from_f32(scale as f32).to_f64();
                    let low = bf16::from_f32((scale - high) as f32).to_f64();
                    let rest = bf16::from_f32((difference * low) as f32).to_f64();
                    bf16::from_f32((difference * high + rest) as f32).to_f64()
                }
            }
        };
        (0..q.codes().len()).map(weight).collect()
    }

    /// Requires that `y` `[M, N]` is x · Wᵀ, as far as the kernel's roundings allow.
    ///
    /// Every output: its own rounding, once, and that of sums in fp32. A product enters a sum once in its tile's 16 and each
    /// partial sum once again, K/16 tiles, a sum for each group and warp and block: each adds at most 2⁻²⁴ of the sum of
    /// sizes, and devices are said to truncate within an mma, which doubles it. All outputs together are also compared with
    /// weights that are not rounded: those roundings are independent, so that their sum over K grows as the sum itself does.
    pub(crate) fn check(&self, x: &[u16], y: &[u16], rounding: Rounding) -> Result<(), String> {
        let Spec { k, n, .. } = self.spec;
        let (rounded, exact) = (self.dense(rounding), self.dense(Rounding::Sums));
        let additions = 2.0 * (k.div_ceil(16) * 2 + 64) as f64;
        let (mut off, mut whole) = (0.0, 0.0);
        for (token, (x, y)) in x.chunks(k).zip(y.chunks(n)).enumerate() {
            let (mut expected, mut size, mut unrounded) = (vec![0.0; n], vec![0.0f64; n], vec![0.0; n]);
            for (i, x) in x.iter().map(|&x| self.widen(x)).enumerate() {
                for feature in 0..n {
                    let product = x * rounded[i * n + feature];
                    expected[feature] += product;
                    size[feature] += product.abs();
                    unrounded[feature] += x * exact[i * n + feature];
                }
            }
            for feature in 0..n {
                let found = self.widen(y[feature]);
                let sums = additions * size[feature] * 2f64.powi(-24);
                let allowed = self.unit() * (expected[feature].abs() + sums) + sums + 2f64.powi(-25);
                let error = (found - expected[feature]).abs();
                if error.is_nan() || error > allowed {
                    let expected = expected[feature];
                    return Err(format!(
                        "token {token}, feature {feature}: {found} for {expected} ± {allowed}"
                    ));
                }
                off += (found - unrounded[feature]).powi(2);
                whole += unrounded[feature].powi(2);
            }
        }
        let relative = (off / whole).sqrt();
        // An output's rounding and, as large, that of its weights.
        if relative > self.unit() {
            return Err(format!("relative error {relative} of all"));
        }
        Ok(())
    }
}
