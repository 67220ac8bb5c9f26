//! `gptq eval`.

use std::path::Path;

use anyhow::{Context, Result, bail};
use gptq::{
    calibration::{Tokenizer, Tokens, Windows, check_seq_len, tokenizer_notes},
    checkpoint::{Checkpoint, QuantizationConfig},
    cluster::Cluster,
    eval::{self, Candidate, folder_names},
    model::Compute,
    progress::{Event, Progress},
    report::{EVALUATION_SCHEMA, Evaluation, evaluation_table},
    verify,
};
use safetensors::{Dtype, tensor::TensorView};
use serde::Serialize;

use super::{
    args::{EvalArgs, OutputArgs},
    datasets,
    hub::{self, Model},
    terminal::{self, Terminal},
};

/// Output of `--json`.
#[derive(Serialize)]
struct Evaluations {
    schema: &'static str,
    evaluations: Vec<Evaluation>,
}

pub(super) fn run(args: &EvalArgs, output: &OutputArgs, cluster: &Cluster) -> Result<bool> {
    // Only the root prints.
    let silent = OutputArgs::silent();
    let output = if cluster.is_root() { output } else { &silent };
    // What the root fetches, the other ranks find in the cache.
    let model = cluster.root_first(|| hub::model(&args.model, output))?;
    let reference = Checkpoint::open(&model.folder)?;
    reference.check()?;
    let longest = args.seq_len.iter().copied().max().unwrap_or_default();
    check_seq_len(longest, reference.config().longest_window(args.allow_long_windows))?;
    let fetch = || args.quantized.iter().map(|dir| hub::models(dir, output)).collect::<Result<Vec<_>>>();
    let models = cluster.root_first(fetch)?;
    let models: Vec<_> = models.into_iter().flatten().collect();
    let quantized = models.iter().map(|model| Checkpoint::open(&model.folder));
    let quantized = quantized.collect::<gptq::Result<Vec<_>>>()?;
    tokenizer_notes(reference.dir()).iter().for_each(|note| terminal::warning(output, note));
    for (model, checkpoint) in models.iter().zip(&quantized).filter(|(_, found)| found.gguf().is_none()) {
        let notes = verify::notes(checkpoint, &QuantizationConfig::read(checkpoint)?)?;
        notes.iter().for_each(|note| terminal::warning(output, &format!("{}: {note}", model.label())));
    }
    let compute = args.compute.resolve(&reference, output)?;
    let texts = cluster.root_first(|| windows(args, &reference, output))?;
    if args.dump_logits.is_some() && (quantized.len() != 1 || texts.len() != 1) {
        bail!("--dump-logits needs exactly one --quantized, one --dataset and one --seq-len");
    }

    let candidates: Vec<Candidate<'_>> = names(&models)
        .into_iter()
        .zip(&quantized)
        .map(|(name, checkpoint)| Candidate { name, checkpoint })
        .collect();
    let terminal = Terminal::new(output);
    for warning in [&reference].into_iter().chain(&quantized).filter_map(Checkpoint::absent) {
        terminal.event(&Event::Warning(&warning));
    }
    let cache = args.cache.dir();
    let mut evaluations = Vec::with_capacity(texts.len());
    for (dataset, windows) in &texts {
        let cache = cache.as_deref();
        let mut evaluation =
            eval::evaluate(&reference, &candidates, windows, dataset, compute, cache, cluster, &terminal)?;
        evaluation.model = model.label();
        // Figures are not written into the Hub's cache.
        let own =
            quantized.iter().zip(&evaluation.models).zip(&models).filter(|(_, model)| !model.is_fetched());
        for ((checkpoint, model), _) in own.filter(|_| !args.no_save && cluster.is_root()) {
            // A folder that cannot be written to is no error: the figures are printed.
            if let Err(error) = eval::store(checkpoint, &evaluation, model) {
                terminal.event(&Event::Warning(&format!("the figures are not kept: {error}")));
            }
        }
        evaluations.push(evaluation);
    }
    drop(terminal);
    if !cluster.is_root() {
        return Ok(true);
    }
    if let (Some(path), [checkpoint], [(_, windows)]) = (&args.dump_logits, &quantized[..], &texts[..]) {
        dump_logits(path, checkpoint, windows, compute)?;
    }
    let tables = evaluations.iter().map(evaluation_table).collect::<Vec<_>>().join("\n");
    terminal::answer(output, &Evaluations { schema: EVALUATION_SCHEMA, evaluations }, || tables)?;
    Ok(true)
}

/// Names for tables. Folders of the same name, such as `main` of two runs, have their parents' names before it.
fn names(models: &[Model]) -> Vec<String> {
    let (fetched, local): (Vec<&Model>, Vec<&Model>) = models.iter().partition(|model| model.is_fetched());
    let taken: Vec<String> = fetched.iter().map(|model| model.label()).collect();
    let folders: Vec<&Path> = local.iter().map(|model| model.folder.as_path()).collect();
    let mut local = folder_names(&folders, &taken).into_iter();
    let name = |model: &Model| match model.is_fetched() {
        true => model.label(),
        false => local.next().expect("one for each local model"),
    };
    models.iter().map(name).collect()
}

/// The windows of each text and length, with the text's name. `--windows` counts windows of the greatest length; the number
/// of shorter ones gives the same number of tokens.
fn windows(args: &EvalArgs, reference: &Checkpoint, output: &OutputArgs) -> Result<Vec<(String, Windows)>> {
    let tokenizer = Tokenizer::open(reference.dir())?;
    let longest = args.seq_len.iter().copied().max().unwrap_or_default();
    let named = match args.datasets.is_empty() {
        true => vec!["wikitext2-test".to_owned()],
        false => args.datasets.clone(),
    };
    let mut all = Vec::new();
    for name in &named {
        let source = datasets::resolve(name, &datasets::options(&args.places), output)?;
        let corpus = datasets::load(&source, reference.dir())?;
        let terminal = Terminal::new(output);
        let tokens = Tokens::shown(&corpus, &tokenizer, reference.config().vocab_size, &terminal)?;
        for &seq_len in &args.seq_len {
            let count = args.windows.map(|count| count * longest / seq_len.max(1));
            let windows = Windows::strided(&tokens, seq_len, args.stride.unwrap_or(seq_len), count)?;
            all.push((source.name().to_owned(), windows));
        }
    }
    Ok(all)
}

/// Writes `tokens` `[W, S]` i64 and `logits` `[W, S, vocab]` f32.
fn dump_logits(path: &Path, checkpoint: &Checkpoint, windows: &Windows, compute: Compute) -> Result<()> {
    let logits = eval::logits(checkpoint, windows, compute)?;
    let shape: Vec<usize> = logits.size().iter().map(|&s| s as usize).collect();
    let values = Vec::<f32>::try_from(logits.f_contiguous()?.f_view(-1)?)?;
    let tensors = [
        (
            "tokens",
            TensorView::new(
                Dtype::I64,
                vec![windows.count(), windows.seq_len()],
                bytemuck::cast_slice(windows.ids()),
            )?,
        ),
        ("logits", TensorView::new(Dtype::F32, shape, bytemuck::cast_slice(&values))?),
    ];
    let bytes = safetensors::serialize(tensors, None)?;
    gptq::checkpoint::write_file_atomically(path, &bytes)
        .with_context(|| format!("writing logits to `{}`", path.display()))
}
