//! Memory, disk and time that a run needs: shown to the user, and refused before any work where they do not fit.

use std::{fmt, fs, path::Path};

use tch::{Device, Kind};

use super::{
    compute_kinds::ComputeKinds,
    estimate::{Shape, Work},
    journal::{self, Begun},
    memory::Limits,
    output_folder::Place,
    output_format::{Job, format_of},
    rank_estimate::Exchange,
};
use crate::{
    accuracy::ScaleSearch,
    amx,
    architectures::ModelConfig,
    checkpoint::Checkpoint,
    cluster::Cluster,
    cuda::Gpu,
    device,
    error::{ResourceError, Result},
    machine::{available_memory, peak_memory, require_space, resident_memory, return_free_memory},
    model::source_kind,
    plan::Plan,
    rotation::rotated_bytes,
    units::{bytes, duration},
};

/// Operations of a run below which its time is not estimated: they take seconds.
const WORTH_ESTIMATING: f64 = 1e12;
/// Time of gradients over the time of their matrix products, without a matrix unit and with one.
const BESIDE_PRODUCTS: [f64; 2] = [2.0, 3.1];

/// Numbers of ranks that a run's time is estimated for.
const RANKS: [usize; 5] = [1, 2, 4, 8, 16];
/// Blocks of rows that a sum is continued in, about: the last rank begins that much later for each rank before it.
const ROW_BLOCKS: f64 = 24.0;

/// A layer in a run of so many processes.
#[derive(Debug, Clone, Copy, Default)]
struct OfRanks {
    ranks: usize,
    /// Of the rank that has the most.
    work: Work,
    exchange: Exchange,
}

/// Needs of a run.
#[derive(Debug, Clone)]
pub(super) struct Needs {
    /// Of forward passes.
    pub(super) kinds: ComputeKinds,
    /// Memory for activations.
    pub(super) limits: Limits,
    /// Windows that gradients are taken on at a time.
    pub(super) gradients_at_once: usize,
    device: Device,
    /// At most, in the memory of the device, or of the machine where that is the CPU.
    memory: u64,
    /// Activations that do not fit it.
    elsewhere: u64,
    disk: DiskNeed,
    /// Of the processes of the run.
    own: OfRanks,
    /// Of each of [`RANKS`].
    of_ranks: [OfRanks; RANKS.len()],
    /// What the processes of the run exchange in each layer.
    exchanges: Vec<Exchange>,
    /// Floating-point operations of the gradients that are still to be taken.
    pub(super) gradient_operations: f64,
}

impl Needs {
    /// `rotates` is whether the run still has to rotate the model; behind that the rotated model is on the disk. `later` are bytes
    /// that the program will take before the work begins.
    ///
    /// # Errors
    /// When it does not fit.
    pub(super) fn of(
        plan: &Plan,
        checkpoint: &Checkpoint,
        place: &Place<'_>,
        cluster: &Cluster,
        rotates: bool,
        later: u64,
    ) -> Result<Self> {
        let device = device::resolve_all(&plan.device)?[0].device;
        let (source, config) = (source_kind(checkpoint)?, checkpoint.config());
        let kinds = ComputeKinds::of(plan, checkpoint, device)?;
        let accuracy = plan.accuracy(config);
        let source = if accuracy.rotate { Kind::Float } else { source };
        let shape = Shape {
            config,
            source_bytes: source.elt_size_in_bytes() as u64,
            kinds,
            windows: plan.samples.div_ceil(cluster.ranks()),
            ranks: cluster.ranks(),
            seq_len: plan.seq_len,
            outputs: &plan.variants,
            shared_hessian: plan.shared_hessian,
            reference: accuracy.runs_reference(),
            gradient_windows: accuracy.gradient_windows(plan.samples),
            rotates,
            searches: accuracy.scales.search != ScaleSearch::Off,
            matrix_unit: amx::available(),
            bf16_products: amx::has_bf16_products(),
        };
        let device_memory = match (device, plan.max_device_memory) {
            (Device::Cpu, _) => None,
            (_, Some(limit)) => Some(limit),
            // Other programs may take some too, and a heap has holes.
            (_, None) => Some(Gpu::of(device)?.memory()?.free as u64 / 10 * 9),
        };
        // Rotating leaves buffers free that the allocator would keep.
        return_free_memory();
        let base = resident_memory().unwrap_or(0).saturating_add(later);
        let limits = shape.limits(device, device_memory, plan.max_memory, base)?;
        let need = shape.need(device, limits.batch_tokens);
        // What leaves a CUDA device goes to memory first.
        let (own, first, second) = match device {
            Device::Cpu => (base, limits.in_memory, Some(0)),
            _ => (0, limits.on_device, limits.in_memory),
        };
        let held = need.activations.min(first.unwrap_or(u64::MAX));
        let elsewhere = need.activations - held;
        let spilled = elsewhere.saturating_sub(second.unwrap_or(u64::MAX));
        let on_host = match device {
            Device::Cpu => need.working.saturating_add(held),
            _ => shape.host_beside_cuda().saturating_add(elsewhere - spilled),
        };
        let available = available_memory().map(|bytes| bytes / cluster.ranks_here() as u64);
        fits_machine(available, on_host, &shape, device, base, plan)?;
        let whole = Shape { windows: plan.samples, ..shape };
        let rotated = if rotates { rotated_bytes(config) } else { 0 };
        let begun = if place.restart { None } else { journal::begun(place) };
        // Sums that are committed lie beside those that are being written.
        let sets = match begun {
            None => 2,
            Some(begun) => u64::from(begun.windows < begun.total_windows),
        };
        let sums = shape.output_hessians().saturating_mul(sets);
        let spilled = spilled.saturating_add(sums).saturating_add(rotated);
        let config = if accuracy.rotate { config.untied() } else { config.clone() };
        let disk = DiskNeed::new(plan, checkpoint, &config, begun, whole.hidden_states(), spilled)?;
        disk.check(place)?;
        // Texts are tokenized before, which may have taken more.
        let before = if device == Device::Cpu { peak_memory().unwrap_or(0) } else { 0 };
        let memory = own.saturating_add(need.working).saturating_add(held).max(before);
        let taken = begun.map_or(0.0, |b| b.windows as f64 / b.total_windows.max(1) as f64);
        let gradient_operations = (1.0 - taken) * whole.gradient_operations();
        let of_ranks = |ranks| OfRanks::of(&whole, ranks);
        let layers = 0..checkpoint.config().num_layers();
        let gradients_at_once = shape.gradients_at_once();
        Ok(Self {
            kinds,
            limits,
            gradients_at_once,
            device,
            memory,
            elsewhere,
            disk,
            own: of_ranks(cluster.ranks()),
            of_ranks: RANKS.map(of_ranks),
            exchanges: layers.map(|layer| whole.exchange_in(layer, cluster.ranks())).collect(),
            gradient_operations,
        })
    }

    /// The time that gradients and so many `layers` will take, in words: their products at the speed that one product has here.
    /// None where it is too little to be worth measuring, and on devices other than the CPU.
    pub(super) fn time(&self, layers: usize) -> Result<Option<String>> {
        let operations = layers as f64 * self.operations() + self.gradient_operations;
        if self.device != Device::Cpu || operations < WORTH_ESTIMATING {
            return Ok(None);
        }
        let speeds = self.kinds.product_speeds()?;
        let layer = self.own.seconds(speeds);
        let all = duration(layers as f64 * layer);
        let gradients = match self.gradient_operations > 0.0 {
            true => {
                let beside = BESIDE_PRODUCTS[usize::from(amx::available())];
                let seconds = beside * self.gradient_operations / speeds[0] / self.own.ranks as f64;
                format!("{} for gradients and ", duration(seconds))
            }
            false => String::new(),
        };
        Ok(Some(format!("time: roughly {gradients}{all} for {layers} layers, {} each", duration(layer))))
    }
}

impl OfRanks {
    fn of(shape: &Shape<'_>, ranks: usize) -> Self {
        Self { ranks, work: shape.layer_work(ranks), exchange: shape.exchange(ranks) }
    }

    /// Seconds of computation in a layer, with the [`ComputeKinds::product_speeds`].
    fn seconds(&self, [usual, fp32]: [f64; 2]) -> f64 {
        let late = (self.ranks as f64 - 1.0) / ROW_BLOCKS;
        let products = self.work.usual / usual + self.work.exact / fp32;
        // About a third of the products are those of sums, which begin later on later ranks.
        products * (1.0 + late / 3.0) + self.work.fp32 / fp32
    }
}

impl Needs {
    /// Floating-point operations of a layer, of all ranks together.
    fn operations(&self) -> f64 {
        let Work { usual, exact, fp32 } = self.of_ranks[0].work;
        usual + exact + fp32
    }

    /// What the processes of the run exchange in a layer.
    pub(super) fn exchange(&self, layer: usize) -> Exchange {
        self.exchanges[layer]
    }

    /// Gain of more ranks: a line for each number of ranks, for a network of `network` bytes a second between neighbours.
    ///
    /// # Errors
    /// If libtorch cannot compute the products that are timed.
    pub(super) fn of_more_ranks(&self, network: f64) -> Result<String> {
        let mut text = format!(
            "network: each rank sends about {} to the next one in a layer, at {} a second",
            bytes(self.own.exchange.sent as u64),
            bytes(network as u64),
        );
        if self.device != Device::Cpu || self.operations() < WORTH_ESTIMATING {
            return Ok(text);
        }
        let speeds = self.kinds.product_speeds()?;
        text += "\nestimated for a layer\nranks  computing    sending  speed-up";
        let alone = self.of_ranks[0].seconds(speeds);
        for of_ranks in &self.of_ranks {
            let (ranks, computing) = (of_ranks.ranks, of_ranks.seconds(speeds));
            let sending = of_ranks.exchange.sent / network;
            let speed_up = alone / (computing + sending);
            text += &format!("\n{ranks:>5}  {computing:>7.1} s  {sending:>7.1} s  {speed_up:>8.1}");
        }
        Ok(text)
    }
}

/// Refuses a run that takes more than the memory that is `available`, where that is known. `needed` are bytes beyond `base`,
/// which the program takes already.
fn fits_machine(
    available: Option<u64>,
    needed: u64,
    shape: &Shape<'_>,
    device: Device,
    base: u64,
    plan: &Plan,
) -> Result<()> {
    let Some(available) = available.filter(|&available| available < needed) else { return Ok(()) };
    // Whole percents, with some left for other programs.
    let limit = (base + available) / 100 * 95;
    let fits = plan.max_memory.is_none() && shape.limits(device, None, Some(limit), base).is_ok();
    let error = ResourceError::Memory {
        memory: "memory".into(),
        available: bytes(base + available),
        needed: bytes(base.saturating_add(needed)),
        flag: fits.then(|| format!("--max-memory {}MB", limit / 1_000_000)),
    };
    Err(error.into())
}

impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whose, elsewhere) = match self.device {
            Device::Cpu if self.own.ranks > 1 => ("memory of each rank", "on disk"),
            Device::Cpu => ("memory", "on disk"),
            _ => ("device memory", "in memory or on disk"),
        };
        write!(f, "{whose}: about {} at most", bytes(self.memory))?;
        if self.elsewhere > 0 {
            write!(f, "; {} of activations {elsewhere}", bytes(self.elsewhere))?;
        }
        let DiskNeed { branches, journal } = self.disk;
        write!(
            f,
            "; disk: {} for the branches, {} for the journal until the run is complete",
            bytes(branches),
            bytes(journal)
        )
    }
}

/// Bytes of disk that a run still has to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DiskNeed {
    /// The branches.
    branches: u64,
    /// Hidden states that an interrupted run resumes from, and activations that do not fit memory, until the run is complete.
    journal: u64,
}

impl DiskNeed {
    /// `config` is that of the branches. `states` are the bytes of all hidden states; `spilled` are those of activations that
    /// do not fit memory, and of other files beside the journal.
    fn new(
        plan: &Plan,
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        begun: Option<Begun>,
        states: u64,
        spilled: u64,
    ) -> Result<Self> {
        // Before the first layer is finished, neither branches nor hidden states are kept.
        let begun = begun.filter(|begun| begun.layers > 0);
        let mut branches = 0;
        // Branches that were begun have their space on the disk already.
        for variant in plan.variants.iter().filter(|_| begun.is_none()) {
            let job = Job { original: checkpoint, config, max_shard_size: plan.max_shard_size };
            branches += format_of(variant).plan(&job)?;
        }
        // One set of states beside the one that is being written; behind the last layer there are none.
        let sets = match (checkpoint.config().num_layers(), begun) {
            (1, _) => 0,
            (2, None) | (_, Some(_)) => 1,
            (_, None) => 2,
        };
        Ok(Self { branches, journal: states.saturating_mul(sets).saturating_add(spilled) })
    }

    /// Refuses a run that the disks have no space for.
    fn check(&self, place: &Place<'_>) -> Result<()> {
        let out = nearest_folder(place.out);
        let needs = match place.journal_dir.map(nearest_folder) {
            Some(dir) if !same_disk(dir, out) => vec![(out, self.branches), (dir, self.journal)],
            _ => vec![(out, self.branches.saturating_add(self.journal))],
        };
        needs.into_iter().try_for_each(|(folder, needed)| require_space(folder, needed))
    }
}

/// Whether two folders are on one file system; true where that cannot be read.
fn same_disk(left: &Path, right: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (fs::metadata(left), fs::metadata(right)) {
        (Ok(left), Ok(right)) => left.dev() == right.dev(),
        _ => true,
    }
}

/// The deepest existing folder on the way to `path`.
fn nearest_folder(path: &Path) -> &Path {
    let existing = path.ancestors().find(|a| a.is_dir());
    existing.unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::estimate::tests::{config, shape};

    #[test]
    fn a_run_that_does_not_fit_is_refused_with_the_flag_that_fits() {
        let config = config(4096, 11008, 32, 32);
        let plan = Plan::default();
        let (windows, seq_len, outputs) = (plan.samples, plan.seq_len, &plan.variants[..]);
        let shape =
            Shape { kinds: ComputeKinds::all(Kind::Float), windows, seq_len, outputs, ..shape(&config) };
        let need = shape.need(Device::Cpu, 1024);
        let (base, all) = (100_000_000, need.working + need.activations);
        let fits = |available: u64| fits_machine(Some(available), all, &shape, Device::Cpu, base, &plan);
        fits(all).unwrap();
        fits_machine(None, all, &shape, Device::Cpu, base, &plan).unwrap();

        // Enough for what is needed in any case, and for some activations.
        let error = fits(need.working + need.activations / 2).unwrap_err();
        let hint = error.hint().unwrap();
        let flag = hint.strip_prefix("it fits with --max-memory ").and_then(|rest| rest.split("MB").next());
        let limit = flag.unwrap_or_else(|| panic!("{hint}")).parse::<u64>().unwrap() * 1_000_000;
        assert!(limit < base + need.working + need.activations / 2);
        let limits = shape.limits(Device::Cpu, None, Some(limit), base).unwrap();
        assert!(limits.in_memory.unwrap() > need.activations / 4);

        // Not enough for what is needed in any case.
        let error = fits(need.working / 2).unwrap_err();
        assert!(!error.hint().unwrap().contains("it fits with"), "{error}");
        assert!(error.to_string().starts_with("too little memory: "), "{error}");
    }

    #[test]
    fn numbers_beyond_any_machine_do_not_overflow() {
        let config = config(128, 256, 2, 2);
        let windows = usize::MAX / 4096;
        let (kinds, seq_len, reference, gradient_windows) =
            (ComputeKinds::all(Kind::Float), 4096, true, windows);
        let shape = Shape { kinds, windows, seq_len, reference, gradient_windows, ..shape(&config) };
        assert_eq!(shape.need(Device::Cpu, 1024).activations, u64::MAX);
        assert_eq!(shape.hidden_states(), u64::MAX);
    }

    /// The predictions in docs/cluster.md: rows of its table.
    #[test]
    fn predictions_are_those_of_the_docs() {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/cluster.md");
        let docs = fs::read_to_string(docs).unwrap();
        let models = [
            ("Llama 2 7B", config(4096, 11008, 32, 32)),
            ("Llama 2 70B", config(8192, 28672, 64, 8)),
            ("Llama 3.1 405B", config(16384, 53248, 128, 8)),
        ];
        let mut rows = Vec::new();
        for (name, config) in &models {
            let accuracy = Plan::default().accuracy(config);
            let shape = Shape {
                reference: accuracy.runs_reference(),
                searches: accuracy.scales.search != ScaleSearch::Off,
                ..shape(config)
            };
            let of = |ranks| OfRanks::of(&shape, ranks);
            let speeds = [5e12, 2.5e12];
            let alone = of(1).seconds(speeds);
            let mut first = [name.to_string(), format!("{alone:.0} s"), bytes(of(4).exchange.sent as u64)];
            for network in [10.0, 25.0, 200.0] {
                let efficiency = |ranks: usize| {
                    let seconds = of(ranks).seconds(speeds) + of(ranks).exchange.sent / (network * 1e9 / 8.0);
                    format!("{:.0}%", 100.0 * alone / seconds / ranks as f64)
                };
                let each = [2, 4, 8, 16].map(efficiency).join(" | ");
                rows.push(format!("| {} | {network:.0} Gbit/s | {each} |", first.join(" | ")));
                first = Default::default();
            }
        }
        let missing: Vec<&String> = rows.iter().filter(|row| !docs.contains(*row)).collect();
        assert!(missing.is_empty(), "docs/cluster.md has not\n{missing:#?}");
    }
}
