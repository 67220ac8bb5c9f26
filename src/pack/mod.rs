//! Packs codes into 32-bit words and unpacks them, in the layout that readers of the format expect.

mod bits;
mod gptq;

pub use bits::{pack_columns, pack_rows, unpack_columns, unpack_rows};
pub use gptq::{PackedLinear, PackedView};
