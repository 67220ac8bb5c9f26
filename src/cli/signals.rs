//! Ctrl-C and `kill`: the first stops a run where it can be resumed, the second stops it at once.

use std::{
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::{Context, Result};
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
    iterator::Signals,
};

use super::{args::OutputArgs, terminal};

/// The signal that came last; 0 before the first.
static RECEIVED: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);

/// The exit code of a command that stopped because of a signal, as shells count it: 130 for Ctrl-C, 143 for `kill`.
pub(super) fn exit_code() -> u8 {
    128 + RECEIVED.load(Ordering::Relaxed) as u8
}

/// A flag that the first signal sets.
pub(super) fn stop_flag(output: &OutputArgs) -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let quiet = output.quiet;
    let register = || {
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds the flag unset.
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&stop))?;
            flag::register_usize(signal, Arc::clone(&RECEIVED), signal as usize)?;
            flag::register(signal, Arc::clone(&stop))?;
        }
        Signals::new([SIGINT, SIGTERM])
    };
    let mut signals = register().context("cannot listen to signals")?;
    thread::spawn(move || {
        if signals.forever().next().is_some() && !quiet {
            terminal::line("stopping; once more to stop at once");
        }
    });
    Ok(stop)
}
