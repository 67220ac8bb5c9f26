//! Which model a folder holds, whatever it is called and however it is sharded.

use xxhash_rust::xxh3::Xxh3;

use super::Checkpoint;
use crate::error::Result;

impl Checkpoint {
    /// A digest of all tensors: names, types, shapes and every byte. It tells models apart; it is no protection from
    /// somebody who makes two that have the same.
    ///
    /// # Errors
    /// When a tensor is malformed.
    pub fn digest(&self) -> Result<String> {
        let mut hasher = Xxh3::new();
        for name in self.names() {
            let view = self.view(name)?;
            hasher.update(format!("{name} {:?} {:?}\n", view.dtype, view.shape).as_bytes());
            hasher.update(view.bytes);
            self.release([name]);
        }
        Ok(format!("xxh3:{:032x}", hasher.digest128()))
    }
}
