//! Linear layers: dense, or packed as in a GPTQ checkpoint.

use tch::{Device, Kind, Tensor};

use crate::{
    error::{Error, Result, TorchContext},
    kernels::{self, CpuMatmul, CudaMatmul},
    pack::PackedView,
    products,
};

/// A linear layer.
pub trait Linear {
    /// `x` `[…, K]` → `[…, N]`, same kind.
    ///
    /// # Errors
    /// When libtorch fails, usually because memory is exhausted.
    fn forward(&self, x: &Tensor) -> Result<Tensor>;
}

/// A linear with a dense weight. Inputs and gradients of another kind are converted to the weight's, and results back.
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

    /// The dense form of a packed linear, in `kind` on `device`. `bias` `[N]` likewise.
    ///
    /// # Errors
    /// When memory is exhausted.
    pub fn from_packed(
        linear: &PackedView<'_>,
        bias: Option<Tensor>,
        kind: Kind,
        device: Device,
    ) -> Result<Self> {
        let size = [linear.in_features() as i64, linear.out_features() as i64];
        let transposed = Tensor::f_empty(size, (Kind::Float, Device::Cpu)).torch("dequantize a linear")?;
        kernels::dequantize_into(linear, values_mut(&transposed));
        let weight = transposed.f_to_device(device).and_then(|w| w.f_to_kind(kind)?.f_tr());
        Ok(Self { weight: weight.torch("dequantize a linear")?, bias })
    }

    /// A gradient with respect to outputs `[…, N]` → that with respect to inputs `[…, K]`.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn backward(&self, gradient: &Tensor) -> Result<Tensor> {
        let back = gradient.f_to_kind(self.weight.kind()).and_then(|g| g.f_matmul(&self.weight));
        back.and_then(|back| back.f_to_kind(gradient.kind())).torch("take a gradient through a weight")
    }
}

impl Linear for Dense {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.f_to_kind(self.weight.kind()).and_then(|x| x.f_linear(&self.weight, self.bias.as_ref()));
        y.and_then(|y| y.f_to_kind(x.kind())).torch("multiply with a weight")
    }
}

/// A linear with a dense weight, for forward passes of many tokens.
#[derive(Debug)]
pub struct ForwardDense {
    weight: products::Weight,
    bias: Option<Tensor>,
}

impl ForwardDense {
    /// A `weight` `[N, K]` and `bias` `[N]`, converted to a kind.
    ///
    /// # Errors
    /// When memory is exhausted.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>, kind: Kind) -> Result<Self> {
        let weight = weight.f_to_kind(kind).and_then(|weight| products::Weight::new(&weight));
        let bias = bias.map(|b| b.f_to_kind(kind)).transpose().torch("convert a bias")?;
        Ok(Self { weight: weight.torch("convert a weight")?, bias })
    }
}

impl Linear for ForwardDense {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.weight.linear(x, self.bias.as_ref()).torch("multiply with a weight")
    }
}

/// The values of a new tensor, which has no other user yet.
#[expect(clippy::mut_from_ref, reason = "tensors own their memory behind a shared handle")]
fn values_mut<T: bytemuck::Pod>(new: &Tensor) -> &mut [T] {
    assert!(new.is_contiguous() && new.kind().elt_size_in_bytes() == size_of::<T>());
    // SAFETY: contiguous, of elements of this size, and not shared yet.
    unsafe { std::slice::from_raw_parts_mut(new.data_ptr().cast(), new.numel()) }
}

/// A packed linear, multiplied without a dense copy of its weight. CPU, fp32.
#[derive(Debug)]
pub struct Packed<'a> {
    weight: CpuMatmul<'a>,
    /// `[N]` fp32.
    bias: Option<Tensor>,
}

impl<'a> Packed<'a> {
    /// `bias` `[N]` is fp32 on the CPU.
    pub fn new(weight: PackedView<'a>, bias: Option<Tensor>) -> Self {
        Self { weight: CpuMatmul::new(weight), bias }
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
        self.weight.forward(input, rows, values_mut(&y));
        match &self.bias {
            Some(bias) => y.f_add(bias).torch("add a bias"),
            None => Ok(y),
        }
    }
}

/// A packed linear on a CUDA device.
pub struct CudaPacked {
    matmul: CudaMatmul,
    /// `[N]` of the matmul's kind, on its device.
    bias: Option<Tensor>,
}

impl CudaPacked {
    /// `bias` `[N]` of the matmul's kind, on its device.
    pub fn new(matmul: CudaMatmul, bias: Option<Tensor>) -> Self {
        Self { matmul, bias }
    }
}

impl Linear for CudaPacked {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut size = x.size();
        let k = size.last().copied().unwrap_or_default();
        let rows = x.f_reshape([-1, k]).torch("lay out an input")?;
        let y = self.matmul.forward(&rows)?;
        *size.last_mut().expect("an input has at least one axis") = y.size()[1];
        let y = y.f_view(&size[..]).torch("lay out an output")?;
        match &self.bias {
            Some(bias) => y.f_add(bias).torch("add a bias"),
            None => Ok(y),
        }
    }
}
