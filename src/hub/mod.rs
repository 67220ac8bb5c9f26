//! The Hugging Face Hub: models and datasets from it, into the cache that all of Hugging Face's tools share; and commits to
//! its repositories.
//!
//! The `hf-hub` crate sends the requests. A file enters the cache only with the size and the digest that the Hub lists; an
//! interrupted transfer resumes where it stopped. The environment is not read here: the caller gives [`Settings`].

mod answer;
mod cache;
mod client;
mod digest;
mod fetch;
mod files;
mod reference;
mod settings;
mod transfer;
mod tree;
mod upload;

pub use client::Hub;
pub use digest::{ContentId, of_bytes, of_file};
pub use fetch::Snapshot;
pub use files::CARD_FILE;
pub use reference::{DEFAULT_REVISION, Reference};
pub(crate) use settings::redacted;
pub use settings::{DEFAULT_ENDPOINT, Settings, Token};
pub use transfer::Listed;
pub use upload::Commit;
