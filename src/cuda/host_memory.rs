//! Page-locked memory, which a device copies from and to while it computes.

use std::{
    ffi::c_void,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use cudarc::driver::{CudaStream, DriverError, result, sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY};
use tch::{Device, Kind, Tensor};

use super::gpu::{Gpu, failed};
use crate::error::{Error, NO_MORE_PAGES, Result, TorchContext};

/// Page-locked memory for the copies of some streams. Locking pages takes as long as reading them, so a pool can keep unused
/// buffers for later ones of their size.
pub struct HostPool {
    gpu: Arc<Gpu>,
    streams: Vec<Arc<CudaStream>>,
    keeps: bool,
    idle: Mutex<Vec<Buffer>>,
}

/// A tensor in page-locked memory.
pub struct HostTensor {
    tensor: Tensor,
    memory: Arc<HostMemory>,
}

/// A buffer of a pool, which it returns to when dropped.
pub struct HostMemory {
    buffer: Option<Buffer>,
    pool: Arc<HostPool>,
}

struct Buffer {
    address: *mut c_void,
    bytes: usize,
}

// SAFETY: page-locked memory belongs to no thread.
unsafe impl Send for Buffer {}
// SAFETY: a shared buffer only gives away its address.
unsafe impl Sync for Buffer {}

impl HostPool {
    /// For copies to one or more devices that libtorch starts on its own streams. Buffers are kept for later ones of their size,
    /// and given back when a buffer of another size is asked for.
    ///
    /// # Errors
    /// When the driver refuses a device.
    pub fn for_libtorch(devices: &[Device]) -> Result<Arc<Self>> {
        let gpus = devices.iter().map(|&device| Gpu::of(device)).collect::<Result<Vec<_>>>()?;
        Ok(Self::new(&gpus[0], gpus.iter().map(|gpu| gpu.compute_stream()).collect(), true))
    }

    pub(super) fn new(gpu: &Arc<Gpu>, streams: Vec<Arc<CudaStream>>, keeps: bool) -> Arc<Self> {
        Arc::new(Self { gpu: Arc::clone(gpu), streams, keeps, idle: Mutex::default() })
    }

    /// An uninitialized tensor.
    ///
    /// # Errors
    /// When memory cannot be locked.
    pub fn empty(self: &Arc<Self>, size: &[i64], kind: Kind) -> Result<HostTensor> {
        let bytes = size.iter().product::<i64>() as usize * kind.elt_size_in_bytes();
        let buffer = self.take(bytes).map_err(|error| {
            let action = format!("lock {bytes} bytes of memory for copies");
            match error.0 {
                // Of the host: the device has nothing to free.
                CUDA_ERROR_OUT_OF_MEMORY => Error::Cuda { action, problem: NO_MORE_PAGES.into() },
                _ => failed(action)(error),
            }
        })?;
        let address = buffer.address;
        let memory = Arc::new(HostMemory { buffer: Some(buffer), pool: Arc::clone(self) });
        // SAFETY: the buffer is as large as the tensor, aligned as the driver aligns memory, and lives as long as the tensor.
        let tensor = unsafe { Tensor::f_from_blob(address.cast(), size, &[], kind, Device::Cpu) };
        Ok(HostTensor { tensor: tensor.torch("wrap page-locked memory")?, memory })
    }

    fn take(&self, bytes: usize) -> Result<Buffer, DriverError> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = idle.iter().position(|buffer| buffer.bytes == bytes) {
            let buffer = idle.swap_remove(at);
            drop(idle);
            // Copies from it may still run.
            self.wait()?;
            return Ok(buffer);
        }
        for buffer in idle.drain(..) {
            self.free(&buffer)?;
        }
        drop(idle);
        self.gpu.context().bind_to_thread()?;
        // SAFETY: the driver allocates it; flags 0 are the default.
        let address = unsafe { result::malloc_host(bytes.max(1), 0) }?;
        Ok(Buffer { address, bytes })
    }

    /// Waits until the copies of all streams have ended.
    fn wait(&self) -> Result<(), DriverError> {
        self.streams.iter().try_for_each(|stream| stream.synchronize())
    }

    /// Gives memory back once no copy uses it.
    fn free(&self, buffer: &Buffer) -> Result<(), DriverError> {
        self.wait()?;
        // SAFETY: it came from the driver, and nothing refers to it any more.
        unsafe { result::free_host(buffer.address) }
    }
}

impl Drop for HostPool {
    fn drop(&mut self) {
        let idle = std::mem::take(self.idle.get_mut().unwrap_or_else(PoisonError::into_inner));
        // An error here is one of the device, which the next operation returns too.
        for buffer in &idle {
            let _ = self.free(buffer);
        }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        let Some(buffer) = self.buffer.take() else { return };
        match self.pool.keeps {
            true => self.pool.idle.lock().unwrap_or_else(PoisonError::into_inner).push(buffer),
            false => {
                let _ = self.pool.free(&buffer);
            }
        }
    }
}

impl HostTensor {
    /// The tensor. Its handles must not outlive [`HostTensor::memory`].
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// The memory, to be kept as long as handles of the tensor.
    pub fn memory(&self) -> Arc<HostMemory> {
        Arc::clone(&self.memory)
    }

    /// Its bytes.
    ///
    /// # Safety
    /// No copy into it is under way.
    pub(super) unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: the buffer has so many bytes; the caller's promise for the rest.
        unsafe { std::slice::from_raw_parts(self.tensor.data_ptr().cast(), self.len()) }
    }

    /// As [`HostTensor::bytes`], to be written by a copy.
    ///
    /// # Safety
    /// Nothing else uses it until the copy has ended.
    #[expect(clippy::mut_from_ref, reason = "tensors own their memory behind a shared handle")]
    pub(super) unsafe fn bytes_mut(&self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.tensor.data_ptr().cast(), self.len()) }
    }

    fn len(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
}

impl Clone for HostTensor {
    /// A second handle of the same memory.
    fn clone(&self) -> Self {
        Self { tensor: self.tensor.shallow_clone(), memory: self.memory() }
    }
}

impl fmt::Debug for HostTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page-locked {:?}", self.tensor)
    }
}
