//! What a run needs of memory and disk, told to the user and refused before any work.

use std::fmt;

use tch::{Device, Kind};

use super::{compute_kind, estimate::Shape, output_folder::Place, preflight::DiskNeed, worker_pool::Limits};
use crate::{
    checkpoint::Checkpoint,
    cuda::Gpu,
    device,
    error::{ResourceError, Result},
    machine::{available_memory, product_speed, resident_memory},
    model::source_kind,
    plan::Plan,
    rotation::rotated_bytes,
    units::bytes,
};

/// Operations of a layer below which nobody waits for it.
const WORTH_ESTIMATING: f64 = 1e12;
/// What takes time beside matrix products, as a factor: measured on layers of Llama 2 7B's shape.
const BESIDE_PRODUCTS: f64 = 1.3;

/// What a run needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Needs {
    /// Of forward passes.
    pub(super) kind: Kind,
    /// What may be held where.
    pub(super) limits: Limits,
    /// Windows whose states of all layers are kept at the same time, where gradients are taken.
    pub(super) gradients_at_once: usize,
    device: Device,
    /// At most, in the memory of the device, or of the machine where that is the CPU.
    memory: u64,
    /// Activations that are held elsewhere.
    elsewhere: u64,
    disk: DiskNeed,
    /// Floating-point operations of a layer.
    operations: f64,
}

impl Needs {
    /// Of a whole run, with the rotated model if there will be one.
    ///
    /// # Errors
    /// When it does not fit.
    pub(super) fn of(plan: &Plan, checkpoint: &Checkpoint, place: &Place<'_>) -> Result<Self> {
        let rotates = plan.accuracy(checkpoint.config()).rotate;
        Self::and_rotated(plan, checkpoint, place, rotates)
    }

    /// Of what a run does with its layers; a rotated model is on the disk already.
    ///
    /// # Errors
    /// When it does not fit.
    pub(super) fn of_layers(plan: &Plan, checkpoint: &Checkpoint, place: &Place<'_>) -> Result<Self> {
        Self::and_rotated(plan, checkpoint, place, false)
    }

    fn and_rotated(plan: &Plan, checkpoint: &Checkpoint, place: &Place<'_>, rotates: bool) -> Result<Self> {
        let device = device::resolve_all(&plan.device)?[0].device;
        let kind = compute_kind(plan.compute_dtype, device, source_kind(checkpoint)?);
        let accuracy = plan.accuracy(checkpoint.config());
        let shape = Shape {
            config: checkpoint.config(),
            source_bytes: if accuracy.rotate { Kind::Float } else { source_kind(checkpoint)? }
                .elt_size_in_bytes() as u64,
            kind,
            windows: plan.samples,
            seq_len: plan.seq_len,
            variants: plan.variants.len(),
            shared_hessian: plan.shared_hessian,
            reference: accuracy.runs_reference(),
            gradient_windows: accuracy.gradient_windows(plan.samples),
            rotates,
        };
        let device_memory = match (device, plan.max_device_memory) {
            (Device::Cpu, _) => None,
            (_, Some(limit)) => Some(limit),
            // Others may want some too, and a heap has holes.
            (_, None) => Some(Gpu::of(device)?.memory()?.free as u64 / 10 * 9),
        };
        let base = resident_memory().unwrap_or(0);
        let limits = shape.limits(device, device_memory, plan.max_memory, base)?;
        let need = shape.need(device, limits.batch_tokens);
        let own = if device == Device::Cpu { base } else { 0 };
        let allowed = if device == Device::Cpu { limits.in_memory } else { limits.on_device };
        let held = need.activations.min(allowed.unwrap_or(u64::MAX));
        let elsewhere = need.activations - held;
        let in_memory = if device == Device::Cpu { Some(0) } else { limits.in_memory };
        let spilled = elsewhere.saturating_sub(in_memory.unwrap_or(u64::MAX));
        let needs_host = match device {
            Device::Cpu => need.working.saturating_add(held),
            // What leaves the device goes to memory first.
            _ => shape.host_beside_cuda().saturating_add(elsewhere - spilled),
        };
        fits_machine(available_memory(), needs_host, &shape, device, base, plan)?;
        let spilled = spilled.saturating_add(shape.output_hessians());
        let config = checkpoint.config();
        let spilled = spilled.saturating_add(if rotates { rotated_bytes(config) } else { 0 });
        let config = if accuracy.rotate { config.untied() } else { config.clone() };
        let disk = DiskNeed::new(plan, checkpoint, &config, place, shape.hidden_states(), spilled)?;
        disk.check(place)?;
        let memory = (own + need.working).saturating_add(held);
        let operations = shape.layer_operations();
        let gradients_at_once = shape.gradients_at_once();
        Ok(Self { kind, limits, gradients_at_once, device, memory, elsewhere, disk, operations })
    }

    /// Seconds that a layer will take, roughly: its products at the speed that one product has here. None where it is too
    /// little to be worth measuring, and on devices other than the CPU.
    ///
    /// # Errors
    /// When libtorch cannot compute.
    pub(super) fn layer_seconds(&self) -> Result<Option<f64>> {
        if self.device != Device::Cpu || self.operations < WORTH_ESTIMATING {
            return Ok(None);
        }
        Ok(Some(BESIDE_PRODUCTS * self.operations / product_speed(self.kind)?))
    }
}

/// Refuses a run that takes more than the memory that is `available`, where that is known. `needed` are bytes beyond `base`,
/// what the program holds already.
fn fits_machine(
    available: Option<u64>,
    needed: u64,
    shape: &Shape<'_>,
    device: Device,
    base: u64,
    plan: &Plan,
) -> Result<()> {
    let Some(available) = available.filter(|&available| available < needed) else { return Ok(()) };
    // Whole percents that leave some for others.
    let limit = (base + available) / 100 * 95;
    let fits = plan.max_memory.is_none() && shape.limits(device, None, Some(limit), base).is_ok();
    let error = ResourceError::Memory {
        memory: "memory".into(),
        available: bytes(base + available),
        needed: bytes(base.saturating_add(needed)),
        flag: fits.then(|| format!("--max-memory {}MB", limit / 1_000_000)),
    };
    Err(error.into())
}

impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whose, elsewhere) = match self.device {
            Device::Cpu => ("memory", "on disk"),
            _ => ("device memory", "in memory or on disk"),
        };
        write!(f, "{whose}: about {} at most", bytes(self.memory))?;
        if self.elsewhere > 0 {
            write!(f, "; {} of activations {elsewhere}", bytes(self.elsewhere))?;
        }
        let DiskNeed { branches, journal } = self.disk;
        write!(
            f,
            "; disk: {} for the branches, {} for the journal until it is done",
            bytes(branches),
            bytes(journal)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architectures::ModelConfig;

    #[test]
    fn a_run_that_does_not_fit_is_refused_with_the_flag_that_fits() {
        let json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
        });
        let config = ModelConfig::from_json("config.json", &json).unwrap();
        let plan = Plan::default();
        let shape = Shape {
            config: &config,
            source_bytes: 2,
            kind: Kind::Float,
            windows: plan.samples,
            seq_len: plan.seq_len,
            variants: plan.variants.len(),
            shared_hessian: false,
            reference: false,
            gradient_windows: 0,
            rotates: false,
        };
        let need = shape.need(Device::Cpu, 1024);
        let (base, all) = (100_000_000, need.working + need.activations);
        let fits = |available: u64| fits_machine(Some(available), all, &shape, Device::Cpu, base, &plan);
        fits(all).unwrap();
        fits_machine(None, all, &shape, Device::Cpu, base, &plan).unwrap();

        // ActivationStore for what is needed in any case, and for some activations.
        let error = fits(need.working + need.activations / 2).unwrap_err();
        let hint = error.hint().unwrap();
        let flag = hint.strip_prefix("it fits with --max-memory ").and_then(|rest| rest.split("MB").next());
        let limit = flag.unwrap_or_else(|| panic!("{hint}")).parse::<u64>().unwrap() * 1_000_000;
        assert!(limit < base + need.working + need.activations / 2);
        let limits = shape.limits(Device::Cpu, None, Some(limit), base).unwrap();
        assert!(limits.in_memory.unwrap() > need.activations / 4);

        // None for that.
        let error = fits(need.working / 2).unwrap_err();
        assert!(!error.hint().unwrap().contains("it fits with"), "{error}");
        assert!(error.to_string().starts_with("memory: "), "{error}");
    }

    #[test]
    fn numbers_beyond_any_machine_do_not_overflow() {
        let json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 256,
            "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
        });
        let config = ModelConfig::from_json("config.json", &json).unwrap();
        let windows = usize::MAX / 4096;
        let shape = Shape {
            config: &config,
            source_bytes: 2,
            kind: Kind::Float,
            windows,
            seq_len: 4096,
            variants: 4,
            shared_hessian: false,
            reference: true,
            gradient_windows: windows,
            rotates: false,
        };
        assert_eq!(shape.need(Device::Cpu, 1024).activations, u64::MAX);
        assert_eq!(shape.hidden_states(), u64::MAX);
    }
}
