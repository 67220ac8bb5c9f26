//! `gptq gate`.

use std::{
    env,
    fs::OpenOptions,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use gptq::gate::{self, EvaluationFigures, Figures, Judgement, Thresholds, Verdict};

use super::{args::OutputArgs, terminal};

/// The variable in which GitHub Actions names a file of Markdown for the job's page.
const STEP_SUMMARY: &str = "GITHUB_STEP_SUMMARY";

#[derive(Debug, Args)]
#[command(after_help = "Example:  gptq gate Llama-2-7B-GPTQ --baseline baseline.json")]
pub(super) struct GateArgs {
    /// The folder of a run, or its run.json
    pub(super) run: PathBuf,
    /// File with the figures of a good run; --update writes it
    #[arg(long, value_name = "FILE")]
    pub(super) baseline: PathBuf,
    /// TOML file with limits; docs/ci.md lists the keys and their defaults
    #[arg(long, value_name = "FILE")]
    pub(super) thresholds: Option<PathBuf>,
    /// Text whose figures to check; repeatable [default: the texts of the run and of the baseline. A run without evaluations of
    /// its own: those of all its branches]
    #[arg(long = "dataset", value_name = "NAME")]
    pub(super) datasets: Vec<String>,
    /// Write this run's figures as the baseline, if it passes the checks that need no baseline
    #[arg(long)]
    pub(super) update: bool,
    /// Format of the result. github: annotations of GitHub Actions. junit: XML for most CI servers. json, or --json: every check
    /// [default: text]
    #[arg(long, value_name = "FORMAT", conflicts_with = "json")]
    pub(super) format: Option<GateFormat>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum GateFormat {
    Text,
    Github,
    Junit,
    Json,
}

pub(super) fn run(args: &GateArgs, output: &OutputArgs) -> Result<bool> {
    let thresholds = match &args.thresholds {
        Some(path) => Thresholds::read(path)?,
        None => Thresholds::default(),
    };
    let mut figures = Figures::read(&args.run)?;
    let judgement = match args.update {
        true => update(&mut figures, args, &thresholds)?,
        false => {
            let mut baseline = gate::read_baseline(&args.baseline)?;
            let others = figures.choose(&args.datasets, Some(&baseline))?;
            // A baseline without any of the texts is left as it is, so that the judgement says which it has.
            let is_named = |evaluation: &EvaluationFigures| args.datasets.contains(&evaluation.dataset);
            if baseline.evaluations.iter().any(is_named) {
                baseline.evaluations.retain(is_named);
            }
            let mut judgement = gate::judge(&figures, &baseline, &thresholds);
            judgement.notes.extend(others);
            judgement
        }
    };
    print(&judgement, args, output)?;
    if let Some(path) = env::var_os(STEP_SUMMARY).filter(|path| !path.is_empty()) {
        append(path.as_ref(), &gate::markdown(&judgement))?;
    }
    Ok(judgement.verdict() == Verdict::Pass)
}

/// Makes the run the baseline, if it passes by itself. Breaches against the old baseline become notes.
fn update(run: &mut Figures, args: &GateArgs, thresholds: &Thresholds) -> Result<Judgement> {
    let path = &args.baseline;
    let old = path.exists().then(|| gate::read_baseline(path));
    let others = run.choose(&args.datasets, old.as_ref().and_then(|old| old.as_ref().ok()))?;
    let mut judgement = gate::judge_alone(run, thresholds);
    judgement.notes.extend(others);
    if judgement.verdict() != Verdict::Pass {
        let what = if path.exists() { "the baseline was left as it was" } else { "no baseline was written" };
        judgement.notes.push(format!("{what}: {}", path.display()));
        return Ok(judgement);
    }
    match old {
        Some(Ok(old)) => {
            let against = gate::judge(run, &old, thresholds);
            judgement.notes.extend(against.breaches().map(|check| format!("accepted: {}", check.line())));
            judgement.branches = against.branches;
        }
        Some(Err(error)) => judgement.notes.push(format!("the old baseline cannot be used: {error}")),
        None => {}
    }
    gate::write_baseline(path, run)?;
    judgement.notes.push(format!("the baseline is this run now: {}", path.display()));
    Ok(judgement)
}

fn print(judgement: &Judgement, args: &GateArgs, output: &OutputArgs) -> Result<()> {
    match args.format {
        Some(GateFormat::Github) => terminal::result(&gate::github(judgement)),
        Some(GateFormat::Junit) => terminal::result(&gate::junit(judgement)),
        Some(GateFormat::Json) => terminal::json(&judgement.to_json()),
        None if output.json().is_some() => terminal::json(&judgement.to_json()),
        Some(GateFormat::Text) | None => terminal::result(&gate::text(judgement, output.verbose)),
    }
}

/// Appends, because earlier steps may have written to the file.
fn append(path: &Path, text: &str) -> Result<()> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("writing the step summary to `{}`", path.display()))
}
