//! Repositories in memory.

use std::{collections::BTreeMap, fs, path::Path, sync::Arc};

use gptq::hub::{ContentId, of_bytes};
use sha2::{Digest, Sha256};

use crate::helpers::files_below;

/// By `models/owner/name` or `datasets/owner/name`.
pub(crate) type Store = BTreeMap<String, Repository>;

/// A file's content.
#[derive(Debug, Clone)]
pub(crate) struct Blob {
    pub(crate) bytes: Arc<Vec<u8>>,
    pub(crate) id: ContentId,
}

pub(crate) type Tree = BTreeMap<String, Blob>;

#[derive(Debug, Clone, Default)]
pub(crate) struct Repository {
    pub(crate) commits: BTreeMap<String, Tree>,
    pub(crate) branches: BTreeMap<String, String>,
    pub(crate) gated: bool,
    pub(crate) private: bool,
    /// The commits in their order, each with the branch that it was made on.
    pub(crate) log: Vec<(String, String)>,
}

impl Blob {
    pub(crate) fn new(path: &str, bytes: Vec<u8>) -> Self {
        let like = if is_large(path) { ContentId::Sha256 } else { ContentId::GitBlob };
        let id = of_bytes(&bytes, &like(String::new()));
        Self { bytes: Arc::new(bytes), id }
    }
}

/// Whether a file is kept as a large one.
pub(crate) fn is_large(path: &str) -> bool {
    [".safetensors", ".parquet", ".bin"].iter().any(|end| path.ends_with(end))
}

impl Repository {
    /// With one branch, `main`, of one commit with these files.
    pub(crate) fn of(files: impl IntoIterator<Item = (String, Vec<u8>)>) -> Self {
        let mut repository = Self::default();
        let tree = files.into_iter().map(|(path, bytes)| (path.clone(), Blob::new(&path, bytes))).collect();
        repository.commit("main", tree, "first");
        repository
    }

    /// With the files of a folder.
    pub(crate) fn of_folder(folder: &Path) -> Self {
        let names = files_below(folder).into_iter().map(|path| path.to_str().unwrap().to_owned());
        Self::of(names.map(|name| (name.clone(), fs::read(folder.join(name)).unwrap())))
    }

    pub(crate) fn commit(&mut self, branch: &str, tree: Tree, message: &str) -> String {
        let mut hasher = Sha256::new();
        hasher.update(format!("{branch} {message} {} {tree:?}", self.log.len()));
        let commit: String = hasher.finalize()[..20].iter().map(|byte| format!("{byte:02x}")).collect();
        self.commits.insert(commit.clone(), tree);
        self.branches.insert(branch.into(), commit.clone());
        self.log.push((commit.clone(), branch.into()));
        commit
    }

    /// The commit that a revision is at.
    pub(crate) fn resolve(&self, revision: &str) -> Option<String> {
        let commit = self.branches.get(revision).cloned().or_else(|| Some(revision.to_owned()));
        commit.filter(|commit| self.commits.contains_key(commit))
    }

    pub(crate) fn tree(&self, revision: &str) -> &Tree {
        &self.commits[&self.resolve(revision).unwrap()]
    }
}
