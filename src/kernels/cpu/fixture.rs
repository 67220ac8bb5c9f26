//! Random packed linears for the tests of the CPU kernels, packed bit by bit and multiplied in f64.

use half::f16;

use crate::{checkpoint::CheckpointFormat, pack::PackedView, variant::Bits};

/// The order of the groups of a fixture.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernels) enum Order {
    /// `g_idx[k] = k / group_size`.
    Sequential,
    /// The same, shuffled over K.
    Act,
}

/// A packed linear with what was packed into it.
#[derive(Clone)]
pub(in crate::kernels) struct Fixture {
    pub(in crate::kernels) bits: usize,
    pub(in crate::kernels) in_features: usize,
    pub(in crate::kernels) out_features: usize,
    pub(in crate::kernels) zero_offset: u32,
    /// `[K, N]`
    pub(in crate::kernels) codes: Vec<u32>,
    /// `[G, N]`, as stored.
    pub(in crate::kernels) zeros: Vec<u32>,
    /// `[G, N]`
    pub(in crate::kernels) scales: Vec<f16>,
    pub(in crate::kernels) g_idx: Vec<i32>,
    qweight: Vec<i32>,
    qzeros: Vec<i32>,
}

/// The shape and kind of a fixture.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernels) struct Spec {
    pub(in crate::kernels) bits: usize,
    pub(in crate::kernels) in_features: usize,
    pub(in crate::kernels) out_features: usize,
    pub(in crate::kernels) group_size: usize,
    pub(in crate::kernels) order: Order,
    pub(in crate::kernels) zero_offset: u32,
}

impl Fixture {
    /// Random codes, zero points (all stored values, the largest too) and scales of both signs.
    pub(in crate::kernels) fn random(spec: Spec, random: &mut Random) -> Self {
        let Spec { bits, in_features, out_features, group_size, order, zero_offset } = spec;
        let groups = in_features.div_ceil(group_size);
        let levels = 1 << bits;
        let mut g_idx: Vec<i32> = (0..in_features).map(|k| (k / group_size) as i32).collect();
        if matches!(order, Order::Act) {
            for k in (1..in_features).rev() {
                g_idx.swap(k, random.below(k + 1));
            }
        }
        let mut fixture = Self {
            bits,
            in_features,
            out_features,
            zero_offset,
            codes: (0..in_features * out_features).map(|_| random.below(levels) as u32).collect(),
            zeros: (0..groups * out_features).map(|_| random.below(levels) as u32).collect(),
            scales: (0..groups * out_features)
                .map(|_| f16::from_f32(random.away_from_zero() * 0.02))
                .collect(),
            g_idx,
            qweight: Vec::new(),
            qzeros: Vec::new(),
        };
        fixture.pack();
        fixture
    }

    /// Packs codes and zeros again after a change.
    pub(in crate::kernels) fn pack(&mut self) {
        let (k, n, bits) = (self.in_features, self.out_features, self.bits);
        self.qweight = vec![0; k * bits / 32 * n];
        for (at, code) in self.codes.iter().enumerate() {
            for bit in (0..bits).filter(|bit| code >> bit & 1 == 1) {
                let position = at / n * bits + bit;
                self.qweight[position / 32 * n + at % n] |= 1 << (position % 32);
            }
        }
        self.qzeros = vec![0; self.zeros.len() * bits / 32];
        for (at, zero) in self.zeros.iter().enumerate() {
            for bit in (0..bits).filter(|bit| zero >> bit & 1 == 1) {
                let position = at % n * bits + bit;
                self.qzeros[at / n * (n * bits / 32) + position / 32] |= 1 << (position % 32);
            }
        }
    }

    pub(in crate::kernels) fn view(&self) -> PackedView<'_> {
        let format = if self.zero_offset == 1 { CheckpointFormat::Gptq } else { CheckpointFormat::GptqV2 };
        let bits = Bits::new(self.bits as u32).expect("a width of the format");
        let (qweight, qzeros) = (&self.qweight, &self.qzeros);
        PackedView::new(bits, self.out_features, qweight, qzeros, &self.scales, &self.g_idx, format)
            .expect("a fixture is consistent")
    }

    /// The dense weights `[K, N]`.
    pub(in crate::kernels) fn dense(&self) -> Vec<f64> {
        let n = self.out_features;
        let weight = |(at, code): (usize, &u32)| {
            let group = self.g_idx[at / n] as usize * n + at % n;
            self.scales[group].to_f64() * (f64::from(*code) - f64::from(self.zeros[group] + self.zero_offset))
        };
        self.codes.iter().enumerate().map(weight).collect()
    }

    /// x `[M, K]` times the dense weights: each element with the sum of its terms' magnitudes, `[M, N]`.
    pub(in crate::kernels) fn multiply(&self, x: &[f32]) -> Vec<(f64, f64)> {
        let (k, n, dense) = (self.in_features, self.out_features, self.dense());
        let mut y = vec![(0.0, 0.0); x.len() / k * n];
        for (x, y) in x.chunks_exact(k).zip(y.chunks_exact_mut(n)) {
            for (x, weights) in x.iter().zip(dense.chunks_exact(n)) {
                for (y, weight) in y.iter_mut().zip(weights) {
                    let term = f64::from(*x) * weight;
                    *y = (y.0 + term, y.1 + term.abs());
                }
            }
        }
        y
    }
}

/// A small seeded generator (SplitMix64).
pub(in crate::kernels) struct Random(pub(in crate::kernels) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// An integer in `0..limit`.
    pub(in crate::kernels) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// A number in 0.5..1 or its negative, so that no change of what it is multiplied with can hide.
    pub(in crate::kernels) fn away_from_zero(&mut self) -> f32 {
        let magnitude = 0.5 + self.below(1 << 20) as f32 / (1 << 21) as f32;
        if self.below(2) == 0 { magnitude } else { -magnitude }
    }

    pub(in crate::kernels) fn vector(&mut self, length: usize) -> Vec<f32> {
        (0..length).map(|_| self.away_from_zero()).collect()
    }
}
