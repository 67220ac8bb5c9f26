//! A small Llama in a temporary folder, and ways to spoil it.

mod quantization;
mod reader;
mod shards;
mod values;
mod writer;

use std::{fs, path::Path};

use half::f16;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::Dtype;
use crate::{
    architectures::tests::{parse, small_config},
    error::{Error, Result},
};

/// One tensor of a file to be made.
#[derive(Clone)]
struct Given {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn given(name: impl Into<String>, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> Given {
    Given { name: name.into(), dtype, shape: shape.into(), bytes }
}

/// `count` fp16 numbers, small multiples of 1/8.
fn f16_bytes(count: usize) -> Vec<u8> {
    (0..count).flat_map(|i| f16::from_f32((i % 17) as f32 / 8.0 - 1.0).to_le_bytes()).collect()
}

fn i32_bytes(values: impl IntoIterator<Item = i32>) -> Vec<u8> {
    values.into_iter().flat_map(i32::to_le_bytes).collect()
}

fn dense_model(config: &Value) -> Vec<Given> {
    let config = parse(config).unwrap();
    let linears = config.linears().map(|(id, linear)| (id.weight(), linear.shape.to_vec()));
    config
        .dense_tensors()
        .into_iter()
        .chain(linears)
        .map(|(name, shape)| given(name, Dtype::F16, &shape, f16_bytes(shape.iter().product())))
        .collect()
}

/// A file with this header text and data, whatever they say.
fn raw_file(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

fn weights_file(tensors: &[Given]) -> Vec<u8> {
    let (mut entries, mut data) = (serde_json::Map::new(), Vec::new());
    for tensor in tensors {
        let offsets = [data.len(), data.len() + tensor.bytes.len()];
        let entry = json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets });
        entries.insert(tensor.name.clone(), entry);
        data.extend_from_slice(&tensor.bytes);
    }
    raw_file(Value::Object(entries).to_string().as_bytes(), &data)
}

/// A folder with `config.json` and these files.
fn folder(config: &Value, files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

/// The error's variant and its message, with `dir` written as `DIR`.
#[track_caller]
fn told<T>(result: Result<T>, dir: &Path) -> (&'static str, String) {
    let Err(error) = result else { panic!("an error was expected") };
    let variant = match &error {
        Error::Io { .. } => "Io",
        Error::Json { .. } => "Json",
        Error::UnsupportedArchitecture { .. } => "UnsupportedArchitecture",
        Error::Config { .. } => "Config",
        Error::NotACheckpoint { .. } => "NotACheckpoint",
        Error::WeightsFormat { .. } => "WeightsFormat",
        Error::SeveralWeights { .. } => "SeveralWeights",
        Error::Index { .. } => "Index",
        Error::Safetensors { .. } => "Safetensors",
        Error::MissingTensor { .. } => "MissingTensor",
        Error::TensorShape { .. } => "TensorShape",
        Error::TensorDtype { .. } => "TensorDtype",
        Error::TensorValue { .. } => "TensorValue",
        Error::TensorWrite { .. } => "TensorWrite",
        Error::NonFinite { .. } => "NonFinite",
        Error::Fp16Overflow { .. } => "Fp16Overflow",
        Error::PackFactor { .. } => "PackFactor",
        Error::CheckpointKind { .. } => "CheckpointKind",
        _ => "another",
    };
    (variant, error.to_string().replace(&dir.display().to_string(), "DIR"))
}

/// Asserts the variant and the whole message.
#[track_caller]
fn assert_error<T>(result: Result<T>, dir: &Path, variant: &'static str, message: &str) {
    assert_eq!(told(result, dir), (variant, message.to_owned()));
}
