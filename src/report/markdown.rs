//! A comparison as Markdown that fits a comment on a pull request.

use std::fmt::Write;

use super::{
    Comparison,
    advice::{advice, headline, rule},
    figures::{cells, headers, interval, worst},
    provenance,
};

/// Columns of the branch table that a comment has room for; the others are folded away with the rest.
const SHOWN: [&str; 7] = ["size", "bits/weight", "mean KL", "p99 KL", "Δ to fp16", "same top-1", "readers"];

/// The comparison as Markdown.
pub fn markdown(comparison: &Comparison) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "### {}\n", text(&headline(comparison)));
    for advice in advice(comparison) {
        let _ =
            writeln!(out, "- **{}:** `{}`, {}", advice.when, code(&advice.entry.name), text(&advice.because));
    }
    let _ = writeln!(out);
    let headers: Vec<String> = headers(comparison).into_iter().map(|(name, _)| name).collect();
    let shown = |name: &str| SHOWN.contains(&name) || name.starts_with("perplexity");
    let table = |out: &mut String, keep: &dyn Fn(&str) -> bool| {
        let kept: Vec<usize> = (0..headers.len()).filter(|&c| keep(&headers[c])).collect();
        let names: Vec<String> = kept.iter().map(|&c| text(&headers[c])).collect();
        let _ = writeln!(out, "| branch | {} |", names.join(" | "));
        let _ = writeln!(out, "|---|{}", "--:|".repeat(kept.len()));
        for entry in &comparison.entries {
            let cells = cells(comparison, entry);
            let row: Vec<String> = kept.iter().map(|&c| text(&cells[c].text)).collect();
            let star = if entry.pareto { " ★" } else { "" };
            let _ = writeln!(out, "| `{}`{star} | {} |", code(&entry.name), row.join(" | "));
        }
    };
    table(&mut out, &shown);
    if let Some(first) = comparison.protocols.first() {
        let _ = writeln!(
            out,
            "\nfp16: perplexity {}. ★ nothing here is both smaller and closer to fp16. {}",
            interval(first.reference_perplexity, 4, false).text,
            text(&rule(comparison))
        );
    }
    fold(&mut out, "How they were made", |out| table(out, &|name| !shown(name)));
    let worst = worst(comparison, 10);
    if !worst.is_empty() {
        fold(&mut out, "Worst linears", |out| {
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
    fold(&mut out, "Provenance", |out| {
        for (name, facts) in provenance::all(comparison) {
            let _ = writeln!(out, "**{}**\n", text(&name));
            for (key, value) in facts {
                let _ = writeln!(out, "- {}: {}", text(&key), text(&value));
            }
            let _ = writeln!(out);
        }
    });
    out
}

fn fold(out: &mut String, title: &str, content: impl FnOnce(&mut String)) {
    let _ = writeln!(out, "\n<details><summary>{title}</summary>\n");
    content(out);
    let _ = writeln!(out, "\n</details>");
}

/// Plain text: nothing of it is taken for Markdown or HTML, and it stays in its cell.
fn text(raw: &str) -> String {
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
