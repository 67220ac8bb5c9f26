//! Settings that libraries below read before `main`, and only from the environment.

use std::{env, os::unix::process::CommandExt, process::Command};

/// What is set, unless something is set already.
///
/// OpenMP threads that wait spin for milliseconds; on a machine that others use too, or while our own threads work,
/// that costs up to three quarters of the time. glibc gives every freed matrix back to the system, whose pages must
/// then be cleared again: a fifth of the time.
const SETTINGS: [(&str, &str); 3] =
    [("OMP_WAIT_POLICY", "passive"), ("MALLOC_MMAP_MAX_", "0"), ("MALLOC_TRIM_THRESHOLD_", "1000000000000")];

/// Starts this program again with the settings, if they are not there. Returns when they are, or when starting again
/// fails: the program is then only slower.
pub(super) fn prepare() {
    if !cfg!(target_os = "linux") || SETTINGS.iter().any(|(name, _)| env::var_os(name).is_some()) {
        return;
    }
    if let Ok(program) = env::current_exe() {
        let mut arguments = env::args_os();
        let mut command = Command::new(program);
        if let Some(name) = arguments.next() {
            command.arg0(name);
        }
        // Returns only when it fails.
        let _ = command.args(arguments).envs(SETTINGS).exec();
    }
}
