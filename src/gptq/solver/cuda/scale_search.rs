//! The search for a group's scales in libtorch's operations, for all rows at once: of groups that are wider than a panel, which the
//! kernels do not search. `solver/tests/reference.rs` has the definition.

use tch::{Kind, TchError, Tensor};

use crate::{accuracy::Scales, gptq::Grid};

/// A group whose scales are searched for, for all rows together.
pub(in crate::gptq) struct Group<'a> {
    /// `[g, N]` fp32, as compensated for every column before the group.
    pub(in crate::gptq) weights: &'a Tensor,
    /// `[g]` fp32: `Ũ_ii` of the group's columns.
    pub(in crate::gptq) pivots: &'a Tensor,
    /// `[g, g]` fp32: `Ũ_gg`, upper triangular; none if the group's columns are not solved one after another.
    pub(in crate::gptq) block: Option<&'a Tensor>,
}

/// Scales, rounded to fp16, and zero points: fp32, `[N]`, or `[F, N]` of several.
pub(in crate::gptq) struct Steps {
    pub(in crate::gptq) scales: Tensor,
    pub(in crate::gptq) zeros: Tensor,
}

/// The best step of each row.
pub(in crate::gptq) fn best_steps(grid: Grid, scales: Scales, group: &Group<'_>) -> Result<Steps, TchError> {
    let (min, max) = (group.weights.f_amin([0], false)?, group.weights.f_amax([0], false)?);
    let (mut costs, mut all_scales, mut all_zeros) = (Vec::new(), Vec::new(), Vec::new());
    let weighted = group.pivots.f_unsqueeze(1)?;
    for factor in grid.factors(scales) {
        let Steps { scales, zeros } = scaled_steps(grid, &min, &max, factor)?;
        let quantized = grid_point(grid, group.weights, &scales, &zeros)?;
        let cost = quantized.f_sub(group.weights)?.f_mul(&weighted)?.f_square()?;
        costs.push(cost.f_sum_dim_intlist([0].as_slice(), false, Kind::Float)?);
        all_scales.push(scales);
        all_zeros.push(zeros);
    }
    let (_, order) = Tensor::f_stack(&costs, 0)?.f_sort_stable(true, 0, false)?;
    let best =
        |count: i64, of: &[Tensor]| Tensor::f_stack(of, 0)?.f_gather(0, &order.f_narrow(0, 0, count)?, false);
    let Some(block) = group.block.filter(|_| scales.finalists() > 1) else {
        let of = |of: &[Tensor]| best(1, of)?.f_squeeze_dim(0);
        return Ok(Steps { scales: of(&all_scales)?, zeros: of(&all_zeros)? });
    };
    let count = scales.finalists().min(costs.len()) as i64;
    let finalists = Steps { scales: best(count, &all_scales)?, zeros: best(count, &all_zeros)? };
    let costs = by_block(grid, group, block, &finalists)?;
    let (_, order) = costs.f_sort_stable(true, 0, false)?;
    let first = order.f_narrow(0, 0, 1)?;
    let of = |of: &Tensor| of.f_gather(0, &first, false)?.f_squeeze_dim(0);
    Ok(Steps { scales: of(&finalists.scales)?, zeros: of(&finalists.zeros)? })
}

/// The nearest point of the grid.
fn grid_point(grid: Grid, weights: &Tensor, scales: &Tensor, zeros: &Tensor) -> Result<Tensor, TchError> {
    let codes = weights.f_div(scales)?.f_round()?.f_add(zeros)?.f_clamp(0.0, f64::from(grid.max_code()))?;
    codes.f_sub(zeros)?.f_mul(scales)
}

/// `‖(q − w) Ũ_gg‖²` `[F, N]` with the codes that the column loop chooses.
fn by_block(grid: Grid, group: &Group<'_>, block: &Tensor, steps: &Steps) -> Result<Tensor, TchError> {
    let (g, size) = (group.weights.size()[0], steps.scales.size());
    let count = size[0] * size[1];
    let differences = group.weights.f_new_zeros([g, count], (Kind::Float, group.weights.device()))?;
    let mut costs = steps.scales.f_zeros_like()?;
    for i in 0..g {
        let pivot = group.pivots.f_select(0, i)?;
        let weights = group.weights.f_select(0, i)?;
        let before = block.f_narrow(0, 0, i)?.f_narrow(1, i, 1)?.f_tr()?;
        let residuals = before.f_mm(&differences.f_narrow(0, 0, i)?)?.f_view(size.as_slice())?;
        let targets = weights.f_sub(&residuals.f_div(&pivot)?)?;
        let quantized = grid_point(grid, &targets, &steps.scales, &steps.zeros)?;
        costs = costs.f_add(&quantized.f_sub(&targets)?.f_mul(&pivot)?.f_square()?)?;
        differences.f_select(0, i)?.f_copy_(&quantized.f_sub(&weights)?.f_view([count])?)?;
    }
    Ok(costs)
}

/// `Grid::fit_scaled` of each row.
fn scaled_steps(grid: Grid, min: &Tensor, max: &Tensor, factor: f64) -> Result<Steps, TchError> {
    let levels = f64::from(grid.max_code());
    let wide = |t: &Tensor| t.f_to_kind(Kind::Double)?.f_mul_scalar(factor.abs());
    let (min, max) = (wide(min)?, wide(max)?);
    if let Some(zero) = grid.symmetric_zero() {
        let range = min.f_abs()?.f_maximum(&max.f_abs()?)?.f_mul_scalar(2.0)?;
        let scales = to_scale(&range.f_div_scalar(levels)?)?;
        let scales = if factor < 0.0 { scales.f_neg()? } else { scales };
        return Ok(Steps { zeros: scales.f_full_like(f64::from(zero))?, scales });
    }
    let (min, max) = (min.f_clamp_max(0.0)?, max.f_clamp_min(0.0)?);
    let scales = to_scale(&max.f_sub(&min)?.f_div_scalar(levels)?)?;
    let zeros = min.f_neg()?.f_div(&scales.f_to_kind(Kind::Double)?)?.f_round()?;
    // All levels but one lie above zero.
    let above = zeros.f_lt(1.0)?;
    let scales = to_scale(&max.f_div_scalar(levels - 1.0)?)?.f_where_self(&above, &scales)?;
    Ok(Steps { scales, zeros: zeros.f_clamp(1.0, levels)?.f_to_kind(Kind::Float)? })
}

/// Rounds a scale as [`Grid`] does.
fn to_scale(scale: &Tensor) -> Result<Tensor, TchError> {
    const OF_ZEROS: f64 = 2.0 / 15.0;
    const SMALLEST: f64 = 1.0 / (1u32 << 24) as f64;
    let scale = scale.f_masked_fill(&scale.f_eq(0.0)?, OF_ZEROS)?;
    scale.f_to_kind(Kind::Float)?.f_to_kind(Kind::Half)?.f_to_kind(Kind::Float)?.f_clamp_min(SMALLEST)
}
