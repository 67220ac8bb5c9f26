//! Weights in PyTorch's own format, `pytorch_model.bin`: a zip of uncompressed storages, and a pickle with the place of each
//! tensor. candle reads the pickle into plain descriptions; no code in it runs.

use std::{collections::HashSet, fs::File, io::BufReader, path::Path};

use candle_core::{DType, pickle::read_pth_tensor_info};
use safetensors::Dtype;
use zip::{CompressionMethod, ZipArchive};

use super::reader::Entry;
use crate::error::{Error, Result};

/// Names and places of the tensors in the file at `path` of `bytes` bytes, which is number `shard` of the checkpoint.
///
/// # Errors
/// When it is not such a file, or a tensor does not lie in it row by row.
pub(super) fn parse(path: &Path, bytes: usize, shard: usize) -> Result<Vec<(String, Entry)>> {
    let fail = |problem: String| Error::PytorchFile { path: path.into(), problem };
    let file = File::open(path).map_err(Error::io("read", path))?;
    let mut zip = ZipArchive::new(BufReader::new(file))
        .map_err(|error| fail(format!("it is not the zip file that PyTorch writes since 1.6: {error}")))?;
    let infos = read_pth_tensor_info(path, false, None).map_err(|error| fail(error.to_string()))?;
    let mut tensors = Vec::with_capacity(infos.len());
    let mut names = HashSet::new();
    for info in infos {
        let of_tensor = |problem: String| fail(format!("tensor `{}`: {problem}", info.name));
        if !names.insert(info.name.clone()) {
            return Err(of_tensor("it is there twice".into()));
        }
        let dtype = match info.dtype {
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            DType::F32 => Dtype::F32,
            // Buffers beside the weights.
            _ => continue,
        };
        if !info.layout.is_contiguous() {
            return Err(of_tensor("it is a view that does not lie row by row".into()));
        }
        let entry = zip.by_name(&info.path).map_err(|error| of_tensor(error.to_string()))?;
        let start = match (entry.compression(), entry.data_start()) {
            (CompressionMethod::Stored, Some(start)) => start as usize,
            _ => return Err(of_tensor("its storage is compressed".into())),
        };
        let shape = info.layout.dims().to_vec();
        let offset = info.layout.start_offset();
        let size = shape.iter().try_fold(info.dtype.size_in_bytes(), |size, &n| size.checked_mul(n));
        let end = size.and_then(|size| offset.checked_add(size));
        match end {
            Some(end) if end as u64 <= entry.size() && start + end <= bytes => {
                let range = start + offset..start + end;
                tensors.push((info.name.clone(), Entry { shard, dtype, shape, range, stored: None }));
            }
            _ => {
                let size = entry.size();
                return Err(of_tensor(format!("shape {shape:?} does not fit its storage of {size} bytes")));
            }
        }
    }
    Ok(tensors)
}
