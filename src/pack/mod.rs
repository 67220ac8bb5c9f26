//! Codes to 32-bit words and back, exactly as the readers of the format expect them.

mod bits;
mod gptq;

pub use bits::{pack_columns, pack_rows, unpack_columns, unpack_rows};
pub use gptq::{PackedLinear, PackedView};
