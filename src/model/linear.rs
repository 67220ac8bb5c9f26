//! Linear layers: dense, or packed as in a GPTQ checkpoint.

use tch::{Device, Kind, Tensor};

use crate::{
    error::{Error, Result, TorchContext},
    gptq::QuantizedLinear,
    kernels,
    pack::PackedView,
};

/// A linear layer.
pub trait Linear {
    /// `x` `[…, K]` → `[…, N]`, same kind.
    ///
    /// # Errors
    /// When libtorch fails, as a rule for want of memory.
    fn forward(&self, x: &Tensor) -> Result<Tensor>;
}

/// A linear with a dense weight.
#[derive(Debug)]
pub struct Dense {
    /// `[N, K]`, possibly a transposed view.
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Dense {
    /// `weight` `[N, K]`, `bias` `[N]`, of one kind.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// The dense form of a solved linear, for going on with the calibration.
    ///
    /// # Errors
    /// When `kind` is not a kind that forward passes run in, or memory ends.
    pub fn from_quantized(
        linear: &QuantizedLinear,
        bias: Option<&Tensor>,
        kind: Kind,
        device: Device,
    ) -> Result<Self> {
        let size = [linear.in_features() as i64, linear.out_features() as i64];
        let transposed = match kind {
            Kind::BFloat16 => {
                let dense = linear.dequantize(|w| half::bf16::from_f32(w).to_bits());
                Tensor::f_from_data_size(bytemuck::cast_slice(&dense), &size, kind)
            }
            Kind::Half => {
                let dense = linear.dequantize(|w| half::f16::from_f32(w).to_bits());
                Tensor::f_from_data_size(bytemuck::cast_slice(&dense), &size, kind)
            }
            _ => {
                Tensor::f_from_data_size(bytemuck::cast_slice(&linear.dequantize(|w| w)), &size, Kind::Float)
            }
        };
        let weight = transposed.and_then(|w| w.f_to_device(device)?.f_tr()).torch("dequantize a linear")?;
        let bias = bias.map(|b| b.f_to_kind(kind)).transpose().torch("convert a bias")?;
        Ok(Self { weight, bias })
    }

    /// A dense linear in another kind.
    ///
    /// # Errors
    /// When memory ends.
    pub fn converted(weight: &Tensor, bias: Option<&Tensor>, kind: Kind) -> Result<Self> {
        let weight = weight.f_to_kind(kind).torch("convert a weight")?;
        let bias = bias.map(|b| b.f_to_kind(kind)).transpose().torch("convert a bias")?;
        Ok(Self { weight, bias })
    }
}

impl Linear for Dense {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.f_linear(&self.weight, self.bias.as_ref()).torch("multiply with a weight")
    }
}

/// A packed linear, multiplied without a dense copy of its weight. CPU, fp32.
#[derive(Debug)]
pub struct Packed<'a> {
    weight: PackedView<'a>,
    /// `[N]` fp32.
    bias: Option<Tensor>,
}

impl<'a> Packed<'a> {
    /// `bias` `[N]` fp32 on the CPU.
    pub fn new(weight: PackedView<'a>, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }
}

impl Linear for Packed<'_> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if (x.kind(), x.device()) != (Kind::Float, Device::Cpu) {
            return Err(Error::Value {
                what: "input of a packed linear".into(),
                expected: "fp32 on the CPU".into(),
                found: format!("{:?} on {:?}", x.kind(), x.device()),
            });
        }
        let (k, n) = (self.weight.in_features(), self.weight.out_features());
        let rows = x.numel() / k;
        let x = x.f_contiguous().torch("lay out an input")?;
        // SAFETY: a contiguous fp32 CPU tensor of `rows·k` values, alive until the end of this function.
        let input = unsafe { std::slice::from_raw_parts(x.data_ptr().cast::<f32>(), rows * k) };
        let mut size = x.size();
        *size.last_mut().expect("an input has at least one axis") = n as i64;
        let y = Tensor::f_zeros(&size, (Kind::Float, Device::Cpu)).torch("allocate an output")?;
        // SAFETY: just allocated, contiguous, `rows·n` values, and nobody else knows of it.
        let output = unsafe { std::slice::from_raw_parts_mut(y.data_ptr().cast::<f32>(), rows * n) };
        kernels::matmul(input, rows, &self.weight, output);
        match &self.bias {
            Some(bias) => y.f_add(bias).torch("add a bias"),
            None => Ok(y),
        }
    }
}
