//! Whether the disks have room for a run, and what a run that was killed left on them.

use std::{fs, path::Path};

use super::{journal, output_folder::Place};
use crate::{
    architectures::ModelConfig,
    checkpoint::Checkpoint,
    emit::{is_partial, planned_bytes},
    error::Result,
    machine::require_space,
    plan::Plan,
};

/// Bytes of disk that a run takes beyond what it has taken already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DiskNeed {
    /// The branches.
    pub(super) branches: u64,
    /// Hidden states to go on from, and activations that do not fit memory, until the run is complete.
    pub(super) journal: u64,
}

impl DiskNeed {
    /// `config` is that of the branches; `states` are the bytes of all hidden states, `spilled` those of activations that do not fit
    /// memory, and of whatever else lies beside the journal.
    ///
    /// # Errors
    /// When a variant does not fit the model.
    pub(super) fn new(
        plan: &Plan,
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        place: &Place<'_>,
        states: u64,
        spilled: u64,
    ) -> Result<Self> {
        let begun = if place.restart { None } else { journal::begun(place) };
        let mut branches = 0;
        // The weights of branches that were begun have their room.
        for variant in plan.variants.iter().filter(|_| begun.is_none()) {
            branches += planned_bytes(variant, config, checkpoint, plan.max_shard_size)?;
        }
        // One set of states beside the one that is being written; behind the last layer there are none.
        let sets = match (checkpoint.config().num_layers(), begun) {
            (1, _) => 0,
            (2, None) | (_, Some(_)) => 1,
            (_, None) => 2,
        };
        Ok(Self { branches, journal: states.saturating_mul(sets).saturating_add(spilled) })
    }

    /// Refuses what the disks have no room for.
    ///
    /// # Errors
    /// When there is too little.
    pub(super) fn check(&self, place: &Place<'_>) -> Result<()> {
        let out = nearest_folder(place.out);
        let needs = match place.journal_dir.map(nearest_folder) {
            Some(dir) if !same_disk(dir, out) => vec![(out, self.branches), (dir, self.journal)],
            _ => vec![(out, self.branches.saturating_add(self.journal))],
        };
        needs.into_iter().try_for_each(|(folder, needed)| require_space(folder, needed))
    }
}

/// Whether two folders are on one file system, as far as can be told.
fn same_disk(left: &Path, right: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (fs::metadata(left), fs::metadata(right)) {
        (Ok(left), Ok(right)) => left.dev() == right.dev(),
        _ => true,
    }
}

/// Whether a folder holds nothing but what a killed run had begun.
pub(super) fn only_partial(out: &Path) -> bool {
    let Ok(mut entries) = fs::read_dir(out) else { return false };
    entries.all(|entry| entry.is_ok_and(|e| is_partial(&e.file_name().to_string_lossy())))
}

/// Removes everything in a folder but what is called `keep`.
pub(super) fn clear(folder: &Path, keep: Option<&str>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if keep.is_some_and(|name| entry.file_name() == name) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// The deepest existing folder on the way to `path`.
fn nearest_folder(path: &Path) -> &Path {
    let existing = path.ancestors().find(|a| a.is_dir());
    existing.unwrap_or(Path::new("."))
}
