//! The two kinds of digests by which the Hub names files.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::units::hex;

/// The digest of a file's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContentId {
    /// SHA-256 of a large file's content.
    Sha256(String),
    /// SHA-1 of a git blob: of `blob SIZE\0` and the content.
    GitBlob(String),
}

impl ContentId {
    /// The digest in hexadecimal: the name of the file's blob in the cache.
    pub fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitBlob(hex) => hex,
        }
    }

    /// Computes a digest of this kind of a content of `size` bytes.
    pub(super) fn hasher(&self, size: u64) -> Hasher {
        match self {
            Self::Sha256(_) => Hasher::Sha256(Sha256::new()),
            Self::GitBlob(_) => Hasher::GitBlob(Sha1::new_with_prefix(format!("blob {size}\0"))),
        }
    }

    /// `sha256 …` or `git blob …`.
    pub fn describe(&self) -> String {
        match self {
            Self::Sha256(hex) => format!("sha256 {hex}"),
            Self::GitBlob(hex) => format!("git blob {hex}"),
        }
    }

    /// Whether it has the form of a digest, and is thus a plain file name.
    pub fn is_well_formed(&self) -> bool {
        let (hex, length) = match self {
            Self::Sha256(hex) => (hex, 64),
            Self::GitBlob(hex) => (hex, 40),
        };
        hex.len() == length && hex.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    }
}

/// A digest that is being computed.
#[derive(Debug, Clone)]
pub(super) enum Hasher {
    /// Of a large file.
    Sha256(Sha256),
    /// Of a git blob.
    GitBlob(Sha1),
}

impl Hasher {
    /// Adds bytes of the content.
    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(sha256) => sha256.update(bytes),
            Self::GitBlob(sha1) => sha1.update(bytes),
        }
    }

    /// Adds the next `length` bytes of a file, or all that are left.
    pub(super) fn read(&mut self, file: &File, length: u64) -> io::Result<()> {
        let mut buffer = vec![0; 1 << 20];
        let mut file = file.take(length);
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(()),
                count => self.update(&buffer[..count]),
            }
        }
    }

    /// The digest.
    pub(super) fn finish(self) -> ContentId {
        match self {
            Self::Sha256(sha256) => ContentId::Sha256(hex(&sha256.finalize())),
            Self::GitBlob(sha1) => ContentId::GitBlob(hex(&sha1.finalize())),
        }
    }
}

/// The digest of a content, of the same kind as `like`.
pub fn of_bytes(bytes: &[u8], like: &ContentId) -> ContentId {
    let mut hasher = like.hasher(bytes.len() as u64);
    hasher.update(bytes);
    hasher.finish()
}

/// The size of a file, and its digest of the same kind as `like`.
pub fn of_file(path: &Path, like: &ContentId) -> io::Result<(u64, ContentId)> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut hasher = like.hasher(size);
    hasher.read(&file, size)?;
    Ok((size, hasher.finish()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_as_git_and_sha256sum_print_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, "hello\n").unwrap();
        // `git hash-object a`, `sha256sum a`
        let blob = ContentId::GitBlob("ce013625030ba8dba906f756967f9e9ca394464a".into());
        let sha256 =
            ContentId::Sha256("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03".into());
        for id in [blob, sha256] {
            assert_eq!(of_file(&path, &id).unwrap(), (6, id.clone()));
            assert_eq!(of_bytes(b"hello\n", &id), id);
            assert!(id.is_well_formed());
        }
        assert!(!ContentId::GitBlob("../x".into()).is_well_formed());
        assert!(!ContentId::Sha256("AB".repeat(32)).is_well_formed());
    }
}
