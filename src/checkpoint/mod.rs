//! Checkpoint folders in the Hugging Face layout: `config.json` and safetensors, read by memory map and written
//! by plan. The only place that knows file and tensor names.

mod config;
mod digest;
mod fields;
mod fingerprint;
mod header;
mod names;
mod packed;
mod quantization;
mod reader;
mod rope_config;
mod scale_bits;
#[cfg(test)]
mod tests;
mod unique;
mod values;
mod writer;

pub use config::{Architecture, CONFIG_FILE, LlamaConfig};
pub use names::{
    EMBED_TOKENS, FINAL_NORM, LM_HEAD, LinearId, LinearKind, dense_tensors, input_layernorm, layer_prefix,
    linear_shape, post_attention_layernorm,
};
pub use packed::{PackedTensors, packed};
pub use quantization::{CheckpointFormat, QUANTIZE_CONFIG_FILE, QuantizationConfig};
pub use reader::{Checkpoint, INDEX_FILE, TensorView, WEIGHTS_FILE};
pub use rope_config::{Rope, RopeScaling};
pub use safetensors::Dtype;
pub use values::to_bytes;
pub use writer::{
    ShardPlan, ShardWriter, TensorSpec, UNFINISHED, WriteDtype, Written, write_file_atomically,
};

#[cfg(target_endian = "big")]
compile_error!("safetensors files are little-endian and are read here as they lie");
