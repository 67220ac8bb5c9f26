//! How much memory a run takes, from shapes alone, before any work.
//!
//! Everything is counted in bytes by what is alive at the same time: a layer's weights always; then, stage by stage, Hessian,
//! factor, stacked weights, codes, and the activations of one batch; and the activations of all windows, which may be
//! kept elsewhere.

use tch::{Device, Kind};

use super::{
    crew::Limits,
    output_hessians::{BATCH_TOKENS as GRADIENT_BATCH_TOKENS, layer_bytes},
};
use crate::{
    checkpoint::{LinearKind, LlamaConfig},
    error::{ResourceError, Result},
    model::Stage,
    report::bytes,
    rotation::TURNED_TOGETHER,
};

const FP32: u64 = 4;
/// Columns that the CPU factorizes together, and what is made of them on the way.
const CHOLESKY_ROWS: u64 = 3 * 768;
/// Columns that are solved together, their sums, and the product for them.
const PANEL_ROWS: u64 = 3 * 256;
/// What the heaps of a program with threads keep beside what is counted.
const HEAPS: u64 = 48 << 20;
/// What CUDA itself takes: its context, the libraries' kernels and workspaces.
const CUDA_LIBRARIES: u64 = 700 << 20;
/// Tokens that go through the model together on the CPU: enough to keep it busy, few enough to stay small.
const CPU_BATCH_TOKENS: usize = 1024;
/// The same on CUDA, unless memory is short.
const CUDA_BATCH_TOKENS: usize = 8192;

/// What is to be done, as far as memory is concerned.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape<'a> {
    pub(super) config: &'a LlamaConfig,
    /// Bytes of a weight as stored.
    pub(super) source_bytes: u64,
    /// Of weights and activations in forward passes.
    pub(super) kind: Kind,
    pub(super) windows: usize,
    pub(super) seq_len: usize,
    pub(super) variants: usize,
    pub(super) shared_hessian: bool,
    /// Windows of which the unquantized model's activations are kept beside the variants'.
    pub(super) dense_windows: usize,
    /// Windows on which gradients are taken for output Hessians.
    pub(super) gradient_windows: usize,
    /// Whether each layer is tuned once it is solved.
    pub(super) tunes: bool,
    /// Sweeps of refinement, for which windows are held out.
    pub(super) refine: u32,
    /// Whether the model is rotated first.
    pub(super) rotates: bool,
}

/// Bytes on one device, or in memory where that is the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Need {
    /// Weights, Hessians, solves, and one batch's activations: needed in any case.
    pub(super) working: u64,
    /// Activations of all windows, where they may be kept.
    pub(super) activations: u64,
}

impl Shape<'_> {
    fn element(&self) -> u64 {
        self.kind.elt_size_in_bytes() as u64
    }

    fn layer_weights(&self) -> u64 {
        let numbers: usize =
            LinearKind::ALL.iter().map(|k| k.shape(self.config).iter().product::<usize>()).sum();
        numbers as u64 * self.source_bytes
    }

    /// Output and input features of a stage's linears together.
    fn stage(&self, stage: Stage) -> (u64, u64) {
        let shapes = stage.linears().iter().map(|kind| kind.shape(self.config));
        let n: usize = shapes.clone().map(|[n, _]| n).sum();
        let k = shapes.map(|[_, k]| k).max().unwrap_or(0);
        (n as u64, k as u64)
    }

    /// Activations of one batch while it goes through a layer.
    fn batch(&self, tokens: usize) -> u64 {
        let (hidden, wide) = (self.config.hidden_size as u64, self.config.intermediate_size as u64);
        let (attention, e) = (self.config.attention_width() as u64, self.element());
        // The residual stream and its norm's steps in fp32; gate, up and what is made of them; or q, k, v, turned and
        // repeated.
        let norm = 3 * FP32 * hidden + 2 * e * hidden;
        let most = (4 * wide * e).max(8 * attention * e);
        tokens as u64 * (norm + most)
    }

    /// Hidden states of all streams.
    pub(super) fn hidden_states(&self) -> u64 {
        let streams = if self.shared_hessian { 1 } else { self.variants as u64 };
        let hidden = self.config.hidden_size as u64;
        self.of_tokens(self.windows, streams * hidden)
            .saturating_add(self.of_tokens(self.dense_windows, hidden))
    }

    /// Hidden states of all streams, and one stage's inputs, which are kept until its linears are solved.
    fn activations(&self) -> u64 {
        let (hidden, attention) = (self.config.hidden_size as u64, self.config.attention_width() as u64);
        let wide = self.config.intermediate_size as u64;
        // In the unquantized model the inputs of all of a layer's stages, and its outputs.
        let dense = self.of_tokens(self.dense_windows, attention + 2 * hidden + wide);
        // What goes into a layer that is tuned.
        let entered = if self.tunes { self.of_tokens(self.windows, hidden) } else { 0 };
        self.hidden_states()
            .saturating_add(self.of_tokens(self.windows, attention.max(wide)))
            .saturating_add(dense)
            .saturating_add(entered)
    }

    /// Bytes of so many values of every token of some windows. The number of tokens is the user's, and may be anything.
    fn of_tokens(&self, windows: usize, values: u64) -> u64 {
        let tokens = (windows as u64).saturating_mul(self.seq_len as u64);
        tokens.saturating_mul(values * self.element())
    }

    /// The largest of what a stage's steps take beside the layer's weights.
    fn solving(&self, stage: Stage, cuda: bool) -> u64 {
        let (n, k) = self.stage(stage);
        let matrix = k * k * FP32;
        // Where several variants are solved for one Hessian, it outlives a factor, and their codes pile up.
        let together = self.shared_hessian || stage == Stage::AttentionInput;
        let several = together && self.variants > 1;
        let kept = u64::from(several) * matrix;
        let codes = n * k * if several { self.variants as u64 } else { 1 };
        let factoring = if cuda { 4 * matrix } else { 2 * matrix + CHOLESKY_ROWS * k * FP32 };
        let energy = matrix + if cuda { n * k * (2 + FP32) } else { 0 };
        let solving = kept + matrix + n * k * FP32 + codes + PANEL_ROWS * n * FP32;
        // Codes, packed words, and the weights that the calibration goes on with.
        let leaving = kept + codes + n * k * self.element() + n * k / 2;
        // The next stage's Hessian is accumulated with these weights.
        let next = (self.config.intermediate_size as u64).pow(2) * FP32;
        let sums = if stage == Stage::MlpInput { next } else { matrix };
        let capturing = n * k * self.element() + if self.dense_windows > 0 { 2 * sums } else { sums };
        if self.dense_windows > 0 {
            // The drift stays until the weights are aimed; those take another copy and what is added to it.
            return matrix
                + n * k * FP32 * 2
                + factoring.max(energy).max(solving).max(leaving).max(capturing);
        }
        factoring.max(energy).max(solving).max(leaving).max(capturing)
    }

    /// What feedback between rows takes beside a stage's own: the layer's output Hessians, factors of a stage's, the weights
    /// aimed at and their errors, and the Hessian, which is kept.
    fn feedback(&self, stage: Stage) -> u64 {
        if self.gradient_windows == 0 {
            return 0;
        }
        let (n, k) = self.stage(stage);
        let outputs = layer_bytes(self.config);
        2 * outputs + (2 * n * k + k * k) * FP32
    }

    /// What refinement takes beside a stage's own: the Hessian of the held-out windows and, as it outlives the factor, the one that is
    /// solved with; levels, differences, gradients and the weight of the largest linear.
    fn refining(&self, stage: Stage) -> u64 {
        if self.refine == 0 {
            return 0;
        }
        let sizes = stage.linears().iter().map(|kind| kind.shape(self.config).iter().product::<usize>());
        let (_, k) = self.stage(stage);
        // While the MLP's second stage is captured, both are as wide as that.
        let k = if stage == Stage::MlpInput { k.max(self.config.intermediate_size as u64) } else { k };
        (2 * k * k + 4 * sizes.max().unwrap_or(0) as u64) * FP32
    }

    /// What gradients take before the first layer is solved: a layer in fp32, what its operations keep of a batch for the way
    /// back, and its output Hessians.
    fn taking_gradients(&self) -> u64 {
        if self.gradient_windows == 0 {
            return 0;
        }
        let tokens = self.seq_len.max(GRADIENT_BATCH_TOKENS);
        self.layer_weights() / self.source_bytes * (FP32 + self.source_bytes)
            + 2 * layer_bytes(self.config)
            + self.there_and_back(tokens)
    }

    /// What rotating takes before anything else: the embedding or the output layer in fp32, times the norm, rotated, and as bytes; and
    /// rows of it on the way in fp64.
    fn rotating(&self) -> u64 {
        if !self.rotates {
            return 0;
        }
        let numbers = (self.config.vocab_size * self.config.hidden_size) as u64;
        4 * numbers * FP32 + 3 * 2 * FP32 * numbers.min(TURNED_TOGETHER as u64)
    }

    /// What a layer's operations keep of some tokens for the way back, in fp32.
    fn there_and_back(&self, tokens: usize) -> u64 {
        3 * self.batch(tokens) / self.element() * FP32
    }

    /// What tuning takes beside the layer's weights: its codes, and its weights in fp32 as solved, scaled, and on the way back.
    fn tuning(&self) -> u64 {
        let numbers = self.layer_weights() / self.source_bytes;
        match self.tunes {
            true => numbers * (1 + 3 * FP32) + self.there_and_back(self.seq_len.max(GRADIENT_BATCH_TOKENS)),
            false => 0,
        }
    }

    /// Of the windows that gradients are taken on, as many as the activations later have room for: what goes into every layer and
    /// out of the last, and the gradients, are kept of them at the same time.
    pub(super) fn gradients_at_once(&self) -> usize {
        let values = (self.config.num_layers as u64 + 2) * self.config.hidden_size as u64;
        let window = (self.seq_len as u64).saturating_mul(values * FP32).max(1);
        (self.activations() / window) as usize
    }

    /// Output Hessians of all layers, on disk.
    pub(super) fn output_hessians(&self) -> u64 {
        if self.gradient_windows == 0 { 0 } else { layer_bytes(self.config) * self.config.num_layers as u64 }
    }

    /// Floating-point operations of a layer on the CPU, but for attention's scores and whatever is not a product.
    pub(super) fn layer_operations(&self) -> f64 {
        let tokens = self.windows as f64 * self.seq_len as f64;
        let (mut forward, mut hessians, mut factors, mut solves) = (0.0, 0.0, 0.0, 0.0);
        for stage in Stage::ALL {
            let (n, k) = self.stage(stage);
            let (n, k) = (n as f64, k as f64);
            forward += 2.0 * tokens * n * k;
            // The lower triangles alone.
            hessians += tokens * k * k;
            factors += k.powi(3) / 3.0;
            // The energy of the outputs, for the reported error, and the compensation.
            solves += 2.0 * n * k * k;
            // Products with both Hessians; then columns' changes, scales' changes, and the held-out error of each sweep.
            if self.refine > 0 {
                solves += (3.0 + 5.0 * f64::from(self.refine)) * n * k * k;
            }
        }
        let variants = self.variants as f64;
        // Forward passes of the unquantized model; products for the drift, and for what aims at it.
        let followed = match self.dense_windows {
            0 => 0.0,
            windows => {
                let share = windows as f64 / self.windows as f64;
                share * (forward + variants * 2.0 * hessians) + variants * 2.0 * solves
            }
        };
        let streams = if self.shared_hessian { 1.0 } else { variants };
        // Through a layer, again for the way back, and back; and sums over blocks of outputs.
        let gradients = match self.gradient_windows {
            0 => 0.0,
            windows => {
                let tokens = windows as f64 * self.seq_len as f64;
                let share = windows as f64 / self.windows as f64;
                share * 3.0 * forward + 2.0 * tokens * layer_bytes(self.config) as f64 / FP32 as f64 / 1024.0
            }
        };
        gradients + followed + streams * (forward + hessians + factors) + variants * solves
    }

    /// What a run takes on CUDA (one device, all variants on it) or on the CPU, with `tokens` going through together.
    pub(super) fn need(&self, device: Device, tokens: usize) -> Need {
        let cuda = device != Device::Cpu;
        let solving = Stage::ALL
            .into_iter()
            .map(|stage| self.solving(stage, cuda) + self.feedback(stage) + self.refining(stage));
        let solving = solving.max().unwrap_or(0).max(self.tuning() + self.feedback(Stage::MlpOutput));
        let fixed = if cuda { CUDA_LIBRARIES } else { HEAPS };
        Need {
            working: fixed
                + (self.layer_weights() + solving + self.batch(tokens.max(self.seq_len)))
                    .max(self.taking_gradients())
                    .max(if cuda { 0 } else { self.rotating() }),
            activations: self.activations(),
        }
    }

    /// Memory of the machine beside a CUDA device: this layer's weights and the next one's, page-locked; or what rotating takes before.
    pub(super) fn host_beside_cuda(&self) -> u64 {
        (2 * self.layer_weights()).max(self.rotating())
    }

    /// What may be held where. `device_memory` and `memory` are limits in bytes, `base` what the program holds by itself.
    ///
    /// # Errors
    /// When even the least does not fit.
    pub(super) fn limits(
        &self,
        device: Device,
        device_memory: Option<u64>,
        memory: Option<u64>,
        base: u64,
    ) -> Result<Limits> {
        let left = |whose: &str, limit: u64, working: u64, what: &str| {
            limit.checked_sub(working).ok_or_else(|| ResourceError::Memory {
                memory: whose.to_owned(),
                available: bytes(limit),
                needed: format!("{} ({what})", bytes(working)),
                flag: None,
            })
        };
        if device == Device::Cpu {
            let working = base + self.need(device, CPU_BATCH_TOKENS).working;
            let what = "one layer's weights and Hessians; activations go to disk";
            let in_memory = memory.map(|limit| left("memory", limit, working, what)).transpose()?;
            return Ok(Limits { on_device: None, in_memory, batch_tokens: CPU_BATCH_TOKENS });
        }
        let host = base + self.host_beside_cuda();
        let in_memory = memory.map(|limit| left("memory", limit, host, "two layers' weights")).transpose()?;
        let mut batch_tokens = CUDA_BATCH_TOKENS.max(self.seq_len);
        let Some(limit) = device_memory else {
            return Ok(Limits { on_device: None, in_memory, batch_tokens });
        };
        while batch_tokens > self.seq_len && self.need(device, batch_tokens).working > limit {
            batch_tokens = (batch_tokens / 2).max(self.seq_len);
        }
        let what = "one layer's weights and Hessians, one window";
        let working = self.need(device, batch_tokens).working;
        let on_device = Some(left("device memory", limit, working, what)?);
        Ok(Limits { on_device, in_memory, batch_tokens })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::LlamaConfig;

    fn config(hidden: usize, intermediate: usize, heads: usize, kv_heads: usize) -> LlamaConfig {
        let json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": intermediate,
            "num_hidden_layers": 80, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
        });
        LlamaConfig::from_json("config.json", &json).unwrap()
    }

    fn shape(config: &LlamaConfig) -> Shape<'_> {
        Shape {
            config,
            source_bytes: 2,
            kind: Kind::Half,
            windows: 128,
            seq_len: 2048,
            variants: 4,
            shared_hessian: false,
            dense_windows: 0,
            gradient_windows: 0,
            tunes: false,
            refine: 0,
            rotates: false,
        }
    }

    #[test]
    fn the_card_fits_small_devices() {
        let (small, large) = (config(4096, 11008, 32, 32), config(8192, 28672, 64, 8));
        for (config, gigabytes) in [(&small, 8u64), (&large, 24)] {
            let limits = shape(config).limits(Device::Cuda(0), Some(gigabytes << 30), None, 0).unwrap();
            assert!(limits.batch_tokens >= 2048 && limits.on_device.is_some(), "{limits:?}");
        }
        let error = shape(&large).limits(Device::Cuda(0), Some(8 << 30), None, 0).unwrap_err();
        assert!(
            error.to_string().starts_with("device memory: 8.59 GB are available, and at least "),
            "{error}"
        );
    }

    #[test]
    fn a_smaller_device_gets_smaller_batches_and_fewer_activations() {
        let config = config(4096, 11008, 32, 32);
        let of = |gib: u64| shape(&config).limits(Device::Cuda(0), Some(gib << 30), None, 0).unwrap();
        assert_eq!(of(100).batch_tokens, CUDA_BATCH_TOKENS);
        assert!(of(100).on_device > of(8).on_device);
        assert!(of(4).batch_tokens <= of(8).batch_tokens);
    }

    #[test]
    fn memory_that_is_limited_leaves_the_rest_for_activations() {
        let config = config(4096, 11008, 32, 32);
        let shape = shape(&config);
        let working = shape.need(Device::Cpu, CPU_BATCH_TOKENS).working;
        let limits = shape.limits(Device::Cpu, None, Some(working + 1_000_300), 300).unwrap();
        assert_eq!(limits.in_memory, Some(1_000_000));
        assert_eq!(shape.limits(Device::Cpu, None, None, 300).unwrap().in_memory, None);
        assert!(shape.limits(Device::Cpu, None, Some(working), 300).is_err());
    }
}
