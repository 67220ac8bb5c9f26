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
pub(super) struct Ledger {
    free: AtomicU64,
    closed: AtomicBool,
}

/// Bytes that are held; given back when dropped.
#[derive(Debug)]
pub(super) struct Reserved {
    ledger: Arc<Ledger>,
    bytes: u64,
}

impl Ledger {
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
        Some(Reserved { ledger: Arc::clone(self), bytes })
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
        self.ledger.free.fetch_add(self.bytes, Ordering::AcqRel);
    }
}

/// Where a device's activations are kept: beside what computes on them as long as there is room, else in memory, else in
/// a file.
pub(super) struct Room {
    pub(super) device: Device,
    pub(super) kind: Kind,
    /// On the device; for the CPU this is memory.
    pub(super) near: Arc<Ledger>,
    /// In page-locked memory, for devices that are not the CPU.
    pub(super) memory: Arc<Ledger>,
    /// Folder for what fits neither.
    spill: PathBuf,
    pub(super) copies: Option<Copies>,
}

impl Room {
    /// `near` and `memory` are limits in bytes; `memory` is shared by all devices of a run.
    pub(super) fn new(
        device: Device,
        kind: Kind,
        near: Arc<Ledger>,
        memory: Arc<Ledger>,
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
        let ledger = Ledger::new(Some(10));
        let first = ledger.reserve(6).unwrap();
        assert!(ledger.reserve(5).is_none());
        let second = ledger.reserve(4).unwrap();
        drop(first);
        assert!(ledger.reserve(7).is_none());
        drop(second);
        assert!(ledger.reserve(10).is_some());
        ledger.close();
        assert!(ledger.reserve(1).is_none());
        assert!(Ledger::new(None).reserve(1 << 50).is_some());
    }
}
