//! Where a command runs a model.

use gptq::{checkpoint::Checkpoint, device, model::Compute};

use super::{
    args::{ComputeArgs, OutputArgs},
    terminal,
};

impl ComputeArgs {
    /// What was asked for; says what `auto` chose.
    pub(super) fn resolve(&self, checkpoint: &Checkpoint, output: &OutputArgs) -> gptq::Result<Compute> {
        let choice = device::resolve(&self.device)?;
        choice.note.iter().for_each(|note| terminal::note(output, note));
        Compute::new(choice.device, self.compute_dtype, checkpoint)
    }
}
