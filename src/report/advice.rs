//! The recommendation in words.

use super::{
    Comparison, Entry, bytes,
    recommendation::{FACTOR, ForReaders, USUAL_BITS},
};

/// A recommended model.
pub(super) struct Advice<'a> {
    /// The case that it is recommended for.
    pub(super) when: String,
    pub(super) entry: &'a Entry,
    /// `4 bits, groups of 32, act order`.
    pub(super) what: String,
    /// The reason.
    pub(super) because: String,
    /// The figures that matter most: value and meaning.
    pub(super) figures: Vec<(String, String)>,
}

impl Advice<'_> {
    /// Everything in one line.
    pub(super) fn line(&self) -> String {
        let figures: Vec<String> =
            self.figures.iter().map(|(value, meaning)| format!("{value} {meaning}")).collect();
        format!("{}: {}", self.because, figures.join(", "))
    }
}

/// The recommended models, the best first; empty where nothing was measured.
pub(super) fn advice<'a>(comparison: &'a Comparison) -> Vec<Advice<'a>> {
    let Some(choice) = &comparison.recommendation else { return Vec::new() };
    let entry = |i: usize| &comparison.entries[i];
    let closest = entry(choice.closest);
    let advice = |when: &str, entry: &'a Entry, because: String| Advice {
        when: when.to_owned(),
        entry,
        what: in_words(entry),
        because: because + &not_for(entry),
        figures: figures(comparison, entry),
    };
    let measured = comparison.entries.iter().filter(|e| e.main().is_some()).count();
    let of = if measured > 1 { format!(" of the {measured} measured") } else { String::new() };
    let bits = closest.checkpoint.bits;
    let of = if choice.closer.is_some() { format!(" of those with {bits} bits or fewer") } else { of };
    let mut because = format!("Closest to fp16{of}");
    if !choice.as_close.is_empty() {
        let names: Vec<&str> = choice.as_close.iter().map(|&i| entry(i).name.as_str()).collect();
        because = format!(
            "Smallest of those that are closest to fp16 (no significant difference to {})",
            names.join(", ")
        );
    }
    let mut all = vec![advice("Take this", closest, because)];
    if let Some(smaller) = choice.smaller.map(entry) {
        let times = smaller.kl().unwrap_or(f64::NAN) / closest.kl().unwrap_or(f64::NAN);
        let saved = 1.0 - smaller.checkpoint.bytes as f64 / closest.checkpoint.bytes as f64;
        let because = format!("{:.1}% smaller, {times:.1} times as far from fp16", saved * 100.0);
        all.push(advice("If it must be smaller", smaller, because));
    }
    if let Some(closer) = choice.closer.map(entry) {
        let times = closest.kl().unwrap_or(f64::NAN) / closer.kl().unwrap_or(f64::NAN);
        let more = closer.checkpoint.bytes as f64 / closest.checkpoint.bytes as f64 - 1.0;
        let because = format!("{:.0}% larger, {times:.0} times as close to fp16", more * 100.0);
        all.push(advice("If there is room", closer, because));
    }
    for ForReaders { readers, entry: chosen } in &choice.for_readers {
        let Some(chosen) = chosen.map(entry) else { continue };
        let names = readers.join(", ");
        match all.iter_mut().skip(1).find(|a| a.entry.name == chosen.name) {
            Some(same) => same.when += &format!(", or for {names}"),
            None => {
                let them = if readers.len() == 1 { "it" } else { "they" };
                let load = if readers.len() == 1 { "loads" } else { "load" };
                all.push(advice(&format!("For {names}"), chosen, format!("The closest that {them} {load}")));
            }
        }
    }
    all
}

/// The maintained readers that do not load an entry, as the end of a sentence.
fn not_for(entry: &Entry) -> String {
    match entry.not_loaded_by() {
        names if names.is_empty() => String::new(),
        names => format!("; not loaded by {}", names.join(", ")),
    }
}

/// A sentence on the readers that load none of the measured entries.
pub(super) fn unserved(comparison: &Comparison) -> Option<String> {
    let choice = comparison.recommendation.as_ref()?;
    let none = choice.for_readers.iter().filter(|choice| choice.entry.is_none());
    let names: Vec<&str> = none.flat_map(|choice| &choice.readers).map(String::as_str).collect();
    (!names.is_empty()).then(|| format!("For {}: none of these models can be loaded.", names.join(", ")))
}

/// The rule of the recommendation.
pub(super) fn rule(comparison: &Comparison) -> String {
    let Some(protocol) = comparison.protocols.first() else {
        return "Nothing was measured, so nothing is recommended: run gptq eval first.".into();
    };
    format!(
        "Rule: first, of the models with at most {USUAL_BITS} bits, the one with the smallest mean KL divergence from fp16 on \
         {} ({} windows of {} tokens); where others do not differ from it by more than the 95% interval, the smallest file of \
         these. Second, the smallest file with at most {FACTOR} times that divergence. Third, for each maintained program that \
         does not load the first, the closest model that it loads.",
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

fn figures(comparison: &Comparison, entry: &Entry) -> Vec<(String, String)> {
    let share =
        |fp16| format!("weights, {:.0}% of fp16", entry.checkpoint.bytes as f64 / fp16 as f64 * 100.0);
    let weights = comparison.source.bytes.filter(|&fp16| fp16 > 0).map_or_else(|| "weights".into(), share);
    let mut figures = vec![(bytes(entry.checkpoint.bytes), weights)];
    if let Some(main) = entry.main() {
        let (change, whole) = (main.perplexity_change.value, main.perplexity.value);
        figures.extend([
            (format!("{:.1}%", main.top1_agreement.value * 100.0), "same next token as fp16".into()),
            (percent(change / (whole - change)), "perplexity".into()),
            (format!("{:.6}", main.kl_divergence.value), "mean KL divergence".into()),
        ]);
    }
    figures
}

/// `+0.12%`; a share that rounds to zero has no sign.
fn percent(share: f64) -> String {
    let text = format!("{:+.2}%", share * 100.0);
    if text[1..].starts_with("0.00") { "±0.00%".into() } else { text }
}

fn in_words(entry: &Entry) -> String {
    let checkpoint = &entry.checkpoint;
    let groups = match checkpoint.group_size {
        -1 => "a group a row".to_owned(),
        size => format!("groups of {size}"),
    };
    let order = match checkpoint.act_order.as_str() {
        "no" => "no act order",
        "static" => "act order with static groups",
        _ => "act order",
    };
    let zeros = if checkpoint.symmetric { "" } else { ", asymmetric" };
    format!("{} bits, {groups}, {order}{zeros}", checkpoint.bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_has_no_sign() {
        assert_eq!([0.0012, -0.00001, 0.00004, -0.02].map(percent), ["+0.12%", "±0.00%", "±0.00%", "-2.00%"]);
    }
}
