//! The numbers inside a tensor: checked on their raw bits, converted to fp16, made into a libtorch tensor.
//! Bytes may lie at any alignment.

use std::borrow::Cow;

use half::{f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;
use safetensors::Dtype;
use tch::{Device, Kind, Tensor};

use crate::{
    checkpoint::reader::TensorView,
    error::{Error, Result, TorchContext},
};

/// Magnitude bits of f32 from which a number is infinite or NaN.
const F32_NON_FINITE: u32 = 0x7F80_0000;
/// Magnitude bits of f32 65520, the smallest number that fp16 rounds to infinity.
const F32_BEYOND_F16: u32 = 0x477F_F000;
/// Magnitude bits of fp16 from which a number is infinite or NaN.
const F16_NON_FINITE: u32 = 0x7C00;

/// Bytes one task scans; a multiple of every element size.
const SCAN_CHUNK: usize = 1 << 20;
/// Elements one task converts.
const CONVERT_CHUNK: usize = 4096;

/// The tensor's dtype in libtorch; only the three floating-point dtypes a dense model may have.
pub(super) fn kind_of(view: &TensorView<'_>) -> Result<Kind> {
    match view.dtype {
        Dtype::F16 => Ok(Kind::Half),
        Dtype::BF16 => Ok(Kind::BFloat16),
        Dtype::F32 => Ok(Kind::Float),
        other => Err(Error::TensorDtype {
            name: view.name.into(),
            expected: "F16, BF16 or F32",
            found: other.to_string(),
        }),
    }
}

/// Refuses NaN and infinity and, when the values are wanted in fp16, what fp16 cannot hold.
pub(super) fn check(view: &TensorView<'_>, wanted_in_f16: bool) -> Result<()> {
    let beyond = if wanted_in_f16 { F32_BEYOND_F16 } else { u32::MAX };
    let (non_finite, too_large, width) = match kind_of(view)? {
        Kind::Half => scan(view.bytes, half_magnitude, F16_NON_FINITE, u32::MAX),
        Kind::BFloat16 => scan(view.bytes, bfloat_magnitude, F32_NON_FINITE, beyond),
        _ => scan(view.bytes, float_magnitude, F32_NON_FINITE, beyond),
    };
    if non_finite > 0 {
        return Err(Error::NonFinite {
            place: format!("tensor `{}`", view.name),
            count: non_finite,
            total: (view.bytes.len() / width) as u64,
            computed: false,
        });
    }
    if too_large > 0 {
        let value = |index| f32_at(view, index);
        let first = (0..view.bytes.len() / width).find(|&index| f16::from_f32(value(index)).is_infinite());
        let index = first.unwrap_or_default();
        let place = format!("tensor `{}`, element {index} (first of {too_large})", view.name);
        return Err(Error::Fp16Overflow { place, value: value(index) });
    }
    Ok(())
}

/// Counts elements of `N` bytes whose magnitude bits reach `non_finite` and `too_large`; returns `N` too.
fn scan<const N: usize>(
    bytes: &[u8],
    magnitude: impl Fn([u8; N]) -> u32 + Sync,
    non_finite: u32,
    too_large: u32,
) -> (u64, u64, usize) {
    let chunk_counts = |chunk: &[u8]| {
        let (mut bad, mut large) = (0u32, 0u32);
        for &element in chunk.as_chunks::<N>().0 {
            let bits = magnitude(element);
            bad += u32::from(bits >= non_finite);
            large += u32::from(bits >= too_large);
        }
        (u64::from(bad), u64::from(large))
    };
    let (bad, large) =
        bytes.par_chunks(SCAN_CHUNK).map(chunk_counts).reduce(|| (0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
    (bad, large, N)
}

fn half_magnitude(bytes: [u8; 2]) -> u32 {
    u32::from(u16::from_le_bytes(bytes) & 0x7FFF)
}

fn bfloat_magnitude(bytes: [u8; 2]) -> u32 {
    u32::from(u16::from_le_bytes(bytes) & 0x7FFF) << 16
}

fn float_magnitude(bytes: [u8; 4]) -> u32 {
    u32::from_le_bytes(bytes) & 0x7FFF_FFFF
}

/// Element `index` of an F16, BF16 or F32 tensor.
fn f32_at(view: &TensorView<'_>, index: usize) -> f32 {
    let halves = || view.bytes.as_chunks::<2>().0.get(index);
    match view.dtype {
        Dtype::F32 => view.bytes.as_chunks::<4>().0.get(index).map_or(0.0, |&b| f32::from_le_bytes(b)),
        Dtype::F16 => halves().map_or(0.0, |&b| f16::from_le_bytes(b).to_f32()),
        _ => halves().map_or(0.0, |&b| bfloat_to_f32(b)),
    }
}

fn bfloat_to_f32(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

/// The tensor as fp16 bytes, checked; borrowed when it is fp16 already. Rounds to nearest, ties to even.
pub(super) fn f16_bytes<'a>(view: &TensorView<'a>) -> Result<Cow<'a, [u8]>> {
    check(view, true)?;
    Ok(match view.dtype {
        Dtype::F16 => Cow::Borrowed(view.bytes),
        Dtype::BF16 => Cow::Owned(convert(view.bytes, bfloat_to_f32)),
        _ => Cow::Owned(convert(view.bytes, f32::from_le_bytes)),
    })
}

/// The tensor as fp32 bytes, each row multiplied by `factors`.
pub(super) fn scaled(view: &TensorView<'_>, factors: &[f32]) -> Result<Vec<u8>> {
    let count = view.bytes.len() / kind_of(view)?.elt_size_in_bytes();
    let mut floats = vec![0u8; count * size_of::<f32>()];
    let (numbers, _) = floats.as_chunks_mut::<4>();
    numbers.par_chunks_mut(factors.len().max(1)).enumerate().for_each(|(row, numbers)| {
        for (i, (number, factor)) in numbers.iter_mut().zip(factors).enumerate() {
            *number = (f32_at(view, row * factors.len() + i) * factor).to_le_bytes();
        }
    });
    Ok(floats)
}

fn convert<const N: usize>(bytes: &[u8], to_f32: impl Fn([u8; N]) -> f32 + Sync) -> Vec<u8> {
    let mut halves = vec![0u8; bytes.len() / N * size_of::<f16>()];
    let (source, _) = bytes.as_chunks::<N>();
    let (target, _) = halves.as_chunks_mut::<2>();
    target.par_chunks_mut(CONVERT_CHUNK).zip(source.par_chunks(CONVERT_CHUNK)).for_each(
        |(target, source)| {
            let mut floats = [0f32; CONVERT_CHUNK];
            let mut rounded = [f16::ZERO; CONVERT_CHUNK];
            let (floats, rounded) = (&mut floats[..source.len()], &mut rounded[..source.len()]);
            for (float, &element) in floats.iter_mut().zip(source) {
                *float = to_f32(element);
            }
            rounded.convert_from_f32_slice(floats);
            for (out, half) in target.iter_mut().zip(rounded) {
                *out = half.to_le_bytes();
            }
        },
    );
    halves
}

/// A tensor's numbers as they lie in files, little-endian.
pub fn to_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let copy = || {
        let tensor = tensor.f_to_device(Device::Cpu)?.f_contiguous()?;
        let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
        Ok(bytes)
    };
    copy().torch("copy a tensor's bytes")
}

/// A copy of the tensor as libtorch's `kind` on `device`. The values have been checked.
pub(super) fn to_tensor(view: &TensorView<'_>, kind: Kind, device: Device) -> Result<Tensor> {
    let action = || format!("load tensor `{}` {:?} to {device:?}", view.name, view.shape);
    let shape: Vec<i64> = view.shape.iter().map(|&size| size as i64).collect();
    let mut tensor = Tensor::f_empty(&shape, (kind, device)).torch(&action())?;
    copy_to(view, &mut tensor)?;
    Ok(tensor)
}

/// Copies the tensor's values, which have been checked, into another of its shape.
pub(super) fn copy_to(view: &TensorView<'_>, to: &mut Tensor) -> Result<()> {
    let stored = kind_of(view)?;
    let action = || format!("load tensor `{}` {:?} to {:?}", view.name, view.shape, to.device());
    let shape: Vec<i64> = view.shape.iter().map(|&size| size as i64).collect();
    let aligned = view.bytes.as_ptr().addr().is_multiple_of(stored.elt_size_in_bytes());
    let source = if aligned {
        // SAFETY: the header was checked against the file, so `bytes` holds exactly `shape` elements of `stored`;
        // it is aligned, and it outlives `source`, which is only read, here.
        unsafe { Tensor::f_from_blob(view.bytes.as_ptr(), &shape, &[], stored, Device::Cpu) }
    } else {
        Tensor::f_from_data_size(view.bytes, &shape, stored)
    };
    let source = source.torch(&action())?;
    let action = action();
    to.f_copy_(&source).torch(&action)
}
