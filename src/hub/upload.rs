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

use futures_util::TryStreamExt;
use hf_hub::{
    HFError,
    progress::{ProgressEvent, ProgressHandler, UploadEvent},
    repository::{CommitOperation, GitCommitInfo, RepoTypeAny, RepoTypeModel},
};
use serde_json::{Value, json};

use super::{
    client::{About, Hub},
    reference::{DEFAULT_REVISION, Reference},
    transfer::{Listed, STEP},
};
use crate::{
    error::{Error, HubError, Result},
    progress::Progress,
};

/// Largest file in the text of a commit. Larger ones go through Xet.
const INLINE_LIMIT: u64 = 10_000_000;

/// Interval of progress reports.
const TICK: Duration = Duration::from_millis(200);

/// The changes of one commit.
#[derive(Debug, Default)]
pub struct Commit {
    /// Files added or replaced, and deleted.
    pub operations: Vec<CommitOperation>,
    /// Bytes of the added files.
    pub bytes: u64,
    /// Size and SHA-256 of the largest added file.
    pub largest: Option<(u64, String)>,
    /// The commit message.
    pub message: String,
}

impl Hub {
    /// The commits of a model repository by branch; `None` if there is no such repository.
    ///
    /// # Errors
    /// If the Hub refuses or does not answer.
    pub fn branches(&self, reference: &Reference) -> Result<Option<BTreeMap<String, String>>> {
        let about = About { kind: RepoTypeAny::Model, reference, action: "read" };
        let repository = self.client.model(reference.owner(), reference.name());
        let refs = self.block_on(self.ask(&about, || async { repository.list_refs().send().await }));
        match refs {
            Ok(refs) => Ok(Some(refs.branches.into_iter().map(|b| (b.name, b.target_commit)).collect())),
            Err(Error::Hub(HubError::NotFound { .. })) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Creates a repository, unless it exists.
    ///
    /// # Errors
    /// As [`Hub::branches`].
    pub fn create_repository(&self, reference: &Reference, private: bool) -> Result<()> {
        let about = About { kind: RepoTypeAny::Model, reference, action: "create" };
        let request = || async {
            let create = self.client.create_repository().repo_id(reference.repository());
            create.repo_type(RepoTypeModel).private(private).exist_ok(true).send().await
        };
        self.block_on(self.ask(&about, request)).map(|_| ())
    }

    /// Creates a branch from the first commit of the main branch, so that it never holds the weights of another branch.
    ///
    /// # Errors
    /// As [`Hub::branches`].
    pub fn create_branch(&self, reference: &Reference) -> Result<()> {
        let about = About { kind: RepoTypeAny::Model, reference, action: "make a branch of" };
        let repository = self.client.model(reference.owner(), reference.name());
        self.block_on(async {
            let list =
                || async { repository.list_commits().send()?.try_collect::<Vec<GitCommitInfo>>().await };
            let commits = self.ask(&about, list).await?;
            // The newest comes first.
            let start = commits.last().map_or(DEFAULT_REVISION, |commit| &commit.id);
            let request = || async {
                match repository.create_branch().branch(reference.revision()).revision(start).send().await {
                    // An earlier attempt of this request succeeded, and its response was lost.
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
        let about = About { kind: RepoTypeAny::Model, reference, action: "read" };
        self.block_on(self.list(&about, reference.revision()))
    }

    /// Commits to a branch whose newest commit is `parent`.
    ///
    /// # Errors
    /// If the Hub refuses, takes no large files, or cannot be reached.
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
            let mut reported = 0;
            let result = loop {
                let result = tokio::time::timeout(TICK, &mut request).await;
                let steps = sent.0.load(Ordering::Relaxed) / STEP;
                progress.advance(steps.saturating_sub(reported));
                reported = reported.max(steps);
                if let Ok(result) = result {
                    break result;
                }
            };
            let about = About { kind: RepoTypeAny::Model, reference, action: "commit to" };
            result.map_err(|error| self.failure(error, &about))?;
            Ok(())
        })
    }

    /// Refuses a commit with large files if the server offers no Xet: `hf-hub` would put them into the commit's text.
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
        // The commit itself gives the better error for any other problem.
        let Ok(response) = request.json(&body).send().await else { return Ok(()) };
        if !response.status().is_success() {
            return Ok(());
        }
        let answer: Value = response.json().await.unwrap_or_default();
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
struct Sent(AtomicU64);

impl ProgressHandler for Sent {
    fn on_progress(&self, event: &ProgressEvent) {
        if let ProgressEvent::Upload(UploadEvent::Progress { bytes_completed, .. }) = event {
            self.0.fetch_max(*bytes_completed, Ordering::Relaxed);
        }
    }
}
