//! Digests that identify a model, whatever its folder is called and however it is sharded.

use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::Xxh3;

use super::Checkpoint;
use crate::{error::Result, units::hex};

/// Bytes of one sample of a fingerprint.
const SPAN: usize = 4096;
/// Bytes from the start of one sample to the next.
const STRIDE: usize = 4 << 20;

impl Checkpoint {
    /// A digest of all tensors: names, types, shapes and every byte. It distinguishes models; it is no protection against
    /// models that were made to have the same digest.
    ///
    /// # Errors
    /// When a tensor is malformed.
    pub fn digest(&self) -> Result<String> {
        let mut hasher = Xxh3::new();
        for name in self.names() {
            let view = self.view(name)?;
            hasher.update(format!("{name} {} {:?}\n", view.type_name(), view.shape).as_bytes());
            hasher.update(view.bytes);
            self.release([name]);
        }
        Ok(format!("xxh3:{:032x}", hasher.digest128()))
    }

    /// Hexadecimal SHA-256 of every tensor's name, dtype and shape, and of samples of its bytes: 4 KiB every 4 MiB, and the last 4 KiB. Replaced files are
    /// detected; a single changed number may not be.
    ///
    /// # Errors
    /// Never for a checkpoint that could be opened.
    pub fn fingerprint(&self) -> Result<String> {
        let mut digest = Sha256::new();
        for name in self.names() {
            let view = self.view(name)?;
            digest.update(format!("{name} {} {:?}\n", view.type_name(), view.shape));
            for start in (0..view.bytes.len()).step_by(STRIDE) {
                digest.update(&view.bytes[start..(start + SPAN).min(view.bytes.len())]);
            }
            digest.update(&view.bytes[view.bytes.len().saturating_sub(SPAN)..]);
            self.release([name]);
        }
        Ok(hex(&digest.finalize()))
    }
}
