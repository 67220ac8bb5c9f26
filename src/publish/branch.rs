//! A branch as it is to be published.

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
    /// By path.
    pub files: Vec<LocalFile>,
}

/// A file that is to be published.
#[derive(Debug)]
pub struct LocalFile {
    /// Its name in the repository.
    pub path: String,
    /// What is in it.
    pub content: Content,
    /// Bytes.
    pub size: u64,
    /// SHA-256, hexadecimal.
    pub sha256: String,
}

/// Where a file's content is.
#[derive(Debug)]
pub enum Content {
    /// On disk.
    File(PathBuf),
    /// Here.
    Bytes(Vec<u8>),
}

/// The branches of a run, or those of them that are `wanted`, each with its card: the one in its folder, else the one
/// of `cards`, which are in the report's order. `main` comes first: it is what people see.
///
/// # Errors
/// When there is no such branch, or a folder cannot be read.
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
            // What is hidden is of some tool's own; branches have no folders.
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

    /// Whether a file of the other side is one of weights that this branch does not have. They would be taken for its
    /// own; anything else that is there stays.
    pub(super) fn makes_stale(&self, path: &str) -> bool {
        let weights = path.ends_with(".safetensors") || path == INDEX_FILE || path.ends_with(".bin");
        weights && !path.contains('/') && !self.files.iter().any(|file| file.path == path)
    }
}

impl LocalFile {
    /// Whether the other side has the same content.
    pub(super) fn is(&self, listed: &Listed) -> Result<bool> {
        Ok(self.size == listed.size && self.id_like(&listed.id)? == listed.id)
    }

    /// The digest of the kind that the other side gives.
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
