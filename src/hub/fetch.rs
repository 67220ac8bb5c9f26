//! Fetching models and datasets from the Hub into the cache, or finding them there.

use std::{
    path::{Path, PathBuf},
    slice,
};

use futures_util::{StreamExt, TryStreamExt, stream};
use hf_hub::{
    HFError, HFRepository,
    repository::{RepoType, RepoTypeAny},
};
use serde_json::Value;

use super::{
    cache::{RepositoryCache, is_commit},
    client::{About, Hub},
    files,
    reference::Reference,
    transfer::{Listed, STEP, Transfer},
};
use crate::{
    checkpoint::{NoWeights, base_names, needs_base_name},
    error::{Error, HubError, Result, quoted},
    machine::require_space,
    progress::{Event, Progress},
    units::bytes,
};

/// A revision of a repository in the cache, with the requested files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The folder with its files.
    pub folder: PathBuf,
    /// The commit.
    pub commit: String,
    /// Whether the repository is gated: only users who accepted its conditions get its files. `None` without a response
    /// of the Hub.
    pub gated: Option<bool>,
}

/// The wanted files of a repository.
enum Wish<'a> {
    /// Files that a model needs.
    Model,
    /// These.
    Files(&'a [String]),
}

/// The commit of a revision, and whether the repository is gated, as the Hub states them.
type Head = (Option<String>, Option<Value>);

impl Hub {
    /// Fetches a model into the cache: configuration, tokenizer, weights, licence and card. The weights are safetensors, else
    /// `pytorch_model.bin` or its shards.
    ///
    /// # Errors
    /// If the Hub refuses, the repository holds no such model, or the transfer fails for good.
    pub fn fetch_model(&self, reference: &Reference, progress: &dyn Progress) -> Result<Snapshot> {
        let repository = self.client.model(reference.owner(), reference.name());
        let about = About { kind: RepoTypeAny::Model, reference, action: "read" };
        let head = async || {
            let info = repository.info().revision(reference.revision()).send().await?;
            Ok((info.sha, info.gated))
        };
        self.fetch(&repository, &about, &Wish::Model, head, progress)
    }

    /// Fetches files of a dataset into the cache.
    ///
    /// # Errors
    /// As [`Hub::fetch_model`].
    pub fn fetch_dataset(
        &self,
        reference: &Reference,
        files: &[String],
        progress: &dyn Progress,
    ) -> Result<Snapshot> {
        let repository = self.client.dataset(reference.owner(), reference.name());
        let about = About { kind: RepoTypeAny::Dataset, reference, action: "read" };
        let head = async || {
            let info = repository.info().revision(reference.revision()).send().await?;
            Ok((info.sha, info.gated))
        };
        self.fetch(&repository, &about, &Wish::Files(files), head, progress)
    }

    fn fetch<T: RepoType>(
        &self,
        repository: &HFRepository<T>,
        about: &About<'_>,
        wish: &Wish<'_>,
        head: impl AsyncFn() -> Result<Head, HFError>,
        progress: &dyn Progress,
    ) -> Result<Snapshot> {
        let reference = about.reference;
        let cache = RepositoryCache::new(&self.settings.cache, about.kind, reference);
        if self.settings.offline {
            let why = "HF_HUB_OFFLINE is set".to_owned();
            return self.cached(&cache, reference, wish, why);
        }
        match self.block_on(self.fetch_online(repository, about, &cache, wish, head, progress)) {
            Err(error) if matches!(&error, Error::Hub(error) if error.is_passing()) => {
                let snapshot = match self.cached(&cache, reference, wish, error.to_string()) {
                    Err(Error::Hub(HubError::NotCached { .. }))
                        if cache.commit(reference.revision()).is_none() =>
                    {
                        return Err(error);
                    }
                    other => other?,
                };
                let commit = &snapshot.commit[..12];
                progress.event(&Event::Warning(&format!(
                    "{error}; using {reference} from the cache, as it was at commit {commit}"
                )));
                Ok(snapshot)
            }
            other => other,
        }
    }

    async fn fetch_online<T: RepoType>(
        &self,
        repository: &HFRepository<T>,
        about: &About<'_>,
        cache: &RepositoryCache,
        wish: &Wish<'_>,
        head: impl AsyncFn() -> Result<Head, HFError>,
        progress: &dyn Progress,
    ) -> Result<Snapshot> {
        let (commit, gated) = self.head(repository, about, head).await?;
        let listed = self.list(about, &commit).await?;
        let transfer = Transfer { hub: self, repository, about, commit: &commit, cache, progress };
        let pick = |names: &[String]| -> Result<Vec<Listed>> {
            let find = |name: &String| listed.iter().find(|file| file.path == *name).cloned();
            let missing = |name: &String| lacks(about.reference, NoWeights::Missing(format!("`{name}`")));
            names.iter().map(|name| find(name).ok_or_else(|| missing(name))).collect()
        };
        match wish {
            Wish::Files(names) => self.all(&transfer, &pick(names)?).await?,
            Wish::Model => {
                let names: Vec<&str> = listed.iter().map(|file| file.path.as_str()).collect();
                let lacks = |lack| lacks(about.reference, lack);
                let base_names = match needs_base_name(&names) {
                    true => {
                        self.all(&transfer, &pick(&files::configs(&names).map_err(lacks)?)?).await?;
                        base_names(&cache.snapshot(&commit))?
                    }
                    false => Vec::new(),
                };
                let wanted = files::of_model(&names, &base_names).map_err(lacks)?;
                let mut files = pick(&wanted.files)?;
                if let Some(index) = wanted.index {
                    self.all(&transfer, &pick(slice::from_ref(&index))?).await?;
                    let shards = files::shards(&cache.snapshot(&commit).join(index))?;
                    files.extend(pick(&shards.into_iter().collect::<Vec<_>>())?);
                }
                self.all(&transfer, &files).await?;
            }
        }
        cache.remember(about.reference.revision(), &commit)?;
        Ok(Snapshot { folder: cache.snapshot(&commit), commit, gated: Some(gated) })
    }

    /// The commit of a revision, and whether the repository is gated.
    async fn head<T: RepoType>(
        &self,
        repository: &HFRepository<T>,
        about: &About<'_>,
        head: impl AsyncFn() -> Result<Head, HFError>,
    ) -> Result<(String, bool)> {
        let (sha, gated) = match self.ask(about, || head()).await {
            Err(Error::Hub(HubError::Revision { repository: name, revision, .. })) => {
                let known = match repository.list_refs().send().await {
                    Ok(refs) => quoted(refs.branches.iter().chain(&refs.tags).map(|found| &found.name)),
                    Err(_) => "others".into(),
                };
                return Err(HubError::Revision { repository: name, revision, known }.into());
            }
            other => other?,
        };
        let gated = gated.is_some_and(|gated| gated != false);
        match sha.filter(|sha| is_commit(sha)) {
            Some(sha) => Ok((sha, gated)),
            None => {
                let action = format!("say what commit {} is at", about.reference);
                Err(HubError::Answer { action, message: "its answer has none".into() }.into())
            }
        }
    }

    /// Fetches files into the cache, several at a time.
    async fn all<T: RepoType>(&self, transfer: &Transfer<'_, T>, files: &[Listed]) -> Result<()> {
        let Transfer { about, commit, cache, progress, .. } = transfer;
        let missing: Vec<&Listed> =
            files.iter().filter(|file| !cache.holds(commit, &file.path, file.size)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        // Each content once, and none that is in the cache for another revision.
        let mut contents: Vec<&Listed> = missing.iter().copied().filter(|file| !cache.has(file)).collect();
        contents.sort_by_key(|file| file.id.hex());
        contents.dedup_by_key(|file| file.id.hex());
        let sum = |sizes: &mut dyn Iterator<Item = u64>| sizes.fold(0, u64::saturating_add);
        let total = sum(&mut contents.iter().map(|file| file.size));
        let begun = |file: &&Listed| {
            std::fs::metadata(cache.incomplete(&file.id)).map_or(0, |part| part.len().min(file.size))
        };
        let folder = &self.settings.cache;
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        require_space(folder, total - sum(&mut contents.iter().map(begun)))?;
        let reference = about.reference;
        progress.begin(&format!("fetching {reference}, MB"), total.div_ceil(STEP));
        stream::iter(&missing)
            .map(|file| transfer.fetch(file))
            .buffer_unordered(self.settings.parallel.max(1))
            .try_collect::<Vec<()>>()
            .await?;
        let count = match contents.len() {
            0 => return Ok(()),
            1 => "1 file".to_owned(),
            count => format!("{count} files"),
        };
        progress.event(&Event::Note(&format!(
            "fetched {count}, {}, of {} {reference} at commit {}",
            bytes(total),
            about.kind,
            &commit[..12]
        )));
        Ok(())
    }

    /// The snapshot of a revision in the cache, if it has all wanted files.
    fn cached(
        &self,
        cache: &RepositoryCache,
        reference: &Reference,
        wish: &Wish<'_>,
        why: String,
    ) -> Result<Snapshot> {
        let offline = self.settings.offline;
        let not_cached = |missing: String| {
            let (repository, revision) = (reference.repository().into(), reference.revision().into());
            Error::from(HubError::NotCached { why: why.clone(), repository, revision, missing, offline })
        };
        let commit = cache.commit(reference.revision()).ok_or_else(|| not_cached("all of it".into()))?;
        let folder = cache.snapshot(&commit);
        let require = |name: &str| match folder.join(name).is_file() {
            true => Ok(()),
            false => Err(not_cached(format!("`{name}`"))),
        };
        match wish {
            Wish::Files(names) => names.iter().try_for_each(|name| require(name))?,
            Wish::Model => {
                let names = file_names(&folder);
                let names: Vec<&str> = names.iter().map(String::as_str).collect();
                let base_names = if needs_base_name(&names) { base_names(&folder)? } else { Vec::new() };
                let wanted = files::of_model(&names, &base_names).map_err(|lack| match lack {
                    NoWeights::Missing(file) | NoWeights::OtherFormat(file) => not_cached(file),
                    several @ NoWeights::Several(_) => lacks(reference, several),
                })?;
                if let Some(index) = wanted.index {
                    files::shards(&folder.join(index))?.iter().try_for_each(|shard| require(shard))?;
                }
            }
        }
        Ok(Snapshot { folder, commit, gated: None })
    }
}

fn lacks(reference: &Reference, lack: NoWeights) -> Error {
    let repository = reference.repository().to_owned();
    match lack {
        NoWeights::OtherFormat(found) => HubError::WeightsFormat { repository, found }.into(),
        NoWeights::Several(found) => HubError::SeveralWeights { repository, found }.into(),
        NoWeights::Missing(file) => {
            HubError::File { repository, revision: reference.revision().to_owned(), file }.into()
        }
    }
}

/// The names of the files in a folder, without links to missing files.
fn file_names(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let files = entries.filter_map(Result::ok).filter(|entry| entry.path().is_file());
    files.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
