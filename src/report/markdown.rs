//! A comparison as Markdown that fits a comment on a pull request.

use std::fmt::Write;

use super::{
    Comparison,
    advice::{advice, headline, rule, unserved},
    costs::{Costs, costs},
    figures::{cells, headers, interval, worst},
    provenance,
};

/// Columns of the branch table that a comment has room for; the others are folded away with the rest.
const SHOWN: [&str; 7] = ["size", "bits/weight", "mean KL", "p99 KL", "Δ to fp16", "same top-1", "readers"];

/// What a comment on GitHub may have, in characters, less some for who puts words around it.
const LONGEST: usize = 60_000;

/// The comparison as Markdown. Where that would not fit a comment, parts are left out from the end, and it says so.
pub fn markdown(comparison: &Comparison) -> String {
    let parts = [how_they_were_made, worst_linears, time_and_memory, every_provenance];
    let mut out = first_part(comparison);
    for part in parts {
        let mut text = String::new();
        part(&mut text, comparison);
        if out.chars().count() + text.chars().count() > LONGEST {
            out += "\nThe rest does not fit a comment: see the HTML report.\n";
            break;
        }
        out += &text;
    }
    out
}

/// What is not folded away.
fn first_part(comparison: &Comparison) -> String {
    let mut out = format!("### {}\n\n", text(&headline(comparison)));
    for advice in advice(comparison) {
        let line = text(&advice.line());
        let _ = writeln!(out, "- **{}:** `{}`. {line}", advice.when, code(&advice.entry.name));
    }
    if let Some(line) = unserved(comparison) {
        let _ = writeln!(out, "- {}", text(&line));
    }
    out.push('\n');
    table(&mut out, comparison, shown);
    if let Some(first) = comparison.protocols.first() {
        let _ = writeln!(
            out,
            "\nfp16: perplexity {}. ★ nothing here is both smaller and closer to fp16. {}",
            interval(first.reference_perplexity, 4, false).text,
            text(&rule(comparison))
        );
    }
    out
}

fn shown(header: &str) -> bool {
    SHOWN.contains(&header) || header.starts_with("perplexity")
}

/// The columns of the branch table whose headers are to be kept.
fn table(out: &mut String, comparison: &Comparison, keep: impl Fn(&str) -> bool) {
    let headers = headers(comparison);
    let kept: Vec<usize> = (0..headers.len()).filter(|&c| keep(&headers[c].0)).collect();
    let names: Vec<String> = kept.iter().map(|&c| text(&headers[c].0)).collect();
    let _ = writeln!(out, "| branch | {} |", names.join(" | "));
    let _ = writeln!(out, "|---|{}", "--:|".repeat(kept.len()));
    for entry in &comparison.entries {
        let cells = cells(comparison, entry);
        let row: Vec<String> = kept.iter().map(|&c| text(&cells[c].text)).collect();
        let star = if entry.pareto { " ★" } else { "" };
        let _ = writeln!(out, "| `{}`{star} | {} |", code(&entry.name), row.join(" | "));
    }
}

fn how_they_were_made(out: &mut String, comparison: &Comparison) {
    fold(out, "How they were made", |out| table(out, comparison, |name| !shown(name)));
}

fn worst_linears(out: &mut String, comparison: &Comparison) {
    let worst = worst(comparison, 10);
    if worst.is_empty() {
        return;
    }
    fold(out, "Worst linears", |out| {
        let _ = writeln!(
            out,
            "| linear | branch | relative error | outlier ratio | condition | damping | dead | why |"
        );
        let _ = writeln!(out, "|---|---|--:|--:|--:|--:|--:|---|");
        for w in &worst {
            let l = w.linear;
            let _ = writeln!(
                out,
                "| `{}` | `{}` | {:.4} | {:.0} | {:.1e} | {} | {} | {} |",
                code(&w.short_name),
                code(&w.entry.name),
                l.relative_error,
                l.outlier_ratio,
                l.condition_estimate,
                l.damp,
                l.dead_columns,
                text(&w.why)
            );
        }
    });
}

fn time_and_memory(out: &mut String, comparison: &Comparison) {
    if comparison.runs.is_empty() {
        return;
    }
    fold(out, "Time and memory", |out| {
        for Costs { name, stages, .. } in comparison.runs.iter().map(costs) {
            let _ = writeln!(out, "| {} | time | memory |\n|---|--:|--:|", text(&name));
            for (stage, seconds, memory) in stages {
                let _ = writeln!(out, "| {stage} | {} | {} |", seconds.text, memory.text);
            }
            out.push('\n');
        }
    });
}

fn every_provenance(out: &mut String, comparison: &Comparison) {
    fold(out, "Provenance", |out| {
        for (name, facts) in provenance::all(comparison) {
            let _ = writeln!(out, "**{}**\n", text(&name));
            for (key, value) in facts {
                let value = if key == "command" { format!("`{}`", code(&value)) } else { text(&value) };
                let _ = writeln!(out, "- {}: {value}", text(&key));
            }
            out.push('\n');
        }
    });
}

fn fold(out: &mut String, title: &str, content: impl FnOnce(&mut String)) {
    let _ = writeln!(out, "\n<details><summary>{title}</summary>\n");
    content(out);
    let _ = writeln!(out, "\n</details>");
}

/// Plain text: nothing of it is taken for Markdown or HTML, and it stays in its cell.
pub(crate) fn text(raw: &str) -> String {
    let mut text = String::with_capacity(raw.len());
    for c in raw.chars() {
        match c {
            '|' | '*' | '_' | '`' | '[' | ']' | '\\' | '~' | '#' => text.extend(['\\', c]),
            '<' => text.push_str("&lt;"),
            '>' => text.push_str("&gt;"),
            '&' => text.push_str("&amp;"),
            // A name after it would be told of this.
            '@' => text.push_str("@\u{200b}"),
            '\n' | '\r' => text.push(' '),
            c => text.push(c),
        }
    }
    text
}

/// Between backticks, in a cell.
fn code(raw: &str) -> String {
    raw.replace('`', "'").replace('|', "\\|").replace(['\n', '\r'], " ")
}
