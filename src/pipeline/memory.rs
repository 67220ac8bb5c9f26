//! How much may be held, and where it goes otherwise.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use tch::{Device, Kind};

use crate::{cuda::Copies, error::Result};

/// Bytes that may be held somewhere.
#[derive(Debug)]
pub(super) struct MemoryBudget {
    free: AtomicU64,
    closed: AtomicBool,
}

/// Bytes that are held; given back when dropped.
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

    /// `bytes` of what is free, if there are so many.
    pub(super) fn reserve(self: &Arc<Self>, bytes: u64) -> Option<Reserved> {
        if !self.is_open() {
            return None;
        }
        let take = |free: u64| free.checked_sub(bytes);
        self.free.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).ok()?;
        Some(Reserved { budget: Arc::clone(self), bytes })
    }

    /// Whether anything more may be held.
    pub(super) fn is_open(&self) -> bool {
        !self.closed.load(Ordering::Acquire)
    }

    /// From now on nothing more may be held.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.budget.free.fetch_add(self.bytes, Ordering::AcqRel);
    }
}

/// Where a device's activations are kept: beside what computes on them as long as there is room, else in memory, else in
/// a file.
pub(super) struct ActivationStore {
    pub(super) device: Device,
    pub(super) kind: Kind,
    /// On the device; for the CPU this is memory.
    pub(super) near: Arc<MemoryBudget>,
    /// In page-locked memory, for devices that are not the CPU.
    pub(super) memory: Arc<MemoryBudget>,
    /// Folder for what fits neither.
    spill: PathBuf,
    pub(super) copies: Option<Copies>,
}

impl ActivationStore {
    /// `near` and `memory` are limits in bytes; `memory` is shared by all devices of a run.
    pub(super) fn new(
        device: Device,
        kind: Kind,
        near: Arc<MemoryBudget>,
        memory: Arc<MemoryBudget>,
        spill: &Path,
    ) -> Result<Self> {
        let copies = match device {
            Device::Cpu => None,
            _ => Some(Copies::new(device)?),
        };
        Ok(Self { device, kind, near, memory, spill: spill.into(), copies })
    }

    pub(super) fn spill(&self) -> &Path {
        &self.spill
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
        budget.close();
        assert!(budget.reserve(1).is_none());
        assert!(MemoryBudget::new(None).reserve(1 << 50).is_some());
    }
}
