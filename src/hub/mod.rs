//! The Hugging Face Hub: models and datasets from it, into the cache that all of Hugging Face's tools share.
//!
//! The `hf-hub` crate speaks to the server. What it brings is taken into the cache only when its size and digest are
//! those that the Hub lists; a transfer that was cut goes on where it stopped. Nothing here reads the environment:
//! [`Settings`] hold what it says.

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
