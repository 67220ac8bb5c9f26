//! The connection to a Hub, and what its refusals mean.

use std::future::Future;

use hf_hub::HFClient;
use reqwest::{RequestBuilder, Response, Url};
use tokio::runtime::{Builder, Runtime};

use super::{
    answer::Problem,
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

    /// What it is called in addresses of the Hub's interface.
    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
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
    /// pass is tried again by the client itself, and by [`Hub::get`].
    pub(super) async fn ask<T, E, F>(&self, about: &About<'_>, request: impl Fn() -> F) -> Result<T>
    where
        E: Into<Problem>,
        F: Future<Output = Result<T, E>>,
    {
        let mut tries = 0;
        loop {
            let problem = match request().await {
                Ok(answer) => return Ok(answer),
                Err(error) => error.into(),
            };
            let wait = match &problem {
                Problem::Refused(refusal) => refusal.wait.filter(|wait| wait.as_secs() <= LONGEST_WAIT),
                Problem::Cut(_) => Some(self.settings.pause),
                _ => None,
            };
            match wait {
                Some(wait) if tries < self.settings.retries => tokio::time::sleep(wait).await,
                _ => return Err(self.failure(problem, about).into()),
            }
            tries += 1;
        }
    }

    /// The answer to a request that the client does not know.
    pub(super) async fn get(&self, address: &Url) -> Result<Response, Problem> {
        let mut tries = 0;
        loop {
            let problem = match self.signed(self.http.get(address.clone())).send().await {
                Ok(answer) if answer.status().is_success() => return Ok(answer),
                Ok(answer) => Problem::of_answer(answer).await,
                Err(error) => Problem::from(&error),
            };
            let told = matches!(&problem, Problem::Refused(refusal) if refusal.wait.is_some());
            if told || !problem.is_transient() || tries >= self.settings.retries {
                return Err(problem);
            }
            tokio::time::sleep(self.settings.pause_after(tries)).await;
            tries += 1;
        }
    }

    /// A request that the client does not know, with the token.
    pub(super) fn signed(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.settings.token {
            Some(token) => request.bearer_auth(token.secret()),
            None => request,
        }
    }

    /// What a problem means.
    pub(super) fn failure(&self, problem: impl Into<Problem>, about: &About<'_>) -> HubError {
        let problem = problem.into();
        let repository = about.reference.repository().to_owned();
        let action = format!("{} {repository}", about.action);
        let (endpoint, token) = (self.settings.endpoint.clone(), self.settings.token.is_some());
        let message = redacted(problem.text(), self.settings.token.as_ref());
        let refusal = match problem {
            Problem::Refused(refusal) => refusal,
            Problem::Silence(_) | Problem::Cut(_) => {
                return HubError::Unreachable { endpoint, problem: message };
            }
            Problem::Other(_) => return HubError::Answer { action, message },
        };
        match (refusal.status, refusal.code.as_str()) {
            (429, _) => HubError::RateLimited { endpoint, after: refusal.wait.map(|wait| wait.as_secs()) },
            (401 | 403, "GatedRepo") => {
                let page = format!("{endpoint}/{}{repository}", about.kind.prefix());
                HubError::Gated { repository, page, token }
            }
            (401 | 404, "RepoNotFound") => {
                HubError::NotFound { kind: about.kind.name(), repository, endpoint, token }
            }
            (401 | 403, _) => HubError::Unauthorized { action, message, token },
            (_, "RevisionNotFound") => {
                let revision = about.reference.revision().to_owned();
                HubError::Revision { repository, revision, known: String::new() }
            }
            _ => HubError::Answer { action, message },
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

/// Whether an error says that the Hub is not there at the moment, so that the cache may stand in for it.
pub(super) fn is_absence(error: &Error) -> bool {
    matches!(error, Error::Hub(error) if error.is_passing())
}
