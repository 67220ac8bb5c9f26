//! `y = x · Wᵀ` on the CPU with packed GPTQ weights, without a dense copy of all of them.
//!
//! Where groups are runs of features and the processor has dot products of bytes, [`super::fixed_point`] multiplies. Elsewhere
//! [`super::few_rows`] multiplies up to four rows. For more rows, each task has a tile of 256 output features. It dequantizes
//! 32 of them and 256 input features at a time, into a panel that stays in its core's first cache, and multiplies all rows with it.
//!
//! The order of each element's sum depends only on K and on the instruction set, so that the number of threads and the division
//! into tasks do not change the result. Up to four rows are summed in another order than more rows.

use rayon::prelude::*;

use super::dequantize::{PANEL_FEATURES, Panel};
use super::few_rows::{MAX_ROWS, matmul_few_rows};
use super::fixed_point;
use super::simd::{Isa, Kernel, LANES, Lanes, Simd, prefetch};
use super::unpack::{TILE, unit_codes, unit_groups, with_width};
use crate::pack::PackedView;

/// Largest number of rows of x for one panel. It limits the copy of x, and keeps x, panel and y in the L2 cache.
const CHUNK_ROWS: usize = 512;

/// The fewest rows of a task if several tasks dequantize the same tile, because there are more threads than tiles.
const MIN_TASK_ROWS: usize = 64;
/// Distance of the prefetch of x, in values.
const AHEAD: usize = 256;

/// Multiplies: y `[M, N]` = x `[M, K]` · Wᵀ, all f32 and row-major, with `M = rows`, K and N of `w`.
///
/// # Panics
/// If the lengths of `x` or `y` are not those of the shapes.
pub(super) fn matmul(x: &[f32], rows: usize, w: &PackedView<'_>, y: &mut [f32]) {
    assert_eq!(x.len(), rows * w.in_features(), "x must be [M, K]");
    assert_eq!(y.len(), rows * w.out_features(), "y must be [M, N]");
    if !fixed_point::matmul(x, rows, w, y) {
        matmul_with(Isa::best(), x, rows, w, y);
    }
}

pub(super) fn matmul_with(isa: Isa, x: &[f32], rows: usize, w: &PackedView<'_>, y: &mut [f32]) {
    match rows {
        0 => {}
        1..=MAX_ROWS => matmul_few_rows(isa, x, w, y),
        _ => with_width!(w.bits().get(), |BITS, WORDS| matmul_many_rows::<BITS, WORDS>(isa, x, rows, w, y)),
    }
}

/// Cuts y `[M, N]` into parts of so many `columns`: piece `[t][m]` is part `t` of row `m`.
pub(super) fn cut_columns(y: &mut [f32], out_features: usize, columns: usize) -> Vec<Vec<&mut [f32]>> {
    let rows = y.len() / out_features;
    let parts = out_features.div_ceil(columns);
    let mut parts: Vec<Vec<_>> = (0..parts).map(|_| Vec::with_capacity(rows)).collect();
    for row in y.chunks_exact_mut(out_features) {
        for (part, piece) in parts.iter_mut().zip(row.chunks_mut(columns)) {
            part.push(piece);
        }
    }
    parts
}

fn matmul_many_rows<const BITS: usize, const WORDS: usize>(
    isa: Isa,
    x: &[f32],
    rows: usize,
    w: &PackedView<'_>,
    y: &mut [f32],
) {
    let unit_groups = unit_groups(w);
    let chunk_rows = rows.div_ceil(rows.div_ceil(CHUNK_ROWS)).next_multiple_of(isa.tile_rows());
    let mut packed = Vec::new();
    for (x, y) in x.chunks(chunk_rows * w.in_features()).zip(y.chunks_mut(chunk_rows * w.out_features())) {
        pack_rows(x, w.in_features(), isa.tile_rows(), &mut packed);
        let mut tiles = cut_columns(y, w.out_features(), TILE);
        let task_rows = task_rows(x.len() / w.in_features(), tiles.len(), isa.tile_rows());
        let tasks = tiles.par_iter_mut().enumerate().flat_map(|(t, y)| {
            y.par_chunks_mut(task_rows).enumerate().map(move |(i, y)| (t * TILE, i * task_rows, y))
        });
        tasks.for_each_init(Panel::default, |panel, (first_column, first_row, y)| {
            isa.run(Task::<BITS, WORDS> {
                x: &packed,
                w,
                unit_groups: &unit_groups,
                first_column,
                first_row,
                y,
                panel,
            });
        });
    }
}

/// Rows of a task: all of them if there are tiles for every thread.
fn task_rows(rows: usize, tiles: usize, tile_rows: usize) -> usize {
    let pieces = (2 * rayon::current_num_threads()).div_ceil(tiles).min(rows / MIN_TASK_ROWS).max(1);
    rows.div_ceil(pieces).next_multiple_of(tile_rows)
}

/// Reorders x `[M, K]` to `[K / PANEL_FEATURES][M / tile_rows][PANEL_FEATURES][tile_rows]`, the order in which it is multiplied.
/// The last panel has the remaining features; rows beyond M are zero.
fn pack_rows(x: &[f32], in_features: usize, tile_rows: usize, packed: &mut Vec<f32>) {
    let padded_rows = (x.len() / in_features).next_multiple_of(tile_rows);
    packed.clear();
    packed.resize(padded_rows * in_features, 0.0);
    packed.par_chunks_mut(padded_rows * PANEL_FEATURES).enumerate().for_each(|(panel, packed)| {
        let features = packed.len() / padded_rows;
        let tiles = packed.chunks_exact_mut(features * tile_rows);
        for (packed, x) in tiles.zip(x.chunks(tile_rows * in_features)) {
            for (row, x) in x.chunks_exact(in_features).enumerate() {
                let x = &x[panel * PANEL_FEATURES..][..features];
                for (to, from) in packed[row..].iter_mut().step_by(tile_rows).zip(x) {
                    *to = *from;
                }
            }
        }
    });
}

/// Some rows of one tile of y.
struct Task<'a, 'y, const BITS: usize, const WORDS: usize> {
    /// All rows, from [`pack_rows`].
    x: &'a [f32],
    w: &'a PackedView<'a>,
    unit_groups: &'a [u32],
    first_column: usize,
    first_row: usize,
    y: &'a mut [&'y mut [f32]],
    panel: &'a mut Panel,
}

impl<const BITS: usize, const WORDS: usize> Kernel for Task<'_, '_, BITS, WORDS> {
    #[inline(always)]
    fn run<S: Simd, const ROWS: usize, const VECTORS: usize>(self, simd: S) {
        let Self { x, w, unit_groups, first_column, first_row, y, panel } = self;
        let (in_features, codes) = (w.in_features(), unit_codes(BITS, WORDS));
        let columns = first_column..first_column + y[0].len();
        let padded_rows = x.len() / in_features;
        panel.table.fill::<BITS, WORDS>(w, 0..in_features, columns.clone());
        for start in (0..in_features).step_by(PANEL_FEATURES) {
            let features = PANEL_FEATURES.min(in_features - start);
            let units = start / codes..(start + features) / codes;
            let x = &x[start * padded_rows + first_row * features..];
            for column in (0..columns.len()).step_by(VECTORS * LANES) {
                let block = column / LANES;
                let weights = panel.dequantize::<S, BITS, WORDS, VECTORS>(
                    simd,
                    w,
                    unit_groups,
                    &units,
                    &columns,
                    block,
                );
                for (i, y) in y.chunks_mut(ROWS).enumerate() {
                    for y in y.iter() {
                        for v in 0..VECTORS {
                            prefetch(y, column + v * LANES);
                        }
                    }
                    let sums = multiply::<S, ROWS, VECTORS>(simd, &x[i * features * ROWS..], weights);
                    for r in 0..ROWS {
                        if let Some(y) = y.get_mut(r) {
                            add::<S, VECTORS>(simd, &sums[r], start == 0, &mut y[column..]);
                        }
                    }
                }
            }
        }
    }
}

/// The sums over a panel's features of x `[features, ROWS]` times weights `[features, VECTORS]`, kept in registers.
#[inline(always)]
fn multiply<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    x: &[f32],
    weights: &[Lanes],
) -> [[S::Floats; VECTORS]; ROWS] {
    let zero = simd.splat(0.0);
    let mut sums = [[zero; VECTORS]; ROWS];
    let ahead = x.get(AHEAD..).unwrap_or(&[]);
    for (i, (x, lanes)) in x.as_chunks::<ROWS>().0.iter().zip(weights.as_chunks::<VECTORS>().0).enumerate() {
        prefetch(ahead, i * ROWS);
        let mut weights = [zero; VECTORS];
        for v in 0..VECTORS {
            weights[v] = simd.load(&lanes[v].0);
        }
        for r in 0..ROWS {
            let x = simd.splat(x[r]);
            for v in 0..VECTORS {
                sums[r][v] = simd.mul_add(x, weights[v], sums[r][v]);
            }
        }
    }
    sums
}

/// Adds sums to a row of y, up to its end, or stores them if they are the `first`.
#[inline(always)]
fn add<S: Simd, const VECTORS: usize>(simd: S, sums: &[S::Floats; VECTORS], first: bool, y: &mut [f32]) {
    for (v, y) in y.chunks_mut(LANES).enumerate().take(VECTORS) {
        if let Some(y) = y.first_chunk_mut() {
            let sum = if first { sums[v] } else { simd.add(simd.load(y), sums[v]) };
            simd.store(sum, y);
        } else {
            let mut sum = Lanes::ZERO;
            simd.store(sums[v], &mut sum.0);
            for (y, sum) in y.iter_mut().zip(&sum.0) {
                *y = if first { *sum } else { *y + *sum };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::fixture::{Fixture, Order, Random, Spec};

    /// Half a unit in the last place of f32.
    const UNIT_ROUNDOFF: f64 = 1.0 / 16_777_216.0;

    /// Largest difference of f32 from the exact sum whose terms' magnitudes add up to `magnitude`.
    ///
    /// Every term has at most one rounding of its product, K of the additions, and one of the panel or the scale. Source: Higham
    /// 2002, §3.1, with room for the second-order part.
    fn tolerance(in_features: usize, magnitude: f64) -> f64 {
        (in_features + 4) as f64 * UNIT_ROUNDOFF * magnitude
    }

    fn multiplied(isa: Isa, fixture: &Fixture, x: &[f32]) -> Vec<f32> {
        let rows = x.len() / fixture.in_features;
        let mut y = vec![f32::NAN; rows * fixture.out_features];
        matmul_with(isa, x, rows, &fixture.view(), &mut y);
        y
    }

    /// Number of elements of y out of tolerance.
    fn wrong(y: &[f32], expected: &[(f64, f64)], in_features: usize) -> usize {
        let right = |(y, (exact, magnitude)): (&f32, &(f64, f64))| {
            (f64::from(*y) - exact).abs() <= tolerance(in_features, *magnitude)
        };
        y.iter().zip(expected).filter(|pair| !right(*pair)).count()
    }

    #[test]
    fn agrees_with_f64_for_every_width_order_version_and_shape() {
        let mut random = Random(11);
        for (bits, unit) in [(2, 16), (3, 32), (4, 8), (8, 4)] {
            let shapes =
                [(32, unit, 32), (32 * 9, 3 * unit, 20), (32 * 10, 256 + unit, 64), (64, 32 + 5 * unit, 64)];
            for (in_features, out_features, group_size) in shapes {
                for (order, zero_offset) in [(Order::Sequential, 1), (Order::Act, 0), (Order::Act, 1)] {
                    let spec = Spec { bits, in_features, out_features, group_size, order, zero_offset };
                    let fixture = Fixture::random(spec, &mut random);
                    let x = random.vector(65 * in_features);
                    let expected = fixture.multiply(&x);
                    for rows in [1, 2, 3, 4, 5, 7, 16, 65] {
                        for isa in Isa::available() {
                            let y = multiplied(isa, &fixture, &x[..rows * in_features]);
                            assert_eq!(
                                wrong(&y, &expected, in_features),
                                0,
                                "{spec:?}, {rows} rows, {isa:?}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_wrong_code_zero_scale_or_group_is_seen() {
        let mut random = Random(13);
        for bits in [2, 3, 4, 8] {
            for (order, rows) in
                [(Order::Sequential, 1), (Order::Act, 1), (Order::Sequential, 7), (Order::Act, 7)]
            {
                let spec =
                    Spec { bits, in_features: 96, out_features: 32, group_size: 32, order, zero_offset: 1 };
                let right = Fixture::random(spec, &mut random);
                let x = random.vector(rows * spec.in_features);
                let expected = right.multiply(&x);
                type Fault = (&'static str, usize, fn(&mut Fixture));
                let faults: [Fault; 4] = [
                    ("code", 1, |f| f.codes[37 * 32 + 5] ^= 1),
                    ("zero", 1, |f| f.zeros[32 + 5] ^= 1),
                    ("scale", 1, |f| f.scales[32 + 5] = f16_after(f.scales[32 + 5])),
                    ("group", 8, |f| f.g_idx[37] = (f.g_idx[37] + 1) % 3),
                ];
                for (name, columns, fault) in faults {
                    let mut fixture = right.clone();
                    fault(&mut fixture);
                    fixture.pack();
                    for isa in Isa::available() {
                        let seen = wrong(&multiplied(isa, &fixture, &x), &expected, spec.in_features);
                        assert!(
                            2 * seen > columns * rows,
                            "{name} of {spec:?}, {rows} rows, {isa:?}: {seen}"
                        );
                    }
                }
            }
        }
    }

    fn f16_after(value: half::f16) -> half::f16 {
        half::f16::from_bits(value.to_bits() + 1)
    }

    #[test]
    fn threads_rows_and_fused_instruction_sets_do_not_change_a_bit() {
        let mut random = Random(17);
        let spec = Spec {
            bits: 4,
            in_features: 544,
            out_features: 1032,
            group_size: 32,
            order: Order::Act,
            zero_offset: 1,
        };
        let fixture = Fixture::random(spec, &mut random);
        let x = random.vector(200 * spec.in_features);
        for rows in [2, 200] {
            let x = &x[..rows * spec.in_features];
            let one = in_pool(1, || multiplied(Isa::best(), &fixture, x));
            for threads in [2, 3, 16] {
                assert!(
                    in_pool(threads, || multiplied(Isa::best(), &fixture, x)) == one,
                    "{rows} rows, {threads} threads"
                );
            }
            if let [best, second, _] = Isa::available()[..] {
                assert!(multiplied(second, &fixture, x) == one, "{rows} rows, {best:?} and {second:?}");
            }
        }
        let all = multiplied(Isa::best(), &fixture, &x);
        let some = multiplied(Isa::best(), &fixture, &x[..7 * spec.in_features]);
        assert!(all.starts_with(&some), "7 rows of 200");
    }

    fn in_pool<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool").install(work)
    }

    #[test]
    fn more_rows_than_a_chunk_are_all_multiplied() {
        let mut random = Random(19);
        let spec = Spec {
            bits: 4,
            in_features: 32,
            out_features: 8,
            group_size: 32,
            order: Order::Sequential,
            zero_offset: 1,
        };
        let fixture = Fixture::random(spec, &mut random);
        let x = random.vector((2 * CHUNK_ROWS + 3) * spec.in_features);
        assert_eq!(wrong(&multiplied(Isa::best(), &fixture, &x), &fixture.multiply(&x), spec.in_features), 0);
    }

    #[test]
    fn no_rows_are_no_work() {
        let spec = Spec {
            bits: 4,
            in_features: 32,
            out_features: 8,
            group_size: 32,
            order: Order::Sequential,
            zero_offset: 1,
        };
        matmul(&[], 0, &Fixture::random(spec, &mut Random(1)).view(), &mut []);
    }
}
