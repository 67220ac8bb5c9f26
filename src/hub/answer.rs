//! Answers that are not a success, and answers that do not come.

use std::time::Duration;

use hf_hub::HFError;
use reqwest::{Response, header::RETRY_AFTER};
use serde_json::Value;

/// Why a request brought nothing.
#[derive(Debug)]
pub(super) enum Problem {
    /// The Hub said no.
    Refused(Refusal),
    /// There was no answer.
    Silence(String),
    /// The answer was cut, or is none.
    Cut(String),
    /// Anything else.
    Other(String),
}

/// An answer that is not a success.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: u16,
    /// By which the Hub tells refusals of one status apart; empty where it does not.
    pub(super) code: String,
    /// `404 Not Found: no such thing`.
    pub(super) said: String,
    /// How long it asks to wait.
    pub(super) wait: Option<Duration>,
}

impl Problem {
    /// Whether the same request may succeed a little later.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Refused(refusal) => matches!(refusal.status, 408 | 429 | 500..),
            Self::Silence(_) | Self::Cut(_) => true,
            Self::Other(_) => false,
        }
    }

    /// What is known of it.
    pub(super) fn text(&self) -> &str {
        match self {
            Self::Refused(refusal) => &refusal.said,
            Self::Silence(text) | Self::Cut(text) | Self::Other(text) => text,
        }
    }

    /// Of an answer that is not a success.
    pub(super) async fn of_answer(answer: Response) -> Self {
        let header = |name: &str| answer.headers().get(name)?.to_str().ok().map(str::to_owned);
        let (code, message) = (header("X-Error-Code").unwrap_or_default(), header("X-Error-Message"));
        let wait =
            header(RETRY_AFTER.as_str()).and_then(|text| Some(Duration::from_secs(text.parse().ok()?)));
        let status = answer.status();
        let body: Value = answer.json().await.unwrap_or_default();
        let message = message.or_else(|| body["error"].as_str().map(str::to_owned));
        Self::Refused(Refusal {
            status: status.as_u16(),
            code,
            said: said(status.to_string(), message),
            wait,
        })
    }
}

impl From<HFError> for Problem {
    fn from(error: HFError) -> Self {
        let (context, code, wait) = match &error {
            HFError::Http { context }
            | HFError::AuthRequired { context }
            | HFError::Forbidden { context }
            | HFError::Conflict { context } => (Some(context), "", None),
            HFError::RateLimited { context, retry_after } => (Some(context), "", *retry_after),
            HFError::RepoNotFound { context, .. } => (context.as_ref(), "RepoNotFound", None),
            HFError::RevisionNotFound { context, .. } => (context.as_ref(), "RevisionNotFound", None),
            HFError::Request { source, .. } => return source.into(),
            HFError::Xet { .. } => return Self::Silence(chain(&error)),
            _ => (None, "", None),
        };
        let Some(context) = context else { return Self::Other(chain(&error)) };
        // What the Hub says goes before what the client makes of the status.
        let own = context.error_code.as_deref().filter(|code| !code.is_empty());
        Self::Refused(Refusal {
            status: context.status.as_u16(),
            code: own.unwrap_or(code).to_owned(),
            said: said(context.status.to_string(), context.server_message.clone()),
            wait,
        })
    }
}

impl From<&reqwest::Error> for Problem {
    fn from(error: &reqwest::Error) -> Self {
        if error.is_body() || error.is_decode() {
            Self::Cut(chain(error))
        } else {
            Self::Silence(chain(error))
        }
    }
}

fn said(status: String, message: Option<String>) -> String {
    match message.filter(|message| !message.is_empty()) {
        Some(message) => format!("{status}: {message}"),
        None => status,
    }
}

/// An error with its causes; the client's own texts name only the last one.
fn chain(error: &dyn std::error::Error) -> String {
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
