//! What can be made of a solved linear by going over it again, and whether that is better on tokens the solve has not seen.
//!
//! With `D = Ŵ − W` the solve has brought `tr(D (H+λI) Dᵀ)` near to its least, a column at a time and never looking back. A sweep
//! looks at each column again, given all others (coordinate descent), then at each scale, given the codes (least squares).
//! Neither raises that objective. But `H` is of some tokens only, and what fits them better need not fit others: a second
//! Hessian, of tokens that are held out, judges what is kept.

use half::f16;
use tch::{Device, Kind, TchError, Tensor};

use super::{
    Hessian, QuantizedLinear, dead_columns, mean_alive,
    solver::{Solved, Weight},
};
use crate::error::{Result, TorchContext};

/// Columns whose changes go to all other columns by one matrix product.
const BLOCK: i64 = 128;

/// What linears that share their inputs are refined with.
pub struct Refiner<'a> {
    hessian: &'a Hessian,
    held_out: &'a Hessian,
    diagonal: Vec<f32>,
    dead: Vec<u32>,
    lambda: f64,
    sweeps: u32,
}

/// A linear that refinement has made better.
#[derive(Debug)]
pub struct Refined {
    /// Codes and scales; zeros and groups are as they were.
    pub linear: QuantizedLinear,
    /// `tr(D H Dᵀ)` with the undamped `H` that was solved with.
    pub squared_error: f64,
}

impl<'a> Refiner<'a> {
    /// At most `sweeps` of them, over linears that were solved with `hessian`, damped by `damp` of its mean diagonal; `held_out` is of
    /// other tokens.
    ///
    /// # Errors
    /// When libtorch cannot copy.
    pub fn new(hessian: &'a Hessian, held_out: &'a Hessian, damp: f64, sweeps: u32) -> Result<Self> {
        let diagonal = hessian.diagonal()?;
        let dead = dead_columns(&diagonal);
        let lambda = damp * mean_alive(&diagonal, &dead).unwrap_or(0.0);
        Ok(Self { hessian, held_out, diagonal, dead, lambda, sweeps })
    }

    /// Sweeps over a solution of `weight` for as long as the error on the held-out tokens falls; `None` when it never does.
    ///
    /// # Errors
    /// When memory ends or the device fails.
    pub fn refine(&self, weight: &Weight<'_>, linear: &Solved) -> Result<Option<Refined>> {
        let linear = linear.on_host()?;
        let (mut least, mut best) = (0.0, None);
        let mut refine = || -> Result<(), TchError> {
            let mut state = State::new(self, weight, &linear)?;
            least = self.held_out_error(&state)?;
            for _ in 0..self.sweeps {
                state.descend(self)?;
                state.fit_scales(self)?;
                let error = self.held_out_error(&state)?;
                // Not when it is no number, either.
                if error.partial_cmp(&least) != Some(std::cmp::Ordering::Less) {
                    break;
                }
                least = error;
                best = Some((state.codes()?, state.scales.f_to_kind(Kind::Half)?, state.squared_error()?));
            }
            Ok(())
        };
        refine().torch("refine a linear")?;
        let Some((codes, scales, squared_error)) = best else { return Ok(None) };
        let linear = with(&linear, &codes, &scales).torch("take a refined linear")?;
        Ok(Some(Refined { linear, squared_error }))
    }

    fn held_out_error(&self, state: &State) -> Result<f64, TchError> {
        self.held_out.exact_output_energy(&state.differences.f_tr()?)
    }
}

/// A linear on the way. All tensors are fp32, transposed as the codes are.
struct State {
    /// Codes less their zeros, `[K, N]`.
    levels: Tensor,
    /// `[G, N]` as are the following two; each is a number that fp16 has.
    scales: Tensor,
    zeros: Tensor,
    /// The highest level.
    highest: Tensor,
    /// The group of each feature, `[K]`.
    groups: Vec<i64>,
    /// The same, as a tensor.
    of_feature: Tensor,
    /// Features of each group.
    features: Vec<Tensor>,
    /// `Dᵀ` `[K, N]`.
    differences: Tensor,
    /// `H Dᵀ` `[K, N]`, undamped.
    gradients: Tensor,
}

impl State {
    fn new(with: &Refiner<'_>, weight: &Weight<'_>, linear: &QuantizedLinear) -> Result<Self, TchError> {
        let h = with.hessian.matrix();
        let device = h.device();
        let (k, n) = (linear.in_features() as i64, linear.out_features() as i64);
        let bytes = |values: &[u8], rows: i64| {
            let values = Tensor::f_from_data_size(values, &[rows, n], Kind::Uint8)?;
            values.f_to_device(device)?.f_to_kind(Kind::Float)
        };
        let groups: Vec<i64> = linear.g_idx().iter().map(|&group| i64::from(group)).collect();
        let g = linear.groups() as i64;
        let features = (0..g).map(|group| {
            let own: Vec<i64> = (0..k).filter(|&feature| groups[feature as usize] == group).collect();
            Tensor::f_from_slice(&own)?.f_to_device(device)
        });
        let features = features.collect::<Result<Vec<_>, _>>()?;
        let scales: Vec<f32> = linear.scales().iter().map(|scale| scale.to_f32()).collect();
        let scales = Tensor::f_from_slice(&scales)?.f_view([g, n])?.f_to_device(device)?;
        let zeros = bytes(linear.zeros(), g)?;
        let highest = zeros.f_neg()?.f_add_scalar(f64::from(linear.bits().max_code()))?;
        let of_feature = Tensor::f_from_slice(&groups)?.f_to_device(device)?;
        let mut levels = bytes(linear.codes(), k)?;
        let _ = levels.f_sub_(&zeros.f_index_select(0, &of_feature)?)?;
        let differences = scales.f_index_select(0, &of_feature)?.f_mul(&levels)?;
        let weight = weight.values.f_to_device(device)?.f_to_kind(Kind::Float)?;
        let differences = differences.f_sub(&weight.f_tr()?)?;
        let gradients = h.f_mm(&differences)?;
        Ok(Self { levels, scales, zeros, highest, groups, of_feature, features, differences, gradients })
    }

    /// Coordinate descent: each column goes to the nearest point of its grid to where it is best, given all others.
    fn descend(&mut self, with: &Refiner<'_>) -> Result<(), TchError> {
        let h = with.hessian.matrix();
        let (k, n) = (self.groups.len() as i64, self.scales.size()[1]);
        let (by_scale, lowest) = (self.scales.f_reciprocal()?, self.zeros.f_neg()?);
        for start in (0..k).step_by(BLOCK as usize) {
            let width = BLOCK.min(k - start);
            // What the block's columns have changed by, which the gradients are not told of before its end.
            let changes = Tensor::f_zeros([width, n], (Kind::Float, h.device()))?;
            let of_block = h.f_narrow(0, start, width)?;
            for i in 0..width {
                let column = start + i;
                if with.dead.binary_search(&(column as u32)).is_ok() {
                    continue;
                }
                let group = self.groups[column as usize];
                let mut difference = self.differences.f_select(0, column)?;
                let mut level = self.levels.f_select(0, column)?;
                let mut slope =
                    self.gradients.f_select(0, column)?.f_add(&difference.f_mul_scalar(with.lambda)?)?;
                if i > 0 {
                    let row = of_block.f_select(0, i)?.f_narrow(0, start, i)?;
                    slope = slope.f_addmv(&changes.f_narrow(0, 0, i)?.f_tr()?, &row)?;
                }
                let curvature = f64::from(with.diagonal[column as usize]) + with.lambda;
                let step = slope.f_mul(&by_scale.f_select(0, group)?)?.f_div_scalar(curvature)?;
                let bounds = (lowest.f_select(0, group)?, self.highest.f_select(0, group)?);
                let best = level.f_sub(&step)?.f_round()?.f_clamp_tensor(Some(bounds.0), Some(bounds.1))?;
                let change = best.f_sub(&level)?.f_mul(&self.scales.f_select(0, group)?)?;
                let _ = difference.f_add_(&change)?;
                level.f_copy_(&best)?;
                changes.f_select(0, i)?.f_copy_(&change)?;
            }
            let _ = self.gradients.f_addmm_(&of_block.f_tr()?, &changes)?;
        }
        Ok(())
    }

    /// Least squares: each group's scale becomes the fp16 number nearest to the best one, given its codes and all other groups;
    /// where that is no better, or no scale that a grid of this sign can have, it stays.
    fn fit_scales(&mut self, with: &Refiner<'_>) -> Result<(), TchError> {
        let h = with.hessian.matrix();
        for (group, features) in self.features.iter().enumerate() {
            let levels = self.levels.f_index_select(0, features)?;
            let differences = self.differences.f_index_select(0, features)?;
            let slopes = self.gradients.f_index_select(0, features)?;
            let slopes = slopes.f_add(&differences.f_mul_scalar(with.lambda)?)?;
            let sum = |t: Tensor| t.f_sum_dim_intlist(0, false, Kind::Float);
            let slope = sum(slopes.f_mul(&levels)?)?;
            // `[g, K]`; H is symmetric.
            let rows = h.f_index_select(0, features)?;
            let own = rows.f_index_select(1, features)?.f_mm(&levels)?;
            let own = own.f_add(&levels.f_mul_scalar(with.lambda)?)?;
            let curvature = sum(own.f_mul(&levels)?)?;
            let mut scale = self.scales.f_select(0, group as i64)?;
            let best = scale.f_sub(&slope.f_div(&curvature)?)?;
            let best = best.f_to_kind(Kind::Half)?.f_to_kind(Kind::Float)?;
            let change = best.f_sub(&scale)?;
            // What the objective changes by: NaN where all levels are zero, which is no improvement.
            let gain = slope.f_mul_scalar(2.0)?.f_add(&change.f_mul(&curvature)?)?.f_mul(&change)?;
            let usable = best.f_isfinite()?.f_logical_and(&best.f_mul(&scale.f_sign()?)?.f_gt(0.0)?)?;
            let better = gain.f_lt(0.0)?.f_logical_and(&usable)?;
            let change = change.f_where_self(&better, &change.f_zeros_like()?)?;
            let _ = scale.f_add_(&change)?;
            let changes = levels.f_mul(&change)?;
            let _ = self.differences.f_index_add_(0, features, &changes)?;
            let _ = self.gradients.f_addmm_(&rows.f_tr()?, &changes)?;
        }
        Ok(())
    }

    /// `tr(D H Dᵀ)`.
    fn squared_error(&self) -> Result<f64, TchError> {
        let sum = f64::try_from(self.differences.f_mul(&self.gradients)?.f_sum(Kind::Double)?)?;
        Ok(sum.max(0.0))
    }

    /// `[K, N]`, as bytes.
    fn codes(&self) -> Result<Tensor, TchError> {
        self.levels.f_add(&self.zeros.f_index_select(0, &self.of_feature)?)?.f_to_kind(Kind::Uint8)
    }
}

/// The linear with other codes, and scales in fp16.
fn with(linear: &QuantizedLinear, codes: &Tensor, scales: &Tensor) -> Result<QuantizedLinear, TchError> {
    let host = |t: &Tensor| t.f_to_device(Device::Cpu)?.f_contiguous()?.f_flatten(0, -1);
    let codes = Vec::<u8>::try_from(host(codes)?)?;
    let scales = Vec::<f16>::try_from(host(scales)?)?;
    let (zeros, g_idx) = (linear.zeros().to_vec(), linear.g_idx().to_vec());
    Ok(QuantizedLinear::new(linear.bits(), codes, scales, zeros, g_idx))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        accuracy::Refinements,
        gptq::solver::{
            CpuSolver, Solver,
            tests::problem::{Problem, solve, variants, weight},
        },
        variant::Variant,
    };

    const DAMP: f64 = 0.01;
    /// Of sums in fp32 whose terms cancel.
    const ROUNDING: f64 = 1e-3;

    fn solved(problem: &Problem, variant: &Variant) -> Solved {
        let sorting = Refinements::NONE.sorting(variant);
        let factor = CpuSolver::new().factorize(&problem.hessian, sorting, DAMP, "test").unwrap();
        Solved::Host(solve(&*factor, &[&problem.weight], variant).remove(0).linear)
    }

    /// A Hessian whose tokens are large where the problem's are small: what pays there costs here.
    fn unlike(problem: &Problem) -> Hessian {
        let h = problem.hessian.matrix();
        let mut unlike = problem.hessian.shared();
        unlike.set_matrix((h + Tensor::eye(problem.k as i64, (Kind::Float, Device::Cpu)) * 0.1).inverse());
        unlike
    }

    /// One sweep, where another problem's Hessian judges.
    fn judged(problem: &Problem, judge: &Problem, variant: &Variant) -> Option<Refined> {
        let refiner = Refiner::new(&problem.hessian, &judge.hessian, DAMP, 1).unwrap();
        refiner.refine(&weight(&problem.weight), &solved(problem, variant)).unwrap()
    }

    #[test]
    fn each_half_of_each_sweep_lowers_the_objective() {
        let problem = Problem::new(40, 300, 900, 5);
        for variant in variants() {
            let linear = solved(&problem, &variant).into_host().unwrap();
            let refiner = Refiner::new(&problem.hessian, &problem.hessian, DAMP, 3).unwrap();
            let mut state = State::new(&refiner, &weight(&problem.weight), &linear).unwrap();
            let objective = |state: &State| {
                let distance = f64::try_from(state.differences.square().sum(Kind::Double)).unwrap();
                state.squared_error().unwrap() + refiner.lambda * distance
            };
            let first = objective(&state);
            let mut before = first;
            for _ in 0..3 {
                state.descend(&refiner).unwrap();
                let between = objective(&state);
                state.fit_scales(&refiner).unwrap();
                let after = objective(&state);
                assert!(between <= before * (1.0 + 1e-6), "{variant}: {before} {between}");
                assert!(after <= between * (1.0 + 1e-6), "{variant}: {between} {after}");
                before = after;
            }
            assert!(before < 0.999 * first, "{variant}: {first} {before}");
            // What was kept up to date is what codes and scales say.
            let linear = with(&linear, &state.codes().unwrap(), &state.scales.to_kind(Kind::Half)).unwrap();
            let exact = problem.objective(&linear);
            let kept = state.squared_error().unwrap();
            assert!((kept / exact - 1.0).abs() < ROUNDING, "{variant}: {kept} {exact}");
        }
    }

    #[test]
    fn what_is_better_on_held_out_tokens_is_taken() {
        let problem = Problem::new(40, 300, 900, 6);
        for variant in variants() {
            let before = solved(&problem, &variant);
            let refiner = Refiner::new(&problem.hessian, &problem.hessian, DAMP, 2).unwrap();
            let refined = refiner.refine(&weight(&problem.weight), &before).unwrap();
            let refined = refined.unwrap_or_else(|| panic!("{variant} is not refined"));
            let (before, after) = (before.into_host().unwrap(), refined.linear);
            assert!(after.codes().iter().all(|&code| code <= variant.bits.max_code()), "{variant}");
            assert!(after.scales().iter().all(|s| s.is_finite() && s.to_f32() != 0.0), "{variant}");
            assert_eq!((after.zeros(), after.g_idx()), (before.zeros(), before.g_idx()), "{variant}");
            assert!(after.codes() != before.codes() && after.scales() != before.scales(), "{variant}");
            let exact = problem.objective(&after);
            assert!(exact < problem.objective(&before), "{variant}");
            assert!((refined.squared_error / exact - 1.0).abs() < ROUNDING, "{variant}");
        }
    }

    #[test]
    fn what_is_worse_on_held_out_tokens_is_not() {
        let problem = Problem::new(40, 300, 900, 7);
        let (weights, held_out) = (problem.weight.shallow_clone(), unlike(&problem));
        let other = Problem { n: 40, k: 300, weight: weights, hessian: held_out };
        let mut kept = Vec::new();
        for variant in ["4bit-128g", "4bit-32g-act", "3bit-32g-act"] {
            let variant: Variant = variant.parse().unwrap();
            // Better on the problem's own tokens; on the others, as it may be.
            let candidate = judged(&problem, &problem, &variant).unwrap().linear;
            let before = solved(&problem, &variant).into_host().unwrap();
            let better = other.objective(&candidate) < other.objective(&before);
            assert_eq!(judged(&problem, &other, &variant).is_some(), better, "{variant}");
            kept.push(better);
        }
        assert!(kept.contains(&false), "some are worse: {kept:?}");
    }

    #[test]
    fn features_that_carried_nothing_stay_zero() {
        let options = (Kind::Float, Device::Cpu);
        tch::manual_seed(8);
        let inputs = Tensor::randn([500, 64], options);
        let _ = inputs.narrow(1, 10, 3).zero_();
        let problem = Problem::with_inputs(8, 64, &inputs);
        let before = solved(&problem, &"4bit-32g".parse().unwrap());
        let refiner = Refiner::new(&problem.hessian, &problem.hessian, DAMP, 2).unwrap();
        let after = refiner.refine(&weight(&problem.weight), &before).unwrap().unwrap().linear;
        let dense = after.dequantize(|w| w);
        assert!(dense[10 * 8..13 * 8].iter().all(|&w| w == 0.0));
        assert!(dense[13 * 8..].iter().any(|&w| w != 0.0));
    }
}
