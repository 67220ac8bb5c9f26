//! A CUDA device, its compiled kernels, and their launches.

use std::{
    collections::HashMap,
    ffi::c_void,
    sync::{Arc, Mutex, PoisonError},
};

use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaStream, DriverError,
    result::{launch_cooperative_kernel, launch_kernel},
    sys::{
        CUdevice_attribute, CUfunction_attribute, CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill,
        CUtensorMapInterleave, CUtensorMapL2promotion, CUtensorMapSwizzle, cuTensorMapEncodeTiled,
    },
};
use tch::{Device, Tensor};

use super::compile::{Macro, Source, architecture, compile, known_architectures};
use crate::error::{Error, Result};

/// A device that kernels are launched on. Launches use libtorch's stream, so that they keep their order with its operations.
pub struct Gpu {
    context: Arc<CudaContext>,
    modules: Mutex<Modules>,
    /// `NVIDIA H200`.
    pub name: String,
    /// `(9, 0)`.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory of a thread block at most, bytes.
    pub shared_memory: usize,
    /// The second-level cache, bytes.
    pub l2_cache: usize,
}

/// By file and macros.
type Modules = HashMap<(&'static str, Vec<Macro>), Arc<CudaModule>>;

/// Memory of a device, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Free memory.
    pub free: usize,
    /// All memory.
    pub total: usize,
}

/// A kernel of a compiled file.
pub struct Kernel {
    function: CudaFunction,
    name: &'static str,
    /// Static shared memory of a block, bytes.
    static_shared: usize,
}

/// Numbers of blocks and threads, and the dynamic shared memory of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Blocks, x, y and z.
    pub blocks: (usize, usize, usize),
    /// Threads of a block, x and y.
    pub threads: (u32, u32),
    /// Dynamic shared memory of a block, bytes.
    pub shared: usize,
}

/// An argument of a launch. It is not checked against the kernel.
#[derive(Debug, Clone, PartialEq)]
pub enum Argument {
    /// Device memory; null is 0.
    Pointer(u64),
    /// `int`.
    Int(i32),
    /// `unsigned`.
    Unsigned(u32),
    /// `long long`.
    Long(i64),
    /// `double`.
    Double(f64),
    /// A struct by value.
    Struct(Vec<u8>),
}

impl Argument {
    /// The address of a tensor's values. The tensor must outlive the launch.
    pub fn tensor(tensor: &Tensor) -> Self {
        Self::Pointer(tensor.data_ptr() as u64)
    }

    fn address(&self) -> *mut c_void {
        let address: *const c_void = match self {
            Self::Pointer(v) => (&raw const *v).cast(),
            Self::Int(v) => (&raw const *v).cast(),
            Self::Unsigned(v) => (&raw const *v).cast(),
            Self::Long(v) => (&raw const *v).cast(),
            Self::Double(v) => (&raw const *v).cast(),
            Self::Struct(bytes) => bytes.as_ptr().cast(),
        };
        address.cast_mut()
    }
}

impl Gpu {
    /// The device with libtorch's number; one instance for each device.
    ///
    /// # Errors
    /// When the driver refuses it, or `device` is the CPU.
    pub fn of(device: Device) -> Result<Arc<Self>> {
        match device {
            Device::Cuda(index) => Self::numbered(index),
            _ => {
                let problem = "it is no CUDA device".into();
                Err(Error::Device { device: format!("{device:?}"), problem })
            }
        }
    }

    /// The device with the driver's number, from 0, which is libtorch's number too.
    ///
    /// # Errors
    /// When the driver refuses it.
    pub fn numbered(index: usize) -> Result<Arc<Self>> {
        static OPEN: Mutex<Vec<(usize, Arc<Gpu>)>> = Mutex::new(Vec::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, gpu)) = open.iter().find(|(i, _)| *i == index) {
            return Ok(Arc::clone(gpu));
        }
        let gpu = Arc::new(Self::open(index).map_err(failed(format!("open device {index}")))?);
        open.push((index, Arc::clone(&gpu)));
        Ok(gpu)
    }

    fn open(index: usize) -> Result<Self, DriverError> {
        use CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        };
        // The primary context, which libtorch also uses.
        let context = CudaContext::new(index)?;
        let attribute = |which| context.attribute(which).map(|value| value.max(0) as usize);
        Ok(Self {
            name: context.name()?,
            capability: context.compute_capability()?,
            multiprocessors: attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            shared_memory: attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            l2_cache: attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
            modules: Mutex::new(HashMap::new()),
            context,
        })
    }

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// libtorch's stream, which is the null stream.
    pub(super) fn compute_stream(&self) -> Arc<CudaStream> {
        self.context.default_stream()
    }

    /// Memory of the device now.
    ///
    /// # Errors
    /// When the driver does not report it.
    pub fn memory(&self) -> Result<Memory> {
        let (free, total) = self.context.mem_get_info().map_err(failed("read the free memory"))?;
        Ok(Memory { free, total })
    }

    /// Waits until all launches have ended.
    ///
    /// # Errors
    /// When a kernel failed.
    pub fn synchronize(&self) -> Result<()> {
        self.context.synchronize().map_err(failed("wait for the device"))
    }

    /// A kernel of a file, compiled once for each list of macros.
    ///
    /// # Errors
    /// When it does not compile or load.
    pub fn kernel(&self, source: &Source, macros: &[Macro], name: &'static str) -> Result<Kernel> {
        // A module may have been loaded by another thread.
        self.context.bind_to_thread().map_err(failed(format!("load {}", source.name)))?;
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (source.name, macros.to_vec());
        let module = match modules.get(&key) {
            Some(module) => Arc::clone(module),
            None => {
                let ptx = compile(source, &architecture(self.capability, &known_architectures()?), macros)?;
                let load = self.context.load_module(ptx.into());
                let module = load.map_err(failed(format!("load {}", source.name)))?;
                modules.insert(key, Arc::clone(&module));
                module
            }
        };
        let function = module.load_function(name).map_err(failed(format!("find kernel {name}")))?;
        let static_shared = self.allow_shared_memory(&function).map_err(failed(format!("load {name}")))?;
        Ok(Kernel { function, name, static_shared })
    }

    /// Allows a function all dynamic shared memory of the device; returns its static shared memory. The driver keeps the limit
    /// per function, and a function is shared by all that load it from a module. So the limit is the same for all launches.
    fn allow_shared_memory(&self, function: &CudaFunction) -> Result<usize, DriverError> {
        use CUfunction_attribute::{
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
        };
        let static_shared = function.get_attribute(CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?.max(0) as usize;
        let dynamic = self.shared_memory.saturating_sub(static_shared);
        function.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, dynamic as i32)?;
        Ok(static_shared)
    }

    /// Launches a kernel. The blocks of a cooperative kernel may wait for each other.
    ///
    /// # Errors
    /// When the driver refuses the launch. Errors of the kernel itself are returned by the next synchronization.
    ///
    /// # Safety
    /// The arguments are those of the kernel. The memory they point to is on this device, large enough, and neither freed nor
    /// reused by another stream before the kernel has ended.
    pub unsafe fn launch(
        &self,
        kernel: &Kernel,
        grid: Grid,
        cooperative: bool,
        arguments: &[Argument],
    ) -> Result<()> {
        let action = || format!("launch {} as {grid:?}", kernel.name);
        let refused = || failed(action());
        if grid.shared + kernel.static_shared > self.shared_memory {
            let problem = format!(
                "{} bytes of dynamic and {} of static shared memory are more than the {} that a block can have",
                grid.shared, kernel.static_shared, self.shared_memory
            );
            return Err(Error::Cuda { action: action(), problem });
        }
        let dimension = |blocks: usize| u32::try_from(blocks).unwrap_or(u32::MAX);
        let blocks = (dimension(grid.blocks.0), dimension(grid.blocks.1), dimension(grid.blocks.2));
        let threads = (grid.threads.0, grid.threads.1, 1);
        let shared = grid.shared as u32;
        // A thread may launch on several devices.
        self.context.bind_to_thread().map_err(refused())?;
        let mut addresses: Vec<*mut c_void> = arguments.iter().map(Argument::address).collect();
        let launch = if cooperative { launch_cooperative_kernel } else { launch_kernel };
        // libtorch uses the default stream.
        let stream = std::ptr::null_mut();
        // SAFETY: the caller's promise; the addresses are those of live values.
        unsafe { launch(kernel.function.cu_function(), blocks, threads, shared, stream, &mut addresses) }
            .map_err(refused())
    }

    /// A matrix of 16-bit values, row by row, for copies of boxes of rows and columns to shared memory. There, columns are swizzled
    /// by 128 bytes; rows and columns beyond the matrix are zeros. Only compute capability 9.0 and later copies so.
    ///
    /// # Errors
    /// When the driver refuses the matrix: its rows begin at multiples of 16 bytes.
    pub fn matrix_16(
        &self,
        matrix: &Argument,
        (rows, columns): (usize, usize),
        (high, wide): (u32, u32),
    ) -> Result<Argument> {
        let Argument::Pointer(address) = *matrix else { unreachable!("a matrix is in device memory") };
        let refused = || failed("map a matrix for copies");
        self.context.bind_to_thread().map_err(refused())?;
        let mut map = CUtensorMap { opaque: [0; 16] };
        let (sizes, stride) = ([columns as u64, rows as u64], 2 * columns as u64);
        // SAFETY: the driver reads two sizes, a stride and two sides, and writes the map; it does not read the matrix.
        let made = unsafe {
            cuTensorMapEncodeTiled(
                &raw mut map,
                CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
                2,
                address as *mut c_void,
                sizes.as_ptr(),
                &raw const stride,
                [wide, high].as_ptr(),
                [1, 1].as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        made.result().map_err(refused())?;
        Ok(Argument::Struct(bytemuck::bytes_of(&map.opaque).to_vec()))
    }

    /// Blocks of a kernel that are resident on the device at the same time.
    ///
    /// # Errors
    /// When the driver does not report it.
    pub fn resident_blocks(&self, kernel: &Kernel, threads: u32, shared: usize) -> Result<usize> {
        let occupancy = || {
            self.context.bind_to_thread()?;
            kernel.function.occupancy_max_active_blocks_per_multiprocessor(threads, shared, None)
        };
        let a_multiprocessor = occupancy().map_err(failed(format!("fit {} on the device", kernel.name)))?;
        Ok(a_multiprocessor as usize * self.multiprocessors as usize)
    }
}

pub(super) fn failed(action: impl Into<String>) -> impl FnOnce(DriverError) -> Error {
    let action = action.into();
    move |error| {
        let name = error.error_string().map_or_else(|_| format!("{error:?}"), |s| s.to_string_lossy().into());
        Error::Cuda { action, problem: name }
    }
}
