//! `gptq generate`.

use anyhow::{Context, Result};
use gptq::{
    calibration::tokenizer_notes,
    chat::{ChatTemplate, Message},
    checkpoint::{Checkpoint, QuantizationConfig},
    generation::{Request, Sampling, generate},
    verify,
};

use super::{
    args::{GenerateArgs, OutputArgs},
    hub,
    terminal::{self, Terminal},
};

pub(super) fn run(args: &GenerateArgs, output: &OutputArgs) -> Result<bool> {
    let checkpoint = Checkpoint::open(&hub::model(&args.dir, output)?.folder)?;
    let tokenizer = match &args.tokenizer {
        Some(dir) => hub::model(dir, output)?.folder,
        None if checkpoint.gguf().is_some() => {
            return Err(gptq::Error::CheckpointKind {
                path: args.dir.clone(),
                expected: "a folder with a tokenizer, or --tokenizer DIR",
                found: "a GGUF file, whose own tokenizer is not read".into(),
            }
            .into());
        }
        None => checkpoint.dir().to_owned(),
    };
    if checkpoint.gguf().is_none() && checkpoint.quantization_mark().is_some() {
        let notes = verify::notes(&checkpoint, &QuantizationConfig::read(&checkpoint)?)?;
        notes.iter().for_each(|note| terminal::warning(output, note));
    }
    let notes = checkpoint.absent().into_iter().chain(tokenizer_notes(&tokenizer));
    notes.for_each(|note| terminal::warning(output, &note));
    let compute = args.compute.resolve(&checkpoint, output)?;
    let given = match args.prompt.as_str() {
        "-" => std::io::read_to_string(std::io::stdin()).context("reading the prompt from standard input")?,
        text => text.to_owned(),
    };
    let prompt = match args.chat {
        true => {
            let template = ChatTemplate::read(&tokenizer)?;
            let template = template.ok_or_else(|| gptq::Error::NoChatTemplate { what: "--chat".into() })?;
            template.render(&[Message::new("user", &given)], true)?
        }
        false => given.clone(),
    };
    let request = Request {
        prompt,
        rendered: args.chat,
        max_tokens: args.max_tokens,
        sampling: Sampling {
            temperature: args.temperature,
            top_p: args.top_p,
            repetition_penalty: args.repetition_penalty,
            seed: args.seed,
        },
    };
    // The prompt is printed with the first piece, so that an error stands alone.
    let (mut begun, mut printed) = (false, Ok(()));
    let mut piece = |piece: &str| {
        if output.json().is_none() && printed.is_ok() {
            // An answer stands alone; a continued text needs its beginning.
            let prompt = if begun || args.chat { "" } else { &given };
            begun = true;
            printed = terminal::piece(&format!("{prompt}{piece}"));
        }
    };
    let terminal = Terminal::new(output);
    let made = generate(&checkpoint, &tokenizer, &request, compute, &terminal, &mut piece);
    drop(terminal);
    if begun {
        printed.and_then(|()| terminal::piece("\n"))?;
    }
    let made = made?;
    if output.json().is_some() {
        terminal::json(&made)?;
        return Ok(true);
    }
    let speed = made.tokens_per_second.map_or_else(String::new, |speed| format!(", {speed:.1} tokens/s"));
    terminal::note(
        output,
        &format!(
            "{} tokens after a prompt of {} ({:.2} s){speed}",
            made.tokens, made.prompt_tokens, made.prompt_seconds
        ),
    );
    Ok(true)
}
