//! The definition of the solver in plain f64, one column after another, without blocks or libtorch. It is slow; the solvers
//! must agree with it. The integration tests compile this file too: what it needs of the crate is imported by its parent.

use super::{
    AccuracyOptions, ColumnOrder, Grid, Order, QuantizedLinear, Scales, Step, Variant, dead_columns,
};

/// A linear solved by [`solve`], and its error.
#[derive(Debug)]
pub(crate) struct ReferenceSolution {
    /// Codes, scales, zeros, groups.
    pub(crate) linear: QuantizedLinear,
    /// `tr(D H Dᵀ)`, undamped.
    pub(crate) squared_error: f64,
}

/// Quantizes `weight` `[N, K]` for `hessian` `[K, K]`, both row-major; `damp` is a fraction of the mean diagonal.
/// `None` when the damped Hessian is not positive definite. With `or_round`, rows are rounded to nearest whose error
/// compensation makes larger, because the grid clips compensated weights.
pub(crate) fn solve(
    weight: &[f64],
    hessian: &[f64],
    k: usize,
    damp: f64,
    variant: &Variant,
    accuracy: &AccuracyOptions,
    or_round: bool,
) -> Option<ReferenceSolution> {
    let n = weight.len() / k;
    let diagonal: Vec<f32> = (0..k).map(|i| hessian[i * k + i] as f32).collect();
    let dead = dead_columns(&diagonal);
    let order = ColumnOrder::new(accuracy.sorting(variant), &diagonal);
    let columns = order.columns();

    let u = damped_factor(hessian, columns, damp)?;

    let grid = Grid::new(variant.bits, variant.symmetric);
    let g_idx = order.g_idx(variant);
    let groups = variant.group_size.groups(k);
    let group_features = variant.group_size.features(k);
    let mut codes = vec![0u8; k * n];
    let mut steps = vec![Step::default(); groups * n];
    let mut squared_error = 0.0;

    for row in 0..n {
        let mut w: Vec<f64> = columns.iter().map(|&c| weight[row * k + c as usize]).collect();
        for (i, c) in columns.iter().enumerate() {
            if dead.binary_search(c).is_ok() {
                w[i] = 0.0;
            }
        }
        let mut d = vec![0.0; k];
        let pivots: Vec<f64> = (0..k).map(|i| u[i * k + i]).collect();
        if variant.order == Order::ActStatic {
            for group in 0..groups {
                let of_group: Vec<usize> = (0..k).filter(|&i| order.group_at(i, variant) == group).collect();
                let of = |values: &[f64]| of_group.iter().map(|&i| values[i]).collect::<Vec<_>>();
                let (weights, pivots) = (of(&w), of(&pivots));
                let group_of = Group { weights: &weights, pivots: &pivots, block: None };
                steps[group * n + row] = best_step(grid, accuracy.scales, &group_of);
            }
        }
        for i in 0..k {
            let group = order.group_at(i, variant);
            if variant.order != Order::ActStatic && i % group_features == 0 {
                let end = (i + group_features).min(k);
                let weights = compensated(&w, &d, &u, k, i, end);
                let block: Vec<f64> =
                    (i..end).flat_map(|j| u[j * k + i..j * k + end].iter().copied()).collect();
                let block = (!variant.scales_known_beforehand()).then_some(&block[..]);
                let group_of = Group { weights: &weights, pivots: &pivots[i..end], block };
                steps[group * n + row] = best_step(grid, accuracy.scales, &group_of);
            }
            let step = steps[group * n + row];
            let residual: f64 = (0..i).map(|j| u[j * k + i] * d[j]).sum();
            let code = grid.code(w[i] - residual / u[i * k + i], step);
            codes[columns[i] as usize * n + row] = code;
            d[i] = step.weight(code) - w[i];
        }
        let by_feature = |d: &[f64]| {
            let mut by_feature = vec![0.0; k];
            columns.iter().zip(d).for_each(|(&column, &d)| by_feature[column as usize] = d);
            by_feature
        };
        let compensated = row_error(&by_feature(&d), hessian);
        if !or_round {
            squared_error += compensated;
            continue;
        }
        let weights = &weight[row * k..][..k];
        let (plain, plain_codes, d) = rounded(grid, weights, &dead, &g_idx, groups);
        let plain_error = row_error(&d, hessian);
        if plain_error < compensated {
            plain.into_iter().enumerate().for_each(|(group, step)| steps[group * n + row] = step);
            plain_codes.into_iter().enumerate().for_each(|(column, code)| codes[column * n + row] = code);
        }
        squared_error += compensated.min(plain_error);
    }
    let scales = steps.iter().map(|s| s.scale).collect();
    let zeros = steps.iter().map(|s| s.zero).collect();
    let linear = QuantizedLinear::new(variant.bits, codes, scales, zeros, g_idx);
    Some(ReferenceSolution { linear, squared_error })
}

/// `d H dᵀ`.
pub(super) fn row_error(d: &[f64], hessian: &[f64]) -> f64 {
    let products = hessian.chunks(d.len()).map(|h| h.iter().zip(d).map(|(h, d)| h * d).sum::<f64>());
    products.zip(d).map(|(product, d)| product * d).sum()
}

/// A row rounded to nearest: its steps, codes and differences, by feature. Dead features are zero.
fn rounded(
    grid: Grid,
    weights: &[f64],
    dead: &[u32],
    g_idx: &[u32],
    groups: usize,
) -> (Vec<Step>, Vec<u8>, Vec<f64>) {
    let of_group = |group| weights.iter().zip(g_idx).filter(move |(_, g)| **g == group).map(|(&w, _)| w);
    let steps: Vec<Step> = (0..groups as u32).map(|group| fit(grid, of_group(group))).collect();
    let value = |k: usize| if dead.binary_search(&(k as u32)).is_ok() { 0.0 } else { weights[k] };
    let step = |k: usize| steps[g_idx[k] as usize];
    let codes: Vec<u8> = (0..weights.len()).map(|k| grid.code(value(k), step(k))).collect();
    let d = codes.iter().enumerate().map(|(k, &code)| step(k).weight(code) - value(k)).collect();
    (steps, codes, d)
}

fn fit(grid: Grid, weights: impl Iterator<Item = f64>) -> Step {
    let (min, max) = weights.fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), w| (lo.min(w), hi.max(w)));
    grid.fit(min, max)
}

/// The weights of columns `start..end` as compensated for all columns before `start`:
/// `w_g − (Ũ_ggᵀ)⁻¹ r_g` with `r_g = Σ_{j<start} Ũ_jg d_j`.
pub(super) fn compensated(w: &[f64], d: &[f64], u: &[f64], k: usize, start: usize, end: usize) -> Vec<f64> {
    let mut x: Vec<f64> = Vec::with_capacity(end - start);
    for c in start..end {
        let before: f64 = (0..start).map(|j| u[j * k + c] * d[j]).sum();
        let inside: f64 = x.iter().enumerate().map(|(j, x)| u[(start + j) * k + c] * x).sum();
        x.push((before - inside) / u[c * k + c]);
    }
    x.iter().zip(&w[start..end]).map(|(x, w)| w - x).collect()
}

/// `Ũ` `[K, K]` of a Hessian `[K, K]` in the order of `columns`, with `damp` of the mean diagonal added. A diagonal element that is
/// zero becomes the mean before. `None` if the sum is not positive definite.
pub(super) fn damped_factor(hessian: &[f64], columns: &[u32], damp: f64) -> Option<Vec<f64>> {
    let k = columns.len();
    let mut h = vec![0.0; k * k];
    let alive: Vec<f64> = (0..k).map(|i| hessian[i * k + i]).filter(|&d| d != 0.0).collect();
    let mean = alive.iter().sum::<f64>() / alive.len() as f64;
    for (i, &a) in columns.iter().enumerate() {
        for (j, &b) in columns.iter().enumerate() {
            h[i * k + j] = hessian[a as usize * k + b as usize];
        }
        if h[i * k + i] == 0.0 {
            h[i * k + i] = mean;
        }
        h[i * k + i] += damp * mean;
    }
    upper_factor(&h, k)
}

/// The upper triangular `Ũ` `[K, K]` with `H = Ũ Ũᵀ`; `None` when `H` is not positive definite.
fn upper_factor(h: &[f64], k: usize) -> Option<Vec<f64>> {
    let mut u = vec![0.0; k * k];
    for j in (0..k).rev() {
        let pivot = h[j * k + j] - (j + 1..k).map(|m| u[j * k + m] * u[j * k + m]).sum::<f64>();
        if pivot.is_nan() || pivot <= 0.0 {
            return None;
        }
        u[j * k + j] = pivot.sqrt();
        for i in 0..j {
            let sum: f64 = (j + 1..k).map(|m| u[i * k + m] * u[j * k + m]).sum();
            u[i * k + j] = (h[i * k + j] - sum) / u[j * k + j];
        }
    }
    Some(u)
}

/// A group whose scale is searched for.
struct Group<'a> {
    /// `[g]`, as compensated for every column before the group.
    weights: &'a [f64],
    /// `[g]`: `Ũ_ii` of the group's columns.
    pivots: &'a [f64],
    /// `[g, g]`: `Ũ_gg`, upper triangular; none if the group's columns are not solved one after another.
    block: Option<&'a [f64]>,
}

/// The best step for a group.
fn best_step(grid: Grid, scales: Scales, group: &Group<'_>) -> Step {
    let (min, max) =
        group.weights.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), &w| (lo.min(w), hi.max(w)));
    let steps = grid.factors(scales).into_iter().map(|f| grid.fit_scaled(min, max, f));
    let mut tried: Vec<(f64, Step)> = steps.map(|step| (by_diagonal(grid, group, step), step)).collect();
    if tried.len() > 1 {
        // Stable: the first of equals stays the first.
        tried.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    if let (Some(block), finalists @ 1..) = (group.block, scales.finalists()) {
        tried.truncate(finalists);
        tried.iter_mut().for_each(|(cost, step)| *cost = by_block(grid, group, block, *step));
        tried.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    tried[0].1
}

/// `Σ Ũ_ii² (q_i − w_i)²`.
fn by_diagonal(grid: Grid, group: &Group<'_>, step: Step) -> f64 {
    let cost = |(&w, &pivot): (&f64, &f64)| ((step.weight(grid.code(w, step)) - w) * pivot).powi(2);
    group.weights.iter().zip(group.pivots).map(cost).sum()
}

/// `‖(q − w) Ũ_gg‖²` with the codes that the column loop chooses.
fn by_block(grid: Grid, group: &Group<'_>, block: &[f64], step: Step) -> f64 {
    let g = group.weights.len();
    let mut differences: Vec<f64> = Vec::with_capacity(g);
    let mut cost = 0.0;
    for (i, &w) in group.weights.iter().enumerate() {
        let residual: f64 = differences.iter().enumerate().map(|(j, d)| block[j * g + i] * d).sum();
        let target = w - residual / group.pivots[i];
        let quantized = step.weight(grid.code(target, step));
        cost += ((quantized - target) * group.pivots[i]).powi(2);
        differences.push(quantized - w);
    }
    cost
}
