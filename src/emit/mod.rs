//! Writing a branch: a folder that loaders take as it is, complete or absent.

mod branch;
mod metadata;

pub use branch::{
    BranchWriter, CHECKSUMS_FILE, Checksums, is_partial, places, planned_bytes, publish, remove_unfinished,
};
pub use metadata::{Provenance, quantize_config_json, quantized_config_json};
