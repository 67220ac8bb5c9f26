//! Peak memory of each phase of a run, sampled while it works.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::{self, RecvTimeoutError, Sender},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use crate::{machine::resident_memory, report::StageMemory};

/// Time between two samples; a sample takes some 30 µs.
const EVERY: Duration = Duration::from_millis(20);

/// A phase of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum At {
    Calibrating,
    Solving,
    Packing,
    Finishing,
}

/// Samples the memory of this process until it is dropped.
pub(super) struct MemoryWatch {
    seen: Arc<Seen>,
    thread: Option<(Sender<()>, JoinHandle<()>)>,
}

struct Seen {
    at: AtomicUsize,
    /// Bytes, by [`At`]; 0 before the first sample.
    peaks: [AtomicU64; 4],
}

impl MemoryWatch {
    /// Begins with the peaks of earlier parts of the run.
    pub(super) fn begin(before: StageMemory) -> Self {
        let StageMemory { calibrating, solving, packing, finishing } = before;
        let peaks = [calibrating, solving, packing, finishing].map(|peak| AtomicU64::new(peak.unwrap_or(0)));
        let seen = Arc::new(Seen { at: AtomicUsize::new(At::Calibrating as usize), peaks });
        let (stop, stopped) = mpsc::channel();
        let look = Arc::clone(&seen);
        let thread = thread::spawn(move || {
            while stopped.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                look.look();
            }
        });
        Self { seen, thread: Some((stop, thread)) }
    }

    /// Begins another phase. Of devices that work at the same time, the last call counts.
    pub(super) fn enter(&self, at: At) {
        // What is resident now belongs to the phase before.
        self.seen.look();
        self.seen.at.store(at as usize, Ordering::Relaxed);
    }

    /// The peaks so far.
    pub(super) fn peaks(&self) -> StageMemory {
        self.seen.look();
        let peak =
            |at: At| Some(self.seen.peaks[at as usize].load(Ordering::Relaxed)).filter(|&peak| peak > 0);
        StageMemory {
            calibrating: peak(At::Calibrating),
            solving: peak(At::Solving),
            packing: peak(At::Packing),
            finishing: peak(At::Finishing),
        }
    }
}

impl Seen {
    fn look(&self) {
        if let Some(bytes) = resident_memory() {
            self.peaks[self.at.load(Ordering::Relaxed)].fetch_max(bytes, Ordering::Relaxed);
        }
    }
}

impl Drop for MemoryWatch {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.thread.take() {
            drop(stop);
            thread.join().expect("looking does not panic");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stage_has_its_own_peak() {
        let watch = MemoryWatch::begin(StageMemory { packing: Some(u64::MAX), ..StageMemory::default() });
        watch.enter(At::Solving);
        let before = watch.peaks();
        // Touched, and longer there than a look is away.
        let block = vec![1u8; 256 << 20];
        thread::sleep(5 * EVERY);
        assert!(block.iter().step_by(4096).all(|&byte| byte == 1));
        drop(block);
        watch.enter(At::Finishing);
        let after = watch.peaks();
        let grown = after.solving.unwrap() - before.solving.unwrap();
        assert!(grown > 200 << 20, "{before:?} {after:?}");
        assert!(after.finishing.unwrap() < after.solving.unwrap(), "{after:?}");
        assert_eq!(after.packing, Some(u64::MAX));
    }
}
