//! `gptq quantize`.

use std::{path::Path, slice};

use anyhow::Result;
use gptq::{
    calibration::{CorpusSource, Recipe, SourceOptions, Tokenizer, Tokens, Windows},
    card,
    checkpoint::Checkpoint,
    cluster::Cluster,
    device,
    eval::{self, Candidate},
    model::Compute,
    pipeline::{self, CalibrationText, Place, Run},
    plan::{ComputeDtype, DatasetShare, Plan},
    progress::Progress,
    report::{Evaluation, Report, evaluation_table, run_table},
    variant::{Output, Variant, VariantSet},
    verify::{LostReader, lost_readers, require_readers},
};

use super::{
    args::{OutputArgs, QuantizeArgs},
    command, datasets, hub, signals,
    terminal::{self, Terminal},
};

/// Tokens of a short window: the length at which perplexities are often compared.
pub(super) const SHORT: usize = 512;

pub(super) fn run(args: &QuantizeArgs, output: &OutputArgs, cluster: &Cluster) -> Result<bool> {
    // Only the root prints.
    let silent = OutputArgs::silent();
    let output = if cluster.is_root() { output } else { &silent };
    let plan = plan(args)?;
    // What the root fetches, the other ranks find in the cache.
    let model = cluster.root_first(|| hub::model(&args.model, output))?;
    let checkpoint = Checkpoint::open(&model.folder)?;
    let place = Place { out: &args.out, journal_dir: args.journal_dir.as_deref(), restart: args.restart };
    pipeline::check(&plan, &checkpoint, &place, cluster)?;
    let config = checkpoint.config();
    let variants: Vec<Variant> = plan.variants.iter().filter_map(Output::gptq).collect();
    require_readers(config, &variants, &args.require_readers)?;
    for LostReader { text, by_shape } in lost_readers(config, &variants) {
        match by_shape {
            true => terminal::warning(output, &text),
            false => terminal::note(output, &text),
        }
    }
    let options = SourceOptions {
        split: plan.split.clone(),
        text_column: plan.text_column.clone(),
        max_memory: plan.max_memory,
        ..datasets::options(&args.places)
    };
    let resolve = |dataset: &DatasetShare| datasets::resolve(&dataset.name, &options, output);
    let sources = cluster.root_first(|| plan.dataset.iter().map(resolve).collect::<Result<Vec<_>>>())?;
    let evaluation_sources = cluster.root_first(|| evaluation_sources(args, &sources, &options, output))?;
    let tokenizer = Tokenizer::open(&model.folder)?;
    let vocab_size = checkpoint.config().vocab_size;
    let load = |source: &CorpusSource| datasets::load(source, &model.folder);
    let corpora = sources.iter().map(load).collect::<gptq::Result<Vec<_>>>()?;
    pipeline::check_texts(&plan, &checkpoint, &place, cluster, &corpora, &tokenizer)?;
    let terminal = Terminal::new(output);
    let text = |corpus| {
        let tokens = Tokens::shown(corpus, &tokenizer, vocab_size, &terminal)?;
        Ok(CalibrationText { tokens, provenance: corpus.provenance() })
    };
    let texts = corpora.iter().map(text).collect::<gptq::Result<Vec<_>>>()?;
    // A text that cannot be evaluated on is an error before the run, not after it.
    let windows = |source: &CorpusSource| {
        let corpus = load(source)?;
        pipeline::check_texts(&plan, &checkpoint, &place, cluster, slice::from_ref(&corpus), &tokenizer)?;
        let tokens = Tokens::shown(&corpus, &tokenizer, vocab_size, &terminal)?;
        Ok((source.name().to_owned(), evaluation_windows(&tokens, plan.seq_len, args.eval_windows)?))
    };
    let evaluation_texts = evaluation_sources.iter().map(windows).collect::<gptq::Result<Vec<_>>>()?;
    cluster.compare("evaluation texts", &digests(&evaluation_texts))?;

    let stop = signals::stop_flag(output)?;
    let run = Run {
        plan: &plan,
        checkpoint: &checkpoint,
        texts: &texts,
        place,
        command: &command::words(),
        stop: &stop,
        cluster,
    };
    let mut finished = match cluster.is_root() {
        true => {
            let finished = pipeline::quantize(&run, &terminal);
            let mut finished = finished.inspect_err(|error| say_what_is_kept(error, &place, output))?;
            model.sign(&mut finished.report.model);
            card::keep_source_card(&model.folder, &args.out)?;
            Some(finished)
        }
        false => {
            pipeline::assist(&run, &terminal)?;
            None
        }
    };
    // The branches are in their places on the root.
    let branches = finished.as_ref().map(|finished| branch_names(&finished.report).join("\n").into_bytes());
    let branches = String::from_utf8_lossy(&cluster.broadcast(branches)?).into_owned();
    let branches: Vec<String> = branches.lines().map(str::to_owned).collect();
    if !evaluation_texts.is_empty() {
        // On the run's first device, in the data type of the packed kernels there.
        let device = device::resolve_all(&plan.device)?[0].device;
        let compute = Compute::new(device, ComputeDtype::Auto, &checkpoint)?;
        let (out, cache) = (&args.out, args.cache.dir());
        for (name, windows) in
            evaluation_texts.iter().flat_map(|(name, all)| all.iter().map(move |w| (name, w)))
        {
            let cache = cache.as_deref();
            let mut found = evaluate_branches(
                &branches,
                out,
                &checkpoint,
                windows,
                name,
                compute,
                cache,
                cluster,
                &terminal,
            )?;
            if let Some(finished) = &mut finished {
                found.model.clone_from(&finished.report.model.name);
                finished.report.evaluations.push(found);
            }
        }
    }
    let Some(finished) = finished else { return Ok(true) };
    let report = finished.complete()?;
    drop(terminal);
    print(&report, &args.out, output)?;
    Ok(true)
}

/// Prints what an interrupted run keeps, and the command that resumes it.
fn say_what_is_kept(error: &gptq::Error, place: &Place<'_>, output: &OutputArgs) {
    use gptq::Error as E;
    let own = !matches!(error, E::Journal(_) | E::OutputExists { .. });
    match pipeline::begun(place).filter(|_| own) {
        Some(begun) => {
            let (kept, resume) = (what_is_kept(&begun), command::resume());
            let out = place.out.display();
            terminal::note(output, &format!("{kept} are kept in {out}; resume with: {resume}"));
        }
        None if matches!(error, E::Interrupted) => {
            terminal::note(output, "nothing is kept: no layer was finished");
        }
        None => {}
    }
}

/// `3 of 32 layers`, or before the first layer `gradients of 64 of 128 windows`.
fn what_is_kept(begun: &pipeline::Begun) -> String {
    let pipeline::Begun { layers, total_layers, windows, total_windows } = begun;
    match layers {
        0 => format!("gradients of {windows} of {total_windows} windows"),
        _ => format!("{layers} of {total_layers} layers"),
    }
}

/// The names of the branches of a run.
pub(super) fn branch_names(report: &Report) -> Vec<String> {
    report.branches.iter().map(|branch| branch.branch.clone()).collect()
}

/// Texts with the digests of their windows.
fn digests(texts: &[(String, Vec<Windows>)]) -> String {
    let of = |(name, windows): &(String, Vec<Windows>)| {
        let digests: Vec<&str> = windows.iter().map(Windows::digest).collect();
        format!("{name} {}", digests.join(" "))
    };
    texts.iter().map(of).collect::<Vec<_>>().join(", ")
}

/// Evaluates branches of a run.
pub(super) fn evaluate_branches(
    branches: &[String],
    out: &Path,
    reference: &Checkpoint,
    windows: &Windows,
    dataset: &str,
    compute: Compute,
    cache: Option<&Path>,
    cluster: &Cluster,
    progress: &dyn Progress,
) -> gptq::Result<Evaluation> {
    let opened = branches.iter().map(|branch| Checkpoint::open(&out.join(branch)));
    let opened = opened.collect::<gptq::Result<Vec<_>>>()?;
    let candidates: Vec<Candidate<'_>> = branches
        .iter()
        .zip(&opened)
        .map(|(branch, checkpoint)| Candidate { name: branch.clone(), checkpoint })
        .collect();
    eval::evaluate(reference, &candidates, windows, dataset, compute, cache, cluster, progress)
}

/// Windows of the run's own length, and short ones with as many tokens, which measure the model with little context.
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
    if output.json().is_some() {
        return terminal::json(report);
    }
    terminal::result(&format!("{}\n", run_table(report)))?;
    for evaluation in &report.evaluations {
        terminal::result(&format!("{}\n", evaluation_table(evaluation)))?;
    }
    let files = report.branches.iter().filter(|branch| branch.branch.ends_with(".gguf")).count();
    let counted = |count: usize, one: &str, several: &str| match count {
        0 => None,
        1 => Some(format!("1 {one}")),
        _ => Some(format!("{count} {several}")),
    };
    let made = [
        counted(report.branches.len() - files, "branch", "branches"),
        counted(files, "GGUF file", "GGUF files"),
    ];
    let made = made.into_iter().flatten().collect::<Vec<_>>().join(" and ");
    let rounded = match report.fallbacks().count() {
        0 => String::new(),
        1 => "; 1 linear could not be solved and was rounded to nearest".into(),
        count => format!("; {count} linears could not be solved and were rounded to nearest"),
    };
    terminal::result(&format!("{made} in {} ({:.1} s){rounded}", out.display(), report.seconds))?;
    Ok(())
}

/// The plan file, if any, with the flags applied.
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
    if !args.datasets.is_empty() {
        plan.dataset.clone_from(&args.datasets);
    }
    set(&mut plan.samples, args.samples);
    set(&mut plan.seq_len, args.seq_len);
    set(&mut plan.seed, args.seed);
    set(&mut plan.quality, args.quality);
    // The report and the journal hold the number.
    plan.damp = Some(args.damp.unwrap_or_else(|| plan.damp()));
    let signed = args.signed_scales.then_some(true).or(args.unsigned_scales.then_some(false));
    plan.signed_scales = signed.or(plan.signed_scales);
    plan.scale_search = args.scale_search.or(plan.scale_search);
    plan.act_group_aware = args.act_group_aware.or(plan.act_group_aware);
    plan.asymmetric = args.asymmetric.or(plan.asymmetric);
    plan.output_hessian = args.output_hessian.or(plan.output_hessian);
    plan.rotate = args.rotate.or(plan.rotate);
    plan.equalize = args.equalize.or(plan.equalize);
    plan.shrinkage = args.shrinkage.or(plan.shrinkage);
    set(&mut plan.on_failure, args.on_failure);
    set(&mut plan.compute_dtype, args.compute_dtype);
    set(&mut plan.device, args.device.clone());
    set(&mut plan.max_shard_size, args.max_shard_size);
    plan.max_memory = args.max_memory.or(plan.max_memory);
    plan.max_device_memory = args.max_device_memory.or(plan.max_device_memory);
    plan.split = args.places.split.clone().or(plan.split);
    plan.text_column = args.places.text_column.clone().or(plan.text_column);
    if args.set.is_some() || !args.variants.is_empty() {
        let set = args.set.map_or_else(Vec::new, VariantSet::variants);
        plan.variants = set.into_iter().map(Output::Gptq).collect();
        // A variant that a set holds already is skipped; one that is given twice is an error of the plan's check.
        let extra =
            args.variants.iter().filter(|variant| args.set.is_none() || !plan.variants.contains(variant));
        let extra: Vec<Output> = extra.copied().collect();
        plan.variants.extend(extra);
    }
    plan.allow_long_windows |= args.allow_long_windows;
    plan.main = args.main.or(plan.main);
    plan.shared_hessian |= args.shared_hessian;
    Ok(plan)
}

/// The texts to evaluate on: those of `--eval`, else those that the recipes name and that can be found or fetched.
fn evaluation_sources(
    args: &QuantizeArgs,
    calibration: &[CorpusSource],
    options: &SourceOptions,
    output: &OutputArgs,
) -> Result<Vec<CorpusSource>> {
    // Split and column are those of the calibration text.
    let options = SourceOptions { split: None, text_column: None, ..options.clone() };
    if args.no_eval {
        return Ok(Vec::new());
    }
    if !args.eval.is_empty() {
        return args.eval.iter().map(|name| datasets::resolve(name, &options, output)).collect();
    }
    let mut names: Vec<&str> = Vec::new();
    for name in calibration.iter().filter_map(CorpusSource::recipe).map(Recipe::evaluate) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    if names.is_empty() {
        terminal::note(output, "the branches will not be evaluated: name a text with --eval");
    }
    let mut sources = Vec::new();
    for name in names {
        match datasets::resolve(name, &options, output) {
            Ok(source) => sources.push(source),
            Err(error) => match error.downcast_ref() {
                Some(gptq::Error::DatasetNotFound { .. } | gptq::Error::Hub(_)) => {
                    terminal::note(output, &format!("the branches will not be evaluated on {name}: {error}"));
                }
                _ => return Err(error),
            },
        }
    }
    Ok(sources)
}
