//! All printing: results to standard output, everything else to standard error.

#![expect(clippy::print_stderr, reason = "this is where printing is done")]

use std::{
    io::{IsTerminal, Write},
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::Context;
use gptq::{
    progress::{Event, Progress},
    units::{bytes, duration},
};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::args::OutputArgs;

/// Prints an error with its chain, and its hint.
pub(super) fn error(error: &anyhow::Error) {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        // Messages of the library's errors contain those of their causes.
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    eprintln!("error: {text}");
    let hint = error.chain().find_map(|e| e.downcast_ref::<gptq::Error>()).and_then(gptq::Error::hint);
    if let Some(hint) = hint {
        eprintln!("hint: {hint}");
    }
}

/// Prints a result.
pub(super) fn result(text: &str) -> anyhow::Result<()> {
    piece(&format!("{}\n", text.trim_end()))
}

/// Prints a result as JSON.
pub(super) fn json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    result(&serde_json::to_string_pretty(value)?)
}

/// Prints a result as JSON with `--json`, else as text.
pub(super) fn answer(
    output: &OutputArgs,
    value: &impl serde::Serialize,
    text: impl FnOnce() -> String,
) -> anyhow::Result<()> {
    if output.json.is_some() { json(value) } else { result(&text()) }
}

/// Prints a piece of a result at once. A reader that closes the pipe before the end is no error.
pub(super) fn piece(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}

/// Prints a line beside the result.
pub(super) fn line(text: &str) {
    eprintln!("{text}");
}

/// Prints a remark.
pub(super) fn note(output: &OutputArgs, text: &str) {
    if !output.quiet {
        line(text);
    }
}

/// Shows progress: bars on a terminal, else one line for each layer.
pub(super) struct Terminal {
    verbose: bool,
    quiet: bool,
    bars: Option<MultiProgress>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The bar of all layers.
    overall: Option<ProgressBar>,
    /// The bar of the current phase.
    phase: Option<ProgressBar>,
    phase_name: String,
}

impl Terminal {
    pub(super) fn new(output: &OutputArgs) -> Self {
        let bars = std::io::stderr().is_terminal() && !output.quiet;
        Self {
            verbose: output.verbose,
            quiet: output.quiet,
            bars: bars.then(MultiProgress::new),
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn line(&self, text: &str) {
        match &self.bars {
            // Printing through the bars keeps the line from breaking a bar.
            Some(bars) => {
                let _ = bars.println(text);
            }
            None => eprintln!("{text}"),
        }
    }

    fn layer(&self, done: usize, total: usize, seconds: Option<f64>, memory: u64) {
        let Some(bars) = &self.bars else {
            if let Some(seconds) = seconds.filter(|_| !self.quiet) {
                let rest = match (total - done) as f64 * seconds {
                    rest if rest < 60.0 => String::new(),
                    rest => format!(", about {} more", duration(rest)),
                };
                self.line(&format!("layer {done}/{total}: {seconds:.1} s, {} in use{rest}", bytes(memory)));
            }
            return;
        };
        let mut state = self.state();
        let overall = state.overall.get_or_insert_with(|| {
            bars.insert(
                0,
                bar(total as u64, "layers {wide_bar} {pos}/{len} {elapsed} gone, {eta} left, {msg}"),
            )
        });
        overall.set_position(done as u64);
        overall.set_message(format!("{} in use", bytes(memory)));
        if done == total {
            overall.finish_and_clear();
            if !self.quiet {
                let _ = bars.println(format!("{total} layers in {:.1} s", overall.elapsed().as_secs_f64()));
            }
        }
    }
}

impl Progress for Terminal {
    fn begin(&self, phase: &str, total: u64) {
        let Some(bars) = &self.bars else { return };
        let mut state = self.state();
        if let Some(old) = state.phase.take() {
            old.finish_and_clear();
        }
        state.phase_name = phase.to_owned();
        state.phase =
            Some(bars.add(bar(total, "{msg} {wide_bar} {pos}/{len} {eta}").with_message(phase.to_owned())));
    }

    fn advance(&self, steps: u64) {
        if let Some(phase) = &self.state().phase {
            phase.inc(steps);
        }
    }

    fn event(&self, event: &Event<'_>) {
        match event {
            Event::Note(text) if !self.quiet => self.line(text),
            Event::Warning(text) => self.line(&format!("warning: {text}")),
            Event::Linear { name, variant, relative_error } if self.verbose => {
                self.line(&format!("{variant:<16} {name:<40} error {relative_error:.5}"));
            }
            Event::Stage { variant, stage } => {
                let state = self.state();
                if let Some(phase) = &state.phase {
                    phase.set_message(format!("{} · {variant} · {stage}", state.phase_name));
                }
            }
            Event::Layer { done, total, seconds, memory } => self.layer(*done, *total, *seconds, *memory),
            _ => {}
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(bars) = &self.bars {
            let _ = bars.clear();
        }
    }
}

fn bar(total: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("templates are fixed and well formed");
    ProgressBar::new(total).with_style(style.progress_chars("━╸─"))
}
