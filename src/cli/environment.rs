//! Settings that libraries read from the environment before `main`.

use std::{env, os::unix::process::CommandExt, process::Command};

/// Variables that are set, unless they are set already.
///
/// - OpenMP threads that wait spin for milliseconds. On a machine with other load, or beside the program's own threads, that
///   costs up to three quarters of the time.
/// - libtorch and glibc take large buffers from the system and return them at once: page faults and cleared pages take 15% of a
///   run's processor time. With huge pages of 2 MB there are 512 times fewer faults, and buffers of up to 256 MB are used again.
const SETTINGS: [(&str, &str); 3] = [
    ("OMP_WAIT_POLICY", "passive"),
    ("THP_MEM_ALLOC_ENABLE", "1"),
    (
        "GLIBC_TUNABLES",
        "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=268435456:glibc.malloc.trim_threshold=536870912",
    ),
];

/// Starts this program again with the settings, if one is missing. Returns if all are set, or if starting again fails: the
/// program is then only slower.
pub(super) fn prepare() {
    let missing: Vec<_> = SETTINGS.into_iter().filter(|(name, _)| env::var_os(name).is_none()).collect();
    if !cfg!(target_os = "linux") || missing.is_empty() {
        return;
    }
    if let Ok(program) = env::current_exe() {
        let mut arguments = env::args_os();
        let mut command = Command::new(program);
        if let Some(name) = arguments.next() {
            command.arg0(name);
        }
        // Returns only when it fails.
        let _ = command.args(arguments).envs(missing).exec();
    }
}
