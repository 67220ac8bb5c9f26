//! Models that are named by their repository on the Hub, and the environment's settings of the Hub and of caches.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Result;
use gptq::{
    Error,
    eval::folder_name,
    hub::{Hub, Reference, Settings, Snapshot, Token},
    report::{ModelReport, ModelSource, REPORT_FILE, Report},
};

use super::{
    args::{CacheArgs, OutputArgs},
    terminal::{self, Terminal},
};

/// A model's folder, local or fetched.
pub(super) struct Model {
    pub(super) folder: PathBuf,
    fetched: Option<(Reference, Snapshot)>,
}

impl Model {
    /// Its name in tables.
    pub(super) fn label(&self) -> String {
        match &self.fetched {
            Some((reference, _)) => reference.label(),
            None => folder_name(&self.folder),
        }
    }

    /// Whether its folder is in the Hub's cache, where figures must not be written.
    pub(super) fn is_fetched(&self) -> bool {
        self.fetched.is_some()
    }

    /// Adds the repository and the commit of a fetched model to a report.
    pub(super) fn sign(&self, report: &mut ModelReport) {
        if let Some((reference, snapshot)) = &self.fetched {
            report.name = reference.name().to_owned();
            report.source = Some(ModelSource {
                repository: reference.repository().to_owned(),
                commit: snapshot.commit.clone(),
                gated: snapshot.gated,
            });
        }
    }
}

/// The given folder, else the given repository, downloaded.
pub(super) fn model(given: &Path, output: &OutputArgs) -> Result<Model> {
    let local = || Model { folder: given.to_owned(), fetched: None };
    if given.exists() {
        return Ok(local());
    }
    let is_path = given.starts_with(".") || given.starts_with("..");
    let reference = given.to_str().filter(|_| !is_path).and_then(|text| text.parse::<Reference>().ok());
    let Some(reference) = reference else {
        let (what, found) = ("model".into(), given.display().to_string());
        let expected = "a folder or file that exists, or OWNER/NAME on the Hub".into();
        return Err(Error::Value { what, expected, found }.into());
    };
    if let Some(parent) = given.parent().filter(|parent| parent.is_dir()) {
        let (given, parent) = (given.display(), parent.display());
        terminal::note(
            output,
            &format!("`{given}` is not in the folder `{parent}`: looking for it on the Hub"),
        );
    }
    let terminal = Terminal::new(output);
    let snapshot = Hub::new(settings())?.fetch_model(&reference, &terminal)?;
    Ok(Model { folder: snapshot.folder.clone(), fetched: Some((reference, snapshot)) })
}

/// The branches of the run in the given folder; the model itself if it is not a run's folder.
pub(super) fn models(given: &Path, output: &OutputArgs) -> Result<Vec<Model>> {
    let report = given.join(REPORT_FILE);
    if !report.is_file() {
        return Ok(vec![model(given, output)?]);
    }
    let branches = Report::read(&report)?.branches.into_iter().map(|branch| given.join(branch.branch));
    Ok(branches.map(|folder| Model { folder, fetched: None }).collect())
}

/// The Hub's settings, from the variables that all of Hugging Face's tools read.
pub(super) fn settings() -> Settings {
    let mut settings = Settings::new(cache());
    if let Some(endpoint) = text("HF_ENDPOINT") {
        settings.endpoint = endpoint.trim_end_matches('/').to_owned();
    }
    if let Some(seconds) = text("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|text| text.parse().ok()) {
        settings.silence = Duration::from_secs(seconds);
    }
    settings.offline = is_set("HF_HUB_OFFLINE");
    settings.token = token();
    settings
}

/// The `hub` folder of the Hugging Face cache, whether it exists or not.
pub(super) fn cache() -> PathBuf {
    let named = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"].iter().find_map(env::var_os);
    named.map_or_else(|| home().join("hub"), PathBuf::from)
}

fn home() -> PathBuf {
    let below = |name: &str, folder: &str| env::var_os(name).map(|path| PathBuf::from(path).join(folder));
    below("HF_HOME", "")
        .or_else(|| below("XDG_CACHE_HOME", "huggingface"))
        .or_else(|| env::home_dir().map(|home| home.join(".cache/huggingface")))
        .unwrap_or_else(|| PathBuf::from(".cache/huggingface"))
}

impl CacheArgs {
    /// The folder for predictions: the one given, else the usual one of this machine; none with `--no-cache`.
    pub(super) fn dir(&self) -> Option<PathBuf> {
        if self.no_cache {
            return None;
        }
        self.cache_dir.clone().or_else(predictions_dir)
    }
}

/// The usual folder for predictions on this machine.
pub(super) fn predictions_dir() -> Option<PathBuf> {
    let named = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
    Some(named.or_else(|| Some(env::home_dir()?.join(".cache")))?.join("gptq"))
}

fn token() -> Option<Token> {
    if is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
        return None;
    }
    let variable = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"].iter().find_map(|name| Token::new(&text(name)?));
    variable.or_else(|| {
        let file = env::var_os("HF_TOKEN_PATH").map_or_else(|| home().join("token"), PathBuf::from);
        Token::new(&fs::read_to_string(file).ok()?)
    })
}

fn is_set(name: &str) -> bool {
    text(name).is_some_and(|value| ["1", "true", "yes", "on"].contains(&value.to_ascii_lowercase().as_str()))
}

fn text(name: &str) -> Option<String> {
    env::var(name).ok().filter(|text| !text.is_empty())
}
