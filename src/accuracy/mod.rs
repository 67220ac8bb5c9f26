//! What is done for accuracy beyond plain GPTQ: each refinement by its name, and the presets that choose among them.

mod quality;
mod scales;

pub use quality::{AccuracyOptions, Quality};
pub use scales::{ScaleSearch, Scales};
