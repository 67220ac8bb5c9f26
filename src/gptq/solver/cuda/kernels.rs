//! Runs the kernels of `gptq_block.cu`.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use tch::Device;

use super::GPTQ_BLOCK;
use crate::{
    cuda::{Argument, Gpu, Grid, Kernel},
    error::{Error, Result},
};

/// All kernels of the file.
const NAMES: [&str; 15] = [
    "gptq_solve_fitted",
    "gptq_solve_searched",
    "gptq_solve_given",
    "gptq_compensate",
    "gptq_fit_static",
    "gptq_search_static",
    "gptq_rounding_costs",
    "gptq_pack",
    "gptq_reorder_hessian",
    "gptq_stack_f32",
    "gptq_stack_f16",
    "gptq_stack_bf16",
    "gptq_dequantize_f32",
    "gptq_dequantize_f16",
    "gptq_dequantize_bf16",
];

/// Runs the kernels of `gptq_block.cu`: on a GPU, or in tests as a host build or as plain code that computes the same.
pub trait Kernels: Send + Sync {
    /// The device of the tensors.
    fn device(&self) -> Device;

    /// Shared memory of a block at most, bytes.
    fn shared_memory(&self) -> usize;

    /// Launches a kernel, such as `gptq_pack`, on the device's stream.
    ///
    /// # Errors
    /// When the device refuses the launch.
    ///
    /// # Safety
    /// As [`Gpu::launch`]; pointers are of this device.
    unsafe fn launch(&self, name: &'static str, grid: Grid, arguments: &[Argument]) -> Result<()>;
}

/// The kernels on a GPU.
pub(super) struct Compiled {
    gpu: Arc<Gpu>,
    device: Device,
    kernels: Vec<(&'static str, Kernel)>,
}

impl Compiled {
    /// Compiles them for a device. `device` is where libtorch has the tensors.
    pub(super) fn new(gpu: Arc<Gpu>, device: Device) -> Result<Self> {
        if gpu.capability.0 < 8 {
            let (major, minor) = gpu.capability;
            let problem = format!("its compute capability is {major}.{minor}, and the solver needs 8.0");
            return Err(Error::Device { device: gpu.name.clone(), problem });
        }
        let kernels = NAMES.iter().map(|&name| Ok((name, gpu.kernel(&GPTQ_BLOCK, &[], name)?)));
        let kernels = kernels.collect::<Result<Vec<_>>>()?;
        Ok(Self { gpu, device, kernels })
    }
}

impl Kernels for Compiled {
    fn device(&self) -> Device {
        self.device
    }

    fn shared_memory(&self) -> usize {
        self.gpu.shared_memory
    }

    unsafe fn launch(&self, name: &'static str, grid: Grid, arguments: &[Argument]) -> Result<()> {
        let (_, kernel) = self.kernels.iter().find(|(n, _)| *n == name).expect("NAMES has every kernel");
        // SAFETY: the caller's promise.
        unsafe { self.gpu.launch(kernel, grid, false, arguments) }
    }
}

/// Seconds of a solve by part, for benchmarks. Each part waits for the device before and after it.
#[derive(Debug, Default)]
pub struct Clock(Mutex<BTreeMap<&'static str, f64>>);

impl Clock {
    /// The seconds since the last call, by part.
    pub fn take(&self) -> BTreeMap<&'static str, f64> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn add(&self, part: &'static str, seconds: f64) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(part).or_default() += seconds;
    }
}
