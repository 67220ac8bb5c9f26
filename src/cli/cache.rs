//! `gptq cache`.

use std::{fmt::Write, fs, path::PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use gptq::{Error, eval::stored_predictions, units::bytes};

use super::{args::OutputArgs, hub, terminal};

/// The stored predictions.
#[derive(Debug, Args)]
pub(super) struct StoredArgs {
    /// list: show the files and their sizes. clear: remove them
    action: Action,
    /// Folder of the predictions [default: gptq in $XDG_CACHE_HOME or ~/.cache]
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Action {
    List,
    Clear,
}

pub(super) fn run(args: &StoredArgs, output: &OutputArgs) -> Result<bool> {
    let dir = args.cache_dir.clone().or_else(hub::predictions_dir);
    let dir = dir.context("no home folder is known: name the cache with --cache-dir")?;
    let stored = stored_predictions(&dir)?;
    if args.action == Action::Clear {
        for file in &stored {
            fs::remove_file(&file.path).map_err(Error::io("remove", &file.path))?;
        }
    }
    let text = || {
        let mut text = String::new();
        for file in stored.iter().filter(|_| args.action == Action::List) {
            let _ = writeln!(text, "{:>9}  {}", bytes(file.bytes), file.path.display());
        }
        let all = bytes(stored.iter().map(|file| file.bytes).sum());
        let removed = if args.action == Action::Clear { " removed" } else { "" };
        let files = if stored.len() == 1 { "file" } else { "files" };
        let _ = writeln!(text, "{all} in {} {files} of `{}`{removed}", stored.len(), dir.display());
        text
    };
    terminal::answer(output, &stored, text)?;
    Ok(true)
}
