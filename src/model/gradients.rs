//! Gradients through the unquantized model, one layer at a time.

use std::cell::Cell;

use tch::{Kind, TchError, Tensor};

use super::{Dense, Layer, Linear, Runner, Transformer, runner::shaped};
use crate::{
    architectures::ModelConfig,
    error::{Result, TorchContext},
};

/// Tokens whose logits are computed together.
const LOGIT_TOKENS: i64 = 256;

/// Gradients of one layer.
pub struct LayerGradients {
    /// With respect to the layer's inputs, `[B, S, hidden]`.
    pub hidden: Tensor,
    /// With respect to the outputs of each linear of the layer, `[…, N]`; `None` for an expert without tokens.
    pub outputs: Vec<Option<Tensor>>,
}

/// A linear whose outputs are kept.
struct Recorded<'a> {
    linear: &'a dyn Linear,
    output: &'a Cell<Option<Tensor>>,
}

impl Linear for Recorded<'_> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let output = self.linear.forward(x)?;
        self.output.set(Some(output.shallow_clone()));
        Ok(output)
    }
}

impl Transformer<'_> {
    /// Runs a layer on `hidden` `[B, S, hidden]` and propagates `gradient`, with respect to its output, back through it.
    /// The layer is fp32, but its linears may be of another kind.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn layer_gradients(
        &self,
        layer: &Layer<'_>,
        hidden: &Tensor,
        gradient: &Tensor,
    ) -> Result<LayerGradients> {
        tch::with_grad(|| {
            let hidden = hidden.detach().set_requires_grad(true);
            let outputs: Vec<Cell<Option<Tensor>>> = layer.linears.iter().map(|_| Cell::default()).collect();
            let mut linears: Vec<Box<dyn Linear + '_>> = Vec::with_capacity(outputs.len());
            for (linear, output) in layer.linears.iter().zip(&outputs) {
                linears.push(Box::new(Recorded { linear: &**linear, output }));
            }
            let recorded = Layer::new(layer.index, layer.parts.shallow_clone(), linears);
            let next = self.forward(&recorded, &hidden, None)?;
            let outputs: Vec<Option<Tensor>> = outputs.iter().map(Cell::take).collect();
            let back = || -> Result<_, TchError> {
                let product = next.f_mul(gradient)?.f_sum(Kind::Float)?;
                let with_respect_to: Vec<&Tensor> =
                    std::iter::once(&hidden).chain(outputs.iter().flatten()).collect();
                Tensor::f_run_backward(&[&product], &with_respect_to, false, false)
            };
            let mut gradients = back().torch("take gradients through a layer")?.into_iter();
            let hidden = gradients.next().expect("a gradient for each tensor");
            let outputs =
                outputs.iter().map(|output| output.as_ref().and_then(|_| gradients.next())).collect();
            Ok(LayerGradients { hidden, outputs })
        })
    }
}

impl Runner<'_> {
    /// The gradient of `−log p(y)` with respect to the last layer's outputs `hidden` `[B, S, hidden]`. For each token, `y` is
    /// drawn from the model's own prediction with a number of `uniform` `[B, S]`, in `0..1`. The model is one of [`Runner::for_gradients`].
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn sampled_gradient(&self, hidden: &Tensor, uniform: &Tensor) -> Result<Tensor> {
        tch::with_grad(|| {
            let hidden = hidden.detach().set_requires_grad(true);
            let normalized = self.normalized(&hidden)?;
            let of_normalized =
                tch::no_grad(|| sampled(self.transformer().config(), &normalized, &self.head, uniform))?;
            let back = || -> Result<_, TchError> {
                let product = normalized.f_mul(&of_normalized)?.f_sum(Kind::Float)?;
                Ok(Tensor::f_run_backward(&[&product], &[&hidden], false, false)?.remove(0))
            };
            back().torch("take gradients through the last norm")
        })
    }
}

/// The gradient with respect to the output layer's inputs.
fn sampled(config: &ModelConfig, normalized: &Tensor, head: &Dense, uniform: &Tensor) -> Result<Tensor> {
    let shape = normalized.size();
    let flat = || -> Result<_, TchError> {
        Ok((normalized.f_detach()?.f_reshape([-1, shape[2]])?, uniform.f_reshape([-1, 1])?))
    };
    let (inputs, uniform) = flat().torch("lay out hidden states")?;
    let tokens = inputs.size()[0];
    let mut parts = Vec::new();
    for first in (0..tokens).step_by(LOGIT_TOKENS as usize) {
        let count = LOGIT_TOKENS.min(tokens - first);
        let inputs = inputs.f_narrow(0, first, count).torch("split hidden states")?;
        let logits = shaped(config, head.forward(&inputs)?)?;
        let of_logits = || -> Result<_, TchError> {
            let probabilities = logits.f_softmax(-1, Kind::Float)?;
            let sums = running_sums(&probabilities)?;
            let last = probabilities.size()[1] - 1;
            let drawn = uniform.f_narrow(0, first, count)?.f_mul(&sums.f_narrow(1, last, 1)?)?;
            let y = drawn.f_searchsorted(&sums, false, true, "right", None::<&Tensor>)?.f_clamp(0, last)?;
            let ones = y.f_to_kind(Kind::Float)?.f_ones_like()?.f_neg()?;
            let of_shaped = probabilities.f_scatter_add(1, &y, &ones)?;
            let of_capped = match config.logits_softcap {
                // Of cap · tanh(x / cap).
                Some(cap) => {
                    let slope = logits.f_div_scalar(cap)?.f_square()?.f_neg()?.f_add_scalar(1.0)?;
                    of_shaped.f_mul(&slope)?
                }
                None => of_shaped,
            };
            match config.logits_multiplier {
                1.0 => Ok(of_capped),
                by => of_capped.f_mul_scalar(by),
            }
        };
        parts.push(head.backward(&of_logits().torch("draw tokens")?)?);
    }
    Tensor::f_cat(&parts, 0).and_then(|all| all.f_view(&shape[..])).torch("join gradients")
}

/// Probabilities that are summed by one product.
const SUMMED: i64 = 256;

/// Sums of `x` `[T, V]` along each row up to each element.
fn running_sums(x: &Tensor) -> Result<Tensor, TchError> {
    // On CUDA libtorch's `cumsum` adds in any order.
    if x.device().is_cuda() { sums_by_products(x) } else { x.f_cumsum(-1, Kind::Float) }
}

/// The same by products with triangles of ones, whose order is fixed: in blocks of a row, then over the blocks.
fn sums_by_products(x: &Tensor) -> Result<Tensor, TchError> {
    let [t, v] = x.size()[..] else { unreachable!("tokens by vocabulary") };
    let blocks = (v + SUMMED - 1) / SUMMED;
    let triangle = |size: i64, diagonal: i64| {
        Tensor::f_ones([size, size], (x.kind(), x.device())).and_then(|ones| ones.f_triu(diagonal))
    };
    let padded = x.f_constant_pad_nd([0, blocks * SUMMED - v])?.f_view([t, blocks, SUMMED])?;
    let within = padded.f_matmul(&triangle(SUMMED, 0)?)?;
    let totals = within.f_select(2, SUMMED - 1)?;
    let before = totals.f_mm(&triangle(blocks, 1)?)?;
    within.f_add(&before.f_unsqueeze(2)?)?.f_view([t, blocks * SUMMED])?.f_narrow(1, 0, v)?.f_contiguous()
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::architectures::tests::{parse, small_config};

    #[test]
    fn sums_by_products_are_running_sums() {
        tch::manual_seed(1);
        for v in [1, 255, 256, 1000] {
            let x = Tensor::rand([3, v], (Kind::Float, Device::Cpu));
            let (expected, found) = (x.cumsum(-1, Kind::Float), sums_by_products(&x).unwrap());
            assert_eq!(found.size(), expected.size());
            let error = ((found - &expected) / expected).abs().max().double_value(&[]);
            assert!(error < 1e-5, "{v}: {error}");
        }
    }

    #[test]
    fn tokens_are_drawn_as_they_are_predicted() {
        let options = (Kind::Float, Device::Cpu);
        // Three tokens with probabilities 0.2, 0.5 and 0.3 from one input.
        let weight = Tensor::from_slice(&[0.2f32, 0.5, 0.3]).log().reshape([3, 1]);
        let head = Dense::new(weight.shallow_clone(), None);
        let uniform = (Tensor::arange(1000, options) + 0.5) / 1000.0;
        let gradients = sampled(
            &parse(&small_config()).unwrap(),
            &Tensor::ones([1, 1000, 1], options),
            &head,
            &uniform.reshape([1, 1000]),
        )
        .unwrap();
        // Of −log p(y): the mean of the inputs' weights less that of y's.
        let mean = f64::try_from(gradients.mean(Kind::Float)).unwrap();
        assert!(mean.abs() < 1e-3, "the expected gradient of a true sample is zero: {mean}");
        let first = f64::try_from(gradients.get(0).get(0).get(0)).unwrap();
        let expected = 0.2 * 0.2f64.ln() + 0.5 * 0.5f64.ln() + 0.3 * 0.3f64.ln() - 0.2f64.ln();
        assert!((first - expected).abs() < 1e-4, "{first} {expected}");
    }
}
