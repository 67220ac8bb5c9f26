//! `gptq publish`.

use std::{collections::BTreeSet, fmt::Write, path::PathBuf, str::FromStr};

use anyhow::{Result, bail};
use clap::Args;
use gptq::{
    card::{Address, Cards, SourceCard, cards, published_branch},
    hub::{CARD_FILE, DEFAULT_REVISION, Hub, Reference},
    progress::{Event, Progress},
    publish::{self, Outcome, PublishOptions},
    report::{REPORT_FILE, Report},
    units::bytes,
    verify,
};

use super::{
    args::OutputArgs,
    card::CardTexts,
    hub,
    terminal::{self, Terminal},
};

/// Publishing.
#[derive(Debug, Args)]
pub(super) struct PublishArgs {
    /// The folder that `gptq quantize` made
    run: PathBuf,
    /// hub:OWNER/NAME, or git: with the address or path of a repository
    #[arg(long, value_name = "PLACE")]
    to: Place,
    /// Publish only this branch; repeatable [default: all]
    #[arg(long = "branch", value_name = "BRANCH")]
    branches: Vec<String>,
    /// Make a new repository on the Hub private
    #[arg(long)]
    private: bool,
    /// List the files to send, and send nothing
    #[arg(long)]
    dry_run: bool,
    /// On a git remote: replace the branches, and discard their history there
    #[arg(long)]
    force: bool,
    /// Name of the gated source model's licence, which you accept; repeatable
    #[arg(long, value_name = "LICENCE")]
    accept_license: Vec<String>,
    #[command(flatten)]
    texts: CardTexts,
}

/// Place to publish to.
#[derive(Debug, Clone)]
enum Place {
    Hub(Reference),
    Git(String),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("hub", name)) => {
                let reference = Reference::new(name, None);
                Ok(Self::Hub(reference.map_err(|error| error.to_string())?))
            }
            Some(("git", place)) if !place.is_empty() => Ok(Self::Git(place.to_owned())),
            _ => Err("expected hub:OWNER/NAME, git:ADDRESS or git:PATH".into()),
        }
    }
}

pub(super) fn run(args: &PublishArgs, output: &OutputArgs) -> Result<bool> {
    match &args.to {
        Place::Hub(_) if args.force => bail!("--force is for git remotes; on the Hub history is always kept"),
        Place::Git(_) if args.private => bail!("--private is for the Hub; a git remote is made beforehand"),
        _ => {}
    }
    let report = Report::read(&args.run.join(REPORT_FILE))?;
    publish::check_licence(&report, &SourceCard::read(&args.run)?, &args.accept_license)?;
    let settings = hub::settings();
    let repository = match &args.to {
        Place::Hub(reference) => Address::Hub(reference.clone()),
        // A repository on the Hub may be given by its git address.
        Place::Git(place) => match place.strip_prefix(&format!("{}/", settings.endpoint)).map(Address::new) {
            Some(on_hub @ Address::Hub(_)) => on_hub,
            _ => Address::Git(place.clone()),
        },
    };
    let Cards { texts: made, left_out } = cards(&report, &args.run, &args.texts.options(Some(repository))?)?;
    left_out.iter().for_each(|text| terminal::note(output, text));
    let branches = publish::branches(&report, &args.run, &args.branches, &made)?;
    let terminal = Terminal::new(output);
    for branch in &branches {
        // A damaged branch is not published.
        branch.checkpoints.iter().try_for_each(|path| verify::written(path))?;
        if branch.folder.join(CARD_FILE).exists() {
            terminal::note(
                output,
                &format!("branch {}: its card is the {CARD_FILE} in its folder", branch.name),
            );
        }
    }
    let names: BTreeSet<&str> =
        report.branches.iter().map(|output| published_branch(&report, output)).collect();
    if !names.contains(DEFAULT_REVISION) {
        let names: Vec<&str> = names.into_iter().collect();
        terminal.event(&Event::Warning(&format!(
            "the run has no branch `{DEFAULT_REVISION}`, which readers load by default: they must name one of {}; \
             gptq quantize --main VARIANT makes one",
            names.join(", ")
        )));
    }
    let options = PublishOptions { private: args.private, force: args.force, dry_run: args.dry_run };
    let outcomes = match &args.to {
        Place::Hub(reference) => {
            publish::to_hub(&Hub::new(settings)?, reference, &branches, &options, &terminal)?
        }
        Place::Git(remote) => publish::to_git(remote, &args.run, &branches, &options, &settings, &terminal)?,
    };
    drop(terminal);
    terminal::answer(output, &outcomes, || table(&outcomes, args.dry_run))?;
    Ok(true)
}

fn table(outcomes: &[Outcome], dry_run: bool) -> String {
    let mut text = String::new();
    for outcome in outcomes {
        let commit = outcome.commit.as_deref().map_or("new", |commit| &commit[..commit.len().min(12)]);
        let what = match (outcome.sent.len(), outcome.deleted.len()) {
            (0, 0) => "nothing to send".to_owned(),
            (sent, deleted) => {
                let verb = if dry_run { "would send" } else { "sent" };
                let deleted = if deleted == 0 { String::new() } else { format!(", {deleted} deleted") };
                format!("{verb} {sent} files, {}{deleted}", bytes(outcome.bytes))
            }
        };
        let _ = writeln!(text, "{:<36} {commit:<12} {what}, {} unchanged", outcome.branch, outcome.unchanged);
        if dry_run {
            outcome.sent.iter().for_each(|file| _ = writeln!(text, "    + {file}"));
            outcome.deleted.iter().for_each(|file| _ = writeln!(text, "    - {file}"));
        }
    }
    text
}
