//! Places of activations: memory budgets and the activation store of a device.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use tch::{Device, Kind, Tensor};

use crate::{
    cuda::{Copies, HostTensor},
    error::Result,
};

/// Memory that a run may take, bytes; `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    /// Activations on each device that is not the CPU.
    pub(super) on_device: Option<u64>,
    /// Activations in memory, of all devices together.
    pub(super) in_memory: Option<u64>,
    /// Tokens that go through the model together.
    pub(super) batch_tokens: usize,
}

impl Limits {
    /// Windows of so many tokens that go through the model together.
    pub(super) fn windows_per_batch(&self, seq_len: usize) -> usize {
        (self.batch_tokens / seq_len).max(1)
    }
}

/// Bytes of one kind of memory that may still be reserved.
#[derive(Debug)]
pub(super) struct MemoryBudget {
    free: AtomicU64,
    closed: AtomicBool,
}

/// Reserved bytes; returned to their budget when dropped.
#[derive(Debug)]
pub(super) struct Reserved {
    budget: Arc<MemoryBudget>,
    bytes: u64,
}

impl MemoryBudget {
    /// `None` is no limit.
    pub(super) fn new(bytes: Option<u64>) -> Arc<Self> {
        Arc::new(Self { free: AtomicU64::new(bytes.unwrap_or(u64::MAX / 2)), closed: AtomicBool::new(false) })
    }

    /// Reserves `bytes`, if so many are free.
    pub(super) fn reserve(self: &Arc<Self>, bytes: u64) -> Option<Reserved> {
        if self.closed.load(Ordering::Acquire) {
            return None;
        }
        let take = |free: u64| free.checked_sub(bytes);
        self.free.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).ok()?;
        Some(Reserved { budget: Arc::clone(self), bytes })
    }

    /// Refuses all further reservations. False when it did so already.
    pub(super) fn close(&self) -> bool {
        !self.closed.swap(true, Ordering::AcqRel)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.budget.free.fetch_add(self.bytes, Ordering::AcqRel);
    }
}

/// Store of a device's activations: on the device while its budget lasts, else in page-locked memory, else in a file.
pub(super) struct ActivationStore {
    pub(super) device: Device,
    pub(super) kind: Kind,
    /// On the device; for the CPU this is memory.
    on_device: Arc<MemoryBudget>,
    /// In page-locked memory, for devices that are not the CPU.
    in_memory: Arc<MemoryBudget>,
    /// Folder for what fits neither.
    pub(super) spill: PathBuf,
    pub(super) copies: Option<Copies>,
    /// Page-locked memory of discarded batches, for later ones of their size.
    idle: Mutex<Vec<(HostTensor, Reserved)>>,
}

impl ActivationStore {
    /// `on_device` is the device's limit in bytes, unless that is the CPU; `in_memory` is shared by all devices of a run.
    pub(super) fn new(
        device: Device,
        kind: Kind,
        on_device: Option<u64>,
        in_memory: &Arc<MemoryBudget>,
        spill: &Path,
    ) -> Result<Arc<Self>> {
        let (on_device, copies) = match device {
            Device::Cpu => (Arc::clone(in_memory), None),
            _ => (MemoryBudget::new(on_device), Some(Copies::new(device)?)),
        };
        Ok(Self::with(device, kind, on_device, in_memory, spill, copies))
    }

    /// With other copies, for tests.
    pub(super) fn with(
        device: Device,
        kind: Kind,
        on_device: Arc<MemoryBudget>,
        in_memory: &Arc<MemoryBudget>,
        spill: &Path,
        copies: Option<Copies>,
    ) -> Arc<Self> {
        let in_memory = Arc::clone(in_memory);
        Arc::new(Self {
            device,
            kind,
            on_device,
            in_memory,
            spill: spill.into(),
            copies,
            idle: Mutex::default(),
        })
    }

    /// Reserves bytes on the device.
    pub(super) fn reserve_on_device(&self, bytes: u64) -> Option<Reserved> {
        self.on_device.reserve(bytes)
    }

    /// Page-locked memory for a batch of the device; `None` if the budget has no space for it, the system locks no more, or the
    /// device is the CPU.
    pub(super) fn host_like(&self, batch: &Tensor) -> Result<Option<(HostTensor, Reserved)>> {
        let Some(copies) = &self.copies else { return Ok(None) };
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let fits =
            |host: &HostTensor| (host.tensor().size(), host.tensor().kind()) == (batch.size(), batch.kind());
        if let Some(at) = idle.iter().position(|(host, _)| fits(host)) {
            return Ok(Some(idle.swap_remove(at)));
        }
        let bytes = (batch.numel() * batch.kind().elt_size_in_bytes()) as u64;
        let reserved = self.in_memory.reserve(bytes).or_else(|| {
            idle.clear();
            self.in_memory.reserve(bytes)
        });
        drop(idle);
        let Some(reserved) = reserved else { return Ok(None) };
        match copies.host_like(batch) {
            Err(error) if error.is_out_of_page_locked_memory() => Ok(None),
            host => Ok(Some((host?, reserved))),
        }
    }

    /// Takes page-locked memory that is not used any more.
    pub(super) fn give_back(&self, host: HostTensor, reserved: Reserved) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push((host, reserved));
    }

    /// Keeps no further activations on the device. False when it did so already.
    pub(super) fn close_device(&self) -> bool {
        self.on_device.close()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_reserved_comes_back() {
        let budget = MemoryBudget::new(Some(10));
        let first = budget.reserve(6).unwrap();
        assert!(budget.reserve(5).is_none());
        let second = budget.reserve(4).unwrap();
        drop(first);
        assert!(budget.reserve(7).is_none());
        drop(second);
        assert!(budget.reserve(10).is_some());
        assert!(budget.close() && !budget.close());
        assert!(budget.reserve(1).is_none());
        assert!(MemoryBudget::new(None).reserve(1 << 50).is_some());
    }
}
