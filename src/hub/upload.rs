//! Writing to repositories of the Hub.

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use hf_hub::{
    HFError,
    progress::{ProgressEvent, ProgressHandler, UploadEvent},
    repository::{CommitOperation, RepoTypeModel},
};
use serde_json::{Value, json};

use super::{
    client::{About, Hub, Kind},
    reference::{DEFAULT_REVISION, Reference},
    transfer::{Listed, STEP},
};
use crate::{
    error::{Error, HubError, Result},
    progress::Progress,
};

/// Larger files go through Xet, or not at all: the Hub takes no larger ones inside a commit.
const INLINE_LIMIT: u64 = 10_000_000;

/// How often progress is told.
const TICK: Duration = Duration::from_millis(200);

/// What one commit changes.
#[derive(Debug, Default)]
pub struct Commit {
    /// Files added or replaced, and deleted.
    pub operations: Vec<CommitOperation>,
    /// Bytes of the files added.
    pub bytes: u64,
    /// The largest file, its size and SHA-256.
    pub largest: Option<(u64, String)>,
    /// Its message.
    pub message: String,
}

impl Hub {
    /// The branches of a model's repository with their commits; none when there is no such repository.
    ///
    /// # Errors
    /// When the Hub refuses or does not answer.
    pub fn branches(&self, reference: &Reference) -> Result<Option<BTreeMap<String, String>>> {
        let about = About { kind: Kind::Model, reference, action: "read" };
        let repository = self.client.model(reference.owner(), reference.name());
        let refs = self.block_on(self.ask(&about, || async { repository.list_refs().send().await }));
        match refs {
            Ok(refs) => Ok(Some(refs.branches.into_iter().map(|b| (b.name, b.target_commit)).collect())),
            Err(Error::Hub(HubError::NotFound { .. })) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a repository, unless it is there.
    ///
    /// # Errors
    /// As [`Hub::branches`].
    pub fn create_repository(&self, reference: &Reference, private: bool) -> Result<()> {
        let about = About { kind: Kind::Model, reference, action: "create" };
        let request = || async {
            let create = self.client.create_repository().repo_id(reference.repository());
            create.repo_type(RepoTypeModel).private(private).exist_ok(true).send().await
        };
        self.block_on(self.ask(&about, request)).map(|_| ())
    }

    /// Makes a branch, from the main branch's first commit: where nothing is committed to it after that, it does not
    /// hold the weights of another.
    ///
    /// # Errors
    /// As [`Hub::branches`].
    pub fn create_branch(&self, reference: &Reference) -> Result<()> {
        let about = About { kind: Kind::Model, reference, action: "make a branch of" };
        let repository = self.client.model(reference.owner(), reference.name());
        self.block_on(async {
            let start = self.first_commit(&about, DEFAULT_REVISION).await?;
            let start = start.as_deref().unwrap_or(DEFAULT_REVISION);
            let request = || async {
                match repository.create_branch().branch(reference.revision()).revision(start).send().await {
                    // A request before this one had arrived.
                    Err(HFError::Conflict { .. }) => Ok(()),
                    made => made,
                }
            };
            self.ask(&about, request).await
        })
    }

    /// All files of a revision.
    ///
    /// # Errors
    /// As [`Hub::branches`].
    pub fn files(&self, reference: &Reference) -> Result<Vec<Listed>> {
        let about = About { kind: Kind::Model, reference, action: "read" };
        self.block_on(self.list(&about, reference.revision()))
    }

    /// Commits to a branch that is at `parent`.
    ///
    /// # Errors
    /// When the Hub refuses, takes no large files, or the way to it fails.
    pub fn commit(
        &self,
        reference: &Reference,
        commit: &Commit,
        parent: &str,
        progress: &dyn Progress,
    ) -> Result<()> {
        self.block_on(async {
            self.require_xet(reference, commit).await?;
            let sent = Arc::new(Sent::default());
            let repository = self.client.model(reference.owner(), reference.name());
            let request = repository
                .create_commit()
                .operations(commit.operations.clone())
                .commit_message(&commit.message)
                .revision(reference.revision())
                .parent_commit(parent)
                .progress(sent.clone())
                .send();
            let mut request = pin!(request);
            progress.begin(&format!("sending {reference}, MB"), commit.bytes.div_ceil(STEP));
            let mut told = 0;
            let result = loop {
                let result = tokio::time::timeout(TICK, &mut request).await;
                let steps = sent.bytes.load(Ordering::Relaxed) / STEP;
                progress.advance(steps.saturating_sub(told));
                told = told.max(steps);
                if let Ok(result) = result {
                    break result;
                }
            };
            let about = About { kind: Kind::Model, reference, action: "commit to" };
            result.map_err(|error| self.failure(error, &about))?;
            Ok(())
        })
    }

    /// Refuses what would go into a commit's text although it is too large for that.
    async fn require_xet(&self, reference: &Reference, commit: &Commit) -> Result<()> {
        let Some((size, sha256)) = commit.largest.as_ref().filter(|(size, _)| *size > INLINE_LIMIT) else {
            return Ok(());
        };
        let endpoint = &self.settings.endpoint;
        let address = format!("{endpoint}/{}.git/info/lfs/objects/batch", reference.repository());
        let body = json!({
            "operation": "upload",
            "transfers": ["basic", "multipart", "xet"],
            "objects": [{ "oid": sha256, "size": size }],
            "hash_algo": "sha256",
            "ref": { "name": reference.revision() },
        });
        let request = self.signed(self.http.post(address)).header("Accept", "application/vnd.git-lfs+json");
        // Whatever else is wrong, the commit itself will say better.
        let Ok(answer) = request.json(&body).send().await else { return Ok(()) };
        if !answer.status().is_success() {
            return Ok(());
        }
        let answer: Value = answer.json().await.unwrap_or_default();
        match answer["transfer"].as_str() {
            Some("xet") => Ok(()),
            other => Err(HubError::NoXet {
                endpoint: endpoint.clone(),
                repository: reference.repository().to_owned(),
                found: other.unwrap_or("basic").to_owned(),
            }
            .into()),
        }
    }
}

/// Bytes sent so far.
#[derive(Debug, Default)]
struct Sent {
    bytes: AtomicU64,
}

impl ProgressHandler for Sent {
    fn on_progress(&self, event: &ProgressEvent) {
        if let ProgressEvent::Upload(UploadEvent::Progress { bytes_completed, .. }) = event {
            self.bytes.fetch_max(*bytes_completed, Ordering::Relaxed);
        }
    }
}
