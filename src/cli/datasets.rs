//! Where datasets are looked for.

use std::{env, path::PathBuf};

use gptq::calibration::SourceOptions;

use super::args::TextPlaces;

/// How dataset names are resolved, from the flags.
pub(super) fn options(args: &TextPlaces) -> SourceOptions {
    let mut roots = args.dataset_dir.clone();
    roots.extend(hub_cache());
    SourceOptions { text_column: args.text_column.clone(), split: args.split.clone(), roots }
}

/// The Hugging Face cache, where it would be on this machine.
fn hub_cache() -> Option<PathBuf> {
    if let Some(cache) = env::var_os("HF_HUB_CACHE") {
        return Some(cache.into());
    }
    let home = env::var_os("HF_HOME").map(PathBuf::from);
    let home = home.or_else(|| env::home_dir().map(|home| home.join(".cache/huggingface")));
    home.map(|home| home.join("hub"))
}
