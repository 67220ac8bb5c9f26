//! `x · Wᵀ` in fixed point, by the dot products of bytes that processors with AVX-512 VNNI have.
//!
//! The values of x that meet one group of weights become multiples of one power of two, with three signed bytes each. Products of
//! these bytes with codes and zero points are summed exactly. Only x is rounded, by at most 2⁻²³ of the largest value that meets the
//! group. The error of a product is a fifth to a half of that of fp32 where values are of one size, and up to three times it where one
//! value of a group is far larger than the others. The dot products take three quarters of the instructions of fp32, and no others to
//! make numbers of codes. A fourth byte would make the error smaller than that of fp32 everywhere, and 16 rows a quarter slower.
//!
//! Groups must be runs of input features, as they are without act order, or once [`super::by_group`] has sorted them.

use std::ops::Range;

use half::f16;
use rayon::prelude::*;

use super::matmul::cut_columns;
use super::simd::LANES;
use super::unpack::{MIXED, TILE, unit_groups};
use crate::pack::PackedView;

/// The most rows of x that are multiplied together: so many sums fit the registers.
const TILE_ROWS: usize = 8;
/// The most input features of a segment. Sums of their codes of 8 bits times bytes are exact in fp32.
const SEGMENT_FEATURES: usize = 256;
/// Bytes of a value.
const BYTES: usize = 3;
/// The largest number of three signed bytes.
const LARGEST: f32 = (127 * (1 << 16) + 127 * (1 << 8) + 127) as f32;
/// Largest number of rows of x that are converted at once.
const CHUNK_ROWS: usize = 512;
/// Distance of the prefetch of words, in blocks.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 16;

/// Whether the processor has dot products of bytes.
pub(super) fn is_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// `y = x · Wᵀ`, as [`super::matmul::matmul()`] does. False, and y is as before, if the processor has no dot products of bytes, codes
/// have 3 bits, groups are not runs, or x has a value that is not finite. The result does not depend on the number of threads.
pub(super) fn matmul(x: &[f32], rows: usize, w: &PackedView<'_>, y: &mut [f32]) -> bool {
    is_fast() && matmul_by(true, x, rows, w, y)
}

fn matmul_by(vectors: bool, x: &[f32], rows: usize, w: &PackedView<'_>, y: &mut [f32]) -> bool {
    if rows == 0 {
        return true;
    }
    let (true, Some(segments)) = (x.iter().all(|x| x.is_finite()), segments(w)) else { return false };
    let all = Work { vectors, w, segments: &segments };
    // One task of the pool, whose threads then need not be woken again for each step.
    rayon::scope(|_| match (w.bits().get(), rows <= TILE_ROWS) {
        (2, true) => all.few_rows::<2>(x, y),
        (2, false) => all.many_rows::<2>(x, y),
        (4, true) => all.few_rows::<4>(x, y),
        (4, false) => all.many_rows::<4>(x, y),
        (8, true) => all.few_rows::<8>(x, y),
        (8, false) => all.many_rows::<8>(x, y),
        (bits, _) => unreachable!("segments of {bits}-bit codes"),
    });
    true
}

/// Units of one group.
pub(super) struct Segment {
    units: Range<usize>,
    group: usize,
}

/// The segments of K, if codes fill bytes: as long as possible, but none goes beyond a multiple of [`SEGMENT_FEATURES`].
pub(super) fn segments(w: &PackedView<'_>) -> Option<Vec<Segment>> {
    if !matches!(w.bits().get(), 2 | 4 | 8) {
        return None;
    }
    let most = SEGMENT_FEATURES / (32 / w.bits().get() as usize);
    let mut segments: Vec<Segment> = Vec::new();
    for (unit, group) in unit_groups(w).into_iter().enumerate() {
        if group == MIXED {
            return None;
        }
        match segments.last_mut() {
            Some(last) if last.group == group as usize && !unit.is_multiple_of(most) => last.units.end += 1,
            _ => segments.push(Segment { units: unit..unit + 1, group: group as usize }),
        }
    }
    Some(segments)
}

/// Some rows of x in fixed point.
#[derive(Default)]
struct Numbers {
    /// `[unit][row][byte][shift]`: one byte of the values whose codes lie at this shift in the bytes of a word, in their order.
    bytes: Vec<u32>,
    /// `[segment][row]`
    facts: Vec<Facts>,
}

/// Facts of the values of a row in a segment.
#[derive(Clone, Copy)]
struct Facts {
    /// Sums of each byte.
    sums: [f32; BYTES],
    /// The value of the number 1.
    step: f32,
}

impl Numbers {
    /// Of the rows `x` `[M, K]`, for some segments.
    fn fill<const BITS: usize>(&mut self, x: &[f32], in_features: usize, segments: &[Segment]) {
        let (codes, shifts) = (32 / BITS, 8 / BITS);
        let rows = x.len() / in_features;
        let first = segments[0].units.start;
        let units = segments[segments.len() - 1].units.end - first;
        self.bytes.clear();
        self.bytes.resize(units * rows * BYTES * shifts, 0);
        self.facts.clear();
        for segment in segments {
            for (row, x) in x.chunks_exact(in_features).enumerate() {
                let x = &x[segment.units.start * codes..segment.units.end * codes];
                let scale = scale(x);
                let mut sums = [0; BYTES];
                for (unit, x) in segment.units.clone().zip(x.chunks_exact(codes)) {
                    let at = ((unit - first) * rows + row) * BYTES * shifts;
                    let bytes = &mut self.bytes[at..at + BYTES * shifts];
                    for (j, x) in x.iter().enumerate() {
                        let x = x * scale;
                        let mut rest = (x + 0.5f32.copysign(x)) as i32;
                        for (byte, sum) in sums.iter_mut().enumerate() {
                            let low = rest as i8;
                            rest = (rest - i32::from(low)) >> 8;
                            *sum += i32::from(low);
                            bytes[byte * shifts + j % shifts] |= u32::from(low as u8) << (j / shifts * 8);
                        }
                    }
                }
                self.facts.push(Facts { sums: sums.map(|sum| sum as f32), step: 1.0 / scale });
            }
        }
    }
}

/// The power of two that makes numbers of up to 23 bits of finite values.
fn scale(x: &[f32]) -> f32 {
    let largest = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let exponent = ((largest.to_bits() >> 23) as i32 - 127).max(-100);
    let scale = f32::from_bits(((127 + 22 - exponent) as u32) << 23);
    if largest * scale > LARGEST { scale / 2.0 } else { scale }
}

/// A product's weights.
struct Work<'a> {
    /// Whether vectors are used, which the processor must have.
    vectors: bool,
    w: &'a PackedView<'a>,
    segments: &'a [Segment],
}

impl Work<'_> {
    /// For up to [`TILE_ROWS`] rows, where most of the time goes to reading words: each task reads whole rows of `qweight`, from
    /// beginning to end if there are enough of them. Memory is read twice as fast as by columns.
    fn few_rows<const BITS: usize>(&self, x: &[f32], y: &mut [f32]) {
        let (k, n) = (self.w.in_features(), self.w.out_features());
        let most = SEGMENT_FEATURES / (32 / BITS);
        let parts: Vec<_> =
            self.segments.chunk_by(|a, b| a.units.start / most == b.units.start / most).collect();
        let columns =
            n.div_ceil((2 * rayon::current_num_threads()).div_ceil(parts.len())).next_multiple_of(TILE);
        let tasks: Vec<_> =
            parts.iter().flat_map(|part| (0..n).step_by(columns).map(move |first| (*part, first))).collect();
        let sums = tasks.into_par_iter().map_init(Numbers::default, |numbers, (part, first)| {
            numbers.fill::<BITS>(x, k, part);
            let own = first..n.min(first + columns);
            let mut sums = vec![0.0; x.len() / k * own.len()];
            let mut rows: Vec<_> = sums.chunks_exact_mut(own.len()).collect();
            for segment in part.iter().enumerate() {
                self.segment::<BITS>(segment, part[0].units.start, numbers, &own, &mut rows);
            }
            sums
        });
        let (sums, tiles) = (sums.collect::<Vec<_>>(), n.div_ceil(columns));
        y.par_chunks_mut(n).enumerate().for_each(|(row, y)| {
            for (tile, y) in y.chunks_mut(columns).enumerate() {
                y.fill(0.0);
                for sums in sums.iter().skip(tile).step_by(tiles) {
                    let own = &sums[row * y.len()..];
                    y.iter_mut().zip(own).for_each(|(y, sum)| *y += sum);
                }
            }
        });
    }

    /// For more rows, by columns.
    fn many_rows<const BITS: usize>(&self, x: &[f32], y: &mut [f32]) {
        let (k, n) = (self.w.in_features(), self.w.out_features());
        for (x, y) in x.chunks(CHUNK_ROWS * k).zip(y.chunks_mut(CHUNK_ROWS * n)) {
            let convert = |x: &[f32]| {
                let mut numbers = Numbers::default();
                numbers.fill::<BITS>(x, k, self.segments);
                numbers
            };
            let numbers: Vec<Numbers> = x.par_chunks(TILE_ROWS * k).map(convert).collect();
            cut_columns(y, n, TILE).into_par_iter().enumerate().for_each(|(tile, mut rows)| {
                let columns = tile * TILE..n.min((tile + 1) * TILE);
                rows.iter_mut().for_each(|row| row.fill(0.0));
                for segment in self.segments.iter().enumerate() {
                    for (rows, numbers) in rows.chunks_mut(TILE_ROWS).zip(&numbers) {
                        self.segment::<BITS>(segment, 0, numbers, &columns, rows);
                    }
                }
            });
        }
    }

    /// Adds the products of segment `i` of the numbers, which begin with the unit `first`.
    fn segment<const BITS: usize>(
        &self,
        (i, segment): (usize, &Segment),
        first: usize,
        numbers: &Numbers,
        columns: &Range<usize>,
        rows: &mut [&mut [f32]],
    ) {
        let (n, m) = (self.w.out_features(), rows.len());
        let of_unit = m * BYTES * (8 / BITS);
        let units = segment.units.start - first..segment.units.end - first;
        let part = Part {
            words: &self.w.qweight()[segment.units.start * n..segment.units.end * n],
            out_features: n,
            columns: columns.clone(),
            bytes: &numbers.bytes[units.start * of_unit..units.end * of_unit],
            facts: &numbers.facts[i * m..(i + 1) * m],
            scales: &self.w.scales()[segment.group * n..][columns.clone()],
            zeros: &self.w.qzeros()[segment.group * n * BITS / 32..(segment.group + 1) * n * BITS / 32]
                [columns.start * BITS / 32..],
            zero_offset: self.w.format().zero_offset().into(),
        };
        #[cfg(target_arch = "x86_64")]
        if self.vectors {
            // SAFETY: `vectors` is true only if the processor has the instructions.
            return unsafe { part.add_vectors::<BITS>(rows) };
        }
        part.add_plain::<BITS>(rows);
    }
}

/// A segment of some columns.
struct Part<'a> {
    /// `[units, N]`
    words: &'a [i32],
    out_features: usize,
    columns: Range<usize>,
    /// Of [`Numbers`], for these units.
    bytes: &'a [u32],
    facts: &'a [Facts],
    /// From the first column on.
    scales: &'a [f16],
    /// Packed zero points from the first column on, and what is added to them.
    zeros: &'a [i32],
    zero_offset: u32,
}

impl Part<'_> {
    /// The definition.
    fn add_plain<const BITS: usize>(&self, rows: &mut [&mut [f32]]) {
        let (shifts, m) = (8 / BITS, rows.len());
        for (row, y) in rows.iter_mut().enumerate() {
            for (column, y) in y.iter_mut().enumerate() {
                let mut sums = [0; BYTES];
                for (unit, words) in self.words.chunks_exact(self.out_features).enumerate() {
                    let word = words[self.columns.start + column] as u32;
                    let bytes = &self.bytes[(unit * m + row) * BYTES * shifts..][..BYTES * shifts];
                    for (sum, bytes) in sums.iter_mut().zip(bytes.chunks_exact(shifts)) {
                        for (shift, bytes) in bytes.iter().enumerate() {
                            let codes = (word >> (shift * BITS)).to_le_bytes();
                            for (code, byte) in codes.iter().zip(bytes.to_le_bytes()) {
                                *sum += i32::from(code & (0xFF >> (8 - BITS))) * i32::from(byte as i8);
                            }
                        }
                    }
                }
                let zero = self.zeros[column * BITS / 32] as u32 >> (column * BITS % 32);
                let zero = ((zero & (0xFF >> (8 - BITS))) + self.zero_offset) as f32;
                let facts = &self.facts[row];
                let [low, middle, high] =
                    [0, 1, 2].map(|byte| (-zero).mul_add(facts.sums[byte], sums[byte] as f32));
                let sum = high.mul_add(256.0, middle).mul_add(256.0, low) * facts.step;
                *y = sum.mul_add(self.scales[column].to_f32(), *y);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod vectors {
    use std::arch::x86_64::*;

    use bytemuck::Pod;

    use super::{AHEAD, BYTES, LANES, Part, TILE_ROWS};
    use crate::kernels::cpu::{simd_x86::prefetch_to_l2, unpack::padded};

    /// The first values as a vector, with zeros behind the last one.
    #[inline(always)]
    fn load<T: Pod, V: Pod>(values: &[T]) -> V {
        match values.first_chunk::<LANES>() {
            Some(whole) => bytemuck::cast(*whole),
            None => bytemuck::cast(padded(values)),
        }
    }

    impl Part<'_> {
        #[target_feature(enable = "avx512f,avx512vnni")]
        pub(super) fn add_vectors<const BITS: usize>(&self, rows: &mut [&mut [f32]]) {
            match rows.len() {
                1 => self.add_rows::<BITS, 1>(rows),
                2 => self.add_rows::<BITS, 2>(rows),
                3 => self.add_rows::<BITS, 3>(rows),
                4 => self.add_rows::<BITS, 4>(rows),
                5 => self.add_rows::<BITS, 5>(rows),
                6 => self.add_rows::<BITS, 6>(rows),
                7 => self.add_rows::<BITS, 7>(rows),
                TILE_ROWS => self.add_rows::<BITS, TILE_ROWS>(rows),
                rows => unreachable!("{rows} rows, at most {TILE_ROWS} expected"),
            }
        }

        #[target_feature(enable = "avx512f,avx512vnni")]
        fn add_rows<const BITS: usize, const M: usize>(&self, rows: &mut [&mut [f32]]) {
            let shifts = const { 8 / BITS };
            let of_unit = const { M * BYTES * (8 / BITS) };
            let mask = _mm512_set1_epi8((0xFF_u8 >> (8 - BITS)) as i8);
            let word_of_lane: [u32; LANES] = std::array::from_fn(|lane| (lane * BITS / 32) as u32);
            let shift_of_lane: [u32; LANES] = std::array::from_fn(|lane| (lane * BITS % 32) as u32);
            for block in 0..self.columns.len().div_ceil(LANES) {
                // Sums of one row alone would wait for each other, so that it has two of each.
                let mut sums = [[[_mm512_setzero_si512(); BYTES]; M]; 2];
                let words = self.words.chunks_exact(self.out_features);
                for (words, bytes) in words.zip(self.bytes.chunks_exact(of_unit)) {
                    let words = &words[self.columns.clone()][block * LANES..];
                    // Rows may lie so that all words of a block share a set of the first cache, which has fewer places.
                    if let Some(ahead) = words.get(AHEAD * LANES) {
                        prefetch_to_l2(ahead);
                    }
                    let words: __m512i = load(words);
                    for shift in 0..shifts {
                        let count = _mm_cvtsi32_si128((shift * BITS) as i32);
                        let codes = _mm512_and_si512(_mm512_srl_epi32(words, count), mask);
                        let sums = &mut sums[if M == 1 { shift % 2 } else { 0 }];
                        for row in 0..M {
                            for byte in 0..BYTES {
                                let values = bytes[(row * BYTES + byte) * shifts + shift] as i32;
                                let sum = &mut sums[row][byte];
                                *sum = _mm512_dpbusd_epi32(*sum, codes, _mm512_set1_epi32(values));
                            }
                        }
                    }
                }
                let zeros = load(&self.zeros[block * LANES * BITS / 32..]);
                let zeros = _mm512_permutexvar_epi32(bytemuck::cast(word_of_lane), zeros);
                let zeros = _mm512_srlv_epi32(zeros, bytemuck::cast(shift_of_lane));
                let zeros = _mm512_and_si512(zeros, _mm512_set1_epi32(0xFF >> (8 - BITS)));
                let zeros = _mm512_add_epi32(zeros, _mm512_set1_epi32(self.zero_offset as i32));
                let zero = _mm512_cvtepi32_ps(zeros);
                let scale = _mm512_cvtph_ps(load(&self.scales[block * LANES..]));
                // A loop of constant length, so that sums stay in registers.
                let mut products = [_mm512_setzero_ps(); M];
                for row in 0..M {
                    let facts = &self.facts[row];
                    let whole = |byte: usize| {
                        let sum = _mm512_add_epi32(sums[0][row][byte], sums[1][row][byte]);
                        _mm512_fnmadd_ps(zero, _mm512_set1_ps(facts.sums[byte]), _mm512_cvtepi32_ps(sum))
                    };
                    let sum = _mm512_fmadd_ps(whole(2), _mm512_set1_ps(256.0), whole(1));
                    let sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256.0), whole(0));
                    products[row] = _mm512_mul_ps(sum, _mm512_set1_ps(facts.step));
                }
                for (y, sum) in rows.iter_mut().zip(products) {
                    let y = &mut y[block * LANES..];
                    let new: [f32; LANES] = bytemuck::cast(_mm512_fmadd_ps(sum, scale, load(y)));
                    match y.first_chunk_mut() {
                        Some(whole) => *whole = new,
                        None => y.copy_from_slice(&new[..y.len()]),
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::{
        fixture::{Fixture, Order, Random, Spec},
        matmul::matmul_with,
        simd::Isa,
    };

    fn multiplied(vectors: bool, fixture: &Fixture, x: &[f32]) -> Option<Vec<f32>> {
        let rows = x.len() / fixture.in_features;
        let mut y = vec![f32::NAN; rows * fixture.out_features];
        matmul_by(vectors, x, rows, &fixture.view(), &mut y).then_some(y)
    }

    fn spec(bits: usize, shape: (usize, usize), group_size: usize) -> Spec {
        let (in_features, out_features) = shape;
        Spec { bits, in_features, out_features, group_size, order: Order::Sequential, zero_offset: 1 }
    }

    /// Only x is rounded, by 2⁻²³ of the largest value of a segment, and then sums of segments.
    #[test]
    fn agrees_with_f64_for_every_width_and_shape() {
        let mut random = Random(23);
        for bits in [2, 4, 8] {
            let unit = 32 / bits;
            for (shape, group_size) in
                [((32, unit), 32), ((288, 3 * unit), 32), ((1024, 256 + unit), 1024), ((640, 64), 128)]
            {
                let fixture = Fixture::random(spec(bits, shape, group_size), &mut random);
                let x = random.vector(19 * shape.0);
                let expected = fixture.multiply(&x);
                for rows in [1, 2, 3, 4, 5, 6, 7, 8, 9, 19] {
                    let x = &x[..rows * shape.0];
                    let found = multiplied(false, &fixture, x).unwrap();
                    for (found, (exact, magnitude)) in found.iter().zip(&expected) {
                        // Values are in 0.5..1. The last term is of the sum over segments.
                        let tolerance =
                            magnitude * (2.0 / 8_388_608.0 + shape.0 as f64 / 32.0 / 16_777_216.0);
                        let off = (f64::from(*found) - exact).abs();
                        assert!(off <= tolerance, "{bits} bits, {shape:?}, {rows} rows: off by {off:e}");
                    }
                    if is_fast() {
                        assert!(multiplied(true, &fixture, x).unwrap() == found, "{bits} bits, {rows} rows");
                    }
                }
            }
        }
    }

    #[test]
    fn errors_are_below_those_of_fp32_or_near_them_with_outliers() {
        let mut random = Random(43);
        for (bits, group_size) in [(4, 32), (4, 128), (8, 128), (8, 1024)] {
            let fixture = Fixture::random(spec(bits, (1024, 64), group_size), &mut random);
            for (outlier, most) in [(1.0, 0.7), (16.0, 4.0), (256.0, 4.0), (4096.0, 4.0)] {
                let mut x: Vec<f32> =
                    (0..16 * 1024).map(|_| random.below(1 << 24) as f32 - 8_388_608.0).collect();
                x.iter_mut().skip(5).step_by(group_size).for_each(|x| *x *= outlier);
                let exact = fixture.multiply(&x);
                let error = |y: &[f32]| -> f64 {
                    y.iter()
                        .zip(&exact)
                        .map(|(y, (exact, _))| (f64::from(*y) - exact).powi(2))
                        .sum::<f64>()
                        .sqrt()
                };
                let fixed = error(&multiplied(is_fast(), &fixture, &x).unwrap());
                let mut y = vec![f32::NAN; exact.len()];
                matmul_with(Isa::best(), &x, 16, &fixture.view(), &mut y);
                let ratio = fixed / error(&y);
                assert!(ratio < most, "{bits} bits, groups of {group_size}, outliers of {outlier}: {ratio}");
            }
        }
    }

    #[test]
    fn values_of_few_bits_and_close_together_are_multiplied_exactly() {
        let mut random = Random(29);
        let mut fixture = Fixture::random(spec(4, (256, 32), 64), &mut random);
        fixture.scales.fill(f16::from_f32(0.25));
        fixture.pack();
        let x: Vec<f32> = (0..256).map(|_| random.below(2048) as f32 - 1024.0).collect();
        let found = multiplied(is_fast(), &fixture, &x).unwrap();
        let expected: Vec<f32> = fixture.multiply(&x).iter().map(|(exact, _)| *exact as f32).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn largest_and_smallest_values_are_not_lost() {
        let mut random = Random(31);
        let mut fixture = Fixture::random(spec(4, (32, 8), 32), &mut random);
        fixture.scales.fill(f16::ONE);
        fixture.pack();
        for value in
            [f32::MAX / 1024.0, 1.0, f32::from_bits(0x3FFF_FFFF), -f32::from_bits(0x3FFF_FFFF), 1e-30, 0.0]
        {
            let found = multiplied(is_fast(), &fixture, &[value; 32]).unwrap();
            for (found, (exact, magnitude)) in found.iter().zip(fixture.multiply(&[value; 32])) {
                assert!((f64::from(*found) - exact).abs() <= magnitude / 8_388_608.0, "{value:e}");
            }
        }
    }

    #[test]
    fn what_it_cannot_multiply_it_leaves() {
        let mut random = Random(37);
        let sequential = Fixture::random(spec(4, (64, 32), 32), &mut random);
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1.0; 64];
            x[40] = value;
            assert!(multiplied(false, &sequential, &x).is_none());
        }
        let act_order = Spec { order: Order::Act, ..spec(4, (64, 32), 32) };
        assert!(multiplied(false, &Fixture::random(act_order, &mut random), &[1.0; 64]).is_none());
        let three_bits = Fixture::random(spec(3, (64, 32), 32), &mut random);
        assert!(multiplied(false, &three_bits, &[1.0; 64]).is_none());
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let mut random = Random(41);
        let fixture = Fixture::random(spec(4, (544, 1032), 32), &mut random);
        let x = random.vector(40 * 544);
        for rows in [1, 5, 40] {
            let x = &x[..rows * 544];
            let on = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
                pool.install(|| multiplied(is_fast(), &fixture, x))
            };
            let one = on(1);
            assert!([2, 3, 16].into_iter().all(|threads| on(threads) == one), "{rows} rows");
        }
    }
}
