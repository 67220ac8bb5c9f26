//! CUDA beside libtorch: kernels of our own, compiled by NVRTC at run time and launched on libtorch's tensors, on the
//! stream that libtorch uses. Nothing links CUDA; its libraries are opened when they are needed.

mod compile;
mod copies;
mod gpu;

pub use compile::{Macro, Source, compile, compiler_missing};
pub use copies::{Copies, Copy};
pub use gpu::{Argument, Gpu, Grid, Kernel, Memory};

/// The column loop and what stands around it.
pub const GPTQ_BLOCK: Source = Source { name: "gptq_block.cu", text: include_str!("gptq_block.cu") };

/// Products with packed weights.
pub const INT4_MATMUL: Source = Source { name: "int4_matmul.cu", text: include_str!("int4_matmul.cu") };
