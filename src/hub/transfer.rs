//! Transfer of one file from the Hub into the cache: resumed where an earlier transfer stopped, and accepted only with the
//! size and the digest that the Hub lists. (`hf-hub` neither resumes nor checks.)

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use futures_util::StreamExt;
use hf_hub::{HFError, HFRepository, repository::RepoType};

use super::{
    answer::Problem,
    cache::{RepositoryCache, create_parent},
    client::{About, Hub},
    digest::{ContentId, Hasher},
    settings::redacted,
};
use crate::{
    error::{Error, HubError, ResourceError, Result},
    machine::available_space,
    progress::Progress,
    units::bytes,
};

/// A file of a repository, as the Hub lists it.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Its path below the repository's root.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Its digest.
    pub id: ContentId,
}

/// Bytes of one progress step.
pub(super) const STEP: u64 = 1_000_000;

/// Source and destination of files.
pub(super) struct Transfer<'a, T: RepoType> {
    pub(super) hub: &'a Hub,
    pub(super) repository: &'a HFRepository<T>,
    pub(super) about: &'a About<'a>,
    pub(super) commit: &'a str,
    pub(super) cache: &'a RepositoryCache,
    pub(super) progress: &'a dyn Progress,
}

impl<T: RepoType> Transfer<'_, T> {
    /// Puts a file into the cache, unless it is there.
    pub(super) async fn fetch(&self, file: &Listed) -> Result<()> {
        if !self.cache.has(file) {
            let _lock = self.cache.lock(&file.id, &file.path, self.progress)?;
            if !self.cache.has(file) {
                self.receive(file, &self.cache.blob(&file.id)).await?;
            }
        }
        self.cache.link(self.commit, &file.path, &file.id)
    }

    async fn receive(&self, file: &Listed, blob: &Path) -> Result<()> {
        create_parent(blob)?;
        let mut part = Part::open(self.cache.incomplete(&file.id), file, self.progress)?;
        let settings = &self.hub.settings;
        let repository = || self.about.reference.repository().to_owned();
        let (mut failures, mut restarted) = (0, false);
        loop {
            let before = part.length;
            let Some(problem) = self.resume(&mut part).await? else {
                let Some((expected, found)) = part.mismatch() else { return part.finish(blob) };
                part.clear()?;
                if restarted {
                    let (repository, file) = (repository(), file.path.clone());
                    return Err(HubError::Content { repository, file, expected, found }.into());
                }
                // Bytes of an earlier transfer may be wrong: once more from the start.
                restarted = true;
                continue;
            };
            failures = if part.length > before { 0 } else { failures + 1 };
            if failures > settings.retries {
                let (repository, name) = (repository(), file.path.clone());
                let (got, size) = (part.length, file.size);
                return Err(HubError::Cut { repository, file: name, got, size, problem }.into());
            }
            tokio::time::sleep(settings.pause_after(failures)).await;
        }
    }

    /// Receives what is missing. Returns the reason if the transfer stopped early and may be resumed.
    async fn resume(&self, part: &mut Part<'_>) -> Result<Option<String>> {
        let size = part.listed.size;
        if part.length == size {
            return Ok(None);
        }
        let missing = size - part.length;
        let request = self.repository.download_file_stream().filename(&part.listed.path);
        let request =
            request.revision(self.commit).maybe_range((part.length > 0).then_some(part.length..size));
        let (length, mut stream) = match request.send().await {
            Ok(response) => response,
            Err(error) => return self.stopped(error),
        };
        if part.length > 0 && length != Some(missing) {
            // The server ignores ranges, and sends the whole file instead of the rest.
            part.clear()?;
        }
        while let Some(piece) = stream.next().await {
            match piece {
                Ok(piece) => part.append(&piece).map_err(|error| self.disk(error, part))?,
                Err(error) => return self.stopped(error),
            }
            if part.length > size {
                return Ok(None);
            }
        }
        Ok((part.length < size).then(|| "the connection was closed".to_owned()))
    }

    /// The reason of a transient problem; an error for all others.
    fn stopped(&self, error: HFError) -> Result<Option<String>> {
        let problem = Problem::from(error);
        match problem.transient {
            true => Ok(Some(redacted(&problem.text, self.hub.settings.token.as_ref()))),
            false => Err(self.hub.failure(problem, self.about).into()),
        }
    }

    fn disk(&self, error: io::Error, part: &Part<'_>) -> Error {
        if error.kind() != io::ErrorKind::StorageFull {
            return Error::io("write", &part.path)(error);
        }
        let needed = bytes(part.listed.size.saturating_sub(part.length));
        let folder = self.cache.folder().to_owned();
        let available = bytes(available_space(&folder).unwrap_or(0));
        ResourceError::DiskSpace { path: folder, available, needed }.into()
    }
}

/// The received bytes of a file, on disk, and their digest.
struct Part<'a> {
    listed: &'a Listed,
    path: PathBuf,
    file: File,
    length: u64,
    hasher: Hasher,
    /// Reported steps of progress.
    steps: u64,
    progress: &'a dyn Progress,
}

impl<'a> Part<'a> {
    /// Opens the bytes of an earlier transfer, or none.
    fn open(path: PathBuf, listed: &'a Listed, progress: &'a dyn Progress) -> Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.read(true).append(true).create(true).open(&path);
        let file = file.map_err(Error::io("create", &path))?;
        let length = file.metadata().map_err(Error::io("read", &path))?.len();
        let hasher = listed.id.hasher(listed.size);
        let mut part = Self { listed, path, file, length, hasher, steps: 0, progress };
        if part.length > listed.size {
            part.clear()?;
        }
        part.hasher.read(&part.file, part.length).map_err(Error::io("read", &part.path))?;
        part.report();
        Ok(part)
    }

    fn append(&mut self, piece: &[u8]) -> io::Result<()> {
        self.file.write_all(piece)?;
        self.hasher.update(piece);
        self.length += piece.len() as u64;
        self.report();
        Ok(())
    }

    /// Reports progress; bytes that are received again are not reported again.
    fn report(&mut self) {
        let steps = self.length / STEP;
        if steps > self.steps {
            self.progress.advance(steps - self.steps);
            self.steps = steps;
        }
    }

    fn clear(&mut self) -> Result<()> {
        self.file.set_len(0).map_err(Error::io("empty", &self.path))?;
        self.length = 0;
        self.hasher = self.listed.id.hasher(self.listed.size);
        Ok(())
    }

    /// The Hub's listing and the different content that came; `None` if they are the same.
    fn mismatch(&self) -> Option<(String, String)> {
        if self.length != self.listed.size {
            return Some((format!("{} bytes", self.listed.size), "more".into()));
        }
        let found = self.hasher.clone().finish();
        (found != self.listed.id).then(|| (self.listed.id.describe(), found.describe()))
    }

    fn finish(self, blob: &Path) -> Result<()> {
        self.file.sync_all().map_err(Error::io("sync", &self.path))?;
        fs::rename(&self.path, blob).map_err(Error::io("rename", &self.path))
    }
}
