//! A comparison as one HTML file without references to other files.

use askama::Template;

use super::{
    Comparison, Entry, EvaluatedModel,
    advice::{Advice, STAR, advice, also_measured, headline, rule, unmeasured, unserved},
    bytes,
    charts::{self, Kinds, Picture, SERIES},
    figures::{
        Cell, Column, Costs, Worst, change, columns, costs, errors_of_linears, interval, none, number, worst,
    },
    provenance::{self, Facts},
};

/// The page.
#[derive(Template)]
#[template(path = "report.html")]
struct Page<'a> {
    headline: String,
    source: String,
    comparison: &'a Comparison,
    advice: Vec<Advice<'a>>,
    /// Readers that load none of the entries.
    unserved: Option<String>,
    rule: String,
    /// On models and texts that the rule leaves out.
    remarks: Vec<String>,
    star: &'static str,
    pareto: Option<Picture>,
    lines: Vec<Picture>,
    kinds: Kinds,
    heat: Vec<Heat>,
    largest: String,
    /// On errors that are traded for the model's.
    errors: Option<&'static str>,
    /// Tables of models: the first has what decides and fits a screen.
    tables: Vec<Table>,
    rows: Vec<Row<'a>>,
    texts: Vec<Text>,
    worst: Vec<Worst<'a>>,
    runs: Vec<Costs>,
    readers: Vec<Reader>,
    provenance: Vec<Facts>,
    colors: Vec<(usize, String)>,
}

/// A table of models.
struct Table {
    title: &'static str,
    id: &'static str,
    columns: Vec<Column>,
}

/// A row of the tables of models.
struct Row<'a> {
    entry: &'a Entry,
    number: usize,
    color: usize,
    /// Whether it is a checkpoint of another tool.
    square: bool,
    /// Whether it is recommended.
    best: bool,
}

/// A heat map and its figures.
struct Heat {
    picture: Picture,
    /// For each layer, a cell for each kind of linears.
    layers: Vec<(usize, Vec<Cell>)>,
}

/// Figures of all entries on one text.
struct Text {
    title: String,
    reference: String,
    rows: Vec<(String, Vec<Cell>)>,
}

/// A reader, and for each entry why it does not load it, if so.
type Reader = (String, Vec<Option<String>>);

/// The comparison as an HTML page.
pub fn html(comparison: &Comparison) -> String {
    let solved: Vec<(usize, &Entry)> =
        comparison.entries.iter().enumerate().filter(|(_, e)| !e.linears.is_empty()).collect();
    let kinds = Kinds::new(solved.iter().map(|(_, entry)| *entry));
    let errors = solved.iter().flat_map(|(_, entry)| kinds.errors(entry));
    let largest = errors.map(|(_, _, error)| error).fold(0.0, f64::max);
    let source = &comparison.source;
    let size = |s: u64| format!(", {}", bytes(s));
    let parameters = |p: u64| format!(", {:.1} M parameters", p as f64 / 1e6);
    let page = Page {
        headline: headline(comparison),
        source: format!(
            "{}{}{}",
            source.name,
            source.parameters.map(parameters).unwrap_or_default(),
            source.bytes.map(size).unwrap_or_default()
        ),
        comparison,
        advice: advice(comparison),
        unserved: unserved(comparison),
        rule: rule(comparison),
        remarks: [unmeasured(comparison), also_measured(comparison)].into_iter().flatten().collect(),
        star: STAR,
        pareto: charts::size_against_kl(comparison),
        lines: [charts::error_by_layer(&solved, &kinds), charts::error_by_linear(&solved, &kinds)]
            .into_iter()
            .flatten()
            .collect(),
        heat: solved.iter().filter_map(|(_, e)| heat(e, &kinds, largest)).collect(),
        kinds,
        largest: format!("{largest:.4}"),
        errors: errors_of_linears(comparison.runs.iter().map(|run| &run.report)),
        tables: tables(comparison),
        rows: comparison.entries.iter().enumerate().map(|(i, e)| row(comparison, i, e)).collect(),
        texts: (0..comparison.protocols.len()).map(|p| text(comparison, p)).collect(),
        worst: worst(comparison, 10),
        runs: comparison.runs.iter().map(costs).collect(),
        readers: readers(comparison),
        provenance: provenance::all(comparison),
        colors: SERIES.iter().map(|c| format!("#{:02X}{:02X}{:02X}", c.0, c.1, c.2)).enumerate().collect(),
    };
    page.render().expect("writing to memory does not fail")
}

/// The columns of the first table in its order: the columns for a phone's width come first.
const FIRST: [&str; 6] = ["mean KL", "size", "Δ to fp16", "same top-1", "bits/weight", "readers"];

fn tables(comparison: &Comparison) -> Vec<Table> {
    let position = |column: &Column| FIRST.iter().position(|name| *name == column.name);
    let (mut first, mut second): (Vec<_>, Vec<_>) =
        columns(comparison).into_iter().partition(|column| position(column).is_some());
    first.sort_by_key(|column| position(column));
    // In sight without scrolling.
    second.sort_by_key(|column| column.name != "GPUs");
    vec![
        Table { title: "All models", id: "branches", columns: first },
        Table { title: "More figures, and how they were made", id: "more", columns: second },
    ]
}

fn row<'a>(comparison: &Comparison, index: usize, entry: &'a Entry) -> Row<'a> {
    Row {
        entry,
        number: index + 1,
        color: index % SERIES.len(),
        square: entry.run.is_none(),
        best: comparison.recommendation.as_ref().is_some_and(|r| r.take == index),
    }
}

fn heat(entry: &Entry, kinds: &Kinds, largest: f64) -> Option<Heat> {
    let picture = charts::heat_map(entry, kinds, largest)?;
    let mut layers: Vec<(usize, Vec<Cell>)> = Vec::new();
    for (layer, kind, error) in kinds.errors(entry) {
        if layers.last().is_none_or(|last| last.0 != layer) {
            layers.push((layer, kinds.names.iter().map(|_| none()).collect()));
        }
        if let Some((_, cells)) = layers.last_mut() {
            cells[kind] = number(4, error);
        }
    }
    Some(Heat { picture, layers })
}

fn text(comparison: &Comparison, position: usize) -> Text {
    let protocol = &comparison.protocols[position];
    let cells = |m: &EvaluatedModel| {
        vec![
            number(4, m.perplexity.value),
            change(m.perplexity_change),
            interval(6, m.kl_divergence),
            number(5, m.kl_p99),
            number(3, m.kl_max),
            Cell {
                text: format!("{:.2}%", m.top1_agreement.value * 100.0),
                sort: m.top1_agreement.value.to_string(),
            },
        ]
    };
    let rows = comparison
        .entries
        .iter()
        .filter_map(|e| Some((e.name.clone(), cells(e.measured[position].as_ref()?))))
        .collect();
    Text { title: protocol.title(), reference: format!("{:.4}", protocol.reference_perplexity), rows }
}

fn readers(comparison: &Comparison) -> Vec<Reader> {
    let mut readers: Vec<Reader> = Vec::new();
    let entries = &comparison.entries;
    for reader in entries.iter().flat_map(|e| &e.checkpoint.readers) {
        if readers.iter().any(|known| known.0 == reader.name) {
            continue;
        }
        let takes = entries.iter().map(|e| {
            let found = e.checkpoint.readers.iter().find(|r| r.name == reader.name);
            found.map_or_else(|| Some("not known".into()), |r| r.refused.clone())
        });
        readers.push((reader.name.clone(), takes.collect()));
    }
    readers
}
