//! The column loop: kernels solve panels, libtorch computes the products between them.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::{
    CudaFactor,
    launch::{Compensation, Stacked},
    panels::{Mode, Panel, Plan, Search},
};
use crate::{
    accuracy::Scales,
    error::{Error, Result, TorchContext},
    gptq::{
        Grid,
        solver::{
            Weight,
            cuda::scale_search::{Group, best_steps},
        },
    },
    variant::Variant,
};

/// Tensors of a solve. `N` output features of all weights together.
pub(super) struct Columns<'a> {
    factor: &'a CudaFactor,
    pub(super) stack: Stacked,
    /// `[K]` int: the group of each feature.
    pub(super) g_idx: Tensor,
    /// `[N]` fp64: what rounding to nearest would cost with independent errors.
    pub(super) independent: Tensor,
    /// Whether scales are searched for.
    searched: bool,
    plan: Plan,
    scratch: Scratch,
}

/// Tensors that each panel overwrites.
struct Scratch {
    /// `[P, N]` fp32.
    residuals: Tensor,
    /// `[wide group, N]` fp32: what is subtracted from a wide group's weights.
    x: Tensor,
    /// `[N]` fp32, `[0]` without wide groups.
    minima: Tensor,
    maxima: Tensor,
}

impl<'a> Columns<'a> {
    /// Allocates, and stacks the weights.
    pub(super) fn new(factor: &'a CudaFactor, weights: &[Weight<'_>], variant: &Variant) -> Result<Self> {
        let launcher = &factor.launcher;
        let order = &factor.damped.order;
        let k = order.columns().len();
        let size = variant.group_size.features(k);
        let shared = launcher.shared_memory();
        let known = variant.scales_known_beforehand();
        let searched = factor.scales != Scales::PLAIN;
        let factors = match searched {
            true => Grid::new(variant.bits, variant.symmetric).factors(factor.scales),
            false => Vec::new(),
        };
        let plan = match searched && !known {
            true => {
                let search = Search::new(factors.len(), factor.scales.finalists());
                Plan::searched(k, size, search, shared)
            }
            false => Plan::new(k, size, known, shared),
        };
        let plan = plan.ok_or_else(|| Error::Cuda {
            action: "solve a panel of columns".into(),
            problem: format!("blocks have only {shared} bytes of shared memory"),
        })?;
        let n: i64 = weights.iter().map(|w| w.values.size()[0]).sum();
        let (k, groups) = (k as i64, variant.group_size.groups(k) as i64);
        let device = launcher.device();
        let empty = |size: &[i64], kind| Tensor::f_empty(size, (kind, device));
        let allocate = || -> Result<_, tch::TchError> {
            let of_positions = (0..k as usize).map(|i| order.group_at(i, variant) as i32);
            let of_features = order.g_idx(variant).into_iter().map(|g| g as i32);
            let mut members: Vec<i32> = (0..k as i32).collect();
            members.sort_by_key(|&i| order.group_at(i as usize, variant));
            let groups_of: Vec<i32> = of_positions.chain(of_features).chain(members).collect();
            let compensated = if plan.wide_group > 0 { n } else { 0 };
            let groups_of = Tensor::f_from_slice(&groups_of)?.f_reshape([3, k])?.f_to_device(device)?;
            let sums = || Tensor::f_zeros([n], (Kind::Double, device));
            let stack = Stacked {
                factor: factor.damped.factor.shallow_clone(),
                weights: empty(&[k, n], Kind::Float)?,
                codes: empty(&[k, n], Kind::Uint8)?,
                scales: empty(&[groups, n], Kind::Half)?,
                zeros: empty(&[groups, n], Kind::Uint8)?,
                groups: groups_of.f_get(0)?,
                columns: factor.order.columns.shallow_clone(),
                objective: sums()?,
                distance: sums()?,
                factors: Tensor::f_from_slice(&factors)?.f_to_device(device)?,
                group_size: size,
                variant: *variant,
            };
            let (members, costs) = (groups_of.f_get(2)?, empty(&[groups, n], Kind::Float)?);
            let columns = Self {
                factor,
                stack,
                g_idx: groups_of.f_get(1)?,
                independent: empty(&[n], Kind::Double)?,
                scratch: Scratch {
                    residuals: empty(&[plan.width as i64, n], Kind::Float)?,
                    x: empty(&[plan.wide_group as i64, n], Kind::Float)?,
                    minima: empty(&[compensated], Kind::Float)?,
                    maxima: empty(&[compensated], Kind::Float)?,
                },
                searched,
                plan,
            };
            Ok((columns, members, costs))
        };
        let (mut columns, members, costs) = allocate().torch("allocate a solve")?;
        columns.launch_stack(weights)?;
        launcher.timed("panels", || {
            launcher.rounding_costs(&columns.stack, &members, &factor.order.diagonal, &costs)
        })?;
        let independent = costs.f_sum_dim_intlist([0].as_slice(), false, Kind::Double);
        columns.independent = independent.torch("sum up a solve")?;
        Ok(columns)
    }

    fn launch_stack(&self, weights: &[Weight<'_>]) -> Result<()> {
        let (launcher, order) = (&self.factor.launcher, &self.factor.order);
        let mut first = 0;
        for weight in weights {
            let ready = || {
                let values = weight.values.f_to_device(launcher.device())?.f_contiguous()?;
                match values.kind() {
                    Kind::Float | Kind::Half | Kind::BFloat16 => Ok(values),
                    _ => values.f_to_kind(Kind::Float),
                }
            };
            let values = ready().torch("bring a weight to the device")?;
            launcher.timed("stack", || {
                launcher.stack(&values, &order.positions, &order.dead, &self.stack.weights, first)
            })?;
            first += values.size()[0];
        }
        Ok(())
    }

    /// Launches everything and returns without waiting.
    pub(super) fn solve(&self) -> Result<()> {
        let launcher = &self.factor.launcher;
        let known = self.stack.variant.scales_known_beforehand();
        let positions = &self.factor.order.positions;
        if known && self.searched {
            launcher.timed("scales", || launcher.search_static(&self.stack, positions))?;
        } else if known {
            launcher.timed("panels", || launcher.fit_static(&self.stack, positions))?;
        }
        let searches = self.plan.searches_between(self.searched, known);
        for panel in &self.plan.panels {
            if searches && panel.is_first() {
                launcher.timed("scales", || self.search(&panel.group)).torch("search for scales")?;
            }
            let residuals =
                launcher.timed("products", || self.residuals(panel)).torch("multiply with a factor")?;
            launcher.timed("panels", || match panel.mode {
                Mode::Compensate => self.compensate(panel, residuals.as_ref()),
                mode => launcher.panel(mode, panel.columns.clone(), &self.stack, residuals.as_ref(), None),
            })?;
        }
        Ok(())
    }

    fn compensate(&self, panel: &Panel, residuals: Option<&Tensor>) -> Result<()> {
        let Scratch { x, minima, maxima, .. } = &self.scratch;
        let (first, last) = (panel.is_first(), panel.is_last());
        let x = rows(x, panel.columns.start - panel.group.start, panel.columns.len());
        let x = &x.torch("find a panel's part")?;
        let compensation = Compensation { x, minima, maxima, first, last };
        let columns = panel.columns.clone();
        self.factor.launcher.panel(panel.mode, columns, &self.stack, residuals, Some(&compensation))
    }

    /// Searches for the scales of the group that is solved next; `group` are positions in quantization order.
    fn search(&self, group: &Range<usize>) -> Result<(), tch::TchError> {
        let weights = rows(&self.stack.weights, group.start, group.len())?;
        let block = rows(&self.stack.factor, group.start, group.len())?;
        let block = block.f_narrow(1, group.start as i64, group.len() as i64)?;
        let weights = match group.start {
            0 => weights,
            solved => {
                let out = weights.f_empty_like()?;
                let left = self.left_by(0..solved, &rows(&self.stack.weights, 0, solved)?, group, out)?;
                weights.f_sub(&block.f_tr()?.f_linalg_solve_triangular(&left, false, true, false)?)?
            }
        };
        let pivots = &block.f_diagonal(0, 0, 1)?;
        let at = self.factor.damped.order.group_at(group.start, &self.stack.variant);
        self.set_steps(at, &Group { weights: &weights, pivots, block: Some(&block) })
    }

    fn set_steps(&self, at: usize, group: &Group<'_>) -> Result<(), tch::TchError> {
        let Stacked { scales, zeros, variant, .. } = &self.stack;
        let grid = Grid::new(variant.bits, variant.symmetric);
        let steps = best_steps(grid, self.factor.scales, group)?;
        scales.f_select(0, at as i64)?.f_copy_(&steps.scales)?;
        zeros.f_select(0, at as i64)?.f_copy_(&steps.zeros)
    }

    /// Residuals `[P, N]` of a panel from the solved columns before it; `None` if there are none. For [`Mode::Compensate`]:
    /// from the columns before its group, less the effect of `x` on the group's columns before the panel.
    fn residuals(&self, panel: &Panel) -> Result<Option<Tensor>, tch::TchError> {
        let columns = &panel.columns;
        let solved = if panel.mode == Mode::Compensate { panel.group.start } else { columns.start };
        let residuals = || rows(&self.scratch.residuals, 0, columns.len());
        let before = match solved {
            0 => None,
            _ => Some(self.left_by(
                0..solved,
                &rows(&self.stack.weights, 0, solved)?,
                columns,
                residuals()?,
            )?),
        };
        if solved == columns.start {
            return Ok(before);
        }
        let x = rows(&self.scratch.x, 0, columns.start - solved)?;
        let compensated = solved..columns.start;
        Ok(Some(match before {
            None => self.left_by(compensated, &x, columns, residuals()?)?.f_neg_()?,
            Some(mut before) => {
                before.f_sub_(&self.left_by(compensated, &x, columns, before.f_empty_like()?)?)?
            }
        }))
    }

    /// `Ũ[from, to]ᵀ · changes`, `[to, N]`, into `out`, in full fp32: [`super::CudaSolver::new`] has checked that.
    fn left_by(
        &self,
        from: Range<usize>,
        changes: &Tensor,
        to: &Range<usize>,
        out: Tensor,
    ) -> Result<Tensor, tch::TchError> {
        let factor = rows(&self.stack.factor, from.start, from.len())?;
        let factor = factor.f_narrow(1, to.start as i64, to.len() as i64)?;
        factor.f_tr()?.f_mm_out(&out, changes)
    }
}

fn rows(matrix: &Tensor, first: usize, count: usize) -> Result<Tensor, tch::TchError> {
    matrix.f_narrow(0, first as i64, count as i64)
}
