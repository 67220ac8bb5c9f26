//! Names of repositories on the command line.

use std::{fmt, str::FromStr};

use crate::error::{Error, HubError, Result};

/// The default branch.
pub const DEFAULT_REVISION: &str = "main";

/// A repository of the Hub at a revision: `owner/name`, `owner/name@revision` or `owner/name:revision`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    repository: String,
    revision: Option<String>,
}

impl Reference {
    /// A reference of these parts; a revision of `None` is the main branch.
    ///
    /// # Errors
    /// If a part is not a valid name.
    pub fn new(repository: &str, revision: Option<&str>) -> Result<Self> {
        let bad = |found: &str, expected| Error::from(HubError::Reference { found: found.into(), expected });
        let parts: Vec<&str> = repository.split('/').collect();
        if parts.len() != 2 || !parts.iter().all(|part| is_name(part)) {
            return Err(bad(repository, "owner/name, of letters, digits, `-`, `_` and `.`"));
        }
        if let Some(revision) = revision.filter(|revision| !is_revision(revision)) {
            return Err(bad(
                &format!("{repository}@{revision}"),
                "a branch, tag or commit after the `@` or `:`",
            ));
        }
        Ok(Self { repository: repository.to_owned(), revision: revision.map(str::to_owned) })
    }

    /// `owner/name`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The part after the `/`.
    pub fn name(&self) -> &str {
        self.repository.split_once('/').map_or("", |(_, name)| name)
    }

    /// The part before the `/`.
    pub fn owner(&self) -> &str {
        self.repository.split_once('/').map_or("", |(owner, _)| owner)
    }

    /// Branch, tag or commit.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(DEFAULT_REVISION)
    }

    /// Its name in tables: the repository's name, and the revision if one was given.
    pub fn label(&self) -> String {
        match &self.revision {
            Some(revision) => format!("{}:{revision}", self.name()),
            None => self.name().to_owned(),
        }
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let at = text.find(['@', ':']);
        let (repository, revision) = at.map_or((text, None), |at| (&text[..at], Some(&text[at + 1..])));
        Self::new(repository, revision)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        self.revision.as_ref().map_or(Ok(()), |revision| write!(f, "@{revision}"))
    }
}

/// Whether the Hub allows this as the name of an owner or a repository.
fn is_name(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let ends = text.starts_with(['-', '.']) || text.ends_with(['-', '.']);
    !text.is_empty() && text.len() <= 96 && text.chars().all(allowed) && !ends && !text.contains("..")
}

/// Whether git allows this as a branch; in particular it cannot leave the folder `refs`.
fn is_revision(text: &str) -> bool {
    let part = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.ends_with(".lock");
    let forbidden = |c: char| c.is_ascii_control() || " ~^:?*[\\".contains(c);
    text.split('/').all(part)
        && !text.contains(forbidden)
        && !text.contains("..")
        && !text.contains("@{")
        && !text.ends_with('.')
        && !text.starts_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_of_a_revision() {
        for (text, repository, revision) in [
            ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf", "main"),
            ("a/b@v1.0", "a/b", "v1.0"),
            (
                "TheBloke/Llama-2-7B-GPTQ:gptq-4bit-32g-actorder_True",
                "TheBloke/Llama-2-7B-GPTQ",
                "gptq-4bit-32g-actorder_True",
            ),
            ("a/b@refs/pr/1", "a/b", "refs/pr/1"),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!((reference.repository(), reference.revision()), (repository, revision));
            assert_eq!(reference.to_string(), text.replace(':', "@"));
        }
        let labels = ["a/b", "a/b@c", "a/b:c"].map(|text| text.parse::<Reference>().unwrap().label());
        assert_eq!(labels, ["b", "b:c", "b:c"]);
    }

    #[test]
    fn what_is_not_a_repository() {
        for text in [
            "", "a", "a/b/c", "/b", "a/", "a/b c", "./b", "../b", "-a/b", "a/b@", "a/b:", "a/b@../x",
            "a/b@x..y", "a/b@-x", "a/b@x/.y", "a/b@x y",
        ] {
            let error = text.parse::<Reference>().unwrap_err();
            assert!(matches!(error, Error::Hub(HubError::Reference { .. })), "{text}: {error}");
        }
    }
}
