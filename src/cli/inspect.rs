//! `gptq inspect`.

use std::fmt::Write;

use anyhow::Result;
use gptq::{
    checkpoint::{Checkpoint, QuantizationConfig},
    eval::{bits_per_weight, gguf_types},
    gguf::Header,
    report::{ReaderReport, SplitReport},
    units::bytes,
    verify::{notes, readers, tensor_parallel},
};
use serde::Serialize;

use super::{
    args::{InspectArgs, OutputArgs},
    hub::{self, Model},
    terminal,
};

/// A checkpoint's architecture, format and tensors.
#[derive(Serialize)]
struct Inspection {
    architecture: String,
    layers: usize,
    hidden_size: usize,
    /// That of one expert, if there are experts.
    intermediate_size: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    experts: Option<usize>,
    heads: usize,
    kv_heads: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    bytes: u64,
    quantization: Option<Quantized>,
    /// About tensors that the index lists and no shard holds, or that the config does not describe.
    notes: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gguf: Option<Gguf>,
    tensors: Vec<TensorLine>,
}

/// The quantization of a GGUF file.
#[derive(Serialize)]
struct Gguf {
    /// Types of the linears, the most frequent first.
    types: Vec<String>,
    /// Of the linears.
    bits_per_weight: f64,
    /// Keys and values; of arrays their length.
    metadata: Vec<(String, String)>,
}

#[derive(Serialize)]
struct Quantized {
    bits: u32,
    group_size: i64,
    desc_act: bool,
    symmetric: bool,
    static_groups: bool,
    checkpoint_format: &'static str,
    /// Of the quantized linears, with scales, zeros and group indices.
    bits_per_weight: f64,
    /// The readers, with the reason if one refuses it.
    readers: Vec<ReaderReport>,
    /// The numbers of GPUs over which readers can split it.
    tensor_parallel: Vec<SplitReport>,
    /// Inferred and ambiguous settings, with the choice for each.
    notes: Vec<String>,
}

#[derive(Serialize)]
struct TensorLine {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: usize,
}

pub(super) fn run(args: &InspectArgs, output: &OutputArgs) -> Result<bool> {
    let models = hub::models(&args.dir, output)?;
    let of = |model: &Model| Ok((model.label(), inspect(&Checkpoint::open(&model.folder)?, args.tensors)?));
    let found = models.iter().map(of).collect::<gptq::Result<Vec<_>>>()?;
    terminal::answer_each(output, &found, text)?;
    Ok(true)
}

fn inspect(checkpoint: &Checkpoint, tensors: bool) -> gptq::Result<Inspection> {
    let config = checkpoint.config();
    let first = &config.layers[0];
    let gguf = checkpoint.gguf().map(|(header, _)| gguf(checkpoint, header)).transpose()?;
    let mark = checkpoint.quantization_mark().filter(|_| gguf.is_none());
    let quantization = mark.map(|_| quantized(checkpoint)).transpose()?;
    let mut lines = Vec::new();
    if tensors {
        for name in checkpoint.names() {
            let view = checkpoint.view(name)?;
            lines.push(TensorLine {
                name: name.to_owned(),
                dtype: view.type_name(),
                shape: view.shape.to_vec(),
                bytes: view.bytes.len(),
            });
        }
    }
    // A GGUF file has its own description of the model.
    let undeclared =
        checkpoint.check_undeclared().err().filter(|_| gguf.is_none()).map(|error| error.to_string());
    Ok(Inspection {
        architecture: config.class.to_owned(),
        layers: config.num_layers(),
        hidden_size: config.hidden_size,
        intermediate_size: first.feed_forward.blocks[0].width(),
        experts: first.feed_forward.routing.as_ref().map(|routing| routing.experts),
        heads: first.attention.num_heads,
        kv_heads: first.attention.num_kv_heads,
        vocab_size: config.vocab_size,
        max_position_embeddings: config.max_position_embeddings,
        bytes: checkpoint.bytes_total(),
        quantization,
        notes: checkpoint.absent().into_iter().chain(undeclared).collect(),
        gguf,
        tensors: lines,
    })
}

fn gguf(checkpoint: &Checkpoint, header: &Header) -> gptq::Result<Gguf> {
    Ok(Gguf {
        types: gguf_types(checkpoint)?.iter().map(ToString::to_string).collect(),
        bits_per_weight: bits_per_weight(checkpoint)?,
        metadata: header.metadata.iter().map(|(key, value)| (key.to_owned(), value.shown())).collect(),
    })
}

fn quantized(checkpoint: &Checkpoint) -> gptq::Result<Quantized> {
    let config = checkpoint.config();
    let quantization = QuantizationConfig::read(checkpoint)?;
    Ok(Quantized {
        bits: quantization.bits.get(),
        group_size: quantization.group_size.as_config(),
        desc_act: quantization.desc_act,
        symmetric: quantization.sym,
        static_groups: quantization.static_groups,
        checkpoint_format: quantization.format.name(),
        bits_per_weight: bits_per_weight(checkpoint)?,
        readers: readers(config, &quantization, checkpoint),
        tensor_parallel: tensor_parallel(config, &quantization, checkpoint),
        notes: notes(checkpoint, &quantization)?,
    })
}

fn text(i: &Inspection) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{}: {} layers, hidden {}, intermediate {}, {} heads ({} kv), vocabulary {}, context {}, {}",
        i.architecture,
        i.layers,
        i.hidden_size,
        i.intermediate_size,
        i.heads,
        i.kv_heads,
        i.vocab_size,
        i.max_position_embeddings,
        bytes(i.bytes)
    );
    match &i.quantization {
        None => match &i.gguf {
            None => text.push_str("not quantized\n"),
            Some(file) => {
                let _ = writeln!(
                    text,
                    "GGUF: linears {}, {:.3} bits per weight",
                    file.types.join(", "),
                    file.bits_per_weight
                );
                for (key, value) in file.metadata.iter().filter(|_| !i.tensors.is_empty()) {
                    let line = value.lines().next().unwrap_or_default();
                    let _ = writeln!(text, "  {key}: {line:.100}");
                }
            }
        },
        Some(q) => {
            let _ = writeln!(
                text,
                "GPTQ: {} bits, group size {}, act order {}, {}, format {}, {:.3} bits per weight",
                q.bits,
                q.group_size,
                match (q.desc_act, q.static_groups) {
                    (_, true) => "yes (static groups)",
                    (true, false) => "yes",
                    (false, false) => "no",
                },
                if q.symmetric { "symmetric" } else { "asymmetric" },
                q.checkpoint_format,
                q.bits_per_weight
            );
            for note in &q.notes {
                let _ = writeln!(text, "  {note}");
            }
            for reader in &q.readers {
                let _ = writeln!(text, "  {:<36} {}", reader.name, reader.verdict(&q.tensor_parallel));
            }
        }
    }
    for note in &i.notes {
        let _ = writeln!(text, "  {note}");
    }
    for tensor in &i.tensors {
        let shape = tensor.shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let _ = writeln!(
            text,
            "{:<56} {:<5} [{shape}]  {}",
            tensor.name,
            tensor.dtype,
            bytes(tensor.bytes as u64)
        );
    }
    text
}
