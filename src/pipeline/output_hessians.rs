//! Output Hessians of all linears, from gradients of the unquantized model, before any layer is quantized.

use std::{ops::Range, path::Path, sync::Arc};

use tch::{Device, Kind, Tensor};

use super::{
    memory::{ActivationStore, Limits, MemoryBudget},
    stream::Stream,
    window_file::WindowFile,
    worker::RunContext,
};
use crate::{
    architectures::{LayerConfig, ModelConfig},
    calibration::Windows,
    checkpoint::{Checkpoint, to_bytes},
    error::{Result, TorchContext},
    gptq::{OutputHessian, output_blocks, solver::OutputFactor},
    model::{Compute, Runner},
    progress::Event,
};

/// Damping of output Hessians, as a fraction of their mean diagonal.
const DAMP: f64 = 0.05;
/// Tokens that go through a layer and back together.
pub(super) const BATCH_TOKENS: usize = 1024;

/// The output Hessians of all layers, in a file that is gone with the program.
pub(super) struct OutputHessians {
    /// A layer in the place of each window.
    file: WindowFile,
}

/// Calibration windows that gradients are taken on.
#[derive(Clone, Copy)]
pub(super) struct GradientWindows<'a> {
    pub(super) windows: &'a Windows,
    /// How many of them, from the first on.
    pub(super) count: usize,
    /// About how many go through all layers and back together. The results do not depend on it: sums are continued.
    pub(super) at_once: usize,
}

/// Output Hessians of one layer, factorized.
pub(super) struct LayerFactors {
    /// The blocks of each linear of the layer.
    blocks: Vec<Vec<OutputFactor>>,
}

/// Bytes of a layer's output Hessians.
pub(super) fn layer_bytes(layer: &LayerConfig) -> u64 {
    let blocks = layer.linears.iter().flat_map(|linear| output_blocks(linear.shape[0]));
    blocks.map(|n| n * n).sum::<usize>() as u64 * 4
}

/// Bytes of the output Hessians of the layer that has the most.
pub(super) fn largest_layer_bytes(config: &ModelConfig) -> u64 {
    config.layers.iter().map(layer_bytes).max().unwrap_or(0)
}

impl OutputHessians {
    /// Takes gradients on some `windows`, for the layers from `first` on. `seed` draws the tokens that are predicted.
    pub(super) fn measure(
        checkpoint: &Checkpoint,
        device: Device,
        windows: GradientWindows<'_>,
        first: usize,
        seed: u64,
        limits: Limits,
        folder: &Path,
        context: RunContext<'_>,
    ) -> Result<Self> {
        let config = checkpoint.config();
        let GradientWindows { windows, count, at_once } = windows;
        let (seq_len, layers) = (windows.seq_len(), config.num_layers());
        let memory = MemoryBudget::new(limits.in_memory);
        let store = ActivationStore::new(device, Kind::Float, limits.on_device, &memory, folder)?;
        let runner = Runner::dense(checkpoint, seq_len, Compute { device, kind: Kind::Float })?;
        let per_batch = (BATCH_TOKENS / seq_len).max(1);
        let file = WindowFile::scratch(folder, layers, largest_layer_bytes(config) as usize)?;
        let task = Gradients { checkpoint, runner, windows, per_batch, first, seed, store, file, context };
        let steps = count.div_ceil(per_batch) * (1 + layers + (layers - first));
        context.progress.begin("gradients", steps as u64);
        let part = (at_once.min(count) / per_batch).max(1) * per_batch;
        for start in (0..count).step_by(part) {
            let part = start..count.min(start + part);
            let mut states = task.forward(&part)?;
            let last = states.pop().expect("the last layer has outputs");
            let gradients = task.at_the_end(last)?;
            task.back(&part, states, gradients, part.end == count)?;
        }
        context.progress.event(&Event::Note(&format!("gradients on {count} windows: done")));
        Ok(Self { file: task.file })
    }

    /// The output Hessians of a layer's linears, on the CPU.
    pub(super) fn blocks(&self, config: &ModelConfig, layer: usize) -> Result<Vec<Vec<Tensor>>> {
        read_blocks(&self.file, config, layer)
    }

    /// The output Hessians of a layer, factorized on `device` once for all variants.
    pub(super) fn factors(&self, config: &ModelConfig, layer: usize, device: Device) -> Result<LayerFactors> {
        let blocks = self.blocks(config, layer)?.into_iter().enumerate();
        let of = |(position, blocks): (usize, Vec<Tensor>)| {
            OutputFactor::all(&blocks, DAMP, device, &config.linear_id(layer, position).to_string())
        };
        Ok(LayerFactors { blocks: blocks.map(of).collect::<Result<_>>()? })
    }
}

/// Gradients that are being taken.
struct Gradients<'a> {
    checkpoint: &'a Checkpoint,
    runner: Runner<'a>,
    windows: &'a Windows,
    per_batch: usize,
    /// The first layer whose linears' gradients are taken.
    first: usize,
    seed: u64,
    store: Arc<ActivationStore>,
    /// Sums over the windows that are done, layer by layer; in the end means.
    file: WindowFile,
    context: RunContext<'a>,
}

impl Gradients<'_> {
    /// The inputs of each layer, and the outputs of the last; inputs of layers before `first` are dropped.
    fn forward(&self, part: &Range<usize>) -> Result<Vec<Stream>> {
        let (seq_len, transformer) = (self.windows.seq_len(), self.runner.transformer());
        let mut embedded = self.stream(part);
        for (i, batch) in embedded.batches().to_vec().into_iter().enumerate() {
            let ids = &self.windows.ids()[batch.start * seq_len..batch.end * seq_len];
            embedded.put(i, transformer.embed(ids, seq_len)?)?;
        }
        let mut states = vec![embedded];
        for layer in 0..self.layers() {
            let packed = self.runner.packed_layer(layer)?;
            let ready = self.runner.layer(layer, &packed)?;
            let mut next = self.stream(part);
            for i in 0..next.len() {
                next.put(i, transformer.forward(&ready, &states[layer].get(i)?, None)?)?;
                self.step()?;
            }
            self.checkpoint.release_layer(layer);
            if layer < self.first {
                states[layer] = self.stream(part);
            }
            states.push(next);
        }
        Ok(states)
    }

    /// Gradients of `−log p(y)` with respect to the outputs of the last layer, `y` drawn from `p`.
    fn at_the_end(&self, mut last: Stream) -> Result<Stream> {
        let seq_len = self.windows.seq_len();
        let mut gradients = last.empty_like([seq_len, self.checkpoint.config().hidden_size]);
        for (i, batch) in last.batches().to_vec().into_iter().enumerate() {
            let uniform = uniform(self.seed, batch.start * seq_len..batch.end * seq_len);
            let shape = [batch.len() as i64, seq_len as i64];
            let uniform =
                Tensor::f_from_slice(&uniform).and_then(|u| u.f_view(shape)?.f_to_device(self.store.device));
            let uniform = uniform.torch("draw tokens")?;
            gradients.put(i, self.runner.sampled_gradient(&last.get(i)?, &uniform)?)?;
            self.step()?;
        }
        Ok(gradients)
    }

    /// Takes gradients back through the layers and adds their outer products to the sums; after the `last` part these become means.
    fn back(
        &self,
        part: &Range<usize>,
        mut states: Vec<Stream>,
        mut gradients: Stream,
        last: bool,
    ) -> Result<()> {
        let config = self.checkpoint.config();
        for layer in (self.first..self.layers()).rev() {
            let packed = self.runner.packed_layer(layer)?;
            let ready = self.runner.layer(layer, &packed)?;
            let mut states = states.pop().expect("every layer has inputs");
            let mut sums = self.sums(layer, part.start)?;
            for i in 0..gradients.len() {
                let back =
                    self.runner.transformer().layer_gradients(&ready, &states.get(i)?, &gradients.get(i)?)?;
                for (sum, gradient) in sums.iter_mut().zip(back.outputs.iter().flatten()) {
                    sum.add(gradient)?;
                }
                gradients.put(i, back.hidden)?;
                self.step()?;
            }
            let mut bytes = Vec::with_capacity(self.file.window_bytes());
            for (position, sum) in sums.into_iter().enumerate() {
                let blocks = match last {
                    true => sum.finish(&config.linear_id(layer, position).to_string())?,
                    false => sum.into_sums(),
                };
                for block in blocks {
                    bytes.extend(to_bytes(&block)?);
                }
            }
            // Layers may differ in size.
            bytes.resize(self.file.window_bytes(), 0);
            self.file.write(layer, &bytes)?;
            self.checkpoint.release_layer(layer);
        }
        Ok(())
    }

    /// Sums over the `done` windows in front, of the outputs of each linear.
    fn sums(&self, layer: usize, done: usize) -> Result<Vec<OutputHessian>> {
        let (config, device) = (self.checkpoint.config(), self.store.device);
        if done == 0 {
            let linears = config.layers[layer].linears.iter();
            return linears.map(|linear| OutputHessian::new(linear.shape[0], device)).collect();
        }
        let tokens = (done * self.windows.seq_len()) as u64;
        let of = |blocks| OutputHessian::from_sums(blocks, tokens, device);
        read_blocks(&self.file, config, layer)?.into_iter().map(of).collect()
    }

    fn stream(&self, part: &Range<usize>) -> Stream {
        let window = [self.windows.seq_len(), self.checkpoint.config().hidden_size];
        Stream::new(&self.store, part.clone(), self.per_batch, window)
    }

    fn layers(&self) -> usize {
        self.checkpoint.config().num_layers()
    }

    /// Counts a batch that went through a layer.
    fn step(&self) -> Result<()> {
        self.context.progress.advance(1);
        self.context.check_cancelled()
    }
}

/// The blocks of a layer's linears, on the CPU.
fn read_blocks(file: &WindowFile, config: &ModelConfig, layer: usize) -> Result<Vec<Vec<Tensor>>> {
    let bytes = file.read(layer, 1)?;
    let mut rest = &bytes[..];
    let mut block = |n: usize| {
        let (own, others) = rest.split_at(4 * n * n);
        rest = others;
        Tensor::f_from_data_size(own, &[n as i64, n as i64], Kind::Float).torch("read an output Hessian")
    };
    let linears = config.layers[layer].linears.iter();
    linears.map(|linear| output_blocks(linear.shape[0]).into_iter().map(&mut block).collect()).collect()
}

impl LayerFactors {
    /// The factors of a linear.
    pub(super) fn of(&self, position: usize) -> &[OutputFactor] {
        &self.blocks[position]
    }
}

/// Numbers in `0..1` for some tokens of the run, the same however they are batched.
fn uniform(seed: u64, tokens: Range<usize>) -> Vec<f32> {
    // SplitMix64, started at each token's place.
    let draw = |token: usize| {
        let mut z = seed.wrapping_add((token as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 24) as f32
    };
    tokens.map(draw).collect()
}
