//! The recommendation in words.

use super::{Comparison, Entry, bytes, recommendation::FACTOR};

/// One recommended model.
pub(super) struct Advice<'a> {
    /// When to take it.
    pub(super) when: String,
    /// Its position among the entries.
    pub(super) index: usize,
    pub(super) entry: &'a Entry,
    /// What it has for it, in a sentence.
    pub(super) because: String,
}

/// What to take, the first first; empty where nothing was measured.
pub(super) fn advice(comparison: &Comparison) -> Vec<Advice<'_>> {
    let Some(choice) = &comparison.recommendation else { return Vec::new() };
    let entry = |i: usize| &comparison.entries[i];
    let closest = entry(choice.closest);
    let advice = |when: &str, index: usize, because: String| Advice {
        when: when.to_owned(),
        index,
        entry: entry(index),
        because,
    };
    let mut because = format!("closest to fp16: {}", quality(closest));
    if !choice.as_close.is_empty() {
        let names: Vec<&str> = choice.as_close.iter().map(|&i| entry(i).name.as_str()).collect();
        because += &format!("; {} cannot be told from it", names.join(", "));
    }
    let mut all = vec![advice("Take this", choice.closest, because)];
    if let Some(smaller) = choice.smaller {
        let times = entry(smaller).kl().unwrap_or(f64::NAN) / closest.kl().unwrap_or(f64::NAN);
        let saved = 1.0 - entry(smaller).checkpoint.bytes as f64 / closest.checkpoint.bytes as f64;
        let because = format!(
            "{:.1}% smaller, {times:.1} times as far from fp16: {}",
            saved * 100.0,
            quality(entry(smaller))
        );
        all.push(advice("If it must be smaller", smaller, because));
    }
    if let Some(everywhere) = choice.everywhere {
        let refuse: Vec<&str> = closest.readers().1.iter().map(|r| r.name.as_str()).collect();
        let (_, own) = entry(everywhere).readers();
        let gained: Vec<&str> =
            refuse.into_iter().filter(|name| own.iter().all(|r| r.name != **name)).collect();
        let because =
            format!("the closest that {} takes as well: {}", gained.join(", "), quality(entry(everywhere)));
        match all.iter_mut().skip(1).find(|a| a.index == everywhere) {
            Some(same) => {
                same.when += ", or run everywhere";
                same.because += &format!("; {} takes it as well", gained.join(", "));
            }
            None => all.push(advice("If it must run everywhere", everywhere, because)),
        }
    }
    all
}

/// How the recommendation follows from the figures.
pub(super) fn rule(comparison: &Comparison) -> String {
    let Some(protocol) = comparison.protocols.first() else {
        return "Nothing was measured, so nothing is recommended: run gptq eval first.".into();
    };
    format!(
        "Rule: the smallest mean KL divergence from fp16 on {} ({} windows of {} tokens), and of those whose 95% interval \
         of the difference includes none, the smallest file; then the smallest file with at most {FACTOR} times that \
         divergence; then the closest one that the most software takes.",
        protocol.dataset, protocol.windows, protocol.seq_len
    )
}

/// The first sentence of a report.
pub(super) fn headline(comparison: &Comparison) -> String {
    match advice(comparison).first() {
        Some(first) => format!("{}: take {}", comparison.source.name, first.entry.name),
        None => format!("{}: not measured yet", comparison.source.name),
    }
}

fn quality(entry: &Entry) -> String {
    let Some(main) = entry.main() else { return "not measured".into() };
    let (change, whole) = (main.perplexity_change.value, main.perplexity.value);
    let percent = change / (whole - change) * 100.0;
    format!(
        "KL {:.6}, perplexity {percent:+.2}%, same next token {:.1}% of the time, {}",
        main.kl_divergence.value,
        main.top1_agreement.value * 100.0,
        bytes(entry.checkpoint.bytes)
    )
}
