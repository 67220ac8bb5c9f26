//! The column loop: `gptq_solve_fitted`, `gptq_solve_given`, `gptq_compensate`, `gptq_fit_static`.

use gptq::{
    accuracy::{ScaleSearch, Scales},
    variant::{Bits, GroupSize, Variant},
};

use super::{
    problem::Problem,
    solve::{How, solve},
};
use crate::cuda_host::Order;

/// A variant of any group size, also those that the format refuses.
fn variant(text: &str, group: usize) -> Variant {
    Variant { group_size: GroupSize::Features(group), ..text.parse().unwrap() }
}

#[track_caller]
fn check(k: usize, n: usize, variant: Variant, how: How) {
    let problem = Problem::new(n, k, (k * 31 + n) as u64);
    let solved = solve(&problem, &variant, how).unwrap_or_else(|error| panic!("{variant}, {how:?}: {error}"));
    problem.check(&variant, &solved);
    problem.check_against_definition(&variant, &solved);
}

#[test]
fn groups_fitted_within_a_panel() {
    // 290 columns: two panels, and partial last groups; 41 rows: a partial tile, copied by 4 bytes.
    for (text, group) in [
        ("4bit-16g", 16),
        ("4bit-16g-asym", 32),
        ("4bit-16g-act", 48),
        ("4bit-16g-act-asym", 128),
        ("4bit-16g", 256),
    ] {
        check(290, 41, variant(text, group), How::default());
    }
}

#[test]
fn odd_groups_and_sizes() {
    for (k, n, group, panel) in [
        (100, 32, 17, 96),
        (70, 33, 33, 64),
        (130, 36, 100, 128),
        (200, 36, 60, 256),
        (5, 3, 16, 256),
        (64, 1, 64, 64),
        (33, 40, 40, 40),
    ] {
        for text in ["3bit-16g", "4bit-16g-act-asym"] {
            check(k, n, variant(text, group), How { panel, shift: k % 4, pad: n % 3, ..How::default() });
        }
    }
}

#[test]
fn every_width_of_codes() {
    for bits in Bits::ALL {
        for symmetric in [true, false] {
            let variant = Variant { bits, symmetric, ..variant("4bit-16g-act", 64) };
            check(200, 36, variant, How { panel: 128, pad: 4, ..How::default() });
        }
    }
}

#[test]
fn given_scales() {
    for (text, group) in [("4bit-16g-static", 16), ("3bit-16g-static-asym", 48), ("8bit-16g-static", 100)] {
        check(200, 45, variant(text, group), How { panel: 128, ..How::default() });
    }
    for text in ["4bit--1g", "4bit--1g-act-asym"] {
        check(170, 20, text.parse().unwrap(), How { panel: 96, shift: 1, ..How::default() });
    }
}

const BLOCK: Scales = Scales { signed: true, search: ScaleSearch::Block };

#[track_caller]
fn check_searched(k: usize, n: usize, variant: Variant, scales: Scales, at_once: usize, how: How) {
    let problem = Problem::new(n, k, (k * 31 + n) as u64);
    let how = How { search: Some((scales, at_once)), ..how };
    let solved = solve(&problem, &variant, how).unwrap_or_else(|error| panic!("{variant}, {how:?}: {error}"));
    problem.check_scales_against_definition(&variant, &solved, scales);
}

/// Groups of one step and of several, that begin anywhere in a step, and partial ones; all finalists at the same time or some.
#[test]
fn searched_scales_are_those_of_the_definition() {
    for (k, n, group, panel, text, at_once) in [
        (290, 41, 128, 256, "4bit-16g-act", 8),
        (200, 36, 64, 128, "4bit-16g", 4),
        (130, 33, 32, 256, "3bit-16g-act", 8),
        (150, 32, 48, 144, "4bit-16g", 2),
        (110, 20, 100, 128, "2bit-16g-asym", 8),
        (70, 5, 17, 64, "4bit-16g-asym", 1),
        (64, 34, 16, 64, "8bit-16g-act", 8),
    ] {
        let how = How { panel, shift: k % 4, pad: n % 3, ..How::default() };
        check_searched(k, n, variant(text, group), BLOCK, at_once, how);
    }
}

#[test]
fn scales_are_searched_one_after_another_and_by_sign_alone() {
    for (signed, search) in
        [(true, ScaleSearch::Off), (true, ScaleSearch::Block), (false, ScaleSearch::Block)]
    {
        let scales = Scales { signed, search };
        check_searched(140, 37, variant("4bit-16g-act", 64), scales, 1, How::default());
        check_searched(140, 37, variant("3bit-16g-asym", 48), scales, 1, How { panel: 96, ..How::default() });
        check_searched(200, 45, variant("4bit-16g-static", 16), scales, 1, How::default());
        check_searched(
            170,
            20,
            "4bit--1g-act-asym".parse().unwrap(),
            scales,
            1,
            How { panel: 96, ..How::default() },
        );
    }
}

/// Neither the order of threads nor what is compared at the same time shows in the bytes of a search.
#[test]
fn no_order_and_no_number_of_finalists_at_once_shows() {
    let problem = Problem::new(40, 150, 9);
    let variant = variant("4bit-16g-act", 48);
    let base = How { panel: 96, search: Some((BLOCK, 8)), ..How::default() };
    let solve = |how: How| solve(&problem, &variant, how).unwrap_or_else(|e| panic!("{how:?}: {e}"));
    let expected = solve(base);
    for (at_once, warps, order) in
        [(1, 8, Order::Reverse), (4, 8, Order::Random(1)), (8, 16, Order::Random(2)), (4, 4, Order::Forward)]
    {
        let how = How { search: Some((BLOCK, at_once)), warps, order, ..base };
        assert_eq!(solve(how), expected, "{how:?}");
    }
    assert_eq!(solve(How { pad: 3, shift: 1, ..base }), expected, "not aligned");
}

#[test]
fn groups_wider_than_a_panel() {
    for (k, group, panel, text) in
        [(290, 200, 64, "4bit-16g"), (300, 130, 128, "4bit-16g-act-asym"), (150, 300, 40, "3bit-16g-asym")]
    {
        check(k, 35, variant(text, group), How { panel, ..How::default() });
    }
}

/// A thread owns a feature and a sum has one order, so that nothing but the panels may show in the bytes.
#[test]
fn no_order_number_of_warps_or_alignment_shows() {
    let problem = Problem::new(40, 150, 7);
    for (text, group, panel) in [
        ("4bit-16g-act", 32, 128),
        ("4bit-16g", 48, 96),
        ("4bit-16g-static-asym", 16, 64),
        ("4bit-16g-asym", 100, 64),
    ] {
        let variant = variant(text, group);
        let solve =
            |how: How| solve(&problem, &variant, how).unwrap_or_else(|e| panic!("{variant}, {how:?}: {e}"));
        let base = How { panel, ..How::default() };
        let expected = solve(base);
        for order in [Order::Reverse, Order::Random(1), Order::Random(2)] {
            assert_eq!(solve(How { order, ..base }), expected, "{variant}, {order:?}");
        }
        for warps in [4, 16] {
            for order in [Order::Forward, Order::Random(3)] {
                assert_eq!(solve(How { warps, order, ..base }), expected, "{variant}, {warps} warps");
            }
        }
        assert_eq!(solve(How { pad: 3, shift: 1, ..base }), expected, "{variant}, not aligned");
    }
}

#[test]
fn a_wrong_code_or_scale_is_seen() {
    let problem = Problem::new(4, 60, 3);
    let variant = variant("4bit-16g-act", 32);
    let solved = solve(&problem, &variant, How::default()).unwrap();
    problem.check(&variant, &solved);
    let seen = |change: &dyn Fn(&mut Vec<u8>, &mut Vec<half::f16>)| {
        let linear = &solved.linear;
        let (mut codes, mut scales) = (linear.codes().to_vec(), linear.scales().to_vec());
        change(&mut codes, &mut scales);
        let linear = gptq::gptq::QuantizedLinear::new(
            variant.bits,
            codes,
            scales,
            linear.zeros().to_vec(),
            linear.g_idx().into(),
        );
        let wrong = super::problem::Solved { linear, ..solved.clone() };
        std::panic::catch_unwind(|| problem.check(&variant, &wrong)).is_err()
    };
    assert!(!seen(&|_, _| ()));
    assert!(seen(&|codes, _| codes[123] ^= 1));
    assert!(seen(&|_, scales| scales[1] = half::f16::from_bits(scales[1].to_bits() + 2)));
}
