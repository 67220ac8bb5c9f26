//! A comparison as Markdown, for a comment on a pull request.

use std::fmt::Write;

use super::{
    Comparison,
    advice::{STAR, advice, also_measured, headline, rule, unmeasured, unserved},
    figures::{Column, columns, costs, errors_of_linears, worst},
    provenance,
};

/// Columns of the first table; the others are folded away.
const SHOWN: [&str; 7] = ["size", "bits/weight", "mean KL", "p99 KL", "Δ to fp16", "same top-1", "readers"];

/// Characters that a comment on GitHub may have, minus some for text around it.
const LONGEST: usize = 60_000;

/// The comparison as Markdown. Parts at the end that do not fit a comment are left out, with a message.
pub fn markdown(comparison: &Comparison) -> String {
    let is_shown = |c: &Column| SHOWN.contains(&c.name.as_str()) || c.name.starts_with("perplexity");
    let (shown, folded): (Vec<_>, Vec<_>) = columns(comparison).into_iter().partition(is_shown);
    let parts = [
        ("How they were made", table(comparison, &folded)),
        ("Worst linears", worst_linears(comparison)),
        ("Time and memory", time_and_memory(comparison)),
        ("Provenance", every_provenance(comparison)),
    ];
    let mut out = first_part(comparison, &shown);
    for (title, content) in parts.into_iter().filter(|(_, content)| !content.is_empty()) {
        let part = format!("\n<details><summary>{title}</summary>\n\n{content}\n</details>\n");
        if out.chars().count() + part.chars().count() > LONGEST {
            out += "\nThe rest does not fit a comment: see the HTML report.\n";
            break;
        }
        out += &part;
    }
    out
}

/// The recommendation and the columns that decide it, which are not folded away.
fn first_part(comparison: &Comparison, shown: &[Column]) -> String {
    let mut out = format!("### {}\n\n", text(&headline(comparison)));
    for advice in advice(comparison) {
        let line = text(&advice.line());
        let _ = writeln!(out, "- **{}:** `{}`. {line}", advice.when, code(&advice.entry.name));
    }
    if let Some(line) = unserved(comparison) {
        let _ = writeln!(out, "- {}", text(&line));
    }
    if let Some(first) = comparison.protocols.first() {
        let (title, perplexity) = (text(&first.title()), first.reference_perplexity);
        let _ = writeln!(out, "\nOn {title}; fp16 has perplexity {perplexity:.4}. {STAR}");
    }
    let _ = write!(out, "\n{}\n", table(comparison, shown));
    let remarks = [Some(rule(comparison)), unmeasured(comparison), also_measured(comparison)];
    let remarks: Vec<String> = remarks.into_iter().flatten().map(|remark| text(&remark)).collect();
    let _ = writeln!(out, "{}", remarks.join(" "));
    out
}

/// A table of branches with these columns.
fn table(comparison: &Comparison, columns: &[Column]) -> String {
    let names: Vec<String> = columns.iter().map(|c| text(&c.name)).collect();
    let mut out = format!("| branch | {} |\n|---|{}\n", names.join(" | "), "--:|".repeat(columns.len()));
    for (i, entry) in comparison.entries.iter().enumerate() {
        let row: Vec<String> = columns.iter().map(|c| text(&c.cells[i].text)).collect();
        let star = if entry.pareto { " ★" } else { "" };
        let _ = writeln!(out, "| `{}`{star} | {} |", code(&entry.name), row.join(" | "));
    }
    out
}

fn worst_linears(comparison: &Comparison) -> String {
    let worst = worst(comparison, 10);
    if worst.is_empty() {
        return String::new();
    }
    let mut out = "| linear | branch | relative error | outlier ratio | condition | damping | dead | why |\n\
                   |---|---|--:|--:|--:|--:|--:|---|\n"
        .to_owned();
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
    if let Some(remark) = errors_of_linears(comparison.runs.iter().map(|run| &run.report)) {
        let _ = writeln!(out, "\n{}", text(remark));
    }
    out
}

fn time_and_memory(comparison: &Comparison) -> String {
    let mut out = String::new();
    for costs in comparison.runs.iter().map(costs) {
        let _ = writeln!(out, "| {} | time | memory |\n|---|--:|--:|", text(&costs.name));
        for (phase, seconds, memory) in costs.phases {
            let _ = writeln!(out, "| {phase} | {} | {} |", seconds.text, memory.text);
        }
        out.push('\n');
    }
    out
}

fn every_provenance(comparison: &Comparison) -> String {
    let mut out = String::new();
    for (name, facts) in provenance::all(comparison) {
        let _ = writeln!(out, "**{}**\n", text(&name));
        for (key, value) in facts {
            let value = if key == "command" { format!("`{}`", code(&value)) } else { text(&value) };
            let _ = writeln!(out, "- {key}: {value}");
        }
        out.push('\n');
    }
    out
}

/// Escapes plain text for a cell, so that it has no Markdown or HTML.
pub(crate) fn text(raw: &str) -> String {
    let mut text = String::with_capacity(raw.len());
    for c in raw.chars() {
        match c {
            '|' | '*' | '_' | '`' | '[' | ']' | '\\' | '~' | '#' => text.extend(['\\', c]),
            '<' => text.push_str("&lt;"),
            '>' => text.push_str("&gt;"),
            '&' => text.push_str("&amp;"),
            // GitHub would notify a name behind it.
            '@' => text.push_str("@\u{200b}"),
            '\n' | '\r' => text.push(' '),
            c => text.push(c),
        }
    }
    text
}

/// Escapes text between backticks in a cell.
fn code(raw: &str) -> String {
    raw.replace('`', "'").replace('|', "\\|").replace(['\n', '\r'], " ")
}
