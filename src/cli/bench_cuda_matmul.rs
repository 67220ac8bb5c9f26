//! `gptq bench matmul --device cuda`: the packed product against libtorch's dense one and against plain copies.
//!
//! Weights go round so that none is still in the second-level cache when its turn comes. Contenders take turns, each
//! with a batch of launches between two synchronizations; the median batch counts. The time to enqueue a launch is
//! kept too: where it is that of the launch itself, the host was measured.

use std::{path::Path, time::Instant};

use anyhow::{Context, Result, ensure};
use gptq::{
    checkpoint::write_file_atomically,
    kernels::{CudaMatmul, Workspace, repack},
    pack::PackedLinear,
    variant::{Order, Variant},
};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::{
    args::{BenchArgs, OutputArgs},
    bench::random_linear,
    terminal,
};

const TOKENS: [usize; 5] = [1, 16, 64, 256, 2048];
/// What goes round is this many times the second-level cache.
const CACHES: usize = 4;
/// Of one batch, so that the synchronization at its end does not count.
const BATCH_SECONDS: f64 = 0.01;
const BATCH_LAUNCHES: std::ops::RangeInclusive<usize> = 10..=4000;

/// Everything measured.
#[derive(Serialize)]
struct Measured {
    device: String,
    capability: (i32, i32),
    multiprocessors: u32,
    l2_cache_bytes: usize,
    variant: String,
    kind: &'static str,
    lines: Vec<Line>,
}

/// One shape and number of tokens.
#[derive(Serialize)]
struct Line {
    out_features: usize,
    in_features: usize,
    tokens: usize,
    /// As the variant says, without act order.
    int4: Timing,
    /// With act order.
    int4_act: Timing,
    /// libtorch's product of the same shape with fp16 weights.
    fp16: Timing,
    /// A copy that reads and writes as many bytes as `int4` does.
    copy: Timing,
    /// Bytes that `int4` reads and writes: codes, parameters, x and y.
    bytes: usize,
    /// Its bytes a second over the copy's.
    share_of_copy: f64,
    /// The dense product's time over its own.
    against_fp16: f64,
    /// What act order costs, as a part.
    act_cost: f64,
}

/// Seconds of a launch.
#[derive(Debug, Clone, Serialize)]
struct Timing {
    median: f64,
    least: f64,
    most: f64,
    /// Of the host, to enqueue one.
    enqueue: f64,
    /// Launches of a batch.
    launches: usize,
}

/// Something to be timed; gets the number of the launch.
type Contender<'a> = Box<dyn Fn(usize) -> gptq::Result<()> + 'a>;

pub(super) fn run(args: &BenchArgs, device: Device, output: &OutputArgs) -> Result<bool> {
    let workspace = Workspace::new(device)?;
    let gpu = workspace.gpu();
    let (n, k) = args.shape;
    let mut lines = Vec::new();
    for shape in [(n, k), (k, n)] {
        let bench = Bench::new(&workspace, shape, &args.variant)?;
        for tokens in TOKENS {
            lines.push(bench.line(tokens, args.repeat.max(3))?);
        }
    }
    let measured = Measured {
        device: gpu.name.clone(),
        capability: gpu.capability,
        multiprocessors: gpu.multiprocessors,
        l2_cache_bytes: gpu.l2_cache,
        variant: args.variant.to_string(),
        kind: "fp16",
        lines,
    };
    if let Some(path) = &args.out {
        write(path, &measured)?;
    }
    if output.json.is_some() {
        terminal::json(&measured)?;
    } else {
        terminal::result(&table(&measured))?;
    }
    Ok(true)
}

/// The weights of one shape, as often as they are needed.
struct Bench<'a> {
    workspace: &'a Workspace,
    shape: (usize, usize),
    int4: Vec<CudaMatmul>,
    int4_act: Vec<CudaMatmul>,
    /// `[N, K]` fp16.
    dense: Vec<Tensor>,
}

impl<'a> Bench<'a> {
    fn new(
        workspace: &'a std::sync::Arc<Workspace>,
        shape: (usize, usize),
        variant: &Variant,
    ) -> Result<Self> {
        let copies = |bytes: usize| (CACHES * workspace.gpu().l2_cache).div_ceil(bytes) + 1;
        let packed = |order: Order| -> Result<Vec<CudaMatmul>> {
            let packed = PackedLinear::new(&random_linear(shape, &Variant { order, ..*variant }));
            let repacked = repack(&packed.view()).context("this variant has no CUDA kernel")?;
            let made =
                (0..copies(repacked.bytes())).map(|_| CudaMatmul::new(&repacked, Kind::Half, workspace));
            Ok(made.collect::<gptq::Result<_>>()?)
        };
        let (n, k) = (shape.0 as i64, shape.1 as i64);
        let dense = (0..copies(2 * shape.0 * shape.1))
            .map(|_| Tensor::f_randn([n, k], (Kind::Half, workspace.device())))
            .collect::<Result<_, _>>()?;
        let (int4, int4_act) = (packed(Order::Sequential)?, packed(Order::Act)?);
        Ok(Self { workspace, shape, int4, int4_act, dense })
    }

    fn line(&self, tokens: usize, repeat: usize) -> Result<Line> {
        let (n, k) = self.shape;
        let half = (Kind::Half, self.workspace.device());
        let x = Tensor::f_randn([tokens as i64, k as i64], half)?;
        let y = Tensor::f_zeros([tokens as i64, n.next_multiple_of(8) as i64], half)?;
        let bytes = self.int4[0].bytes() + 2 * tokens * (k + n);
        // Half of the bytes are read, half are written.
        let buffer = |_| Tensor::f_zeros([bytes as i64 / 2], (Kind::Uint8, self.workspace.device()));
        let count = (CACHES * self.workspace.gpu().l2_cache).div_ceil(bytes) + 1;
        let from = (0..count).map(buffer).collect::<Result<Vec<_>, _>>()?;
        let to = (0..count).map(buffer).collect::<Result<Vec<_>, _>>()?;
        let contenders: [Contender<'_>; 4] = [
            Box::new(|i| self.int4[i % self.int4.len()].multiply(&x, &y)),
            Box::new(|i| self.int4_act[i % self.int4_act.len()].multiply(&x, &y)),
            Box::new(|i| dense(&x, &self.dense[i % self.dense.len()])),
            Box::new(|i| copy(&from[i % count], &to[i % count])),
        ];
        let [int4, int4_act, fp16, copy] = self.time(&contenders, repeat)?;
        ensure!(int4.median > 0.0, "the clock stood still");
        Ok(Line {
            out_features: n,
            in_features: k,
            tokens,
            bytes,
            share_of_copy: copy.median / int4.median,
            against_fp16: fp16.median / int4.median,
            act_cost: int4_act.median / int4.median - 1.0,
            int4,
            int4_act,
            fp16,
            copy,
        })
    }

    /// Batches of each contender in turn.
    fn time<const N: usize>(&self, contenders: &[Contender<'_>; N], repeat: usize) -> Result<[Timing; N]> {
        let mut launches = [0; N];
        for (contender, launches) in contenders.iter().zip(&mut launches) {
            // The first compiles, fills caches and raises clocks.
            self.batch(contender, 50)?;
            let (seconds, _) = self.batch(contender, 50)?;
            let wanted = (BATCH_SECONDS / (seconds / 50.0)) as usize;
            *launches = wanted.clamp(*BATCH_LAUNCHES.start(), *BATCH_LAUNCHES.end());
        }
        let mut samples: [Vec<(f64, f64)>; N] = std::array::from_fn(|_| Vec::new());
        for _ in 0..repeat {
            for ((contender, &launches), samples) in contenders.iter().zip(&launches).zip(&mut samples) {
                let (seconds, enqueue) = self.batch(contender, launches)?;
                samples.push((seconds / launches as f64, enqueue / launches as f64));
            }
        }
        let mut launches = launches.into_iter();
        Ok(samples.map(|mut samples| {
            samples.sort_by(|a, b| a.0.total_cmp(&b.0));
            let (median, enqueue) = samples[samples.len() / 2];
            let (least, most) = (samples[0].0, samples[samples.len() - 1].0);
            Timing { median, least, most, enqueue, launches: launches.next().unwrap_or_default() }
        }))
    }

    /// Seconds of so many launches, and of enqueuing them.
    fn batch(&self, contender: &Contender<'_>, launches: usize) -> Result<(f64, f64)> {
        self.workspace.gpu().synchronize()?;
        let begun = Instant::now();
        (0..launches).try_for_each(contender)?;
        let enqueue = begun.elapsed().as_secs_f64();
        self.workspace.gpu().synchronize()?;
        Ok((begun.elapsed().as_secs_f64(), enqueue))
    }
}

fn dense(x: &Tensor, weight: &Tensor) -> gptq::Result<()> {
    let multiplied = x.f_linear::<&Tensor>(weight, None);
    multiplied.map(drop).map_err(|source| gptq::Error::Torch { action: "multiply".into(), source })
}

fn copy(from: &Tensor, to: &Tensor) -> gptq::Result<()> {
    let copied = to.shallow_clone().f_copy_(from);
    copied.map_err(|source| gptq::Error::Torch { action: "copy".into(), source })
}

fn write(path: &Path, measured: &Measured) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(measured)?;
    text.push(b'\n');
    Ok(write_file_atomically(path, &text)?)
}

fn table(measured: &Measured) -> String {
    let mut text = format!(
        "{} on {}, weights not in the cache, medians\n{:>13} {:>6} {:>9} {:>9} {:>8} {:>9} {:>8} {:>8} {:>8}\n",
        measured.variant,
        measured.device,
        "N x K",
        "tokens",
        "int4 us",
        "GB/s",
        "of copy",
        "TFLOP/s",
        "fp16 us",
        "x fp16",
        "act"
    );
    for line in &measured.lines {
        let flops = 2.0 * (line.tokens * line.out_features * line.in_features) as f64;
        text += &format!(
            "{:>13} {:>6} {:>9.1} {:>9.0} {:>7.0}% {:>9.1} {:>8.1} {:>8.2} {:>+7.1}%{}\n",
            format!("{} x {}", line.out_features, line.in_features),
            line.tokens,
            line.int4.median * 1e6,
            line.bytes as f64 / line.int4.median / 1e9,
            100.0 * line.share_of_copy,
            flops / line.int4.median / 1e12,
            line.fp16.median * 1e6,
            line.against_fp16,
            100.0 * line.act_cost,
            if line.int4.enqueue > 0.9 * line.int4.median { " (the host's time)" } else { "" }
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_says_what_was_measured() {
        let timing =
            |median: f64| Timing { median, least: median, most: median, enqueue: 1e-6, launches: 10 };
        let line = Line {
            out_features: 4096,
            in_features: 11008,
            tokens: 1,
            int4: timing(1e-5),
            int4_act: timing(1.05e-5),
            fp16: timing(4e-5),
            copy: timing(8e-6),
            bytes: 24_000_000,
            share_of_copy: 0.8,
            against_fp16: 4.0,
            act_cost: 0.05,
        };
        let measured = Measured {
            device: "a GPU".into(),
            capability: (9, 0),
            multiprocessors: 132,
            l2_cache_bytes: 1,
            variant: "4bit-128g".into(),
            kind: "fp16",
            lines: vec![line],
        };
        let last = table(&measured).lines().last().map(str::to_owned);
        let row = " 4096 x 11008      1      10.0      2400      80%       9.0     40.0     4.00    +5.0%";
        assert_eq!(last.as_deref(), Some(row));
    }
}
