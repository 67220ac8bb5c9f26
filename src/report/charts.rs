//! Charts as SVG. The page's style sheet replaces each color (`[fill="#0072B2"]`) by one for a light or a dark background.

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

/// The linears of a layer by the end of their names, which are the rows of a heat map.
pub(super) const LINEARS: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// A chart, which has a title and a description for screen readers, and its title.
pub(super) struct Picture {
    pub(super) svg: String,
    pub(super) title: String,
}

/// Layer and row of [`LINEARS`] of a linear.
pub(super) fn place(name: &str) -> Option<(usize, usize)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let row = LINEARS.iter().position(|linear| rest.ends_with(linear))?;
    Some((layer.parse().ok()?, row))
}

/// Size against KL divergence, with a line through the entries that no other beats in both.
pub(super) fn size_against_kl(comparison: &Comparison) -> Option<Picture> {
    let points: Vec<(usize, &Entry, f64, f64)> = comparison
        .entries
        .iter()
        .enumerate()
        .filter_map(|(i, e)| Some((i, e, e.checkpoint.bytes as f64, e.kl().filter(|kl| kl.is_finite())?)))
        .collect();
    let largest = points.iter().map(|p| p.2).fold(f64::NAN, f64::max);
    let (unit, name) = if largest >= 1e9 { (1e9, "GB") } else { (1e6, "MB") };
    let points: Vec<_> = points.into_iter().map(|(i, e, bytes, kl)| (i, e, bytes / unit, kl)).collect();
    let (x0, x1) = range(points.iter().map(|p| p.2), 0.12)?;
    let (_, y1) = range(points.iter().map(|p| p.3), 0.2)?;
    let title = "Size against KL divergence".to_owned();
    let mut sentences: Vec<String> = points
        .iter()
        .map(|(i, e, size, kl)| format!("{}: {}, {size:.2} {name}, KL {kl:.6}", i + 1, e.name))
        .collect();
    sentences.push("Lower and further left is better".into());
    draw(&title, &sentences.join(". "), 340, |root| {
        let mut chart = axes(
            root,
            x0..x1,
            0.0..y1,
            &format!("weights, {name}"),
            "mean KL to fp16",
            (6, &|x| format!("{x:.2}")),
        )?;
        let mut line: Vec<(f64, f64)> = points.iter().filter(|p| p.1.pareto).map(|p| (p.2, p.3)).collect();
        line.sort_by(|a, b| a.0.total_cmp(&b.0));
        chart.draw_series(LineSeries::new(line, INK.mix(0.5).stroke_width(2)))?;
        let mut taken: Vec<(f64, f64)> = Vec::new();
        for (i, entry, x, y) in &points {
            let style = series(*i).filled();
            // Branches of runs are round, checkpoints of other tools square.
            if entry.run.is_some() {
                chart.draw_series([Circle::new((*x, *y), 6, style)])?;
            } else {
                let square = Rectangle::new([(-5, -5), (5, 5)], style);
                chart.draw_series([EmptyElement::at((*x, *y)) + square])?;
            }
            let place = free_place((*x - x0) / (x1 - x0), *y / y1, &mut taken);
            let text = Text::new((i + 1).to_string(), place, letters(HPos::Center, VPos::Center, 13));
            chart.draw_series([EmptyElement::at((*x, *y)) + text])?;
        }
        Ok(())
    })
}

/// Mean relative error of each layer, one line for each entry.
pub(super) fn error_by_layer(entries: &[(usize, &Entry)]) -> Option<Picture> {
    let layers = entries.iter().filter_map(|(_, e)| by(e, |place| place.0).len().checked_sub(1)).max()?;
    let names: Vec<String> = (0..=layers).map(|layer| layer.to_string()).collect();
    error_lines("Relative error by layer", "layer", &names, entries, |place| place.0)
}

/// Mean relative error of each of [`LINEARS`], one line for each entry.
pub(super) fn error_by_linear(entries: &[(usize, &Entry)]) -> Option<Picture> {
    let names = LINEARS.map(|name| name.trim_end_matches("_proj").to_owned());
    error_lines("Relative error by linear", "linear", &names, entries, |place| place.1)
}

/// One line for each entry over positions on the x axis: `position` maps a linear's place to one, `names` are their labels.
fn error_lines(
    title: &str,
    x_name: &str,
    names: &[String],
    entries: &[(usize, &Entry)],
    position: fn((usize, usize)) -> usize,
) -> Option<Picture> {
    let lines: Vec<(usize, &Entry, Vec<f64>)> =
        entries.iter().map(|&(i, e)| (i, e, by(e, position))).filter(|l| !l.2.is_empty()).collect();
    let (_, y1) = range(lines.iter().flat_map(|l| l.2.iter().copied()).filter(|v| v.is_finite()), 0.15)?;
    let describe = |(_, entry, means): &(usize, &Entry, Vec<f64>)| {
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
        let label = |x: &f64| match names.get(x.round() as usize) {
            Some(name) if (x - x.round()).abs() < 1e-6 => name.clone(),
            _ => String::new(),
        };
        let mut chart = axes(root, 0.0..right, 0.0..y1, x_name, "mean relative error", (count, &label))?;
        for (i, _, means) in &lines {
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
pub(super) fn heat_map(entry: &Entry, largest: f64) -> Option<Picture> {
    let cells: Vec<(usize, usize, f64)> = entry
        .linears
        .iter()
        .filter_map(|l| place(&l.name).map(|(layer, row)| (layer, row, l.relative_error)))
        .filter(|cell| cell.2.is_finite())
        .collect();
    let layers = cells.iter().map(|cell| cell.0 + 1).max()?;
    let worst = cells.iter().max_by(|a, b| a.2.total_cmp(&b.2))?;
    let title = format!("{}: relative error of every linear", entry.name);
    let description = format!(
        "{layers} layers from left to right, from top to bottom {}. The largest is {:.4}, {} of layer {}",
        LINEARS.map(|l| l.trim_end_matches("_proj")).join(", "),
        worst.2,
        LINEARS[worst.1],
        worst.0
    );
    const LEFT: i32 = 44;
    const ROW: i32 = 22;
    let height = (ROW * 7 + 22) as u32;
    draw(&title, &description, height, |root| {
        let width = f64::from(WIDTH as i32 - LEFT - 4) / layers as f64;
        let x = |layer: usize| LEFT + (layer as f64 * width).round() as i32;
        for (row, linear) in LINEARS.iter().enumerate() {
            let at = (LEFT - 6, ROW * row as i32 + ROW / 2);
            let name = linear.trim_end_matches("_proj").to_owned();
            root.draw(&Text::new(name, at, letters(HPos::Right, VPos::Center, LETTERS)))?;
        }
        for &(layer, row, error) in &cells {
            let top = ROW * row as i32;
            let corners = [(x(layer), top), (x(layer + 1) - 1, top + ROW - 1)];
            // The background color would look like a missing value.
            let strength = 0.08 + 0.82 * (error / largest).clamp(0.0, 1.0);
            root.draw(&Rectangle::new(corners, HEAT.mix(strength).filled()))?;
            if layers <= 10 {
                let middle = ((corners[0].0 + corners[1].0) / 2, top + ROW / 2);
                let text = format!("{error:.3}");
                root.draw(&Text::new(text, middle, letters(HPos::Center, VPos::Center, LETTERS - 1)))?;
            }
        }
        let every = layers.div_ceil(12);
        for layer in (0..layers).step_by(every) {
            let at = ((x(layer) + x(layer + 1)) / 2, ROW * 7 + 10);
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
fn by(entry: &Entry, position: fn((usize, usize)) -> usize) -> Vec<f64> {
    let mut sums: Vec<(f64, usize)> = Vec::new();
    for linear in &entry.linears {
        let Some(position) = place(&linear.name).map(position) else { continue };
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

/// Offset of a number from its point, pixels, at which it covers no other; `x` and `y` from 0 to 1.
fn free_place(x: f64, y: f64, taken: &mut Vec<(f64, f64)>) -> (i32, i32) {
    let (x, y) = (x * f64::from(WIDTH), -y * 300.0);
    let candidates = [(13, -9), (13, 11), (-13, -9), (-13, 11), (0, -16), (0, 18), (26, 0), (-26, 0)];
    let free = |(dx, dy): (i32, i32)| {
        let at = (x + f64::from(dx), y + f64::from(dy));
        taken.iter().all(|t| (t.0 - at.0).abs() > 12.0 || (t.1 - at.1).abs() > 14.0)
    };
    let place = candidates.into_iter().find(|c| free(*c)).unwrap_or(candidates[0]);
    taken.extend([(x + f64::from(place.0), y + f64::from(place.1)), (x, y)]);
    place
}

/// Smallest and largest value with some room on both sides; none where there are no values.
fn range(values: impl Iterator<Item = f64>, room: f64) -> Option<(f64, f64)> {
    let (min, max) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
    let width = if max > min { max - min } else { max.abs().max(1e-9) };
    (min.is_finite() && max.is_finite()).then_some((min - room * width, max + room * width))
}

fn axes<'a, 'b>(
    root: &'b Area<'a>,
    x: std::ops::Range<f64>,
    y: std::ops::Range<f64>,
    x_name: &str,
    y_name: &str,
    (x_labels, x_label): (usize, &dyn Fn(&f64) -> String),
) -> Result<Chart<'a, 'b>, Box<dyn std::error::Error>> {
    let digits = (2.0 - y.end.abs().max(1e-12).log10().floor()).clamp(0.0, 8.0) as usize;
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
        .y_label_formatter(&|v| format!("{v:.digits$}"))
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
    Some(Picture { svg: format!("{tag}\n{name}{rest}"), title: title.to_owned() })
}

/// Escapes text between tags.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
