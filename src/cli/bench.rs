//! `gptq bench`: our own kernels against what this machine can do at most.

use std::{hint::black_box, time::Instant};

use anyhow::Result;
use gptq::{
    checkpoint::write_file_atomically,
    device,
    gptq::{
        Hessian, QuantizedLinear,
        solver::{CpuSolver, Solver, Weight},
    },
    kernels,
    pack::PackedLinear,
    variant::{Order, Variant},
};
use rayon::prelude::*;
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::{
    args::{BenchArgs, BenchKind, OutputArgs},
    bench_cuda, bench_cuda_matmul, terminal,
};

/// Tokens in the solver's benchmark, and rows of activations in the matmul's.
const TOKENS: i64 = 4096;
const ROWS: [usize; 4] = [1, 16, 512, 2048];

/// One measured line.
#[derive(Serialize)]
struct Line {
    what: String,
    seconds: f64,
    /// Work done a second, in `unit`.
    rate: f64,
    unit: &'static str,
    /// `rate` over what this machine reaches at the same kind of work, measured here.
    share_of_limit: f64,
}

pub(super) fn run(args: &BenchArgs, output: &OutputArgs) -> Result<bool> {
    let _guard = tch::no_grad_guard();
    let choice = device::resolve(&args.device)?;
    choice.note.iter().for_each(|note| terminal::note(output, note));
    match (args.what, choice.device) {
        (_, Device::Cpu) => {}
        (BenchKind::Matmul, device) => return bench_cuda_matmul::run(args, device, output),
        _ => return bench_cuda::run(args, output, &choice),
    }
    let lines = match args.what {
        BenchKind::Solver => solver(args)?,
        BenchKind::Pack => pack(args)?,
        BenchKind::Matmul => matmul(args)?,
    };
    if let Some(path) = &args.out {
        write_file_atomically(path, format!("{}\n", serde_json::to_string_pretty(&lines)?).as_bytes())?;
    }
    if output.json.is_some() {
        terminal::json(&lines)?;
        return Ok(true);
    }
    let (n, k) = args.shape;
    terminal::result(&format!("{} on [{n}, {k}], fastest of {}", args.variant, args.repeat))?;
    for line in lines {
        terminal::result(&format!(
            "{:<36} {:>9.4} s {:>9.1} {:<8} {:>5.0}% of this machine's limit",
            line.what,
            line.seconds,
            line.rate,
            line.unit,
            100.0 * line.share_of_limit
        ))?;
    }
    Ok(true)
}

fn solver(args: &BenchArgs) -> Result<Vec<Line>> {
    let (n, k) = args.shape;
    let (nf, kf) = (n as f64, k as f64);
    let fp32 = product_limit(Kind::Float, args.repeat);
    let (amx, bf16) = match gptq::amx::available() {
        true => (true, product_limit(Kind::BFloat16, args.repeat)),
        false => (false, fp32),
    };
    tch::manual_seed(0);
    let x = Tensor::randn([TOKENS, k as i64], (Kind::Float, Device::Cpu));
    let weight = Tensor::randn([n as i64, k as i64], (Kind::Float, Device::Cpu));
    let stacked = Weight { name: "bench", values: &weight };
    let line = |what: String, seconds: f64, flops: f64, limit: f64| {
        let rate = flops / seconds / 1e9;
        Line { what, seconds, rate, unit: "GFLOP/s", share_of_limit: rate / limit }
    };

    // One triangle: half of 2·T·K².
    let hessian_flops = TOKENS as f64 * kf * kf;
    let mut lines = Vec::new();
    let mut hessian = None;
    for (kind, name, limit) in [(Kind::BFloat16, "bf16", bf16), (Kind::Float, "fp32", fp32)] {
        let x = x.to_kind(kind);
        let (seconds, made) = fastest(args.repeat, || -> gptq::Result<_> {
            let mut hessian = Hessian::new(k, Device::Cpu)?;
            hessian.add(&x)?;
            hessian.finish("bench")
        })?;
        lines.push(line(format!("Hessian of {TOKENS} tokens in {name}"), seconds, hessian_flops, limit));
        hessian = Some(made);
    }
    let hessian = hessian.expect("made above");
    let (seconds, _) = fastest(args.repeat, || hessian.output_energy(&weight))?;
    lines.push(line("output energy".into(), seconds, nf * kf * kf, bf16));
    let sorting = args.variant.sorting(false);
    let solvers: &[bool] = if amx { &[true, false] } else { &[false] };
    for (i, &with_amx) in solvers.iter().enumerate() {
        let solver = CpuSolver::with_amx(with_amx);
        // The same for both, so it is measured for the first.
        let repeat = if i == 0 { args.repeat } else { 1 };
        let (seconds, factor) = fastest(repeat, || solver.factorize(&hessian, sorting, 0.01, "bench"))?;
        if i == 0 {
            lines.push(line("factorization".into(), seconds, kf * kf * kf / 3.0, fp32));
        }
        let (seconds, _) = fastest(args.repeat, || factor.solve(&[stacked], &args.variant))?;
        // On AMX a product is three of bf16.
        let limit = if with_amx { bf16 / 3.0 } else { fp32 };
        lines.push(line(format!("solve, {}", solver.name()), seconds, nf * kf * kf, limit));
    }
    Ok(lines)
}

fn pack(args: &BenchArgs) -> Result<Vec<Line>> {
    let linear = random_linear(args.shape, &args.variant);
    let bytes = linear.codes().len() as f64 * (1.0 + f64::from(args.variant.bits.get()) / 8.0);
    let limit = copy_limit(args.repeat);
    let (seconds, _) = fastest(args.repeat, || Ok(PackedLinear::new(&linear)))?;
    let rate = bytes / seconds / 1e9;
    Ok(vec![Line { what: "packing".into(), seconds, rate, unit: "GB/s", share_of_limit: rate / limit }])
}

fn matmul(args: &BenchArgs) -> Result<Vec<Line>> {
    let (n, k) = args.shape;
    let packed = PackedLinear::new(&random_linear(args.shape, &args.variant));
    let view = packed.view();
    let packed_bytes: usize = packed.tensors().iter().map(|(_, bytes)| bytes.len()).sum();
    let (flops_limit, read_limit) = (product_limit(Kind::Float, args.repeat), read_limit(args.repeat));
    let mut lines = Vec::new();
    for rows in ROWS {
        let x: Vec<f32> = (0..rows * k).map(|i| (i % 13) as f32 - 6.0).collect();
        let mut y = vec![0.0; rows * n];
        let (seconds, ()) = fastest(args.repeat, || {
            kernels::matmul(&x, rows, &view, black_box(&mut y));
            Ok(())
        })?;
        let what = format!("matmul, {rows} rows");
        lines.push(if rows == 1 {
            // One row reads every weight once and computes next to nothing: the memory is the limit.
            let rate = packed_bytes as f64 / seconds / 1e9;
            Line { what, seconds, rate, unit: "GB/s", share_of_limit: rate / read_limit }
        } else {
            let rate = 2.0 * rows as f64 * n as f64 * k as f64 / seconds / 1e9;
            Line { what, seconds, rate, unit: "GFLOP/s", share_of_limit: rate / flops_limit }
        });
    }
    Ok(lines)
}

/// Codes, scales and zeros without meaning but with the variant's shape.
pub(super) fn random_linear((n, k): (usize, usize), variant: &Variant) -> QuantizedLinear {
    let groups = variant.group_size.groups(k);
    let size = variant.group_size.features(k);
    let hash = |i: usize| (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
    let codes = (0..n * k).map(|i| hash(i) as u8 & variant.bits.max_code()).collect();
    let scales = vec![half::f16::from_f32(0.01); groups * n];
    let zeros = vec![variant.bits.symmetric_zero(); groups * n];
    let mut order: Vec<usize> = (0..k).collect();
    if variant.order == Order::Act {
        order.sort_by_key(|&feature| hash(feature));
    }
    let mut g_idx = vec![0; k];
    order.into_iter().enumerate().for_each(|(position, feature)| g_idx[feature] = (position / size) as u32);
    QuantizedLinear::new(variant.bits, codes, scales, zeros, g_idx)
}

/// Seconds of the fastest of `repeat` runs, and the last one's result.
fn fastest<T>(repeat: usize, mut work: impl FnMut() -> gptq::Result<T>) -> gptq::Result<(f64, T)> {
    let mut timed = || {
        let begun = Instant::now();
        work().map(|result| (begun.elapsed().as_secs_f64(), result))
    };
    let (mut best, mut result) = timed()?;
    for _ in 1..repeat {
        let (seconds, again) = timed()?;
        best = best.min(seconds);
        result = again;
    }
    Ok((best, result))
}

/// GFLOP/s of libtorch's matrix product.
fn product_limit(kind: Kind, repeat: usize) -> f64 {
    let size = 3072i64;
    let a = Tensor::randn([size, size], (Kind::Float, Device::Cpu)).to_kind(kind);
    let seconds = (0..repeat.max(3)).map(|_| {
        let begun = Instant::now();
        drop(black_box(a.matmul(&a)));
        begun.elapsed().as_secs_f64()
    });
    2.0 * (size as f64).powi(3) / seconds.fold(f64::INFINITY, f64::min) / 1e9
}

/// Larger than any cache here.
const LARGE: usize = 256 << 20;

/// GB/s read and written by a parallel copy.
fn copy_limit(repeat: usize) -> f64 {
    let source = vec![1u8; LARGE];
    let mut target = vec![0u8; LARGE];
    let seconds = (0..repeat.max(3)).map(|_| {
        let begun = Instant::now();
        target
            .par_chunks_mut(1 << 20)
            .zip(source.par_chunks(1 << 20))
            .for_each(|(t, s)| t.copy_from_slice(s));
        black_box(&target);
        begun.elapsed().as_secs_f64()
    });
    2.0 * LARGE as f64 / seconds.fold(f64::INFINITY, f64::min) / 1e9
}

/// GB/s of a parallel sum over memory.
fn read_limit(repeat: usize) -> f64 {
    let source = vec![1u64; LARGE / 8];
    let seconds = (0..repeat.max(3)).map(|_| {
        let begun = Instant::now();
        black_box(
            source.par_chunks(1 << 17).map(|c| c.iter().fold(0u64, |a, b| a ^ b)).reduce(|| 0, |a, b| a ^ b),
        );
        begun.elapsed().as_secs_f64()
    });
    LARGE as f64 / seconds.fold(f64::INFINITY, f64::min) / 1e9
}
