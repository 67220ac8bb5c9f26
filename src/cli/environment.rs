//! Settings that libraries read from the environment before `main`.

use std::{env, os::unix::process::CommandExt, process::Command};

/// The variable that is set, unless it is set already.
///
/// OpenMP threads that wait spin for milliseconds. On a machine with other load, or beside the program's own threads, that
/// costs up to three quarters of the time.
const SETTING: (&str, &str) = ("OMP_WAIT_POLICY", "passive");

/// Starts this program again with the setting, if it is missing. Returns if it is set, or if starting again fails: the
/// program is then only slower.
pub(super) fn prepare() {
    if !cfg!(target_os = "linux") || env::var_os(SETTING.0).is_some() {
        return;
    }
    if let Ok(program) = env::current_exe() {
        let mut arguments = env::args_os();
        let mut command = Command::new(program);
        if let Some(name) = arguments.next() {
            command.arg0(name);
        }
        // Returns only when it fails.
        let _ = command.args(arguments).envs([SETTING]).exec();
    }
}
