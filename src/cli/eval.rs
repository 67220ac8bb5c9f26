//! `gptq eval`.

use std::path::Path;

use anyhow::{Context, Result, bail};
use gptq::{
    calibration::{CorpusSource, Tokenizer, Tokens, Windows},
    checkpoint::Checkpoint,
    eval::{self, Candidate, folder_name},
    model::Compute,
    report::evaluation_table,
};
use safetensors::{Dtype, tensor::TensorView};

use super::{
    args::{EvalArgs, OutputArgs},
    datasets,
    terminal::{self, Terminal},
};

pub(super) fn run(args: &EvalArgs, output: &OutputArgs) -> Result<bool> {
    let reference = Checkpoint::open(&args.model)?;
    reference.check()?;
    let quantized = args.quantized.iter().map(|dir| Checkpoint::open(dir));
    let quantized = quantized.collect::<gptq::Result<Vec<_>>>()?;
    let compute = args.compute.resolve(&reference, output)?;
    let name = args.text.dataset.as_deref().unwrap_or("wikitext2-test");
    let source = CorpusSource::resolve(name, &datasets::options(&args.text))?;
    let tokenizer = Tokenizer::open(&args.model)?;
    let corpus = source.load()?;
    let tokens = Tokens::new(&corpus, &tokenizer, reference.config().vocab_size)?;
    let windows = Windows::sequential(&tokens, args.seq_len, args.windows)?;

    let candidates: Vec<Candidate<'_>> = args
        .quantized
        .iter()
        .zip(&quantized)
        .map(|(dir, checkpoint)| Candidate { name: folder_name(dir), checkpoint })
        .collect();
    let terminal = Terminal::new(output);
    let evaluation = eval::evaluate(&reference, &candidates, &windows, source.name(), compute, &terminal)?;
    drop(terminal);
    for (checkpoint, model) in quantized.iter().zip(&evaluation.models) {
        // The figures are there also where the folder cannot be written to.
        if let Err(error) = eval::store(checkpoint, &evaluation, model) {
            terminal::note(output, &format!("warning: the figures are not kept: {error}"));
        }
    }
    if let Some(path) = &args.dump_logits {
        let [checkpoint] = &quantized[..] else { bail!("--dump-logits needs exactly one --quantized") };
        dump_logits(path, checkpoint, &windows, compute)?;
    }
    if output.json {
        terminal::json(&evaluation)?;
    } else {
        terminal::result(&evaluation_table(&evaluation))?;
    }
    Ok(true)
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
