//! What solvers return.

use std::borrow::Cow;

use half::f16;
use tch::{Device, Kind, Tensor};

use super::DeviceLinear;
use crate::{
    amx,
    error::{Result, TorchContext},
    gptq::{QuantizedLinear, raw::values_mut},
};

/// One solved linear.
#[derive(Debug)]
pub struct Solution {
    /// Codes, scales, zeros, groups.
    pub linear: Solved,
    /// `tr(D H Dᵀ)` with the undamped `H`: the mean squared error of the linear's output.
    pub squared_error: f64,
    /// Output features that are rounded to nearest, as compensation would have made their error larger: with the common
    /// grids it clips what it moves out of them.
    pub uncompensated: usize,
    /// Why it was rounded to nearest instead of solved, if it was: see [`super::OrRounded`].
    pub fallback: Option<String>,
}

/// Codes, scales, zeros and groups, where the solver left them.
#[derive(Debug)]
pub enum Solved {
    /// In the machine's memory.
    Host(QuantizedLinear),
    /// On a device.
    Device(DeviceLinear),
}

impl Solved {
    /// `K`.
    pub fn in_features(&self) -> usize {
        match self {
            Self::Host(linear) => linear.in_features(),
            Self::Device(linear) => linear.in_features(),
        }
    }

    /// `N`.
    pub fn out_features(&self) -> usize {
        match self {
            Self::Host(linear) => linear.out_features(),
            Self::Device(linear) => linear.out_features(),
        }
    }

    /// The dense weight, transposed: `[K, N]` where the solver left it, each value exact in fp32 and then rounded to `kind`, which is
    /// fp32, fp16 or bf16.
    ///
    /// # Errors
    /// When memory ends.
    pub fn dequantize(&self, kind: Kind) -> Result<Tensor> {
        match self {
            Self::Host(linear) => dequantized(linear, kind),
            Self::Device(linear) => linear.dequantize(kind),
        }
    }

    /// One linear out of linears of some rows each: the `i`-th row of all of `parts`, one after another, is output feature
    /// `rows[i]`.
    ///
    /// # Errors
    /// When memory ends, or some lie on a device and some do not.
    pub(super) fn joined(parts: Vec<Self>, rows: &[i64]) -> Result<Self> {
        let (mut on_host, mut on_device) = (Vec::new(), Vec::new());
        for part in parts {
            match part {
                Self::Host(linear) => on_host.push(linear),
                Self::Device(linear) => on_device.push(linear),
            }
        }
        if on_host.is_empty() {
            return DeviceLinear::joined(&on_device, rows).map(Self::Device);
        }
        // Some could not be solved on the device.
        for linear in &on_device {
            on_host.push(linear.to_host()?);
        }
        Ok(Self::Host(QuantizedLinear::joined(&on_host, rows)))
    }

    /// In the machine's memory, or a copy there.
    ///
    /// # Errors
    /// When it cannot be copied from the device.
    pub fn on_host(&self) -> Result<Cow<'_, QuantizedLinear>> {
        match self {
            Self::Host(linear) => Ok(Cow::Borrowed(linear)),
            Self::Device(linear) => linear.to_host().map(Cow::Owned),
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
