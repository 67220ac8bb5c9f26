//! GPTQ quantization of language models: from an fp16 checkpoint to packed branches that popular programs load.
//!
//! The flow of the data; each module uses only those before it: [`checkpoint`] and [`calibration`] read; [`gptq`] solves, on
//! [`amx`] or [`cuda`] where there is one; [`pack`] packs; [`kernels`] and [`model`] run; [`report`] has the results; [`emit`]
//! writes, [`verify`] reopens, [`eval`] measures, [`generation`] generates text; [`pipeline`] has the order of the steps.

pub mod accuracy;
pub mod amx;
pub mod architectures;
pub mod calibration;
pub mod card;
pub mod chat;
pub mod checkpoint;
pub mod cluster;
pub mod cuda;
pub mod device;
pub mod emit;
pub mod equalization;
pub mod error;
pub mod eval;
pub mod folder;
pub mod fp16;
pub mod gate;
pub mod generation;
pub mod ggml;
pub mod gguf;
pub mod gptq;
pub mod hub;
pub mod json;
pub mod kernels;
pub mod machine;
pub mod model;
pub mod pack;
pub mod pipeline;
pub mod plan;
pub mod products;
pub mod progress;
pub mod publish;
pub mod report;
pub mod rotation;
pub mod units;
pub mod variant;
pub mod verify;

/// Kernels and a CUDA driver on this machine, for tests.
#[cfg(test)]
#[path = "../tests/cuda_host/mod.rs"]
#[allow(dead_code, reason = "the integration tests use more of it")]
mod cuda_host;

pub use error::{ClusterError, Error, JournalError, NumericalError, ReportError, ResourceError, Result};
