//! The product with packed weights: `int4_matmul_few_*`, `int4_matmul_many_*`, `int4_gather`.

use gptq::{
    kernels::cuda::plan::{Limits, Product},
    variant::Bits,
};

use super::{
    Random,
    linear::{Linear, Rounding, Spec},
    product::{How, Product16},
};
use crate::cuda_host::Order;

const H200: Limits = Limits { multiprocessors: 132, shared_memory: 227 << 10, wgmma: false };
const A100: Limits = Limits { multiprocessors: 108, shared_memory: 163 << 10, wgmma: false };
const L4: Limits = Limits { multiprocessors: 58, shared_memory: 99 << 10, wgmma: false };

/// Linears of every kind of build: bits, type, zero points, tiles that share a group, device. K and N are odd multiples
/// of 8 but for one, whose groups fill no tiles; last groups are partial.
fn specs() -> Vec<(Spec, Limits)> {
    let spec = |bits, bf16, zeros, act, k, n, group| Spec { bits, bf16, zeros, act, k, n, group };
    let (four, eight) = (Bits::Four, Bits::Eight);
    vec![
        (spec(four, false, false, false, 328, 136, 128), H200),
        (spec(four, true, true, true, 200, 264, 64), A100),
        (spec(four, false, true, true, 200, 72, 32), L4),
        (spec(four, true, false, false, 152, 8, 48), H200),
        (spec(eight, false, false, true, 264, 136, 96), H200),
        (spec(eight, true, false, false, 72, 200, 72), L4),
        (spec(eight, false, true, false, 136, 72, 16), A100),
        (spec(eight, true, true, true, 328, 136, 128), H200),
    ]
}

struct Case {
    linear: Linear,
    product: Product16,
    random: Random,
}

/// Linears with more work than the pipelines of one block hold: 24 units and 16, of 52 and 51.
fn long_specs() -> Vec<(Spec, Limits)> {
    let spec = |bits, bf16, zeros, act, k, n, group| Spec { bits, bf16, zeros, act, k, n, group };
    vec![
        (spec(Bits::Four, false, false, true, 1608, 136, 128), H200),
        (spec(Bits::Eight, true, true, false, 1080, 72, 32), L4),
    ]
}

fn cases(specs: Vec<(Spec, Limits)>) -> impl Iterator<Item = Case> {
    specs.into_iter().map(|(spec, limits)| {
        let mut random = Random::new(spec.k as u64 * 1000 + spec.n as u64);
        let linear = Linear::random(spec, &mut random);
        let product = Product16::new(&linear, limits);
        Case { linear, product, random }
    })
}

impl Case {
    /// Multiplies in several orders, which must not show, and compares with the definition.
    fn check(&mut self, product: Product, m: usize, blocks: usize, orders: &[Order]) {
        let spec = self.linear.spec;
        let x = self.linear.activations(m, &mut self.random);
        let mut first = None;
        for (i, &order) in orders.iter().enumerate() {
            let how = How { blocks, resident: [1, blocks.max(2), 3][i % 3], order };
            let what = || format!("{spec:?}, {product:?} of {m} tokens, {how:?}");
            let y = self
                .product
                .multiply(product, &x, m, how)
                .unwrap_or_else(|error| panic!("{}: {error}", what()));
            let rounding =
                if matches!(product, Product::Few(_)) { Rounding::Sums } else { Rounding::Weights };
            if let Err(error) = self.linear.check(&x, &y, rounding) {
                panic!("{}: {error}", what());
            }
            assert_eq!(*first.get_or_insert_with(|| y.clone()), y, "{}", what());
        }
    }
}

#[test]
fn few_tokens() {
    for mut case in cases(specs()) {
        for (product, tokens) in [(Product::Few(8), [1, 7]), (Product::Few(16), [9, 16])] {
            let units = case.product.units(product);
            // Stream-K: one block, blocks that share output features, a unit a block, blocks without any.
            for (m, blocks) in tokens.into_iter().cycle().zip([1, 3, units, units + 2]) {
                case.check(product, m, blocks, &[Order::Forward]);
            }
        }
    }
}

#[test]
fn few_tokens_in_any_order() {
    for mut case in cases(specs()) {
        for (product, m) in [(Product::Few(8), 8), (Product::Few(16), 13)] {
            case.check(product, m, 5, &[Order::Forward, Order::Reverse, Order::Random(1), Order::Random(2)]);
        }
    }
}

#[test]
fn few_tokens_through_full_pipelines() {
    for mut case in cases(long_specs()) {
        for (product, m) in [(Product::Few(8), 5), (Product::Few(16), 11)] {
            assert!(case.product.units(product) > 48);
            for blocks in [1, 2] {
                case.check(product, m, blocks, &[Order::Forward, Order::Random(4)]);
            }
        }
    }
}

#[test]
fn many_tokens() {
    for (i, mut case) in cases(specs()).enumerate() {
        case.check(Product::Many(64), [1, 65, 64, 130][i % 4], 0, &[Order::Forward, Order::Random(1)]);
    }
}

#[test]
fn many_tokens_in_wide_blocks() {
    for (i, mut case) in cases(specs()).enumerate() {
        case.check(Product::Many(128), [140, 33][i % 2], 0, &[Order::Reverse]);
        if case.linear.spec.k < 300 && case.product.fits(Product::Many(256)) {
            case.check(Product::Many(256), [40, 260][i % 2], 0, &[Order::Random(3)]);
        }
    }
}

/// More than the pipeline's stages; one chunk; groups of 32, 64, 128, of all, and such that fill no tiles; tails of tokens,
/// features and groups.
fn wgmma_specs() -> Vec<Spec> {
    let spec = |bits, bf16, zeros, act, k, n, group| Spec { bits, bf16, zeros, act, k, n, group };
    let (four, eight) = (Bits::Four, Bits::Eight);
    vec![
        spec(four, false, false, false, 328, 136, 128),
        spec(four, true, true, true, 392, 72, 64),
        spec(four, false, true, true, 200, 72, 32),
        spec(four, true, false, false, 152, 8, 48),
        spec(four, false, false, false, 64, 128, 64),
        spec(eight, false, false, true, 264, 136, 96),
        spec(eight, true, true, false, 584, 40, 584),
        spec(eight, false, true, false, 136, 72, 16),
        spec(eight, true, true, true, 328, 136, 128),
    ]
}

#[test]
fn many_tokens_by_wgmma() {
    let limits = Limits { wgmma: true, ..H200 };
    let specs = wgmma_specs().into_iter().map(|spec| (spec, limits)).collect();
    for (i, mut case) in cases(specs).enumerate() {
        let orders = [Order::Forward, Order::Random(1), Order::Reverse];
        case.check(Product::Wgmma, [1, 260, 256, 77][i % 4], 0, &orders[..2 + usize::from(i == 0)]);
    }
}

/// Wgmma and `mma` have the same operands: sums differ by the order of additions alone.
#[test]
fn wgmma_and_mma_agree() {
    let limits = Limits { wgmma: true, ..H200 };
    let spec = wgmma_specs()[2];
    for mut case in cases(vec![(spec, limits)]) {
        let x = case.linear.activations(70, &mut case.random);
        let how = How { blocks: 0, resident: 2, order: Order::Forward };
        let [one, other] = [Product::Wgmma, Product::Many(64)].map(|product| {
            case.product.multiply(product, &x, 70, how).unwrap_or_else(|error| panic!("{error}"))
        });
        let (one, other) = (one.iter(), other.iter());
        let near = |(a, b): (&u16, &u16)| (case.linear.widen(*a) - case.linear.widen(*b)).abs() < 2e-3;
        assert!(one.zip(other).all(near));
    }
}
