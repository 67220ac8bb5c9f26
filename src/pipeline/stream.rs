//! Activations of many windows, batch by batch, each where the activation store has space for it.

use std::{ops::Range, sync::Arc};

use tch::{Kind, Tensor};

use super::{
    memory::{ActivationStore, Reserved},
    window_file::WindowFile,
};
use crate::{
    checkpoint::to_bytes,
    cuda::{Copy, HostTensor},
    error::{Result, TorchContext},
};

/// Activations `[B, S, width]` of a range of windows, in batches of whole windows.
pub(super) struct Stream {
    store: Arc<ActivationStore>,
    /// Windows of each batch, counted from the run's first.
    batches: Vec<Range<usize>>,
    slots: Vec<Slot>,
    /// `[S, width]`.
    window: [i64; 2],
    /// The batch that is being copied to the device before it is used.
    upload: Option<(usize, Copy)>,
    /// Copies from the device under way: their sources must live.
    downloads: Vec<Copy>,
    /// The batch that is being copied from the device for a journal.
    journaled: Option<Journaled>,
    scratch: Option<Arc<WindowFile>>,
}

/// A batch to be written to a file, from this window on, once it has been copied from the device.
struct Journaled {
    copy: Copy,
    file: Arc<WindowFile>,
    first: usize,
    /// The memory, unless the batch stays in it.
    memory: Option<(HostTensor, Reserved)>,
}

enum Slot {
    Empty,
    /// On the device that computes.
    Device(Tensor, #[expect(dead_code, reason = "returned to the budget when dropped")] Reserved),
    /// In page-locked memory.
    Pinned(HostTensor, Reserved),
    /// In a file, from this window on.
    File(Arc<WindowFile>, usize),
}

impl Stream {
    /// An empty one; `window` is `[S, width]`.
    pub(super) fn new(
        store: &Arc<ActivationStore>,
        windows: Range<usize>,
        per_batch: usize,
        window: [usize; 2],
    ) -> Self {
        let starts = windows.clone().step_by(per_batch);
        let batches = starts.map(|start| start..(start + per_batch).min(windows.end)).collect();
        Self::of(store, batches, window)
    }

    /// An empty one with the same windows in the same batches.
    pub(super) fn empty_like(&self, window: [usize; 2]) -> Self {
        Self::of(&self.store, self.batches.clone(), window)
    }

    fn of(store: &Arc<ActivationStore>, batches: Vec<Range<usize>>, window: [usize; 2]) -> Self {
        Self {
            store: Arc::clone(store),
            slots: batches.iter().map(|_| Slot::Empty).collect(),
            batches,
            window: window.map(|size| size as i64),
            upload: None,
            downloads: Vec::new(),
            journaled: None,
            scratch: None,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.batches.len()
    }

    /// Windows of each batch.
    pub(super) fn batches(&self) -> &[Range<usize>] {
        &self.batches
    }

    /// Batch `i` on the device that computes. Starts the copy of the next one to that device, if it is in page-locked memory.
    pub(super) fn get(&mut self, i: usize) -> Result<Tensor> {
        let batch = match self.upload.take() {
            Some((index, copy)) if index == i => copy.on_device()?,
            _ => self.fetch(i)?,
        };
        if let (Some(Slot::Pinned(host, _)), Some(copies)) = (self.slots.get(i + 1), &self.store.copies) {
            self.upload = Some((i + 1, copies.upload(host)?));
        }
        Ok(batch)
    }

    /// Some windows on the device that computes, joined from their batches.
    pub(super) fn of_windows(&mut self, windows: &Range<usize>) -> Result<Tensor> {
        if let Some(i) = self.batches.iter().position(|batch| batch == windows) {
            return self.get(i);
        }
        let mut parts = Vec::new();
        for i in 0..self.len() {
            let batch = self.batches[i].clone();
            let (start, end) = (batch.start.max(windows.start), batch.end.min(windows.end));
            if start < end {
                let part = self.fetch(i)?.f_narrow(0, (start - batch.start) as i64, (end - start) as i64);
                parts.push(part.torch("split a batch")?);
            }
        }
        Tensor::f_cat(&parts, 0).torch("join batches")
    }

    fn fetch(&self, i: usize) -> Result<Tensor> {
        match &self.slots[i] {
            Slot::Empty => unreachable!("batches are put before they are got"),
            Slot::Device(tensor, _) => Ok(tensor.shallow_clone()),
            Slot::Pinned(host, _) => match &self.store.copies {
                Some(copies) => copies.upload(host)?.on_device(),
                None => unreachable!("only devices other than the CPU have pinned batches"),
            },
            Slot::File(file, first) => self.read(i, file, *first, self.store.kind),
        }
    }

    /// Batch `i` from a file of activations of `kind`, where it begins at window `first`.
    fn read(&self, i: usize, file: &WindowFile, first: usize, kind: Kind) -> Result<Tensor> {
        let windows = self.batches[i].len();
        let bytes = file.read(first, windows)?;
        let size = [windows as i64, self.window[0], self.window[1]];
        let tensor =
            Tensor::f_from_data_size(&bytes, &size, kind).and_then(|t| t.f_to_device(self.store.device));
        tensor.and_then(|t| t.f_to_kind(self.store.kind)).torch("read activations back")
    }

    /// Drops batch `i`.
    pub(super) fn discard(&mut self, i: usize) {
        if let Slot::Pinned(host, reserved) = std::mem::replace(&mut self.slots[i], Slot::Empty) {
            self.store.give_back(host, reserved);
        }
    }

    /// Keeps batch `i`, which is on the device that computes.
    pub(super) fn put(&mut self, i: usize, batch: Tensor) -> Result<()> {
        self.slots[i] = match self.keep_in_memory(i, batch)? {
            Ok(slot) => slot,
            Err(batch) => {
                let file = self.file(i, &batch)?;
                Slot::File(file, self.batches[i].start - self.batches[0].start)
            }
        };
        Ok(())
    }

    /// Keeps batch `i`, which is on the device that computes, and writes it to a `file` of all windows. Where the budgets have no
    /// space for it, the file has the only copy. A batch of a device is written while the device computes the next one, or by
    /// [`Stream::finish_journal`].
    pub(super) fn put_in_journal(&mut self, i: usize, batch: Tensor, file: &Arc<WindowFile>) -> Result<()> {
        let first = self.batches[i].start;
        let batch = batch.f_contiguous().torch("lay out activations")?;
        let Some((host, reserved)) = self.store.host_like(&batch)? else {
            file.write(first, &to_bytes(&batch)?)?;
            self.slots[i] =
                self.keep_in_memory(i, batch)?.unwrap_or_else(|_| Slot::File(Arc::clone(file), first));
            return Ok(());
        };
        let copies = self.store.copies.as_ref().expect("page-locked memory is for copies");
        let copy = copies.download(batch.shallow_clone(), &host)?;
        self.discard(i);
        let bytes = (batch.numel() * batch.kind().elt_size_in_bytes()) as u64;
        let memory = match self.store.reserve_on_device(bytes) {
            Some(on_device) => {
                self.slots[i] = Slot::Device(batch, on_device);
                Some((host, reserved))
            }
            None => {
                self.slots[i] = Slot::Pinned(host, reserved);
                None
            }
        };
        let before = self.journaled.replace(Journaled { copy, file: Arc::clone(file), first, memory });
        self.write(before)
    }

    /// Writes what [`Stream::put_in_journal`] has not written yet.
    pub(super) fn finish_journal(&mut self) -> Result<()> {
        let last = self.journaled.take();
        self.write(last)
    }

    fn write(&self, journaled: Option<Journaled>) -> Result<()> {
        let Some(Journaled { copy, file, first, memory }) = journaled else { return Ok(()) };
        file.write(first, copy.finish()?)?;
        if let Some((host, reserved)) = memory {
            self.store.give_back(host, reserved);
        }
        Ok(())
    }

    /// Takes all batches from a `file` of all windows, with activations of `kind`. Batches that the budgets have no space for stay
    /// there.
    pub(super) fn take_from_journal(&mut self, file: &Arc<WindowFile>, kind: Kind) -> Result<()> {
        for i in 0..self.len() {
            let first = self.batches[i].start;
            let batch = self.read(i, file, first, kind)?;
            if kind == self.store.kind {
                self.slots[i] =
                    self.keep_in_memory(i, batch)?.unwrap_or_else(|_| Slot::File(Arc::clone(file), first));
            } else {
                self.put(i, batch)?;
            }
        }
        Ok(())
    }

    /// A slot on the device or in memory with batch `i`; the batch itself where the budgets have no space for it.
    fn keep_in_memory(&mut self, i: usize, batch: Tensor) -> Result<std::result::Result<Slot, Tensor>> {
        let bytes = (batch.numel() * batch.kind().elt_size_in_bytes()) as u64;
        self.discard(i);
        if let Some(reserved) = self.store.reserve_on_device(bytes) {
            return Ok(Ok(Slot::Device(batch, reserved)));
        }
        let Some((host, reserved)) = self.store.host_like(&batch)? else { return Ok(Err(batch)) };
        let copies = self.store.copies.as_ref().expect("page-locked memory is for copies");
        self.downloads.retain(|copy| !copy.ended());
        let batch = batch.f_contiguous().torch("lay out activations")?;
        self.downloads.push(copies.download(batch, &host)?);
        Ok(Ok(Slot::Pinned(host, reserved)))
    }

    fn file(&mut self, i: usize, batch: &Tensor) -> Result<Arc<WindowFile>> {
        let file = match &self.scratch {
            Some(file) => Arc::clone(file),
            None => {
                let windows = self.batches.iter().map(Range::len).sum();
                let window_bytes =
                    batch.kind().elt_size_in_bytes() * (self.window[0] * self.window[1]) as usize;
                let file = Arc::new(WindowFile::scratch(&self.store.spill, windows, window_bytes)?);
                self.scratch = Some(Arc::clone(&file));
                file
            }
        };
        file.write(self.batches[i].start - self.batches[0].start, &to_bytes(batch)?)?;
        Ok(file)
    }

    /// Moves batches from the device to memory or a file.
    pub(super) fn leave_device(&mut self) -> Result<()> {
        self.upload = None;
        for i in 0..self.slots.len() {
            if matches!(self.slots[i], Slot::Device(..)) {
                let Slot::Device(tensor, _) = std::mem::replace(&mut self.slots[i], Slot::Empty) else {
                    continue;
                };
                self.put(i, tensor)?;
            }
        }
        // Only then is their memory free.
        for copy in self.downloads.drain(..) {
            copy.finish()?;
        }
        Ok(())
    }

    /// Halves batch `i`, if it has more than one window. False if it has not.
    pub(super) fn halve(&mut self, i: usize) -> Result<bool> {
        let windows = self.batches[i].clone();
        if windows.len() < 2 {
            return Ok(false);
        }
        self.upload = None;
        let batch = match &self.slots[i] {
            Slot::Empty => None,
            _ => Some(self.fetch(i)?),
        };
        self.discard(i);
        let half = windows.len() / 2;
        self.batches.splice(i..=i, [windows.start..windows.start + half, windows.start + half..windows.end]);
        self.slots.splice(i..=i, [Slot::Empty, Slot::Empty]);
        if let Some(batch) = batch {
            let part = |first: usize, count: usize| {
                let part = batch.f_narrow(0, first as i64, count as i64).and_then(|t| t.f_contiguous());
                part.torch("split a batch")
            };
            self.put(i, part(0, half)?)?;
            self.put(i + 1, part(half, windows.len() - half)?)?;
        }
        Ok(true)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        (0..self.slots.len()).for_each(|i| self.discard(i));
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::{
        cuda::{Copies, Gpu},
        cuda_host::driver::{Driver, with_driver},
        pipeline::memory::MemoryBudget,
    };

    fn batch(from: f64, windows: i64) -> Tensor {
        (Tensor::arange(windows * 6, (Kind::Float, Device::Cpu)) + from).reshape([windows, 2, 3])
    }

    fn stream(memory: u64, folder: &std::path::Path) -> Stream {
        let memory = MemoryBudget::new(Some(memory));
        let store = ActivationStore::new(Device::Cpu, Kind::Float, None, &memory, folder).unwrap();
        Stream::new(&store, 3..10, 2, [2, 3])
    }

    #[test]
    fn batches_come_back_from_memory_and_from_files() {
        let folder = tempfile::tempdir().unwrap();
        for memory in [0, 100, 10_000] {
            let mut stream = stream(memory, folder.path());
            assert_eq!(stream.batches(), [3..5, 5..7, 7..9, 9..10]);
            let sizes = [2, 2, 2, 1];
            for round in 0..3 {
                for (i, &windows) in sizes.iter().enumerate() {
                    stream.put(i, batch(f64::from(round * 100 + i as i32), windows)).unwrap();
                }
                for (i, &windows) in sizes.iter().enumerate() {
                    let expected = batch(f64::from(round * 100 + i as i32), windows);
                    assert_eq!(stream.get(i).unwrap(), expected);
                }
            }
            stream.discard(1);
            stream.leave_device().unwrap();
            assert_eq!(stream.get(2).unwrap(), batch(202.0, 2));
        }
    }

    #[test]
    fn windows_are_found_in_whatever_batches_they_are() {
        let folder = tempfile::tempdir().unwrap();
        for memory in [0, 10_000] {
            let mut stream = stream(memory, folder.path());
            let all = Tensor::arange(7 * 6, (Kind::Float, Device::Cpu)).reshape([7, 2, 3]);
            for (i, batch) in stream.batches().to_vec().into_iter().enumerate() {
                let part = all.narrow(0, batch.start as i64 - 3, batch.len() as i64);
                stream.put(i, part.contiguous()).unwrap();
            }
            for windows in [3..5, 4..5, 4..8, 9..10, 3..10] {
                let expected = all.narrow(0, windows.start as i64 - 3, windows.len() as i64);
                assert_eq!(stream.of_windows(&windows).unwrap(), expected, "{windows:?}");
            }
        }
    }

    #[test]
    fn a_journal_holds_all_batches_and_gives_them_back() {
        let folder = tempfile::tempdir().unwrap();
        for memory in [0, 100, 10_000] {
            // 10 windows, of which this stream has the last 7.
            let file = Arc::new(WindowFile::create(folder.path().join("states"), 10, 24).unwrap());
            file.write(0, &[0; 3 * 24]).unwrap();
            let mut first = stream(memory, folder.path());
            for (i, windows) in [2, 2, 2, 1].into_iter().enumerate() {
                first.put_in_journal(i, batch(100.0 * i as f64, windows), &file).unwrap();
            }
            let sums = file.checksums().unwrap();
            let again = Arc::new(WindowFile::open(file.path().into(), &sums, 24, 3..10).unwrap());
            let mut second = stream(memory, folder.path());
            second.take_from_journal(&again, Kind::Float).unwrap();
            for (i, windows) in [2, 2, 2, 1].into_iter().enumerate() {
                assert_eq!(first.get(i).unwrap(), batch(100.0 * i as f64, windows));
                assert_eq!(second.get(i).unwrap(), batch(100.0 * i as f64, windows));
            }
        }
    }

    /// A store whose device is the tests' driver.
    fn store_of(
        driver: &Driver,
        on_device: u64,
        memory: u64,
        folder: &std::path::Path,
    ) -> Arc<ActivationStore> {
        driver.add_device("NVIDIA H200", (9, 0), 132, 227 << 10);
        let copies = Copies::on(&Gpu::numbered(0).unwrap(), Device::Cpu).unwrap();
        let [on_device, memory] = [on_device, memory].map(|bytes| MemoryBudget::new(Some(bytes)));
        ActivationStore::with(Device::Cpu, Kind::Float, on_device, &memory, folder, Some(copies))
    }

    /// The host does not wait for the copy of the batch that it puts, but writes the one before.
    #[test]
    fn journals_are_written_while_the_device_computes() {
        with_driver("pipeline::stream::tests::journals_are_written_while_the_device_computes", |driver| {
            let folder = tempfile::tempdir().unwrap();
            // Batches stay on the device, or in page-locked memory.
            for on_device in [10_000, 0] {
                let store = store_of(driver, on_device, 10_000, folder.path());
                let mut stream = Stream::new(&store, 0..6, 2, [2, 3]);
                let file = Arc::new(WindowFile::create(folder.path().join("states"), 6, 24).unwrap());
                let batch = |i: usize| batch(100.0 * i as f64, 2);
                let written = |i: usize| file.read(2 * i, 2).ok();
                for i in 0..3 {
                    stream.put_in_journal(i, batch(i), &file).unwrap();
                    assert!(driver.pending() > 0, "batch {i} is waited for");
                    assert_eq!(written(i), None);
                    for before in 0..i {
                        assert_eq!(written(before), Some(to_bytes(&batch(before)).unwrap()));
                    }
                }
                stream.finish_journal().unwrap();
                assert_eq!(written(2), Some(to_bytes(&batch(2)).unwrap()));
                for i in 0..3 {
                    assert_eq!(stream.get(i).unwrap(), batch(i));
                }
            }
        });
    }

    #[test]
    fn page_locked_memory_is_reused_within_its_budget() {
        with_driver("pipeline::stream::tests::page_locked_memory_is_reused_within_its_budget", |driver| {
            let folder = tempfile::tempdir().unwrap();
            // Two batches of 48 bytes; the third goes to a file.
            let store = store_of(driver, 0, 100, folder.path());
            for round in 0..4 {
                let mut stream = Stream::new(&store, 0..6, 2, [2, 3]);
                for i in 0..3 {
                    stream.put(i, batch(f64::from(round) + i as f64, 2)).unwrap();
                }
                for i in 0..3 {
                    assert_eq!(stream.get(i).unwrap(), batch(f64::from(round) + i as f64, 2));
                }
                drop(stream);
                assert_eq!((driver.calls("cuMemHostAlloc"), driver.alive().page_locked), (2, 2), "{round}");
            }
            // Batches of another size take what is not used.
            let mut stream = Stream::new(&store, 0..3, 3, [2, 3]);
            stream.put(0, batch(7.0, 3)).unwrap();
            assert_eq!(stream.get(0).unwrap(), batch(7.0, 3));
            assert_eq!(driver.alive().page_locked, 1);
            drop((stream, store));
            assert_eq!(driver.alive().page_locked, 0);
        });
    }

    #[test]
    fn batches_that_the_system_locks_no_memory_for_go_to_a_file() {
        with_driver(
            "pipeline::stream::tests::batches_that_the_system_locks_no_memory_for_go_to_a_file",
            |driver| {
                let folder = tempfile::tempdir().unwrap();
                let mut stream = Stream::new(&store_of(driver, 0, 10_000, folder.path()), 0..6, 2, [2, 3]);
                driver.limit_page_locked(48);
                for i in 0..3 {
                    stream.put(i, batch(100.0 * i as f64, 2)).unwrap();
                }
                assert_eq!(driver.alive().page_locked, 1);
                for i in 0..3 {
                    assert_eq!(stream.get(i).unwrap(), batch(100.0 * i as f64, 2));
                }
            },
        );
    }

    #[test]
    fn a_batch_can_be_halved() {
        let folder = tempfile::tempdir().unwrap();
        for memory in [0, 10_000] {
            let mut stream = stream(memory, folder.path());
            for i in 0..3 {
                stream.put(i, batch(100.0 * i as f64, 2)).unwrap();
            }
            stream.put(3, batch(300.0, 1)).unwrap();
            assert!(stream.halve(1).unwrap());
            assert!(!stream.halve(1).unwrap());
            assert_eq!(stream.batches(), [3..5, 5..6, 6..7, 7..9, 9..10]);
            assert_eq!(stream.get(2).unwrap(), batch(106.0, 1));
            assert_eq!(stream.get(3).unwrap(), batch(200.0, 2));
        }
    }
}
