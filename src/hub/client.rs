//! The connection to a Hub, and the errors that its responses mean.

use std::future::Future;

use hf_hub::{
    HFClient,
    repository::{RepoType, RepoTypeAny},
};
use reqwest::RequestBuilder;
use tokio::runtime::{Builder, Runtime};

use super::{
    answer::Problem,
    reference::Reference,
    settings::{Settings, redacted},
};
use crate::error::{Error, HubError, Result};

/// Longest wait that a response can request, seconds; above it the request counts as refused.
const LONGEST_WAIT: u64 = 120;

/// A Hub, or a server with the same interface.
pub struct Hub {
    pub(super) settings: Settings,
    pub(super) client: HFClient,
    pub(super) http: reqwest::Client,
    runtime: Runtime,
}

/// Subject of a request: for its address, and for messages.
pub(super) struct About<'a> {
    /// Model or dataset.
    pub(super) kind: RepoTypeAny,
    pub(super) reference: &'a Reference,
    /// A verb before the repository's name: `read`.
    pub(super) action: &'static str,
}

impl Hub {
    /// A client for these settings; sends nothing.
    ///
    /// # Errors
    /// If the endpoint is not an address, or the system offers no network.
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

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(super) fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// Sends a request. It repeats it after a 429 and a cut response, and after other transient faults for which `hf-hub` does
    /// not repeat it.
    pub(super) async fn ask<T, E, F>(&self, about: &About<'_>, request: impl Fn() -> F) -> Result<T>
    where
        E: Into<Problem>,
        F: Future<Output = Result<T, E>>,
    {
        let mut failures = 0;
        loop {
            let problem: Problem = match request().await {
                Ok(response) => return Ok(response),
                Err(error) => error.into(),
            };
            let pause = match problem.wait {
                Some(wait) => Some(wait).filter(|wait| wait.as_secs() <= LONGEST_WAIT),
                None => problem.repeatable.then(|| self.settings.pause_after(failures)),
            };
            match pause {
                Some(pause) if failures < self.settings.retries => tokio::time::sleep(pause).await,
                _ => return Err(self.failure(problem, about).into()),
            }
            failures += 1;
        }
    }

    /// A request that `hf-hub` does not offer, with the token.
    pub(super) fn signed(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.settings.token {
            Some(token) => request.bearer_auth(token.secret()),
            None => request,
        }
    }

    /// The error that a problem means.
    pub(super) fn failure(&self, problem: impl Into<Problem>, about: &About<'_>) -> HubError {
        let problem = problem.into();
        let repository = about.reference.repository().to_owned();
        let action = format!("{} {repository}", about.action);
        let (endpoint, token) = (self.settings.endpoint.clone(), self.settings.token.is_some());
        let message = redacted(&problem.text, self.settings.token.as_ref());
        let Some(status) = problem.status else {
            return match problem.transient {
                true => HubError::Unreachable { endpoint, problem: message },
                false => HubError::Answer { action, message },
            };
        };
        match (status, problem.code.as_str()) {
            (429, _) => HubError::RateLimited { endpoint, after: problem.wait.map(|wait| wait.as_secs()) },
            (401 | 403, "GatedRepo") => {
                let page = format!("{endpoint}/{}{repository}", about.kind.url_prefix());
                HubError::Gated { repository, page, token }
            }
            (401 | 404, "RepoNotFound") => {
                HubError::NotFound { kind: about.kind.singular(), repository, endpoint, token }
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
