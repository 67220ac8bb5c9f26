//! The connection to a Hub, and what its refusals mean.

use std::future::Future;

use hf_hub::{HFClient, HFError};
use tokio::runtime::{Builder, Runtime};

use super::{
    reference::Reference,
    settings::{Settings, redacted},
};
use crate::error::{Error, HubError, Result};

/// Longest wait that a Hub may ask for before a request counts as refused, seconds.
const LONGEST_WAIT: u64 = 120;

/// A Hub, or a server that speaks like one.
pub struct Hub {
    pub(super) settings: Settings,
    pub(super) client: HFClient,
    pub(super) http: reqwest::Client,
    runtime: Runtime,
}

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Model,
    Dataset,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Dataset => "dataset",
        }
    }

    /// What stands before `owner/name` in the address of its page.
    fn prefix(self) -> &'static str {
        match self {
            Self::Model => "",
            Self::Dataset => "datasets/",
        }
    }
}

impl Hub {
    /// Nothing is sent yet.
    ///
    /// # Errors
    /// When the endpoint is not an address.
    pub fn new(settings: Settings) -> Result<Self> {
        let unusable = |problem: String| {
            let endpoint = settings.endpoint.clone();
            Error::from(HubError::Unreachable { endpoint, problem })
        };
        if !["http://", "https://"].iter().any(|scheme| settings.endpoint.starts_with(scheme)) {
            return Err(Error::Value {
                what: "HF_ENDPOINT".into(),
                expected: "an address such as https://huggingface.co".into(),
                found: redacted(&settings.endpoint, settings.token.as_ref()),
            });
        }
        let http = reqwest::Client::builder()
            .user_agent(concat!("gptq/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(settings.silence)
            .read_timeout(settings.silence)
            .build()
            .map_err(|error| unusable(error.to_string()))?;
        let mut builder = HFClient::builder()
            .endpoint(&settings.endpoint)
            .cache_dir(&settings.cache)
            .client(http.clone())
            .retry_max_attempts(settings.retries)
            .retry_base_delay(settings.pause);
        if let Some(token) = &settings.token {
            builder = builder.token(token.secret());
        }
        let client = builder.build().map_err(|error| unusable(error.to_string()))?;
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| unusable(format!("no network can be used here: {error}")))?;
        Ok(Self { settings, client, http, runtime })
    }

    /// How it is reached.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(super) fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// Sends a request; again where the Hub says how long to wait before, and where its answer was cut. What else may
    /// pass is tried again by the client itself.
    pub(super) async fn ask<T, F>(&self, about: &About<'_>, request: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = Result<T, HFError>>,
    {
        let mut tries = 0;
        loop {
            let error = match request().await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let wait = match &error {
                HFError::RateLimited { retry_after: Some(wait), .. } if wait.as_secs() <= LONGEST_WAIT => {
                    *wait
                }
                HFError::Request { source, .. } if source.is_body() || source.is_decode() => {
                    self.settings.pause
                }
                _ => return Err(self.failure(error, about).into()),
            };
            if tries == self.settings.retries {
                return Err(self.failure(error, about).into());
            }
            tries += 1;
            tokio::time::sleep(wait).await;
        }
    }

    /// What a refusal means.
    pub(super) fn failure(&self, error: HFError, about: &About<'_>) -> HubError {
        let repository = about.reference.repository().to_owned();
        let revision = about.reference.revision().to_owned();
        let (endpoint, token) = (self.settings.endpoint.clone(), self.settings.token.is_some());
        let clean = |text: &str| redacted(text, self.settings.token.as_ref());
        if let HFError::RateLimited { retry_after, .. } = &error {
            return HubError::RateLimited { endpoint, after: retry_after.map(|wait| wait.as_secs()) };
        }
        let refusal = refusal(&error);
        let (status, code) =
            refusal.as_ref().map_or((0, ""), |refusal| (refusal.status, refusal.code.as_str()));
        let missing = matches!(status, 401 | 404);
        let message = clean(&refusal.as_ref().map_or_else(|| chain(&error), |refusal| refusal.said.clone()));
        match (&error, status, code) {
            (HFError::Request { .. } | HFError::Xet { .. }, ..) => {
                HubError::Unreachable { endpoint, problem: message }
            }
            (_, 401 | 403, "GatedRepo") => {
                let page = format!("{endpoint}/{}{repository}", about.kind.prefix());
                HubError::Gated { repository, page, token }
            }
            (HFError::RepoNotFound { .. }, ..) => {
                HubError::NotFound { kind: about.kind.name(), repository, endpoint, token }
            }
            (_, _, "RepoNotFound") if missing => {
                HubError::NotFound { kind: about.kind.name(), repository, endpoint, token }
            }
            (_, 401 | 403, _) => {
                let action = format!("{} {repository}", about.action);
                HubError::Unauthorized { action, message, token }
            }
            (HFError::EntryNotFound { path, .. }, ..) => {
                HubError::File { repository, revision, file: format!("`{path}`") }
            }
            (HFError::RevisionNotFound { .. }, ..) | (_, _, "RevisionNotFound") => {
                HubError::Revision { repository, revision, known: String::new() }
            }
            _ => HubError::Answer { action: format!("{} {repository}", about.action), message },
        }
    }
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// What a request is about, for messages.
pub(super) struct About<'a> {
    pub(super) kind: Kind,
    pub(super) reference: &'a Reference,
    /// A verb before the repository's name: `read`.
    pub(super) action: &'static str,
}

/// Whether the same request may succeed a little later.
pub(super) fn is_transient(error: &HFError) -> bool {
    let status = refusal(error).map_or(0, |refusal| refusal.status);
    matches!(error, HFError::Request { .. } | HFError::Xet { .. } | HFError::RateLimited { .. })
        || status == 408
        || status >= 500
}

/// Whether an error says that the Hub is not there at the moment, so that the cache may stand in for it.
pub(super) fn is_absence(error: &Error) -> bool {
    matches!(error, Error::Hub(error) if error.is_passing())
}

/// An answer that is not a success.
struct Refusal {
    status: u16,
    /// By which the Hub tells refusals of one status apart.
    code: String,
    /// `404 Not Found: no such thing`.
    said: String,
}

fn refusal(error: &HFError) -> Option<Refusal> {
    let context = match error {
        HFError::Http { context }
        | HFError::AuthRequired { context }
        | HFError::Forbidden { context }
        | HFError::Conflict { context }
        | HFError::RateLimited { context, .. } => context,
        HFError::RepoNotFound { context, .. }
        | HFError::RevisionNotFound { context, .. }
        | HFError::EntryNotFound { context, .. } => context.as_ref()?,
        _ => return None,
    };
    let said = match context.server_message.as_deref().filter(|message| !message.is_empty()) {
        Some(message) => format!("{}: {message}", context.status),
        None => context.status.to_string(),
    };
    let code = context.error_code.clone().unwrap_or_default();
    Some(Refusal { status: context.status.as_u16(), code, said })
}

/// An error with its causes; the client's own texts name only the last one.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
