//! Packed linears on the CPU, ready to be multiplied. Act order spreads the input features of a group over K. Sorted by group once, such
//! a linear is multiplied as one without act order, in fixed point.

use rayon::prelude::*;

use super::{fixed_point, matmul::matmul};
use crate::pack::PackedView;

/// A packed linear that is ready to be multiplied.
#[derive(Debug)]
pub struct CpuMatmul<'a> {
    given: PackedView<'a>,
    /// Where that is multiplied faster.
    sorted: Option<Sorted>,
}

/// The codes of a linear with act order, by group.
#[derive(Debug)]
struct Sorted {
    /// The input feature at each place, `[K]`.
    features: Vec<u32>,
    /// The group at each place, `[K]`.
    g_idx: Vec<i32>,
    /// `[K·b/32, N]`
    qweight: Vec<i32>,
}

impl<'a> CpuMatmul<'a> {
    /// With act order this copies the codes if the processor has dot products of bytes.
    pub fn new(w: PackedView<'a>) -> Self {
        let sorted = if fixed_point::is_fast() { sort(&w) } else { None };
        Self { given: w, sorted }
    }

    /// Multiplies: y `[M, N]` = x `[M, K]` · Wᵀ, all f32 and row-major, with `M = rows`.
    ///
    /// # Panics
    /// If the lengths of `x` or `y` are not those of the shapes.
    pub fn forward(&self, x: &[f32], rows: usize, y: &mut [f32]) {
        let Some(sorted) = &self.sorted else { return matmul(x, rows, &self.given, y) };
        let k = self.given.in_features();
        assert_eq!(x.len(), rows * k, "x must be [M, K]");
        let mut by_group = vec![0.0; x.len()];
        by_group.par_chunks_exact_mut(k).zip(x.par_chunks_exact(k)).for_each(|(to, from)| {
            to.iter_mut().zip(&sorted.features).for_each(|(to, &feature)| *to = from[feature as usize]);
        });
        matmul(&by_group, rows, &sorted.view(&self.given), y);
    }

    /// `K`.
    pub fn in_features(&self) -> usize {
        self.given.in_features()
    }

    /// `N`.
    pub fn out_features(&self) -> usize {
        self.given.out_features()
    }
}

impl Sorted {
    fn view<'v>(&'v self, w: &PackedView<'v>) -> PackedView<'v> {
        with_places(w, &self.qweight, &self.g_idx)
    }
}

/// A view with other codes and groups along K.
fn with_places<'v>(w: &PackedView<'v>, qweight: &'v [i32], g_idx: &'v [i32]) -> PackedView<'v> {
    PackedView::new(w.bits(), w.out_features(), qweight, w.qzeros(), w.scales(), g_idx, w.format())
        .expect("the shapes of a view")
}

/// A linear by group, if fixed point takes it so and not as it is.
fn sort(w: &PackedView<'_>) -> Option<Sorted> {
    let mut features: Vec<u32> = (0..w.in_features() as u32).collect();
    features.sort_by_key(|&feature| w.g_idx()[feature as usize]);
    let g_idx: Vec<i32> = features.iter().map(|&feature| w.g_idx()[feature as usize]).collect();
    let takes = |g_idx| fixed_point::segments(&with_places(w, w.qweight(), g_idx)).is_some();
    if takes(w.g_idx()) || !takes(&g_idx) {
        return None;
    }
    let (bits, n) = (w.bits().get() as usize, w.out_features());
    let codes = 32 / bits;
    let mut qweight = vec![0; w.qweight().len()];
    qweight.par_chunks_exact_mut(n).zip(features.par_chunks_exact(codes)).for_each(|(words, features)| {
        for (place, &feature) in features.iter().enumerate() {
            let (unit, shift) = (feature as usize / codes, feature as usize % codes * bits);
            for (word, from) in words.iter_mut().zip(&w.qweight()[unit * n..][..n]) {
                *word |= (from >> shift & ((1 << bits) - 1)) << (place * bits);
            }
        }
    });
    Some(Sorted { features, g_idx, qweight })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::{
        dequantize_into,
        fixture::{Fixture, Order, Random, Spec},
    };

    fn fixture(bits: usize, order: Order, group_size: usize) -> Fixture {
        let spec = Spec { bits, in_features: 256, out_features: 96, group_size, order, zero_offset: 1 };
        Fixture::random(spec, &mut Random(47))
    }

    fn dequantized(w: &PackedView<'_>) -> Vec<f32> {
        let mut dense = vec![0.0; w.in_features() * w.out_features()];
        dequantize_into(w, &mut dense);
        dense
    }

    #[test]
    fn sorting_moves_whole_rows_of_weights() {
        for bits in [2, 4, 8] {
            let fixture = fixture(bits, Order::Act, 64);
            let view = fixture.view();
            let sorted = sort(&view).expect("groups of whole words");
            let (before, after) = (dequantized(&view), dequantized(&sorted.view(&view)));
            assert!(sorted.g_idx.is_sorted());
            for (row, &feature) in after.chunks_exact(96).zip(&sorted.features) {
                assert_eq!(row, &before[feature as usize * 96..][..96], "{bits} bits, feature {feature}");
            }
        }
    }

    #[test]
    fn multiplies_act_order_as_f64_does() {
        let mut random = Random(53);
        for bits in [2, 3, 4, 8] {
            let fixture = fixture(bits, Order::Act, 64);
            let w = CpuMatmul::new(fixture.view());
            assert_eq!(w.sorted.is_some(), bits != 3 && fixed_point::is_fast());
            let x = random.vector(9 * 256);
            let expected = fixture.multiply(&x);
            for rows in [0, 1, 9] {
                let mut y = vec![f32::NAN; rows * 96];
                w.forward(&x[..rows * 256], rows, &mut y);
                for (y, (exact, magnitude)) in y.iter().zip(&expected) {
                    let off = (f64::from(*y) - exact).abs();
                    assert!(off <= magnitude * 2e-6, "{bits} bits, {rows} rows: off by {off:e}");
                }
            }
        }
    }

    #[test]
    fn what_gains_nothing_is_not_copied() {
        let sequential = fixture(4, Order::Sequential, 64);
        assert!(sort(&sequential.view()).is_none());
        let three_bits = fixture(3, Order::Act, 64);
        assert!(sort(&three_bits.view()).is_none());
        let partial_words = fixture(4, Order::Act, 20);
        assert!(sort(&partial_words.view()).is_none());
    }
}
