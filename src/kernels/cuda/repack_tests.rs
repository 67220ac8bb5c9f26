//! Repacking and back again against the CPU kernels' dequantization.

use half::f16;

use super::*;
use crate::kernels::{
    cpu::fixture::{Fixture, Order, Random, Spec},
    dequantize_into,
};

/// The dense weights `[K, N]` that the kernels see, in the order of x.
fn unpacked(from: &Repacked) -> Vec<f32> {
    let (k, n, bits) = (from.in_features, from.out_features, from.bits);
    let mut dense = vec![f32::NAN; k * n];
    for (position, feature) in (0..n).flat_map(|feature| (0..from.positions).map(move |p| (p, feature))) {
        let source = match &from.features {
            Features::InPlace => position,
            Features::Permuted(order) | Features::Spread(order) => order[position] as usize,
        };
        if source == k {
            continue;
        }
        let (strip, row) = (feature / STRIP, feature % STRIP);
        let (chunk, tile, column) = (position / CHUNK, position % CHUNK / TILE, position % TILE);
        // The inverse of the operand's places, by search.
        let (lane, e) = (0..LANES)
            .flat_map(|lane| (0..8).map(move |e| (lane, e)))
            .find(|&(lane, e)| (operand_row(lane, e), operand_column(lane, e)) == (row, column))
            .expect("every element of an operand is some lane's");
        let byte = weight_offset(bits, strip, chunk, from.chunks()) + word_offset(bits, tile, lane);
        let bit = byte * 8 + code_bit(bits, e);
        let code = from.weights[bit / 32] >> (bit % 32) & ((1 << bits) - 1);
        let at = param_offset(from.zeros, strip, position / from.group, from.groups()) / 2 + param_index(row);
        let zero = if from.zeros { from.params[at + STRIP] } else { 1 << (bits - 1) };
        let weight = &mut dense[source * n + feature];
        assert!(weight.is_nan(), "input feature {source} has one place");
        *weight = f16::from_bits(from.params[at]).to_f32() * (code as f32 - f32::from(zero));
    }
    dense
}

fn dequantized(fixture: &Fixture) -> Vec<f32> {
    let mut dense = vec![f32::NAN; fixture.in_features * fixture.out_features];
    dequantize_into(&fixture.view(), &mut dense);
    dense
}

fn check(spec: Spec, change: impl FnOnce(&mut Fixture)) -> Repacked {
    let mut fixture = Fixture::random(spec, &mut Random(spec.in_features as u64));
    change(&mut fixture);
    fixture.pack();
    let repacked = repack(&fixture.view()).unwrap_or_else(|error| panic!("{spec:?}: {error}"));
    assert!(unpacked(&repacked) == dequantized(&fixture), "{spec:?}");
    assert!(repacked.positions.is_multiple_of(ROW_MULTIPLE) && repacked.columns.is_multiple_of(ROW_MULTIPLE));
    assert!(repacked.group.is_multiple_of(repacked.group_tiles * TILE), "{spec:?}");
    repacked
}

fn estimate(spec: Spec, zeros: bool) -> Option<usize> {
    let bits = Bits::new(spec.bits as u32).expect("a width of the format");
    let size = GroupSize::Features(spec.group_size);
    repacked_bytes(bits, spec.out_features, spec.in_features, size, zeros)
}

const PLAIN: Spec = Spec {
    bits: 4,
    in_features: 320,
    out_features: 136,
    group_size: 64,
    order: Order::Sequential,
    zero_offset: 1,
};

fn symmetric(fixture: &mut Fixture) {
    let zero = (1 << (fixture.bits - 1)) - fixture.zero_offset;
    fixture.zeros.fill(zero);
}

#[test]
fn all_widths_groups_orders_and_versions_are_kept() {
    for (bits, order, zero_offset) in
        [(4, Order::Sequential, 1), (4, Order::Act, 0), (8, Order::Sequential, 0), (8, Order::Act, 1)]
    {
        for group_size in [16, 20, 32, 48, 64, 96, 128, 320] {
            let spec = Spec { bits, group_size, order, zero_offset, ..PLAIN };
            for repacked in [check(spec, |_| ()), check(spec, symmetric)] {
                let bytes = repacked.bytes();
                let estimated = estimate(spec, repacked.zeros).expect("it was taken");
                assert!(
                    estimated >= bytes && estimated <= bytes + bytes / 20,
                    "{spec:?}: {estimated} for {bytes}"
                );
            }
            assert!(check(spec, |_| ()).zeros);
            assert!(!check(spec, symmetric).zeros);
        }
    }
}

#[test]
fn x_is_left_permuted_or_spread() {
    let features = |group_size, order| check(Spec { group_size, order, ..PLAIN }, |_| ()).features;
    assert_eq!(features(64, Order::Sequential), Features::InPlace);
    assert_eq!(features(320, Order::Act), Features::InPlace, "one group has no order");
    assert!(matches!(features(128, Order::Act), Features::Permuted(order) if order.len() == 320));
    // 16 groups of 20, in two tiles each but for the last.
    let spread = 15 * 32 + 24;
    for order in [Order::Sequential, Order::Act] {
        assert!(matches!(features(20, order), Features::Spread(order) if order.len() == spread));
    }
}

#[test]
fn sizes_that_are_no_multiple_of_anything_the_kernels_want_are_padded() {
    for (in_features, out_features, group_size) in
        [(4, 4, 4), (12, 20, 12), (100, 132, 32), (76, 4, 76), (68, 12, 16), (260, 140, 48)]
    {
        for order in [Order::Sequential, Order::Act] {
            let to = check(Spec { bits: 8, in_features, out_features, group_size, order, ..PLAIN }, |_| ());
            assert!(matches!(to.features, Features::Spread(_)));
            assert!(to.positions < in_features + 16 * in_features.div_ceil(group_size));
        }
    }
    check(Spec { in_features: 8, out_features: 8, group_size: 8, ..PLAIN }, |_| ());
    check(Spec { in_features: 1096, out_features: 264, group_size: 128, order: Order::Act, ..PLAIN }, |_| ());
}

#[test]
fn groups_of_unequal_sizes_are_kept() {
    let spec = Spec { group_size: 64, order: Order::Act, ..PLAIN };
    let repacked = check(spec, |fixture| {
        let moved = fixture.g_idx.iter().position(|&g| g == 0).expect("group 0 has features");
        fixture.g_idx[moved] = 3;
    });
    assert_eq!((repacked.group, repacked.positions), (80, 4 * 80 + 64));
    // A group without any features, the last and the first.
    for empty in [4, 0] {
        check(spec, |fixture| {
            fixture.g_idx.iter_mut().for_each(|g| *g = if *g == empty { 2 } else { *g });
        });
    }
}

#[test]
fn refuses_what_the_kernels_cannot_take() {
    let refused = |spec| repack(&Fixture::random(spec, &mut Random(1)).view()).unwrap_err();
    for bits in [2, 3] {
        let error = refused(Spec { bits, out_features: 128, ..PLAIN });
        assert_eq!(error, RepackError::Bits(bits as u32));
    }
    let error = refused(Spec { bits: 8, group_size: 4, ..PLAIN });
    assert_eq!(error, RepackError::Groups { groups: 80, in_features: 320 });
    assert_eq!(estimate(Spec { bits: 8, group_size: 4, ..PLAIN }, true), None);
    assert_eq!(estimate(Spec { bits: 3, ..PLAIN }, false), None);
}

#[test]
fn a_v1_zero_point_of_all_ones_is_not_wrapped() {
    for bits in [4, 8] {
        let repacked = check(Spec { bits, ..PLAIN }, |fixture| fixture.zeros.fill((1 << bits) - 1));
        assert_eq!(repacked.params[STRIP..][..STRIP], [1 << bits; STRIP]);
    }
}

#[test]
fn exact_words_of_one_strip() {
    // Code k % 16 for every feature: lane 0 of a tile holds columns 0, 1, 8 and 9 of rows 0 and 8.
    let spec = Spec { in_features: 64, out_features: 8, group_size: 64, ..PLAIN };
    let repacked = check(spec, |fixture| {
        fixture.codes.iter_mut().enumerate().for_each(|(i, code)| *code = (i / 8 % 16) as u32);
        fixture.scales.fill(f16::ONE);
        symmetric(fixture);
    });
    // Nibbles from the lowest: row 0 column 0, row 8 (padding: code 8) column 0, row 0 column 8, row 8; then columns 1, 9.
    assert_eq!(repacked.weights[..4], [0x8981_8880; 4]);
    assert_eq!(repacked.weights[4..8], [0x8b83_8a82; 4]);
    assert_eq!((repacked.group, repacked.group_tiles), (64, 4));
    assert_eq!(repacked.params[..4], [0x3c00, 0, 0x3c00, 0]);
}
