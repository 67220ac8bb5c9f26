// Included by doc tests: `branch` quantizes the demo model into one branch below `out`, on little text.

fn branch(out: &std::path::Path) -> gptq::Result<std::path::PathBuf> {
    use gptq::{accuracy::Quality, calibration as c, pipeline as p, plan::Plan};
    let model = std::path::Path::new("calibration/demo");
    let checkpoint = gptq::checkpoint::Checkpoint::open(model)?;
    let tokenizer = c::Tokenizer::open(model)?;
    let text = std::fs::read(model.join("evaluation.parquet")).expect("the demo text");
    let corpus = c::Corpus::from_parquet_bytes("demo", text, "text")?;
    let tokens = c::Tokens::new(&corpus, &tokenizer, checkpoint.config().vocab_size)?;
    let plan = Plan {
        dataset: vec!["demo".into()],
        samples: 2,
        seq_len: 64,
        variants: vec!["4bit-128g".parse()?],
        quality: Quality::Fast,
        ..Plan::default()
    };
    let run = p::Run {
        plan: &plan,
        checkpoint: &checkpoint,
        texts: &[p::CalibrationText { tokens, provenance: corpus.provenance() }],
        place: p::Place::new(out),
        command: &[],
        stop: &std::sync::atomic::AtomicBool::new(false),
        cluster: &gptq::cluster::Cluster::alone(),
    };
    p::quantize(&run, &gptq::progress::Silent)?.complete()?;
    Ok(out.join("main"))
}
