//! `gptq demo`: quantize, verify and evaluate a model that is part of this program, offline.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};
use gptq::{
    calibration::{Corpus, Tokenizer, Tokens, Windows},
    checkpoint::Checkpoint,
    cluster::Cluster,
    model::Compute,
    pipeline::{self, CalibrationText, Place, Run},
    plan::Plan,
    verify,
};

use super::{
    args::{DemoArgs, OutputArgs},
    command, quantize, signals,
    terminal::{self, Terminal},
};

macro_rules! embedded {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_bytes!(concat!("../../calibration/demo/", $name)) as &'static [u8])),*]
    };
}

const MODEL: [(&str, &[u8]); 6] = embedded![
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];
const TEXTS: [(&str, &[u8]); 2] = embedded!["calibration.parquet", "evaluation.parquet"];

/// The model's context.
const SEQ_LEN: usize = 512;
const SAMPLES: usize = 128;

pub(super) fn run(args: &DemoArgs, output: &OutputArgs) -> Result<bool> {
    let source = tempfile::tempdir().context("making a temporary folder")?;
    // The folder's name is the model's in reports and cards.
    let model = source.path().join("demo-model");
    fs::create_dir(&model).with_context(|| format!("making `{}`", model.display()))?;
    for (name, bytes) in MODEL {
        let path = model.join(name);
        fs::write(&path, bytes).with_context(|| format!("writing `{}`", path.display()))?;
    }
    let out = match &args.out {
        Some(out) => out.clone(),
        // The folder is kept: the last lines of the output name it.
        None => tempfile::Builder::new().prefix("gptq-demo-").tempdir()?.keep().join("branches"),
    };

    let checkpoint = Checkpoint::open(&model)?;
    let tokenizer = Tokenizer::open(&model)?;
    let plan = Plan {
        dataset: vec!["demo calibration text".into()],
        samples: SAMPLES,
        seq_len: SEQ_LEN,
        ..Plan::default()
    };
    let (place, cluster) = (Place::new(&out), &Cluster::alone());
    pipeline::check(&plan, &checkpoint, &place, cluster)?;
    let [calibration, evaluation] =
        TEXTS.map(|(name, bytes)| Corpus::from_parquet_bytes(name, bytes, "text"));
    let (calibration, evaluation) = (calibration?, evaluation?);
    let vocab_size = checkpoint.config().vocab_size;
    let tokens = Tokens::new(&calibration, &tokenizer, vocab_size)?;
    let terminal = Terminal::new(output);
    terminal::note(
        output,
        "quantizing the demo model (5.1 M parameters) into the four branches of the model card",
    );
    let run = Run {
        plan: &plan,
        checkpoint: &checkpoint,
        texts: &[CalibrationText { tokens, provenance: calibration.provenance() }],
        place,
        command: &command::words(),
        stop: &*signals::stop_flag(output)?,
        cluster,
    };
    let mut finished = pipeline::quantize(&run, &terminal)?;
    let report = &finished.report;

    terminal::note(output, "verifying every branch");
    for branch in &report.branches {
        let found = verify::verify(&out.join(&branch.branch), Some(&checkpoint), None, &terminal)?;
        if let Some(finding) = found.findings.first() {
            bail!("branch `{}`: {}: {}", branch.branch, finding.subject, finding.problem);
        }
    }
    terminal::note(output, "evaluating against fp16");
    let evaluation = Tokens::new(&evaluation, &tokenizer, vocab_size)?;
    let windows = Windows::sequential(&evaluation, SEQ_LEN, None)?;
    let name = "demo evaluation text";
    let measured = quantize::evaluate_branches(
        &quantize::branch_names(report),
        &out,
        &checkpoint,
        &windows,
        name,
        Compute::CPU,
        None,
        cluster,
        &terminal,
    )?;
    finished.report.evaluations = vec![measured];
    let report = finished.complete()?;
    drop(terminal);
    quantize::print(&report, &out, output)?;
    if output.json().is_none() {
        terminal::result(&next_steps(&out))?;
    }
    Ok(true)
}

/// The bundled calibration text.
pub(super) fn calibration_text() -> gptq::Result<Corpus> {
    let [(name, bytes), _] = TEXTS;
    Corpus::from_parquet_bytes(name, bytes, "text")
}

/// The commands to try next.
fn next_steps(out: &Path) -> String {
    let (out, main) = (out.display(), out.join("main"));
    format!(
        "Next:\n  gptq report {out} --html report.html\n  gptq generate {0} --prompt \"The old house\"\n  in Python: \
         transformers.AutoModelForCausalLM.from_pretrained(\"{0}\")",
        main.display()
    )
}
