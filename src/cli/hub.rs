//! Models and datasets that are named by their repository on the Hub, and what the environment says about it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Result;
use gptq::{
    eval::folder_name,
    hub::{Hub, Reference, Settings, Snapshot, Token},
    report::{ModelReport, ModelSource},
};

use super::{args::OutputArgs, terminal::Terminal};

/// A model's folder, wherever it came from.
pub(super) struct Model {
    pub(super) folder: PathBuf,
    fetched: Option<(Reference, Snapshot)>,
}

impl Model {
    /// What to call it in tables.
    pub(super) fn label(&self) -> String {
        if let Some((reference, _)) = &self.fetched {
            return reference.label();
        }
        folder_name(&self.folder)
    }

    /// Whether its folder is the Hub's cache, where nothing else belongs.
    pub(super) fn is_fetched(&self) -> bool {
        self.fetched.is_some()
    }

    /// Adds to a report where the model comes from.
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

/// The folder that was named, or else the repository, fetched.
pub(super) fn model(given: &Path, output: &OutputArgs) -> Result<Model> {
    let local = || Model { folder: given.to_owned(), fetched: None };
    if given.exists() || given.starts_with(".") || given.starts_with("..") {
        return Ok(local());
    }
    // What cannot be a repository is a folder that is missing, and its error says so.
    let Some(reference) = given.to_str().and_then(|text| text.parse::<Reference>().ok()) else {
        return Ok(local());
    };
    let terminal = Terminal::new(output);
    let snapshot = Hub::new(settings())?.fetch_model(&reference, &terminal)?;
    Ok(Model { folder: snapshot.folder.clone(), fetched: Some((reference, snapshot)) })
}

/// How the Hub is reached, from the variables that all of Hugging Face's tools read.
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

/// The `hub` folder of the Hugging Face cache, where it would be on this machine.
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
