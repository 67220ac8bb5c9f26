//! Output Hessians of all linears and weights of all tokens, from gradients of the unquantized model, before any layer is quantized.

use std::{ops::Range, sync::Arc, time::Instant};

use tch::{Device, Kind, TchError, Tensor};

use super::{
    journal::Journal,
    memory::{ActivationStore, Limits, MemoryBudget},
    stream::Stream,
    window_file::WindowFile,
    worker::RunContext,
};
use crate::{
    architectures::{GroupConfig, LayerConfig, ModelConfig, StageConfig},
    calibration::Windows,
    checkpoint::{Checkpoint, to_bytes},
    cluster::{message, windows_of_ranks},
    error::{Error, Result, TorchContext},
    gptq::{OutputHessian, output_blocks, solver::OutputFactor},
    model::{Compute, Runner},
    progress::Event,
    units::duration,
};

/// Damping of output Hessians, as a fraction of their mean diagonal. Much of it, because gradients predict poorly how errors of several
/// outputs add up at the end of a real model (docs/accuracy.md).
const DAMP: f64 = 0.25;
/// Largest weight of a token, over the mean of all.
const LARGEST_WEIGHT: f64 = 8.0;
/// Tokens that go through a layer and back together.
pub(super) const BATCH_TOKENS: usize = 1024;
/// Seconds of work between two commits to the journal, at least.
const SECONDS_BETWEEN_COMMITS: f64 = 30.0;
/// The same, over the seconds that a commit takes.
const WORK_PER_COMMIT: f64 = 20.0;

/// The output Hessians of all layers, and the squared lengths of all gradients, in a file of the journal.
pub(super) struct OutputHessians {
    /// A layer in the place of each window.
    file: WindowFile,
    /// Tokens that gradients were taken on.
    tokens: usize,
    /// Tokens of the run.
    all_tokens: usize,
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

/// Output Hessians of one layer, factorized, and the weights of its inputs.
pub(super) struct LayerFactors {
    /// The blocks of each linear of the layer.
    blocks: Vec<Vec<OutputFactor>>,
    pub(super) token_weights: TokenWeights,
}

/// Square roots of the tokens' weights in the Hessians of a layer, `[T]` fp32 for each group of linears, stage by stage.
///
/// A token weighs as much as the gradients with respect to the group's outputs are long, at most [`LARGEST_WEIGHT`] times the mean.
/// (GuidedQuant, arXiv 2505.07004, weighs by the square of that, and for some outputs each.) The largest weight is 1, so that no input
/// becomes larger. Tokens without gradients have the mean weight.
pub(super) type TokenWeights = Vec<Vec<Tensor>>;

/// Bytes of a layer's output Hessians.
fn hessian_bytes(layer: &LayerConfig) -> u64 {
    let blocks = layer.linears.iter().flat_map(|linear| output_blocks(linear.shape[0]));
    blocks.map(|n| n * n).sum::<usize>() as u64 * 4
}

/// Bytes of the output Hessians of the layer that has the most.
pub(super) fn largest_hessian_bytes(config: &ModelConfig) -> u64 {
    config.layers.iter().map(hessian_bytes).max().unwrap_or(0)
}

/// Bytes of a layer in the file of a run with gradients of so many `tokens`, of the layer that has the most.
pub(super) fn largest_layer_bytes(config: &ModelConfig, tokens: u64) -> u64 {
    let squares = |layer: &LayerConfig| tokens.saturating_mul(4 * layer.linears.len() as u64);
    let of = |layer| hessian_bytes(layer).saturating_add(squares(layer));
    config.layers.iter().map(of).max().unwrap_or(0)
}

impl OutputHessians {
    /// Takes gradients on some `windows`, except on those whose gradients `journal` holds. The sums are committed to it from time to
    /// time, always between whole batches, so that neither these times nor an interruption change a byte. `seed` draws the tokens
    /// that are predicted. Products are of kind `compute.kind`, all else is fp32.
    ///
    /// All ranks of a run call it. Each takes gradients on some windows of a part; a layer's sums are passed from rank to rank, and the
    /// last one writes them.
    pub(super) fn measure(
        checkpoint: &Checkpoint,
        compute: Compute,
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
        let layer_bytes = largest_layer_bytes(config, (count * seq_len) as u64) as usize;
        if let Some(file) = sums.as_ref().filter(|file| file.window_bytes() != layer_bytes) {
            // An earlier program with the same version number has written it.
            let problem = format!("it has {} bytes a layer, expected {layer_bytes}", file.window_bytes());
            return Err(Error::journal(file.path(), problem));
        }
        if done > 0 {
            let text = format!("resuming: gradients of {done} of {count} windows are kept");
            context.progress.event(&Event::Note(&text));
        }
        let memory = MemoryBudget::new(limits.in_memory);
        let store =
            ActivationStore::new(compute.device, Kind::Float, limits.on_device, &memory, journal.folder())?;
        let runner = Runner::for_gradients(checkpoint, seq_len, compute)?;
        let (per_batch, products) = ((BATCH_TOKENS / seq_len).max(1), compute.kind);
        let task = Gradients { checkpoint, runner, products, windows, per_batch, seed, store, context };
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
        let file = sums.expect("gradients are taken on at least one window");
        Ok(Self { file, tokens: count * seq_len, all_tokens: windows.count() * seq_len })
    }

    /// The output Hessians of a layer's linears, on the CPU, and the squared lengths of the gradients of each token.
    pub(super) fn read(&self, config: &ModelConfig, layer: usize) -> Result<(Vec<Vec<Tensor>>, Vec<f32>)> {
        parts_of(&self.file.read(layer, 1)?, &config.layers[layer], self.tokens)
    }

    /// The output Hessians of a layer, factorized on `device` once for all variants, and the weights of tokens.
    pub(super) fn factors(&self, config: &ModelConfig, layer: usize, device: Device) -> Result<LayerFactors> {
        let (blocks, squares) = self.read(config, layer)?;
        let of = |(position, blocks): (usize, Vec<Tensor>)| {
            OutputFactor::all(&blocks, DAMP, device, &config.linear_id(layer, position).to_string())
        };
        let token_weights = token_weights(&config.layers[layer], &squares, self.all_tokens);
        Ok(LayerFactors {
            blocks: blocks.into_iter().enumerate().map(of).collect::<Result<_>>()?,
            token_weights: token_weights.torch("weigh tokens")?,
        })
    }
}

/// Weights of all tokens of the run from the squared lengths of gradients, `[tokens, linears]`, of the first of them.
fn token_weights(layer: &LayerConfig, squares: &[f32], all_tokens: usize) -> Result<TokenWeights, TchError> {
    let squares = Tensor::f_from_slice(squares)?.f_view([-1, layer.linears.len() as i64])?;
    let means = squares.f_mean_dim([0i64].as_slice(), true, Kind::Float)?;
    // If the loss does not depend on the outputs of a linear, its tokens count alike.
    let relative = squares.f_div(&means)?.f_masked_fill(&means.f_eq(0.0)?, 1.0)?;
    let of_group = |group: &GroupConfig| {
        let linears = &group.linears;
        let own = relative.f_narrow(1, linears.start as i64, linears.len() as i64)?;
        let weights = own.f_mean_dim([1i64].as_slice(), false, Kind::Float)?.f_sqrt()?;
        let mean = f64::try_from(weights.f_mean(Kind::Float)?)?;
        let weights = weights.f_clamp_max(LARGEST_WEIGHT * mean)?;
        let weights = weights.f_div(&weights.f_max()?)?;
        let missing = all_tokens as i64 - weights.size()[0];
        let mean = weights.f_mean(Kind::Float)?.f_expand([missing], false)?;
        Tensor::f_cat(&[&weights, &mean], 0)?.f_sqrt()
    };
    let of_stage = |stage: &StageConfig| stage.groups.iter().map(of_group).collect();
    layer.stages.iter().map(of_stage).collect()
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
    products: Kind,
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
            let (mut sums, mut squares) = self.sums(layer, before, own.start)?;
            for i in 0..gradients.len() {
                let back =
                    self.runner.transformer().layer_gradients(&ready, &states.get(i)?, &gradients.get(i)?)?;
                for (sum, gradient) in sums.iter_mut().zip(back.outputs.iter().flatten()) {
                    sum.add(gradient, self.products)?;
                }
                squares.extend(squared_lengths(back.outputs.iter().flatten()).torch("measure gradients")?);
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
            bytes.extend_from_slice(bytemuck::cast_slice(&squares));
            if self.context.cluster.is_last() {
                // Layers may differ in size, and tokens are missing before the last part.
                bytes.resize(next.window_bytes(), 0);
                next.write(layer, &bytes)?;
            } else {
                self.context.cluster.send(bytes)?;
            }
            self.checkpoint.release_layer(layer);
        }
        Ok(())
    }

    /// Sums over the `done` windows in front, of the outputs of each linear, and the squared lengths of their gradients: those of the
    /// rank before, those in the file, or none.
    fn sums(
        &self,
        layer: usize,
        file: Option<&WindowFile>,
        done: usize,
    ) -> Result<(Vec<OutputHessian>, Vec<f32>)> {
        let (config, device) = (&self.checkpoint.config().layers[layer], self.store.device);
        let bytes = match file {
            _ if !self.context.cluster.is_root() => self.context.cluster.receive()?,
            Some(file) => file.read(layer, 1)?,
            None => {
                let linears = config.linears.iter();
                let sums = linears.map(|linear| OutputHessian::new(linear.shape[0], device));
                return Ok((sums.collect::<Result<_>>()?, Vec::new()));
            }
        };
        let tokens = done * self.windows.seq_len();
        let of = |blocks| OutputHessian::from_sums(blocks, tokens as u64, device);
        let (blocks, squares) = parts_of(&bytes, config, tokens)?;
        Ok((blocks.into_iter().map(of).collect::<Result<_>>()?, squares))
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

/// The blocks of a layer's linears, on the CPU, and the squared lengths of the gradients of so many `tokens`, from their bytes.
fn parts_of(bytes: &[u8], layer: &LayerConfig, tokens: usize) -> Result<(Vec<Vec<Tensor>>, Vec<f32>)> {
    let mut rest = bytes;
    let mut block = |n: usize| {
        let (own, others) = rest.split_at(4 * n * n);
        rest = others;
        Tensor::f_from_data_size(own, &[n as i64, n as i64], Kind::Float).torch("read an output Hessian")
    };
    let linears = layer.linears.iter();
    let blocks = linears.map(|linear| output_blocks(linear.shape[0]).into_iter().map(&mut block).collect());
    let blocks = blocks.collect::<Result<_>>()?;
    Ok((blocks, bytemuck::pod_collect_to_vec(&rest[..4 * tokens * layer.linears.len()])))
}

/// `‖g‖²` of each token, for `gradients` `[…, N]` of several linears: `[tokens, linears]`.
fn squared_lengths<'t>(gradients: impl Iterator<Item = &'t Tensor>) -> Result<Vec<f32>, TchError> {
    let of = |gradient: &Tensor| {
        let width = gradient.size().last().copied().unwrap_or(1);
        gradient.f_reshape([-1, width])?.f_square()?.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Float)
    };
    let all = gradients.map(of).collect::<Result<Vec<_>, _>>()?;
    Vec::try_from(Tensor::f_stack(&all, 1)?.f_to_device(Device::Cpu)?.f_flatten(0, -1)?)
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
    use crate::pipeline::tests::model;

    #[test]
    fn tokens_weigh_as_much_as_their_gradients_are_long() {
        let checkpoint = model("llama3-gqa-rope");
        let layer = &checkpoint.config().layers[0];
        // Of q, k, v, o, gate, up and down: three tokens, and one without gradients.
        let squares = |all: [[f32; 7]; 3]| all.concat();
        let q = [1.0, 4.0, 25.0];
        let rows = q.map(|q| [q, 2.0 * q, 0.0, 1.0, q, q, 1e-6 * q]);
        let weights = token_weights(layer, &squares(rows), 4).unwrap();
        let values = |stage: usize| Vec::<f64>::try_from(weights[stage][0].to_kind(Kind::Double)).unwrap();
        let close = |found: Vec<f64>, expected: [f64; 4]| {
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{found:?}");
        };
        // The outputs of v have no gradients, so its tokens count alike; the mean of q is 10.
        let [a, b, c] = q.map(|q| ((2.0 * f64::from(q) / 10.0 + 1.0) / 3.0).sqrt());
        close(values(0), [a / c, b / c, 1.0, (a + b + c) / 3.0 / c].map(f64::sqrt));
        close(values(1), [1.0; 4]);
        for stage in [2, 3] {
            close(values(stage), [0.2, 0.4, 1.0, 1.6 / 3.0].map(f64::sqrt));
        }
        // One token has nearly all of the gradient.
        let mut rows = [[1.0; 7]; 100];
        rows[7] = [1e8; 7];
        let weights = token_weights(layer, &rows.concat(), 100).unwrap();
        let squares = weights[0][0].square();
        let mean_before = (10_000.0 + 99.0) / 100.0;
        let other = squares.double_value(&[0]);
        assert!((other - 1.0 / (LARGEST_WEIGHT * mean_before)).abs() < 1e-6, "{other}");
        assert_eq!(squares.double_value(&[7]), 1.0);
    }

    #[test]
    fn commits_take_at_most_a_twentieth_of_the_time() {
        // A batch takes 2 s, of a part of 5; a commit less than what is lost at most, or more.
        assert_eq!(batches_between_commits(5, 10.0, 0.1), 15);
        assert_eq!(batches_between_commits(5, 10.0, 6.0), 60);
        assert_eq!(batches_between_commits(1, 1000.0, 1.0), 1);
    }
}
