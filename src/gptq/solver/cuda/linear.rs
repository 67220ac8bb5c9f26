//! A solved linear on the device of its solver.

use std::sync::Arc;

use half::f16;
use tch::{Device, Kind, TchError, Tensor};

use super::launch::Launcher;
use crate::{
    error::{Result, TorchContext},
    gptq::QuantizedLinear,
    variant::Bits,
};

/// A [`QuantizedLinear`] on a device. It is packed there, so that only packed words are copied to the host.
#[derive(Debug)]
pub struct DeviceLinear {
    pub(super) bits: Bits,
    /// `[K, N]` bytes; rows need not be contiguous, as columns of a stack.
    pub(super) codes: Tensor,
    /// `[G, N]` fp16.
    pub(super) scales: Tensor,
    /// `[G, N]` bytes.
    pub(super) zeros: Tensor,
    /// `[K]`.
    pub(super) g_idx: Vec<u32>,
    /// `[K]` int, the same on the device.
    pub(super) device_g_idx: Tensor,
    pub(super) launcher: Arc<Launcher>,
}

/// Packed codes and scales of a linear; zeros are not packed yet.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedCodes {
    /// Words `[K·b/32, N]`: codes along `K`.
    pub words: Vec<i32>,
    /// `[G, N]`.
    pub scales: Vec<f16>,
    /// The true zero points, `[G, N]`.
    pub zeros: Vec<u8>,
}

impl DeviceLinear {
    /// Bits a code.
    pub fn bits(&self) -> Bits {
        self.bits
    }

    /// `K`.
    pub fn in_features(&self) -> usize {
        self.g_idx.len()
    }

    /// `N`.
    pub fn out_features(&self) -> usize {
        self.codes.size()[1] as usize
    }

    /// The group of each input feature, `[K]`.
    pub fn g_idx(&self) -> &[u32] {
        &self.g_idx
    }

    /// Joins `parts`, which hold some output features each and share their groups: the `i`-th output feature of the
    /// concatenated parts becomes output feature `rows[i]`.
    ///
    /// # Errors
    /// When memory is exhausted.
    ///
    /// # Panics
    /// When there are no parts.
    pub fn joined(parts: &[Self], rows: &[i64]) -> Result<Self> {
        let first = parts.first().expect("a linear has parts");
        let join = || -> Result<_, TchError> {
            let places =
                Tensor::f_from_slice(rows)?.f_argsort(0, false)?.f_to_device(first.launcher.device())?;
            let gather = |part: fn(&Self) -> &Tensor| {
                Tensor::f_cat(&parts.iter().map(part).collect::<Vec<_>>(), 1)?.f_index_select(1, &places)
            };
            Ok(Self {
                bits: first.bits,
                codes: gather(|part| &part.codes)?,
                scales: gather(|part| &part.scales)?,
                zeros: gather(|part| &part.zeros)?,
                g_idx: first.g_idx.clone(),
                device_g_idx: first.device_g_idx.shallow_clone(),
                launcher: Arc::clone(&first.launcher),
            })
        };
        join().torch("join a linear's rows")
    }

    /// Packs on the device and copies to the host.
    ///
    /// # Errors
    /// When memory is exhausted or the device fails.
    ///
    /// # Panics
    /// When a dimension is not a multiple of the pack factor; plans are checked for that before any work.
    pub fn pack(&self) -> Result<PackedCodes> {
        let words = self.launcher.timed("pack", || self.words())?;
        let copy = || -> Result<_, TchError> {
            Ok(PackedCodes {
                words: to_host(&words)?,
                scales: to_host(&self.scales)?,
                zeros: to_host(&self.zeros)?,
            })
        };
        self.launcher.timed("copy", copy).torch("copy a packed linear")
    }

    /// `[K·b/32, N]` int on the device.
    pub(super) fn words(&self) -> Result<Tensor> {
        let size = [(self.in_features() * self.bits.get() as usize / 32) as i64, self.codes.size()[1]];
        let words = Tensor::f_empty(size, (Kind::Int, self.launcher.device())).torch("pack a linear")?;
        self.launcher.pack(&self.codes, &words, self.bits)?;
        Ok(words)
    }

    /// The dense weight, transposed: `[K, N]` on the device. Values are exact in fp32, then rounded to `kind`.
    ///
    /// # Errors
    /// When memory is exhausted.
    pub fn dequantize(&self, kind: Kind) -> Result<Tensor> {
        let (k, n) = (self.in_features() as i64, self.codes.size()[1]);
        let dense = Tensor::f_empty([k, n], (kind, self.launcher.device())).torch("dequantize a linear")?;
        self.launcher.dequantize(&self.codes, &self.scales, &self.zeros, &self.device_g_idx, &dense)?;
        Ok(dense)
    }

    /// A copy on the host, with unpacked codes.
    ///
    /// # Errors
    /// When memory is exhausted or the device fails.
    pub fn to_host(&self) -> Result<QuantizedLinear> {
        let copy = || -> Result<_, TchError> {
            let (codes, zeros) = (to_host(&self.codes)?, to_host(&self.zeros)?);
            Ok(QuantizedLinear::new(self.bits, codes, to_host(&self.scales)?, zeros, self.g_idx.clone()))
        };
        copy().torch("copy a linear to the host")
    }
}

/// All values of a matrix, in one copy.
fn to_host<T: tch::kind::Element + bytemuck::Pod>(matrix: &Tensor) -> Result<Vec<T>, TchError> {
    assert_eq!(matrix.kind(), T::KIND);
    let mut values = vec![T::zeroed(); matrix.numel()];
    let (bytes, size) = (values.as_mut_ptr().cast::<u8>(), matrix.size());
    // SAFETY: the tensor has the vector's size and is dropped before the vector is used or moved.
    let mut host = unsafe { Tensor::f_from_blob(bytes, &size, &[], T::KIND, Device::Cpu) }?;
    host.f_copy_(matrix)?;
    drop(host);
    Ok(values)
}
