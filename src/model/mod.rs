//! The forward pass of a described model in explicit stages, so that the inputs of every linear are at hand without hooks.
//!
//! A layer's stages are those of its description, for most models `{q, k, v}` → `{o}` → `{gate, up}` → `{down}`.

mod attention;
mod compute;
mod decoder;
mod feed_forward;
mod gradients;
mod linear;
mod memory;
mod packed;
mod parts;
mod rope;
mod runner;
mod transformer;

pub use attention::KvCache;
pub use compute::{Compute, kind_name};
pub use decoder::Decoder;
pub use gradients::LayerGradients;
pub use linear::{CudaPacked, Dense, ForwardDense, Linear, Packed};
pub use memory::{DeviceNeed, check_device_memory, device_need};
pub use parts::{DenseParts, Norm};
pub use runner::{PackedLayer, Runner};
pub use transformer::{Between, Layer, Transformer, source_kind};
