//! Copies between pinned memory and a device on a separate stream, so that they overlap with libtorch's computations.

use std::sync::Arc;

use cudarc::driver::{
    CudaEvent, CudaStream, DriverError,
    result::{memcpy_dtoh_async, memcpy_htod_async},
};
use tch::{Device, Tensor};

use super::gpu::{Gpu, failed};
use crate::error::{Result, TorchContext};

/// A stream for copies. Each copy waits for the work that libtorch had queued when the copy was requested.
pub struct Copies {
    stream: Arc<CudaStream>,
    compute: Arc<CudaStream>,
    device: Device,
}

/// A running copy, which keeps its source alive.
pub struct Copy {
    to: Tensor,
    _from: Tensor,
    done: CudaEvent,
    compute: Arc<CudaStream>,
}

impl Copies {
    /// For a device.
    ///
    /// # Errors
    /// When the driver cannot create a stream.
    pub fn new(device: Device) -> Result<Self> {
        let gpu = Gpu::of(device)?;
        let stream = gpu.context().new_stream().map_err(failed("make a stream for copies"))?;
        Ok(Self { stream, compute: gpu.context().default_stream(), device })
    }

    /// Page-locked memory of a device tensor's size and kind, which can be copied while the device computes.
    ///
    /// # Errors
    /// When it cannot be allocated.
    pub fn pinned_like(&self, tensor: &Tensor) -> Result<Tensor> {
        let empty = Tensor::f_empty(tensor.size(), (tensor.kind(), Device::Cpu));
        empty.and_then(|t| t.f_pin_memory(self.device)).torch("lock memory for copies")
    }

    /// Starts to copy a pinned tensor to the device.
    ///
    /// # Errors
    /// When device memory is exhausted, or the driver refuses.
    pub fn upload(&self, from: &Tensor) -> Result<Copy> {
        assert!(from.is_contiguous() && from.device() == Device::Cpu, "uploads come from memory, row by row");
        let to = Tensor::f_empty(from.size(), (from.kind(), self.device)).torch("allocate on the device")?;
        self.copy(from.shallow_clone(), to, |from, to, stream| {
            // SAFETY: both tensors live until the copy is waited for, and are as long as each other.
            unsafe { memcpy_htod_async(to.data_ptr() as u64, bytes_of(from), stream.cu_stream()) }
        })
    }

    /// Starts to copy a tensor of the device into a pinned one of its size.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn download(&self, from: Tensor, to: &Tensor) -> Result<Copy> {
        assert!(
            from.is_contiguous() && to.is_contiguous() && to.size() == from.size(),
            "downloads keep the shape"
        );
        self.copy(from, to.shallow_clone(), |from, to, stream| {
            // SAFETY: as above; `to` is not read before the copy is waited for.
            unsafe { memcpy_dtoh_async(bytes_of_mut(to), from.data_ptr() as u64, stream.cu_stream()) }
        })
    }

    /// Waits for all copies.
    ///
    /// # Errors
    /// An error of the device.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(failed("wait for copies"))
    }

    fn copy(
        &self,
        from: Tensor,
        to: Tensor,
        start: impl FnOnce(&Tensor, &Tensor, &CudaStream) -> Result<(), DriverError>,
    ) -> Result<Copy> {
        let copy = || {
            // Work that libtorch has queued may still use the memory.
            self.stream.join(&self.compute)?;
            start(&from, &to, &self.stream)?;
            self.stream.record_event(None)
        };
        let done = copy().map_err(failed("copy to or from the device"))?;
        Ok(Copy { to, _from: from, done, compute: Arc::clone(&self.compute) })
    }
}

impl Copy {
    /// The copy, for use on the device: work that libtorch queues from now on waits for it.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn on_device(self) -> Result<Tensor> {
        self.compute.wait(&self.done).map_err(failed("wait for a copy"))?;
        // The source may be dropped once the event has occurred; a pinned source has another owner.
        Ok(self.to.shallow_clone())
    }

    /// Whether it has ended.
    pub fn ended(&self) -> bool {
        self.done.is_complete()
    }

    /// Waits until it has ended, for use on the host.
    ///
    /// # Errors
    /// An error of the device.
    pub fn finish(self) -> Result<Tensor> {
        self.done.synchronize().map_err(failed("wait for a copy"))?;
        Ok(self.to.shallow_clone())
    }
}

fn length(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

/// A contiguous tensor's memory on the host.
unsafe fn bytes_of(tensor: &Tensor) -> &[u8] {
    // SAFETY: the caller guarantees that it is contiguous and on the host.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), length(tensor)) }
}

/// As [`bytes_of`], to be written.
#[expect(clippy::mut_from_ref, reason = "tensors own their memory behind a shared handle")]
unsafe fn bytes_of_mut(tensor: &Tensor) -> &mut [u8] {
    // SAFETY: as above, and it has no other user meanwhile.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), length(tensor)) }
}
