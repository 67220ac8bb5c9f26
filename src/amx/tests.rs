//! Against sums in f64, at sizes that fill neither strips nor chunks nor blocks.

use std::ops::Range;

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

use super::{tiles::plain, *};

/// Values of both signs and different size.
fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = || f32::from((rng.next_u32() >> 16) as u16) / 32768.0 - 1.0;
    (0..count).map(|_| uniform() * uniform() * 3.0).collect()
}

fn bf16(values: &[f32]) -> Vec<u16> {
    values.iter().map(|&v| half::bf16::from_f32(v).to_bits()).collect()
}

fn wide(bits: u16) -> f64 {
    f64::from(half::bf16::from_bits(bits))
}

fn operands(depth: usize, seed: u64) -> (Vec<f32>, Vec<f32>, Operand, Operand) {
    let (x, y) = (values(depth * SIDE, seed), values(depth * SIDE, seed + 1));
    let fill = |values: &[f32], side| {
        let mut operand = Operand::zeros(depth, SIDE, Parts::Two);
        let chunks = operand.lines_mut().chunks_exact_mut(Parts::Two.chunk_len());
        for (chunk, rows) in chunks.zip(values.chunks(SIDE * SIDE)) {
            let mut square = [[0.0; SIDE]; SIDE];
            square.iter_mut().zip(rows.chunks(SIDE)).for_each(|(to, row)| to.copy_from_slice(row));
            fill_from_f32(chunk, side, Parts::Two, &square);
        }
        operand
    };
    let (left, right) = (fill(&x, Side::Left), fill(&y, Side::Right));
    (x, y, left, right)
}

#[test]
fn two_parts_are_nearly_fp32() {
    for depth in [1, 32, 77, 512] {
        let (x, y, left, right) = operands(depth, 1);
        let stride = SIDE + 5;
        let start = values(SIDE * stride, 3);
        let mut c = start.clone();
        Tiles::new().multiply_add(left.strip(0), right.strip(0), Parts::Two, &mut c, stride);
        let mut by_definition = start.clone();
        plain(left.strip(0), right.strip(0), Parts::Two, &mut by_definition, stride);
        for i in 0..SIDE {
            for j in 0..stride {
                let at = i * stride + j;
                if j >= SIDE {
                    assert_eq!(c[at], start[at], "outside the square");
                    continue;
                }
                let terms = (0..depth).map(|d| f64::from(x[d * SIDE + i]) * f64::from(y[d * SIDE + j]));
                let exact = f64::from(start[at]) + terms.clone().sum::<f64>();
                let size = terms.map(f64::abs).sum::<f64>() + 1.0;
                assert!((f64::from(c[at]) - exact).abs() < 2e-5 * size, "{depth} {i} {j}: {} {exact}", c[at]);
                assert!((c[at] - by_definition[at]).abs() < 2e-6 * size as f32, "{depth} {i} {j}");
            }
        }
    }
}

#[test]
fn gram_is_exact_up_to_fp32_sums() {
    for (tokens, k) in [(5, 3), (100, 70), (64, 300), (2100, 33)] {
        let x = bf16(&values(tokens * k, 4));
        let mut matrix = vec![f32::NAN; k * k];
        gram(&mut matrix, k, 0..k, &x, false);
        gram(&mut matrix, k, 0..k, &x, true);
        for i in 0..k {
            for j in 0..=i {
                let terms = (0..tokens).map(|t| wide(x[t * k + i]) * wide(x[t * k + j]));
                let exact = 2.0 * terms.clone().sum::<f64>();
                let size = terms.map(f64::abs).sum::<f64>() + 1.0;
                let found = f64::from(matrix[i * k + j]);
                assert!((found - exact).abs() < 1e-5 * size, "{tokens} {k} {i} {j}: {found} {exact}");
            }
        }
    }
}

#[test]
fn cross_gram_is_exact_up_to_fp32_sums() {
    for (tokens, k) in [(5, 3), (100, 70), (64, 300), (2100, 33)] {
        let (x, y) = (bf16(&values(tokens * k, 5)), bf16(&values(tokens * k, 6)));
        let mut matrix = vec![f32::NAN; k * k];
        cross_gram(&mut matrix, k, 0..k, &x, &y, false);
        cross_gram(&mut matrix, k, 0..k, &x, &y, true);
        for i in 0..k {
            for j in 0..k {
                let terms = (0..tokens).map(|t| wide(x[t * k + i]) * wide(y[t * k + j]));
                let exact = 2.0 * terms.clone().sum::<f64>();
                let size = terms.map(f64::abs).sum::<f64>() + 1.0;
                let found = f64::from(matrix[i * k + j]);
                assert!((found - exact).abs() < 1e-5 * size, "{tokens} {k} {i} {j}: {found} {exact}");
            }
        }
    }
}

/// A rank that continues a sum block by block adds the same numbers in the same order.
#[test]
fn blocks_of_rows_are_the_same_as_all_rows() {
    for (tokens, k) in [(70, 600), (2100, 520)] {
        let (x, y) = (bf16(&values(tokens * k, 7)), bf16(&values(tokens * k, 8)));
        let [mut whole, mut parts] = [vec![0.0; k * k], vec![0.0; k * k]];
        let [mut whole_cross, mut parts_cross] = [vec![0.0; k * k], vec![0.0; k * k]];
        for add in [false, true] {
            gram(&mut whole, k, 0..k, &x, add);
            cross_gram(&mut whole_cross, k, 0..k, &x, &y, add);
            for rows in [512..k, 0..256, 256..512] {
                gram(&mut parts, k, rows.clone(), &x, add);
                cross_gram(&mut parts_cross, k, rows, &x, &y, add);
            }
        }
        assert!(whole_cross == parts_cross, "{tokens} {k}");
        for i in 0..k {
            assert!(whole[i * k..=i * k + i] == parts[i * k..=i * k + i], "{tokens} {k} {i}");
        }
    }
}

/// Both kinds of values, both ways of lying in memory, and both kinds of sums.
#[test]
fn products_of_views_are_nearly_exact() {
    for [m, depth, n] in [[3, 5, 2], [64, 64, 64], [70, 2100, 300], [257, 33, 40]] {
        let (x, y) = (values(m * depth, 9), values(depth * n, 10));
        let exact = |at: usize| {
            let terms = (0..depth).map(|d| f64::from(x[at / n * depth + d]) * f64::from(y[d * n + at % n]));
            (terms.clone().sum::<f64>(), terms.map(f64::abs).sum::<f64>() + 1.0)
        };
        let turned = |values: &[f32], rows: usize, columns: usize| -> Vec<f32> {
            (0..rows * columns).map(|at| values[at % rows * columns + at / rows]).collect()
        };
        let (xt, yt) = (turned(&x, m, depth), turned(&y, depth, n));
        let views = |x: Values<'_>,
                     xt: Values<'_>,
                     y: Values<'_>,
                     yt: Values<'_>,
                     check: &dyn Fn(View<'_>, View<'_>)| {
            let lefts =
                [View::new(x, [m, depth], [depth, 1]), View::new(xt, [depth, m], [m, 1]).transposed()];
            let rights =
                [View::new(y, [depth, n], [n, 1]), View::new(yt, [n, depth], [depth, 1]).transposed()];
            lefts.iter().for_each(|&left| rights.iter().for_each(|&right| check(left, right)));
        };
        let float = Values::Float;
        views(float(&x), float(&xt), float(&y), float(&yt), &|left, right| {
            for (parts, tolerance) in [(Parts::One, 6e-3), (Parts::Two, 2e-5)] {
                let stride = n + 3;
                let mut c = vec![1.0; (m - 1) * stride + n];
                for add in [false, true] {
                    let sums = Sums { values: &mut c, stride, add, shape: Shape::Full };
                    multiply(left, right, parts, sums);
                }
                for at in 0..m * n {
                    let ((exact, size), found) = (exact(at), f64::from(c[at / n * stride + at % n]));
                    assert!(
                        (found - 2.0 * exact).abs() < 2.0 * tolerance * size,
                        "{parts:?} {at}: {found} {exact}"
                    );
                }
                for between in c.chunks(stride).flat_map(|row| row.iter().skip(n)) {
                    assert_eq!(*between, 1.0, "between the rows");
                }
            }
        });
        let half = Values::BFloat16;
        let [xb, xtb, yb, ytb] = [&x, &xt, &y, &yt].map(|values| bf16(values));
        views(half(&xb), half(&xtb), half(&yb), half(&ytb), &|left, right| {
            let mut product = vec![0; m * n];
            multiply_by(left, &Operand::new(right, Side::Right, Parts::One), n, &mut product);
            for (at, &found) in product.iter().enumerate() {
                let ((exact, size), found) = (exact(at), wide(found));
                assert!((found - exact).abs() < 1e-2 * size, "{at}: {found} {exact}");
            }
        });
    }
}

/// Blocks above the diagonal keep what they have.
#[test]
fn the_lower_part_of_a_product_is_that_of_the_whole() {
    let (m, depth) = (600, 40);
    let x = values(m * depth, 11);
    let view = View::new(Values::Float(&x), [m, depth], [depth, 1]);
    let product = |shape| {
        let mut c = vec![7.0; m * m];
        multiply(view, view.transposed(), Parts::Two, Sums { values: &mut c, stride: m, add: false, shape });
        c
    };
    let (whole, lower) = (product(Shape::Full), product(Shape::Lower { first_row: 0 }));
    for (at, (whole, lower)) in whole.iter().zip(&lower).enumerate() {
        let expected = if at % m / BLOCK <= at / m / BLOCK { *whole } else { 7.0 };
        assert_eq!(*lower, expected, "{at}");
    }
}

#[test]
fn a_product_takes_a_part_of_an_operands_rows() {
    let (m, n, depth) = (70, 300, 100);
    let (x, y) = (bf16(&values(depth * m, 7)), bf16(&values(depth * n, 8)));
    let view = |values, rows: Range<usize>, columns| {
        View::new(Values::BFloat16(values), [depth, columns], [columns, 1]).part(rows, 0..columns)
    };
    let mut left = Operand::zeros(depth, m, Parts::One);
    left.set_rows(64, view(&x, 64..depth, m), Side::Left);
    left.set_rows(0, view(&x, 0..64, m), Side::Left);
    for rows in [0..depth, 32..64, 64..depth] {
        let stride = n + 3;
        let start = values(m * stride, 9);
        let mut sums = start.clone();
        add_rows_product((&left, rows.clone()), view(&y, rows.clone(), n), (&mut sums, stride), m);
        for i in 0..m {
            for j in 0..stride {
                let of_rows = if j < n { rows.clone() } else { 0..0 };
                let terms = of_rows.map(|d| wide(x[d * m + i]) * wide(y[d * n + j]));
                let exact = f64::from(start[i * stride + j]) + terms.clone().sum::<f64>();
                let size = terms.map(f64::abs).sum::<f64>() + 1.0;
                let found = f64::from(sums[i * stride + j]);
                assert!((found - exact).abs() < 2e-6 * size, "{rows:?} {i} {j}: {found} {exact}");
            }
        }
    }
}
