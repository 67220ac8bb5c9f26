//! Where what takes long to compute is kept between commands.

use std::{env, path::PathBuf};

use super::args::CacheArgs;

impl CacheArgs {
    /// The folder that was named, else the one that is usual on this machine; none when nothing is to be kept.
    pub(super) fn dir(&self) -> Option<PathBuf> {
        if self.no_cache {
            return None;
        }
        let usual = || {
            let named = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
            Some(named.or_else(|| Some(env::home_dir()?.join(".cache")))?.join("gptq"))
        };
        self.cache_dir.clone().or_else(usual)
    }
}
