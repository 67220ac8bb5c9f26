//! Block tuning: the scales of a decoder layer's linears, tuned together for what comes out of the layer.

use half::f16;
use tch::{Kind, TchError, Tensor};

use super::{Dense, Layer, Linear, Llama, Norms};
use crate::{
    checkpoint::LinearKind,
    error::{Result, TorchContext},
    gptq::QuantizedLinear,
};

/// How far a scale moves in the first step, as a part of it; less and less until the last, which does not move.
const RATE: f64 = 1e-3;
/// Adam's decays of the mean and the square of gradients, and what keeps it from dividing by zero.
const DECAYS: [f64; 2] = [0.9, 0.95];
const EPSILON: f64 = 1e-12;

/// A decoder layer of quantized linears, whose scales change while their codes stay (after AutoRound, arXiv 2309.05516, and
/// OmniQuant, 2308.13137, which tune roundings and ranges block by block).
pub struct TunedLayer<'a> {
    /// In fp32.
    llama: &'a Llama<'a>,
    norms: Norms,
    /// In the order of [`LinearKind::ALL`].
    linears: Vec<TunedLinear>,
    steps: u32,
    taken: u32,
}

struct TunedLinear {
    /// As solved, transposed: `[K, N]` fp32.
    weight: Tensor,
    /// The group of each input feature `[K]`.
    groups: Tensor,
    /// As solved, `[G, N]` fp32.
    scales: Tensor,
    /// What they are multiplied by, less 1: `[G, N]`.
    change: Tensor,
    /// Adam's means of gradients and of their squares.
    moments: [Tensor; 2],
    /// `[N]` fp32.
    bias: Option<Tensor>,
}

impl TunedLinear {
    fn new(linear: &QuantizedLinear, bias: Option<&Tensor>, llama: &Llama<'_>) -> Result<Self> {
        let device = llama.device();
        let [k, n, groups] =
            [linear.in_features(), linear.out_features(), linear.groups()].map(|size| size as i64);
        let scales: Vec<f32> = linear.scales().iter().map(|scale| scale.to_f32()).collect();
        let members: Vec<i64> = linear.g_idx().iter().map(|&group| i64::from(group)).collect();
        let make = || -> Result<Self, TchError> {
            let on = |values: &[f32], size: [i64; 2]| {
                Tensor::f_from_slice(values)?.f_view(size)?.f_to_device(device)
            };
            let scales = on(&scales, [groups, n])?;
            Ok(Self {
                weight: on(&linear.dequantize(|w| w), [k, n])?,
                groups: Tensor::f_from_slice(&members)?.f_to_device(device)?,
                change: scales.f_zeros_like()?,
                moments: [scales.f_zeros_like()?, scales.f_zeros_like()?],
                scales,
                bias: bias.map(|bias| bias.f_to_device(device)?.f_to_kind(Kind::Float)).transpose()?,
            })
        };
        make().torch("prepare a linear for tuning")
    }

    /// `[K, N]` fp32, with the scales as they are now.
    fn scaled(&self) -> Result<Tensor, TchError> {
        self.weight.f_mul(&self.change.f_add_scalar(1.0)?.f_index_select(0, &self.groups)?)
    }

    fn linear(&self) -> Result<Box<dyn Linear>> {
        let weight = self.scaled().and_then(|w| w.f_tr()).torch("scale a weight")?;
        Ok(Box::new(Dense::new(weight, self.bias.as_ref().map(Tensor::shallow_clone))))
    }

    /// A step of Adam, the `step`-th from 1 on.
    fn step(&mut self, gradient: &Tensor, rate: f64, step: i32) -> Result<(), TchError> {
        let [mean, square] = &mut self.moments;
        let [first, second] = DECAYS;
        *mean = mean.f_mul_scalar(first)?.f_add(&gradient.f_mul_scalar(1.0 - first)?)?;
        *square = square.f_mul_scalar(second)?.f_add(&gradient.f_square()?.f_mul_scalar(1.0 - second)?)?;
        let mean = mean.f_div_scalar(1.0 - first.powi(step))?;
        let root = square.f_div_scalar(1.0 - second.powi(step))?.f_sqrt()?.f_add_scalar(EPSILON)?;
        self.change = self.change.f_sub(&mean.f_div(&root)?.f_mul_scalar(rate)?)?;
        Ok(())
    }

    /// Scales as fp16 holds them; those that would become zero or infinite stay what they were.
    fn round(&mut self) -> Result<(), TchError> {
        let rounded = self.scales.f_mul(&self.change.f_add_scalar(1.0)?)?.f_to_kind(Kind::Half)?;
        let rounded = rounded.f_to_kind(Kind::Float)?;
        let good = rounded.f_isfinite()?.f_logical_and(&rounded.f_ne(0.0)?)?;
        let rounded = rounded.f_where_self(&good, &self.scales)?;
        // A group of zeros may have a scale of any size, which nothing is lost with.
        self.change = rounded.f_div(&self.scales)?.f_sub_scalar(1.0)?.f_nan_to_num(0.0, 0.0, 0.0)?;
        Ok(())
    }

    fn scales(&self) -> Result<Vec<f16>, TchError> {
        let scales = self.scales.f_mul(&self.change.f_add_scalar(1.0)?)?.f_flatten(0, -1)?;
        Ok(Vec::<f32>::try_from(scales)?.into_iter().map(f16::from_f32).collect())
    }
}

impl<'a> TunedLayer<'a> {
    /// A layer of linears and their biases, in the order of [`LinearKind::ALL`], to be tuned in so many `steps`. `llama` computes in
    /// fp32.
    ///
    /// # Errors
    /// When memory ends.
    pub fn new(
        llama: &'a Llama<'a>,
        norms: &Norms,
        linears: &[(&QuantizedLinear, Option<&Tensor>)],
        steps: u32,
    ) -> Result<Self> {
        assert_eq!((linears.len(), llama.kind()), (LinearKind::ALL.len(), Kind::Float));
        let linears = linears.iter().map(|(linear, bias)| TunedLinear::new(linear, *bias, llama));
        let linears = linears.collect::<Result<_>>()?;
        Ok(Self { llama, norms: norms.shallow_clone(), linears, steps, taken: 0 })
    }

    fn layer(&self) -> Result<Layer<'static>> {
        let linears = self.linears.iter().map(TunedLinear::linear).collect::<Result<Vec<_>>>()?;
        let linears = linears.try_into().unwrap_or_else(|_| unreachable!("one for each kind"));
        Ok(Layer { norms: self.norms.shallow_clone(), linears })
    }

    /// Hidden states behind the layer, `[B, S, hidden]`, in fp32.
    ///
    /// # Errors
    /// When memory ends.
    pub fn forward(&self, hidden: &Tensor) -> Result<Tensor> {
        self.llama.forward(&self.layer()?, hidden)
    }

    /// What the errors of the layer's outputs come to: the mean of `weighted(outputs − target)²`.
    ///
    /// # Errors
    /// When memory ends, or `weighted` fails.
    pub fn loss(
        &self,
        [hidden, target]: [&Tensor; 2],
        weighted: &dyn Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<f64> {
        let loss = self.loss_of(&self.layer()?, [hidden, target], weighted)?;
        f64::try_from(loss).torch("read a loss")
    }

    fn loss_of(
        &self,
        layer: &Layer<'_>,
        [hidden, target]: [&Tensor; 2],
        weighted: &dyn Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let errors = self.llama.forward(layer, hidden)?.f_sub(target).torch("compare a layer's outputs")?;
        let mean = |errors: Tensor| errors.f_square()?.f_mean(Kind::Float);
        weighted(&errors).and_then(|errors| mean(errors).torch("compare a layer's outputs"))
    }

    /// Takes one step down the gradient of [`TunedLayer::loss`].
    ///
    /// # Errors
    /// When memory ends, or `weighted` fails.
    pub fn step(&mut self, pair: [&Tensor; 2], weighted: &dyn Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
        let gradients = tch::with_grad(|| {
            for linear in &mut self.linears {
                linear.change = linear.change.detach().set_requires_grad(true);
            }
            let loss = self.loss_of(&self.layer()?, pair, weighted)?;
            let changes: Vec<&Tensor> = self.linears.iter().map(|linear| &linear.change).collect();
            Tensor::f_run_backward(&[&loss], &changes, false, false).torch("take gradients of scales")
        })?;
        let rate = RATE * (1.0 - f64::from(self.taken) / f64::from(self.steps.max(1)));
        self.taken += 1;
        for (linear, gradient) in self.linears.iter_mut().zip(gradients) {
            linear.change = linear.change.detach();
            linear.step(&gradient, rate, self.taken as i32).torch("tune scales")?;
        }
        Ok(())
    }

    /// Ends the tuning: scales are now as fp16 holds them.
    ///
    /// # Errors
    /// When memory ends.
    pub fn round(&mut self) -> Result<()> {
        self.linears.iter_mut().try_for_each(|linear| linear.round().torch("round scales"))
    }

    /// The scales `[G, N]` of each linear.
    ///
    /// # Errors
    /// When they cannot be copied.
    pub fn scales(&self) -> Result<Vec<Vec<f16>>> {
        self.linears.iter().map(|linear| linear.scales().torch("read scales")).collect()
    }
}
