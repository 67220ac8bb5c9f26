//! Files of a folder that was made elsewhere: a file is read only if it is in that folder, and only up to a size.
//!
//! A name inside a file (an index's shard, a checksum's file) and a symbolic link in a folder can both point anywhere on
//! this machine; the target would be read, and may end in a published branch. A link that stays in the folder is followed.
//! So are links from a snapshot of the Hugging Face cache into the `blobs` of the same repository. All others are refused;
//! a user who wants them can copy the folder with the targets of its links.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read},
    path::{Path, PathBuf},
};

use crate::error::{Error, Result};

/// Largest text file that is read, in bytes: configs, indices, tokenizers, plans.
pub const TEXT_LIMIT: u64 = 256 << 20;

/// Whether a path with `/` leads from a folder down: no `.` or `..`, no root, no empty part.
pub fn leads_down(path: &str) -> bool {
    path.split('/').all(|part| !["", ".", ".."].contains(&part))
}

/// Whether `name` names a file in a folder or below it, whatever the system's separator.
pub fn is_below(name: &str) -> bool {
    leads_down(name) && !name.contains('\\')
}

/// Whether `name` is a plain file name, without a folder.
pub fn is_file_name(name: &str) -> bool {
    is_below(name) && !name.contains('/')
}

/// The path of the file `name` in `folder`; the file may be missing.
///
/// # Errors
/// If it is a link to a target outside the folder, or is neither a file nor a folder.
pub fn file_in(folder: &Path, name: &str) -> Result<PathBuf> {
    let path = folder.join(name);
    let real = match path.canonicalize() {
        Ok(real) => real,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(path),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    let home = folder.canonicalize().map_err(Error::io("read", folder))?;
    if !is_below(name) || !(real.starts_with(&home) || is_blob_of(&home, &real)) {
        return Err(Error::OutOfFolder { path, target: real });
    }
    let kind = fs::metadata(&real).map_err(Error::io("read", &path))?.file_type();
    if !kind.is_file() && !kind.is_dir() {
        let odd = std::io::Error::new(ErrorKind::InvalidInput, "it is neither a file nor a folder");
        return Err(Error::io("read", path)(odd));
    }
    Ok(path)
}

/// Whether `file` is in the `blobs` of the cached repository of which `folder` is a snapshot, or lies below one.
fn is_blob_of(folder: &Path, file: &Path) -> bool {
    let snapshots =
        folder.ancestors().skip(1).find(|above| above.file_name().is_some_and(|n| n == "snapshots"));
    let repository = snapshots.and_then(Path::parent);
    repository.is_some_and(|repository| file.parent() == Some(&repository.join("blobs")))
}

/// Refuses the pointer that git keeps in place of a large file's content. `bytes` are the file or its beginning.
///
/// # Errors
/// If it is one.
pub fn check_not_pointer(path: &Path, bytes: &[u8]) -> Result<()> {
    match bytes.starts_with(b"version https://git-lfs.github.com/spec/") {
        true => Err(Error::LfsPointer { path: path.into() }),
        false => Ok(()),
    }
}

/// The content of a file of at most `limit` bytes.
///
/// # Errors
/// If it cannot be read, is larger, or is a pointer of git-lfs.
pub fn read(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(Error::io("read", path))?;
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > limit {
        let problem = format!("it is larger than {limit} bytes, which is as much as such a file may have");
        return Err(Error::io("read", path)(std::io::Error::new(ErrorKind::FileTooLarge, problem)));
    }
    check_not_pointer(path, &bytes)?;
    Ok(bytes)
}

/// A file without the byte order mark that some editors put in front of UTF-8.
pub fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes)
}

/// The content of a text file of at most [`TEXT_LIMIT`] bytes.
///
/// # Errors
/// If it cannot be read, is larger, or is not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    String::from_utf8(read(path, TEXT_LIMIT)?).map_err(|error| {
        let problem = format!("byte {} is not UTF-8", error.utf8_error().valid_up_to() + 1);
        Error::io("read", path)(std::io::Error::new(ErrorKind::InvalidData, problem))
    })
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn lab() -> tempfile::TempDir {
        let lab = tempfile::tempdir().unwrap();
        let at = |name: &str| lab.path().join(name);
        for folder in [
            "model/sub",
            "hub/models--a--b/blobs",
            "hub/models--a--b/snapshots/abc/data",
            "hub/models--c--d/blobs",
        ] {
            fs::create_dir_all(at(folder)).unwrap();
        }
        for file in [
            "model/a.json",
            "model/sub/b",
            "secret",
            "hub/models--a--b/blobs/123",
            "hub/models--c--d/blobs/456",
        ] {
            fs::write(at(file), "x").unwrap();
        }
        lab
    }

    #[test]
    fn names_that_leave_a_folder_are_seen() {
        for name in ["a.json", "model-00001-of-00002.safetensors", "..a", "a b"] {
            assert!(is_file_name(name), "{name}");
        }
        for name in ["", ".", "..", "../a", "/a", "a/../b", "a\\b", "./a", "a/./b", "a//b"] {
            assert!(!is_below(name), "{name}");
        }
        assert!(is_below("sub/b") && !is_file_name("sub/b"));
    }

    #[test]
    fn links_are_followed_only_inside_the_folder() {
        let lab = lab();
        let model = lab.path().join("model");
        symlink("a.json", model.join("inside")).unwrap();
        symlink("sub", model.join("folder")).unwrap();
        symlink("../secret", model.join("outside")).unwrap();
        symlink(lab.path().join("secret"), model.join("absolute")).unwrap();
        symlink("outside", model.join("twice")).unwrap();
        symlink("loop", model.join("loop")).unwrap();
        symlink("/dev/zero", model.join("device")).unwrap();
        symlink("..", model.join("above")).unwrap();
        for name in ["a.json", "inside", "sub/b", "folder/b", "missing"] {
            assert_eq!(file_in(&model, name).unwrap(), model.join(name), "{name}");
        }
        for name in ["outside", "absolute", "twice", "device", "above/secret", "../secret"] {
            let error = file_in(&model, name).unwrap_err();
            assert!(matches!(error, Error::OutOfFolder { .. }), "{name}: {error}");
            assert!(error.hint().unwrap().contains("copy the folder"), "{error}");
        }
        assert!(matches!(file_in(&model, "loop").unwrap_err(), Error::Io { .. }));
        // The folder itself may be reached by a link.
        symlink("model", lab.path().join("link")).unwrap();
        assert!(file_in(&lab.path().join("link"), "inside").is_ok());
    }

    #[test]
    fn snapshots_of_a_cache_lead_to_their_own_blobs_alone() {
        let lab = lab();
        let snapshot = lab.path().join("hub/models--a--b/snapshots/abc");
        symlink("../../blobs/123", snapshot.join("config.json")).unwrap();
        symlink("../../../blobs/123", snapshot.join("data/c.parquet")).unwrap();
        symlink("../../../models--c--d/blobs/456", snapshot.join("other")).unwrap();
        symlink("../../../../secret", snapshot.join("secret")).unwrap();
        assert!(file_in(&snapshot, "config.json").is_ok());
        assert!(file_in(&snapshot, "data/c.parquet").is_ok());
        assert!(file_in(&snapshot.join("data"), "c.parquet").is_ok());
        for name in ["other", "secret"] {
            assert!(matches!(file_in(&snapshot, name).unwrap_err(), Error::OutOfFolder { .. }), "{name}");
        }
    }

    #[test]
    fn what_is_neither_file_nor_folder_is_not_opened() {
        let lab = lab();
        let model = lab.path().join("model");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            model.join("pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let error = file_in(&model, "pipe").unwrap_err().to_string();
        assert!(error.ends_with("pipe`: it is neither a file nor a folder"), "{error}");
    }

    #[test]
    fn files_are_read_up_to_their_limit() {
        let lab = lab();
        let path = lab.path().join("secret");
        fs::write(&path, "12345").unwrap();
        assert_eq!(read(&path, 5).unwrap(), b"12345");
        let error = read(&path, 4).unwrap_err().to_string();
        assert!(
            error.ends_with("it is larger than 4 bytes, which is as much as such a file may have"),
            "{error}"
        );
        fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n").unwrap();
        assert!(matches!(read(&path, TEXT_LIMIT), Err(Error::LfsPointer { .. })));
        fs::write(&path, b"ab\xff").unwrap();
        let error = read_text(&path).unwrap_err().to_string();
        assert!(error.ends_with("byte 3 is not UTF-8"), "{error}");
    }
}
