//! `gptq eval`.

use std::path::Path;

use anyhow::{Context, Result, bail};
use gptq::{
    calibration::{Tokenizer, Tokens, Windows},
    checkpoint::Checkpoint,
    eval::{self, Candidate},
    model::Compute,
    report::evaluation_table,
};
use safetensors::{Dtype, tensor::TensorView};

use super::{
    args::{EvalArgs, OutputArgs},
    datasets, hub,
    terminal::{self, Terminal},
};

pub(super) fn run(args: &EvalArgs, output: &OutputArgs) -> Result<bool> {
    let model = hub::model(&args.model, output)?;
    let reference = Checkpoint::open(&model.folder)?;
    reference.check()?;
    let models = args.quantized.iter().map(|dir| hub::model(dir, output)).collect::<Result<Vec<_>>>()?;
    let quantized = models.iter().map(|model| Checkpoint::open(&model.folder));
    let quantized = quantized.collect::<gptq::Result<Vec<_>>>()?;
    let compute = args.compute.resolve(&reference, output)?;
    let name = args.text.dataset.as_deref().unwrap_or("wikitext2-test");
    let source = datasets::resolve(name, &datasets::options(&args.text), output)?;
    let tokenizer = Tokenizer::open(&model.folder)?;
    let corpus = source.load()?;
    let tokens = Tokens::new(&corpus, &tokenizer, reference.config().vocab_size)?;
    let windows = Windows::sequential(&tokens, args.seq_len, args.windows)?;

    let candidates: Vec<Candidate<'_>> = models
        .iter()
        .zip(&quantized)
        .map(|(model, checkpoint)| Candidate { name: model.label(), checkpoint })
        .collect();
    let terminal = Terminal::new(output);
    let mut evaluation =
        eval::evaluate(&reference, &candidates, &windows, source.name(), compute, &terminal)?;
    evaluation.model = model.label();
    drop(terminal);
    let own = quantized.iter().zip(&evaluation.models).zip(&models).filter(|(_, model)| !model.is_fetched());
    for ((checkpoint, model), _) in own {
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
