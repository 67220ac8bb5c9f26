//! Figures as people read them, for tables on a page and in a comment.

use super::{Comparison, Entry, EvaluatedModel, Interval, LinearReport, bytes, charts::place};

/// A cell: what is shown, and what it is sorted by.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Cell {
    pub(super) text: String,
    pub(super) sort: String,
}

/// What stands in the branch table for one entry, after its name; headers are those of [`headers`].
pub(super) fn cells(comparison: &Comparison, entry: &Entry) -> Vec<Cell> {
    let checkpoint = &entry.checkpoint;
    let text = |text: String| Cell { sort: text.clone(), text };
    let number = |text: String, value: f64| Cell { text, sort: value.to_string() };
    let plain = |value: Option<f64>| value.map_or_else(none, |v| number(v.to_string(), v));
    let mut cells = vec![
        number(bytes(checkpoint.bytes), checkpoint.bytes as f64),
        number(format!("{:.2}", checkpoint.bits_per_weight), checkpoint.bits_per_weight),
        of(entry, |m| interval(m.kl_divergence, 6, false)),
        of(entry, |m| number(format!("{:.5}", m.kl_p99), m.kl_p99)),
        of(entry, |m| number(format!("{:.3}", m.kl_max), m.kl_max)),
        of(entry, |m| number(format!("{:.4}", m.perplexity.value), m.perplexity.value)),
        of(entry, |m| interval(m.perplexity_change, 4, true)),
    ];
    if comparison.short.is_some_and(|short| short > 0) {
        let short = comparison.short_perplexity(entry);
        cells.push(short.map_or_else(none, |p| number(format!("{:.4}", p.value), p.value)));
    }
    cells.push(of(entry, |m| {
        let share = m.top1_agreement;
        let percent = Interval { value: share.value * 100.0, margin: share.margin.map(|m| m * 100.0) };
        let Cell { text, sort } = interval(percent, 2, false);
        Cell { text: format!("{text}%"), sort }
    }));
    cells.extend([
        number(checkpoint.bits.to_string(), f64::from(checkpoint.bits)),
        number(checkpoint.group_size.to_string(), checkpoint.group_size as f64),
        text(checkpoint.act_order.clone()),
        plain(checkpoint.damp),
        checkpoint.dataset.clone().map_or_else(none, text),
        plain(checkpoint.seq_len.map(|n| n as f64)),
        text(entry.tool.clone()),
        readers(entry),
    ]);
    cells
}

/// The headers of [`cells`], each with what it means where that is not plain.
pub(super) fn headers(comparison: &Comparison) -> Vec<(String, &'static str)> {
    let length =
        |p: usize| comparison.protocols.get(p).map_or_else(String::new, |p| format!(" at {}", p.seq_len));
    let mut headers = vec![
        ("size".to_owned(), "bytes of all tensors"),
        ("bits/weight".into(), "codes, scales, zeros and group indices over the quantized weights"),
        ("mean KL".into(), "Kullback-Leibler divergence from fp16, nats, smaller is better"),
        ("p99 KL".into(), "99 of 100 tokens are not above"),
        ("max KL".into(), "of the worst token"),
        (format!("perplexity{}", length(0)), "smaller is better"),
        ("Δ to fp16".into(), "change of the perplexity, with its 95% interval over paired windows"),
    ];
    if let Some(short) = comparison.short.filter(|&short| short > 0) {
        headers.push((format!("perplexity{}", length(short)), "in short windows"));
    }
    headers.extend([
        ("same top-1".into(), "tokens at which fp16 and this model find the same token most likely"),
        ("bits".into(), ""),
        ("group".into(), "input features that share a scale; -1 is a whole row"),
        ("act order".into(), ""),
        ("damp".into(), "of the mean Hessian diagonal"),
        ("calibrated on".into(), ""),
        ("seq. length".into(), "tokens of a calibration window"),
        ("made by".into(), ""),
        ("readers".into(), "maintained programs that load it"),
    ]);
    headers
}

/// What is not known.
pub(super) fn none() -> Cell {
    Cell { text: "–".into(), sort: String::new() }
}

fn of(entry: &Entry, cell: impl FnOnce(&EvaluatedModel) -> Cell) -> Cell {
    entry.main().map_or_else(none, cell)
}

pub(super) fn interval(interval: Interval, digits: usize, signed: bool) -> Cell {
    let Interval { value, margin } = interval;
    let mut text = if signed { format!("{value:+.digits$}") } else { format!("{value:.digits$}") };
    if let Some(margin) = margin {
        text += &format!(" ±{margin:.digits$}");
    }
    Cell { text, sort: value.to_string() }
}

/// Of the maintained readers: `5 of 7, not vLLM, mistral.rs`.
fn readers(entry: &Entry) -> Cell {
    let all = entry.checkpoint.readers.iter().filter(|reader| reader.living).count();
    if all == 0 {
        return none();
    }
    let refuse = entry.not_loaded_by();
    let take = all - refuse.len();
    let mut text = format!("{take} of {all}");
    if !refuse.is_empty() {
        let short = |name: &&str| name.split([' ', ',', '\'']).next().unwrap_or(name).to_owned();
        text += &format!(", not {}", refuse.iter().map(short).collect::<Vec<_>>().join(", "));
    }
    Cell { text, sort: take.to_string() }
}

/// One of the worst linears.
pub(super) struct Worst<'a> {
    pub(super) entry: &'a Entry,
    pub(super) linear: &'a LinearReport,
    /// `3.mlp.down_proj`.
    pub(super) short_name: String,
    /// What sets it apart from the others of its branch, in words.
    pub(super) why: String,
}

/// The linears with the largest relative error: each name once, where it is worst.
pub(super) fn worst(comparison: &Comparison, count: usize) -> Vec<Worst<'_>> {
    let mut all: Vec<(&Entry, &LinearReport)> =
        comparison.entries.iter().flat_map(|e| e.linears.iter().map(move |l| (e, l))).collect();
    all.sort_by(|a, b| b.1.relative_error.total_cmp(&a.1.relative_error));
    let mut found: Vec<Worst<'_>> = Vec::new();
    for (entry, linear) in all {
        if found.len() == count {
            break;
        }
        if found.iter().all(|w| w.linear.name != linear.name) {
            let short_name = short_name(&linear.name);
            found.push(Worst { entry, linear, short_name, why: why(entry, linear) });
        }
    }
    found
}

/// A figure that is this many times the branch's median, which is the usual, is named as a reason.
const STANDS_OUT: f64 = 3.0;

fn why(entry: &Entry, linear: &LinearReport) -> String {
    let median = |of: fn(&LinearReport) -> f64| {
        let mut values: Vec<f64> = entry.linears.iter().map(of).filter(|v| v.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::INFINITY)
    };
    let mut reasons = Vec::new();
    if let Some(fallback) = &linear.fallback {
        reasons.push(format!("rounded to nearest: {fallback}"));
    }
    if linear.damp_raised > 0 {
        reasons.push(format!("damping raised {} times to {}", linear.damp_raised, linear.damp));
    }
    if linear.dead_columns > 0 {
        reasons.push(format!("{} dead input features", linear.dead_columns));
    }
    let outliers = linear.outlier_ratio / median(|l| l.outlier_ratio);
    let condition = linear.condition_estimate / median(|l| l.condition_estimate);
    if outliers >= STANDS_OUT {
        reasons.push(format!("outlier inputs: {outliers:.1} times the usual ratio"));
    }
    if condition >= STANDS_OUT {
        reasons.push(format!("inputs alike: {condition:.1} times the usual condition number"));
    }
    if reasons.is_empty() {
        reasons.push(format!(
            "nothing stands out (outliers {outliers:.1} times, condition {condition:.1} times the usual): its weights \
             are hard to round for these inputs"
        ));
    }
    reasons.join("; ")
}

fn short_name(name: &str) -> String {
    match place(name) {
        Some(_) => name.trim_start_matches("model.layers.").to_owned(),
        None => name.to_owned(),
    }
}
