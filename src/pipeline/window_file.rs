//! Activations in a file, window by window, each with its checksum.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    ops::Range,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use xxhash_rust::xxh3::xxh3_128;

use crate::error::{Error, Result};

/// Windows of equal size.
#[derive(Debug)]
pub(super) struct WindowFile {
    path: PathBuf,
    window_bytes: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    file: File,
    /// Of each window; `None` until it is written.
    checksums: Vec<Option<u128>>,
    /// Seconds of checksums and writing.
    seconds: f64,
}

impl WindowFile {
    /// A file without a name in `folder`; the system removes it when the program ends.
    pub(super) fn scratch(folder: &Path, windows: usize, window_bytes: usize) -> Result<Self> {
        let file = tempfile::tempfile_in(folder).map_err(Error::io("create a file in", folder))?;
        Ok(Self::of(folder.join("(activations)"), file, vec![None; windows], window_bytes))
    }

    /// A new file with a name; replaces an older one.
    pub(super) fn create(path: PathBuf, windows: usize, window_bytes: usize) -> Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.map_err(Error::io("create", &path))?;
        Ok(Self::of(path, file, vec![None; windows], window_bytes))
    }

    /// A file that another process of the run has created, to write other windows.
    pub(super) fn share(path: PathBuf, windows: usize, window_bytes: usize) -> Result<Self> {
        let file = File::options().read(true).write(true).open(&path);
        let file = file.map_err(Error::io("open", &path))?;
        Ok(Self::of(path, file, vec![None; windows], window_bytes))
    }

    /// A file that was created and written before, with these checksums. Those `windows` that will be used are read and compared.
    ///
    /// # Errors
    /// When it is not what was written.
    pub(super) fn open(
        path: PathBuf,
        checksums: &[u128],
        window_bytes: usize,
        windows: Range<usize>,
    ) -> Result<Self> {
        let file = File::open(&path).map_err(Error::io("open", &path))?;
        let found = file.metadata().map_err(Error::io("read", &path))?.len();
        let expected = (checksums.len() * window_bytes) as u64;
        if found != expected {
            let problem = format!("it has {found} bytes, where {expected} were written");
            return Err(Error::journal(path, problem));
        }
        let checksums: Vec<_> = checksums.iter().copied().map(Some).collect();
        let opened = Self::of(path, file, checksums, window_bytes);
        let mut windows = windows;
        windows.try_for_each(|window| opened.read(window, 1).map(drop))?;
        Ok(opened)
    }

    fn of(path: PathBuf, file: File, checksums: Vec<Option<u128>>, window_bytes: usize) -> Self {
        Self { path, window_bytes, inner: Mutex::new(Inner { file, checksums, seconds: 0.0 }) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of one window.
    pub(super) fn window_bytes(&self) -> usize {
        self.window_bytes
    }

    /// Writes whole windows, from `first` on.
    pub(super) fn write(&self, first: usize, bytes: &[u8]) -> Result<()> {
        let begun = Instant::now();
        let sums: Vec<_> = bytes.chunks(self.window_bytes).map(|window| Some(xxh3_128(window))).collect();
        let mut inner = self.lock();
        let offset = SeekFrom::Start((first * self.window_bytes) as u64);
        let written = inner.file.seek(offset).and_then(|_| inner.file.write_all(bytes));
        written.map_err(Error::io("write", &self.path))?;
        inner.checksums[first..first + sums.len()].copy_from_slice(&sums);
        inner.seconds += begun.elapsed().as_secs_f64();
        Ok(())
    }

    /// Reads `count` windows from `first` on.
    ///
    /// # Errors
    /// Also when they are not what was written.
    pub(super) fn read(&self, first: usize, count: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; count * self.window_bytes];
        let mut inner = self.lock();
        let offset = SeekFrom::Start((first * self.window_bytes) as u64);
        let read = inner.file.seek(offset).and_then(|_| inner.file.read_exact(&mut bytes));
        read.map_err(Error::io("read", &self.path))?;
        let expected = inner.checksums[first..first + count].to_vec();
        drop(inner);
        for (index, (window, expected)) in bytes.chunks(self.window_bytes).zip(expected).enumerate() {
            if expected != Some(xxh3_128(window)) {
                let problem = format!("window {} is not what was written (checksum)", first + index);
                return Err(Error::journal(&self.path, problem));
            }
        }
        Ok(bytes)
    }

    /// The checksums of some windows, as a message; all of them were written here.
    pub(super) fn checksums_of(&self, windows: Range<usize>) -> Vec<u8> {
        let inner = self.lock();
        let written = inner.checksums[windows].iter().map(|sum| sum.expect("a window that was written"));
        written.flat_map(u128::to_le_bytes).collect()
    }

    /// Takes the checksums of some windows, which another process has written.
    pub(super) fn take_checksums(&self, windows: Range<usize>, message: &[u8]) {
        let sums = message.chunks_exact(size_of::<u128>());
        let sums = sums.map(|bytes| u128::from_le_bytes(bytes.try_into().expect("16 bytes")));
        self.lock().checksums[windows].iter_mut().zip(sums).for_each(|(own, sum)| *own = Some(sum));
    }

    /// Seconds spent on writing so far.
    pub(super) fn seconds(&self) -> f64 {
        self.lock().seconds
    }

    /// Syncs the file to the disk.
    pub(super) fn sync(&self) -> Result<()> {
        // Not under the lock, so that other threads can read meanwhile.
        let file = self.lock().file.try_clone();
        file.and_then(|file| file.sync_data()).map_err(Error::io("sync", &self.path))
    }

    /// The checksum of every window.
    ///
    /// # Errors
    /// When one was not written.
    pub(super) fn checksums(&self) -> Result<Vec<u128>> {
        let inner = self.lock();
        let missing = |window: usize| {
            let source =
                io::Error::new(io::ErrorKind::InvalidData, format!("window {window} was not written"));
            Error::Io { action: "finish", path: self.path.clone(), source }
        };
        inner.checksums.iter().enumerate().map(|(window, sum)| sum.ok_or_else(|| missing(window))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_come_back_and_a_changed_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = WindowFile::scratch(folder.path(), 3, 4).unwrap();
        file.write(1, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        assert!(file.checksums().is_err());
        file.write(0, &[9; 4]).unwrap();
        assert_eq!(file.read(0, 2).unwrap(), [9, 9, 9, 9, 1, 2, 3, 4]);
        file.inner.lock().unwrap().file.seek(SeekFrom::Start(5)).unwrap();
        file.inner.lock().unwrap().file.write_all(&[7]).unwrap();
        assert_eq!(file.read(2, 1).unwrap(), [5, 6, 7, 8]);
        assert!(matches!(file.read(0, 2), Err(Error::Journal(_))));
    }

    #[test]
    fn a_file_is_opened_again_only_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("states");
        let file = WindowFile::create(path.clone(), 2, 4).unwrap();
        file.write(0, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        file.sync().unwrap();
        let sums = file.checksums().unwrap();
        assert_eq!(
            WindowFile::open(path.clone(), &sums, 4, 0..sums.len()).unwrap().read(1, 1).unwrap(),
            [5, 6, 7, 8]
        );
        for broken in [&[1, 2, 3, 4, 5, 6, 7][..], &[1, 2, 3, 4, 5, 6, 7, 9]] {
            std::fs::write(&path, broken).unwrap();
            assert!(matches!(
                WindowFile::open(path.clone(), &sums, 4, 0..sums.len()),
                Err(Error::Journal(_))
            ));
        }
    }
}
