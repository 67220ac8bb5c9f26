//! The Llama forward pass as explicit stages, so that the inputs of every linear are at hand without hooks.
//!
//! A decoder layer is four stages, each of linears that share their input:
//! `{q, k, v}` → `{o}` → `{gate, up}` → `{down}`.

mod attention;
mod block_tuning;
mod compute;
mod decoder;
mod gradients;
mod linear;
mod llama;
mod memory;
mod packed;
mod rope;
mod runner;

pub use attention::KvCache;
pub use block_tuning::TunedLayer;
pub use compute::{Compute, kind_name};
pub use decoder::Decoder;
pub use gradients::LayerGradients;
pub use linear::{CudaPacked, Dense, Linear, Packed};
pub use llama::{Layer, Llama, Norms, Stage, add, source_kind};
pub use memory::{DeviceNeed, check_device_memory, device_need};
pub use runner::{PackedLayer, Runner};
