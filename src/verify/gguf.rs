//! Checks of a GGUF file: tensors, shapes, finite numbers, and checksums where the file has them.

use rayon::prelude::*;
use sha2::{Digest, Sha256};
use tch::{Device, Kind};

use super::{Finding, LinearDistance, ScaleSigns, Verification};
use crate::{
    checkpoint::{Checkpoint, Dtype, TensorView},
    error::{Result, TorchContext},
    ggml::BlockType,
    gguf::{HEADER_SHA256, Header, TENSOR_SHA256, dequantize, header_digest},
    progress::Progress,
    report::ReaderReport,
    units::hex,
};

/// Elements that are dequantized at a time; a multiple of every block.
const CHUNK: usize = 1 << 20;

pub(super) fn verify(
    checkpoint: &Checkpoint,
    header: &Header,
    file: &[u8],
    against: Option<&Checkpoint>,
    progress: &dyn Progress,
) -> Result<Verification> {
    let config = checkpoint.config();
    let mut findings = Vec::new();
    let wanted = config.dense_tensors().into_iter();
    let linears = config.linears().flat_map(|(id, linear)| {
        let bias = linear.bias.then(|| (id.bias(), linear.shape[..1].to_vec()));
        std::iter::once((id.weight(), linear.shape.to_vec())).chain(bias)
    });
    let wanted: Vec<(String, Vec<usize>)> = wanted.chain(linears).collect();
    progress.begin("checking tensors", wanted.len() as u64);
    for (name, shape) in &wanted {
        let problem = match checkpoint.view_shaped(name, shape) {
            Err(error) => Some(error.to_string()),
            Ok(view) => not_finite(&view)?,
        };
        findings.extend(problem.map(|problem| Finding { subject: name.clone(), problem }));
        checkpoint.release([name]);
        progress.advance(1);
    }
    for name in checkpoint.names().filter(|name| wanted.iter().all(|(wanted, _)| wanted != name)) {
        findings.push(Finding { subject: name.into(), problem: "is not a tensor of this model".into() });
    }
    let checksums = checksums(header, file, &mut findings);
    let distances = match against {
        Some(source) if findings.is_empty() => distances(checkpoint, source, progress)?,
        _ => Vec::new(),
    };
    Ok(Verification {
        findings,
        tensors: header.tensors.len(),
        checksums,
        scales: ScaleSigns::default(),
        readers: vec![llama_cpp()],
        tensor_parallel: Vec::new(),
        notes: Vec::new(),
        distances,
        kernel: None,
    })
}

/// The program that reads GGUF files.
pub fn llama_cpp() -> ReaderReport {
    ReaderReport { name: "llama.cpp".into(), living: true, refused: None }
}

/// Fault of a tensor's numbers, if there is one: a scale that is not finite makes numbers that are not.
fn not_finite(view: &TensorView<'_>) -> Result<Option<String>> {
    let kind = match view.stored {
        Some(stored) => stored.kind,
        None => match view.dtype {
            Dtype::F16 => BlockType::F16,
            Dtype::BF16 => BlockType::BF16,
            _ => BlockType::F32,
        },
    };
    let mut broken = 0;
    for bytes in view.bytes.chunks(CHUNK / kind.block_len() * kind.block_bytes()) {
        let mut numbers = vec![0.0; bytes.len() / kind.block_bytes() * kind.block_len()];
        dequantize(kind, bytes, &mut numbers);
        broken += numbers.par_iter().filter(|number| !number.is_finite()).count();
    }
    let all: usize = view.shape.iter().product();
    let what = if kind.is_plain() { "" } else { ", as a scale in its block is not" };
    Ok((broken > 0).then(|| format!("{broken} of {all} values are not finite{what}")))
}

/// Compares the digests that `gptq gguf` writes; returns whether there were any.
fn checksums(header: &Header, file: &[u8], findings: &mut Vec<Finding>) -> bool {
    let metadata = &header.metadata;
    let mut found =
        |subject: &str, problem: String| findings.push(Finding { subject: subject.into(), problem });
    let (stored, tensors) = (metadata.text(HEADER_SHA256), metadata.get(TENSOR_SHA256));
    if let Some(stored) = stored {
        let digest = header_digest(&file[..header.data_start.min(file.len())], stored);
        if digest != stored {
            let problem = format!("is not what was written: sha256 {digest:.12}…, expected {stored:.12}…");
            found("header", problem);
        }
    }
    let Some(tensors) = tensors else { return stored.is_some() };
    match tensors.texts().filter(|digests| digests.len() == header.tensors.len()) {
        None => found(
            TENSOR_SHA256,
            format!("expected {} texts, found {}", header.tensors.len(), tensors.shown()),
        ),
        Some(digests) => {
            for (tensor, expected) in header.tensors.iter().zip(digests) {
                let digest = hex(&Sha256::digest(&file[tensor.range.clone()]));
                if digest != expected {
                    let problem = format!(
                        "its bytes are not those that were written: sha256 {digest:.12}…, expected {expected:.12}…"
                    );
                    found(&tensor.name, problem);
                }
            }
        }
    }
    true
}

/// `‖W − Ŵ‖ / ‖W‖` of each linear. There is no limit: files hold all kinds of types, and equalized or rotated models lie far
/// from their source.
fn distances(
    checkpoint: &Checkpoint,
    source: &Checkpoint,
    progress: &dyn Progress,
) -> Result<Vec<LinearDistance>> {
    source.check()?;
    let config = checkpoint.config();
    progress.begin("comparing with the source", config.linears().count() as u64);
    let mut distances = Vec::new();
    for (id, linear) in config.linears() {
        let load = |model: &Checkpoint| model.load(&id.weight(), &linear.shape, Kind::Float, Device::Cpu);
        let (weight, own) = (load(source)?, load(checkpoint)?);
        let norm = |tensor: &tch::Tensor| {
            tensor.f_norm().and_then(f64::try_from).torch("compare a weight with its source")
        };
        let difference = weight.f_sub(&own).torch("compare a weight with its source")?;
        distances.push(LinearDistance {
            name: id.to_string(),
            relative_error: norm(&difference)? / norm(&weight)?.max(f64::MIN_POSITIVE),
        });
        source.release([id.weight()]);
        checkpoint.release([id.weight()]);
        progress.advance(1);
    }
    Ok(distances)
}
