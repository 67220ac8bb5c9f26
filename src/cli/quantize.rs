//! `gptq quantize`.

use std::path::Path;

use anyhow::Result;
use gptq::{
    calibration::{CorpusSource, SourceOptions, Tokenizer, Tokens, Windows},
    card,
    checkpoint::Checkpoint,
    device,
    eval::{self, Candidate},
    model::Compute,
    pipeline::{self, Place, Run},
    plan::{ComputeDtype, Plan},
    progress::Progress,
    report::{Evaluation, Report, evaluation_table, run_table},
};

use super::{
    args::{OutputArgs, QuantizeArgs},
    command, datasets, hub, signals,
    terminal::{self, Terminal},
};

/// Tokens of a short window: the length at which perplexities are often compared.
pub(super) const SHORT: usize = 512;

pub(super) fn run(args: &QuantizeArgs, output: &OutputArgs) -> Result<bool> {
    let plan = plan(args)?;
    let model = hub::model(&args.model, output)?;
    let checkpoint = Checkpoint::open(&model.folder)?;
    let place = Place { out: &args.out, journal_dir: args.journal_dir.as_deref(), restart: args.restart };
    pipeline::check(&plan, &checkpoint, &place)?;
    let options = SourceOptions {
        split: plan.split.clone(),
        text_column: plan.text_column.clone(),
        ..datasets::options(&args.text.places)
    };
    let source = datasets::resolve(&plan.dataset, &options, output)?;
    let evaluation_source = evaluation_source(args, &source, &options, output)?;
    let tokenizer = Tokenizer::open(&model.folder)?;
    let vocab_size = checkpoint.config().vocab_size;
    let corpus = source.load()?;
    let tokens = Tokens::new(&corpus, &tokenizer, vocab_size)?;
    // Text that cannot be evaluated on should be known now, not after the night.
    let evaluation_windows = match &evaluation_source {
        Some(source) => {
            let corpus = source.load()?;
            let tokens = Tokens::new(&corpus, &tokenizer, vocab_size)?;
            Some(evaluation_windows(&tokens, plan.seq_len, args.eval_windows)?)
        }
        None => None,
    };

    let terminal = Terminal::new(output);
    let stop = signals::stop_flag(output)?;
    let run = Run {
        plan: &plan,
        checkpoint: &checkpoint,
        tokens: &tokens,
        provenance: corpus.provenance(),
        place,
        command: &command::words(),
        stop: &stop,
    };
    let mut finished =
        pipeline::quantize(&run, &terminal).inspect_err(|error| say_what_is_kept(error, &place, output))?;
    model.sign(&mut finished.report.model);
    card::keep_source_card(&model.folder, &args.out)?;
    if let (Some(source), Some(windows)) = (&evaluation_source, &evaluation_windows) {
        // Where the run was; in what the kernels there multiply packed weights with.
        let compute = Compute::new(device::resolve(&plan.device)?.device, ComputeDtype::Auto, &checkpoint)?;
        let (out, name) = (&args.out, source.name());
        let cache = args.cache.dir();
        let report = &mut finished.report;
        for windows in windows {
            let mut found = evaluate_branches(
                report,
                out,
                &checkpoint,
                windows,
                name,
                compute,
                cache.as_deref(),
                &terminal,
            )?;
            found.model.clone_from(&report.model.name);
            report.evaluations.push(found);
        }
    }
    let report = finished.complete()?;
    drop(terminal);
    print(&report, &args.out, output)?;
    Ok(true)
}

/// Tells that an error did not cost what was done before.
fn say_what_is_kept(error: &gptq::Error, place: &Place<'_>, output: &OutputArgs) {
    use gptq::Error as E;
    let own = !matches!(error, E::Journal(_) | E::OutputExists { .. });
    if let Some(begun) = pipeline::begun(place).filter(|_| own) {
        let pipeline::Begun { layers, total_layers } = begun;
        let out = place.out.display();
        let text = format!(
            "{layers} of {total_layers} layers are kept in {out}: the same command goes on from there"
        );
        terminal::note(output, &text);
    }
}

/// Evaluates every branch of a run.
pub(super) fn evaluate_branches(
    report: &Report,
    out: &Path,
    reference: &Checkpoint,
    windows: &Windows,
    dataset: &str,
    compute: Compute,
    cache: Option<&Path>,
    progress: &dyn Progress,
) -> gptq::Result<Evaluation> {
    let opened = report.branches.iter().map(|b| Checkpoint::open(&out.join(&b.branch)));
    let opened = opened.collect::<gptq::Result<Vec<_>>>()?;
    let candidates: Vec<Candidate<'_>> = report
        .branches
        .iter()
        .zip(&opened)
        .map(|(branch, checkpoint)| Candidate { name: branch.branch.clone(), checkpoint })
        .collect();
    eval::evaluate(reference, &candidates, windows, dataset, compute, cache, progress)
}

/// Windows of the run's own length, and as many tokens in short ones: what a model does with little to go by.
pub(super) fn evaluation_windows(
    tokens: &Tokens<'_>,
    seq_len: usize,
    count: usize,
) -> gptq::Result<Vec<Windows>> {
    let own = Windows::sequential(tokens, seq_len, Some(count))?;
    if seq_len <= SHORT {
        return Ok(vec![own]);
    }
    let short = Windows::sequential(tokens, SHORT, Some(own.ids().len() / SHORT))?;
    Ok(vec![own, short])
}

/// Prints the run's tables or its JSON.
pub(super) fn print(report: &Report, out: &Path, output: &OutputArgs) -> Result<()> {
    if output.json.is_some() {
        return terminal::json(report);
    }
    terminal::result(&format!("{}\n", run_table(report)))?;
    for evaluation in &report.evaluations {
        terminal::result(&format!("{}\n", evaluation_table(evaluation)))?;
    }
    let branches = match report.branches.len() {
        1 => "1 branch".to_owned(),
        count => format!("{count} branches"),
    };
    let rounded = match report.fallbacks().count() {
        0 => String::new(),
        1 => "; 1 linear could not be solved and was rounded to nearest".into(),
        count => format!("; {count} linears could not be solved and were rounded to nearest"),
    };
    terminal::result(&format!("{branches} in {} ({:.1} s){rounded}", out.display(), report.seconds))?;
    Ok(())
}

/// The plan file, if any, with the flags over it.
fn plan(args: &QuantizeArgs) -> Result<Plan> {
    let mut plan = match &args.plan {
        Some(path) => Plan::read(path)?,
        None => Plan::default(),
    };
    fn set<T>(field: &mut T, flag: Option<T>) {
        if let Some(value) = flag {
            *field = value;
        }
    }
    set(&mut plan.dataset, args.text.dataset.clone());
    set(&mut plan.samples, args.samples);
    set(&mut plan.seq_len, args.seq_len);
    set(&mut plan.seed, args.seed);
    set(&mut plan.damp, args.damp);
    args.accuracy.apply(&mut plan);
    set(&mut plan.on_failure, args.on_failure);
    set(&mut plan.compute_dtype, args.compute_dtype);
    set(&mut plan.device, args.device.clone());
    set(&mut plan.max_shard_size, args.max_shard_size);
    set(&mut plan.max_memory, args.max_memory.map(Some));
    set(&mut plan.max_device_memory, args.max_device_memory.map(Some));
    set(&mut plan.split, args.text.places.split.clone().map(Some));
    set(&mut plan.text_column, args.text.places.text_column.clone().map(Some));
    if !args.variants.is_empty() {
        plan.variants.clone_from(&args.variants);
    }
    plan.shared_hessian |= args.shared_hessian;
    Ok(plan)
}

/// The places to look, without the split and column that the calibration text was asked for by.
fn anywhere(options: &SourceOptions) -> SourceOptions {
    SourceOptions { roots: options.roots.clone(), split: None, text_column: None }
}

/// What to evaluate on: what was asked for, else what the recipe names, if it is on this machine.
fn evaluation_source(
    args: &QuantizeArgs,
    calibration: &CorpusSource,
    options: &SourceOptions,
    output: &OutputArgs,
) -> Result<Option<CorpusSource>> {
    if args.no_eval {
        return Ok(None);
    }
    if let Some(name) = &args.eval {
        return Ok(Some(datasets::resolve(name, &anywhere(options), output)?));
    }
    let Some(name) = calibration.recipe().map(|recipe| recipe.evaluate().to_owned()) else {
        terminal::note(output, "the branches will not be evaluated: name a text with --eval");
        return Ok(None);
    };
    match datasets::resolve(&name, &anywhere(options), output) {
        Ok(source) => Ok(Some(source)),
        Err(error) => match error.downcast_ref() {
            Some(gptq::Error::DatasetNotFound { .. } | gptq::Error::Hub(_)) => {
                terminal::note(output, &format!("the branches will not be evaluated: {error}"));
                Ok(None)
            }
            _ => Err(error),
        },
    }
}
