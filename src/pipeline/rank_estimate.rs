//! What the ranks of a run do and exchange in a layer, from shapes alone.

use tch::Device;

use super::{
    estimate::{FP32, Shape},
    phases::{part_of_tokens, shape_of, sums_products},
    shared_rows::{TILE, WORTH_SHARING, ranks_of, spread_experts},
    solution_message::{Format, linear_bytes},
};
use crate::{
    architectures::{GroupConfig, LayerConfig, StageConfig},
    cluster::{message, split},
    emit::linear_type,
    gptq::{Hessian, output_blocks},
    variant::Output,
};

/// Bytes of a number in a message.
const NUMBER: f64 = message::NUMBER as f64;
/// Bytes of the report of an expert's linear, about.
const REPORT: f64 = 350.0;

/// What ranks exchange in a layer.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Exchange {
    /// Bytes of the rank that sends the most.
    pub(super) sent: f64,
    /// How often all ranks wait for each other.
    pub(super) barriers: f64,
}

/// A linear that is solved.
struct Solved {
    rows: usize,
    columns: usize,
    format: Format,
}

impl Solved {
    /// Bytes of some rows in a message: their error, a count, and the linear.
    fn bytes(&self, rows: usize) -> f64 {
        2.0 * NUMBER + linear_bytes(rows, self.columns, self.format) as f64
    }
}

impl Shape<'_> {
    /// The part of a group's work that the rank with the most does, and of the solves in that part: an expert is solved by one rank, the
    /// rows of other groups by all.
    pub(super) fn solving_shares(
        &self,
        layer: &LayerConfig,
        stage: &StageConfig,
        group: &GroupConfig,
        ranks: usize,
    ) -> (f64, f64) {
        let experts = spread_experts(layer, stage, ranks);
        if group.expert.is_some() && experts > 0 {
            return (experts.div_ceil(ranks) as f64 / experts as f64, 1.0);
        }
        let (n, k) = shape_of(layer, group);
        if n * k < WORTH_SHARING as f64 {
            return (1.0, 1.0);
        }
        if self.gradient_windows == 0 {
            return (1.0, 1.0 / ranks as f64);
        }
        let linears = &layer.linears[group.linears.clone()];
        let blocks: Vec<usize> = linears.iter().flat_map(|linear| output_blocks(linear.shape[0])).collect();
        let given = ranks_of(&blocks, ranks);
        let rows = |rank: usize| {
            blocks.iter().zip(&given).filter(|(_, own)| **own == rank).map(|(rows, _)| rows).sum()
        };
        let most: usize = (0..ranks).map(rows).max().unwrap_or(0);
        (1.0, most as f64 / n)
    }

    /// What so many ranks exchange in a layer, on the average.
    pub(super) fn exchange(&self, ranks: usize) -> Exchange {
        let layers = self.config.num_layers();
        let all = (0..layers).map(|layer| self.exchange_in(layer, ranks));
        let sum = all.fold(Exchange::default(), |a, b| Exchange {
            sent: a.sent + b.sent,
            barriers: a.barriers + b.barriers,
        });
        Exchange { sent: sum.sent / layers as f64, barriers: sum.barriers / layers as f64 }
    }

    /// What so many ranks exchange in one layer: sums that a rank continues, complete sums that it passes on, and solved linears.
    pub(super) fn exchange_in(&self, layer: usize, ranks: usize) -> Exchange {
        let mut exchange = Exchange::default();
        if ranks == 1 {
            return exchange;
        }
        let of_branches: Vec<Output> = self.outputs.iter().copied().filter(|o| o.gptq().is_some()).collect();
        let (branches, kinds) = (of_branches.len(), self.kinds.of_outputs(&of_branches).len());
        let streams = if self.shared_hessian { 1 } else { self.outputs.len() };
        // Complete sums come from the last rank, and the rank before it does not pass them on.
        let times = if ranks == 2 { 1.0 } else { 2.0 };
        let config = &self.config.layers[layer];
        for (position, stage) in config.stages.iter().enumerate() {
            // Before the first layer all branches of a kind have the same hidden states, without a reference model's beside them.
            let first = layer == 0 && position == 0 && !self.shared_hessian && branches > 0;
            let (alone, others) = if first { (kinds, streams - branches) } else { (0, streams) };
            let sums = |reference: bool| {
                let groups = stage.groups.iter().map(|group| self.sums(config, group, reference) + NUMBER);
                groups.sum::<f64>()
            };
            exchange.sent += times * (alone as f64 * sums(false) + others as f64 * sums(self.reference));
            let experts = spread_experts(config, stage, ranks);
            exchange.barriers += ((alone + others) * (1 + experts.div_ceil(ranks))) as f64;
            for group in &stage.groups {
                let spread = group.expert.is_some() && experts > 0;
                for linears in self.outputs.iter().flat_map(|output| self.formats(layer, group, output)) {
                    if spread {
                        let of_linear = |linear: &Solved| linear.bytes(linear.rows) + REPORT;
                        let bytes = linears.iter().map(of_linear).sum::<f64>();
                        exchange.sent += bytes * (1.0 - 1.0 / ranks as f64);
                    } else if linears.iter().map(|linear| linear.rows * linear.columns).sum::<usize>()
                        >= WORTH_SHARING
                    {
                        // A rank sends the parts of all ranks but that of the next one.
                        let parts = self.parts(&linears, ranks);
                        let least = parts.iter().copied().fold(f64::INFINITY, f64::min);
                        exchange.sent += parts.iter().sum::<f64>() - least;
                        exchange.barriers += 1.0;
                    }
                }
            }
        }
        if layer + 1 < self.config.num_layers() {
            // The files of the hidden states behind the layer.
            exchange.barriers += 1.0;
        }
        exchange
    }

    /// Bytes of a group's sums: the triangle of the Hessian in whole blocks, and the cross-covariance.
    fn sums(&self, layer: &LayerConfig, group: &GroupConfig, reference: bool) -> f64 {
        let (n, k) = shape_of(layer, group);
        let cross_covariance = match reference {
            true if sums_products(n, k) => n * k,
            true => k * k,
            false => 0.0,
        };
        let hessian = Hessian::values_in_blocks(group.width, self.kinds.usual, Device::Cpu) as f64;
        (hessian + cross_covariance) * FP32 as f64
    }

    /// Bytes of each rank's part of linears that ranks solve together: rows, or with output Hessians blocks of them.
    fn parts(&self, linears: &[Solved], ranks: usize) -> Vec<f64> {
        let mut parts = vec![0.0; ranks];
        if self.gradient_windows > 0 {
            let blocks = linears.iter().flat_map(|linear| {
                output_blocks(linear.rows).into_iter().map(move |rows| (rows, linear.bytes(rows)))
            });
            let (rows, bytes): (Vec<usize>, Vec<f64>) = blocks.unzip();
            ranks_of(&rows, ranks).into_iter().zip(bytes).for_each(|(rank, bytes)| parts[rank] += bytes);
            return parts;
        }
        for linear in linears {
            let tiles = split(linear.rows.div_ceil(TILE), ranks);
            for (part, tiles) in parts.iter_mut().zip(tiles) {
                let rows = (tiles.end * TILE).min(linear.rows) - (tiles.start * TILE).min(linear.rows);
                *part += NUMBER + if rows > 0 { linear.bytes(rows) } else { 0.0 };
            }
        }
        parts
    }

    /// A group's linears as they are solved for an output, those of one format together.
    fn formats(&self, layer: usize, group: &GroupConfig, output: &Output) -> Vec<Vec<Solved>> {
        let mut formats: Vec<Vec<Solved>> = Vec::new();
        for position in group.linears.clone() {
            let [rows, columns] = self.config.layers[layer].linears[position].shape;
            let format = match *output {
                Output::Gptq(variant) => Format::Gptq { groups: variant.group_size.groups(columns) },
                Output::Gguf(mix) => {
                    let id = self.config.linear_id(layer, position);
                    // The plan's check finds linears that have no type.
                    let Ok(kind) = linear_type(mix, self.config, &id, columns) else { continue };
                    Format::Blocks(kind)
                }
            };
            let linear = Solved { rows, columns, format };
            match formats.iter_mut().find(|others| others[0].format == format) {
                Some(others) => others.push(linear),
                None => formats.push(vec![linear]),
            }
        }
        formats
    }

    /// Bytes that a rank of several keeps until the sums of the ranks before arrive. They are the inputs of a stage on this rank's
    /// windows, their factors in the products, and sums that are not sent yet.
    pub(super) fn kept_for_sums(&self) -> u64 {
        if self.ranks == 1 {
            return 0;
        }
        let of_group = |layer: &LayerConfig, group: &GroupConfig| {
            let (n, k) = shape_of(layer, group);
            let difference = if self.reference { n.min(k) } else { 0.0 };
            let part = part_of_tokens(layer, group);
            let sums = k * k / 2.0 + if self.reference { k * n.min(k) } else { 0.0 };
            self.of_tokens((part * (k + difference)) as u64).saturating_add(sums as u64 * FP32)
        };
        let layers = self.config.layers.iter();
        let stages = layers.flat_map(|layer| layer.stages.iter().map(move |stage| (layer, stage)));
        let of_stage = |(layer, stage): (&LayerConfig, &StageConfig)| {
            stage.groups.iter().map(|group| of_group(layer, group)).sum::<u64>()
        };
        stages.map(of_stage).max().unwrap_or(0)
    }
}
