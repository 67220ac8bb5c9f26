//! Memory of a run, from shapes alone, before any work.
//!
//! Everything is counted in bytes by what is alive at the same time: a layer's weights always; then, stage by stage, Hessian,
//! factor, stacked weights, codes, and the activations of one batch; and the activations of all windows, which may be
//! kept elsewhere.

use tch::Device;

use super::{
    compute_kinds::ComputeKinds,
    memory::Limits,
    output_hessians::{BATCH_TOKENS as GRADIENT_BATCH_TOKENS, largest_hessian_bytes, largest_layer_bytes},
    phases::{of_targets, part_of_tokens, per_token, shape_of},
};
use crate::{
    architectures::{GroupConfig, LayerConfig, LinearConfig, ModelConfig},
    error::{ResourceError, Result},
    gptq::CrossCovariance,
    rotation::TURNED_TOGETHER,
    units::bytes,
    variant::Output,
};

pub(super) const FP32: u64 = 4;
/// Columns that the CPU factorizes together, and what is made of them on the way.
const CHOLESKY_ROWS: u64 = 3 * 768;
/// Columns that are solved together, their sums, and the product for them.
const PANEL_ROWS: u64 = 3 * 256;
/// Bytes of the heaps of a program with threads, beside what is counted.
const HEAPS: u64 = 48 << 20;
/// Freed buffers that the heaps keep for the next ones: at most so many bytes, and this part of what is counted.
const RETAINED: (u64, u64) = (160 << 20, 12);
/// The same with AMX, for which operands are laid out.
const RETAINED_WITH_MATRIX_UNIT: (u64, u64) = (300 << 20, 8);
/// Bytes of CUDA itself: its context, the libraries' kernels and workspaces.
const CUDA_LIBRARIES: u64 = 700 << 20;
/// Tokens that go through the model together on the CPU: enough to keep it busy, few enough to stay small.
const CPU_BATCH_TOKENS: usize = 1024;
/// The same on CUDA, unless memory is short.
const CUDA_BATCH_TOKENS: usize = 8192;

/// Which part of the speed of large products the phases of a layer reach; `phases` in `run.json` has them. That of forward passes and
/// statistics is of products in the usual kind, the others of fp32.
struct Speeds {
    forward: f64,
    statistics: f64,
    factorization: f64,
    targets: f64,
    solve: f64,
    /// Operations for each weight of a search for scales, in a solve.
    search: f64,
}

/// On processors whose bf16 products are no faster than those of fp32.
const PLAIN: Speeds =
    Speeds { forward: 0.9, statistics: 0.8, factorization: 0.56, targets: 1.25, solve: 0.67, search: 2700.0 };
/// With the bf16 dot products of AMD's processors, which also run targets, and solves behind a panel.
const DOT_PRODUCTS: Speeds =
    Speeds { forward: 0.95, statistics: 0.8, factorization: 0.6, targets: 1.55, solve: 1.3, search: 2200.0 };
/// With AMX, where bf16 products run the whole layer.
const MATRIX_UNIT: Speeds =
    Speeds { forward: 1.0, statistics: 0.42, factorization: 0.85, targets: 2.4, solve: 1.6, search: 5500.0 };
/// Operations of fp32 products in the time of all else that is done with a value that goes into a product or out of it.
const BESIDE_A_VALUE: f64 = 650.0;
/// Factor of a solve's time with output Hessians.
const ROW_BLOCKS: f64 = 2.0;
/// Time of a layer over the time of its products.
const BESIDE_PRODUCTS: f64 = 1.15;

/// Work of a layer: floating-point operations over the part of the speed of large products that they reach.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Work {
    /// Of forward passes, Hessians and cross-covariances in the usual kind.
    pub(super) usual: f64,
    /// Of forward passes in fp32, and of what is done beside products.
    pub(super) exact: f64,
    /// Of solving, in fp32.
    pub(super) fp32: f64,
}

impl Work {
    /// Of both.
    fn with(self, other: Self) -> Self {
        Self {
            usual: self.usual + other.usual,
            exact: self.exact + other.exact,
            fp32: self.fp32 + other.fp32,
        }
    }

    /// Forward passes and statistics, and solving, so many times.
    fn times(self, products: f64, fp32: f64) -> Self {
        Self { usual: products * self.usual, exact: products * self.exact, fp32: fp32 * self.fp32 }
    }
}

/// The sizes of a run that its memory depends on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape<'a> {
    pub(super) config: &'a ModelConfig,
    /// Bytes of a weight as stored.
    pub(super) source_bytes: u64,
    pub(super) kinds: ComputeKinds,
    /// Of this rank.
    pub(super) windows: usize,
    /// Processes of the run.
    pub(super) ranks: usize,
    pub(super) seq_len: usize,
    /// What is made.
    pub(super) outputs: &'a [Output],
    pub(super) shared_hessian: bool,
    /// Whether the reference model's activations are kept beside the variants'.
    pub(super) reference: bool,
    /// Windows on which gradients are taken for output Hessians.
    pub(super) gradient_windows: usize,
    /// Whether the model is rotated first.
    pub(super) rotates: bool,
    /// Whether scales are searched for.
    pub(super) searches: bool,
    /// Whether the processor has a matrix unit for bf16.
    pub(super) matrix_unit: bool,
    /// Whether its bf16 products are faster than those of fp32, as those of a matrix unit are.
    pub(super) bf16_products: bool,
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
    /// Bytes of the largest values of forward passes.
    fn element(&self) -> u64 {
        let kinds = self.kinds.of_outputs(self.outputs).into_iter();
        kinds.map(|kind| kind.elt_size_in_bytes() as u64).max().unwrap_or(FP32)
    }

    /// The largest of a number of each layer.
    fn largest(&self, of: impl Fn(&LayerConfig) -> usize) -> u64 {
        self.config.layers.iter().map(of).max().unwrap_or(0) as u64
    }

    /// Bytes of a layer's linears as stored.
    fn layer_weights(&self) -> u64 {
        self.largest(|layer| layer.linears.iter().map(LinearConfig::weights).sum()) * self.source_bytes
    }

    /// Activations of one batch while it goes through a layer.
    fn batch(&self, tokens: usize) -> u64 {
        let (hidden, e) = (self.config.hidden_size as u64, self.element());
        let attention = self.largest(|layer| layer.attention.width());
        // Inside the feed-forward block, of all that a token goes through.
        let wide = self.largest(|layer| layer.feed_forward.stored_widths().iter().sum());
        // The residual stream and its norm's steps in fp32; gate, up and what is made of them; or q, k, v, turned and
        // repeated.
        let norm = 3 * FP32 * hidden + 2 * e * hidden;
        let most = (4 * wide * e).max(8 * attention * e);
        tokens as u64 * (norm + most)
    }

    /// Hidden states of all streams.
    pub(super) fn hidden_states(&self) -> u64 {
        let kinds = self.kinds.of_streams(self.outputs, self.shared_hessian, self.reference);
        let bytes =
            kinds.iter().map(|kind| (self.config.hidden_size * kind.elt_size_in_bytes()) as u64).sum();
        self.tokens().saturating_mul(bytes)
    }

    /// Hidden states of all streams, and one stage's inputs, which are kept until its linears are solved.
    fn activations(&self) -> u64 {
        let of_stage = |layer: &LayerConfig, stage: usize| layer.stored_widths(stage).iter().sum::<usize>();
        let stages = |layer: &LayerConfig| 0..layer.stages.len();
        let stored =
            self.largest(|layer| stages(layer).map(|stage| of_stage(layer, stage)).max().unwrap_or(0));
        // In the reference model the inputs of all of a layer's stages, and its outputs.
        let all = self.largest(|layer| stages(layer).map(|stage| of_stage(layer, stage)).sum());
        let reference = if self.reference { all + 2 * self.config.hidden_size as u64 } else { 0 };
        self.hidden_states().saturating_add(self.of_tokens(stored)).saturating_add(self.of_tokens(reference))
    }

    /// Bytes of so many values of every token. The number of tokens is the user's, and may be anything.
    pub(super) fn of_tokens(&self, values: u64) -> u64 {
        self.tokens().saturating_mul(values * self.element())
    }

    fn tokens(&self) -> u64 {
        (self.windows as u64).saturating_mul(self.seq_len as u64)
    }

    /// Peak bytes of a stage's steps beside the layer's weights. It belongs to the group of linears that takes the most, with the
    /// Hessians of the stage's other groups.
    fn solving(&self, layer: &LayerConfig, stage: usize, cuda: bool) -> u64 {
        let groups = &layer.stages[stage].groups;
        let hessian = |width: usize| (width * width) as u64 * FP32;
        let sums = |stage: usize| match layer.stages.get(stage) {
            Some(stage) => stage.groups.iter().map(|group| hessian(group.width)).sum::<u64>(),
            None => 0,
        };
        let copies = if self.reference { 2 } else { 1 };
        let next = sums(stage + 1);
        let of = |group: &GroupConfig| {
            let linears = &layer.linears[group.linears.clone()];
            let (n, k) =
                (linears.iter().map(|linear| linear.shape[0] as u64).sum::<u64>(), group.width as u64);
            let matrix = k * k * FP32;
            // Statistics of the groups that are solved after this one.
            let others = copies * (sums(stage) - matrix);
            // Where several variants are solved for one Hessian, it outlives a factor, and their codes pile up.
            let together = self.shared_hessian || stage == 0;
            let several = together && self.outputs.len() > 1;
            let kept = u64::from(several || self.gradient_windows > 0) * matrix;
            let codes = n * k * if several { self.outputs.len() as u64 } else { 1 };
            let factoring = if cuda { 4 * matrix } else { 2 * matrix + CHOLESKY_ROWS * k * FP32 };
            let energy = matrix + if cuda { n * k * (2 + FP32) } else { 0 };
            // Row by row there are also targets and their errors.
            let weights = if self.gradient_windows > 0 { 3 } else { 1 };
            // And the factor is kept in the layout for products.
            let layouts = if self.gradient_windows > 0 && !cuda { matrix / 2 } else { 0 };
            let solving = kept + matrix + layouts + weights * n * k * FP32 + codes + PANEL_ROWS * n * FP32;
            // Codes, packed words, and the dense weights that the windows leave the stage through.
            let leaving = kept + codes + n * k * self.element() + n * k / 2;
            // The next stage's statistics are accumulated with these weights.
            let capturing = n * k * self.element() + copies * next.max(matrix);
            // The cross-covariance stays until the targets of the last column order are there.
            let product = CrossCovariance::sums_products(n, k);
            let (sums, targets) = match (self.reference, product) {
                (false, _) => (0, 0),
                (true, true) => (n * k * (FP32 + self.element()), n * k * FP32),
                (true, false) => (matrix, n * k * FP32),
            };
            // What is divided by the factor, twice on the CPU, or the quotient and the targets so far.
            let of_quotient = if cuda { FP32 } else { self.kinds.usual.elt_size_in_bytes() as u64 };
            let quotient = n.min(k) * k * of_quotient;
            let dividing = if cuda { 3 * quotient + targets } else { (2 * quotient).max(quotient + targets) };
            // For few rows it is a product, which is in fp32.
            let few = if !product && n < k { n * k * FP32 } else { 0 };
            let dividing = if self.reference { kept + matrix + few + dividing } else { 0 };
            let with_sums = sums + factoring.max(energy).max(dividing);
            let solving = if several { sums } else { 0 } + targets + solving;
            others + with_sums.max(solving).max(leaving).max(capturing) + self.output_factors()
        };
        groups.iter().map(of).max().unwrap_or(0) + self.waiting(layer, stage)
    }

    /// Codes of the first stage that wait for their variants' turn in the first layer, where one Hessian solves them for all.
    fn waiting(&self, layer: &LayerConfig, stage: usize) -> u64 {
        if stage == 0 || self.shared_hessian {
            return 0;
        }
        let weights: usize =
            layer.stages[0].linears().map(|position| layer.linears[position].weights()).sum();
        (self.outputs.len() as u64).saturating_sub(1) * weights as u64
    }

    /// The output Hessians of a layer, and their factors.
    fn output_factors(&self) -> u64 {
        if self.gradient_windows == 0 { 0 } else { 2 * largest_hessian_bytes(self.config) }
    }

    /// Bytes of the gradient pass before the first layer: a layer in the kind of its products, a batch's tensors for the backward pass,
    /// and output Hessians.
    ///
    /// On CUDA the products of attention (`model/attention.rs`) also keep scores of all heads: masked, as a softmax, and their
    /// gradient.
    fn taking_gradients(&self, cuda: bool) -> u64 {
        if self.gradient_windows == 0 {
            return 0;
        }
        let tokens = self.seq_len.max(GRADIENT_BATCH_TOKENS);
        // What a layer's operations keep of some tokens for the backward pass, in fp32.
        let kept = 3 * self.batch(tokens) / self.element() * FP32;
        let scores = self.largest(|layer| layer.attention.num_heads) * (tokens * self.seq_len) as u64 * FP32;
        let sums = largest_layer_bytes(self.config, self.gradient_tokens()).saturating_mul(2);
        let product_bytes = self.kinds.of_gradients().elt_size_in_bytes() as u64;
        let weights = self.layer_weights() / self.source_bytes * (product_bytes + self.source_bytes);
        sums.saturating_add(weights + kept + if cuda { 3 * scores } else { 0 })
    }

    /// Bytes of the rotation before the first layer. They hold the embedding or the output layer in fp32, times the norm, rotated,
    /// and as bytes. In addition come the rows that are turned together.
    fn rotating(&self) -> u64 {
        if !self.rotates {
            return 0;
        }
        let numbers = (self.config.vocab_size * self.config.hidden_size) as u64;
        4 * numbers * FP32 + 3 * FP32 * numbers.min(TURNED_TOGETHER as u64)
    }

    /// Number of windows of one gradient pass, so that it takes no more memory than the activations later.
    ///
    /// The pass keeps the inputs of every layer, the outputs of the last one, and the gradients.
    pub(super) fn gradients_at_once(&self) -> usize {
        let values = (self.config.num_layers() as u64 + 2) * self.config.hidden_size as u64;
        let window = (self.seq_len as u64).saturating_mul(values * FP32).max(1);
        (self.activations() / window) as usize
    }

    /// Tokens that gradients are taken on.
    fn gradient_tokens(&self) -> u64 {
        (self.gradient_windows as u64).saturating_mul(self.seq_len as u64)
    }

    /// Output Hessians of all layers and lengths of gradients, on disk; twice as much while gradients are taken.
    pub(super) fn output_hessians(&self) -> u64 {
        let bytes = largest_layer_bytes(self.config, self.gradient_tokens());
        if self.gradient_windows == 0 { 0 } else { bytes.saturating_mul(self.config.num_layers() as u64) }
    }

    /// Work of a layer on the CPU, on the average: that of the rank that has the most, of so many.
    pub(super) fn layer_work(&self, ranks: usize) -> Work {
        let layers = self.config.num_layers() as f64;
        let all = self.config.layers.iter().map(|layer| self.work_of(layer, ranks));
        all.fold(Work::default(), Work::with).times(1.0 / layers, 1.0 / layers)
    }

    /// Floating-point operations of taking gradients through all layers and the output layer.
    pub(super) fn gradient_operations(&self) -> f64 {
        let tokens = self.gradient_tokens() as f64;
        let weights = |layer: &LayerConfig| layer.linears.iter().map(LinearConfig::weights).sum::<usize>();
        // Sums over blocks of outputs.
        let sums = largest_hessian_bytes(self.config) as f64 / FP32 as f64;
        // Through a layer, again for the backward pass, and back.
        let of =
            |layer: &LayerConfig| 3.0 * 2.0 * tokens * weights(layer) as f64 + 2.0 * tokens * sums / 1024.0;
        let output_layer = 4.0 * tokens * (self.config.vocab_size * self.config.hidden_size) as f64;
        output_layer + self.config.layers.iter().map(of).sum::<f64>()
    }

    fn work_of(&self, layer: &LayerConfig, ranks: usize) -> Work {
        let tokens = self.windows as f64 * self.seq_len as f64;
        let variants = self.outputs.len() as f64;
        let streams = if self.shared_hessian { 1.0 } else { variants };
        let references = if self.reference { 1.0 } else { 0.0 };
        let passes = self.kinds.of_streams(self.outputs, self.shared_hessian, self.reference);
        let usual = passes.iter().filter(|&&kind| kind == self.kinds.usual).count() as f64;
        let exact = passes.len() as f64 - usual;
        let row_blocks = if self.gradient_windows > 0 { ROW_BLOCKS } else { 1.0 };
        let speeds = match (self.matrix_unit, self.bf16_products) {
            (true, _) => MATRIX_UNIT,
            (false, true) => DOT_PRODUCTS,
            (false, false) => PLAIN,
        };
        let search = if self.searches { speeds.search } else { 0.0 };
        let mut work = Work::default();
        for stage in &layer.stages {
            for group in &stage.groups {
                let ((n, k), token) = (shape_of(layer, group), per_token(layer, group));
                let value = BESIDE_A_VALUE * part_of_tokens(layer, group);
                let crosses = references * variants;
                work.exact += tokens
                    * (exact * token.forward / speeds.forward
                        + value * ((usual + exact) * (n + k) + (streams + crosses) * k));
                work.usual += tokens
                    * (usual * token.forward / speeds.forward
                        + (streams * token.hessian + crosses * token.cross_covariance) / speeds.statistics);
                let alone = streams * k.powi(3) / 3.0 / speeds.factorization
                    + references * variants * of_targets(n, k) / speeds.targets;
                let solves = row_blocks * variants * n * k * (k + search) / speeds.solve;
                // What every rank does alike is `alone`.
                let (of_group, of_rows) = self.solving_shares(layer, stage, group, ranks);
                work.fp32 += of_group * (alone + of_rows * solves);
            }
        }
        work.times(BESIDE_PRODUCTS / ranks as f64, BESIDE_PRODUCTS)
    }

    /// Memory of a run on CUDA (one device, all variants on it) or on the CPU, with batches of `tokens` tokens.
    pub(super) fn need(&self, device: Device, tokens: usize) -> Need {
        let cuda = device != Device::Cpu;
        let of =
            |layer: &LayerConfig| (0..layer.stages.len()).map(|stage| self.solving(layer, stage, cuda)).max();
        let solving = self.config.layers.iter().filter_map(of).max().unwrap_or(0);
        let counted =
            (self.layer_weights() + solving + self.batch(tokens.max(self.seq_len)) + self.kept_for_sums())
                .max(self.taking_gradients(cuda))
                .max(if cuda { 0 } else { self.rotating() });
        let (most, part) = if self.matrix_unit { RETAINED_WITH_MATRIX_UNIT } else { RETAINED };
        let fixed = if cuda { CUDA_LIBRARIES } else { HEAPS + most.min(counted / part) };
        Need { working: counted.saturating_add(fixed), activations: self.activations() }
    }

    /// Memory of the machine beside a CUDA device: this layer's weights and the next one's, page-locked; or what rotating takes before.
    pub(super) fn host_beside_cuda(&self) -> u64 {
        (2 * self.layer_weights()).max(self.rotating())
    }

    /// Memory for activations. `device_memory` and `memory` are limits in bytes, `base` is what the program takes by itself.
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
pub(super) mod tests {
    use tch::Kind;

    use super::*;
    use crate::variant::{Bits, GroupSize, Order, Variant};

    pub(in crate::pipeline) fn config(
        hidden: usize,
        intermediate: usize,
        heads: usize,
        kv_heads: usize,
    ) -> ModelConfig {
        let json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": intermediate,
            "num_hidden_layers": 80, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
        });
        ModelConfig::from_json("config.json", &json).unwrap()
    }

    /// Four branches of two column orders.
    pub(in crate::pipeline) const FOUR: [Output; 4] = [
        branch(GroupSize::Features(128), Order::Sequential),
        branch(GroupSize::Features(64), Order::Sequential),
        branch(GroupSize::Features(32), Order::Act),
        branch(GroupSize::PerChannel, Order::Act),
    ];

    const fn branch(group_size: GroupSize, order: Order) -> Output {
        Output::Gptq(Variant { bits: Bits::Four, group_size, order, symmetric: true })
    }

    pub(in crate::pipeline) fn shape(config: &ModelConfig) -> Shape<'_> {
        Shape {
            config,
            source_bytes: 2,
            kinds: ComputeKinds::all(Kind::Half),
            windows: 128,
            ranks: 1,
            seq_len: 2048,
            outputs: &FOUR,
            shared_hessian: false,
            reference: false,
            gradient_windows: 0,
            rotates: false,
            searches: false,
            matrix_unit: false,
            bf16_products: false,
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
            error.to_string().starts_with("too little device memory: available 8.59 GB, needed at least "),
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
