//! JSON files from elsewhere: every key at most once, and typed reading of objects.

mod fields;
mod unique;

pub(crate) use fields::{Fields, SIZE_LIMIT, read_json};
