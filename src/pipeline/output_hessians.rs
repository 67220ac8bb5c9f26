//! What errors in the outputs of each linear cost at the end of the model: gradients of the unquantized model, before any
//! layer is quantized.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::{
    crew::Limits,
    member::Surroundings,
    memory::{Ledger, Room},
    stream::Stream,
    window_file::WindowFile,
};
use crate::{
    calibration::Windows,
    checkpoint::{Checkpoint, LinearId, LinearKind, LlamaConfig, to_bytes},
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

/// Those of one layer, factorized.
pub(super) struct LayerFactors {
    /// The blocks of each linear, in the order of [`LinearKind::ALL`].
    blocks: Vec<Vec<OutputFactor>>,
}

/// Bytes of a layer's output Hessians.
pub(super) fn layer_bytes(config: &LlamaConfig) -> u64 {
    let blocks = LinearKind::ALL.iter().flat_map(|kind| output_blocks(kind.shape(config)[0]));
    blocks.map(|n| n * n).sum::<usize>() as u64 * 4
}

impl OutputHessians {
    /// Takes gradients on the first `count` windows, for the layers from `first` on. `seed` draws the tokens that are predicted.
    ///
    /// # Errors
    /// When memory or the disk ends, or the user asked to stop.
    pub(super) fn measure(
        checkpoint: &Checkpoint,
        device: Device,
        (windows, count): (&Windows, usize),
        first: usize,
        seed: u64,
        limits: Limits,
        folder: &Path,
        around: Surroundings<'_>,
    ) -> Result<Self> {
        let config = checkpoint.config();
        let (seq_len, layers) = (windows.seq_len(), config.num_layers);
        let memory = Ledger::new(limits.in_memory);
        let near = match device {
            Device::Cpu => std::sync::Arc::clone(&memory),
            _ => Ledger::new(limits.on_device),
        };
        let room = std::sync::Arc::new(Room::new(device, Kind::Float, near, memory, folder)?);
        let runner = Runner::dense(checkpoint, seq_len, Compute { device, kind: Kind::Float })?;
        let llama = runner.llama();
        let per_batch = (BATCH_TOKENS / seq_len).max(1);
        let stream = || Stream::new(&room, 0..count, per_batch, [seq_len, config.hidden_size]);
        let batches = stream().batches().to_vec();
        let steps = batches.len() * (1 + layers + (layers - first));
        around.progress.begin("gradients", steps as u64);
        let step = || {
            around.progress.advance(1);
            around.go_on()
        };

        let mut embedded = stream();
        for (i, batch) in batches.iter().enumerate() {
            let ids = &windows.ids()[batch.start * seq_len..batch.end * seq_len];
            embedded.put(i, llama.embed(ids, seq_len)?)?;
        }
        // What goes into each layer, and out of the last.
        let mut states = vec![embedded];
        for layer in 0..layers {
            let packed = runner.packed_layer(layer)?;
            let ready = runner.layer(layer, &packed)?;
            let mut next = stream();
            for i in 0..batches.len() {
                next.put(i, llama.forward(&ready, &states[layer].get(i)?)?)?;
                step()?;
            }
            checkpoint.release_layer(layer);
            if layer < first {
                // Nobody comes back this far.
                states[layer] = stream();
            }
            states.push(next);
        }

        let mut gradients = stream();
        let mut last = states.pop().expect("the last layer has outputs");
        for (i, batch) in batches.iter().enumerate() {
            let uniform = uniform(seed, batch.start * seq_len..batch.end * seq_len);
            let shape = [batch.len() as i64, seq_len as i64];
            let uniform = Tensor::f_from_slice(&uniform).and_then(|u| u.f_view(shape)?.f_to_device(device));
            let uniform = uniform.torch("draw tokens")?;
            gradients.put(i, runner.sampled_gradient(&last.get(i)?, &uniform)?)?;
            step()?;
        }
        drop(last);

        let file = WindowFile::scratch(folder, layers, layer_bytes(config) as usize)?;
        for layer in (first..layers).rev() {
            let packed = runner.packed_layer(layer)?;
            let ready = runner.layer(layer, &packed)?;
            let mut states = states.pop().expect("every layer has inputs");
            let new = |kind: &LinearKind| OutputHessian::new(kind.shape(config)[0], device);
            let mut sums = LinearKind::ALL.iter().map(new).collect::<Result<Vec<_>>>()?;
            for i in 0..batches.len() {
                let back = llama.layer_gradients(&ready, &states.get(i)?, &gradients.get(i)?)?;
                for (sum, gradient) in sums.iter_mut().zip(&back.outputs) {
                    sum.add(gradient)?;
                }
                gradients.put(i, back.hidden)?;
                step()?;
            }
            let mut bytes = Vec::with_capacity(file.window_bytes());
            for (sum, kind) in sums.into_iter().zip(LinearKind::ALL) {
                for block in sum.finish(&LinearId { layer, kind }.to_string())? {
                    bytes.extend(to_bytes(&block)?);
                }
            }
            file.write(layer, &bytes)?;
            checkpoint.release_layer(layer);
        }
        around.progress.event(&Event::Note(&format!("gradients on {count} windows: done")));
        Ok(Self { file })
    }

    /// Those of one layer, factorized on `device` once for all variants.
    ///
    /// # Errors
    /// When they cannot be read back, or one cannot be factorized.
    pub(super) fn factors(&self, config: &LlamaConfig, layer: usize, device: Device) -> Result<LayerFactors> {
        let bytes = self.file.read(layer, 1)?;
        let mut rest = &bytes[..];
        let mut block = |n: usize| {
            let (own, others) = rest.split_at(4 * n * n);
            rest = others;
            Tensor::f_from_data_size(own, &[n as i64, n as i64], Kind::Float).torch("read an output Hessian")
        };
        let of = |kind: LinearKind| {
            let blocks = output_blocks(kind.shape(config)[0]).into_iter().map(&mut block);
            let blocks = blocks.collect::<Result<Vec<_>>>()?;
            OutputFactor::all(&blocks, DAMP, device, &LinearId { layer, kind }.to_string())
        };
        Ok(LayerFactors { blocks: LinearKind::ALL.into_iter().map(of).collect::<Result<_>>()? })
    }
}

impl LayerFactors {
    /// Those of a linear.
    pub(super) fn of(&self, kind: LinearKind) -> &[OutputFactor] {
        let position = LinearKind::ALL.iter().position(|&k| k == kind);
        &self.blocks[position.expect("ALL holds every kind")]
    }
}

/// Numbers in `0..1` for some tokens of the run, the same however they are batched.
fn uniform(seed: u64, tokens: std::ops::Range<usize>) -> Vec<f32> {
    // SplitMix64, started at each token's place.
    let draw = |token: usize| {
        let mut z = seed.wrapping_add((token as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 24) as f32
    };
    tokens.map(draw).collect()
}
