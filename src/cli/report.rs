//! `gptq report`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use gptq::{
    checkpoint::{Checkpoint, write_file_atomically},
    eval::{describe, folder_name, folder_names},
    report::{
        Comparison, EVALUATION_FILE, EVALUATION_SCHEMA, GENERATED_BY, ModelEvaluations, REPORT_FILE, Report,
        RunInput, Source, comparison_table, evaluation_file, html, markdown,
    },
};

use super::{
    args::{OutputArgs, ReportArgs},
    hub, terminal,
};

pub(super) fn run(args: &ReportArgs, output: &OutputArgs) -> Result<bool> {
    let mut runs = args.runs.iter().map(|run| read_run(run)).collect::<gptq::Result<Vec<_>>>()?;
    let others = args.quantized.iter().map(|dir| read_quantized(dir, output));
    let mut others = others.collect::<gptq::Result<Vec<_>>>()?;
    let folders: Vec<&Path> = args.runs.iter().map(|run| folder(run)).collect();
    for (run, name) in runs.iter_mut().zip(folder_names(&folders, &[])) {
        run.name = name;
    }
    name_apart(&mut others, &args.quantized, &runs);
    for other in &others {
        other
            .checkpoint
            .notes
            .iter()
            .for_each(|note| terminal::warning(output, &format!("{}: {note}", other.name)));
    }
    let source = args.model.as_deref().map(|model| source(model, output)).transpose()?;
    let comparison = Comparison::new(runs, others, source, &args.datasets)?;

    let write = |path: &Path, text: &str| -> Result<()> {
        write_file_atomically(path, text.as_bytes())
            .with_context(|| format!("writing `{}`", path.display()))?;
        terminal::note(output, &format!("written: {}", path.display()));
        Ok(())
    };
    if let Some(path) = &args.html {
        write(path, &html(&comparison))?;
    }
    if let Some(path) = &args.markdown {
        write(path, &markdown(&comparison))?;
    }
    match output.json() {
        Some(path) if path != Path::new("-") => {
            write(path, &format!("{}\n", serde_json::to_string_pretty(&comparison)?))?;
        }
        Some(_) => terminal::json(&comparison)?,
        None if args.html.is_none() && args.markdown.is_none() => {
            terminal::result(&comparison_table(&comparison))?;
        }
        None => {}
    }
    Ok(true)
}

/// A run from its folder or report, with the figures in its branches' folders.
fn read_run(run: &Path) -> gptq::Result<RunInput> {
    let path = inside(run, REPORT_FILE);
    let report = Report::read(&path)?;
    let dir = folder(run);
    let measured = ModelEvaluations::of_branches(&report, dir)?;
    Ok(RunInput { name: folder_name(dir), report, measured })
}

/// A quantized folder or its figures; without figures, only the description of the checkpoint.
fn read_quantized(path: &Path, output: &OutputArgs) -> gptq::Result<ModelEvaluations> {
    let is_gguf = path.extension().is_some_and(|end| end == "gguf");
    let figures = if is_gguf { evaluation_file(path) } else { inside(path, EVALUATION_FILE) };
    if figures.exists() || !(path.is_dir() || is_gguf) {
        return ModelEvaluations::read_checked(&figures);
    }
    let described = describe(&Checkpoint::open(path)?)?;
    let dir = path.display();
    terminal::note(
        output,
        &format!("`{dir}` has not been measured: gptq eval --model MODEL --quantized {dir} does it"),
    );
    Ok(ModelEvaluations {
        schema: EVALUATION_SCHEMA.into(),
        generated_by: GENERATED_BY.into(),
        name: folder_name(path),
        checkpoint: described,
        evaluations: Vec::new(),
    })
}

/// Puts the parent folders' names before the names of checkpoints that occur several times or that a run's branch has.
fn name_apart(others: &mut [ModelEvaluations], paths: &[PathBuf], runs: &[RunInput]) {
    let branches = runs.iter().flat_map(|run| &run.report.branches).map(|branch| branch.branch.clone());
    let branches: Vec<String> = branches.collect();
    let names: Vec<String> = others.iter().map(|other| other.name.clone()).collect();
    let occurs = |name: &String| branches.iter().chain(&names).filter(|known| *known == name).count();
    // A file of another name is not in its model's folder.
    let is_in_folder = |path: &Path| path.is_dir() || path.file_name().is_some_and(|f| f == EVALUATION_FILE);
    let repeated: Vec<usize> =
        (0..others.len()).filter(|&i| occurs(&names[i]) > 1 && is_in_folder(&paths[i])).collect();
    let folders: Vec<&Path> = repeated.iter().map(|&i| folder(&paths[i])).collect();
    for (i, name) in repeated.iter().zip(folder_names(&folders, &branches)) {
        others[*i].rename(name);
    }
}

/// The path itself, or the folder of the file that it names.
fn folder(path: &Path) -> &Path {
    match path.is_dir() {
        true => path,
        false => path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new(".")),
    }
}

/// The file itself, or the file of that name in the folder.
fn inside(path: &Path, name: &str) -> PathBuf {
    if path.is_dir() { path.join(name) } else { path.to_owned() }
}

fn source(model: &Path, output: &OutputArgs) -> Result<Source> {
    let model = hub::model(model, output)?;
    let checkpoint = Checkpoint::open(&model.folder)?;
    let mut parameters = 0;
    for name in checkpoint.names() {
        parameters += checkpoint.view(name)?.shape.iter().product::<usize>() as u64;
    }
    Ok(Source {
        name: model.label(),
        digest: Some(checkpoint.digest()?),
        parameters: Some(parameters),
        bytes: Some(checkpoint.bytes_total()),
    })
}
