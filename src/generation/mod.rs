//! Text generation with a quantized or unquantized model.

mod sampler;

use std::{path::Path, time::Instant};

use serde::Serialize;

pub use sampler::{Sampler, Sampling};

use crate::{
    calibration::Tokenizer,
    checkpoint::Checkpoint,
    error::{Error, Result},
    model::{Compute, Decoder, Runner, check_device_memory, device_need},
    progress::{Event, Progress},
};

/// Prompt and settings of a generation.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The text to continue.
    pub prompt: String,
    /// Whether a chat template rendered the prompt. Its special tokens then stand in the text; otherwise the tokenizer adds its own.
    pub rendered: bool,
    /// Largest number of generated tokens.
    pub max_tokens: usize,
    /// Choice of tokens.
    pub sampling: Sampling,
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stop {
    /// The model ended its text.
    EndOfSequence,
    /// The requested number of tokens.
    MaxTokens,
    /// The model's context is full.
    Context,
}

/// Generated text, with timings.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Generated {
    /// Without the prompt.
    pub text: String,
    /// Generated tokens, without the end-of-sequence token.
    pub token_ids: Vec<u32>,
    /// Why generation ended.
    pub stop: Stop,
    /// Tokens of the prompt, BOS included.
    pub prompt_tokens: usize,
    /// Number of generated tokens, without the end-of-sequence token.
    pub tokens: usize,
    /// Seconds to open the model's layers.
    pub load_seconds: f64,
    /// Seconds for the prompt.
    pub prompt_seconds: f64,
    /// Seconds for all tokens but the first, which comes with the prompt.
    pub decode_seconds: f64,
    /// Decoded tokens per second; none for fewer than two tokens.
    pub tokens_per_second: Option<f64>,
}

/// Continues a prompt, and calls `emit` with each piece of text. `folder` has the tokenizer, and perhaps `generation_config.json`: the
/// checkpoint's own folder, or for a GGUF file another one.
///
/// # Errors
/// When the prompt has no tokens or does not fit the context, or the model cannot be run or does not fit the device.
pub fn generate(
    checkpoint: &Checkpoint,
    folder: &Path,
    request: &Request,
    compute: Compute,
    progress: &dyn Progress,
    mut emit: impl FnMut(&str),
) -> Result<Generated> {
    let _guard = tch::no_grad_guard();
    let config = checkpoint.config();
    let mut sampler = Sampler::new(&request.sampling)?;
    let tokenizer = Tokenizer::open(folder)?;
    let stop_ids = checkpoint.stop_token_ids(folder)?;
    let mut ids = match request.rendered {
        true => tokenizer.encode_rendered(&request.prompt)?,
        false => tokenizer.encode(&request.prompt)?,
    };
    let context = config.max_position_embeddings;
    let value =
        |what: &str, expected: String, found: String| Error::Value { what: what.into(), expected, found };
    if request.max_tokens == 0 {
        return Err(value("max-tokens", "at least 1".into(), "0".into()));
    }
    if ids.is_empty() || ids.len() >= context {
        return Err(value("prompt", format!("1 to {} tokens", context - 1), format!("{} tokens", ids.len())));
    }
    if let Some(id) = ids.iter().find(|&&id| id as usize >= config.vocab_size) {
        return Err(value("prompt", format!("token ids below {}", config.vocab_size), format!("{id}")));
    }

    let begun = Instant::now();
    let capacity = context.min(ids.len().saturating_add(request.max_tokens));
    let need = device_need(checkpoint, ids.len(), capacity)?;
    if let Some(note) = check_device_memory(compute, &need)? {
        progress.event(&Event::Note(&note));
    }
    let runner = Runner::open(checkpoint, capacity, compute)?;
    let packed =
        (0..config.num_layers()).map(|layer| runner.packed_layer(layer)).collect::<Result<Vec<_>>>()?;
    let mut decoder = Decoder::new(&runner, &packed, capacity)?;
    runner.notes().iter().for_each(|note| progress.event(&Event::Note(note)));
    let load_seconds = begun.elapsed().as_secs_f64();

    let begun = Instant::now();
    let prompt_tokens = ids.len();
    let prompt: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    let mut logits = decoder.advance(&prompt)?;
    let prompt_seconds = begun.elapsed().as_secs_f64();

    let begun = Instant::now();
    let (mut text, mut pieces) = (String::new(), tokenizer.stream_after(&ids)?);
    let stop = loop {
        let id = sampler.next(&mut logits, &ids)?;
        if stop_ids.contains(&id) {
            break Stop::EndOfSequence;
        }
        ids.push(id);
        if let Some(piece) = pieces(id)? {
            emit(&piece);
            text.push_str(&piece);
        }
        if ids.len() - prompt_tokens == request.max_tokens {
            break Stop::MaxTokens;
        }
        if ids.len() == capacity {
            break Stop::Context;
        }
        logits = decoder.advance(&[i64::from(id)])?;
    };
    let decode_seconds = begun.elapsed().as_secs_f64();
    let tokens = ids.len() - prompt_tokens;
    let decoded = tokens - usize::from(stop != Stop::EndOfSequence).min(tokens);
    let tokens_per_second = (decoded > 0).then(|| decoded as f64 / decode_seconds);
    Ok(Generated {
        text,
        token_ids: ids.split_off(prompt_tokens),
        stop,
        prompt_tokens,
        tokens,
        load_seconds,
        prompt_seconds,
        decode_seconds,
        tokens_per_second,
    })
}
