//! Figures as text, for the tables of all forms of the report.

use super::{
    Comparison, Entry, EvaluatedModel, Interval, LinearReport, Report, RunSummary, SplitReport, bytes,
};

/// A cell: its text, and the value that a column is sorted by.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Cell {
    pub(super) text: String,
    pub(super) sort: String,
}

/// A column of the table of branches.
pub(super) struct Column {
    pub(super) name: String,
    /// Explanation of the name; empty where it needs none.
    pub(super) meaning: &'static str,
    /// One cell for each entry.
    pub(super) cells: Vec<Cell>,
}

/// The columns of the table of branches after the branch itself.
pub(super) fn columns(comparison: &Comparison) -> Vec<Column> {
    let mut columns = Vec::new();
    let mut add = |name: &str, meaning: &'static str, cell: &dyn Fn(&Entry) -> Cell| {
        let cells = comparison.entries.iter().map(cell).collect();
        columns.push(Column { name: name.to_owned(), meaning, cells });
    };
    let text = |text: &str| Cell { text: text.to_owned(), sort: text.to_owned() };
    let plain = |value: Option<f64>| value.map_or_else(none, |v| text(&v.to_string()));
    let main = |entry: &Entry, cell: fn(&EvaluatedModel) -> Cell| entry.main().map_or_else(none, cell);
    let perplexity = |p: usize| match comparison.protocols.get(p) {
        Some(protocol) => format!("perplexity at {}", protocol.seq_len),
        None => "perplexity".to_owned(),
    };
    add("size", "bytes of all tensors", &|e| size(e.checkpoint.bytes));
    let meaning = "codes, scales, zeros and group indices over the quantized weights";
    add("bits/weight", meaning, &|e| number(2, e.checkpoint.bits_per_weight));
    let meaning = "Kullback-Leibler divergence from fp16, nats, smaller is better";
    add("mean KL", meaning, &|e| main(e, |m| interval(6, m.kl_divergence)));
    add("p99 KL", "99% of the tokens are at or below it", &|e| main(e, |m| number(5, m.kl_p99)));
    add("max KL", "of the worst token", &|e| main(e, |m| number(3, m.kl_max)));
    add(&perplexity(0), "smaller is better", &|e| main(e, |m| number(4, m.perplexity.value)));
    let meaning = "change of the perplexity, with its 95% interval over paired windows";
    add("Δ to fp16", meaning, &|e| main(e, |m| change(m.perplexity_change)));
    if let Some(short) = comparison.short.filter(|&short| short > 0) {
        let of = |e: &Entry| comparison.short_perplexity(e).map_or_else(none, |p| number(4, p.value));
        add(&perplexity(short), "in short windows", &of);
    }
    let meaning = "share of tokens for which fp16 and this model have the same most likely token";
    add("same top-1", meaning, &|e| main(e, |m| percent(m.top1_agreement)));
    add("bits", "", &|e| text(&e.checkpoint.bits.to_string()));
    let meaning = "input features that share a scale; -1 is a whole row";
    add("group", meaning, &|e| text(&e.checkpoint.group_size.to_string()));
    add("act order", "", &|e| text(&e.checkpoint.act_order));
    add("damp", "of the mean Hessian diagonal", &|e| plain(e.checkpoint.damp));
    add("calibrated on", "", &|e| e.checkpoint.dataset.as_deref().map_or_else(none, text));
    let meaning = "tokens of a calibration window";
    add("seq. length", meaning, &|e| plain(e.checkpoint.seq_len.map(|n| n as f64)));
    add("made by", "", &|e| text(&e.tool));
    add("readers", "maintained programs that load it", &readers);
    // Runs and figures of older versions do not have it.
    if comparison.entries.iter().any(|entry| !entry.checkpoint.tensor_parallel.is_empty()) {
        let meaning = "numbers of GPUs over which a program can split it (tensor parallelism)";
        add("GPUs", meaning, &tensor_parallel);
    }
    columns
}

/// An unknown figure.
pub(super) fn none() -> Cell {
    Cell { text: "–".into(), sort: String::new() }
}

/// A number with this many decimals.
pub(super) fn number(digits: usize, value: f64) -> Cell {
    Cell { text: format!("{value:.digits$}"), sort: value.to_string() }
}

/// An interval with this many decimals.
pub(super) fn interval(digits: usize, interval: Interval) -> Cell {
    Cell { text: format!("{interval:.digits$}"), sort: interval.value.to_string() }
}

/// A change of the perplexity, with its sign.
pub(super) fn change(change: Interval) -> Cell {
    Cell { text: format!("{change:+.4}"), sort: change.value.to_string() }
}

fn percent(share: Interval) -> Cell {
    let percent = share.percent();
    Cell { text: format!("{percent:.2}%"), sort: percent.value.to_string() }
}

fn size(count: u64) -> Cell {
    Cell { text: bytes(count), sort: count.to_string() }
}

/// Number of the maintained readers that load it: `5 of 7, not vLLM, mistral.rs`.
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

/// Over how many GPUs readers can split it: `vLLM 1, 2; SGLang 1, 2`.
fn tensor_parallel(entry: &Entry) -> Cell {
    let splits = entry.checkpoint.tensor_parallel.iter().filter(|split| !split.parts.is_empty());
    let most = splits.clone().filter_map(|split| split.parts.last()).max();
    let one = |split: &SplitReport| {
        let parts: Vec<String> = split.parts.iter().map(ToString::to_string).collect();
        format!("{} {}", split.name.split(' ').next().unwrap_or_default(), parts.join(", "))
    };
    match most {
        None => none(),
        Some(most) => Cell { text: splits.map(one).collect::<Vec<_>>().join("; "), sort: most.to_string() },
    }
}

/// A remark on the errors of linears, where a run trades them for the model's.
pub(super) fn errors_of_linears<'a>(mut runs: impl Iterator<Item = &'a Report>) -> Option<&'static str> {
    runs.any(|report| report.accuracy.output_hessian > 0.0).then_some(
        "Output Hessians (--quality best) accept larger errors of single linears for a smaller error of the model. \
         Compare such runs with others by the KL divergence, not by the errors of their linears.",
    )
}

/// One of the worst linears.
pub(super) struct Worst<'a> {
    pub(super) entry: &'a Entry,
    pub(super) linear: &'a LinearReport,
    /// `3.mlp.down_proj`.
    pub(super) short_name: String,
    /// Its figures that differ most from those of the branch, in words.
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
            let short_name = linear.name.strip_prefix("model.layers.").unwrap_or(&linear.name).to_owned();
            found.push(Worst { entry, linear, short_name, why: why(entry, linear) });
        }
    }
    found
}

/// A figure of at least this many times the branch's median is named as a reason.
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
        let times =
            if linear.damp_raised == 1 { "once".into() } else { format!("{} times", linear.damp_raised) };
        reasons.push(format!("damping raised {times} to {}", linear.damp));
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
        reasons.push(format!("correlated inputs: {condition:.1} times the usual condition number"));
    }
    if reasons.is_empty() {
        reasons.push(format!(
            "nothing stands out (outliers {outliers:.1} times, condition {condition:.1} times the usual): its weights \
             are hard to round for these inputs"
        ));
    }
    reasons.join("; ")
}

/// Time and memory of one run.
pub(super) struct Costs {
    pub(super) name: String,
    /// A phase, its time, and the largest memory during it.
    pub(super) phases: Vec<(&'static str, Cell, Cell)>,
    pub(super) facts: Vec<(&'static str, String)>,
}

/// Time and memory of one run.
pub(super) fn costs(run: &RunSummary) -> Costs {
    let report = &run.report;
    let (seconds, memory) = (&report.stage_seconds, &report.stage_memory_bytes);
    let took = |s: f64| Cell { text: format!("{s:.1} s"), sort: s.to_string() };
    let size = |b: Option<u64>| b.map_or_else(none, size);
    let phases = vec![
        ("reading weights, forward passes, Hessians", took(seconds.calibrating), size(memory.calibrating)),
        ("factorizing and solving", took(seconds.solving), size(memory.solving)),
        ("packing and writing linears", took(seconds.packing), size(memory.packing)),
        ("writing the rest, syncing, checking", took(seconds.finishing), size(memory.finishing)),
        ("whole run", took(report.seconds), size(report.peak_memory_bytes)),
        ("evaluating", took(run.evaluation_seconds), none()),
    ];
    let layers = &report.layer_seconds;
    let slowest = layers.iter().copied().reduce(f64::max).map(|slowest| {
        let mean = layers.iter().sum::<f64>() / layers.len() as f64;
        ("a layer", format!("{mean:.1} s on average, {slowest:.1} s at most"))
    });
    let branches: Vec<String> =
        run.branch_seconds.iter().map(|(name, s)| format!("{name} {s:.1} s")).collect();
    let journal = ("of the whole run, the journal", format!("{:.1} s", report.journal_seconds));
    let facts = slowest.into_iter().chain([journal, ("solving and packing by branch", branches.join(", "))]);
    Costs { name: run.name.clone(), phases, facts: facts.collect() }
}
