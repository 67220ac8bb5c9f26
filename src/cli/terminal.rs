//! All printing: results to standard output, everything else to standard error.

#![expect(clippy::print_stderr, reason = "this is where printing is done")]

use std::{
    collections::BTreeMap,
    io::{IsTerminal, Write, stderr, stdout},
    ops::Range,
    os::fd::AsFd,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
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
    line(&format!("error: {text}"));
    let hint = error.chain().find_map(|e| e.downcast_ref::<gptq::Error>()).and_then(gptq::Error::hint);
    if let Some(hint) = hint {
        line(&format!("hint: {hint}"));
    }
}

/// Prints a result; on a terminal, in lines that fit it.
pub(super) fn result(text: &str) -> anyhow::Result<()> {
    piece(&format!("{}\n", fitted(text.trim_end(), columns(stdout()))))
}

/// Prints a result as JSON.
pub(super) fn json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    piece(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// The width of the terminal that a stream is, in characters; none where it is no terminal.
fn columns(stream: impl AsFd) -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(stream).ok()?;
    Some(usize::from(size.ws_col)).filter(|&columns| columns > 0)
}

/// Indent of the lines that a line too long is continued in.
const CONTINUED: &str = "    ";

/// The text with lines of at most so many columns where words allow it: tables are printed in parts, other lines are broken at
/// spaces.
fn fitted(text: &str, columns: Option<usize>) -> String {
    let Some(columns) = columns else { return text.to_owned() };
    let lines: Vec<&str> = text.split('\n').collect();
    let parts =
        lines.chunk_by(|one, next| is_row(one) && is_row(next)).flat_map(|block| parts(block, columns));
    parts.map(|line| fitted_line(&line, columns)).collect::<Vec<_>>().join("\n")
}

/// Space between two columns of a table, at least.
const GAP: usize = 2;

/// Whether a line may be a row of a table.
fn is_row(line: &str) -> bool {
    line.trim().contains(&" ".repeat(GAP))
}

/// The lines of a block; of a table that is too wide, in parts with the first column and as many others as fit.
fn parts(block: &[&str], columns: usize) -> Vec<String> {
    let rows: Vec<Vec<char>> = block.iter().map(|line| line.chars().collect()).collect();
    let cells = cells(&rows);
    let width = rows.iter().map(Vec::len).max().unwrap_or_default();
    // Two columns are a list with text.
    if width <= columns || rows.len() < 2 || cells.len() < 3 {
        return block.iter().map(|&line| line.to_owned()).collect();
    }
    let (first, others) = (cells[0].clone(), &cells[1..]);
    let (mut lines, mut start) = (Vec::new(), 0);
    while start < others.len() {
        let fits = |last: &usize| first.end + GAP + others[*last].end - others[start].start <= columns;
        let end = (start + 1..others.len()).take_while(fits).last().unwrap_or(start) + 1;
        for row in &rows {
            let of = |range: Range<usize>| row.iter().skip(range.start).take(range.len()).collect::<String>();
            let mut shown = of(others[start].start..others[end - 1].end);
            if end == start + 1 && !fits(&start) {
                shown = shown.trim().to_owned();
            }
            let line = format!("{:<width$}{shown}", of(0..first.end), width = first.end + GAP);
            lines.push(line.trim_end().to_owned());
        }
        start = end;
    }
    lines
}

/// The columns of a table: ranges of characters with space before and behind them in all rows.
fn cells(rows: &[Vec<char>]) -> Vec<Range<usize>> {
    let width = rows.iter().map(Vec::len).max().unwrap_or_default();
    let mut cells: Vec<Range<usize>> = Vec::new();
    for at in (0..width).filter(|&at| rows.iter().any(|row| row.get(at).is_some_and(|&c| c != ' '))) {
        match cells.last_mut() {
            Some(cell) if at < cell.end + GAP => cell.end = at + 1,
            _ => cells.push(at..at + 1),
        }
    }
    cells
}

fn fitted_line(line: &str, columns: usize) -> String {
    let (mut lines, mut rest) = (String::new(), line.to_owned());
    while rest.chars().count() > columns {
        // Spaces at the front are an indent, and no place to break.
        let indent = rest.len() - rest.trim_start().len();
        let spaces = rest.char_indices().enumerate().filter(|(_, (at, c))| *c == ' ' && *at > indent);
        let spaces: Vec<(usize, usize)> = spaces.map(|(column, (at, _))| (column, at)).collect();
        let last = spaces.iter().rev().find(|(column, _)| *column <= columns).or(spaces.first());
        let Some(&(_, at)) = last else { break };
        lines += rest[..at].trim_end();
        lines.push('\n');
        rest = format!("{CONTINUED}{}", rest[at..].trim_start());
    }
    lines + &rest
}

/// Prints a result as JSON with `--json`, else as text.
pub(super) fn answer(
    output: &OutputArgs,
    value: &impl serde::Serialize,
    text: impl FnOnce() -> String,
) -> anyhow::Result<()> {
    if output.json().is_some() { json(value) } else { result(&text()) }
}

/// Prints the results of named folders: a single one as [`answer`] does, several as a JSON object by name or as texts under
/// their names.
pub(super) fn answer_each<T: serde::Serialize>(
    output: &OutputArgs,
    all: &[(String, T)],
    text: impl Fn(&T) -> String,
) -> anyhow::Result<()> {
    if let [(_, only)] = all {
        return answer(output, only, || text(only));
    }
    let by_name: BTreeMap<&str, &T> = all.iter().map(|(name, value)| (name.as_str(), value)).collect();
    let texts = || all.iter().map(|(name, value)| format!("{name}\n{}\n", text(value))).collect();
    answer(output, &by_name, texts)
}

/// Prints a piece of a result at once. A reader that closes the pipe before the end is no error.
pub(super) fn piece(text: &str) -> anyhow::Result<()> {
    let mut out = stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}

/// Prints a line beside the result.
pub(super) fn line(text: &str) {
    eprintln!("{}", fitted(text, columns(stderr())));
}

/// Prints a warning.
pub(super) fn warning(output: &OutputArgs, text: &str) {
    note(output, &format!("warning: {text}"));
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
        let bars = stderr().is_terminal() && !output.quiet;
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
                let _ = bars.println(fitted(text, columns(stderr())));
            }
            None => line(text),
        }
    }

    fn layer(&self, done: usize, total: usize, seconds: Option<f64>, memory: u64) {
        let Some(bars) = &self.bars else {
            if let Some(seconds) = seconds.filter(|_| !self.quiet) {
                let rest = rest(total - done, seconds);
                self.line(&format!("layer {done}/{total}: {seconds:.1} s, {} in use{rest}", bytes(memory)));
            }
            return;
        };
        let mut state = self.state();
        let overall = state.overall.get_or_insert_with(|| {
            let template = "layers {wide_bar} {pos}/{len} {elapsed} gone{msg}";
            let overall = bars.insert(0, bar(total as u64, template));
            // The elapsed time advances while no layer is finished, too.
            overall.enable_steady_tick(Duration::from_secs(1));
            overall
        });
        overall.set_position(done as u64);
        // Before this program has finished a layer, nothing says how long the others will take.
        let rest = seconds.map_or_else(String::new, |seconds| rest(total - done, seconds));
        overall.set_message(format!("{rest}, {} in use", bytes(memory)));
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
            Event::Warning(text) if !self.quiet => self.line(&format!("warning: {text}")),
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

/// The time that so many `layers` will take if each takes `seconds`, for the end of a line; empty below a minute.
fn rest(layers: usize, seconds: f64) -> String {
    match layers as f64 * seconds {
        rest if rest < 60.0 => String::new(),
        rest => format!(", about {} more", duration(rest)),
    }
}

fn bar(total: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("templates are fixed and well formed");
    ProgressBar::new(total).with_style(style.progress_chars("━╸─"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_fit_the_terminal_and_words_stay_whole() {
        let text = "vLLM      no: refuses act order\nExLlamaV2 yes\n  - a longword";
        assert_eq!(fitted(text, None), text);
        assert_eq!(fitted(text, Some(80)), text);
        let narrow = "vLLM      no: refuses\n    act order\nExLlamaV2 yes\n  - a longword";
        assert_eq!(fitted(text, Some(21)), narrow);
        // A word that is longer than a line has a line of its own.
        assert_eq!(
            fitted("see https://example.org/page now", Some(10)),
            "see\n    https://example.org/page\n    now"
        );
        assert_eq!(fitted("±±± ±±±", Some(7)), "±±± ±±±");
    }

    #[test]
    fn a_table_wider_than_the_terminal_is_printed_in_parts() {
        let table = "a text of the table\n\
                     branch   bits  mean error  not loaded by\n\
                     main        4     0.01 ±0           vLLM\n\
                     gptq-32     4\n\
                     a text behind it";
        assert_eq!(fitted(table, None), table);
        assert_eq!(fitted(table, Some(40)), table);
        let narrow = "a text of the table\n\
                      branch   bits  mean error\n\
                      main        4     0.01 ±0\n\
                      gptq-32     4\n\
                      branch   not loaded by\n\
                      main              vLLM\n\
                      gptq-32\n\
                      a text behind it";
        assert_eq!(fitted(table, Some(25)), narrow);
        assert_eq!(fitted(table, Some(39)), narrow);
        // Columns that are alone too wide are broken at words.
        assert_eq!(fitted("a  b b b  c\nd  e e e  f", Some(7)), "a  b b\n    b\nd  e e\n    e\na  c\nd  f");
    }

    #[test]
    fn the_rest_is_said_from_a_minute_on() {
        assert_eq!((rest(4, 0.5).as_str(), rest(30, 10.0).as_str()), ("", ", about 5 min more"));
    }
}
