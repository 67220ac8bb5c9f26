//! Benchmarks of the CUDA kernels: `cargo bench --bench cuda -- solver|matmul [--device cuda:N] [--out FILE]`.
//!
//! Without the name of a part both are measured, and nothing where there is no CUDA device.
//! `scripts/gpu-check` takes this program, built, to a machine with a GPU.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "results and errors are printed here")]

// Sets what OpenMP reads before `main`, as the program does.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[path = "../../src/cli/environment.rs"]
mod environment;
mod matmul;
#[path = "../random.rs"]
mod random;
mod solver;

use std::{
    fmt::Display,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use gptq::{accuracy::Quality, checkpoint::write_file_atomically, device, variant::Variant};
use serde::Serialize;

/// Measure the CUDA kernels, for the shape and for its transpose.
#[derive(Debug, Parser)]
struct Args {
    /// What to measure [default: everything, if there is a CUDA device]
    part: Option<Part>,
    /// Where to measure: cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cuda")]
    device: String,
    /// Output and input features, N,K
    #[arg(long, value_name = "N,K", default_value = "4096,11008", value_parser = shape)]
    shape: (usize, usize),
    /// The variant that is solved or multiplied
    #[arg(long, default_value = "4bit-128g")]
    variant: Variant,
    /// Preset whose scales the solver chooses: fast, standard or best
    #[arg(long, default_value = "fast", value_parser = quality)]
    quality: Quality,
    /// Repetitions; the fastest counts, of the matmul the median of at least 3
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    /// Also write the figures of the part as JSON to this file
    #[arg(long, value_name = "FILE", requires = "part")]
    out: Option<PathBuf>,
    /// A flag that `cargo bench` passes
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Part {
    /// The solver against the same loop in libtorch's operations, and its parts against the device's limits
    Solver,
    /// The packed product against libtorch's dense one and against copies
    Matmul,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn quality(text: &str) -> Result<Quality, String> {
    serde_json::from_value(text.into()).map_err(|_| "expected fast, standard or best".into())
}

fn run(args: &Args) -> Result<()> {
    let choice = match (device::resolve(&args.device), args.part) {
        (Err(error), None) => {
            println!("nothing is measured: {error}");
            return Ok(());
        }
        (resolved, _) => resolved?,
    };
    ensure!(choice.device.is_cuda(), "expected a CUDA device, found `{}`", choice.name);
    let parts = args.part.map_or_else(|| Part::value_variants().to_vec(), |part| vec![part]);
    for part in parts {
        match part {
            Part::Solver => report(&solver::measure(args, choice.device)?, args.out.as_deref())?,
            Part::Matmul => report(&matmul::measure(args, choice.device)?, args.out.as_deref())?,
        }
    }
    Ok(())
}

fn report(measured: &(impl Serialize + Display), out: Option<&Path>) -> Result<()> {
    if let Some(path) = out {
        write_file_atomically(path, format!("{}\n", serde_json::to_string_pretty(measured)?).as_bytes())?;
    }
    print!("{measured}");
    Ok(())
}

fn shape(text: &str) -> Result<(usize, usize), String> {
    let parsed =
        text.split_once(',').and_then(|(n, k)| Some((n.trim().parse().ok()?, k.trim().parse().ok()?)));
    parsed.filter(|&(n, k): &(usize, usize)| n > 0 && k > 0).ok_or("expected N,K such as 4096,11008".into())
}
