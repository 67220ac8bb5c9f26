//! The header of a safetensors file, parsed by the `safetensors` crate, with errors that name the tensor and the numbers.

use std::{collections::BTreeMap, path::Path};

use safetensors::{
    SafeTensorError, SafeTensors,
    tensor::{Metadata, TensorInfo},
};
use serde_json::Value;

use crate::error::{Error, Result};

/// Bytes of the little-endian length in front of the header.
const LENGTH_BYTES: usize = 8;
/// The longest header that the format's own library reads, bytes.
const MAX_HEADER: u64 = 100_000_000;

/// Parses the header of `file`, the whole file. Returns where tensor data starts, from the file's start, and the
/// tensors, whose offsets count from there and are inside the file.
pub(super) fn parse(path: &Path, file: &[u8]) -> Result<(usize, Metadata)> {
    let fail = |problem: String| Error::Safetensors { path: path.into(), problem };
    let Some(length) = file.first_chunk::<LENGTH_BYTES>() else {
        return Err(fail(format!("it has {} bytes, and the header's length alone takes 8", file.len())));
    };
    let length = u64::from_le_bytes(*length);
    let rest = &file[LENGTH_BYTES..];
    if length > MAX_HEADER {
        return Err(fail(format!("it says its header has {length} bytes; at most {MAX_HEADER} are allowed")));
    }
    // Fits: at most MAX_HEADER.
    let length = length as usize;
    let Some((header, data)) = rest.split_at_checked(length) else {
        return Err(fail(format!(
            "it says its header has {length} bytes, and only {} follow; the file is cut short",
            rest.len()
        )));
    };
    match SafeTensors::read_metadata(file) {
        Ok((_, metadata)) => Ok((LENGTH_BYTES + length, metadata)),
        Err(error) => Err(fail(explain(&error, header, data.len()))),
    }
}

/// The error's text, with the tensor and the numbers that the crate leaves out.
fn explain(error: &SafeTensorError, header: &[u8], data: usize) -> String {
    match error {
        SafeTensorError::InvalidHeader(error) => {
            format!("its header is not UTF-8 from byte {} on", error.valid_up_to())
        }
        SafeTensorError::InvalidHeaderDeserialization(error) => {
            format!("its header is not the JSON expected: {error}")
        }
        _ => contradiction(header, data).unwrap_or_else(|| error.to_string()),
    }
}

/// The first tensor, in file order, whose offsets or size do not fit.
fn contradiction(header: &[u8], data: usize) -> Option<String> {
    let mut entries: BTreeMap<String, Value> = serde_json::from_slice(header).ok()?;
    entries.remove("__metadata__");
    let mut tensors: Vec<(String, TensorInfo)> = entries
        .into_iter()
        .map(|(name, value)| serde_json::from_value(value).map(|info| (name, info)))
        .collect::<Result<_, _>>()
        .ok()?;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let mut previous = ("the start of the data".to_owned(), 0);
    for (name, TensorInfo { dtype, shape, data_offsets: (start, end) }) in tensors {
        let (before, expected) = &previous;
        if end < start {
            return Some(format!("tensor `{name}` ends at {end}, before its start {start}"));
        }
        if start != *expected {
            let what = if start < *expected { "overlaps" } else { "leaves a hole after" };
            return Some(format!(
                "tensor `{name}` starts at {start} and {what} {before}, which ends at {expected}"
            ));
        }
        let bits = shape.iter().try_fold(dtype.bitsize(), |product, &size| product.checked_mul(size));
        let Some(bits) = bits else {
            return Some(format!("tensor `{name}`: shape {shape:?} of {dtype} is beyond any file"));
        };
        if !bits.is_multiple_of(8) || bits / 8 != end - start {
            return Some(format!(
                "tensor `{name}`: shape {shape:?} of {dtype} takes {} bytes, and its offsets {start}..{end} hold {}",
                bits.div_ceil(8),
                end - start
            ));
        }
        if end > data {
            return Some(format!(
                "tensor `{name}` ends at byte {end} of the data, and the file holds {data}; the file is cut short"
            ));
        }
        previous = (format!("tensor `{name}`"), end);
    }
    Some(format!("its header describes {} bytes of data, and the file holds {data}", previous.1))
}
