//! The solver on a CUDA device. libtorch computes the factorization and the products between panels; our own kernels
//! (`gptq_block.cu`) solve columns and pack codes. Only sums and, on request, packed words are copied from the device. The host
//! waits for the device where it reads a number: the Hessian's diagonal, the success and the extremes of a factorization, output
//! energies, whether each target is finite, the sums of a solve, and those of rows that may be better rounded. Orders and groups
//! are copied to the device.

mod columns;
mod compare;
#[cfg(test)]
mod host_emulation;
mod kernels;
mod launch;
mod linear;
mod panels;
pub(super) mod scale_search;
#[cfg(test)]
mod tests;
mod work;

use std::sync::Arc;

use tch::{Device, Kind, TchError, Tensor};

pub use kernels::{Clock, Kernels};
pub use linear::{DeviceLinear, PackedCodes};
pub use work::{StageShape, Work};

use super::{
    Damped, Damping, Factor, Factorization, Factorized, Solution, Solved, Solver, Sums, Weight, check_scales,
    check_sums, damped, divide_by,
};
use crate::{
    accuracy::Scales,
    cuda::{Gpu, Source},
    error::{Error, Result, TorchContext},
    gptq::Hessian,
    variant::{Sorting, Variant},
};
use columns::Columns;
use compare::RowSums;
use launch::Launcher;

/// The kernels of the column loop, of stacking and of packing.
pub(super) const GPTQ_BLOCK: Source = Source { name: "gptq_block.cu", text: include_str!("gptq_block.cu") };

/// Solves in fp32 on a CUDA device.
#[derive(Debug)]
pub struct CudaSolver {
    launcher: Arc<Launcher>,
    scales: Scales,
}

impl CudaSolver {
    /// Compiles the kernels for a device, and checks that its fp32 products are not rounded to TF32.
    ///
    /// # Errors
    /// When the device cannot be used, its compute capability is below 8.0, the kernels do not compile, or products are
    /// rounded to TF32.
    pub fn new(device: Device) -> Result<Self> {
        Self::on_gpu(Gpu::of(device)?, device)
    }

    /// As [`CudaSolver::new`], with the device that libtorch's tensors are on. It differs from `gpu` in tests, whose driver takes
    /// the CPU's memory for a device's.
    ///
    /// # Errors
    /// As [`CudaSolver::new`].
    pub fn on_gpu(gpu: Arc<Gpu>, device: Device) -> Result<Self> {
        Self::on(Launcher::new(gpu, device, None)?)
    }

    /// As [`CudaSolver::new`], but measures its parts, with a wait for the device before and after each.
    ///
    /// # Errors
    /// As [`CudaSolver::new`].
    pub fn with_clock(device: Device) -> Result<(Self, Arc<Clock>)> {
        let clock = Arc::new(Clock::default());
        let launcher = Launcher::new(Gpu::of(device)?, device, Some(Arc::clone(&clock)))?;
        Ok((Self::on(launcher)?, clock))
    }

    fn on(launcher: Launcher) -> Result<Self> {
        check_fp32(launcher.device())?;
        Ok(Self { launcher: Arc::new(launcher), scales: Scales::PLAIN })
    }

    /// The same solver with another choice of scales. The kernels search; where a group is wider than a panel, libtorch's
    /// operations do, group by group.
    #[must_use]
    pub fn with_scales(self, scales: Scales) -> Self {
        Self { scales, ..self }
    }

    /// A solver whose kernels run by other means, for tests without a GPU.
    ///
    /// # Errors
    /// When products on their device are rounded to TF32.
    pub fn with_kernels(kernels: Box<dyn Kernels>) -> Result<Self> {
        Self::on(Launcher::with(kernels))
    }

    /// A solver with plain code on the CPU instead of kernels; `shared_memory` is that of a block.
    #[cfg(test)]
    pub(super) fn host_emulation(shared_memory: usize) -> Self {
        Self::with_kernels(Box::new(host_emulation::PlainKernels { shared_memory })).unwrap()
    }
}

impl Solver for CudaSolver {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn factorize(&self, hessian: &Hessian, sorting: Sorting, damp: f64, stage: &str) -> Result<Factor> {
        let factorize = |damping: &Damping<'_>| upper_factor(&self.launcher, hessian.matrix(), damping);
        let damped = damped(hessian, sorting, damp, stage, factorize)?;
        let order = DeviceOrder::new(&damped, self.launcher.device()).torch("copy an order")?;
        let (launcher, scales) = (Arc::clone(&self.launcher), self.scales);
        Ok(Box::new(CudaFactor { damped, order, launcher, scales }))
    }
}

/// `Ũ` `[K, K]` with `H + λI = Ũ Ũᵀ`, in quantization order and row-major; `None` when that is not positive definite.
fn upper_factor(launcher: &Launcher, matrix: &Tensor, damping: &Damping<'_>) -> Result<Option<Tensor>> {
    let &Damping { order, mean, lambda } = damping;
    let reversed: Vec<i32> = order.columns().iter().rev().map(|&c| c as i32).collect();
    let columns = Tensor::f_from_slice(&reversed).and_then(|c| c.f_to_device(launcher.device()));
    let columns = columns.torch("copy an order")?;
    let lower = matrix.f_empty_like().torch("allocate a factor")?;
    launcher.timed("reorder and factor", || {
        launcher.reorder_hessian(matrix, &columns, &lower, mean, lambda)?;
        factor_of(lower).torch("factorize a Hessian")
    })
}

/// `Ũ` from the lower triangle, row-major, of a matrix with both axes reversed.
fn factor_of(lower: Tensor) -> Result<Option<Tensor>, TchError> {
    // libtorch returns factors column-major. The column-major upper factor is the row-major lower factor, which only has to
    // be reversed. The matrix is symmetric, so that it need not be transposed either.
    let (upper, info) = lower.f_tr()?.f_linalg_cholesky_ex(true, false)?;
    drop(lower);
    if i64::try_from(info)? != 0 {
        return Ok(None);
    }
    Ok(Some(upper.f_tr()?.f_flip([0, 1])?.f_contiguous()?))
}

/// Refuses a device whose fp32 products are rounded to TF32. libtorch rounds only by its settings or by one of two environment
/// variables, but the results would not show it.
fn check_fp32(device: Device) -> Result<()> {
    // TF32 keeps 10 bits of the fraction.
    const VALUE: f64 = 1.0 + 1.0 / (1u32 << 20) as f64;
    let options = (Kind::Float, device);
    let multiply = || -> Result<bool, TchError> {
        let product = Tensor::f_full([256, 256], VALUE, options)?.f_mm(&Tensor::f_eye(256, options)?)?;
        Ok(i64::try_from(product.f_ne(VALUE)?.f_sum(Kind::Int64)?)? == 0)
    };
    if multiply().torch("multiply in fp32")? {
        return Ok(());
    }
    Err(Error::Cuda {
        action: "multiply in fp32".into(),
        problem:
            "products are rounded to TF32; unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE and NVIDIA_TF32_OVERRIDE"
                .into(),
    })
}

/// The column order on the device.
struct DeviceOrder {
    /// `[K]` int: the feature at each position.
    columns: Tensor,
    /// `[K]` int: the position of each feature.
    positions: Tensor,
    /// `[K]` bytes: 1 where a feature is dead.
    dead: Tensor,
    /// `[K]` fp32: the undamped Hessian's diagonal by position.
    diagonal: Tensor,
}

impl DeviceOrder {
    fn new(damped: &Damped<Tensor>, device: Device) -> Result<Self, TchError> {
        let columns: Vec<i32> = damped.order.columns().iter().map(|&c| c as i32).collect();
        let mut positions = vec![0; columns.len()];
        columns.iter().zip(0..).for_each(|(&column, position)| positions[column as usize] = position);
        let mut dead = vec![0u8; columns.len()];
        damped.dead.iter().for_each(|&feature| dead[feature as usize] = 1);
        let diagonal: Vec<f32> =
            damped.order.columns().iter().map(|&c| damped.diagonal[c as usize]).collect();
        Ok(Self {
            diagonal: Tensor::f_from_slice(&diagonal)?.f_to_device(device)?,
            columns: Tensor::f_from_slice(&columns)?.f_to_device(device)?,
            positions: Tensor::f_from_slice(&positions)?.f_to_device(device)?,
            dead: Tensor::f_from_slice(&dead)?.f_to_device(device)?,
        })
    }
}

struct CudaFactor {
    /// With `Ũ` `[K, K]` fp32, row-major, in quantization order.
    damped: Damped<Tensor>,
    order: DeviceOrder,
    launcher: Arc<Launcher>,
    scales: Scales,
}

impl Factorized for CudaFactor {
    fn facts(&self) -> &Factorization {
        &self.damped.facts
    }

    fn solve(&self, weights: &[Weight<'_>], variant: &Variant) -> Result<Vec<Solution>> {
        let columns = Columns::new(self, weights, variant)?;
        columns.solve()?;
        let mut sums = RowSums::of(&columns).torch("sum up a solve")?;
        let uncompensated = self.round_where_better(&columns, &mut sums, weights, variant)?;
        let mut solutions = self.split(&columns, &sums, weights, variant)?;
        solutions.iter_mut().zip(uncompensated).for_each(|(solution, count)| solution.uncompensated = count);
        Ok(solutions)
    }

    fn divide(&self, b: &Tensor, _products: Kind) -> Result<Option<Tensor>> {
        divide_by(b, &self.damped.factor, self.damped.order.columns())
    }
}

impl CudaFactor {
    /// Splits a solved stack by weight.
    fn split(
        &self,
        columns: &Columns<'_>,
        sums: &RowSums,
        weights: &[Weight<'_>],
        variant: &Variant,
    ) -> Result<Vec<Solution>> {
        let g_idx = self.damped.order.g_idx(variant);
        let mut first = 0;
        let linears = weights.iter().map(|weight| {
            let rows = weight.values.size()[0];
            let own = |t: &Tensor| t.f_narrow(1, first, rows);
            let linear = DeviceLinear {
                bits: variant.bits,
                codes: own(&columns.stack.codes)?,
                scales: own(&columns.stack.scales)?,
                zeros: own(&columns.stack.zeros)?,
                g_idx: g_idx.clone(),
                device_g_idx: columns.g_idx.shallow_clone(),
                launcher: Arc::clone(&self.launcher),
            };
            first += rows;
            Ok(linear)
        });
        let linears = linears.collect::<Result<Vec<_>, TchError>>().torch("take a stack apart")?;
        let mut first = 0;
        let solutions = linears.into_iter().zip(weights).map(|(linear, weight)| {
            let rows = first..first + linear.out_features();
            first = rows.end;
            let sum = |of: &[f64]| of[rows.clone()].iter().sum::<f64>();
            if sum(&sums.broken) > 0.0 {
                check_scales(weight, linear.to_host()?.scales(), linear.out_features())?;
            }
            let sums = Sums { objective: sum(&sums.objective), distance: sum(&sums.distance) };
            check_sums(weight, sums)?;
            Ok(Solution {
                linear: Solved::Device(linear),
                squared_error: sums.undamped(self.damped.lambda),
                uncompensated: 0,
                fallback: None,
            })
        });
        solutions.collect()
    }
}
