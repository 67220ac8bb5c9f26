//! Branches of a run with the files to publish.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use crate::{
    card::{card_folder, published_branch},
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
    /// The folder on disk in which its card may lie.
    pub folder: PathBuf,
    /// Published paths: a folder, or GGUF files.
    pub checkpoints: Vec<PathBuf>,
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

/// The `wanted` branches of a run, or all if none is named, each with its card. The card is the one in its folder, else the one
/// of `cards`, which are in the report's order. `main` comes first, since the Hub shows it by default. All GGUF files are in one
/// branch ([`published_branch`]).
///
/// # Errors
/// If there is no such branch, or a folder cannot be read.
pub fn branches(report: &Report, run: &Path, wanted: &[String], cards: &[String]) -> Result<Vec<Branch>> {
    let names: Vec<&str> = report.branches.iter().map(|output| published_branch(report, output)).collect();
    if let Some(name) = wanted.iter().find(|name| !names.contains(&name.as_str())) {
        let mut seen = BTreeSet::new();
        let known = names.iter().copied().filter(|name| seen.insert(*name));
        return Err(HubError::Branch { branch: name.clone(), known: quoted(known) }.into());
    }
    let mut branches: Vec<Branch> = Vec::new();
    for ((output, name), card) in report.branches.iter().zip(names).zip(cards) {
        if !wanted.is_empty() && !wanted.iter().any(|wanted| wanted == name) {
            continue;
        }
        let (path, folder) = (run.join(&output.branch), card_folder(run, output));
        if path == folder {
            branches.push(Branch::read(&path, name, card)?);
            continue;
        }
        let file = LocalFile::read(&path, &output.branch)?;
        match branches.iter_mut().find(|branch| branch.name == name) {
            Some(gguf) => {
                gguf.files.push(file);
                gguf.checkpoints.push(path);
            }
            None => {
                let files = vec![LocalFile::card(&folder, card)?, file];
                branches.push(Branch { name: name.to_owned(), files, folder, checkpoints: vec![path] });
            }
        }
    }
    branches.iter_mut().for_each(|branch| branch.files.sort_by(|a, b| a.path.cmp(&b.path)));
    branches.sort_by_key(|branch| branch.name != crate::hub::DEFAULT_REVISION);
    Ok(branches)
}

impl Branch {
    fn read(folder: &Path, name: &str, card: &str) -> Result<Self> {
        let mut files = Vec::new();
        for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
            let path = entry.map_err(Error::io("read", folder))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            // Hidden files belong to tools; branches have no folders.
            if let Some(name) = name.filter(|name| !name.starts_with('.') && path.is_file()) {
                files.push(LocalFile::read(&path, name)?);
            }
        }
        if !files.iter().any(|file| file.path == CARD_FILE) {
            files.push(LocalFile::card(folder, card)?);
        }
        let (folder, checkpoints) = (folder.to_owned(), vec![folder.to_owned()]);
        Ok(Self { name: name.to_owned(), files, folder, checkpoints })
    }

    /// Whether a file of the remote holds weights that this branch does not have. A reader would load them, so they are
    /// deleted; other files stay.
    pub(super) fn makes_stale(&self, path: &str) -> bool {
        // A GGUF file is named by its reader, and others of the repository stay.
        let weights = [".safetensors", ".bin"].iter().any(|end| path.ends_with(end)) || path == INDEX_FILE;
        weights && !path.contains('/') && !self.files.iter().any(|file| file.path == path)
    }
}

impl LocalFile {
    /// A file on disk, as `name` in the repository.
    fn read(path: &Path, name: &str) -> Result<Self> {
        let like = ContentId::Sha256(String::new());
        let (size, sha256) = of_file(path, &like).map_err(Error::io("read", path))?;
        let content = Content::File(path.to_owned());
        Ok(Self { path: name.to_owned(), content, size, sha256: sha256.hex().to_owned() })
    }

    /// The card in `folder`, or `text` where it has none.
    fn card(folder: &Path, text: &str) -> Result<Self> {
        let path = folder.join(CARD_FILE);
        if path.exists() {
            return Self::read(&path, CARD_FILE);
        }
        let like = ContentId::Sha256(String::new());
        Ok(Self {
            path: CARD_FILE.to_owned(),
            content: Content::Bytes(text.as_bytes().to_vec()),
            size: text.len() as u64,
            sha256: of_bytes(text.as_bytes(), &like).hex().to_owned(),
        })
    }

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
