//! Branches of a run with the files to publish.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    checkpoint::INDEX_FILE,
    error::{Error, HubError, Result, quoted},
    hub::{CARD_FILE, ContentId, Listed, of_bytes, of_file},
    report::Report,
};

/// A branch: its name and its files.
#[derive(Debug)]
pub struct Branch {
    /// `main`, `gptq-4bit-32g-actorder_True`.
    pub name: String,
    /// Its files, sorted by path.
    pub files: Vec<LocalFile>,
}

/// A file to publish.
#[derive(Debug)]
pub struct LocalFile {
    /// Its name in the repository.
    pub path: String,
    /// Its content.
    pub content: Content,
    /// Bytes.
    pub size: u64,
    /// SHA-256, hexadecimal.
    pub sha256: String,
}

/// The content of a file.
#[derive(Debug)]
pub enum Content {
    /// In a file on disk.
    File(PathBuf),
    /// In memory.
    Bytes(Vec<u8>),
}

/// The `wanted` branches of a run, or all if none is named, each with its card: the one in its folder, else the one of
/// `cards`, which are in the report's order. `main` comes first, since the Hub shows it by default.
///
/// # Errors
/// If there is no such branch, or a folder cannot be read.
pub fn branches(report: &Report, run: &Path, wanted: &[String], cards: &[String]) -> Result<Vec<Branch>> {
    for name in wanted {
        if !report.branches.iter().any(|branch| branch.branch == *name) {
            let known = quoted(report.branches.iter().map(|branch| &branch.branch));
            return Err(HubError::Branch { branch: name.clone(), known }.into());
        }
    }
    let mut branches = Vec::new();
    for (branch, card) in report.branches.iter().zip(cards) {
        if wanted.is_empty() || wanted.contains(&branch.branch) {
            branches.push(Branch::read(&run.join(&branch.branch), &branch.branch, card)?);
        }
    }
    branches.sort_by_key(|branch| branch.name != crate::hub::DEFAULT_REVISION);
    Ok(branches)
}

impl Branch {
    fn read(folder: &Path, name: &str, card: &str) -> Result<Self> {
        let mut files = Vec::new();
        let like = ContentId::Sha256(String::new());
        for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
            let path = entry.map_err(Error::io("read", folder))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            // Hidden files belong to tools; branches have no folders.
            if let Some(name) = name.filter(|name| !name.starts_with('.') && path.is_file()) {
                let (size, sha256) = of_file(&path, &like).map_err(Error::io("read", &path))?;
                let (path, content) = (name.to_owned(), Content::File(path.clone()));
                files.push(LocalFile { path, content, size, sha256: sha256.hex().to_owned() });
            }
        }
        if !files.iter().any(|file| file.path == CARD_FILE) {
            files.push(LocalFile {
                path: CARD_FILE.to_owned(),
                content: Content::Bytes(card.as_bytes().to_vec()),
                size: card.len() as u64,
                sha256: of_bytes(card.as_bytes(), &like).hex().to_owned(),
            });
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Self { name: name.to_owned(), files })
    }

    /// Whether a file of the remote holds weights that this branch does not have. A reader would load them, so they are
    /// deleted; other files stay.
    pub(super) fn makes_stale(&self, path: &str) -> bool {
        let weights = path.ends_with(".safetensors") || path == INDEX_FILE || path.ends_with(".bin");
        weights && !path.contains('/') && !self.files.iter().any(|file| file.path == path)
    }
}

impl LocalFile {
    /// Whether the remote's file has the same content.
    pub(super) fn is(&self, listed: &Listed) -> Result<bool> {
        Ok(self.size == listed.size && self.id_like(&listed.id)? == listed.id)
    }

    /// The digest of the same kind as `like`.
    pub(super) fn id_like(&self, like: &ContentId) -> Result<ContentId> {
        match (like, &self.content) {
            (ContentId::Sha256(_), _) => Ok(ContentId::Sha256(self.sha256.clone())),
            (ContentId::GitBlob(_), Content::Bytes(bytes)) => Ok(of_bytes(bytes, like)),
            (ContentId::GitBlob(_), Content::File(path)) => {
                Ok(of_file(path, like).map_err(Error::io("read", path))?.1)
            }
        }
    }
}
