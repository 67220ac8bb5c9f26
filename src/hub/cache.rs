//! The Hugging Face cache: contents by digest in `blobs`, revisions as folders of links in `snapshots`, and the last known
//! commit of each branch in `refs`. (`hf-hub` has the same layout, but no public functions for it.)

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use hf_hub::repository::{RepoType, RepoTypeAny};

use super::{digest::ContentId, reference::Reference, transfer::Listed};
use crate::{
    checkpoint::write_file_atomically,
    error::{Error, Result},
    progress::{Event, Progress},
};

/// One repository in the cache.
#[derive(Debug)]
pub(super) struct RepositoryCache {
    folder: PathBuf,
    locks: PathBuf,
}

impl RepositoryCache {
    pub(super) fn new(cache: &Path, kind: RepoTypeAny, reference: &Reference) -> Self {
        let name = format!("{}--{}", kind.plural(), reference.repository().replace('/', "--"));
        Self { folder: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn blob(&self, id: &ContentId) -> PathBuf {
        self.folder.join("blobs").join(id.hex())
    }

    /// Whether the file's content is there and complete.
    pub(super) fn has(&self, file: &Listed) -> bool {
        fs::metadata(self.blob(&file.id)).is_ok_and(|found| found.len() == file.size)
    }

    /// The path of a content until it is complete.
    pub(super) fn incomplete(&self, id: &ContentId) -> PathBuf {
        self.folder.join("blobs").join(format!("{}.incomplete", id.hex()))
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// The commit of a revision when it was last fetched.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let commit = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    pub(super) fn remember(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        create_parent(&path)?;
        write_file_atomically(&path, commit.as_bytes())
    }

    /// Whether the file of this commit is there and complete.
    pub(super) fn holds(&self, commit: &str, path: &str, size: u64) -> bool {
        fs::metadata(self.snapshot(commit).join(path)).is_ok_and(|found| found.len() == size)
    }

    /// Links the file of this commit to its content.
    pub(super) fn link(&self, commit: &str, path: &str, id: &ContentId) -> Result<()> {
        let pointer = self.snapshot(commit).join(path);
        create_parent(&pointer)?;
        let up = "../".repeat(2 + path.matches('/').count());
        let target = format!("{up}blobs/{}", id.hex());
        match fs::remove_file(&pointer) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io("replace", &pointer)(error));
            }
            _ => {}
        }
        match symlink(target, &pointer) {
            // Another process has made the same link.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other.map_err(Error::io("link", &pointer)),
        }
    }

    /// Locks a content against fetches by other processes while the returned file lives; waits for those that fetch it.
    pub(super) fn lock(&self, id: &ContentId, path: &str, progress: &dyn Progress) -> Result<File> {
        let lock = self.locks.join(format!("{}.lock", id.hex()));
        create_parent(&lock)?;
        let file = File::create(&lock).map_err(Error::io("create", &lock))?;
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => {
                progress.event(&Event::Note(&format!("waiting for another process that fetches `{path}`")));
            }
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", &lock)(error)),
        }
        file.lock().map_err(Error::io("lock", &lock))?;
        Ok(file)
    }
}

pub(super) fn create_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(Error::io("create", parent))
}

pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lead_to_contents() {
        let root = tempfile::tempdir().unwrap();
        let reference: Reference = "a/b".parse().unwrap();
        let cache = RepositoryCache::new(root.path(), RepoTypeAny::Dataset, &reference);
        assert_eq!(cache.folder(), root.path().join("datasets--a--b"));
        let (id, commit) = (ContentId::GitBlob("0".repeat(40)), "c".repeat(40));
        create_parent(&cache.blob(&id)).unwrap();
        fs::write(cache.blob(&id), "text").unwrap();
        for path in ["x.txt", "deep/er/x.txt"] {
            for _ in 0..2 {
                cache.link(&commit, path, &id).unwrap();
            }
            assert_eq!(fs::read_to_string(cache.snapshot(&commit).join(path)).unwrap(), "text");
            assert!(cache.holds(&commit, path, 4) && !cache.holds(&commit, path, 5));
        }
        assert_eq!((cache.commit("main"), cache.commit(&commit)), (None, Some(commit.clone())));
        cache.remember("pr/1", &commit).unwrap();
        assert_eq!(cache.commit("pr/1"), Some(commit));
    }
}
