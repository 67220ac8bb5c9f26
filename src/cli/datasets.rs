//! Places of datasets.

use std::path::Path;

use anyhow::Result;
use gptq::{
    Error,
    calibration::{Corpus, CorpusSource, Recipe, SourceOptions},
    chat::ChatTemplate,
    hub::{Hub, Reference},
};

use super::{
    args::{OutputArgs, TextPlaces},
    hub,
    terminal::Terminal,
};

/// Options of dataset names, from the flags.
pub(super) fn options(args: &TextPlaces) -> SourceOptions {
    let mut roots = args.dataset_dir.clone();
    roots.push(hub::cache());
    SourceOptions {
        text_column: args.text_column.clone(),
        split: args.split.clone(),
        roots,
        max_memory: None,
    }
}

/// The rows of a dataset; conversations are rendered with the chat template of the model in `model`.
pub(super) fn load(source: &CorpusSource, model: &Path) -> gptq::Result<Corpus> {
    source.load(ChatTemplate::read(model)?.as_ref())
}

/// The files of a dataset. A recipe's files that are not on this machine are fetched from the Hub.
pub(super) fn resolve(name: &str, options: &SourceOptions, output: &OutputArgs) -> Result<CorpusSource> {
    let missing = match CorpusSource::resolve(name, options) {
        Err(error @ Error::DatasetNotFound { .. }) => error,
        other => return Ok(other?),
    };
    let settings = hub::settings();
    if settings.offline {
        return Err(missing.into());
    }
    let recipe = Recipe::builtin(name).map_or_else(|| Recipe::read(Path::new(name)), Ok)?;
    let reference = Reference::new(recipe.repository(), Some(recipe.revision()))?;
    let terminal = Terminal::new(output);
    Hub::new(settings)?.fetch_dataset(&reference, &recipe.paths(), &terminal)?;
    drop(terminal);
    Ok(CorpusSource::resolve(name, options)?)
}
