//! Charts as SVG. The page's style sheet replaces each color (`[fill="#0072B2"]`) by one for a light or a dark background.

use std::{collections::BTreeMap, ops::Range};

use plotters::{
    coord::{Shift, types::RangedCoordf64},
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::{Comparison, Entry};

const INK: RGBColor = RGBColor(0x11, 0x11, 0x11);
const FAINT: RGBColor = RGBColor(0xDD, 0xDD, 0xDD);
const HEAT: RGBColor = RGBColor(0xC4, 0x4E, 0x00);
/// Colors of entries, which color-blind people can distinguish.
pub(super) const SERIES: [RGBColor; 8] = [
    RGBColor(0x00, 0x72, 0xB2),
    RGBColor(0xD5, 0x5E, 0x00),
    RGBColor(0x00, 0x9E, 0x73),
    RGBColor(0xCC, 0x79, 0xA7),
    RGBColor(0xE6, 0x9F, 0x00),
    RGBColor(0x56, 0xB4, 0xE9),
    RGBColor(0x99, 0x66, 0x33),
    RGBColor(0x77, 0x77, 0x77),
];

/// Width in pixels, small enough that letters stay legible on a phone.
const WIDTH: u32 = 460;
const LETTERS: u32 = 12;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'b, SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Letters of the longest name that fits below an axis.
const SHORT_NAME: usize = 6;

/// A chart, which has a title and a description for screen readers, its title, and what its labels mean, where that is not
/// plain.
pub(super) struct Picture {
    pub(super) svg: String,
    pub(super) title: String,
    pub(super) labels: String,
}

/// The kinds of linears in a layer, which are the rows of a heat map: those that the runs' reports name. All experts' linears
/// of one name are one kind.
pub(super) struct Kinds {
    /// Inside the layer, without numbers of experts: `mlp.experts.up_proj`.
    paths: Vec<String>,
    /// The shortest ends of the paths that differ, without `_proj`: `q`, `experts.up`.
    pub(super) names: Vec<String>,
    /// Whether a kind has several linears in a layer.
    pub(super) has_experts: bool,
}

impl Kinds {
    /// The kinds of linears of these entries, in the order in which they are solved.
    pub(super) fn new<'a>(entries: impl Iterator<Item = &'a Entry>) -> Self {
        let mut paths: Vec<String> = Vec::new();
        let mut has_experts = false;
        for linear in entries.flat_map(|entry| &entry.linears) {
            let Some((_, path)) = layer_and_kind(&linear.name) else { continue };
            has_experts |= !linear.name.ends_with(&path);
            if !paths.contains(&path) {
                paths.push(path);
            }
        }
        let end = |path: &str, parts: usize| {
            let all: Vec<&str> = path.split('.').collect();
            all[all.len().saturating_sub(parts)..].join(".")
        };
        let name = |path: &String| {
            let differs = |parts: &usize| {
                paths.iter().filter(|other| end(other, *parts) == end(path, *parts)).count() == 1
            };
            let parts = (1..=path.split('.').count()).find(differs);
            let name = parts.map_or_else(|| path.clone(), |parts| end(path, parts));
            name.strip_suffix("_proj").map_or(name.clone(), str::to_owned)
        };
        let names = paths.iter().map(name).collect();
        Self { paths, names, has_experts }
    }

    /// Layer and kind of a linear.
    fn place(&self, name: &str) -> Option<(usize, usize)> {
        let (layer, path) = layer_and_kind(name)?;
        Some((layer, self.paths.iter().position(|known| *known == path)?))
    }

    /// Layer, kind and mean relative error of the linears of an entry.
    pub(super) fn errors(&self, entry: &Entry) -> Vec<(usize, usize, f64)> {
        let mut sums: BTreeMap<(usize, usize), (f64, usize)> = BTreeMap::new();
        for linear in entry.linears.iter().filter(|linear| linear.relative_error.is_finite()) {
            let Some(place) = self.place(&linear.name) else { continue };
            let (sum, count) = sums.entry(place).or_default();
            *sum += linear.relative_error;
            *count += 1;
        }
        sums.into_iter().map(|((layer, kind), (sum, count))| (layer, kind, sum / count as f64)).collect()
    }
}

/// Layer of a linear, and its path in the layer without numbers of experts.
fn layer_and_kind(name: &str) -> Option<(usize, String)> {
    let (before, rest) = name.split_once("layers.")?;
    let (layer, path) = rest.split_once('.')?;
    let parts: Vec<&str> = path.split('.').filter(|part| part.parse::<usize>().is_err()).collect();
    (before.is_empty() || before.ends_with('.')).then_some((layer.parse().ok()?, parts.join(".")))
}

/// The KL axis is logarithmic where the largest divergence is at least this many times the smallest.
const LOGARITHMIC: f64 = 10.0;

/// A point of [`size_against_kl`].
struct Point<'a> {
    number: usize,
    entry: &'a Entry,
    /// Size in the chart's unit.
    size: f64,
    kl: f64,
    /// Ends of its 95% interval; the divergence itself where there is none.
    low: f64,
    high: f64,
}

/// Size against KL divergence with its 95% intervals, with a line through the entries that no other beats in both.
pub(super) fn size_against_kl(comparison: &Comparison) -> Option<Picture> {
    let entries = comparison.entries.iter().enumerate();
    let largest = comparison.entries.iter().filter(|e| e.kl().is_some()).map(|e| e.checkpoint.bytes).max()?;
    let (unit, name) = if largest >= 1_000_000_000 { (1e9, "GB") } else { (1e6, "MB") };
    let points: Vec<Point<'_>> = entries
        .filter_map(|(i, entry)| {
            let found = entry.main()?.kl_divergence;
            let (kl, margin) = (found.value, found.margin.filter(|m| m.is_finite()).unwrap_or(0.0));
            let size = entry.checkpoint.bytes as f64 / unit;
            let (low, high) = ((kl - margin).max(0.0), kl + margin);
            kl.is_finite().then_some(Point { number: i + 1, entry, size, kl, low, high })
        })
        .collect();
    let (least, most) = points.iter().fold((f64::INFINITY, 0.0), |(a, b), p| (p.kl.min(a), p.kl.max(b)));
    let is_logarithmic = least > 0.0 && most >= LOGARITHMIC * least;
    // An interval that reaches 0 has no end on a logarithmic axis: it is cut at a third of the smallest divergence.
    let y_of = |kl: f64| if is_logarithmic { kl.max(least / 3.0).log10() } else { kl };
    let (x0, x1) = range(points.iter().map(|p| p.size), 0.12)?;
    let (y0, y1) = range(points.iter().flat_map(|p| [y_of(p.low), y_of(p.high)]), 0.12)?;
    let y0 = if is_logarithmic { y0 } else { 0.0 };
    let title = "Size against KL divergence".to_owned();
    let describe = |p: &Point<'_>| {
        let kl = p.entry.main().map(|main| format!("{:.6}", main.kl_divergence)).unwrap_or_default();
        format!("{}: {}, {:.2} {name}, KL {kl}", p.number, p.entry.name, p.size)
    };
    let mut sentences: Vec<String> = points.iter().map(describe).collect();
    sentences.push("Lower and further left is better".into());
    draw(&title, &sentences.join(". "), 340, |root| {
        let x_name = format!("weights, {name}");
        let x_label = |x: &f64| format!("{x:.2}");
        let plain = plain_label(y1);
        let power = |y: &f64| significant(10f64.powf(*y));
        let y_name = if is_logarithmic { "mean KL to fp16, logarithmic" } else { "mean KL to fp16" };
        let y_label: Label<'_> = if is_logarithmic { &power } else { &plain };
        let mut chart = axes(root, (x0..x1, &x_name, 6, &x_label), (y0..y1, y_name, y_label))?;
        let pareto = points.iter().filter(|p| p.entry.pareto);
        let mut line: Vec<(f64, f64)> = pareto.map(|p| (p.size, y_of(p.kl))).collect();
        line.sort_by(|a, b| a.0.total_cmp(&b.0));
        chart.draw_series(LineSeries::new(line, INK.mix(0.5).stroke_width(2)))?;
        for p in &points {
            let (x, y, color) = (p.size, y_of(p.kl), series(p.number - 1));
            let ends = [(x, y_of(p.low)), (x, y_of(p.high))];
            chart.draw_series([PathElement::new(ends, color.stroke_width(2))])?;
            for end in ends {
                let cap = PathElement::new([(-4, 0), (4, 0)], color.stroke_width(2));
                chart.draw_series([EmptyElement::at(end) + cap])?;
            }
            // Branches of runs are round, checkpoints of other tools square.
            if p.entry.run.is_some() {
                chart.draw_series([Circle::new((x, y), 6, color.filled())])?;
            } else {
                let square = Rectangle::new([(-5, -5), (5, 5)], color.filled());
                chart.draw_series([EmptyElement::at((x, y)) + square])?;
            }
        }
        let pixels = |p: &Point<'_>| {
            let (x, y) = ((p.size - x0) / (x1 - x0), (y_of(p.kl) - y0) / (y1 - y0));
            (x * f64::from(WIDTH), -y * 300.0)
        };
        let mut taken: Vec<(f64, f64)> = points.iter().map(pixels).collect();
        for p in &points {
            let place = free_place(pixels(p), &mut taken);
            let text = Text::new(p.number.to_string(), place, letters(HPos::Center, VPos::Center, 13));
            chart.draw_series([EmptyElement::at((p.size, y_of(p.kl))) + text])?;
        }
        Ok(())
    })
}

/// A number above 0 with two significant digits: `0.0032`.
fn significant(value: f64) -> String {
    let digits = (1.0 - value.max(1e-12).log10().floor()).clamp(0.0, 12.0) as usize;
    format!("{value:.digits$}")
}

/// Mean relative error of each layer, one line for each entry.
pub(super) fn error_by_layer(entries: &[(usize, &Entry)], kinds: &Kinds) -> Option<Picture> {
    let lines = lines(entries, kinds, |place| place.0);
    let layers = lines.iter().filter_map(|(_, _, means)| means.len().checked_sub(1)).max()?;
    let names: Vec<String> = (0..=layers).map(|layer| layer.to_string()).collect();
    error_lines("Relative error by layer", "layer", &names, &names, &lines)
}

/// Mean relative error of each kind of linears, one line for each entry.
pub(super) fn error_by_linear(entries: &[(usize, &Entry)], kinds: &Kinds) -> Option<Picture> {
    let lines = lines(entries, kinds, |place| place.1);
    let (title, names) = ("Relative error by linear", &kinds.names);
    if names.iter().all(|name| name.len() <= SHORT_NAME) {
        return error_lines(title, "linear", names, names, &lines);
    }
    let numbers: Vec<String> = (1..=names.len()).map(|number| number.to_string()).collect();
    let picture = error_lines(title, "linear", names, &numbers, &lines)?;
    let labels: Vec<String> =
        numbers.iter().zip(names).map(|(number, name)| format!("{number} {name}")).collect();
    Some(Picture { labels: labels.join(", "), ..picture })
}

/// An entry, its position, and a value for each position on the x axis.
type Line<'a> = (usize, &'a Entry, Vec<f64>);

/// Means of the relative error of each entry over the linears at the same position.
fn lines<'a>(
    entries: &[(usize, &'a Entry)],
    kinds: &Kinds,
    position: fn((usize, usize)) -> usize,
) -> Vec<Line<'a>> {
    let lines = entries.iter().map(|&(i, entry)| (i, entry, by(entry, kinds, position)));
    lines.filter(|line| !line.2.is_empty()).collect()
}

/// The lines over positions on the x axis: `names` are those of the description, `labels` those below the axis.
fn error_lines(
    title: &str,
    x_name: &str,
    names: &[String],
    labels: &[String],
    lines: &[Line<'_>],
) -> Option<Picture> {
    let (_, y1) = range(lines.iter().flat_map(|l| l.2.iter().copied()).filter(|v| v.is_finite()), 0.15)?;
    let describe = |(_, entry, means): &Line<'_>| {
        let of = |order: fn(&f64, &f64) -> std::cmp::Ordering| {
            let found = means.iter().enumerate().max_by(|a, b| order(a.1, b.1));
            found.map_or_else(String::new, |(i, v)| format!("{v:.4} at {x_name} {}", names[i]))
        };
        format!("{}: from {} to {}", entry.name, of(|a, b| b.total_cmp(a)), of(f64::total_cmp))
    };
    let description = lines.iter().map(describe).collect::<Vec<_>>().join(". ");
    draw(title, &description, 300, |root| {
        let right = (names.len().max(2) - 1) as f64;
        // At most 12 labels fit.
        let count = names.len().clamp(2, 12);
        let label = |x: &f64| match labels.get(x.round() as usize) {
            Some(name) if (x - x.round()).abs() < 1e-6 => name.clone(),
            _ => String::new(),
        };
        let y_label = plain_label(y1);
        let (x, y) = (
            (0.0..right, x_name, count, &label as Label<'_>),
            (0.0..y1, "mean relative error", &y_label as _),
        );
        let mut chart = axes(root, x, y)?;
        for (i, _, means) in lines {
            let points: Vec<(f64, f64)> = means.iter().enumerate().map(|(l, &e)| (l as f64, e)).collect();
            let color = series(*i);
            chart.draw_series(LineSeries::new(points.clone(), color.stroke_width(2)))?;
            if names.len() <= 40 {
                chart.draw_series(points.into_iter().map(|point| Circle::new(point, 3, color.filled())))?;
            }
        }
        Ok(())
    })
}

/// Relative error of every linear of one entry; an error of `largest` has the full color.
pub(super) fn heat_map(entry: &Entry, kinds: &Kinds, largest: f64) -> Option<Picture> {
    let cells = kinds.errors(entry);
    let layers = cells.iter().map(|cell| cell.0 + 1).max()?;
    let worst = cells.iter().max_by(|a, b| a.2.total_cmp(&b.2))?;
    let title = format!("{}: relative error of every linear", entry.name);
    let description = format!(
        "{layers} layers from left to right, from top to bottom {}. The largest is {:.4}, {} of layer {}",
        kinds.names.join(", "),
        worst.2,
        kinds.names[worst.1],
        worst.0
    );
    const ROW: i32 = 22;
    let longest = kinds.names.iter().map(String::len).max()?;
    let left = 16 + 7 * longest.min(24) as i32;
    let bottom = ROW * kinds.names.len() as i32;
    draw(&title, &description, (bottom + 22) as u32, |root| {
        let width = f64::from(WIDTH as i32 - left - 4) / layers as f64;
        let x = |layer: usize| left + (layer as f64 * width).round() as i32;
        for (row, name) in kinds.names.iter().enumerate() {
            let at = (left - 6, ROW * row as i32 + ROW / 2);
            root.draw(&Text::new(name.clone(), at, letters(HPos::Right, VPos::Center, LETTERS)))?;
        }
        for &(layer, row, error) in &cells {
            let top = ROW * row as i32;
            let corners = [(x(layer), top), (x(layer + 1) - 1, top + ROW - 1)];
            // The background color would look like a missing value.
            let strength = 0.08 + 0.82 * (error / largest).clamp(0.0, 1.0);
            root.draw(&Rectangle::new(corners, HEAT.mix(strength).filled()))?;
            if width >= 38.0 {
                let middle = ((corners[0].0 + corners[1].0) / 2, top + ROW / 2);
                let text = format!("{error:.3}");
                root.draw(&Text::new(text, middle, letters(HPos::Center, VPos::Center, LETTERS - 1)))?;
            }
        }
        let every = layers.div_ceil(12);
        for layer in (0..layers).step_by(every) {
            let at = ((x(layer) + x(layer + 1)) / 2, bottom + 10);
            root.draw(&Text::new(layer.to_string(), at, letters(HPos::Center, VPos::Center, LETTERS)))?;
        }
        Ok(())
    })
}

/// The color of an entry.
pub(super) fn series(index: usize) -> RGBColor {
    SERIES[index % SERIES.len()]
}

/// Means of the relative error over all linears at the same position.
fn by(entry: &Entry, kinds: &Kinds, position: fn((usize, usize)) -> usize) -> Vec<f64> {
    let mut sums: Vec<(f64, usize)> = Vec::new();
    for linear in &entry.linears {
        let Some(position) = kinds.place(&linear.name).map(position) else { continue };
        // Layer numbers come from a file: larger ones would need much memory.
        if position >= entry.linears.len() || !linear.relative_error.is_finite() {
            continue;
        }
        if sums.len() <= position {
            sums.resize(position + 1, (0.0, 0));
        }
        sums[position].0 += linear.relative_error;
        sums[position].1 += 1;
    }
    sums.into_iter().map(|(sum, count)| sum / count.max(1) as f64).collect()
}

/// Offset of a number from its point at which it covers no other number and no point, in pixels. `taken` has all points.
fn free_place((x, y): (f64, f64), taken: &mut Vec<(f64, f64)>) -> (i32, i32) {
    let candidates = [(13, -9), (13, 11), (-13, -9), (-13, 11), (0, -16), (0, 18), (26, 0), (-26, 0)];
    let free = |(dx, dy): (i32, i32)| {
        let at = (x + f64::from(dx), y + f64::from(dy));
        taken.iter().all(|t| (t.0 - at.0).abs() > 12.0 || (t.1 - at.1).abs() > 14.0)
    };
    let place = candidates.into_iter().find(|c| free(*c)).unwrap_or(candidates[0]);
    taken.push((x + f64::from(place.0), y + f64::from(place.1)));
    place
}

/// Smallest and largest value with some room on both sides; none where there are no values.
fn range(values: impl Iterator<Item = f64>, room: f64) -> Option<(f64, f64)> {
    let (min, max) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
    let width = if max > min { max - min } else { max.abs().max(1e-9) };
    (min.is_finite() && max.is_finite()).then_some((min - room * width, max + room * width))
}

/// Text for a value on an axis.
type Label<'a> = &'a dyn Fn(&f64) -> String;

/// Numbers with as many decimals as an axis up to `largest` needs.
fn plain_label(largest: f64) -> impl Fn(&f64) -> String {
    let digits = (2.0 - largest.abs().max(1e-12).log10().floor()).clamp(0.0, 8.0) as usize;
    move |value| format!("{value:.digits$}")
}

/// Axes with their names, labels, and of x their number.
fn axes<'a, 'b>(
    root: &'b Area<'a>,
    (x, x_name, x_labels, x_label): (Range<f64>, &str, usize, Label<'_>),
    (y, y_name, y_label): (Range<f64>, &str, Label<'_>),
) -> Result<Chart<'a, 'b>, Box<dyn std::error::Error>> {
    let mut chart = ChartBuilder::on(root)
        .margin(6)
        .margin_right(14)
        .x_label_area_size(40)
        .y_label_area_size(76)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(INK.mix(0.6))
        .x_labels(x_labels)
        .y_labels(6)
        .x_label_formatter(&x_label)
        .y_label_formatter(&y_label)
        .x_desc(x_name)
        .y_desc(y_name)
        .label_style(("sans-serif", LETTERS).into_font().color(&INK))
        .axis_desc_style(("sans-serif", LETTERS).into_font().color(&INK))
        .draw()?;
    Ok(chart)
}

fn letters(horizontal: HPos, vertical: VPos, size: u32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&INK).pos(Pos::new(horizontal, vertical))
}

/// Draws a chart with a title and a description. None where drawing fails, which no text can cause.
fn draw(
    title: &str,
    description: &str,
    height: u32,
    paint: impl FnOnce(&Area<'_>) -> Drawn,
) -> Option<Picture> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        paint(&root).ok()?;
        root.present().ok()?;
    }
    let (tag, rest) = svg.split_at_checked(svg.find('>')? + 1)?;
    let name = format!("<title>{}</title><desc>{}.</desc>", escaped(title), escaped(description));
    let tag = tag.replacen("<svg", "<svg role=\"img\" class=\"chart\"", 1);
    Some(Picture { svg: format!("{tag}\n{name}{rest}"), title: title.to_owned(), labels: String::new() })
}

/// Escapes text between tags.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_linears_come_from_their_names() {
        for (name, place) in [
            ("model.layers.3.self_attn.q_proj", Some((3, "self_attn.q_proj"))),
            ("language_model.model.layers.0.mlp.gate_up_proj", Some((0, "mlp.gate_up_proj"))),
            ("model.layers.12.block_sparse_moe.experts.7.w1", Some((12, "block_sparse_moe.experts.w1"))),
            ("model.layers.x.q_proj", None),
            ("lm_head", None),
        ] {
            assert_eq!(layer_and_kind(name), place.map(|(layer, path)| (layer, path.to_owned())), "{name}");
        }
    }

    #[test]
    fn labels_of_a_logarithmic_axis_have_two_digits() {
        assert_eq!([0.00316, 0.1, 1.0, 31.6].map(significant), ["0.0032", "0.10", "1.0", "32"]);
    }
}
