//! Failures of requests: responses that are not a success, and responses that do not come.

use std::time::Duration;

use hf_hub::HFError;
use reqwest::{Response, StatusCode, header::RETRY_AFTER};
use serde_json::Value;

/// Why a request failed.
#[derive(Debug)]
pub(super) struct Problem {
    /// The status of the response; `None` if no complete response came.
    pub(super) status: Option<u16>,
    /// Error code of the Hub, which distinguishes responses of one status; may be empty.
    pub(super) code: String,
    /// `404 Not Found: no such thing`.
    pub(super) text: String,
    /// The wait that the Hub requests.
    pub(super) wait: Option<Duration>,
    /// Whether the same request may succeed later.
    pub(super) transient: bool,
    /// Whether it is transient, and `hf-hub` has not repeated the request.
    pub(super) repeatable: bool,
}

impl Problem {
    fn refused(status: StatusCode, code: String, message: Option<String>, wait: Option<Duration>) -> Self {
        let text = match message.filter(|message| !message.is_empty()) {
            Some(message) => format!("{status}: {message}"),
            None => status.to_string(),
        };
        let transient = matches!(status.as_u16(), 408 | 429 | 500..);
        Self { status: Some(status.as_u16()), code, text, wait, transient, repeatable: false }
    }

    fn without_response(text: String, transient: bool, repeatable: bool) -> Self {
        Self { status: None, code: String::new(), text, wait: None, transient, repeatable }
    }

    /// The problem of a response that is not a success, to a request that `hf-hub` did not send.
    pub(super) async fn of_response(response: Response) -> Self {
        let header = |name: &str| response.headers().get(name)?.to_str().ok().map(str::to_owned);
        let (code, message) = (header("X-Error-Code").unwrap_or_default(), header("X-Error-Message"));
        let wait =
            header(RETRY_AFTER.as_str()).and_then(|text| Some(Duration::from_secs(text.parse().ok()?)));
        let status = response.status();
        let body: Value = response.json().await.unwrap_or_default();
        let message = message.or_else(|| body["error"].as_str().map(str::to_owned));
        let problem = Self::refused(status, code, message, wait);
        Self { repeatable: problem.transient, ..problem }
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
            HFError::Xet { .. } => return Self::without_response(chain(&error), true, false),
            _ => (None, "", None),
        };
        let Some(context) = context else { return Self::without_response(chain(&error), false, false) };
        // The Hub's own code goes before the one that `hf-hub` derives from the status.
        let own = context.error_code.as_deref().filter(|code| !code.is_empty());
        let code = own.unwrap_or(code).to_owned();
        Self::refused(context.status, code, context.server_message.clone(), wait)
    }
}

impl From<&reqwest::Error> for Problem {
    fn from(error: &reqwest::Error) -> Self {
        // Without a connection the last cause is the system's reason; the others name only the steps to it.
        let text = if error.is_connect() { last_cause(error).to_string() } else { chain(error) };
        // A response that was cut is not requested again by `hf-hub`.
        Self::without_response(text, true, error.is_body() || error.is_decode())
    }
}

fn last_cause<'a>(error: &'a (dyn std::error::Error + 'static)) -> &'a (dyn std::error::Error + 'static) {
    std::iter::successors(Some(error), |&error| error.source()).last().unwrap_or(error)
}

/// An error with its causes; the texts of `hf-hub` name the last one alone.
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
