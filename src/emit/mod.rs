//! Writing a branch, complete or absent: a folder that loaders take as it is, or a GGUF file.

mod branch;
mod gguf;
mod metadata;

pub use branch::{
    BranchWriter, CHECKSUMS_FILE, COPIED_FILES, Checksums, OutputWriter, is_licence, is_partial, places,
    planned_bytes, publish, remove_unfinished,
};
pub use gguf::{
    DENSE_TYPES, GgufBranchWriter, GgufFile, GgufOptions, embedding_type, linear_type, write_gguf,
};
pub use metadata::{Provenance, quantize_config_json, quantized_config_json};
