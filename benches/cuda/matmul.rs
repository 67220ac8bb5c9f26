//! The packed product against libtorch's dense one and against plain copies.
//!
//! Launches cycle through several copies of the weights, so that no copy is still in the second-level cache. Contenders
//! take turns, each with a batch of launches between two synchronizations; the median batch counts. The time to enqueue a
//! launch is kept too: where it equals the time of the launch, the host was measured.

use std::{fmt, sync::Arc, time::Instant};

use anyhow::{Context, Result, ensure};
use gptq::{
    cuda::Gpu,
    error::TorchContext,
    kernels::{CudaMatmul, Workspace, repack},
    pack::PackedLinear,
    variant::{Order, Variant},
};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::{Args, random};

const TOKENS: [usize; 5] = [1, 16, 64, 256, 2048];
/// Tokens from which the plan prefers `wgmma` for both shapes.
const WGMMA_TOKENS: usize = 2048;
/// Size of all copies of the weights, in second-level caches.
const CACHES: usize = 4;
/// Time of one batch: long enough to make the synchronization at its end negligible.
const BATCH_SECONDS: f64 = 0.01;
const BATCH_LAUNCHES: std::ops::RangeInclusive<usize> = 10..=4000;

/// Everything measured.
#[derive(Serialize)]
pub(crate) struct Measured {
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
    /// The variant without act order.
    int4: Timing,
    /// The variant with act order.
    int4_act: Timing,
    /// The variant by `wgmma`, with many tokens on compute capability 9.0.
    wgmma: Option<Timing>,
    /// libtorch's product of the same shape with fp16 weights.
    fp16: Timing,
    /// A copy that reads and writes as many bytes as `int4` does.
    copy: Timing,
    /// Bytes that `int4` reads and writes: codes, parameters, x and y.
    bytes: usize,
    /// Bytes a second of `int4` over those of the copy.
    share_of_copy: f64,
    /// Time of `fp16` over that of `int4`.
    against_fp16: f64,
    /// Time of `fp16` over that of `wgmma`.
    wgmma_against_fp16: Option<f64>,
    /// Relative extra time of act order.
    act_cost: f64,
}

/// Seconds of a launch.
#[derive(Serialize)]
struct Timing {
    median: f64,
    least: f64,
    most: f64,
    /// Time of the host to enqueue one launch.
    enqueue: f64,
    /// Launches in a batch.
    launches: usize,
}

/// A launch to be timed; its argument is the number of the launch.
type Contender<'a> = Box<dyn Fn(usize) -> gptq::Result<()> + 'a>;

/// Measures the shape and its transpose.
pub(crate) fn measure(args: &Args, device: Device) -> Result<Measured> {
    let workspace = Workspace::on(Gpu::of(device)?, device, false)?;
    let asked = Workspace::on(Gpu::of(device)?, device, true)?;
    let gpu = workspace.gpu();
    let (n, k) = args.shape;
    let mut lines = Vec::new();
    for shape in [(n, k), (k, n)] {
        let bench = Bench::new(&workspace, &asked, shape, &args.variant)?;
        for tokens in TOKENS {
            lines.push(bench.line(tokens, args.repeat.max(3))?);
        }
    }
    Ok(Measured {
        device: gpu.name.clone(),
        capability: gpu.capability,
        multiprocessors: gpu.multiprocessors,
        l2_cache_bytes: gpu.l2_cache,
        variant: args.variant.to_string(),
        kind: "fp16",
        lines,
    })
}

/// The copies of the weights of one shape.
struct Bench<'a> {
    workspace: &'a Workspace,
    shape: (usize, usize),
    int4: Vec<CudaMatmul>,
    int4_act: Vec<CudaMatmul>,
    /// By `wgmma`; empty where the device has none.
    wgmma: Vec<CudaMatmul>,
    /// `[N, K]` fp16.
    dense: Vec<Tensor>,
}

impl<'a> Bench<'a> {
    fn new(
        workspace: &'a Arc<Workspace>,
        asked: &Arc<Workspace>,
        shape: (usize, usize),
        variant: &Variant,
    ) -> Result<Self> {
        let copies = |bytes: usize| (CACHES * workspace.gpu().l2_cache).div_ceil(bytes) + 1;
        let packed = |order: Order, workspace: &Arc<Workspace>| -> Result<Vec<CudaMatmul>> {
            let packed = PackedLinear::new(&random::linear(shape, &Variant { order, ..*variant }));
            let repacked = repack(&packed.view()).context("this variant has no CUDA kernel")?;
            let made =
                (0..copies(repacked.bytes())).map(|_| CudaMatmul::new(&repacked, Kind::Half, workspace));
            Ok(made.collect::<gptq::Result<_>>()?)
        };
        let (n, k) = (shape.0 as i64, shape.1 as i64);
        let dense = (0..copies(2 * shape.0 * shape.1))
            .map(|_| Tensor::f_randn([n, k], (Kind::Half, workspace.device())))
            .collect::<Result<_, _>>()?;
        let (int4, int4_act) = (packed(Order::Sequential, workspace)?, packed(Order::Act, workspace)?);
        let wgmma = match asked.has_wgmma() {
            true => packed(Order::Sequential, asked)?,
            false => Vec::new(),
        };
        Ok(Self { workspace, shape, int4, int4_act, wgmma, dense })
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
        let mut contenders: Vec<Contender<'_>> = vec![
            Box::new(|i| self.int4[i % self.int4.len()].multiply(&x, &y)),
            Box::new(|i| self.int4_act[i % self.int4_act.len()].multiply(&x, &y)),
            Box::new(|i| dense(&x, &self.dense[i % self.dense.len()])),
            Box::new(|i| copy(&from[i % count], &to[i % count])),
        ];
        if tokens >= WGMMA_TOKENS && !self.wgmma.is_empty() {
            contenders.push(Box::new(|i| self.wgmma[i % self.wgmma.len()].multiply(&x, &y)));
        }
        let mut timings = self.time(&contenders, repeat)?.into_iter();
        let mut next = || timings.next().context("a contender was not timed");
        let (int4, int4_act, fp16, copy, wgmma) = (next()?, next()?, next()?, next()?, next().ok());
        ensure!(int4.median > 0.0, "the clock stood still");
        Ok(Line {
            out_features: n,
            in_features: k,
            tokens,
            bytes,
            share_of_copy: copy.median / int4.median,
            against_fp16: fp16.median / int4.median,
            wgmma_against_fp16: wgmma.as_ref().map(|wgmma| fp16.median / wgmma.median),
            act_cost: int4_act.median / int4.median - 1.0,
            int4,
            int4_act,
            wgmma,
            fp16,
            copy,
        })
    }

    /// Batches of each contender in turn.
    fn time(&self, contenders: &[Contender<'_>], repeat: usize) -> Result<Vec<Timing>> {
        let mut launches = vec![0; contenders.len()];
        for (contender, launches) in contenders.iter().zip(&mut launches) {
            // The first compiles, fills caches and raises clocks.
            self.batch(contender, 50)?;
            let (seconds, _) = self.batch(contender, 50)?;
            let wanted = (BATCH_SECONDS / (seconds / 50.0)) as usize;
            *launches = wanted.clamp(*BATCH_LAUNCHES.start(), *BATCH_LAUNCHES.end());
        }
        let mut samples = vec![Vec::new(); contenders.len()];
        for _ in 0..repeat {
            for ((contender, &launches), samples) in contenders.iter().zip(&launches).zip(&mut samples) {
                let (seconds, enqueue) = self.batch(contender, launches)?;
                samples.push((seconds / launches as f64, enqueue / launches as f64));
            }
        }
        let timing = |(mut samples, launches): (Vec<(f64, f64)>, usize)| {
            samples.sort_by(|a, b| a.0.total_cmp(&b.0));
            let (median, enqueue) = samples[samples.len() / 2];
            let (least, most) = (samples[0].0, samples[samples.len() - 1].0);
            Timing { median, least, most, enqueue, launches }
        };
        Ok(samples.into_iter().zip(launches).map(timing).collect())
    }

    /// Seconds of a batch, and seconds to enqueue it.
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
    x.f_linear::<&Tensor>(weight, None).map(drop).torch("multiply")
}

fn copy(from: &Tensor, to: &Tensor) -> gptq::Result<()> {
    to.shallow_clone().f_copy_(from).torch("copy")
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} on {}, weights not in the cache, medians", self.variant, self.device)?;
        writeln!(
            f,
            "{:>13} {:>6} {:>9} {:>9} {:>8} {:>9} {:>8} {:>8} {:>8}",
            "N x K", "tokens", "int4 us", "GB/s", "of copy", "TFLOP/s", "fp16 us", "x fp16", "act"
        )?;
        for line in &self.lines {
            let flops = 2.0 * (line.tokens * line.out_features * line.in_features) as f64;
            writeln!(
                f,
                "{:>13} {:>6} {:>9.1} {:>9.0} {:>7.0}% {:>9.1} {:>8.1} {:>8.2} {:>+7.1}%{}",
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
            )?;
            if let Some(wgmma) = &line.wgmma {
                let faster = if wgmma.median < line.int4.median { "wgmma" } else { "mma" };
                writeln!(
                    f,
                    "{:>13} {:>6} {:>9.1} by wgmma, {:.1} TFLOP/s; {faster} is faster (WGMMA_VERIFIED in plan.rs decides)",
                    "",
                    line.tokens,
                    wgmma.median * 1e6,
                    flops / wgmma.median / 1e12
                )?;
            }
        }
        Ok(())
    }
}
