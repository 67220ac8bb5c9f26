//! Results of solvers.

use std::borrow::Cow;

use half::f16;
use tch::{Device, Kind, Tensor};

use super::DeviceLinear;
use crate::{
    amx,
    error::{Result, TorchContext},
    gptq::{BlockLinear, QuantizedLinear, raw::values_mut},
};

/// One solved linear.
#[derive(Debug)]
pub struct Solution {
    /// Codes, scales, zeros, groups.
    pub linear: Solved,
    /// `tr(D H Dᵀ)` with the undamped `H`: the mean squared error of the linear's output.
    pub squared_error: f64,
    /// Output features that are rounded to nearest, because compensation would have made their errors larger: the grid clips
    /// compensated weights.
    pub uncompensated: usize,
    /// Why the linear was rounded to nearest instead of solved, if it was: see [`super::OrRounded`].
    pub fallback: Option<String>,
}

/// Codes, scales, zeros and groups, on the host or on the solver's device.
#[derive(Debug)]
pub enum Solved {
    /// In the machine's memory.
    Host(QuantizedLinear),
    /// On a device.
    Device(DeviceLinear),
    /// Blocks of ggml, in the machine's memory.
    Blocks(BlockLinear),
}

impl Solved {
    /// `K`.
    pub fn in_features(&self) -> usize {
        match self {
            Self::Host(linear) => linear.in_features(),
            Self::Device(linear) => linear.in_features(),
            Self::Blocks(linear) => linear.in_features(),
        }
    }

    /// `N`.
    pub fn out_features(&self) -> usize {
        match self {
            Self::Host(linear) => linear.out_features(),
            Self::Device(linear) => linear.out_features(),
            Self::Blocks(linear) => linear.out_features(),
        }
    }

    /// The dense weight, transposed: `[K, N]` on the linear's device. Values are those in fp32 that a reader computes, then rounded to
    /// `kind`, which is fp32, fp16 or bf16.
    ///
    /// # Errors
    /// When memory is exhausted.
    pub fn dequantize(&self, kind: Kind) -> Result<Tensor> {
        match self {
            Self::Host(linear) => dequantized(linear, kind),
            Self::Device(linear) => linear.dequantize(kind),
            Self::Blocks(linear) => {
                let size = [linear.out_features() as i64, linear.in_features() as i64];
                let dense = Tensor::f_from_slice(&linear.dequantize()).and_then(|w| w.f_view(size));
                let dense = dense.and_then(|w| w.f_to_kind(kind)?.f_tr()?.f_contiguous());
                dense.torch("dequantize a linear")
            }
        }
    }

    /// Joins `parts`, which hold some output features each: the `i`-th output feature of the concatenated parts becomes
    /// output feature `rows[i]`. The result is on the host if any part is.
    ///
    /// # Errors
    /// When memory is exhausted.
    pub fn joined(parts: Vec<Self>, rows: &[i64]) -> Result<Self> {
        let (mut on_host, mut on_device, mut blocks) = (Vec::new(), Vec::new(), Vec::new());
        for part in parts {
            match part {
                Self::Host(linear) => on_host.push(linear),
                Self::Device(linear) => on_device.push(linear),
                Self::Blocks(linear) => blocks.push(linear),
            }
        }
        if !blocks.is_empty() {
            assert!(on_host.is_empty() && on_device.is_empty(), "parts have one format");
            return Ok(Self::Blocks(BlockLinear::joined(&blocks, rows)));
        }
        if on_host.is_empty() {
            return DeviceLinear::joined(&on_device, rows).map(Self::Device);
        }
        // The host has the parts that could not be solved on the device.
        for linear in &on_device {
            on_host.push(linear.to_host()?);
        }
        Ok(Self::Host(QuantizedLinear::joined(&on_host, rows)))
    }

    /// The linear on the host; from a device, a copy.
    ///
    /// # Errors
    /// When the copy from the device fails.
    ///
    /// # Panics
    /// When it is in blocks of ggml.
    pub fn on_host(&self) -> Result<Cow<'_, QuantizedLinear>> {
        match self {
            Self::Host(linear) => Ok(Cow::Borrowed(linear)),
            Self::Device(linear) => linear.to_host().map(Cow::Owned),
            Self::Blocks(linear) => panic!("a linear of {} is not in GPTQ's format", linear.kind()),
        }
    }
}

/// `[K, N]` on the CPU.
fn dequantized(linear: &QuantizedLinear, kind: Kind) -> Result<Tensor> {
    let size = [linear.in_features() as i64, linear.out_features() as i64];
    let mut transposed = Tensor::f_empty(size, (kind, Device::Cpu)).torch("dequantize a linear")?;
    match kind {
        Kind::BFloat16 => {
            linear.dequantize_into(values_mut(&mut transposed), |w| (amx::nearest_bf16(w) >> 16) as u16)
        }
        Kind::Half => linear.dequantize_into(values_mut(&mut transposed), f16::from_f32),
        _ => linear.dequantize_into(values_mut(&mut transposed), |w: f32| w),
    }
    Ok(transposed)
}
