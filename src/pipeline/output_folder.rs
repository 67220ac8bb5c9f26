//! The folder of a run's branches: complete or absent.

use std::{
    fs,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::journal;
use crate::{
    emit::is_partial,
    error::{Error, Result},
    units::hex,
};

/// The journal's folder in the output folder. By its name it counts as unfinished.
pub(super) const JOURNAL_FOLDER: &str = ".journal.partial";

/// Place of a run's branches, and of the journal that it resumes from.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The folder for the branches.
    pub out: &'a Path,
    /// A folder for journals, for example on another disk; `None` puts the journal inside `out`.
    pub journal_dir: Option<&'a Path>,
    /// Whether an interrupted run here is discarded.
    pub restart: bool,
}

impl<'a> Place<'a> {
    /// With the journal inside; an interrupted run there resumes.
    pub fn new(out: &'a Path) -> Self {
        Self { out, journal_dir: None, restart: false }
    }

    /// The folder of this run's journal.
    ///
    /// # Errors
    /// When the current folder is not known.
    pub fn journal(&self) -> Result<PathBuf> {
        let Some(dir) = self.journal_dir else { return Ok(self.out.join(JOURNAL_FOLDER)) };
        let out = std::path::absolute(self.out).map_err(Error::io("find", self.out))?;
        let name = out.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        // Two output folders may have the same name.
        let digest = Sha256::digest(out.as_os_str().as_encoded_bytes());
        let mark = hex(&digest[..4]);
        Ok(dir.join(format!("{name}-{mark}.journal")))
    }

    /// Whether a run may begin or resume here.
    pub(super) fn is_free(&self) -> bool {
        !self.out.exists() || only_partial(self.out) || journal::begun(self).is_some()
    }
}

/// Permitted use of the output folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FolderState {
    /// It is not, or not yet, this run's: its content stays as it is.
    Foreign,
    /// It was there with nothing but unfinished files; it may be a link, and stays.
    Emptied,
    /// This run made it.
    Created,
    /// Its content stays: it is complete, or a run can resume from it.
    Held,
}

/// The output folder. It is removed when this is dropped, unless it is held.
pub(super) struct OutputFolder<'a> {
    path: &'a Path,
    state: FolderState,
    /// Folders above it that were made for it, innermost first.
    parents: Vec<&'a Path>,
}

impl<'a> OutputFolder<'a> {
    /// Makes it, and the folders above it. One that was there is not touched before [`OutputFolder::empty`].
    pub(super) fn create(place: &Place<'a>) -> Result<Self> {
        let path = place.out;
        let above = path.ancestors().skip(1).take_while(|p| !p.as_os_str().is_empty() && !p.exists());
        let mut folder = Self { path, state: FolderState::Foreign, parents: above.collect() };
        for parent in folder.parents.iter().rev() {
            fs::create_dir(parent).map_err(Error::io("create", *parent))?;
        }
        match fs::create_dir(path) {
            Err(source) if source.kind() == std::io::ErrorKind::AlreadyExists => {
                if !place.is_free() {
                    return Err(Error::OutputExists { path: path.into() });
                }
            }
            created => {
                created.map_err(Error::io("create", path))?;
                folder.state = FolderState::Created;
            }
        }
        Ok(folder)
    }

    /// Removes what is in it, but for the journal: a new run begins.
    pub(super) fn empty(&mut self) -> Result<()> {
        if self.state == FolderState::Foreign {
            clear(self.path, Some(JOURNAL_FOLDER)).map_err(Error::io("clear", self.path))?;
            self.state = FolderState::Emptied;
        }
        Ok(())
    }

    /// Keeps its content when this is dropped.
    pub(super) fn hold(&mut self) {
        self.state = FolderState::Held;
    }
}

impl Drop for OutputFolder<'_> {
    fn drop(&mut self) {
        // A failure to clean up must not hide the error that led here.
        let _ = match self.state {
            FolderState::Held => return,
            FolderState::Foreign => Ok(()),
            FolderState::Emptied => clear(self.path, None),
            FolderState::Created => fs::remove_dir_all(self.path),
        };
        for parent in &self.parents {
            // Another run may have put something there meanwhile; then it stays.
            let _ = fs::remove_dir(parent);
        }
    }
}

/// Whether a folder holds nothing but the unfinished files of a killed run.
fn only_partial(out: &Path) -> bool {
    let Ok(mut entries) = fs::read_dir(out) else { return false };
    entries.all(|entry| entry.is_ok_and(|e| is_partial(&e.file_name().to_string_lossy())))
}

/// Removes everything in a folder but what is called `keep`.
fn clear(folder: &Path, keep: Option<&str>) -> std::io::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_failed_run_made_goes_and_what_was_there_stays() {
        let place = tempfile::tempdir().unwrap();
        let (above, path) = (place.path().join("a"), place.path().join("a/b/c"));
        drop(OutputFolder::create(&Place::new(&path)).unwrap());
        assert!(!above.exists());

        OutputFolder::create(&Place::new(&path)).unwrap().hold();
        fs::write(path.join("run.json"), "{}").unwrap();
        assert!(matches!(OutputFolder::create(&Place::new(&path)), Err(Error::OutputExists { .. })));
        assert!(path.join("run.json").exists());

        let other = place.path().join("a/d/e");
        let folder = OutputFolder::create(&Place::new(&other)).unwrap();
        fs::write(place.path().join("a/d/theirs"), "").unwrap();
        drop(folder);
        assert!(!other.exists() && place.path().join("a/d/theirs").exists());
    }

    #[test]
    fn leftovers_are_cleared_and_the_folder_stays() {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir(place.path().join(".main.partial")).unwrap();
        let mut folder = OutputFolder::create(&Place::new(place.path())).unwrap();
        assert!(place.path().join(".main.partial").exists());
        folder.empty().unwrap();
        assert!(!place.path().join(".main.partial").exists());
        fs::write(place.path().join("half"), "").unwrap();
        drop(folder);
        assert!(place.path().exists() && !place.path().join("half").exists());
    }
}
