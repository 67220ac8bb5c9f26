//! Output Hessians of all linears, from gradients of the unquantized model, before any layer is quantized.

use std::{ops::Range, sync::Arc, time::Instant};

use tch::{Device, Kind, Tensor};

use super::{
    journal::Journal,
    memory::{ActivationStore, Limits, MemoryBudget},
    stream::Stream,
    window_file::WindowFile,
    worker::RunContext,
};
use crate::{
    architectures::{LayerConfig, ModelConfig},
    calibration::Windows,
    checkpoint::{Checkpoint, to_bytes},
    cluster::{message, windows_of_ranks},
    error::{Result, TorchContext},
    gptq::{OutputHessian, output_blocks, solver::OutputFactor},
    model::{Compute, Runner},
    progress::Event,
    units::duration,
};

/// Damping of output Hessians, as a fraction of their mean diagonal.
const DAMP: f64 = 0.05;
/// Tokens that go through a layer and back together.
pub(super) const BATCH_TOKENS: usize = 1024;
/// Seconds of work between two commits to the journal, at least.
const SECONDS_BETWEEN_COMMITS: f64 = 30.0;
/// The same, over the seconds that a commit takes.
const WORK_PER_COMMIT: f64 = 20.0;

/// The output Hessians of all layers, in a file of the journal.
pub(super) struct OutputHessians {
    /// A layer in the place of each window.
    file: WindowFile,
}

/// Calibration windows that gradients are taken on.
#[derive(Clone, Copy)]
pub(super) struct GradientWindows<'a> {
    pub(super) windows: &'a Windows,
    /// Their number, from the first on.
    pub(super) count: usize,
    /// At most about how many go through all layers and back together. The results do not depend on it: sums are continued.
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
    /// Takes gradients on some `windows`, except on those whose gradients `journal` holds. The sums are committed to it from time to
    /// time, always between whole batches, so that neither these times nor an interruption change a byte. `seed` draws the tokens
    /// that are predicted.
    ///
    /// All ranks of a run call it. Each takes gradients on some windows of a part; a layer's sums are passed from rank to rank, and the
    /// last one writes them.
    pub(super) fn measure(
        checkpoint: &Checkpoint,
        device: Device,
        windows: GradientWindows<'_>,
        seed: u64,
        limits: Limits,
        journal: &mut Journal,
        context: RunContext<'_>,
    ) -> Result<Self> {
        let config = checkpoint.config();
        let GradientWindows { windows, count, at_once } = windows;
        let (seq_len, layers) = (windows.seq_len(), config.num_layers());
        let (mut sums, mut done) = journal.gradients()?.map_or((None, 0), |(file, done)| (Some(file), done));
        if done > 0 {
            let text = format!("resuming: gradients of {done} of {count} windows are kept");
            context.progress.event(&Event::Note(&text));
        }
        let memory = MemoryBudget::new(limits.in_memory);
        let store = ActivationStore::new(device, Kind::Float, limits.on_device, &memory, journal.folder())?;
        let runner = Runner::dense(checkpoint, seq_len, Compute { device, kind: Kind::Float })?;
        let per_batch = (BATCH_TOKENS / seq_len).max(1);
        let task = Gradients { checkpoint, runner, windows, per_batch, seed, store, context };
        let cluster = context.cluster;
        let ranks = cluster.ranks();
        let steps = (count - done).div_ceil(per_batch).div_ceil(ranks) * (1 + 2 * layers);
        context.progress.begin("gradients", steps as u64);
        // The first part is small, to measure the time of a batch and of a commit.
        let mut batches = ranks;
        while done < count {
            let begun = Instant::now();
            let most = ranks * (at_once / per_batch).max(1);
            let end = count.min(done + batches.min(most) * per_batch);
            // The root knows how long the part before took.
            let end = cluster.broadcast(cluster.is_root().then(|| message::of_numbers(&[end as u64])))?;
            let part = done..message::number(&end) as usize;
            let own = windows_of_ranks(part.len(), per_batch, ranks).swap_remove(cluster.rank());
            let own = done + own.start..done + own.end;
            let mut states = task.forward(&own)?;
            let last = states.pop().expect("the last layer has outputs");
            let gradients = task.at_the_end(last)?;
            let layer_bytes = largest_layer_bytes(config) as usize;
            let next = journal.next_gradients(cluster, part.end, layers, layer_bytes)?;
            let files = Sums { before: sums.as_ref(), next: &next, count };
            task.back(&own, part.end, states, gradients, files)?;
            if ranks > 1 {
                next.sync()?;
                let written = if cluster.is_last() { next.checksums_of(0..layers) } else { Vec::new() };
                if let Some(mut all) = cluster.gather(written)? {
                    next.take_checksums(0..layers, &all.swap_remove(ranks - 1));
                }
            }
            let work = begun.elapsed().as_secs_f64();
            if cluster.is_root() {
                journal.commit_gradients(&next, part.end, count)?;
            }
            let commit = begun.elapsed().as_secs_f64() - work + next.seconds();
            batches = batches_between_commits(part.len().div_ceil(per_batch), work, commit);
            let rest = match (count - part.end) as f64 / part.len() as f64 * begun.elapsed().as_secs_f64() {
                rest if rest < 60.0 => String::new(),
                rest => format!(", about {} more", duration(rest)),
            };
            let text = format!("gradients: {} of {count} windows{rest}", part.end);
            context.progress.event(&Event::Note(&text));
            (sums, done) = (Some(next), part.end);
        }
        // The last rank has written the file that the others read from now on.
        journal.share(cluster)?;
        if ranks > 1 {
            sums = journal.gradients()?.map(|(file, _)| file);
        }
        Ok(Self { file: sums.expect("gradients are taken on at least one window") })
    }

    /// The output Hessians of a layer's linears, on the CPU.
    pub(super) fn blocks(&self, config: &ModelConfig, layer: usize) -> Result<Vec<Vec<Tensor>>> {
        blocks_of(&self.file.read(layer, 1)?, config, layer)
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

/// Batches of the next part, where a part of so many `batches` took `work` seconds and its commit `commit` seconds.
fn batches_between_commits(batches: usize, work: f64, commit: f64) -> usize {
    let between = SECONDS_BETWEEN_COMMITS.max(WORK_PER_COMMIT * commit);
    ((batches as f64 * between / work) as usize).max(1)
}

/// Gradients that are being taken.
struct Gradients<'a> {
    checkpoint: &'a Checkpoint,
    runner: Runner<'a>,
    windows: &'a Windows,
    per_batch: usize,
    seed: u64,
    store: Arc<ActivationStore>,
    context: RunContext<'a>,
}

/// The files of a part's sums.
#[derive(Clone, Copy)]
struct Sums<'a> {
    /// Over the windows of the parts before; `None` for the first part.
    before: Option<&'a WindowFile>,
    /// With the part's windows; means once these are `count`.
    next: &'a WindowFile,
    count: usize,
}

impl Gradients<'_> {
    /// The inputs of each layer, and the outputs of the last.
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

    /// Takes gradients back through the layers and adds their outer products to the sums; after the last part these become means.
    fn back(
        &self,
        own: &Range<usize>,
        part_end: usize,
        mut states: Vec<Stream>,
        mut gradients: Stream,
        files: Sums<'_>,
    ) -> Result<()> {
        let config = self.checkpoint.config();
        let Sums { before, next, count } = files;
        for layer in (0..self.layers()).rev() {
            let packed = self.runner.packed_layer(layer)?;
            let ready = self.runner.layer(layer, &packed)?;
            let mut states = states.pop().expect("every layer has inputs");
            let mut sums = self.sums(layer, before, own.start)?;
            for i in 0..gradients.len() {
                let back =
                    self.runner.transformer().layer_gradients(&ready, &states.get(i)?, &gradients.get(i)?)?;
                for (sum, gradient) in sums.iter_mut().zip(back.outputs.iter().flatten()) {
                    sum.add(gradient)?;
                }
                gradients.put(i, back.hidden)?;
                self.step()?;
            }
            let mut bytes = Vec::with_capacity(next.window_bytes());
            for (position, sum) in sums.into_iter().enumerate() {
                let blocks = match part_end == count && self.context.cluster.is_last() {
                    true => sum.finish(&config.linear_id(layer, position).to_string())?,
                    false => sum.into_sums(),
                };
                for block in blocks {
                    bytes.extend(to_bytes(&block)?);
                }
            }
            if self.context.cluster.is_last() {
                // Layers may differ in size.
                bytes.resize(next.window_bytes(), 0);
                next.write(layer, &bytes)?;
            } else {
                self.context.cluster.send(bytes)?;
            }
            self.checkpoint.release_layer(layer);
        }
        Ok(())
    }

    /// Sums over the `done` windows in front, of the outputs of each linear: those of the rank before, those in the file, or zeros.
    fn sums(&self, layer: usize, file: Option<&WindowFile>, done: usize) -> Result<Vec<OutputHessian>> {
        let (config, device) = (self.checkpoint.config(), self.store.device);
        let bytes = match file {
            _ if !self.context.cluster.is_root() => self.context.cluster.receive()?,
            Some(file) => file.read(layer, 1)?,
            None => {
                let linears = config.layers[layer].linears.iter();
                return linears.map(|linear| OutputHessian::new(linear.shape[0], device)).collect();
            }
        };
        let tokens = (done * self.windows.seq_len()) as u64;
        let of = |blocks| OutputHessian::from_sums(blocks, tokens, device);
        blocks_of(&bytes, config, layer)?.into_iter().map(of).collect()
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

/// The blocks of a layer's linears, on the CPU, from their bytes.
fn blocks_of(bytes: &[u8], config: &ModelConfig, layer: usize) -> Result<Vec<Vec<Tensor>>> {
    let mut rest = bytes;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commits_take_at_most_a_twentieth_of_the_time() {
        // A batch takes 2 s, of a part of 5; a commit less than what is lost at most, or more.
        assert_eq!(batches_between_commits(5, 10.0, 0.1), 15);
        assert_eq!(batches_between_commits(5, 10.0, 6.0), 60);
        assert_eq!(batches_between_commits(1, 1000.0, 1.0), 1);
    }
}
