//! Checkpoint folders in the Hugging Face layout: `config.json` and safetensors, read by memory map and written by plan; GGUF
//! files are read as if they were such a folder. The only place with file names.

mod digest;
mod gguf_file;
mod header;
mod packed;
mod pytorch_file;
mod quantization;
mod reader;
mod scale_bits;
#[cfg(test)]
mod tests;
mod values;
mod weights_file;
mod writer;

pub use packed::{PackedTensors, check_pack_factor, integers, packed, stored_zeros};
pub use quantization::{CheckpointFormat, OPTIMUM_CONFIG_FILE, QUANTIZE_CONFIG_FILE, QuantizationConfig};
pub use reader::{Checkpoint, TensorView};
pub use safetensors::Dtype;
pub use values::to_bytes;
pub use weights_file::{INDEX_FILE, NoWeights, WEIGHTS_FILE, base_names, needs_base_name, weights_file};
pub use writer::{
    ShardPlan, ShardWriter, TensorSpec, UNFINISHED, Written, write_file_atomically, write_json_atomically,
};

#[cfg(target_endian = "big")]
compile_error!("safetensors files are little-endian and are read here as they lie");
