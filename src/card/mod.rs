//! The card of a run: the `README.md` of its branches, from its report and a template.
//!
//! All figures of quality come from the report or from the evaluations beside the branches, with the text they were measured
//! on.

mod facts;
mod metadata;
mod prompt;
mod source;

use std::path::{Path, PathBuf};

use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value, value::Serde};

use crate::{
    chat::syntax,
    error::{Error, HubError, Result},
    hub::{DEFAULT_REVISION, Reference},
    report::{
        BranchReport, Comparison, EvaluatedModel, Evaluation, ModelEvaluations, Report, RunInput,
        choice::{Candidate, taken},
        markdown_text,
    },
    variant::Output,
};
pub use source::{SOURCE_CARD_FILE, SourceCard, keep_source_card};

/// The built-in template.
pub const TEMPLATE: &str = include_str!("card.md.jinja");

/// Name of the branch that an output of a run is published in.
///
/// A branch keeps its name. All GGUF files share one branch: `gguf`, or the default branch if the run has nothing else.
pub fn published_branch<'a>(report: &Report, output: &'a BranchReport) -> &'a str {
    match output.variant {
        Output::Gptq(_) => &output.branch,
        Output::Gguf(_) if report.branches.iter().any(|other| other.variant.gptq().is_some()) => "gguf",
        Output::Gguf(_) => DEFAULT_REVISION,
    }
}

/// The folder in which an output's card lies: the branch's own; the run's for GGUF files.
pub fn card_folder(run: &Path, output: &BranchReport) -> PathBuf {
    match output.variant {
        Output::Gptq(_) => run.join(&output.branch),
        Output::Gguf(_) => run.to_owned(),
    }
}

/// Place of the published branches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A repository on the Hub.
    Hub(Reference),
    /// The address or path of any other git repository.
    Git(String),
}

impl Address {
    /// Text of the form `OWNER/NAME` is a repository on the Hub, all other text a git address.
    pub fn new(text: &str) -> Self {
        match text.parse::<Reference>() {
            Ok(reference) if reference.repository() == text => Self::Hub(reference),
            _ => Self::Git(text.to_owned()),
        }
    }

    fn text(&self) -> &str {
        match self {
            Self::Hub(reference) => reference.repository(),
            Self::Git(text) => text,
        }
    }
}

/// Options of a card, for what the report does not hold.
#[derive(Debug, Clone, Default)]
pub struct CardOptions {
    /// Repository that the branches are published to.
    pub repository: Option<Address>,
    /// Name of who quantized, where that is not the repository's owner.
    pub quantized_by: Option<String>,
    /// The source model's repository, where the report does not hold it.
    pub base_model: Option<String>,
    /// The licence's identifier on the Hub, in place of the one on the source model's card.
    pub license: Option<String>,
    /// The model's languages, in place of those on the source model's card.
    pub languages: Vec<String>,
    /// Prompt template of the model, with `{prompt}` in it.
    pub prompt_template: Option<String>,
    /// Names of the texts whose figures are on the card. If empty, these are the run's own evaluations, else those that every
    /// branch shares, else all.
    pub datasets: Vec<String>,
    /// Another card template: its file, for messages, and its text.
    pub template: Option<(PathBuf, String)>,
}

impl CardOptions {
    /// Author of the branches.
    fn quantized_by(&self) -> Option<&str> {
        let owner = || match &self.repository {
            Some(Address::Hub(reference)) => Some(reference.owner()),
            _ => None,
        };
        self.quantized_by.as_deref().or_else(owner)
    }

    /// The metadata of the source model's card, with the licence and the languages given here.
    fn source_card(&self, mut source: SourceCard) -> SourceCard {
        if let Some(license) = &self.license {
            source.set("license", Some(license.as_str().into()));
            // They describe the licence that is replaced.
            source.set("license_name", None);
            source.set("license_link", None);
        }
        if !self.languages.is_empty() {
            source.set("language", Some(self.languages.clone().into()));
        }
        source
    }

    /// The source model's repository.
    fn base_model<'a>(&'a self, report: &'a Report) -> Option<&'a str> {
        let fetched = || report.model.source.as_ref().map(|source| source.repository.as_str());
        self.base_model.as_deref().or_else(fetched)
    }
}

/// The cards of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cards {
    /// The card of each branch, in the report's order.
    pub texts: Vec<String>,
    /// A remark on each evaluation that is not on the cards.
    pub left_out: Vec<String>,
}

/// The card of each branch of the run in `run`.
///
/// # Errors
/// - The source model's card cannot be read.
/// - Figures belong to other weights.
/// - A dataset of `options` has no evaluation.
/// - The template has an error.
pub fn cards(report: &Report, run: &Path, options: &CardOptions) -> Result<Cards> {
    let (evaluations, left_out) = evaluations(report, run, &options.datasets)?;
    let report = &Report { evaluations, ..report.clone() };
    let source = options.source_card(SourceCard::read(run)?);
    let (path, text) = match &options.template {
        Some((path, text)) => (path.clone(), text.as_str()),
        None => (PathBuf::from("card.md.jinja"), TEMPLATE),
    };
    let mut environment = Environment::new();
    environment.set_syntax(syntax());
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.add_filter("plain", |text: &str| markdown_text(text));
    let wrong = |error: &minijinja::Error| template_error(&path, error);
    let template = environment.template_from_str(text).map_err(|error| wrong(&error))?;
    let one = |at: usize| {
        let facts = facts::facts(report, run, at, &source, options)?;
        template.render(Value::from(Serde(facts))).map_err(|error| wrong(&error))
    };
    let texts = (0..report.branches.len()).map(one).collect::<Result<_>>()?;
    Ok(Cards { texts, left_out })
}

/// The evaluations for the card, from the run's report and the branches' folders, and a remark on each of the others. The first
/// one decides recommendations.
fn evaluations(report: &Report, run: &Path, datasets: &[String]) -> Result<(Vec<Evaluation>, Vec<String>)> {
    let measured = ModelEvaluations::of_branches(report, run)?;
    let input = RunInput { name: report.model.name.clone(), report: report.clone(), measured };
    let Comparison { protocols, entries, .. } = Comparison::new(vec![input], Vec::new(), None, &[])?;
    let with_models = |(at, protocol): (usize, Evaluation)| {
        let models = entries.iter().filter_map(|entry| {
            let model = entry.measured[at].clone()?;
            Some(EvaluatedModel { name: entry.name.clone(), ..model })
        });
        Evaluation { models: models.collect(), ..protocol }
    };
    let all: Vec<Evaluation> = protocols.into_iter().enumerate().map(with_models).collect();
    let candidate = |evaluation: &'_ Evaluation| {
        let own = report.evaluations.iter().any(|own| own.same_protocol(evaluation));
        (evaluation.dataset.clone(), own, evaluation.models.len() == report.branches.len())
    };
    let candidates: Vec<_> = all.iter().map(candidate).collect();
    let candidates: Vec<Candidate<'_>> = candidates
        .iter()
        .map(|(dataset, own, shared)| Candidate { dataset, own: *own, shared: *shared })
        .collect();
    let taken = taken(&candidates, datasets)?;
    let (on, off): (Vec<_>, Vec<_>) = all.into_iter().zip(taken).partition(|(_, taken)| *taken);
    let on: Vec<Evaluation> = on.into_iter().map(|(evaluation, _)| evaluation).collect();
    let remark = |(evaluation, _): &(Evaluation, bool)| {
        let (title, dataset) = (evaluation.title(), &evaluation.dataset);
        match on.iter().any(|other| other.dataset == *dataset) {
            true => format!("not on the card: {title}"),
            false => format!("not on the card: {title}; --dataset {dataset} takes it"),
        }
    };
    let left_out = off.iter().map(remark).collect();
    Ok((on, left_out))
}

fn template_error(path: &Path, error: &minijinja::Error) -> Error {
    let line = error.line().map_or_else(String::new, |line| format!("line {line}: "));
    let what = match error.kind() {
        ErrorKind::UndefinedError => "it uses an undefined value".to_owned(),
        kind => kind.to_string(),
    };
    let detail = error.detail().map_or_else(String::new, |detail| format!(" ({detail})"));
    HubError::Template { path: path.into(), problem: format!("{line}{what}{detail}") }.into()
}
