//! GGUF, llama.cpp's file format (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>): typed metadata, the places of
//! tensors, the numbers in their blocks, and the names and keys of the architectures that are read and written here.

mod blocks;
mod config;
mod header;
mod metadata;
pub mod names;
#[cfg(test)]
mod tests;
mod writer;

pub use blocks::{Stored, dequantize, permuted};
pub use config::model_config;
pub use header::{Header, TensorInfo};
pub use metadata::{ElementType, Metadata, MetadataValue};
pub use writer::{GgufPlan, GgufTensor, GgufWriter, HEADER_SHA256, TENSOR_SHA256, header_digest};

/// The architecture of llama.cpp whose q and k have the rows of each head in another order.
pub const LLAMA: &str = "llama";

/// The architectures that are read and written, and their classes in `architectures` of `config.json`.
pub const ARCHITECTURES: [(&str, &str, &str); 3] = [
    (LLAMA, "LlamaForCausalLM", "llama"),
    ("qwen2", "Qwen2ForCausalLM", "qwen2"),
    ("qwen3", "Qwen3ForCausalLM", "qwen3"),
];
