//! `gptq gguf`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{
    Args,
    builder::{PossibleValuesParser, TypedValueParser},
};
use gptq::{
    checkpoint::Checkpoint,
    emit::{DENSE_TYPES, GgufOptions, write_gguf},
    ggml::BlockType,
    report::{REPORT_FILE, Report},
    units::bytes,
};

use super::{
    args::OutputArgs,
    hub::{self, Model},
    terminal::{self, Terminal},
};

/// A branch as one file for llama.cpp.
#[derive(Debug, Args)]
pub(super) struct GgufArgs {
    /// A symmetric branch of 4 or 8 bits with a sequential g_idx: its folder, or OWNER/NAME[:BRANCH] on the Hub
    branch: PathBuf,
    /// The GGUF file to write; must not exist
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// The unquantized model. The file has its name, and its norms, embedding and output layer in their own precision
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Type of the embedding
    #[arg(long, value_name = "TYPE", default_value = "q8_0", value_parser = dense_types())]
    token_embedding: BlockType,
    /// Type of the output layer, if it is not tied to the embedding [default: q8_0]
    #[arg(long, value_name = "TYPE", value_parser = dense_types())]
    output: Option<BlockType>,
}

pub(super) fn run(args: &GgufArgs, output: &OutputArgs) -> Result<bool> {
    let branch = hub::model(&args.branch, output)?;
    let source = args.model.as_ref().map(|model| hub::model(model, output)).transpose()?;
    let name = match &source {
        Some(source) => source.label(),
        None => name_in_report(&branch).unwrap_or_else(|| branch.label()),
    };
    let checkpoint = Checkpoint::open(&branch.folder)?;
    let source = source.map(|source| Checkpoint::open(&source.folder)).transpose()?;
    if let Some(source) = &source {
        source.check()?;
    }
    let options = GgufOptions { name, token_embedding: args.token_embedding, output: args.output };
    let terminal = Terminal::new(output);
    let written = write_gguf(&checkpoint, source.as_ref(), &args.out, &options, &terminal);
    drop(terminal);
    let written = written?;
    written.notes.iter().for_each(|note| terminal::warning(output, note));
    let text = || {
        format!(
            "{}: {}, {} tensors, {}\n",
            args.out.display(),
            written.quantization,
            written.tensors,
            bytes(written.bytes)
        )
    };
    terminal::answer(output, &written, text)?;
    Ok(true)
}

/// The model's name in the report of the run that made the branch.
fn name_in_report(branch: &Model) -> Option<String> {
    let folder = branch.folder.canonicalize().ok()?;
    Report::read(&folder.parent().unwrap_or(Path::new(".")).join(REPORT_FILE))
        .ok()
        .map(|report| report.model.name)
}

fn dense_types() -> impl TypedValueParser<Value = BlockType> {
    let words = DENSE_TYPES.map(|kind| &*kind.to_string().to_ascii_lowercase().leak());
    PossibleValuesParser::new(words).map(|word| {
        DENSE_TYPES
            .into_iter()
            .find(|kind| kind.to_string().eq_ignore_ascii_case(&word))
            .expect("one of them")
    })
}
