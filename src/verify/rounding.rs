//! Largest difference of a product with packed weights from dequantize-and-multiply in fp64 that rounding alone explains.
//!
//! With `ŷ = Σ_k w_k x_k` exact and `r = √(Σ_k w_k² x_k²)`, the size that ŷ would have if the signs of its terms were
//! random, three things are rounded: the output once (relative to ŷ), sums in fp32 (relative to r and ŷ, growing with the
//! number of additions), and with many tokens on CUDA each weight to the activations' kind (errors of random sign, so
//! relative to r). A wrong code, zero point, scale or place in the permutation changes an output by about r/√K or more,
//! and shows clearest where ŷ happens to be small.

use tch::{Device, Kind, TchError, Tensor};

use crate::{
    error::{Result, TorchContext},
    kernels,
    model::Compute,
    pack::PackedView,
};

/// The tolerance: the largest difference of an output, in units of what rounding explains (`Exact::allowed`).
pub const KERNEL_TOLERANCE: f64 = 1.0;

/// Tokens up to which the CUDA kernels apply scales to fp32 sums, so that no weight is rounded.
const EXACT_WEIGHTS_TOKENS: usize = 16;
/// Weights' rounding errors add up to a normally distributed one of about 0.4·u·r; of 10⁸ outputs the farthest is 5.7
/// deviations away. u is the unit roundoff.
const WEIGHT_ROUNDINGS: f64 = 3.0;

/// A linear's outputs in fp64.
pub(super) struct Exact {
    /// `[K, N]` fp64.
    weight: Tensor,
    /// `[N]` fp64.
    bias: Option<Tensor>,
    in_features: usize,
}

/// Outputs for some tokens.
pub(super) struct Outputs {
    /// `[M, N]` fp64, with the bias.
    pub(super) y: Tensor,
    /// Without it.
    product: Tensor,
    /// r, `[M, N]`.
    magnitude: Tensor,
    /// `√(Σ_k x_k²)`, `[M, 1]`.
    input: Tensor,
}

impl Outputs {
    /// The outputs of some of the tokens.
    pub(super) fn rows(&self, index: &Tensor) -> Result<Self, TchError> {
        let of = |t: &Tensor| t.f_index_select(0, index);
        Ok(Self {
            y: of(&self.y)?,
            product: of(&self.product)?,
            magnitude: of(&self.magnitude)?,
            input: of(&self.input)?,
        })
    }
}

impl Exact {
    /// Dequantized by the CPU's kernels, which share nothing with the CUDA ones.
    pub(super) fn new(linear: &PackedView<'_>, bias: Option<&Tensor>, device: Device) -> Result<Self> {
        let (k, n) = (linear.in_features(), linear.out_features());
        let mut dense = vec![0.0f32; k * n];
        kernels::dequantize_into(linear, &mut dense);
        let made = || -> Result<Self, TchError> {
            let weight = Tensor::f_from_slice(&dense)?.f_view([k as i64, n as i64])?;
            let bias = bias.map(|b| b.f_to_device(device)?.f_to_kind(Kind::Double)).transpose()?;
            Ok(Self { weight: weight.f_to_device(device)?.f_to_kind(Kind::Double)?, bias, in_features: k })
        };
        made().torch("dequantize a linear in fp64")
    }

    /// `x` `[M, K]` of any kind.
    pub(super) fn outputs(&self, x: &Tensor) -> Result<Outputs> {
        let made = || -> Result<Outputs, TchError> {
            let x = x.f_to_kind(Kind::Double)?;
            let product = x.f_matmul(&self.weight)?;
            let squares = x.f_square()?;
            let magnitude = squares.f_matmul(&self.weight.f_square()?)?.f_sqrt()?;
            let input = squares.f_sum_dim_intlist(-1, true, Kind::Double)?.f_sqrt()?;
            let y = match &self.bias {
                Some(bias) => product.f_add(bias)?,
                None => product.shallow_clone(),
            };
            Ok(Outputs { y, product, magnitude, input })
        };
        made().torch("multiply in fp64")
    }

    /// Largest error by rounding of each output of a product of all these tokens at once, `[M, N]`.
    pub(super) fn allowed(&self, outputs: &Outputs, compute: Compute) -> Result<Tensor> {
        let Outputs { y, product, magnitude, input } = outputs;
        let rounding = Rounding::new(compute, self.in_features, y.size()[0] as usize);
        let made = || -> Result<Tensor, TchError> {
            let sizes = product.f_abs()?;
            let sums = sizes.f_add(magnitude)?.f_mul_scalar(rounding.sums)?;
            let weights = magnitude.f_mul_scalar(rounding.weights)?;
            // A bias is added to an output that has been rounded.
            let biased = if self.bias.is_some() { sizes.f_add(&y.f_abs()?)? } else { sizes };
            let output = biased.f_mul_scalar(rounding.output)?;
            let tiny = input.f_add_scalar(1.0)?.f_mul_scalar(rounding.smallest)?;
            output.f_add(&sums)?.f_add(&weights)?.f_add(&tiny)
        };
        made().torch("bound rounding")
    }
}

/// Relative roundings of a kernel.
struct Rounding {
    output: f64,
    sums: f64,
    weights: f64,
    /// Half the distance of numbers next to zero, and what products with them come to.
    smallest: f64,
}

impl Rounding {
    fn new(compute: Compute, in_features: usize, tokens: usize) -> Self {
        let fp32 = 2f64.powi(-24);
        let k = in_features as f64;
        if compute.device == Device::Cpu && compute.kind == Kind::Float {
            // One rounding for each addition, whatever their order (Higham 2002, §3.1).
            return Self { output: fp32, sums: (k + 4.0) * fp32, weights: 0.0, smallest: f64::MIN_POSITIVE };
        }
        let (unit, smallest) = match compute.kind {
            Kind::Half => (2f64.powi(-11), 2f64.powi(-25)),
            _ => (2f64.powi(-8), f64::MIN_POSITIVE),
        };
        // Tensor cores cut sums of 16 products off; up to four units in the last place for each.
        let sums = (k / 16.0 + 8.0) * 4.0 * fp32;
        let weights = if tokens > EXACT_WEIGHTS_TOKENS { WEIGHT_ROUNDINGS * unit } else { sums };
        Self { output: unit, sums, weights, smallest: 4.0 * smallest }
    }
}
