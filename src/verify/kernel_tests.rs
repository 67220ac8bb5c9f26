//! The tolerance of `verify --device`: numbers rounded as the CUDA kernels round them, with and without a
//! fault. Real branches and the CPU's kernel are in tests/it/kernel.rs.

use std::borrow::Cow;

use half::f16;

use super::*;
use crate::{
    architectures::tests::{parse, small_config},
    checkpoint::CheckpointFormat,
    pack::{pack_columns, pack_rows},
    variant::Bits,
};

/// Dequantize-and-multiply, rounded where the CUDA kernels round: weights for many tokens, and outputs.
struct Rounded<'a> {
    seen: &'a PackedTensors<'a>,
    kind: Kind,
}

impl Linear for Rounded<'_> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let view = PackedView::from(self.seen);
        let mut dense = vec![0.0f32; view.in_features() * view.out_features()];
        crate::kernels::dequantize_into(&view, &mut dense);
        let weight = Tensor::from_slice(&dense).view([view.in_features() as i64, -1]);
        let weight = if x.size()[0] > 16 { weight.to_kind(self.kind) } else { weight };
        Ok(x.to_kind(Kind::Float).matmul(&weight.to_kind(Kind::Float)).to_kind(self.kind))
    }
}

/// Random numbers of a fixed seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

fn linear(bits: Bits, k: usize, n: usize, group: usize, act: bool) -> PackedTensors<'static> {
    let mut random = Random(k as u64);
    let groups = k / group;
    let mut g_idx: Vec<i32> = (0..k).map(|k| (k / group) as i32).collect();
    if act {
        (1..k).rev().for_each(|i| g_idx.swap(i, random.below(i + 1)));
    }
    // The middle of the range is likelier, as with weights.
    let mut code = || (0..4).map(|_| random.below(bits.max_code() as usize + 1)).sum::<usize>() / 4;
    let codes: Vec<u8> = (0..k * n).map(|_| code() as u8).collect();
    let zeros: Vec<u8> = (0..groups * n).map(|_| bits.symmetric_zero() - 1).collect();
    let scales = (0..groups * n).map(|_| f16::from_f32(0.002 + random.below(1000) as f32 * 1e-5)).collect();
    PackedTensors {
        bits,
        format: CheckpointFormat::Gptq,
        in_features: k,
        out_features: n,
        groups,
        qweight: pack_rows(&codes, n, bits).into(),
        qzeros: pack_columns(&zeros, n, bits).into(),
        scales: Cow::Owned(scales),
        g_idx: g_idx.into(),
        bias: None,
    }
}

fn error(right: &PackedTensors<'_>, seen: &PackedTensors<'_>, kind: Kind) -> KernelError {
    let compute = Compute { device: Device::Cuda(0), kind };
    tch::manual_seed(1);
    let x = Tensor::randn([2048, right.in_features as i64], (Kind::Float, Device::Cpu)).to_kind(kind);
    let exact = Exact::new(&PackedView::from(right), None, Device::Cpu).unwrap();
    let outputs = exact.outputs(&x).unwrap();
    let id = parse(&small_config()).unwrap().linear_id(0, 0);
    measure(&id, &Rounded { seen, kind }, &exact, &x, &outputs, compute).unwrap()
}

/// By how much each fault exceeds the tolerance.
fn faults(right: &PackedTensors<'_>, kind: Kind) -> Vec<(&'static str, f64)> {
    type Fault = fn(&mut PackedTensors<'_>);
    let faults: [(&str, Fault); 4] = [
        // The lowest bit of one code.
        ("code", |t| t.qweight.to_mut()[5] ^= 1 << t.bits.get()),
        ("zero", |t| t.qzeros.to_mut()[1] ^= 1),
        // One of ten bits of the significand: 1/16.
        ("scale", |t| t.scales.to_mut()[3] = f16::from_bits(t.scales[3].to_bits() ^ 64)),
        ("permutation", |t| {
            let other = t.g_idx.iter().position(|&g| g != t.g_idx[0]).expect("several groups");
            t.g_idx.to_mut().swap(0, other);
        }),
    ];
    let found = faults.map(|(name, fault)| {
        let mut seen = right.clone();
        fault(&mut seen);
        (name, error(right, &seen, kind).rounding)
    });
    found.into()
}

#[test]
fn rounding_passes_and_every_fault_exceeds_it_by_far() {
    for (bits, k, group, act) in [
        (Bits::Four, 64, 32, true),
        (Bits::Four, 128, 64, false),
        (Bits::Four, 1024, 128, true),
        (Bits::Eight, 64, 32, true),
    ] {
        let right = linear(bits, k, 64, group, act);
        for kind in [Kind::Half, Kind::BFloat16] {
            let error = error(&right, &right, kind);
            let what = format!("{bits:?} K={k} {kind:?}");
            assert!(error.rounding <= KERNEL_TOLERANCE, "{what}: {error:?}");
            // Nor is it so wide that a bit less of precision would pass.
            assert!(error.rounding > KERNEL_TOLERANCE / 4.0, "{what}: {error:?}");
            for (name, rounding) in faults(&right, kind) {
                // bf16 does not hold 8-bit codes' last place: a step there is as small as its own rounding.
                let least = if bits == Bits::Eight && name != "permutation" { 1.0 } else { 10.0 };
                assert!(rounding > least * KERNEL_TOLERANCE, "{what}, {name}: {rounding}");
            }
        }
    }
}

#[test]
fn numbers_that_are_none_are_the_worst_there_is() {
    let right = linear(Bits::Four, 64, 64, 32, false);
    let mut seen = right.clone();
    seen.scales.to_mut()[7] = f16::NAN;
    let error = error(&right, &seen, Kind::Half);
    assert_eq!((error.rounding, error.relative_error, error.feature), (f64::INFINITY, f64::INFINITY, 7));
    let report = KernelReport {
        computed: "fp16 on cuda:0".into(),
        text: "text".into(),
        tokens: vec![1],
        tolerance: KERNEL_TOLERANCE,
        linears: vec![error],
    };
    let found: Vec<Finding> = findings(&report).collect();
    assert_eq!(found.len(), 1);
    assert!(
        found[0].problem.starts_with("multiplied in fp16 on cuda:0 with 1 tokens, output feature 7 is "),
        "{found:?}"
    );
}
