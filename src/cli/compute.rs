//! Device on which a command runs a model.

use gptq::{checkpoint::Checkpoint, device, model::Compute};
use tch::Device;

use super::{
    args::{ComputeArgs, OutputArgs},
    terminal,
};

/// The device of this name; prints what `auto` chose.
pub(super) fn device(name: &str, output: &OutputArgs) -> gptq::Result<Device> {
    let choice = device::resolve(name)?;
    choice.note.iter().for_each(|note| terminal::note(output, note));
    Ok(choice.device)
}

impl ComputeArgs {
    pub(super) fn resolve(&self, checkpoint: &Checkpoint, output: &OutputArgs) -> gptq::Result<Compute> {
        Compute::new(device(&self.device, output)?, self.compute_dtype, checkpoint)
    }
}
