//! One file from the Hub into the cache: on where an earlier transfer stopped, and believed only when size and digest
//! are what the Hub said.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use futures_util::{Stream, StreamExt};
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
    /// The digest that the Hub gives.
    pub id: ContentId,
}

/// Bytes a step of the progress.
pub(super) const STEP: u64 = 1_000_000;

/// Where files come from and where they go.
pub(super) struct Transfer<'a, T: RepoType> {
    pub(super) hub: &'a Hub,
    pub(super) repository: &'a HFRepository<T>,
    pub(super) about: &'a About<'a>,
    pub(super) commit: &'a str,
    pub(super) cache: &'a RepositoryCache,
    pub(super) progress: &'a dyn Progress,
}

impl<T: RepoType> Transfer<'_, T> {
    /// Brings a file into the cache, unless it is there.
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
        let (mut failures, mut from_scratch) = (0, false);
        loop {
            let before = part.length;
            let problem = match self.go_on(file, &mut part).await {
                Ok(()) if part.length < file.size => "the connection was closed".to_owned(),
                Ok(()) => match part.check(file) {
                    Ok(()) => return part.finish(blob),
                    // What an earlier, cut transfer left may be to blame: once again from the start.
                    Err(_) if !from_scratch => {
                        from_scratch = true;
                        part.clear()?;
                        continue;
                    }
                    Err(found) => {
                        part.clear()?;
                        return Err(self.wrong(file, found).into());
                    }
                },
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(problem)) => problem,
            };
            failures = if part.length > before { 0 } else { failures + 1 };
            if failures > settings.retries {
                return Err(HubError::Cut {
                    repository: self.about.reference.repository().to_owned(),
                    file: file.path.clone(),
                    got: part.length,
                    size: file.size,
                    problem,
                }
                .into());
            }
            tokio::time::sleep(settings.pause_after(failures)).await;
        }
    }

    /// Receives what is missing, as far as it comes.
    async fn go_on(&self, file: &Listed, part: &mut Part<'_>) -> Result<(), Failure> {
        if part.length == file.size {
            return Ok(());
        }
        let missing = file.size - part.length;
        let answer = match part.length {
            0 => self.request(file, None).await,
            start => self.request(file, Some(start..file.size)).await,
        };
        let (length, mut stream) = answer.map_err(|error| self.failure(error))?;
        if part.length > 0 && length != Some(missing) {
            // The whole file instead of the rest: a server that knows no ranges.
            part.clear().map_err(Failure::Final)?;
        }
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|error| self.failure(error))?;
            part.append(&piece).map_err(|error| Failure::Final(self.disk(error, part)))?;
            if part.length > file.size {
                // Too much: wrong, whatever else comes.
                return Ok(());
            }
        }
        Ok(())
    }

    async fn request(
        &self,
        file: &Listed,
        range: Option<std::ops::Range<u64>>,
    ) -> Result<(Option<u64>, impl Stream<Item = Result<bytes::Bytes, HFError>> + Unpin), HFError> {
        self.repository
            .download_file_stream()
            .filename(&file.path)
            .revision(self.commit)
            .maybe_range(range)
            .send()
            .await
    }

    fn failure(&self, error: HFError) -> Failure {
        let problem = Problem::from(error);
        if problem.is_transient() {
            Failure::Passing(redacted(problem.text(), self.hub.settings.token.as_ref()))
        } else {
            Failure::Final(self.hub.failure(problem, self.about).into())
        }
    }

    fn disk(&self, error: io::Error, part: &Part<'_>) -> Error {
        if error.kind() != io::ErrorKind::StorageFull {
            return Error::io("write", &part.path)(error);
        }
        let needed = bytes(part.size - part.length.min(part.size));
        let folder = self.cache.folder().to_owned();
        let available = bytes(available_space(&folder).unwrap_or(0));
        ResourceError::DiskSpace { path: folder, available, needed }.into()
    }

    fn wrong(&self, file: &Listed, (expected, found): (String, String)) -> HubError {
        HubError::Content {
            repository: self.about.reference.repository().to_owned(),
            file: file.path.clone(),
            expected,
            found,
        }
    }
}

/// Why a transfer stopped.
enum Failure {
    /// It may go on.
    Passing(String),
    /// It may not.
    Final(Error),
}

/// What has come of a file, on disk, and its digest so far.
struct Part<'a> {
    path: PathBuf,
    file: File,
    length: u64,
    size: u64,
    hasher: Hasher,
    fresh: Hasher,
    /// Steps of progress told.
    told: u64,
    progress: &'a dyn Progress,
}

impl<'a> Part<'a> {
    /// Goes on with what is there.
    fn open(path: PathBuf, listed: &Listed, progress: &'a dyn Progress) -> Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.read(true).append(true).create(true).open(&path);
        let file = file.map_err(Error::io("create", &path))?;
        let length = file.metadata().map_err(Error::io("read", &path))?.len();
        let fresh = listed.id.hasher(listed.size);
        let hasher = fresh.clone();
        let mut part = Self { path, file, length, size: listed.size, hasher, fresh, told: 0, progress };
        if part.length > part.size {
            part.clear()?;
        }
        part.hasher.read(&part.file, part.length).map_err(Error::io("read", &part.path))?;
        part.tell();
        Ok(part)
    }

    fn append(&mut self, piece: &[u8]) -> io::Result<()> {
        self.file.write_all(piece)?;
        self.hasher.update(piece);
        self.length += piece.len() as u64;
        self.tell();
        Ok(())
    }

    /// What has come twice is told once.
    fn tell(&mut self) {
        let steps = self.length / STEP;
        if steps > self.told {
            self.progress.advance(steps - self.told);
            self.told = steps;
        }
    }

    fn clear(&mut self) -> Result<()> {
        self.file.set_len(0).map_err(Error::io("empty", &self.path))?;
        self.length = 0;
        self.hasher = self.fresh.clone();
        Ok(())
    }

    /// What was expected and what was found, where they differ.
    fn check(&self, listed: &Listed) -> Result<(), (String, String)> {
        if self.length != listed.size {
            return Err((format!("{} bytes", listed.size), "more".into()));
        }
        let found = self.hasher.clone().finish();
        if found != listed.id {
            return Err((listed.id.describe(), found.describe()));
        }
        Ok(())
    }

    fn finish(self, blob: &Path) -> Result<()> {
        self.file.sync_all().map_err(Error::io("sync", &self.path))?;
        fs::rename(&self.path, blob).map_err(Error::io("rename", &self.path))
    }
}
