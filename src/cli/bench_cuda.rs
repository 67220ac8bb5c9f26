//! `gptq bench solver --device cuda`: our solver against the same loop in libtorch's own operations, and its parts against
//! what the device reaches at most.

use std::{collections::BTreeMap, time::Instant};

use anyhow::{Result, ensure};
use gptq::{
    checkpoint::write_file_atomically,
    cuda::Gpu,
    device::Choice,
    gptq::{
        Hessian,
        solver::{CudaSolver, Factorized, Solved, Solver, TorchSolver, Weight},
    },
    report::GENERATED_BY,
    variant::Variant,
};
use serde::Serialize;
use tch::{Cuda, Device, Kind, Tensor};

use super::{
    args::{BenchArgs, BenchKind, OutputArgs},
    terminal,
};

/// Batches of the Hessian's inputs, and tokens in each.
const BATCHES: (i64, i64) = (4, 4096);
const DAMP: f64 = 0.01;
/// Columns of a panel where shared memory suffices.
const PANEL: f64 = 256.0;
/// Side of the fp32 product that is taken for the device's limit.
const LARGE_PRODUCT: i64 = 8192;
/// Bytes of the copy that is.
const LARGE_COPY: i64 = 1 << 30;

#[derive(Serialize)]
struct Report {
    generated_by: &'static str,
    device: String,
    multiprocessors: u32,
    variant: Variant,
    repeat: usize,
    limits: Limits,
    blocks: Vec<Block>,
}

/// What the device reaches, measured here.
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
    cuda: Times,
    libtorch: Times,
    /// How many times as long libtorch's loop takes, by the fastest solves.
    ratio: f64,
    parts: Vec<Part>,
}

/// Seconds of each run.
#[derive(Serialize, Default)]
struct Times {
    factorize: Vec<f64>,
    solve: Vec<f64>,
}

/// A part of our solver; waited for before and after, so that parts take a little more than the whole.
#[derive(Serialize)]
struct Part {
    part: &'static str,
    seconds: f64,
    /// What it takes at the device's limits.
    floor_seconds: Option<f64>,
    /// The limit: operations or bytes.
    floor: String,
}

pub(super) fn run(args: &BenchArgs, output: &OutputArgs, choice: &Choice) -> Result<bool> {
    ensure!(matches!(args.what, BenchKind::Solver), "`bench {:?}` measures the CPU only", args.what);
    let Device::Cuda(index) = choice.device else { unreachable!("called for CUDA devices") };
    let gpu = Gpu::of(choice.device)?;
    let clock = Clock { index: index as i64, repeat: args.repeat.max(1) };
    let (n, k) = args.shape;
    let limits = limits(choice.device, clock);
    let blocks = [(n, k), (k, n)].map(|shape| block(shape, &args.variant, choice.device, clock, &limits));
    let report = Report {
        generated_by: GENERATED_BY,
        device: gpu.name.clone(),
        multiprocessors: gpu.multiprocessors,
        variant: args.variant,
        repeat: clock.repeat,
        limits,
        blocks: blocks.into_iter().collect::<Result<_>>()?,
    };
    if let Some(path) = &args.out {
        write_file_atomically(path, format!("{}\n", serde_json::to_string_pretty(&report)?).as_bytes())?;
    }
    if output.json.is_some() {
        terminal::json(&report)?;
    } else {
        print(&report)?;
    }
    Ok(true)
}

fn print(report: &Report) -> Result<()> {
    let Limits { fp32, copy } = report.limits;
    terminal::result(&format!(
        "{}: fp32 products {:.1} TFLOP/s, copies {:.0} GB/s; {}, fastest of {}",
        report.device,
        fp32 / 1e12,
        copy / 1e9,
        report.variant,
        report.repeat
    ))?;
    for block in &report.blocks {
        terminal::result(&format!("[{}, {}]", block.out_features, block.in_features))?;
        for (name, times) in [("cuda", &block.cuda), ("libtorch", &block.libtorch)] {
            let [factorize, solve] = [&times.factorize, &times.solve].map(|t| fastest(t) * 1e3);
            terminal::result(&format!("  {name:<20} factorize {factorize:>9.2} ms  solve {solve:>9.2} ms"))?;
        }
        terminal::result(&format!("  libtorch's loop takes {:.1} times as long", block.ratio))?;
        for part in &block.parts {
            let floor = part.floor_seconds.map_or(String::new(), |floor| {
                format!(
                    "  floor {:>8.2} ms ({:.0}%)  {}",
                    floor * 1e3,
                    100.0 * floor / part.seconds,
                    part.floor
                )
            });
            terminal::result(&format!("  {:<20} {:>9.2} ms{floor}", part.part, part.seconds * 1e3))?;
        }
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Clock {
    index: i64,
    repeat: usize,
}

impl Clock {
    /// Seconds until the device has done it.
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

fn limits(device: Device, clock: Clock) -> Limits {
    let matrix = Tensor::randn([LARGE_PRODUCT, LARGE_PRODUCT], (Kind::Float, device));
    let (source, mut target) = (
        Tensor::zeros([LARGE_COPY], (Kind::Uint8, device)),
        Tensor::zeros([LARGE_COPY], (Kind::Uint8, device)),
    );
    let best = |work: &mut dyn FnMut()| {
        let seconds: Vec<f64> = (0..clock.repeat.max(3))
            .map(|_| {
                Cuda::synchronize(clock.index);
                let begun = Instant::now();
                work();
                Cuda::synchronize(clock.index);
                begun.elapsed().as_secs_f64()
            })
            .collect();
        fastest(&seconds)
    };
    let product = best(&mut || drop(matrix.mm(&matrix)));
    let copy = best(&mut || target.copy_(&source));
    Limits { fp32: 2.0 * (LARGE_PRODUCT as f64).powi(3) / product, copy: 2.0 * LARGE_COPY as f64 / copy }
}

fn block(
    (n, k): (usize, usize),
    variant: &Variant,
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

    let ours = CudaSolver::new(device)?;
    let (mut cuda, mut libtorch) = (Times::default(), Times::default());
    // The first run of each loads what it needs.
    for solver in [&ours as &dyn Solver, &TorchSolver::default()] {
        factorize(solver)?.solve(&stacked, variant)?;
    }
    for _ in 0..clock.repeat {
        for (solver, times) in [(&ours as &dyn Solver, &mut cuda), (&TorchSolver::default(), &mut libtorch)] {
            let (seconds, factor) = clock.time(|| factorize(solver))?;
            times.factorize.push(seconds);
            times.solve.push(clock.time(|| factor.solve(&stacked, variant))?.0);
        }
    }

    let (measured, parts) = CudaSolver::with_clock(device)?;
    let mut best: BTreeMap<&str, f64> = BTreeMap::new();
    for _ in 0..=clock.repeat {
        let factor: Box<dyn Factorized> = factorize(&measured)?;
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
    Ok(Block {
        out_features: n,
        in_features: k,
        ratio: fastest(&libtorch.solve) / fastest(&cuda.solve),
        parts: parts.collect(),
        cuda,
        libtorch,
    })
}

/// The least that a part can take, and why.
fn floor(part: &str, (n, k): (f64, f64), variant: &Variant, limits: &Limits) -> (Option<f64>, String) {
    let products = |flop: f64| (Some(flop / limits.fp32), format!("{:.1} GFLOP", flop / 1e9));
    let bytes = |bytes: f64| (Some(bytes / limits.copy), format!("{:.0} MB", bytes / 1e6));
    let larger = |a: (Option<f64>, String), b: (Option<f64>, String)| if a.0 > b.0 { a } else { b };
    match part {
        "reorder and factor" => products(k * k * k / 3.0),
        // Each column's differences times what is left of its row of Ũ.
        "products" => products(n * k * k),
        // Weights and residuals in, differences and codes out; each column's effect on those behind it in its panel.
        "panels" => larger(bytes((3.0 * 4.0 + 1.0) * n * k), products(PANEL * n * k)),
        // fp16 in, fp32 out.
        "stack" => bytes((2.0 + 4.0) * n * k),
        "pack" => bytes((1.0 + f64::from(variant.bits.get()) / 8.0) * n * k),
        _ => (None, String::new()),
    }
}
