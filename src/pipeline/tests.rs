//! Results must not depend on how windows are spread over batches, devices and parts of a run.

use std::{
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use tch::{Device, Kind};

use super::{
    compute_kinds::ComputeKinds,
    estimate::{Shape, tests::shape},
    journal::{Identity, Journal},
    memory::Limits,
    output_folder::Place,
    output_hessians::{GradientWindows, OutputHessians},
    phases::PhaseClock,
    stage_memory::MemoryWatch,
    worker::RunContext,
    worker_group::{Sink, Task},
    worker_pool::WorkerPool,
};
use crate::{
    accuracy::Quality,
    amx::has_bf16_products,
    architectures::LinearId,
    calibration::{Tokens, Windows},
    checkpoint::Checkpoint,
    cluster::{Cluster, tests::on_all},
    error::{Error, Result},
    gptq::{fault, solver::Solved},
    model::Compute,
    plan::{ComputeDtype, OnFailure, Plan},
    progress::{Event, Progress, Silent},
    report::{LinearReport, StageMemory},
    variant::Output,
};

const SEQ_LEN: usize = 16;

pub(super) fn model(name: &str) -> Checkpoint {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models").join(name);
    Checkpoint::open(&folder).unwrap()
}

fn windows(count: usize) -> Windows {
    let ids = (0..4000u32).map(|i| i.wrapping_mul(2_654_435_761) >> 26).collect();
    Windows::random(&Tokens::from_ids("numbers", ids, 64).unwrap(), count, SEQ_LEN, 3).unwrap()
}

fn limits(batch_tokens: usize) -> Limits {
    Limits { on_device: None, in_memory: None, batch_tokens }
}

/// Codes of a linear.
type Taken = (LinearId, Vec<u8>);

#[derive(Default)]
struct Kept(Vec<Taken>);

impl Sink for Kept {
    fn take(&mut self, _variant: usize, id: &LinearId, linear: &Solved, _report: LinearReport) -> Result<()> {
        self.0.push((id.clone(), linear.on_host()?.codes().to_vec()));
        Ok(())
    }

    fn warn(&mut self, text: String) {
        panic!("{text}");
    }
}

/// The first layer's linears, as some devices solve them with `batch_tokens` going through together.
fn first_layer(name: &str, devices: usize, batch_tokens: usize) -> Vec<Taken> {
    layer_of_rank(name, devices, batch_tokens, Kind::Float, false, &Cluster::alone())
}

/// The same on one of several ranks.
fn layer_of_rank(
    name: &str,
    devices: usize,
    batch_tokens: usize,
    kind: Kind,
    with_gradients: bool,
    cluster: &Cluster,
) -> Vec<Taken> {
    let (checkpoint, windows) = (model(name), windows(13));
    let plan = Plan::default();
    let accuracy = plan.accuracy(checkpoint.config());
    let variants: [Output; 1] = ["4bit-16g-act".parse().unwrap()];
    let (memory, stop) = (MemoryWatch::begin(StageMemory::default()), AtomicBool::new(false));
    let phases = &PhaseClock::begin(&[]);
    let context = RunContext { progress: &Silent, stop: &stop, memory: &memory, phases, cluster };
    let folder = tempfile::tempdir().unwrap();
    let _guard = tch::no_grad_guard();
    let output_hessians = with_gradients.then(|| {
        let (place, layers) = (Place::new(folder.path()), checkpoint.config().num_layers());
        let mut journal = Journal::open(&place, Identity::default(), layers).unwrap();
        let all = GradientWindows { windows: &windows, count: windows.count(), at_once: usize::MAX };
        let compute = Compute { device: Device::Cpu, kind };
        OutputHessians::measure(&checkpoint, compute, all, 7, limits(1024), &mut journal, context).unwrap()
    });
    let task = Task {
        variants: &variants,
        damp: 0.01,
        accuracy,
        kinds: ComputeKinds::all(kind),
        output_hessians: output_hessians.as_ref(),
        shared_hessian: false,
        on_failure: OnFailure::Error,
        layers: checkpoint.config().num_layers(),
    };
    let devices = vec![Device::Cpu; devices];
    let limits = limits(batch_tokens);
    let folder = folder.path();
    let mut pool =
        WorkerPool::new(&checkpoint, &devices, &windows, task, limits, folder, None, context).unwrap();
    let mut kept = Kept::default();
    pool.solve_layer(0, &Mutex::new(&mut kept), None).unwrap();
    kept.0
}

/// Sums in another order round differently, so that a few codes may differ.
#[test]
fn batches_and_devices_solve_the_same() {
    for name in ["llama3-gqa-rope", "phi3", "gemma3", "cohere", "mixtral", "qwen2-moe", "qwen3-moe"] {
        let checkpoint = model(name);
        let expected = first_layer(name, 1, SEQ_LEN);
        let linears = checkpoint.config().layer_linears(0).map(|(id, _)| id);
        assert!(expected.iter().map(|(id, _)| id.clone()).eq(linears), "{name}");
        for (devices, batch_tokens) in [(1, 1024), (2, SEQ_LEN), (2, 1024), (3, 3 * SEQ_LEN)] {
            for (found, expected) in first_layer(name, devices, batch_tokens).iter().zip(&expected) {
                let place = format!("{name}, {}, {devices} devices, {batch_tokens}", expected.0);
                assert_eq!(found.0, expected.0, "{place}");
                let equal = found.1.iter().zip(&expected.1).filter(|(a, b)| a == b).count();
                assert!(equal * 100 >= expected.1.len() * 98, "{place}: {equal} of {}", expected.1.len());
            }
        }
    }
}

/// The weights of tokens belong to their windows, whatever device and batch these are in.
#[test]
fn tokens_keep_their_weights_in_all_batches_and_on_all_devices() {
    let layer = |devices, batch_tokens, with_gradients| {
        let cluster = Cluster::alone();
        layer_of_rank("llama3-gqa-rope", devices, batch_tokens, Kind::Float, with_gradients, &cluster)
    };
    let equal = |a: &[Taken], b: &[Taken]| {
        let codes = |all: &[Taken]| all.iter().flat_map(|(_, codes)| codes.clone()).collect::<Vec<u8>>();
        let (a, b) = (codes(a), codes(b));
        a.iter().zip(&b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64
    };
    let expected = layer(1, SEQ_LEN, true);
    for (devices, batch_tokens) in [(1, 1024), (2, SEQ_LEN), (3, 3 * SEQ_LEN)] {
        let part = equal(&layer(devices, batch_tokens, true), &expected);
        assert!(part >= 0.98, "{devices} devices, {batch_tokens}: {part}");
    }
    let part = equal(&layer(1, SEQ_LEN, false), &expected);
    assert!(part < 0.9, "{part}");
}

/// Sums that one rank continues for another equal those of one process, bit by bit. This holds also for a rank without windows, or
/// without tokens of an expert.
#[test]
fn ranks_solve_exactly_the_same() {
    for name in ["llama3-gqa-rope", "cohere", "mixtral"] {
        for kind in [Kind::Float, Kind::BFloat16] {
            let expected = layer_of_rank(name, 1, 3 * SEQ_LEN, kind, false, &Cluster::alone());
            for ranks in [2, 3, 7] {
                let all = on_all(ranks, |rank| layer_of_rank(name, 1, 3 * SEQ_LEN, kind, false, &rank));
                for (rank, found) in all.iter().enumerate() {
                    assert!(*found == expected, "{name}, {kind:?}, rank {rank} of {ranks}");
                }
            }
        }
    }
}

/// Bytes and barriers of the first layer are those that the preflight computes.
#[test]
fn ranks_exchange_what_is_computed() {
    let (kind, kinds) = (Kind::Float, ComputeKinds::all(Kind::Float));
    let outputs: [Output; 1] = ["4bit-16g-act".parse().unwrap()];
    for name in ["llama3-gqa-rope", "cohere", "mixtral"] {
        let checkpoint = model(name);
        let config = checkpoint.config();
        let reference = Plan::default().accuracy(config).runs_reference();
        let shape =
            Shape { kinds, windows: 13, seq_len: SEQ_LEN, outputs: &outputs, reference, ..shape(config) };
        for ranks in [2, 3, 4] {
            let all = on_all(ranks, |rank| {
                layer_of_rank(name, 1, 3 * SEQ_LEN, kind, false, &rank);
                rank.exchanged()
            });
            let computed = shape.exchange_in(0, ranks);
            let sent = all.iter().map(|exchanged| exchanged.sent).max().unwrap() as f64;
            assert!((sent / computed.sent - 1.0).abs() < 0.1, "{name}, {ranks} ranks: {sent} {computed:?}");
            // Without the files of the next layer's hidden states.
            let barriers = all.iter().map(|exchanged| exchanged.barriers as f64 + 1.0);
            assert!(barriers.eq(vec![computed.barriers; ranks]), "{name}, {ranks} ranks: {computed:?}");
        }
    }
}

/// Memory of the device ends while Hessians are summed up (between groups, whose sums then go on, or before the first of them), or
/// in a solve.
#[test]
fn memory_that_ends_in_a_hessian_or_a_solve_changes_nothing() {
    for (name, step, least) in [("llama3-gqa-rope", 1, 30), ("mixtral", 7, 60)] {
        let expected = first_layer(name, 1, 3 * SEQ_LEN);
        for operations in (0..).step_by(step) {
            fault::after(operations);
            let found = first_layer(name, 1, 3 * SEQ_LEN);
            if !fault::has_failed() {
                assert!(operations >= least, "{name} has only {operations} operations");
                break;
            }
            assert!(found == expected, "{name}: out of memory after {operations} operations");
        }
    }
}

/// Asks a run to stop when gradients of some windows are kept.
struct StopAfterGradients<'a>(&'a AtomicBool);

impl Progress for StopAfterGradients<'_> {
    fn begin(&self, _phase: &str, _total: u64) {}

    fn advance(&self, _steps: u64) {}

    fn event(&self, event: &Event<'_>) {
        let kept = matches!(event, Event::Note(text) if text.starts_with("gradients: "));
        self.0.fetch_or(kept, Ordering::Relaxed);
    }
}

/// Gradients on the first `count` of 150 windows, with a journal in `folder`; with `interrupt`, ended when some are kept.
fn gradients(folder: &Path, count: usize, at_once: usize, interrupt: bool) -> Result<Vec<Vec<f32>>> {
    let checkpoint = model("llama3-gqa-rope");
    let config = checkpoint.config();
    // 64 of them make a batch, and parts are whole batches.
    let windows = windows(150);
    let windows = GradientWindows { windows: &windows, count, at_once };
    let (memory, stop) = (MemoryWatch::begin(StageMemory::default()), AtomicBool::new(false));
    let stopping = StopAfterGradients(&stop);
    let progress: &dyn Progress = if interrupt { &stopping } else { &Silent };
    let (phases, cluster) = (&PhaseClock::begin(&[]), &Cluster::alone());
    let context = RunContext { progress, stop: &stop, memory: &memory, phases, cluster };
    let mut journal = Journal::open(&Place::new(folder), Identity::default(), config.num_layers())?;
    let _guard = tch::no_grad_guard();
    let (compute, limits) = (Compute::CPU, limits(1024));
    let measured = OutputHessians::measure(&checkpoint, compute, windows, 7, limits, &mut journal, context)?;
    let layers = (0..config.num_layers()).map(|layer| measured.read(config, layer));
    let parts = layers.collect::<Result<Vec<_>>>()?.into_iter().flat_map(|(blocks, squares)| {
        let values = |block: tch::Tensor| Vec::<f32>::try_from(block.flatten(0, -1)).unwrap();
        blocks.into_iter().flatten().map(values).chain([squares])
    });
    Ok(parts.collect())
}

#[test]
fn gradients_are_the_same_whatever_number_of_windows_goes_at_once() {
    let taken = |count: usize, at_once: usize| {
        gradients(tempfile::tempdir().unwrap().path(), count, at_once, false).unwrap()
    };
    let whole = taken(150, usize::MAX);
    assert!(whole.iter().flatten().any(|&value| value > 0.0));
    for at_once in [1, 64, 100, 149, 150] {
        assert!(taken(150, at_once) == whole, "{at_once}");
    }
    assert!(taken(64, 1) != whole);
}

#[test]
fn interrupted_gradients_resume_to_the_same_bytes() {
    let whole = gradients(tempfile::tempdir().unwrap().path(), 150, usize::MAX, false).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let kept = || super::begun(&Place::new(folder.path())).unwrap();
    // Each part ends with a commit, behind which the run stops.
    for windows in [64, 128] {
        let ended = gradients(folder.path(), 150, 1, true);
        assert!(matches!(ended, Err(Error::Interrupted)), "{windows} windows");
        assert_eq!((kept().layers, kept().windows, kept().total_windows), (0, windows, 150));
    }
    assert!(gradients(folder.path(), 150, 1, false).unwrap() == whole);
    assert_eq!(kept().windows, 150);
    // Nothing is left to be taken.
    assert!(gradients(folder.path(), 150, 1, true).unwrap() == whole);
    // The file is one for 150 windows.
    assert!(matches!(gradients(folder.path(), 64, 1, false), Err(Error::Journal(_))));

    let journal = Place::new(folder.path()).journal().unwrap();
    let path = journal.join("gradients-150");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[5] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert!(matches!(gradients(folder.path(), 150, 1, false), Err(Error::Journal(_))));
}

/// Rounding to bf16 is as large as what 8 bits make of the activations, so that asymmetric calibration would correct noise.
#[test]
fn eight_bits_with_asymmetric_calibration_take_fp32_forward_passes() {
    let checkpoint = model("llama3-gqa-rope");
    let of = |quality: Quality, compute_dtype: ComputeDtype, variants: &[&str]| {
        let plan = Plan { quality, compute_dtype, ..Plan::default() };
        let kinds = ComputeKinds::of(&plan, &checkpoint, Device::Cpu).unwrap();
        let outputs: Vec<Output> = variants.iter().map(|variant| variant.parse().unwrap()).collect();
        (kinds.of_outputs(&outputs), kinds.note(&outputs).is_some())
    };
    let fast = if has_bf16_products() { Kind::BFloat16 } else { Kind::Float };
    let (auto, noted) = (ComputeDtype::Auto, has_bf16_products());
    let both = if has_bf16_products() { vec![Kind::BFloat16, Kind::Float] } else { vec![Kind::Float] };
    assert_eq!(of(Quality::Standard, auto, &["4bit-128g", "8bit-128g", "q6_k"]), (both.clone(), noted));
    assert_eq!(of(Quality::Standard, auto, &["q4_k_m", "q8_0"]), (both, noted));
    assert_eq!(of(Quality::Standard, auto, &["8bit-128g"]), (vec![Kind::Float], noted));
    assert_eq!(of(Quality::Standard, auto, &["4bit-128g", "3bit-128g"]), (vec![fast], false));
    assert_eq!(of(Quality::Fast, auto, &["8bit-128g"]), (vec![fast], false));
    assert_eq!(of(Quality::Standard, ComputeDtype::Bf16, &["8bit-128g"]), (vec![Kind::BFloat16], false));
    assert_eq!(of(Quality::Standard, ComputeDtype::Fp32, &["4bit-128g"]), (vec![Kind::Float], false));
}
