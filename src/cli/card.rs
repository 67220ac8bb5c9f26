//! `gptq card`.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use gptq::{
    card::{Address, CardOptions, Cards, card_folder, cards, published_branch},
    checkpoint::write_file_atomically,
    hub::CARD_FILE,
    report::{REPORT_FILE, Report},
};

use super::{args::OutputArgs, terminal};

/// The card of a run's branches.
#[derive(Debug, Args)]
pub(super) struct CardArgs {
    /// The folder that `gptq quantize` made
    pub(super) run: PathBuf,
    /// Later place of the branches: OWNER/NAME on the Hub, or a git address
    #[arg(long, value_name = "REPOSITORY")]
    repository: Option<String>,
    #[command(flatten)]
    texts: CardTexts,
    /// Print the card of this branch, and write nothing
    #[arg(long, value_name = "BRANCH")]
    print: Option<String>,
}

/// Contents of a card that are not in the run's report.
#[derive(Debug, Args)]
pub(super) struct CardTexts {
    /// Jinja template of the card
    #[arg(long = "card-template", value_name = "FILE")]
    template: Option<PathBuf>,
    /// Format of a prompt, with {prompt} in it [default: the model's chat template]
    #[arg(long, value_name = "TEXT")]
    prompt_template: Option<String>,
    /// The source model on the Hub, if the run read it from a folder
    #[arg(long, value_name = "OWNER/NAME")]
    base_model: Option<String>,
    /// The licence's identifier on the Hub, such as apache-2.0 [default: that of the source model's card]
    #[arg(long, value_name = "LICENSE")]
    license: Option<String>,
    /// A language of the model, such as en; repeatable [default: those of the source model's card]
    #[arg(long = "language", value_name = "LANGUAGE")]
    languages: Vec<String>,
    /// Text whose figures to show; repeatable [default: the texts of the run; without evaluations of its own, those of all its
    /// branches]
    #[arg(long = "dataset", value_name = "NAME")]
    datasets: Vec<String>,
    /// Author of the branches [default: the repository's owner]
    #[arg(long, value_name = "NAME")]
    quantized_by: Option<String>,
}

pub(super) fn run(args: &CardArgs, output: &OutputArgs) -> Result<bool> {
    let report = Report::read(&args.run.join(REPORT_FILE))?;
    let Cards { texts: made, left_out } =
        cards(&report, &args.run, &args.texts.options(args.repository.as_deref().map(Address::new))?)?;
    left_out.iter().for_each(|text| terminal::note(output, text));
    let outputs = report.branches.iter().zip(&made);
    if let Some(wanted) = &args.print {
        let found = outputs.into_iter().find(|(output, _)| published_branch(&report, output) == wanted);
        let (_, card) = found.with_context(|| format!("the run has no branch `{wanted}`"))?;
        terminal::piece(card)?;
        return Ok(true);
    }
    let mut written = Vec::new();
    for (output, card) in outputs {
        let path = card_folder(&args.run, output).join(CARD_FILE);
        // All GGUF files have one.
        if !written.contains(&path) {
            write_file_atomically(&path, card.as_bytes())?;
            written.push(path);
        }
    }
    let lines = || written.iter().map(|path| format!("{}\n", path.display())).collect();
    terminal::answer(output, &written, lines)?;
    Ok(true)
}

impl CardTexts {
    pub(super) fn options(&self, repository: Option<Address>) -> Result<CardOptions> {
        let template = match &self.template {
            Some(path) => {
                let text = fs::read_to_string(path);
                Some((path.clone(), text.map_err(gptq::Error::io("read", path))?))
            }
            None => None,
        };
        Ok(CardOptions {
            repository,
            quantized_by: self.quantized_by.clone(),
            base_model: self.base_model.clone(),
            license: self.license.clone(),
            languages: self.languages.clone(),
            prompt_template: self.prompt_template.clone(),
            datasets: self.datasets.clone(),
            template,
        })
    }
}
