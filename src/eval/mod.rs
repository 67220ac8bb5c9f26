//! Perplexity, KL divergence and top-1 agreement of quantized models against the unquantized model.

mod cache;
mod describe;
mod divergence;
mod prediction;
mod reference;
mod store;

use std::{path::Path, time::Instant};

use tch::{Device, Tensor};

use crate::{
    architectures::ModelConfig,
    calibration::{Windows, check_seq_len},
    checkpoint::Checkpoint,
    cluster::{Cluster, message, windows_of_ranks},
    cuda::Gpu,
    error::{Error, Result, TorchContext},
    model::{Compute, Runner, kind_name},
    progress::{Event, Progress},
    report::{
        EvaluatedModel, Evaluation,
        statistics::{difference_of_exponentials, exponential_of_mean, mean, quantile},
    },
};
pub use cache::{StoredPredictions, stored_predictions};
pub use describe::{bits_per_weight, describe, gguf_types};
use divergence::{WindowScores, mean_nll, score};
use reference::Reference;
pub use store::store;

/// Hidden states of this many tokens are kept for each model at a time.
const CHUNK_TOKENS: usize = 32_768;

/// A quantized model to evaluate.
pub struct Candidate<'a> {
    /// For the table.
    pub name: String,
    /// The checkpoint.
    pub checkpoint: &'a Checkpoint,
}

/// Evaluates quantized models against the dense `reference` on the same tokens, all in the same kind on the same device.
///
/// `cache` is a folder that the reference's predictions are stored in and read from. The figures are exactly the same with it
/// and without.
///
/// In a run of several processes all ranks call it, each runs the models on its windows, and all get the same evaluation.
///
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/doc/branch.rs"));
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let branch = branch(&folder.path().join("branches"))?;
/// use std::{fs, path::Path};
///
/// use gptq::{
///     calibration::{Corpus, Tokenizer, Tokens, Windows},
///     checkpoint::Checkpoint,
///     cluster::Cluster,
///     eval::{self, Candidate},
///     model::Compute,
///     progress::Silent,
/// };
///
/// let model = Path::new("calibration/demo");
/// let (reference, quantized) = (Checkpoint::open(model)?, Checkpoint::open(&branch)?);
/// let tokenizer = Tokenizer::open(model)?;
/// let text = fs::read("calibration/demo/evaluation.parquet")?;
/// let corpus = Corpus::from_parquet_bytes("demo", text, "text")?;
/// let tokens = Tokens::new(&corpus, &tokenizer, reference.config().vocab_size)?;
/// let windows = Windows::sequential(&tokens, 64, Some(2))?;
///
/// let candidates = [Candidate { name: "main".into(), checkpoint: &quantized }];
/// let cluster = Cluster::alone();
/// let evaluation =
///     eval::evaluate(&reference, &candidates, &windows, "demo", Compute::CPU, None, &cluster, &Silent)?;
///
/// assert!(evaluation.models[0].kl_divergence.value > 0.0);
/// assert!(evaluation.models[0].top1_agreement.value > 0.5);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// When a model cannot be run, or is not comparable with the reference.
pub fn evaluate(
    reference: &Checkpoint,
    candidates: &[Candidate<'_>],
    windows: &Windows,
    dataset: &str,
    compute: Compute,
    cache: Option<&Path>,
    cluster: &Cluster,
    progress: &dyn Progress,
) -> Result<Evaluation> {
    let begun = Instant::now();
    let _guard = tch::no_grad_guard();
    let seq_len = windows.seq_len();
    check_seq_len(seq_len, reference.config().longest_window(true))?;
    for candidate in candidates {
        comparable(reference, candidate.checkpoint)?;
    }
    let quantized: Vec<Runner<'_>> = candidates
        .iter()
        .map(|c| Runner::quantized(c.checkpoint, seq_len, compute))
        .collect::<Result<_>>()?;
    for (candidate, runner) in candidates.iter().zip(&quantized) {
        let checked = check_tensors(candidate.checkpoint, runner);
        checked.map_err(|error| Error::NotComparable {
            left: reference.dir().into(),
            right: candidate.checkpoint.dir().into(),
            problem: format!(
                "{error}; gptq verify {} lists every defect",
                candidate.checkpoint.dir().display()
            ),
        })?;
    }
    let model_digest = reference.digest()?;
    let names: Vec<&str> = candidates.iter().map(|candidate| candidate.name.as_str()).collect();
    let what = format!("{dataset}, windows {}, model {model_digest}, {}", windows.digest(), names.join(", "));
    cluster.compare("evaluation", &what)?;
    let per_batch = Runner::windows_per_batch(seq_len);
    let own = windows_of_ranks(windows.count(), per_batch, cluster.ranks()).swap_remove(cluster.rank());
    let mut dense =
        Reference::new(reference, &model_digest, windows, own.start, compute, cache, cluster, progress)?;

    // Of each window its mean and each candidate's scores, as numbers.
    let mut numbers: Vec<f64> = Vec::new();
    let models = usize::from(dense.is_run()) + candidates.len();
    // Whole batches, so that these are the same for any number of ranks.
    let per_chunk = chunk_tokens(compute, reference.config(), models)? / seq_len / per_batch * per_batch;
    let per_chunk = per_chunk.max(per_batch) * seq_len;
    let layers = reference.config().num_layers() as u64;
    let ids = &windows.ids()[own.start * seq_len..own.end * seq_len];
    progress.begin("evaluating", ids.len().div_ceil(per_chunk) as u64 * layers * models as u64);
    let mut window = own.start;
    for ids in ids.chunks(per_chunk) {
        let run = |runner: &Runner<'_>| runner.hidden_states(ids, seq_len, || progress.advance(1));
        let expected = dense.hidden_states(ids, seq_len)?;
        let found = quantized.iter().map(|q| flatten(run(q)?)).collect::<Result<Vec<_>>>()?;
        for (candidate, runner) in candidates.iter().zip(&quantized) {
            let notes = runner.notes();
            notes.iter().for_each(|n| progress.event(&Event::Note(&format!("{}: {n}", candidate.name))));
        }
        for (w, ids) in ids.chunks(seq_len).enumerate() {
            let first = windows.first_scored(window);
            let hidden = expected.as_ref().map(|expected| expected.get(w as i64));
            let predictions = dense.window(hidden, ids, first)?;
            numbers.push(mean_nll(&predictions));
            for ((runner, found), candidate) in quantized.iter().zip(&found).zip(candidates) {
                let (found, name) = (found.get(w as i64), candidate.name.as_str());
                score(&predictions, runner, &found, ids, first, name)?.write(&mut numbers);
            }
            window += 1;
        }
    }
    dense.finish()?;

    let of_ranks = cluster.all_gather(message::of_floats(&numbers))?;
    let mut numbers = of_ranks.iter().flat_map(|numbers| message::floats(numbers));
    let mut window_nll = Vec::with_capacity(windows.count());
    let mut scores: Vec<Vec<WindowScores>> = candidates.iter().map(|_| Vec::new()).collect();
    for window in 0..windows.count() {
        window_nll.push(numbers.next().expect("a rank has scored it"));
        let positions = seq_len - windows.first_scored(window);
        scores.iter_mut().for_each(|scores| scores.push(WindowScores::read(&mut numbers, positions)));
    }

    let tokens: Vec<usize> = (0..windows.count()).map(|w| seq_len - windows.first_scored(w)).collect();
    let model = |candidate: &Candidate<'_>, scores: &[WindowScores]| {
        let of = |f: fn(&WindowScores) -> f64| scores.iter().map(f).collect::<Vec<f64>>();
        let (nll, kl, top1) = (of(|s| s.nll), of(|s| s.kl_divergence), of(|s| s.top1_agreement));
        let of_tokens: Vec<f32> = scores.iter().flat_map(|s| s.token_kl.iter().copied()).collect();
        EvaluatedModel {
            name: candidate.name.clone(),
            weight_bytes: candidate.checkpoint.bytes_total(),
            perplexity: exponential_of_mean(&nll, &tokens),
            perplexity_change: difference_of_exponentials(&nll, &window_nll, &tokens),
            kl_divergence: mean(&kl, &tokens),
            kl_max: quantile(of_tokens.clone(), 1.0),
            kl_p99: quantile(of_tokens, 0.99),
            top1_agreement: mean(&top1, &tokens),
            window_nll: nll,
            window_kl: kl,
            window_top1: top1,
        }
    };
    Ok(Evaluation {
        dataset: dataset.to_owned(),
        sha256: windows.digest().to_owned(),
        protocol: protocol(dataset, windows, compute),
        model: folder_name(reference.dir()),
        model_digest,
        compute: in_words(compute),
        windows: windows.count(),
        seq_len,
        stride: windows.stride(),
        reference_perplexity: exponential_of_mean(&window_nll, &tokens),
        models: candidates.iter().zip(&scores).map(|(c, s)| model(c, s)).collect(),
        window_tokens: tokens,
        window_nll,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// The last name of a folder's path.
pub fn folder_name(dir: &Path) -> String {
    let full = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    full.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// Names of folders: the last part of each path, with as many parts before it as distinguish it from the other folders and
/// from `taken`. A folder that is given twice has the same name twice.
pub fn folder_names(folders: &[&Path], taken: &[String]) -> Vec<String> {
    let parts = |folder: &&Path| -> Vec<String> {
        let full = folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf());
        full.iter().map(|part| part.to_string_lossy().into_owned()).filter(|part| part != "/").collect()
    };
    let all: Vec<Vec<String>> = folders.iter().map(parts).collect();
    let last = |parts: &[String], count: usize| parts[parts.len().saturating_sub(count)..].join("/");
    let name = |(at, own): (usize, &Vec<String>)| {
        let is_free = |count: &usize| {
            let name = last(own, *count);
            let mut others = all.iter().enumerate().filter(|(other, _)| *other != at);
            !taken.contains(&name) && others.all(|(_, other)| last(other, *count) != name)
        };
        last(own, (1..=own.len()).find(is_free).unwrap_or(1))
    };
    all.iter().enumerate().map(name).collect()
}

/// Logits `[W, seq_len, vocab]` fp32, on the CPU, of a quantized model, for comparing with other software.
///
/// # Errors
/// When the model cannot be run.
pub fn logits(checkpoint: &Checkpoint, windows: &Windows, compute: Compute) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    let runner = Runner::quantized(checkpoint, windows.seq_len(), compute)?;
    let hidden = flatten(runner.hidden_states(windows.ids(), windows.seq_len(), || ())?)?;
    let windows = (0..hidden.size()[0])
        .map(|w| runner.logits(&hidden.get(w))?.f_to_device(Device::Cpu).torch("read logits"));
    Tensor::f_stack(&windows.collect::<Result<Vec<_>>>()?, 0).torch("join logits")
}

/// Tokens whose hidden states are kept at a time. Each chunk reads every layer of every model, and on CUDA copies it. So there
/// a chunk fills a quarter of the free memory.
fn chunk_tokens(compute: Compute, config: &ModelConfig, models: usize) -> Result<usize> {
    if compute.device == Device::Cpu {
        return Ok(CHUNK_TOKENS);
    }
    let free = Gpu::of(compute.device)?.memory()?.free;
    // Hidden states of one model exist twice while its batches are joined.
    let a_token = (models + 1) * config.hidden_size * compute.kind.elt_size_in_bytes();
    Ok((free / 4 / a_token).max(CHUNK_TOKENS))
}

/// Batches `[B, S, hidden]` → `[W, S, hidden]`.
fn flatten(batches: Vec<Tensor>) -> Result<Tensor> {
    Tensor::f_cat(&batches, 0).torch("join hidden states")
}

fn comparable(reference: &Checkpoint, candidate: &Checkpoint) -> Result<()> {
    let (left, right) = (reference.config(), candidate.config());
    let sizes = [
        ("vocab_size", left.vocab_size, right.vocab_size),
        ("hidden_size", left.hidden_size, right.hidden_size),
        ("num_hidden_layers", left.num_layers(), right.num_layers()),
    ];
    match sizes.into_iter().find(|(_, l, r)| l != r) {
        None => Ok(()),
        Some((name, l, r)) => Err(Error::NotComparable {
            left: reference.dir().into(),
            right: candidate.dir().into(),
            problem: format!("{name} is {l} in one and {r} in the other"),
        }),
    }
}

/// Checks every tensor of a quantized model before anything is computed: names, shapes, types, groups, and that scales are
/// finite.
fn check_tensors(checkpoint: &Checkpoint, runner: &Runner<'_>) -> Result<()> {
    let config = checkpoint.config();
    for (name, shape) in config.dense_tensors() {
        checkpoint.view_shaped(&name, &shape)?;
    }
    for layer in 0..config.num_layers() {
        for ((id, linear), packed) in config.layer_linears(layer).zip(runner.packed_layer(layer)?) {
            if packed.is_none() {
                checkpoint.view_shaped(&id.weight(), &linear.shape)?;
            }
        }
        checkpoint.release_layer(layer);
    }
    Ok(())
}

fn protocol(dataset: &str, windows: &Windows, compute: Compute) -> String {
    let (count, seq_len, stride) = (windows.count(), windows.seq_len(), windows.stride());
    let (which, scored) = if stride == seq_len {
        (
            format!("the first {count} non-overlapping windows of {seq_len} tokens"),
            "each window's tokens but the first",
        )
    } else {
        (
            format!(
                "the first {count} windows of {seq_len} tokens, each beginning {stride} after the one before"
            ),
            "the tokens that each window has more than the one before, of the first window all but its first",
        )
    };
    format!(
        "Protocol: {dataset}, rows joined and tokenized once with the tokenizer's own BOS rule; {which}; {}. Perplexity \
         is exp of the mean negative log-likelihood of {scored}; KL(fp16 ‖ quantized) in nats and top-1 agreement are \
         means over the same positions. ± is half the 95% interval over windows (paired for the change).",
        in_words(compute)
    )
}

fn in_words(compute: Compute) -> String {
    match compute.device {
        Device::Cpu => kind_name(compute.kind).to_owned(),
        _ => compute.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_the_same_name_are_told_apart_by_their_parents() {
        let names = |folders: &[&str], taken: &[&str]| {
            let folders: Vec<&Path> = folders.iter().map(Path::new).collect();
            folder_names(&folders, &taken.iter().map(|&name| name.to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(names(&["/none/a/main", "/none/b/main", "/none/b/32g"], &[]), ["a/main", "b/main", "32g"]);
        assert_eq!(names(&["/none/a/out/main", "/none/b/out/main"], &[]), ["a/out/main", "b/out/main"]);
        assert_eq!(names(&["/none/a/main"], &["main"]), ["a/main"]);
        assert_eq!(names(&["/none/a/main", "/none/a/main"], &[]), ["main", "main"]);
    }
}
