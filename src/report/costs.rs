//! Where a run's time and memory went, as people read it.

use super::{
    RunSummary, bytes,
    figures::{Cell, none},
};

/// Where a run's time and memory went.
pub(super) struct Costs {
    pub(super) name: String,
    /// A stage, its time, and the memory while it was at work.
    pub(super) stages: Vec<(&'static str, Cell, Cell)>,
    pub(super) facts: Vec<(&'static str, String)>,
}

/// Of one run.
pub(super) fn costs(run: &RunSummary) -> Costs {
    let report = &run.report;
    let (seconds, memory) = (&report.stage_seconds, &report.stage_memory_bytes);
    let took = |s: f64| Cell { text: format!("{s:.1} s"), sort: s.to_string() };
    let size = |b: Option<u64>| b.map_or_else(none, |b| Cell { text: bytes(b), sort: b.to_string() });
    let stages = vec![
        ("reading weights, forward passes, Hessians", took(seconds.calibrating), size(memory.calibrating)),
        ("factorizing and solving", took(seconds.solving), size(memory.solving)),
        ("packing and writing linears", took(seconds.packing), size(memory.packing)),
        ("writing the rest, syncing, checking", took(seconds.finishing), size(memory.finishing)),
        ("whole run", took(report.seconds), size(report.peak_memory_bytes)),
        ("evaluating", took(run.evaluation_seconds), none()),
    ];
    let mut facts = Vec::new();
    let layers = &report.layer_seconds;
    if let Some(slowest) = layers.iter().copied().reduce(f64::max) {
        let mean = layers.iter().sum::<f64>() / layers.len() as f64;
        facts.push(("a layer", format!("{mean:.1} s on average, {slowest:.1} s at most")));
    }
    facts.push(("of the whole run, the journal", format!("{:.1} s", report.journal_seconds)));
    let branch = |(name, s): &(String, f64)| format!("{name} {s:.1} s");
    facts.push((
        "solving and packing by branch",
        run.branch_seconds.iter().map(branch).collect::<Vec<_>>().join(", "),
    ));
    Costs { name: run.name.clone(), stages, facts }
}
