//! The order in which input features are quantized, and the group of each.

use std::cmp::Ordering;

use crate::variant::{Order, Sorting, Variant};

/// The order for one Hessian: `columns[i]` is the `i`-th input feature to be quantized.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColumnOrder {
    columns: Vec<u32>,
}

impl ColumnOrder {
    /// The order that follows from the undamped Hessian diagonal `[K]`. Sorting is stable, so that the order does not depend
    /// on the algorithm.
    pub fn new(sorting: Sorting, diagonal: &[f32]) -> Self {
        let descending = |a: &u32, b: &u32| diagonal[*b as usize].total_cmp(&diagonal[*a as usize]);
        let mut columns: Vec<u32> = (0..diagonal.len() as u32).collect();
        match sorting {
            Sorting::Stored => {}
            Sorting::Descending => columns.sort_by(descending),
            Sorting::Grouped(size) => columns = group_aware(columns, size, descending),
        }
        Self { columns }
    }

    /// `[K]`, a permutation of the input features.
    pub fn columns(&self) -> &[u32] {
        &self.columns
    }

    /// The group of the `i`-th column to be quantized.
    pub fn group_at(&self, i: usize, variant: &Variant) -> usize {
        let size = variant.group_size.features(self.columns.len());
        match variant.order {
            Order::Act => i / size,
            // Groups of neighbouring features, independent of the order.
            Order::Sequential | Order::ActStatic => self.columns[i] as usize / size,
        }
    }

    /// `g_idx`: the group of every input feature, in the features' own order.
    pub fn g_idx(&self, variant: &Variant) -> Vec<u32> {
        let mut g_idx = vec![0; self.columns.len()];
        for (i, &column) in self.columns.iter().enumerate() {
            g_idx[column as usize] = self.group_at(i, variant) as u32;
        }
        g_idx
    }
}

/// Sorts ascending `columns` within each group of `size` neighbours, then sorts the whole groups by their first columns.
fn group_aware(mut columns: Vec<u32>, size: usize, order: impl Fn(&u32, &u32) -> Ordering) -> Vec<u32> {
    columns.chunks_mut(size).for_each(|group| group.sort_by(&order));
    let mut groups: Vec<&[u32]> = columns.chunks(size).collect();
    // A group must begin at a multiple of the size.
    let whole = columns.len() / size;
    groups[..whole].sort_by(|a, b| order(&a[0], &b[0]));
    groups.concat()
}

/// The input features that are zero in all calibration tokens.
pub fn dead_columns(diagonal: &[f32]) -> Vec<u32> {
    (0..diagonal.len() as u32).filter(|&k| diagonal[k as usize] == 0.0).collect()
}

/// The mean of a diagonal over the features that are not dead; `None` if all are dead.
pub fn mean_alive(diagonal: &[f32], dead: &[u32]) -> Option<f64> {
    let alive = diagonal.len() - dead.len();
    (alive > 0).then(|| diagonal.iter().map(|&d| f64::from(d)).sum::<f64>() / alive as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A variant with a group size smaller than the format's smallest, to keep the test readable.
    fn variant(text: &str, group: usize) -> Variant {
        Variant { group_size: crate::variant::GroupSize::Features(group), ..text.parse().unwrap() }
    }

    const DIAGONAL: [f32; 6] = [1.0, 5.0, 0.0, 5.0, 2.0, 0.5];

    #[test]
    fn act_order_is_descending_and_stable() {
        let order = ColumnOrder::new(Sorting::Descending, &DIAGONAL);
        assert_eq!(order.columns(), [1, 3, 4, 0, 5, 2]);
        assert_eq!(order.g_idx(&variant("4bit-16g-act", 4)), [0, 0, 1, 0, 0, 1]);
        assert_eq!(order.g_idx(&"4bit--1g-act".parse().unwrap()), [0; 6]);
    }

    #[test]
    fn static_groups_keep_g_idx_sequential() {
        let order = ColumnOrder::new(Sorting::Descending, &DIAGONAL);
        assert_eq!(order.columns(), [1, 3, 4, 0, 5, 2]);
        assert_eq!(order.g_idx(&variant("4bit-16g-static", 4)), [0, 0, 0, 0, 1, 1]);
    }

    #[test]
    fn group_aware_order_keeps_groups_together_and_g_idx_sequential() {
        let diagonal = [1.0, 2.0, 3.0, 5.0, 0.0, 5.0, 9.0];
        let of = |size| ColumnOrder::new(Sorting::Grouped(size), &diagonal);
        // The largest feature is in the group that is not whole.
        assert_eq!(of(2).columns(), [3, 2, 5, 4, 1, 0, 6]);
        assert_eq!(of(3).columns(), [3, 5, 4, 2, 1, 0, 6]);
        let variant = variant("4bit-16g", 2);
        assert_eq!(of(2).g_idx(&variant), [0, 0, 1, 1, 2, 2, 3]);
        assert_eq!(of(2).group_at(0, &variant), 1);
    }

    #[test]
    fn dead_columns_have_a_zero_diagonal() {
        assert_eq!(dead_columns(&DIAGONAL), [2]);
        assert_eq!(mean_alive(&[3.0, 0.0, 5.0], &[1]), Some(4.0));
        assert_eq!(mean_alive(&[0.0], &[0]), None);
    }
}
