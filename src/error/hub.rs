//! Errors of the Hub and of git remotes.

use std::path::{Path, PathBuf};

use super::hint::{choose_weights, conversion};

/// An error of a repository, of its files, or of the connection to it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// A name that no repository can have.
    #[error("`{found}` is not the name of a repository: expected {expected}")]
    Reference {
        /// As given.
        found: String,
        /// The form of a name.
        expected: &'static str,
    },
    /// There is no such repository, or this user cannot see it.
    #[error("{kind} `{repository}` is not on {endpoint}, or is private")]
    NotFound {
        /// `model` or `dataset`.
        kind: &'static str,
        /// `owner/name`.
        repository: String,
        /// The Hub's address.
        endpoint: String,
        /// Whether a token was sent.
        token: bool,
    },
    /// The repository has no such branch, tag or commit.
    #[error("`{repository}` has no revision `{revision}` (it has {known})")]
    Revision {
        /// `owner/name`.
        repository: String,
        /// As asked for.
        revision: String,
        /// Branches and tags that exist.
        known: String,
    },
    /// Only users who accepted the repository's conditions get its files.
    #[error("`{repository}` is gated, and {}", if *token { "this token's user has no access" } else { "no token was given" })]
    Gated {
        /// `owner/name`.
        repository: String,
        /// The page on which a user requests access.
        page: String,
        /// Whether a token was sent.
        token: bool,
    },
    /// The token is invalid, or lacks the right to do this.
    #[error("the Hub refused to {action}: {message}")]
    Unauthorized {
        /// The attempted action: `read owner/name`.
        action: String,
        /// The Hub's message.
        message: String,
        /// Whether a token was sent.
        token: bool,
    },
    /// A file that is needed is not in the repository.
    #[error("`{repository}` at revision `{revision}` has no {file}")]
    File {
        /// `owner/name`.
        repository: String,
        /// The revision.
        revision: String,
        /// The file.
        file: String,
    },
    /// The repository has weights only in formats that are not read.
    #[error("`{repository}` has only `{found}`; expected safetensors or `pytorch_model.bin`")]
    WeightsFormat {
        /// `owner/name`.
        repository: String,
        /// One of its weights files.
        found: String,
    },
    /// The repository has several weights files, and no setting chooses one.
    #[error("`{repository}` has several weights files: {found}")]
    SeveralWeights {
        /// `owner/name`.
        repository: String,
        /// Their names, quoted.
        found: String,
    },
    /// Files are neither in the cache nor reachable on the network.
    #[error(
        "{why}, and `{repository}` at revision `{revision}` is incomplete in the cache: {missing} is missing"
    )]
    NotCached {
        /// Why there was no request, or the Hub's error.
        why: String,
        /// `owner/name`.
        repository: String,
        /// The revision.
        revision: String,
        /// The missing file.
        missing: String,
        /// Whether HF_HUB_OFFLINE forbids the network.
        offline: bool,
    },
    /// No response.
    #[error("no answer from {endpoint}: {problem}")]
    Unreachable {
        /// The Hub's address.
        endpoint: String,
        /// The reason.
        problem: String,
    },
    /// Too many requests, even after the requested pauses.
    #[error("{endpoint} refuses further requests for now (429){}", after.map_or_else(String::new, |s| format!(": it requests a pause of {s} s")))]
    RateLimited {
        /// The Hub's address.
        endpoint: String,
        /// Requested pause, seconds.
        after: Option<u64>,
    },
    /// Any other response that is not a success, or cannot be used.
    #[error("the Hub could not {action}: {message}")]
    Answer {
        /// The attempted action.
        action: String,
        /// Status and the Hub's message.
        message: String,
    },
    /// The server has no Xet, so large files can only be sent with git-lfs.
    #[error("`{repository}`: large files are sent through Xet, and {endpoint} offers `{found}`")]
    NoXet {
        /// The Hub's address.
        endpoint: String,
        /// `owner/name`.
        repository: String,
        /// The transfer that it offers.
        found: String,
    },
    /// The run has no such branch.
    #[error("the run has no branch `{branch}` (it has {known})")]
    Branch {
        /// As asked for.
        branch: String,
        /// The branches of the run.
        known: String,
    },
    /// The source is gated, and its licence was not accepted.
    #[error("`{model}` is gated under the licence `{licence}`, which also holds for quantized copies")]
    Licence {
        /// The source model.
        model: String,
        /// The licence's name for `--accept-license`.
        licence: String,
    },
    /// The remote does not have what was sent.
    #[error("branch `{branch}` was published, but `{file}` on {place} is {found}: expected {expected}")]
    NotProven {
        /// The branch.
        branch: String,
        /// The remote.
        place: String,
        /// The file, or the branch itself.
        file: String,
        /// Size or digest of the sent file.
        expected: String,
        /// Size or digest of the remote's file.
        found: String,
    },
    /// git or git-lfs failed.
    #[error("git could not {action}: {problem}")]
    Git {
        /// The attempted action.
        action: String,
        /// Its message.
        problem: String,
        /// A remedy, if known.
        hint: Option<&'static str>,
    },
    /// The template of a card cannot be used.
    #[error("`{}` cannot be rendered as a card: {problem}", path.display())]
    Template {
        /// The template.
        path: PathBuf,
        /// Line and reason.
        problem: String,
    },
    /// A transfer that was cut too many times in a row.
    #[error("the download of `{file}` of `{repository}` stopped after {got} of {size} bytes: {problem}")]
    Cut {
        /// `owner/name`.
        repository: String,
        /// The file.
        file: String,
        /// Received bytes.
        got: u64,
        /// Expected bytes.
        size: u64,
        /// The last reason.
        problem: String,
    },
    /// A received file differs from the Hub's listing.
    #[error("`{file}` of `{repository}` differs from the Hub's listing: expected {expected}, found {found}")]
    Content {
        /// `owner/name`.
        repository: String,
        /// The file.
        file: String,
        /// Size or digest expected.
        expected: String,
        /// Size or digest found.
        found: String,
    },
}

impl HubError {
    /// Whether the same request may succeed later.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::RateLimited { .. } => true,
            Self::Answer { message, .. } => {
                ["5", "409", "412"].iter().any(|status| message.starts_with(status))
            }
            _ => false,
        }
    }

    /// The user's remedy, if there is one.
    pub(super) fn hint(&self) -> Option<String> {
        const LOG_IN: &str = "set HF_TOKEN, or log in: hf auth login";
        Some(match self {
            Self::NotFound { token: false, .. } => {
                format!("check the name, or whether a folder was meant; if it is private, {LOG_IN}")
            }
            Self::NotFound { .. } => {
                "check the name, or whether a folder was meant; if it is private, the token \
                                      must be of a user who may read it"
                    .into()
            }
            Self::Gated { page, token: false, .. } => {
                format!("accept its conditions at {page}, then {LOG_IN}")
            }
            Self::Gated { page, .. } => format!("ask for access at {page} with the account of this token"),
            Self::Unauthorized { token: false, .. } => LOG_IN.into(),
            Self::Unauthorized { .. } => {
                "check HF_TOKEN: it must be valid, and may need the right to write".into()
            }
            Self::WeightsFormat { repository, found }
                if [".bin", ".pt", ".pth", ".ckpt"].iter().any(|end| found.ends_with(end)) =>
            {
                let command = conversion(Path::new("COPY"), found);
                format!(
                    "fetch it: hf download {repository} --local-dir COPY; convert it: {command}; then --model COPY"
                )
            }
            Self::WeightsFormat { repository, .. } => format!(
                "convert it: python -c \"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; \
                 d = '{0}-safetensors'; M.from_pretrained('{repository}').save_pretrained(d); \
                 T.from_pretrained('{repository}').save_pretrained(d)\", then --model {0}-safetensors",
                repository.rsplit('/').next().unwrap_or_default()
            ),
            Self::SeveralWeights { repository, .. } => {
                format!("fetch it: hf download {repository} --local-dir COPY; {}", choose_weights(&"COPY"))
            }
            Self::NotCached { offline: true, .. } => "unset HF_HUB_OFFLINE to fetch it".into(),
            Self::NotCached { .. } | Self::Unreachable { .. } => {
                "check the network, HTTPS_PROXY and HF_ENDPOINT, and start again: downloaded files are kept; a folder or a \
                 text file on this machine needs no network"
                    .into()
            }
            Self::RateLimited { .. } => {
                "wait a while and start again: downloaded files are kept; a token (HF_TOKEN) allows more requests"
                    .into()
            }
            Self::Cut { .. } => "start again: it resumes where it stopped".into(),
            Self::Content { .. } => {
                "start again; if the error stays, the file on the Hub is damaged, or a proxy changes it"
                    .into()
            }
            Self::NoXet { endpoint, repository, .. } => {
                format!("send it with git-lfs: --to git:{endpoint}/{repository}")
            }
            Self::Licence { licence, .. } => {
                format!("read it; if you accept it, publish with --accept-license {licence}")
            }
            Self::NotProven { .. } => "publish again: only what differs is sent".into(),
            Self::Git { hint, .. } => return hint.map(str::to_owned),
            _ => return None,
        })
    }
}
