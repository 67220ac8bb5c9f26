//! Rows that are better rounded than compensated, as `cpu/compare.rs` finds them. They are rare: the device compares the errors of
//! all rows, and only doubtful ones come to the host.

use std::ops::Range;

use tch::{Device, Kind, TchError, Tensor};

use super::{CudaFactor, columns::Columns};
use crate::{
    error::{Result, TorchContext},
    gptq::{
        Grid,
        raw::floats,
        solver::{
            Sums, Weight,
            cpu::compare::{CLEARLY_BETTER, ROWS, UNSURE},
            rtn::{Rounded, round_alive},
        },
    },
    variant::Variant,
};

/// Sums of each row of a stack, on the host.
pub(super) struct RowSums {
    /// `d (H + λI) dᵀ` `[N]`.
    pub(super) objective: Vec<f64>,
    /// `‖d‖²` `[N]`.
    pub(super) distance: Vec<f64>,
    /// Cost of rounding to nearest with independent errors, `[N]`.
    independent: Vec<f64>,
    /// Scales that do not fit fp16, `[N]`.
    pub(super) broken: Vec<f64>,
}

impl RowSums {
    /// Those of solved columns: one copy from the device, which waits for the solve.
    pub(super) fn of(columns: &Columns<'_>) -> Result<Self, TchError> {
        let stack = &columns.stack;
        let finite = stack.scales.f_isfinite()?;
        let broken = finite.f_logical_not()?.f_sum_dim_intlist([0].as_slice(), false, Kind::Double)?;
        let all = [&stack.objective, &stack.distance, &columns.independent, &broken];
        let all =
            Vec::<f64>::try_from(Tensor::f_stack(&all, 0)?.f_flatten(0, -1)?.f_to_device(Device::Cpu)?)?;
        let mut parts = all.chunks(all.len() / 4).map(<[f64]>::to_vec);
        let mut next = || parts.next().unwrap_or_default();
        Ok(Self { objective: next(), distance: next(), independent: next(), broken: next() })
    }

    fn error(&self, row: usize, lambda: f64) -> f64 {
        Sums { objective: self.objective[row], distance: self.distance[row] }.undamped(lambda)
    }
}

impl CudaFactor {
    /// Replaces compensated rows by rounded rows if these have a smaller error; returns their number for each weight.
    pub(super) fn round_where_better(
        &self,
        columns: &Columns<'_>,
        sums: &mut RowSums,
        weights: &[Weight<'_>],
        variant: &Variant,
    ) -> Result<Vec<usize>> {
        let lambda = self.damped.lambda;
        let mut first = 0;
        let mut counts = Vec::with_capacity(weights.len());
        for weight in weights {
            let rows = first..first + weight.values.size()[0] as usize;
            let doubtful = |row: &usize| sums.error(*row, lambda) > CLEARLY_BETTER * sums.independent[*row];
            let doubtful: Vec<usize> = rows.clone().filter(doubtful).collect();
            let mut count = 0;
            for some in doubtful.chunks(ROWS) {
                let better = self.better(some, &rows, weight, variant, sums).torch("compare solutions")?;
                count += better.len();
                if !better.is_empty() {
                    self.take(columns, &better).torch("round rows")?;
                }
                for (rounded, objective) in better {
                    (sums.objective[rounded.row], sums.distance[rounded.row]) = (objective, rounded.distance);
                }
            }
            counts.push(count);
            first = rows.end;
        }
        Ok(counts)
    }

    /// Those of `some` rows of a weight that have a smaller error rounded, with their sums. `rows` are the weight's in the stack.
    fn better(
        &self,
        some: &[usize],
        rows: &Range<usize>,
        weight: &Weight<'_>,
        variant: &Variant,
        before: &RowSums,
    ) -> Result<Vec<(Rounded, f64)>, TchError> {
        let (order, lambda) = (&self.damped.order, self.damped.lambda);
        let k = order.columns().len();
        let (grid, g_idx) = (Grid::new(variant.bits, variant.symmetric), order.g_idx(variant));
        let groups = variant.group_size.groups(k);
        let own: Vec<i64> = some.iter().map(|row| (row - rows.start) as i64).collect();
        let own = Tensor::f_from_slice(&own)?.f_to_device(weight.values.device())?;
        let values = weight.values.f_index_select(0, &own)?.f_to_device(Device::Cpu)?;
        let mut rounded = Vec::with_capacity(some.len());
        // In quantization order.
        let mut differences: Vec<f32> = Vec::with_capacity(some.len() * k);
        let mut of_row = vec![0.0; k];
        for (i, &row) in some.iter().enumerate() {
            floats(&values, i * k, k).widen(&mut of_row);
            rounded.push(round_alive(grid, &g_idx, &self.damped.dead, row, groups, &mut of_row));
            differences.extend(order.columns().iter().map(|&column| of_row[column as usize]));
        }
        let differences = Tensor::f_from_slice(&differences)?.f_reshape([some.len() as i64, k as i64])?;
        let product = differences.f_to_device(self.launcher.device())?.f_mm(&self.damped.factor)?;
        let squares = product.f_to_kind(Kind::Double)?.f_square()?;
        let objectives =
            Vec::<f64>::try_from(squares.f_sum_dim_intlist([1].as_slice(), false, Kind::Double)?)?;
        let smaller = |(rounded, objective): &(Rounded, f64)| {
            let sums = Sums { objective: *objective, distance: rounded.distance };
            sums.undamped(lambda) < (1.0 - UNSURE) * before.error(rounded.row, lambda)
        };
        Ok(rounded.into_iter().zip(objectives).filter(smaller).collect())
    }

    /// Stores rounded rows.
    fn take(&self, columns: &Columns<'_>, rows: &[(Rounded, f64)]) -> Result<(), TchError> {
        let (stack, device) = (&columns.stack, self.launcher.device());
        let count = rows.len() as i64;
        let at: Vec<i64> = rows.iter().map(|(rounded, _)| rounded.row as i64).collect();
        let at = Tensor::f_from_slice(&at)?.f_to_device(device)?;
        // Row by row on the host, `[count, …]`; a column each on the device.
        let columns_of = |to: &Tensor, values: Tensor| -> Result<(), TchError> {
            let values = values.f_reshape([count, -1])?.f_to_device(device)?.f_tr()?;
            to.shallow_clone().f_index_copy_(1, &at, &values.f_to_kind(to.kind())?).map(drop)
        };
        let codes: Vec<u8> = rows.iter().flat_map(|(rounded, _)| rounded.codes.iter().copied()).collect();
        let steps = || rows.iter().flat_map(|(rounded, _)| &rounded.steps);
        let scales: Vec<half::f16> = steps().map(|step| step.scale).collect();
        let zeros: Vec<u8> = steps().map(|step| step.zero).collect();
        columns_of(&stack.codes, Tensor::f_from_slice(&codes)?)?;
        columns_of(&stack.scales, Tensor::f_from_slice(&scales)?)?;
        columns_of(&stack.zeros, Tensor::f_from_slice(&zeros)?)
    }
}
