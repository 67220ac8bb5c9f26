//! CUDA beside libtorch: our own kernels, compiled by NVRTC at run time and launched on libtorch's tensors, on libtorch's
//! stream. CUDA is not linked; its libraries are opened when they are needed.

mod compile;
mod copies;
mod gpu;
mod host_memory;

#[cfg(test)]
pub(crate) use compile::entries_by_generation;
pub use compile::{Macro, Source, architecture, compile, compiler_missing, known_architectures};
pub use copies::{Copies, Copy};
pub use gpu::{Argument, Gpu, Grid, Kernel, Memory};
pub use host_memory::{HostMemory, HostPool, HostTensor};
