//! The command line: arguments, terminal, and one module for each command.

mod args;
mod cache;
mod card;
mod cluster;
mod command;
mod compute;
mod datasets;
mod demo;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod environment;
mod eval;
mod gate;
mod generate;
mod gguf;
mod hub;
mod inspect;
mod manual;
mod publish;
mod quantize;
mod report;
mod signals;
mod terminal;
mod verify;

use std::process::ExitCode;

use args::{Cli, Command};
use clap::Parser;

/// Done, or passed.
const DONE: u8 = 0;
/// A verification or a gate failed.
const FAILED: u8 = 1;
/// Usage or run-time error.
const ERROR: u8 = 2;

/// Runs the command given on the command line.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.command.device() != Some("cpu") {
        gptq::device::open();
    }
    let cluster = match cluster::join(&cli.command) {
        Ok(cluster) => cluster,
        Err(error) => {
            terminal::error(&error);
            return ExitCode::from(ERROR);
        }
    };
    let result = match &cli.command {
        Command::Quantize(args) => quantize::run(args, &cli.output, &cluster),
        Command::Verify(args) => verify::run(args, &cli.output),
        Command::Eval(args) => eval::run(args, &cli.output, &cluster),
        Command::Report(args) => report::run(args, &cli.output),
        Command::Gate(args) => gate::run(args, &cli.output),
        Command::Gguf(args) => gguf::run(args, &cli.output),
        Command::Generate(args) => generate::run(args, &cli.output),
        Command::Inspect(args) => inspect::run(args, &cli.output),
        Command::Cache(args) => cache::run(args, &cli.output),
        Command::Card(args) => card::run(args, &cli.output),
        Command::Publish(args) => publish::run(args, &cli.output),
        Command::Demo(args) => demo::run(args, &cli.output),
        Command::Completions(args) => manual::completions(args),
        Command::Man(args) => manual::pages(args),
    };
    let result = result.and_then(|passed| Ok((passed, cluster.barrier()?)));
    match result {
        Ok((passed, ())) => {
            cluster.leave();
            ExitCode::from(if passed { DONE } else { FAILED })
        }
        Err(error) => {
            let code = match error.downcast_ref() {
                Some(gptq::Error::Interrupted) => signals::exit_code(),
                _ => ERROR,
            };
            cluster::end_all(&cluster, &error, code);
            ExitCode::from(code)
        }
    }
}
