//! Copies between page-locked memory and a device on a separate stream, so that they overlap with libtorch's computations.

use std::sync::Arc;

use cudarc::driver::{
    CudaEvent, CudaStream, DriverError,
    result::{memcpy_dtoh_async, memcpy_htod_async},
};
use tch::{Device, Tensor};

use super::{
    gpu::{Gpu, failed},
    host_memory::{HostPool, HostTensor},
};
use crate::error::{Result, TorchContext};

/// A stream for copies. Each copy waits for the work that libtorch had queued when the copy was requested.
pub struct Copies {
    stream: Arc<CudaStream>,
    compute: Arc<CudaStream>,
    pool: Arc<HostPool>,
    device: Device,
}

/// A running copy, which keeps both sides alive. After it is dropped, later work of libtorch waits for it, so other tensors can
/// use the memory on the device at once.
pub struct Copy {
    on_device: Tensor,
    on_host: HostTensor,
    done: CudaEvent,
    compute: Arc<CudaStream>,
}

impl Copies {
    /// For a device.
    ///
    /// # Errors
    /// When the driver cannot create a stream.
    pub fn new(device: Device) -> Result<Self> {
        Self::on(&Gpu::of(device)?, device)
    }

    /// As [`Copies::new`], with the device that libtorch's tensors are on. It differs from `gpu` in tests, whose driver takes
    /// the CPU's memory for a device's.
    ///
    /// # Errors
    /// As [`Copies::new`].
    pub fn on(gpu: &Arc<Gpu>, device: Device) -> Result<Self> {
        let stream = gpu.context().new_stream().map_err(failed("make a stream for copies"))?;
        let pool = HostPool::new(gpu, vec![Arc::clone(&stream)], false);
        Ok(Self { stream, compute: gpu.compute_stream(), pool, device })
    }

    /// Page-locked memory of a tensor's size and kind.
    ///
    /// # Errors
    /// When it cannot be allocated.
    pub fn host_like(&self, tensor: &Tensor) -> Result<HostTensor> {
        self.pool.empty(&tensor.size(), tensor.kind())
    }

    /// Starts to copy a tensor to the device.
    ///
    /// # Errors
    /// When device memory is exhausted, or the driver refuses.
    pub fn upload(&self, from: &HostTensor) -> Result<Copy> {
        let (size, kind) = (from.tensor().size(), from.tensor().kind());
        let to = Tensor::f_empty(size, (kind, self.device)).torch("allocate on the device")?;
        self.copy(to, from, |to, from, stream| {
            // SAFETY: both tensors live until the copy has ended, and are as long as each other.
            unsafe { memcpy_htod_async(to.data_ptr() as u64, from.bytes(), stream.cu_stream()) }
        })
    }

    /// Starts to copy a tensor of the device into page-locked memory of its size.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn download(&self, from: Tensor, to: &HostTensor) -> Result<Copy> {
        assert!(from.is_contiguous() && from.size() == to.tensor().size(), "downloads keep the shape");
        assert_eq!(from.kind(), to.tensor().kind(), "downloads keep the kind");
        self.copy(from, to, |from, to, stream| {
            // SAFETY: as above; `to` is not read before the copy is waited for.
            unsafe { memcpy_dtoh_async(to.bytes_mut(), from.data_ptr() as u64, stream.cu_stream()) }
        })
    }

    fn copy(
        &self,
        on_device: Tensor,
        on_host: &HostTensor,
        start: impl FnOnce(&Tensor, &HostTensor, &CudaStream) -> Result<(), DriverError>,
    ) -> Result<Copy> {
        let copy = || {
            // Work that libtorch has queued may still use the memory.
            self.stream.join(&self.compute)?;
            start(&on_device, on_host, &self.stream)?;
            self.stream.record_event(None)
        };
        let done = copy().map_err(failed("copy to or from the device"))?;
        Ok(Copy { on_device, on_host: on_host.clone(), done, compute: Arc::clone(&self.compute) })
    }
}

impl Copy {
    /// The tensor on the device, for use there: work that libtorch queues from now on waits for the copy.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn on_device(self) -> Result<Tensor> {
        self.compute.wait(&self.done).map_err(failed("wait for a copy"))?;
        Ok(self.on_device.shallow_clone())
    }

    /// Whether it has ended.
    pub fn ended(&self) -> bool {
        // The driver answers threads of the device's context only.
        self.compute.context().bind_to_thread().is_ok() && self.done.is_complete()
    }

    /// Waits until it has ended; the bytes on the host.
    ///
    /// # Errors
    /// An error of the device.
    pub fn finish(&self) -> Result<&[u8]> {
        self.done.synchronize().map_err(failed("wait for a copy"))?;
        // SAFETY: the copy has ended, and the owner of the memory starts no other one while this one is held.
        Ok(unsafe { self.on_host.bytes() })
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        if !self.ended() {
            // An error is one of the device, which the next operation returns too.
            let _ = self.compute.wait(&self.done);
        }
    }
}
