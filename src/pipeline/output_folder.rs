//! The folder of a run's branches: complete or absent.

use std::{fs, path::Path};

use super::preflight;
use crate::error::{Error, Result};

/// Whose the output folder is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FolderState {
    /// Not this run's: nothing in it may be touched.
    Foreign,
    /// It was there, holding nothing but leftovers; it may be a link, and stays.
    Emptied,
    /// This run made it.
    Created,
    /// It is complete.
    Kept,
}

/// The output folder, removed again unless kept.
pub(super) struct OutputFolder<'a> {
    path: &'a Path,
    state: FolderState,
    /// Folders above it that were made for it, innermost first.
    parents: Vec<&'a Path>,
}

impl<'a> OutputFolder<'a> {
    /// Makes it, and the folders above it.
    pub(super) fn create(path: &'a Path) -> Result<Self> {
        let above = path.ancestors().skip(1).take_while(|p| !p.as_os_str().is_empty() && !p.exists());
        let mut folder = Self { path, state: FolderState::Foreign, parents: above.collect() };
        for parent in folder.parents.iter().rev() {
            fs::create_dir(parent).map_err(Error::io("create", *parent))?;
        }
        match fs::create_dir(path) {
            Err(source) if source.kind() == std::io::ErrorKind::AlreadyExists => {
                if !preflight::only_partial(path) {
                    return Err(Error::OutputExists { path: path.into() });
                }
                preflight::clear(path).map_err(Error::io("clear", path))?;
                folder.state = FolderState::Emptied;
            }
            created => {
                created.map_err(Error::io("create", path))?;
                folder.state = FolderState::Created;
            }
        }
        Ok(folder)
    }

    /// Ends the run's claim: it is complete.
    pub(super) fn keep(mut self) {
        self.state = FolderState::Kept;
    }
}

impl Drop for OutputFolder<'_> {
    fn drop(&mut self) {
        // A failure to clean up must not hide the error that led here.
        let _ = match self.state {
            FolderState::Kept => return,
            FolderState::Foreign => Ok(()),
            FolderState::Emptied => preflight::clear(self.path),
            FolderState::Created => fs::remove_dir_all(self.path),
        };
        for parent in &self.parents {
            // Another run may have put something there meanwhile; then it stays.
            let _ = fs::remove_dir(parent);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_failed_run_made_goes_and_what_was_there_stays() {
        let place = tempfile::tempdir().unwrap();
        let (above, path) = (place.path().join("a"), place.path().join("a/b/c"));
        drop(OutputFolder::create(&path).unwrap());
        assert!(!above.exists());

        OutputFolder::create(&path).unwrap().keep();
        fs::write(path.join("run.json"), "{}").unwrap();
        assert!(matches!(OutputFolder::create(&path), Err(Error::OutputExists { .. })));
        assert!(path.join("run.json").exists());

        let other = place.path().join("a/d/e");
        let folder = OutputFolder::create(&other).unwrap();
        fs::write(place.path().join("a/d/theirs"), "").unwrap();
        drop(folder);
        assert!(!other.exists() && place.path().join("a/d/theirs").exists());
    }

    #[test]
    fn leftovers_are_cleared_and_the_folder_stays() {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir(place.path().join(".main.partial")).unwrap();
        let folder = OutputFolder::create(place.path()).unwrap();
        assert!(!place.path().join(".main.partial").exists());
        fs::write(place.path().join("half"), "").unwrap();
        drop(folder);
        assert!(place.path().exists() && !place.path().join("half").exists());
    }
}
