//! Settings of the connection to the Hub and of the cache. The caller reads them from the environment.

use std::{fmt, path::PathBuf, time::Duration};

/// The Hub's default address.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Settings of the connection to the Hub and of the cache.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `https://huggingface.co`, without a slash at the end.
    pub endpoint: String,
    /// The `hub` folder of the Hugging Face cache.
    pub cache: PathBuf,
    /// The user's token.
    pub token: Option<Token>,
    /// Whether only the cache may be used.
    pub offline: bool,
    /// Timeout of a connection without data.
    pub silence: Duration,
    /// Number of repetitions after a failed request or transfer.
    pub retries: usize,
    /// First pause before a repetition; it doubles.
    pub pause: Duration,
    /// Files fetched at the same time.
    pub parallel: usize,
}

impl Settings {
    /// The defaults, with a cache at this path.
    pub fn new(cache: PathBuf) -> Self {
        Self {
            endpoint: DEFAULT_ENDPOINT.to_owned(),
            cache,
            token: None,
            offline: false,
            silence: Duration::from_secs(60),
            retries: 5,
            pause: Duration::from_millis(250),
            parallel: 4,
        }
    }

    /// The pause after so many failures.
    pub(crate) fn pause_after(&self, failures: usize) -> Duration {
        self.pause * (1 << failures.min(8))
    }
}

/// A secret, which is sent to the Hub and never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// The token in the text of `HF_TOKEN` or of the token file; `None` if that is empty.
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        (!text.is_empty()).then(|| Self(text.to_owned()))
    }

    /// The token itself, for sending it.
    pub fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// A message of the Hub or of git without the token, and without the queries of addresses: signed addresses are secrets
/// too.
pub(crate) fn redacted(text: &str, token: Option<&Token>) -> String {
    let text = token.map_or_else(|| text.to_owned(), |token| text.replace(token.secret(), "…"));
    let mut clean = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(at) = rest.find("://") {
        let end = rest[at..].find([' ', ')', '"', '\'', '>', '`', '\n']).map_or(rest.len(), |end| at + end);
        let address = &rest[..end];
        match address[at..].find('?') {
            Some(query) => clean.extend([&address[..at + query], "?…"]),
            None => clean.push_str(address),
        }
        rest = &rest[end..];
    }
    clean + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_never_shown() {
        let token = Token::new(" hf_secret\n").unwrap();
        assert_eq!((token.secret(), Token::new(" \n")), ("hf_secret", None));
        let settings = Settings { token: Some(token.clone()), ..Settings::new("/cache".into()) };
        assert!(!format!("{settings:?}").contains("secret"));
        assert_eq!(redacted("no `hf_secret` here", Some(&token)), "no `…` here");
    }

    #[test]
    fn signatures_of_addresses_are_cut() {
        let text = "get https://a.b/c?Signature=1&x=2 (url=http://d/e?f) then g?h";
        assert_eq!(redacted(text, None), "get https://a.b/c?… (url=http://d/e?…) then g?h");
        assert_eq!(redacted("https://a/b", None), "https://a/b");
    }
}
