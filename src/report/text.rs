//! The report as plain text for a terminal.

use std::{fmt::Write, iter};

use super::{
    Comparison, Evaluation, Report,
    advice::{advice, also_measured, headline, rule, unmeasured, unserved},
    bytes,
    comparison::{act_order, not_loaded_by},
    figures::{columns, errors_of_linears},
};

/// The branches of a run with their formats, sizes and errors, and the linears that were rounded instead of solved.
pub fn run_table(report: &Report) -> String {
    let header = [
        "branch",
        "bits",
        "group",
        "act order",
        "size",
        "bits/weight",
        "mean error",
        "worst linear",
        "not loaded by",
    ];
    let rows = report.branches.iter().map(|branch| {
        let errors = || branch.linears.iter().map(|l| l.relative_error);
        let worst = branch.linears.iter().max_by(|a, b| a.relative_error.total_cmp(&b.relative_error));
        let mean = errors().sum::<f64>() / branch.linears.len().max(1) as f64;
        vec![
            branch.branch.clone(),
            branch.variant.bits().to_string(),
            branch.variant.group_size().as_config().to_string(),
            act_order(branch.variant.order()).to_owned(),
            bytes(branch.bytes),
            format!("{:.3}", branch.bits_per_weight),
            format!("{mean:.4}"),
            worst.map_or_else(String::new, |l| format!("{:.4} {}", l.relative_error, short(&l.name))),
            not_loaded_by(&branch.readers).join(", "),
        ]
    });
    let mut text = table(&header, rows.collect());
    if let Some(remark) = errors_of_linears(iter::once(report)) {
        let _ = writeln!(text, "{remark}");
    }
    if report.fallbacks().next().is_some() {
        text.push_str("\nRounded to nearest, as they could not be solved:\n");
        let rows = report.fallbacks().map(|texts| <[&str; 3]>::from(texts).map(str::to_owned).to_vec());
        text.push_str(&table(&["branch", "linear", "reason"], rows.collect()));
    }
    text
}

/// The recommendation, and the columns of the table of branches that decide it.
pub fn comparison_table(comparison: &Comparison) -> String {
    const SHOWN: [&str; 6] = ["size", "mean KL", "Δ to fp16", "same top-1", "readers", "GPUs"];
    let mut columns = columns(comparison);
    columns.retain(|c| SHOWN.contains(&c.name.as_str()) || c.name.starts_with("perplexity"));
    let names: Vec<&str> = iter::once("branch").chain(columns.iter().map(|c| c.name.as_str())).collect();
    let rows = comparison.entries.iter().enumerate().map(|(i, entry)| {
        iter::once(entry.name.clone()).chain(columns.iter().map(|c| c.cells[i].text.clone())).collect()
    });
    let mut text = format!("{}\n\n", headline(comparison));
    for advice in advice(comparison) {
        let _ = writeln!(text, "{}: {}. {}", advice.when, advice.entry.name, advice.line());
    }
    if let Some(line) = unserved(comparison) {
        let _ = writeln!(text, "{line}");
    }
    text.push('\n');
    if let Some(first) = comparison.protocols.first() {
        let _ = writeln!(text, "{}", first.title());
    }
    let _ = writeln!(text, "{}{}", table(&names, rows.collect()), rule(comparison));
    for remark in [unmeasured(comparison), also_measured(comparison)].into_iter().flatten() {
        let _ = writeln!(text, "{remark}");
    }
    text
}

/// The quality of each model beside fp16, below the text and the windows it was measured on.
pub fn evaluation_table(evaluation: &Evaluation) -> String {
    let header = ["model", "weights", "perplexity", "change", "KL divergence", "same top-1"];
    let fp16 = format!("{:.4}", evaluation.reference_perplexity.value);
    let mut rows = vec![["fp16", "", &fp16, "", "", ""].map(str::to_owned).to_vec()];
    rows.extend(evaluation.models.iter().map(|model| {
        vec![
            model.name.clone(),
            bytes(model.weight_bytes),
            format!("{:.4}", model.perplexity.value),
            format!("{:+.4}", model.perplexity_change),
            format!("{:.6}", model.kl_divergence),
            format!("{:.2}%", model.top1_agreement.percent()),
        ]
    }));
    format!("{}\n{}{}\n", evaluation.title(), table(&header, rows), evaluation.protocol)
}

/// `model.layers.3.mlp.down_proj` → `3.mlp.down_proj`.
fn short(name: &str) -> &str {
    name.strip_prefix("model.layers.").unwrap_or(name)
}

/// Columns aligned with spaces; the first to the left, all others to the right.
fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let width = |c: usize| {
        let cells = rows.iter().map(|row| row[c].chars().count());
        cells.chain([header[c].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut text = String::new();
    let head = header.iter().map(|h| (*h).to_owned()).collect();
    for row in iter::once(&head).chain(&rows) {
        let mut line = String::new();
        for (c, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let _ = if c == 0 { write!(line, "{cell:<width$}") } else { write!(line, "  {cell:>width$}") };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn errors_that_are_traded_for_the_model_s_are_said_to_be() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/report/run.json");
        let mut report = Report::read(&path).unwrap();
        assert!(!run_table(&report).contains("Output Hessians"));
        report.accuracy.output_hessian = 1.0;
        assert!(run_table(&report).contains("Compare such runs with others by the KL divergence"));
    }

    #[test]
    fn sizes_are_as_on_the_hub() {
        assert_eq!(
            [3_900_000_000, 12_345_678, 999, 1_000].map(bytes),
            ["3.90 GB", "12.3 MB", "999 B", "1.0 kB"]
        );
    }

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".to_owned(), "1".to_owned()], vec!["long name".to_owned(), "22".to_owned()]];
        assert_eq!(table(&["x", "n"], rows), "x           n\na           1\nlong name  22\n");
    }
}
