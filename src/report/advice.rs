//! The recommendation in words.

use super::{
    Comparison, Entry, Evaluation, bytes,
    recommendation::{CLOSE, FACTOR, ForReaders, USUAL_BITS},
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
    /// The reason and the figures in one line.
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
    let (take, closest) = (entry(choice.take), entry(choice.closest));
    let advice = |when: &str, entry: &'a Entry, because: String| Advice {
        when: when.to_owned(),
        entry,
        what: in_words(entry),
        because: because + &not_for(entry),
        figures: figures(comparison, entry),
    };
    let measured = comparison.entries.iter().filter(|e| e.main().is_some()).count();
    let of = if measured > 1 { format!(" of the {measured} measured") } else { String::new() };
    let of = if choice.closer.is_some() {
        format!(" of those with at most {USUAL_BITS} bits or a file no larger")
    } else {
        of
    };
    let kl = |entry: &Entry| entry.kl().unwrap_or(f64::NAN);
    let mut because = if choice.take == choice.closest {
        format!("Closest to fp16{of}")
    } else if kl(take) <= CLOSE * kl(closest) {
        format!("Smallest{of} with at most {CLOSE} times the KL divergence of the closest")
    } else {
        format!("Smallest{of} that may be as close as the closest")
    };
    if !choice.untold.is_empty() {
        let names: Vec<&str> = choice.untold.iter().map(|&i| entry(i).name.as_str()).collect();
        because += &format!("; {} to tell it from {}", too_few(comparison), names.join(", "));
    }
    let mut all = vec![advice("Take this", take, because)];
    if let Some(smaller) = choice.smaller.map(entry) {
        let times = kl(smaller) / kl(take);
        let saved = 1.0 - smaller.checkpoint.bytes as f64 / take.checkpoint.bytes as f64;
        let because = format!("{:.1}% smaller, {times:.1} times as far from fp16", saved * 100.0);
        all.push(advice("If it must be smaller", smaller, because));
    }
    let larger = |larger: &Entry| {
        let more = larger.checkpoint.bytes as f64 / take.checkpoint.bytes as f64 - 1.0;
        let size = if more < 0.0 { "smaller" } else { "larger" };
        let times = kl(take) / kl(larger);
        format!("{:.1}% {size}, {times:.1} times as close to fp16", more.abs() * 100.0)
    };
    if choice.take != choice.closest {
        all.push(advice("If there is room", closest, larger(closest)));
    }
    if let Some(closer) = choice.closer.map(entry) {
        let when = match choice.take == choice.closest {
            true => "If there is room",
            false => "If there is more room",
        };
        all.push(advice(when, closer, larger(closer)));
    }
    for ForReaders { readers, entry: chosen } in &choice.for_readers {
        let Some(chosen) = chosen.map(entry) else { continue };
        let names = readers.join(", ");
        match all.iter_mut().skip(1).find(|a| a.entry.name == chosen.name) {
            Some(same) => same.when += &format!(", or for {names}"),
            None => {
                let load = if readers.len() == 1 { "it loads" } else { "they load" };
                let because = format!("By the same rule, of those that {load}");
                all.push(advice(&format!("For {names}"), chosen, because));
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
    let load = if names.len() == 1 { "loads" } else { "load" };
    (!names.is_empty()).then(|| format!("{} {load} none of these models.", names.join(", ")))
}

/// The rule of the recommendation.
pub(super) fn rule(comparison: &Comparison) -> String {
    let Some(protocol) = comparison.protocols.first() else {
        return "There is no recommendation without figures: run gptq eval first.".into();
    };
    format!(
        "Rule: the candidates are the models with at most {USUAL_BITS} bits, and those whose file is no larger. The mean KL \
         divergence from fp16 on {} ({} windows of {} tokens) decides. Take the smallest file whose divergence is at most \
         {CLOSE} times the lowest. A file with up to {FACTOR} times the lowest counts too if the windows cannot tell the two \
         apart: the 95% interval of their paired difference includes 0. If it must be smaller, take the smallest file with at \
         most {FACTOR} times the lowest divergence. For a maintained program that does not load the first, the same rule holds \
         among the models that it loads.",
        protocol.dataset, protocol.windows, protocol.seq_len
    )
}

/// `4 windows are too few`.
fn too_few(comparison: &Comparison) -> String {
    match comparison.protocols.first().map_or(0, |protocol| protocol.windows) {
        1 => "1 window is too few".into(),
        windows => format!("{windows} windows are too few"),
    }
}

/// The other evaluations, which do not decide the recommendation.
pub(super) fn also_measured(comparison: &Comparison) -> Option<String> {
    let (first, others) = comparison.protocols.split_first()?;
    let other = |(at, protocol): (usize, &Evaluation)| {
        let count = comparison.entries.iter().filter(|entry| entry.measured[at + 1].is_some()).count();
        format!("{} ({count} of {} models)", protocol.title(), comparison.entries.len())
    };
    let others_text: Vec<String> = others.iter().enumerate().map(other).collect();
    let choose = others.iter().find(|other| other.dataset != first.dataset);
    let choose =
        choose.map_or_else(String::new, |other| format!("; --dataset {} decides by it", other.dataset));
    (!others.is_empty()).then(|| format!("Also measured: {}{choose}.", others_text.join("; ")))
}

/// The models that were not measured where it decides.
pub(super) fn unmeasured(comparison: &Comparison) -> Option<String> {
    let protocol = comparison.protocols.first()?;
    let missing = comparison.entries.iter().filter(|entry| entry.main().is_none());
    let names: Vec<&str> = missing.map(|entry| entry.name.as_str()).collect();
    let title = protocol.title();
    (!names.is_empty())
        .then(|| format!("Without figures on {title}, and so without a verdict: {}.", names.join(", ")))
}

/// The meaning of the star in tables.
pub(super) const STAR: &str =
    "★: no other model with figures on this text is both smaller and closer to fp16.";

/// The first sentence of a report.
pub(super) fn headline(comparison: &Comparison) -> String {
    match advice(comparison).first() {
        Some(first) => {
            let untold = comparison.recommendation.as_ref().map_or(0, |choice| choice.untold.len());
            let models = if untold == 1 { "another model" } else { "other models" };
            let doubt = match untold {
                0 => String::new(),
                _ => format!(", but {} to tell it from {models}", too_few(comparison)),
            };
            format!("{}: take {}{doubt}", comparison.source.name, first.entry.name)
        }
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
    if let Some(types) = &checkpoint.gguf {
        return format!("GGUF, {types}");
    }
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
