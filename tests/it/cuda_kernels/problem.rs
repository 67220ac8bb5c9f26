//! Weights and a Hessian, and the f64 definition of what a solver has to find for them.

use gptq::{
    accuracy::{AccuracyOptions, Scales},
    gptq::{ColumnOrder, Grid, QuantizedLinear, Step},
    variant::{Order, Variant},
};
use half::f16;

use super::{Random, reference};

/// Damping, of the mean diagonal.
pub(crate) const DAMP: f64 = 0.01;

/// How far fp32 sums may move a target, in steps of the grid at 4 bits; at 8 bits targets have 16 times as many steps.
const CODE_SLACK: f64 = 2e-3;
/// How far they may move a range of weights, relatively.
const SCALE_SLACK: f64 = 3e-5;
/// How far the sums of a row, which add up in fp32 within a step of 32 columns, may be off, relatively.
const SUM_SLACK: f64 = 1e-3;

/// Weights `[N, K]` and a Hessian `[K, K]`, all of them fp32 numbers.
pub(crate) struct Problem {
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) weight: Vec<f64>,
    pub(crate) hessian: Vec<f64>,
}

/// What a solver found, in the order of [`QuantizedLinear`], with its sums.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Solved {
    pub(crate) linear: QuantizedLinear,
    /// `[N]`, Σ ((ŵ − t) Ũ_ii)² and Σ d².
    pub(crate) objective: Vec<f64>,
    pub(crate) distance: Vec<f64>,
}

impl Problem {
    /// Inputs of different size, each correlated with its neighbours; one feature is dead.
    pub(crate) fn new(n: usize, k: usize, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let sizes: Vec<f64> = (0..k).map(|_| (0.6 * random.normal()).exp()).collect();
        let dead = random.below(k);
        let mut hessian = vec![0.0; k * k];
        for _ in 0..k + 40 {
            let mut last = 0.0;
            let input: Vec<f64> = (0..k)
                .map(|i| {
                    last = 0.7 * last + random.normal();
                    if i == dead { 0.0 } else { last * sizes[i] }
                })
                .collect();
            for (i, x) in input.iter().enumerate() {
                hessian[i * k..(i + 1) * k].iter_mut().zip(&input).for_each(|(h, y)| *h += x * y);
            }
        }
        hessian.iter_mut().for_each(|h| *h = f64::from(*h as f32));
        let weight = (0..n * k).map(|_| f64::from((0.02 * random.normal()) as f32)).collect();
        Self { n, k, weight, hessian }
    }

    pub(crate) fn diagonal(&self) -> Vec<f32> {
        (0..self.k).map(|i| self.hessian[i * self.k + i] as f32).collect()
    }

    pub(crate) fn order(&self, variant: &Variant) -> ColumnOrder {
        ColumnOrder::new(variant.sorting(false), &self.diagonal())
    }

    /// The mean diagonal of features that are not dead.
    pub(crate) fn mean(&self) -> f64 {
        let alive: Vec<f64> = self.diagonal().into_iter().map(f64::from).filter(|&d| d != 0.0).collect();
        alive.iter().sum::<f64>() / alive.len() as f64
    }

    /// Ũ `[K, K]` with H + λI = Ũ Ũᵀ in quantization order, rounded to fp32; zeros below the diagonal.
    pub(crate) fn factor(&self, columns: &[u32]) -> Vec<f64> {
        let (k, mean) = (self.k, self.mean());
        let mut u = vec![0.0f64; k * k];
        for j in (0..k).rev() {
            for i in (0..=j).rev() {
                let mut sum = self.hessian[columns[i] as usize * k + columns[j] as usize];
                if i == j {
                    sum = if sum == 0.0 { mean } else { sum } + DAMP * mean;
                }
                sum -= (j + 1..k).map(|m| u[i * k + m] * u[j * k + m]).sum::<f64>();
                u[i * k + j] = if i == j { sum.sqrt() } else { sum / u[j * k + j] };
            }
        }
        u.iter().map(|&u| f64::from(u as f32)).collect()
    }

    /// Weights `[K, N]` in quantization order, of dead features zero.
    pub(crate) fn stack(&self, columns: &[u32]) -> Vec<f32> {
        let diagonal = self.diagonal();
        let of = |column: u32| {
            let alive = diagonal[column as usize] != 0.0;
            (0..self.n).map(move |row| match alive {
                true => self.weight[row * self.k + column as usize] as f32,
                false => 0.0,
            })
        };
        columns.iter().flat_map(|&column| of(column)).collect()
    }

    /// Follows a solution column by column in f64: every scale is the one of the compensated weights, and every code the one
    /// nearest to its target, as far as fp32 can say; the sums are those of these codes.
    #[track_caller]
    pub(crate) fn check(&self, variant: &Variant, solved: &Solved) {
        let (n, k, order) = (self.n, self.k, self.order(variant));
        let (columns, linear) = (order.columns(), &solved.linear);
        assert_eq!(linear.g_idx(), order.g_idx(variant));
        let (u, w) = (self.factor(columns), self.stack(columns));
        let levels = f64::from(variant.bits.max_code());
        let slack = CODE_SLACK * (levels / 15.0).max(1.0);
        let size = variant.group_size.features(k);
        for row in 0..n {
            let w = |i: usize| f64::from(w[i * n + row]);
            // Σ_{j<i} Ũ_ji d_j, kept up to date.
            let mut residual = vec![0.0f64; k];
            let (mut objective, mut distance) = (0.0, 0.0);
            for i in 0..k {
                let at = order.group_at(i, variant) * n + row;
                let step = Step { scale: linear.scales()[at], zero: linear.zeros()[at] };
                let fitted = match variant.order {
                    Order::ActStatic => {
                        let first = columns[i] as usize;
                        first.is_multiple_of(size).then(|| self.range(first, row, size))
                    }
                    _ => i.is_multiple_of(size).then(|| {
                        let end = (i + size).min(k);
                        let mut x: Vec<f64> = Vec::with_capacity(size);
                        for c in i..end {
                            let inside: f64 = x.iter().enumerate().map(|(j, x)| u[(i + j) * k + c] * x).sum();
                            x.push((residual[c] - inside) / u[c * k + c]);
                        }
                        range(x.iter().zip(i..end).map(|(x, c)| w(c) - x))
                    }),
                };
                if let Some((low, high)) = fitted {
                    check_step(variant, low, high, step);
                }
                let target = w(i) - residual[i] / u[i * k + i];
                let code = linear.codes()[columns[i] as usize * n + row];
                let place = target / f64::from(step.scale) + f64::from(step.zero);
                let off = (place.clamp(0.0, levels) - f64::from(code)).abs();
                assert!(off <= 0.5 + slack, "{variant} column {i} row {row}: code {code} is {off} steps off");
                let difference = step.weight(code) - w(i);
                objective += ((step.weight(code) - target) * u[i * k + i]).powi(2);
                distance += difference * difference;
                (i + 1..k).for_each(|c| residual[c] += u[i * k + c] * difference);
            }
            let near = |a: f64, b: f64| (a - b).abs() <= SUM_SLACK * b;
            assert!(near(solved.objective[row], objective), "{variant} row {row}: {objective} {solved:?}");
            assert!(near(solved.distance[row], distance), "{variant} row {row}: {distance} {solved:?}");
        }
    }

    /// The range of a row's original weights in the group of features that starts with `first`.
    fn range(&self, first: usize, row: usize, size: usize) -> (f64, f64) {
        let diagonal = self.diagonal();
        let weight = |feature: usize| match diagonal[feature] {
            0.0 => 0.0,
            _ => self.weight[row * self.k + feature],
        };
        range((first..(first + size).min(self.k)).map(weight))
    }

    /// Requires that nearly all rows have the very codes of the definition: the others part from it at a tie.
    #[track_caller]
    pub(crate) fn check_against_definition(&self, variant: &Variant, solved: &Solved) {
        self.check_scales_against_definition(variant, solved, Scales::PLAIN);
    }

    /// The same with scales that are searched for. fp32 sums may choose another of two scales that cost next to the same, so that
    /// fewer rows have to agree; the error of all rows together must not be larger.
    #[track_caller]
    pub(crate) fn check_scales_against_definition(&self, variant: &Variant, solved: &Solved, scales: Scales) {
        let n = self.n;
        let accuracy = AccuracyOptions { scales, ..AccuracyOptions::NONE };
        let definition =
            reference::solve(&self.weight, &self.hessian, self.k, DAMP, variant, &accuracy, false).unwrap();
        let (ours, theirs) = (&solved.linear, &definition.linear);
        let same_row = |row: &usize| {
            let same = |a: &[u8], b: &[u8]| a.iter().zip(b).skip(*row).step_by(n).all(|(a, b)| a == b);
            let scales = |l: &QuantizedLinear| -> Vec<f16> {
                l.scales().iter().copied().skip(*row).step_by(n).collect()
            };
            same(ours.codes(), theirs.codes())
                && same(ours.zeros(), theirs.zeros())
                && scales(ours) == scales(theirs)
        };
        let same = (0..n).filter(same_row).count();
        // Of 8 bits every row has many targets near a tie.
        let least = match (variant.bits.get(), scales == Scales::PLAIN) {
            (8, true) => 0.3,
            (8, false) => 0.1,
            (_, true) => 0.8,
            (_, false) => 0.6,
        };
        let lambda = DAMP * self.mean();
        let ours_sum: f64 = (0..n).map(|row| solved.objective[row] - lambda * solved.distance[row]).sum();
        let ratio = ours_sum / definition.squared_error;
        assert!((ratio - 1.0).abs() < 5e-3, "{variant}: {ratio} of the definition's error");
        assert!(same as f64 >= least * n as f64, "{variant}: {same} of {n} rows as the definition has them");
    }
}

fn range(weights: impl Iterator<Item = f64>) -> (f64, f64) {
    weights.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), w| (low.min(w), high.max(w)))
}

/// Requires that a step is the one of this range, or of one that fp32 cannot tell from it.
#[track_caller]
fn check_step(variant: &Variant, low: f64, high: f64, step: Step) {
    let grid = Grid::new(variant.bits, variant.symmetric);
    let wider = |factor: f64| {
        let room = (high.max(0.0) - low.min(0.0)) * factor * SCALE_SLACK;
        [grid.fit(low - room, high), grid.fit(low, high + room), grid.fit(low - room, high + room)]
    };
    let possible = [wider(0.0), wider(1.0), wider(-1.0)].concat();
    let scales = possible.iter().map(|s| s.scale.to_bits());
    let (smallest, largest) = (scales.clone().min().unwrap(), scales.max().unwrap());
    let found = step.scale.to_bits();
    assert!((smallest..=largest).contains(&found), "{variant}: {step:?} for {low}..{high}");
    assert!(possible.iter().any(|s| s.zero == step.zero), "{variant}: {step:?} for {low}..{high}");
}
