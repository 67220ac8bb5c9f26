//! The solver, and its parts against the device's limits.

use std::{collections::BTreeMap, fmt, time::Instant};

use anyhow::{Result, bail};
use gptq::{
    accuracy::{Quality, Scales},
    cuda::Gpu,
    gptq::{
        Hessian,
        solver::{CudaSolver, Factor, Solved, Solver, StageShape, Weight, Work},
    },
    report::GENERATED_BY,
    variant::Variant,
};
use serde::Serialize;
use tch::{Cuda, Device, Kind, Tensor};

use super::Args;

/// Batches of the Hessian's inputs, and tokens in each.
const BATCHES: (i64, i64) = (4, 4096);
const DAMP: f64 = 0.01;
/// Columns of a panel where shared memory suffices.
const PANEL: f64 = 256.0;
/// Side of the fp32 product whose rate is the device's limit.
const LARGE_PRODUCT: i64 = 8192;
/// Bytes of the copy whose rate is the device's limit.
const LARGE_COPY: i64 = 1 << 30;

/// Everything measured.
#[derive(Serialize)]
pub(crate) struct Report {
    generated_by: &'static str,
    device: String,
    multiprocessors: u32,
    variant: Variant,
    quality: Quality,
    repeat: usize,
    limits: Limits,
    blocks: Vec<Block>,
}

/// The device's limits, measured.
#[derive(Serialize)]
struct Limits {
    /// libtorch's fp32 product, FLOP/s.
    fp32: f64,
    /// Bytes read and written a second by a copy.
    copy: f64,
}

/// One shape.
#[derive(Serialize)]
struct Block {
    out_features: usize,
    in_features: usize,
    /// Launches of a solve with its factorization, and the bytes that they read and write, as planned.
    launches: usize,
    bytes: u64,
    cuda: Times,
    parts: Vec<Part>,
}

/// Seconds of each run.
#[derive(Serialize, Default)]
struct Times {
    factorize: Vec<f64>,
    solve: Vec<f64>,
}

/// A part of our solver, synchronized before and after, so that parts take a little more than the whole.
#[derive(Serialize)]
struct Part {
    part: &'static str,
    seconds: f64,
    /// Time at the device's limits.
    floor_seconds: Option<f64>,
    /// The limit: operations or bytes.
    floor: String,
}

/// Measures the shape and its transpose.
pub(crate) fn measure(args: &Args, device: Device) -> Result<Report> {
    let Device::Cuda(index) = device else { bail!("expected a CUDA device, found {device:?}") };
    let gpu = Gpu::of(device)?;
    let clock = Clock { index: index as i64, repeat: args.repeat.max(1) };
    let (n, k) = args.shape;
    let limits = limits(device, clock)?;
    let scales = args.quality.options().scales;
    let shared = gpu.shared_memory;
    let blocks =
        [(n, k), (k, n)].map(|shape| block(shape, &args.variant, scales, shared, device, clock, &limits));
    Ok(Report {
        generated_by: GENERATED_BY,
        device: gpu.name.clone(),
        multiprocessors: gpu.multiprocessors,
        variant: args.variant,
        quality: args.quality,
        repeat: clock.repeat,
        limits,
        blocks: blocks.into_iter().collect::<Result<_>>()?,
    })
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Limits { fp32, copy } = self.limits;
        writeln!(
            f,
            "{}: fp32 products {:.1} TFLOP/s, copies {:.0} GB/s; {}, {}, fastest of {}",
            self.device,
            fp32 / 1e12,
            copy / 1e9,
            self.variant,
            self.quality,
            self.repeat
        )?;
        for block in &self.blocks {
            writeln!(f, "[{}, {}]", block.out_features, block.in_features)?;
            let [factorize, solve] = [&block.cuda.factorize, &block.cuda.solve].map(|t| fastest(t) * 1e3);
            writeln!(f, "  {:<20} factorize {factorize:>9.2} ms  solve {solve:>9.2} ms", "cuda")?;
            let floor = block.bytes as f64 / copy * 1e3;
            writeln!(
                f,
                "  {:<20} {} launches, {:.1} GB, {floor:.2} ms as a copy",
                "planned",
                block.launches,
                block.bytes as f64 / 1e9
            )?;
            for part in &block.parts {
                write!(f, "  {:<20} {:>9.2} ms", part.part, part.seconds * 1e3)?;
                if let Some(floor) = part.floor_seconds {
                    let share = 100.0 * floor / part.seconds;
                    write!(f, "  floor {:>8.2} ms ({share:.0}%)  {}", floor * 1e3, part.floor)?;
                }
                writeln!(f)?;
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct Clock {
    index: i64,
    repeat: usize,
}

impl Clock {
    /// Seconds of `work`, with the device synchronized before and after.
    fn time<T>(self, work: impl FnOnce() -> gptq::Result<T>) -> gptq::Result<(f64, T)> {
        Cuda::synchronize(self.index);
        let begun = Instant::now();
        let done = work()?;
        Cuda::synchronize(self.index);
        Ok((begun.elapsed().as_secs_f64(), done))
    }
}

fn fastest(seconds: &[f64]) -> f64 {
    seconds.iter().copied().fold(f64::INFINITY, f64::min)
}

fn limits(device: Device, clock: Clock) -> gptq::Result<Limits> {
    let matrix = Tensor::randn([LARGE_PRODUCT, LARGE_PRODUCT], (Kind::Float, device));
    let (source, mut target) = (
        Tensor::zeros([LARGE_COPY], (Kind::Uint8, device)),
        Tensor::zeros([LARGE_COPY], (Kind::Uint8, device)),
    );
    let best = |work: &mut dyn FnMut()| -> gptq::Result<f64> {
        let mut timed = || {
            work();
            Ok(())
        };
        let times = (0..clock.repeat.max(3)).map(|_| Ok(clock.time(&mut timed)?.0));
        Ok(fastest(&times.collect::<gptq::Result<Vec<_>>>()?))
    };
    let product = best(&mut || drop(matrix.mm(&matrix)))?;
    let copy = best(&mut || target.copy_(&source))?;
    Ok(Limits { fp32: 2.0 * (LARGE_PRODUCT as f64).powi(3) / product, copy: 2.0 * LARGE_COPY as f64 / copy })
}

fn block(
    (n, k): (usize, usize),
    variant: &Variant,
    scales: Scales,
    shared_memory: usize,
    device: Device,
    clock: Clock,
    limits: &Limits,
) -> Result<Block> {
    tch::manual_seed(0);
    let half = (Kind::Half, device);
    let mut hessian = Hessian::new(k, device)?;
    for _ in 0..BATCHES.0 {
        hessian.add(&Tensor::randn([BATCHES.1, k as i64], half))?;
    }
    let hessian = hessian.finish("bench")?;
    let weight = Tensor::randn([n as i64, k as i64], half) * 0.02;
    let stacked = [Weight { name: "bench", values: &weight }];
    let factorize = |solver: &dyn Solver| solver.factorize(&hessian, variant.sorting(false), DAMP, "bench");

    let ours = CudaSolver::new(device)?.with_scales(scales);
    let mut cuda = Times::default();
    // The first run loads libraries and kernels.
    factorize(&ours)?.solve(&stacked, variant)?;
    for _ in 0..clock.repeat {
        let (seconds, factor) = clock.time(|| factorize(&ours))?;
        cuda.factorize.push(seconds);
        cuda.solve.push(clock.time(|| factor.solve(&stacked, variant))?.0);
    }

    let (measured, parts) = CudaSolver::with_clock(device)?;
    let measured = measured.with_scales(scales);
    let mut best: BTreeMap<&str, f64> = BTreeMap::new();
    for _ in 0..=clock.repeat {
        let factor: Factor = factorize(&measured)?;
        for solution in factor.solve(&stacked, variant)? {
            if let Solved::Device(linear) = &solution.linear {
                linear.pack()?;
            }
        }
        for (part, seconds) in parts.take() {
            best.entry(part).and_modify(|b| *b = b.min(seconds)).or_insert(seconds);
        }
    }
    let parts = best.into_iter().map(|(part, seconds)| {
        let (floor_seconds, floor) = floor(part, (n as f64, k as f64), variant, limits);
        Part { part, seconds, floor_seconds, floor }
    });
    let shape = StageShape { out_features: &[n], in_features: k, weight_bytes: 2 };
    let work = Work::of_stage(&shape, variant, scales, false, shared_memory).unwrap_or_default();
    let (launches, bytes) = (work.launches(), work.bytes);
    Ok(Block { out_features: n, in_features: k, launches, bytes, parts: parts.collect(), cuda })
}

/// The time of a part at the device's limits, and the work that takes it.
fn floor(part: &str, (n, k): (f64, f64), variant: &Variant, limits: &Limits) -> (Option<f64>, String) {
    let products = |flop: f64| (Some(flop / limits.fp32), format!("{:.1} GFLOP", flop / 1e9));
    let bytes = |bytes: f64| (Some(bytes / limits.copy), format!("{:.0} MB", bytes / 1e6));
    let larger = |a: (Option<f64>, String), b: (Option<f64>, String)| if a.0 > b.0 { a } else { b };
    match part {
        "reorder and factor" => products(k * k * k / 3.0),
        // Each column's differences times the rest of its row of Ũ.
        "products" => products(n * k * k),
        // Weights and residuals in, differences and codes out; each column changes the later ones of its panel.
        "panels" => larger(bytes((3.0 * 4.0 + 1.0) * n * k), products(PANEL * n * k)),
        // fp16 in, fp32 out.
        "stack" => bytes((2.0 + 4.0) * n * k),
        "pack" => bytes((1.0 + f64::from(variant.bits.get()) / 8.0) * n * k),
        _ => (None, String::new()),
    }
}
