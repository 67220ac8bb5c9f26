//! `gptq completions` and `gptq man`, which follow from the descriptions of the arguments.

use std::fs;

use anyhow::{Context, Result};
use clap::CommandFactory;

use super::{
    args::{Cli, CompletionsArgs, ManArgs},
    terminal,
};

/// The program's name in scripts and pages.
const NAME: &str = "gptq";

/// Prints a shell's completion script.
pub(super) fn completions(args: &CompletionsArgs) -> Result<bool> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), NAME, &mut script);
    terminal::piece(&String::from_utf8(script)?)?;
    Ok(true)
}

/// Writes `gptq.1` and a page for each command.
pub(super) fn pages(args: &ManArgs) -> Result<bool> {
    let folder = args.dir.display();
    fs::create_dir_all(&args.dir).with_context(|| format!("making `{folder}`"))?;
    clap_mangen::generate_to(Cli::command(), &args.dir)
        .with_context(|| format!("writing into `{folder}`"))?;
    Ok(true)
}
