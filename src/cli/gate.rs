//! `gptq gate`.

use std::{env, fs::OpenOptions, io::Write, path::Path};

use anyhow::{Context, Result};
use gptq::gate::{self, Figures, Judgement, Thresholds, Verdict};

use super::{
    args::{GateArgs, GateFormat, OutputArgs},
    terminal,
};

/// GitHub Actions names a file here whose Markdown it shows on the job's page.
const STEP_SUMMARY: &str = "GITHUB_STEP_SUMMARY";

pub(super) fn run(args: &GateArgs, output: &OutputArgs) -> Result<bool> {
    let thresholds = match &args.thresholds {
        Some(path) => Thresholds::read(path)?,
        None => Thresholds::default(),
    };
    let figures = Figures::read(&args.run)?;
    let judgement = match args.update {
        true => update(&figures, &args.baseline, &thresholds)?,
        false => gate::judge(&figures, &gate::read_baseline(&args.baseline)?, &thresholds),
    };
    print(&judgement, args, output)?;
    if let Some(path) = env::var_os(STEP_SUMMARY).filter(|path| !path.is_empty()) {
        append(path.as_ref(), &gate::markdown(&judgement))?;
    }
    Ok(judgement.verdict() == Verdict::Pass)
}

/// Makes the run the baseline, if it passes by itself. What it would have failed for against the old one is noted.
fn update(run: &Figures, path: &Path, thresholds: &Thresholds) -> Result<Judgement> {
    let mut judgement = gate::judge_alone(run, thresholds);
    if judgement.verdict() != Verdict::Pass {
        judgement.notes.push(format!("the baseline was left as it was: {}", path.display()));
        return Ok(judgement);
    }
    if let Ok(old) = gate::read_baseline(path) {
        let against = gate::judge(run, &old, thresholds);
        judgement.notes.extend(against.breaches().map(|check| format!("accepted: {}", check.line())));
        judgement.branches = against.branches;
    }
    gate::write_baseline(path, run)?;
    judgement.notes.push(format!("the baseline is this run now: {}", path.display()));
    Ok(judgement)
}

fn print(judgement: &Judgement, args: &GateArgs, output: &OutputArgs) -> Result<()> {
    match args.format {
        Some(GateFormat::Github) => terminal::result(&gate::github(judgement)),
        Some(GateFormat::Junit) => terminal::result(&gate::junit(judgement)),
        Some(GateFormat::Json) => terminal::json(judgement),
        None if output.json => terminal::json(judgement),
        Some(GateFormat::Text) | None => terminal::result(&gate::text(judgement, output.verbose)),
    }
}

/// Steps before this one may have written there too.
fn append(path: &Path, text: &str) -> Result<()> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("writing the step summary to `{}`", path.display()))
}
