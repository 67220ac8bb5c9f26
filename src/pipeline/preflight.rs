//! What is checked before any work, and what the machine has.

use std::{fs, path::Path};

use crate::{
    checkpoint::LlamaConfig,
    emit::{is_partial, planned_bytes},
    error::{Error, Result},
    plan::Plan,
    report::bytes,
};

/// Room for configs, tokenizer and checksums of one branch.
const SMALL_FILES: u64 = 16 << 20;

/// Refuses a run whose output exists or does not fit the disk.
pub(super) fn check(plan: &Plan, config: &LlamaConfig, out: &Path) -> Result<()> {
    if out.exists() && !only_partial(out) {
        return Err(Error::OutputExists { path: out.into() });
    }
    let mut needed = 0;
    for variant in &plan.variants {
        needed += planned_bytes(variant, config, plan.max_shard_size)? + SMALL_FILES;
    }
    let folder = nearest_folder(out);
    match available_space(folder) {
        Some(available) if available < needed => {
            Err(Error::DiskSpace { path: folder.into(), available: bytes(available), needed: bytes(needed) })
        }
        _ => Ok(()),
    }
}

/// Whether a folder holds nothing but what a killed run had begun.
pub(super) fn only_partial(out: &Path) -> bool {
    let Ok(mut entries) = fs::read_dir(out) else { return false };
    entries.all(|entry| entry.is_ok_and(|e| is_partial(&e.file_name().to_string_lossy())))
}

/// Removes everything in a folder.
pub(super) fn clear(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
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

/// Bytes that can still be written to the disk of `folder`; none where the system does not say.
pub fn available_space(folder: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(folder).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Whether the processor multiplies bf16 much faster than fp32.
pub fn fast_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Resident memory of this process now, bytes; none where the system does not say.
pub fn resident_memory() -> Option<u64> {
    status_field("VmRSS:")
}

/// Largest resident memory of this process so far, bytes; none where the system does not say.
pub fn peak_memory() -> Option<u64> {
    status_field("VmHWM:")
}

fn status_field(key: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with(key))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}
