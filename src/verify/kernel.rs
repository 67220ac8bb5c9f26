//! Every packed linear of a checkpoint through the matmul that runs it, against dequantize-and-multiply in fp64, on the
//! model's own activations.
//!
//! The activations are those of the model's forward pass over a text. The fp64 outputs are the inputs of the next linear, so
//! that a fault in one linear does not reach the others.

use std::cell::RefCell;

use serde::Serialize;
use tch::{Device, Kind, TchError, Tensor};

use super::{
    Finding,
    rounding::{Exact, KERNEL_TOLERANCE, Outputs},
};
use crate::{
    architectures::LinearId,
    calibration::{Corpus, Tokenizer, Tokens, Windows},
    checkpoint::{Checkpoint, PackedTensors},
    error::{Error, Result, TorchContext},
    model::{Compute, Linear, PackedLayer, Runner},
    pack::PackedView,
    plan::ComputeDtype,
    progress::{Event, Progress},
};

/// Tokens that go through a linear together: kernels differ by their number.
pub const KERNEL_TOKENS: [usize; 5] = [1, 7, 16, 64, 2048];

/// Device, kind and text of the check.
pub struct KernelOptions<'a> {
    /// The device.
    pub device: Device,
    /// The kind of the activations.
    pub dtype: ComputeDtype,
    /// The text; 2048 tokens of it are used.
    pub corpus: &'a Corpus,
}

/// Errors of the int4 matmul over a checkpoint's packed linears.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KernelReport {
    /// `fp16 on cuda:0`.
    pub computed: String,
    /// The text.
    pub text: String,
    /// Numbers of tokens that each linear was run with.
    pub tokens: Vec<usize>,
    /// Largest [`KernelError::rounding`] that passes.
    pub tolerance: f64,
    /// In the order of the forward pass.
    pub linears: Vec<KernelError>,
}

/// Errors of one linear: the largest figures over all numbers of tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KernelError {
    /// `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// `‖y − ŷ‖ / ‖ŷ‖` over all outputs, Frobenius norms.
    pub relative_error: f64,
    /// Largest `|y − ŷ|` of an output, over what rounding explains of it; infinite for NaN.
    pub rounding: f64,
    /// The number of tokens at which that was.
    pub tokens: usize,
    /// The output feature at which that was.
    pub feature: usize,
}

impl KernelReport {
    /// The linear that is farthest off.
    pub fn worst(&self) -> Option<&KernelError> {
        self.linears.iter().max_by(|a, b| a.rounding.total_cmp(&b.rounding))
    }
}

/// Checks every packed linear. `seen` may change the tensors of the matmul, so that tests can show that a fault is found; fp64
/// uses those on disk.
///
/// # Errors
/// When the text is too short, or the model cannot be run.
pub fn check_kernels(
    checkpoint: &Checkpoint,
    options: &KernelOptions<'_>,
    seen: &dyn Fn(&LinearId, &mut PackedTensors<'_>),
    progress: &dyn Progress,
) -> Result<KernelReport> {
    let _guard = tch::no_grad_guard();
    let compute = Compute::new(options.device, options.dtype, checkpoint)?;
    let config = checkpoint.config();
    let most = KERNEL_TOKENS[KERNEL_TOKENS.len() - 1];
    let seq_len = most.min(config.max_position_embeddings);
    let tokenizer = Tokenizer::open(checkpoint.dir())?;
    let tokens = Tokens::new(options.corpus, &tokenizer, config.vocab_size)?;
    let windows = Windows::sequential(&tokens, seq_len, Some(most.div_ceil(seq_len)))?;
    if windows.ids().len() < most {
        return Err(Error::TooLittleText {
            dataset: tokens.dataset().to_owned(),
            tokens: windows.ids().len(),
            windows: most.div_ceil(seq_len),
            seq_len,
            needed: most,
        });
    }

    let runner = Runner::quantized(checkpoint, seq_len, compute)?;
    let mut hidden = runner.transformer().embed(windows.ids(), seq_len)?;
    let errors = RefCell::new(Vec::new());
    progress.begin("checking the int4 matmul", config.num_layers() as u64);
    for layer in 0..config.num_layers() {
        let right = runner.packed_layer(layer)?;
        let mut given: PackedLayer<'_> = right.clone();
        for (position, tensors) in given.iter_mut().enumerate() {
            tensors.iter_mut().for_each(|tensors| seen(&config.linear_id(layer, position), tensors));
        }
        let mut tensors = right.iter();
        let ready = runner.layer_of(layer, &given, &mut |id, linear| match tensors
            .next()
            .and_then(Option::as_ref)
        {
            Some(right) => Box::new(Checked { id, linear, right, compute, errors: &errors }),
            None => linear,
        })?;
        hidden = runner.transformer().forward(&ready, &hidden, None)?;
        runner.notes().iter().for_each(|note| progress.event(&Event::Note(note)));
        runner.transformer().release(layer);
        progress.advance(1);
    }
    Ok(KernelReport {
        computed: compute.to_string(),
        text: tokens.dataset().to_owned(),
        tokens: KERNEL_TOKENS.to_vec(),
        tolerance: KERNEL_TOLERANCE,
        linears: errors.into_inner(),
    })
}

/// Errors beyond the tolerance, as findings.
pub(super) fn findings(report: &KernelReport) -> impl Iterator<Item = Finding> {
    let wrong = report.linears.iter().filter(|linear| linear.rounding > report.tolerance);
    wrong.map(|linear| Finding {
        subject: linear.name.clone(),
        problem: format!(
            "multiplied in {} with {} tokens, output feature {} is {:.3e} times as far from fp64 as rounding explains \
             (relative error of all outputs {:.3e})",
            report.computed, linear.tokens, linear.feature, linear.rounding, linear.relative_error
        ),
    })
}

/// A linear whose outputs are compared with fp64; it returns the fp64 outputs.
struct Checked<'a> {
    id: LinearId,
    linear: Box<dyn Linear + 'a>,
    right: &'a PackedTensors<'a>,
    compute: Compute,
    errors: &'a RefCell<Vec<KernelError>>,
}

impl Linear for Checked<'_> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let bias = self.right.bias.as_ref().map(|bias| Tensor::f_from_slice(bias)).transpose();
        let bias = bias.torch("read a bias")?;
        let exact = Exact::new(&PackedView::from(self.right), bias.as_ref(), self.compute.device)?;
        let mut size = x.size();
        let x = x.f_reshape([-1, size[size.len() - 1]]).torch("lay out an input")?;
        let outputs = exact.outputs(&x)?;
        let error = measure(&self.id, &*self.linear, &exact, &x, &outputs, self.compute)?;
        self.errors.borrow_mut().push(error);
        *size.last_mut().expect("an input has at least one axis") = outputs.y.size()[1];
        outputs.y.f_to_kind(self.compute.kind).and_then(|y| y.f_view(&size[..])).torch("lay out an output")
    }
}

/// Runs the linear on rows of `x` `[T, K]`, evenly spread, as many as each of [`KERNEL_TOKENS`].
fn measure(
    id: &LinearId,
    linear: &dyn Linear,
    exact: &Exact,
    x: &Tensor,
    outputs: &Outputs,
    compute: Compute,
) -> Result<KernelError> {
    let rows = x.size()[0];
    let mut worst =
        KernelError { name: id.to_string(), relative_error: 0.0, rounding: 0.0, tokens: 0, feature: 0 };
    for tokens in KERNEL_TOKENS {
        let spread: Vec<i64> = (0..tokens as i64).map(|i| (2 * i + 1) * rows / (2 * tokens as i64)).collect();
        let index = Tensor::f_from_slice(&spread).and_then(|i| i.f_to_device(x.device()));
        let index = index.torch("choose tokens")?;
        let y = linear.forward(&x.f_index_select(0, &index).torch("choose tokens")?)?;
        let outputs = outputs.rows(&index).torch("choose tokens")?;
        let allowed = exact.allowed(&outputs, compute)?;
        let compared = || -> Result<(f64, f64, usize), TchError> {
            let difference = y.f_to_kind(Kind::Double)?.f_sub(&outputs.y)?;
            let norm = |t: &Tensor| f64::try_from(t.f_square()?.f_sum(Kind::Double)?);
            let (far, size) = (norm(&difference)?, norm(&outputs.y)?);
            let ratio =
                difference.f_abs()?.f_div(&allowed)?.f_nan_to_num(f64::INFINITY, f64::INFINITY, None)?;
            let (largest, feature) = ratio.f_amax([0], false)?.f_max_dim(0, false)?;
            let relative = if size > 0.0 { (far / size).sqrt() } else { far.sqrt() };
            Ok((relative, f64::try_from(largest)?, i64::try_from(feature)? as usize))
        };
        let (relative, rounding, feature) = compared().torch("compare with fp64")?;
        // A NaN counts as the worst there is.
        worst.relative_error =
            if relative.is_nan() { f64::INFINITY } else { worst.relative_error.max(relative) };
        if rounding > worst.rounding || worst.tokens == 0 {
            (worst.rounding, worst.tokens, worst.feature) = (rounding, tokens, feature);
        }
    }
    Ok(worst)
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod tests;
