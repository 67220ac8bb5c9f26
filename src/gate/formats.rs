//! A judgement as text: for a terminal, for GitHub, for readers of JUnit, and as Markdown.

use std::fmt::Write;

use super::checklist::{Check, Growth, Judgement, Verdict, percent};
use crate::report::markdown_text;

/// Text for a terminal: a line for each reason to fail, then notes, then the verdict; with `verbose`, a line for every check.
pub fn text(judgement: &Judgement, verbose: bool) -> String {
    let mut text = String::new();
    for check in judgement.checks.iter().filter(|check| verbose || check.breached) {
        let outcome = if check.breached { "FAILED" } else { "ok    " };
        let _ = writeln!(text, "{outcome} {}", one_line(&check.line()));
    }
    for note in &judgement.notes {
        let _ = writeln!(text, "note   {}", one_line(note));
    }
    for compared in &judgement.branches {
        let against = match (compared.baseline_kl_divergence, &compared.growth) {
            (Some(before), Some(growth)) => format!(", the baseline's is {before:.6}: {}", interval(growth)),
            _ => String::new(),
        };
        let _ = writeln!(
            text,
            "       {}: KL divergence {:.6} on {}{against}",
            one_line(&compared.branch),
            compared.kl_divergence,
            one_line(&compared.dataset)
        );
    }
    let _ = writeln!(text, "{}", summary(judgement));
    text
}

/// Annotations of GitHub Actions: an error for each reason to fail, notices for the rest.
pub fn github(judgement: &Judgement) -> String {
    let mut text = String::new();
    let mut annotate = |kind: &str, title: &str, message: &str| {
        let _ = writeln!(text, "::{kind} title={}::{}", property(title), data(message));
    };
    for check in judgement.breaches() {
        annotate("error", &format!("gptq gate: {}", check.check), &check.line());
    }
    for note in &judgement.notes {
        annotate("notice", "gptq gate", note);
    }
    let kind = if judgement.verdict() == Verdict::Pass { "notice" } else { "error" };
    annotate(kind, "gptq gate", &summary(judgement));
    text
}

/// JUnit's XML: one test suite for each branch, and one for the run as a whole.
pub fn junit(judgement: &Judgement) -> String {
    let mut suites: Vec<(&str, Vec<&Check>)> = Vec::new();
    for check in &judgement.checks {
        let name = check.branch.as_deref().unwrap_or("run");
        match suites.iter_mut().find(|(suite, _)| *suite == name) {
            Some((_, checks)) => checks.push(check),
            None => suites.push((name, vec![check])),
        }
    }
    let counts = |checks: &[&Check]| {
        let failures = checks.iter().filter(|check| check.breached).count();
        format!("tests=\"{}\" failures=\"{failures}\"", checks.len())
    };
    let all: Vec<&Check> = judgement.checks.iter().collect();
    let mut text = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let _ = writeln!(text, "<testsuites name=\"gptq gate\" {}>", counts(&all));
    for (suite, checks) in suites {
        let suite = xml(suite);
        let _ = writeln!(text, "  <testsuite name=\"{suite}\" {}>", counts(&checks));
        for check in checks {
            let (name, finding) = (xml(&check.check), xml(&check.finding));
            let outcome = match check.breached {
                true => format!("<failure message=\"{finding}\"/>"),
                false => format!("<system-out>{finding}</system-out>"),
            };
            let _ =
                writeln!(text, "    <testcase classname=\"{suite}\" name=\"{name}\">{outcome}</testcase>");
        }
        text.push_str("  </testsuite>\n");
    }
    text.push_str("</testsuites>\n");
    text
}

/// Markdown: the verdict, the reasons to fail, the branches beside the baseline's, the notes.
pub fn markdown(judgement: &Judgement) -> String {
    let mut text = format!("### gptq gate: {}\n", summary(judgement));
    let list = |text: &mut String, lines: &mut dyn Iterator<Item = String>| {
        let lines: Vec<String> = lines.map(|line| format!("- {}\n", markdown_text(&line))).collect();
        if !lines.is_empty() {
            let _ = write!(text, "\n{}", lines.concat());
        }
    };
    list(&mut text, &mut judgement.breaches().map(Check::line));
    if !judgement.branches.is_empty() {
        text.push_str(
            "\n| branch | text | KL divergence | baseline | growth, 95% | perplexity to fp16 | same top-1 |\n\
             |---|---|--:|--:|--:|--:|--:|\n",
        );
    }
    for branch in &judgement.branches {
        let baseline = branch.baseline_kl_divergence.map_or_else(String::new, |kl| format!("{kl:.6}"));
        let _ = writeln!(
            text,
            "| {} | {} | {:.6} | {baseline} | {} | {:+.4} | {:.2}% |",
            markdown_text(&branch.branch),
            markdown_text(&branch.dataset),
            branch.kl_divergence,
            branch.growth.as_ref().map_or_else(String::new, interval),
            branch.perplexity_change,
            branch.top1_agreement * 100.0
        );
    }
    list(&mut text, &mut judgement.notes.iter().cloned());
    text
}

/// `passed: 70 checks` or `failed: 2 of 70 checks`.
fn summary(judgement: &Judgement) -> String {
    let all = judgement.checks.len();
    match judgement.verdict() {
        Verdict::Pass => format!("passed: {all} checks"),
        Verdict::Fail(breaches) => format!("failed: {} of {all} checks", breaches.len()),
    }
}

/// `+1.2% (-0.1% to +2.5%)`.
fn interval(growth: &Growth) -> String {
    let [value, low, high] = [growth.value, growth.low, growth.high].map(percent);
    format!("{value} ({low} to {high})")
}

/// Names are not trusted: line ends and control characters are replaced, so that none reaches the terminal.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{FFFD}' } else { c }).collect()
}

/// GitHub's escapes in messages.
fn data(text: &str) -> String {
    text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A")
}

/// GitHub's escapes in properties.
fn property(text: &str) -> String {
    data(text).replace(':', "%3A").replace(',', "%2C")
}

/// XML's escapes, for text and attributes; characters that XML cannot hold become `�`.
fn xml(text: &str) -> String {
    let escaped = |c: char| match c {
        '&' | '<' | '>' | '"' | '\'' | '\t' | '\n' | '\r' => format!("&#{};", u32::from(c)),
        ..' ' | '\u{FFFE}' | '\u{FFFF}' => '\u{FFFD}'.to_string(),
        c => c.to_string(),
    };
    text.chars().map(escaped).collect()
}
