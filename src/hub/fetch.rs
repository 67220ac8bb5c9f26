//! Models and datasets from the Hub, or from the cache.

use std::path::{Path, PathBuf};

use futures_util::{StreamExt, TryStreamExt, stream};
use hf_hub::{HFRepository, repository::RepoType};

use super::{
    cache::{RepositoryCache, is_commit},
    client::{About, Hub, Kind, is_absence},
    files::{self, Lack},
    reference::Reference,
    transfer::{Listed, STEP, Transfer},
};
use crate::{
    checkpoint::INDEX_FILE,
    error::{Error, HubError, Result, quoted},
    machine::require_space,
    progress::{Event, Progress},
    units::bytes,
};

/// A revision of a repository in the cache, with the files that were asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The folder with its files.
    pub folder: PathBuf,
    /// The commit.
    pub commit: String,
    /// Whether its files are given only to those who accepted conditions; none when the Hub was not asked.
    pub gated: Option<bool>,
}

/// What is wanted of a repository.
enum Wish<'a> {
    Model,
    Files(&'a [String]),
}

impl Hub {
    /// Brings a model into the cache: configuration, tokenizer, safetensors weights, licence and card, nothing else.
    ///
    /// # Errors
    /// When the Hub refuses, the repository holds no such model, or something on the way fails for good.
    pub fn fetch_model(&self, reference: &Reference, progress: &dyn Progress) -> Result<Snapshot> {
        let repository = self.client.model(reference.owner(), reference.name());
        let about = About { kind: Kind::Model, reference, action: "read" };
        self.fetch(&repository, &about, &Wish::Model, progress)
    }

    /// Brings files of a dataset into the cache.
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
        let about = About { kind: Kind::Dataset, reference, action: "read" };
        self.fetch(&repository, &about, &Wish::Files(files), progress)
    }

    fn fetch<T: RepoType>(
        &self,
        repository: &HFRepository<T>,
        about: &About<'_>,
        wish: &Wish<'_>,
        progress: &dyn Progress,
    ) -> Result<Snapshot> {
        let reference = about.reference;
        let cache = RepositoryCache::new(&self.settings.cache, about.kind, reference);
        if self.settings.offline {
            let why = "HF_HUB_OFFLINE is set".to_owned();
            return self.cached(&cache, reference, wish, why);
        }
        match self.block_on(self.fetch_online(repository, about, &cache, wish, progress)) {
            Err(error) if is_absence(&error) => {
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
                    "{error}; going on with {reference} from the cache, as it was at commit {commit}"
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
        progress: &dyn Progress,
    ) -> Result<Snapshot> {
        let (commit, gated) = self.head(about).await?;
        let listed = self.list(about, &commit).await?;
        let transfer = Transfer { hub: self, repository, about, commit: &commit, cache, progress };
        let pick = |names: &[String]| -> Result<Vec<Listed>> {
            let find = |name: &String| listed.iter().find(|file| file.path == *name).cloned();
            let missing = |name: &String| lacks(about.reference, Lack::Missing(format!("`{name}`")));
            names.iter().map(|name| find(name).ok_or_else(|| missing(name))).collect()
        };
        match wish {
            Wish::Files(names) => self.all(&transfer, &pick(names)?).await?,
            Wish::Model => {
                let names: Vec<&str> = listed.iter().map(|file| file.path.as_str()).collect();
                let wanted = files::of_model(&names).map_err(|lack| lacks(about.reference, lack))?;
                let mut files = pick(&wanted.files)?;
                if wanted.sharded {
                    // What its shards are is known only from the index.
                    self.all(&transfer, &pick(&[INDEX_FILE.to_owned()])?).await?;
                    let shards = files::shards(&cache.snapshot(&commit).join(INDEX_FILE))?;
                    files.extend(pick(&shards.into_iter().collect::<Vec<_>>())?);
                }
                self.all(&transfer, &files).await?;
            }
        }
        cache.remember(about.reference.revision(), &commit)?;
        Ok(Snapshot { folder: cache.snapshot(&commit), commit, gated: Some(gated) })
    }

    /// The commit that a revision is at, and whether the repository is gated.
    async fn head(&self, about: &About<'_>) -> Result<(String, bool)> {
        let reference = about.reference;
        let (owner, name) = (reference.owner(), reference.name());
        let revision = reference.revision();
        let found = match about.kind {
            Kind::Model => {
                let model = self.client.model(owner, name);
                let info = || async { model.info().revision(revision).send().await };
                self.ask(about, info).await.map(|info| (info.sha, info.gated))
            }
            Kind::Dataset => {
                let dataset = self.client.dataset(owner, name);
                let info = || async { dataset.info().revision(revision).send().await };
                self.ask(about, info).await.map(|info| (info.sha, info.gated))
            }
        };
        let (sha, gated) = match found {
            Err(Error::Hub(HubError::Revision { repository, revision, .. })) => {
                let known = self.revisions(about).await;
                return Err(HubError::Revision { repository, revision, known }.into());
            }
            other => other?,
        };
        let gated = gated.is_some_and(|gated| gated != false);
        match sha.filter(|sha| is_commit(sha)) {
            Some(sha) => Ok((sha, gated)),
            None => {
                let action = format!("say what commit {reference} is at");
                Err(HubError::Answer { action, message: "its answer has none".into() }.into())
            }
        }
    }

    /// The branches and tags of a repository, for a message.
    async fn revisions(&self, about: &About<'_>) -> String {
        let (owner, name) = (about.reference.owner(), about.reference.name());
        let refs = match about.kind {
            Kind::Model => self.client.model(owner, name).list_refs().send().await,
            Kind::Dataset => self.client.dataset(owner, name).list_refs().send().await,
        };
        match refs {
            Ok(refs) => quoted(refs.branches.iter().chain(&refs.tags).map(|found| &found.name)),
            Err(_) => "others".into(),
        }
    }

    /// Brings files into the cache, several at a time.
    async fn all<T: RepoType>(&self, transfer: &Transfer<'_, T>, files: &[Listed]) -> Result<()> {
        let Transfer { about, commit, cache, progress, .. } = transfer;
        let missing: Vec<&Listed> =
            files.iter().filter(|file| !cache.holds(commit, &file.path, file.size)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        // Once each, and nothing of those that another revision brought.
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
            about.kind.name(),
            &commit[..12]
        )));
        Ok(())
    }

    /// What the cache holds of a revision, if that is all that is wanted.
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
                let wanted = files::of_model(&names).map_err(|lack| match lack {
                    Lack::Missing(file) | Lack::OtherFormat(file) => not_cached(file),
                })?;
                if wanted.sharded {
                    files::shards(&folder.join(INDEX_FILE))?.iter().try_for_each(|shard| require(shard))?;
                }
            }
        }
        Ok(Snapshot { folder, commit, gated: None })
    }
}

fn lacks(reference: &Reference, lack: Lack) -> Error {
    let repository = reference.repository().to_owned();
    match lack {
        Lack::OtherFormat(found) => HubError::WeightsFormat { repository, found }.into(),
        Lack::Missing(file) => {
            HubError::File { repository, revision: reference.revision().to_owned(), file }.into()
        }
    }
}

/// The files of a folder, by name; links that lead nowhere are none.
fn file_names(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let files = entries.filter_map(Result::ok).filter(|entry| entry.path().is_file());
    files.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
