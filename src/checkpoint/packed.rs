//! The packed tensors of one quantized linear, checked against the model's and the quantization's config.
//! `K` is the linear's input features, `N` its output features, `b` bits a code, `G = ceil(K / group size)`.

use std::borrow::Cow;

use half::f16;
use safetensors::Dtype;

use crate::{
    architectures::{LinearConfig, LinearId},
    checkpoint::{
        quantization::{CheckpointFormat, QuantizationConfig},
        reader::{Checkpoint, TensorView},
        values,
    },
    error::{Error, Result},
    variant::Bits,
};

/// A quantized linear as it lies in its file, row-major; borrowed from the file where dtype and alignment allow.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedTensors<'a> {
    /// Bits a code, `b`.
    pub bits: Bits,
    /// Format of `qzeros`.
    pub format: CheckpointFormat,
    /// `K`, a multiple of the packing factor.
    pub in_features: usize,
    /// `N`, a multiple of the packing factor.
    pub out_features: usize,
    /// `G`.
    pub groups: usize,
    /// Codes, `[K*b/32, N]`, packed along `K`.
    pub qweight: Cow<'a, [i32]>,
    /// Zero points, `[G, N*b/32]`, packed along `N`.
    pub qzeros: Cow<'a, [i32]>,
    /// Scales, `[G, N]`, finite.
    pub scales: Cow<'a, [f16]>,
    /// Group of each input feature, `[K]`, each in `0..G`; made from the group size when the file has none.
    pub g_idx: Cow<'a, [i32]>,
    /// Bias, `[N]`, finite; `None` when the model has none, also when the file then holds zeros.
    pub bias: Option<Cow<'a, [f16]>>,
}

/// The packed tensors of `linear`; `None` when it was left dense (it has a `weight` and no `qweight`).
///
/// Shapes, dtypes, group indices and scales are checked; every code and zero point is valid.
///
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/doc/branch.rs"));
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let branch = branch(&folder.path().join("branches"))?;
/// use gptq::{
///     checkpoint::{Checkpoint, QuantizationConfig, packed},
///     pack::PackedView,
/// };
///
/// let checkpoint = Checkpoint::open(&branch)?;
/// let quantization = QuantizationConfig::read(&checkpoint)?;
/// let (id, linear) = checkpoint.config().linears().next().expect("a linear");
/// assert_eq!(id.to_string(), "model.layers.0.self_attn.q_proj");
/// let tensors = packed(&checkpoint, &id, linear, &quantization)?.expect("packed tensors");
///
/// // The weight of input feature `k` and output feature `n` is `scale * (code - zero)`.
/// let (view, k, n) = (PackedView::from(&tensors), 7, 3);
/// let element = view.g_idx()[k] as usize * view.out_features() + n;
/// let zero = view.unpack_stored_zeros()[element] + view.format().zero_offset();
/// let code = view.unpack_codes()[k * view.out_features() + n];
/// let weight = view.scales()[element].to_f32() * (f32::from(code) - f32::from(zero));
/// assert!(weight.abs() < 1.0);
/// # Ok(())
/// # }
/// ```
pub fn packed<'a>(
    checkpoint: &'a Checkpoint,
    id: &LinearId,
    linear: &LinearConfig,
    quantization: &QuantizationConfig,
) -> Result<Option<PackedTensors<'a>>> {
    if !checkpoint.contains(&id.qweight()) && checkpoint.contains(&id.weight()) {
        return Ok(None);
    }
    let [out_features, in_features] = linear.shape;
    let bits = quantization.bits;
    check_pack_factor(id, linear, bits)?;
    // Exact and free of overflow: multiples of 32 bits, sizes below 2³¹.
    let words = |features: usize| features * bits.get() as usize / 32;
    let groups = quantization.group_size.groups(in_features);

    check_layout(checkpoint, id)?;
    let qweight = integers(&checkpoint.view_shaped(&id.qweight(), &[words(in_features), out_features])?)?;
    let qzeros = integers(&checkpoint.view_shaped(&id.qzeros(), &[groups, words(out_features)])?)?;
    let scales = halves(&checkpoint.view_shaped(&id.scales(), &[groups, out_features])?)?;
    let g_idx = if checkpoint.contains(&id.g_idx()) {
        let g_idx = integers(&checkpoint.view_shaped(&id.g_idx(), &[in_features])?)?;
        check_groups(id, &g_idx, groups)?;
        g_idx
    } else if quantization.sequential_groups() {
        let size = quantization.group_size.features(in_features);
        Cow::Owned((0..in_features).map(|k| (k / size) as i32).collect())
    } else {
        return Err(Error::MissingTensor { name: id.g_idx(), path: checkpoint.dir().into() });
    };
    let bias = bias(checkpoint, id, linear)?;
    let format = quantization.format;
    Ok(Some(PackedTensors {
        bits,
        format,
        in_features,
        out_features,
        groups,
        qweight,
        qzeros,
        scales,
        g_idx,
        bias,
    }))
}

/// Refuses the oldest layout of GPTQ-for-LLaMa, whose zero points are floats.
pub(super) fn check_layout(checkpoint: &Checkpoint, id: &LinearId) -> Result<()> {
    let old_zeros = id.float_zeros();
    if checkpoint.contains(&id.qzeros()) || !checkpoint.contains(&old_zeros) {
        return Ok(());
    }
    Err(Error::CheckpointKind {
        path: checkpoint.dir().into(),
        expected: "a GPTQ checkpoint with packed zero points (`qzeros`)",
        found: format!("the oldest layout of GPTQ-for-LLaMa, with float zero points (`{old_zeros}`)"),
    })
}

/// The zero points of packed `qzeros`, as they are stored, in the order of the output features; of several groups one after another.
pub fn stored_zeros(qzeros: &[i32], bits: Bits) -> impl Iterator<Item = u8> + '_ {
    let width = bits.get() as usize;
    (0..qzeros.len() * 32 / width).map(move |i| {
        let (word, shift) = (i * width / 32, i * width % 32);
        // With three bits a value may lie in two words.
        let next = qzeros.get(word + 1).map_or(0, |&next| next as u32);
        let both = u64::from(next) << 32 | u64::from(qzeros[word] as u32);
        (both >> shift) as u8 & bits.max_code()
    })
}

/// Refuses a linear whose codes or zero points do not fill whole 32-bit words.
///
/// # Errors
/// When one of its dimensions is not a multiple of the packing factor.
pub fn check_pack_factor(id: &LinearId, linear: &LinearConfig, bits: Bits) -> Result<()> {
    let ([out_features, in_features], multiple) = (linear.shape, bits.pack_factor());
    for (dimension, size) in [("in_features", in_features), ("out_features", out_features)] {
        if !size.is_multiple_of(multiple) {
            let (linear, bits) = (id.to_string(), bits.get());
            return Err(Error::PackFactor { linear, dimension, size, multiple, bits });
        }
    }
    Ok(())
}

fn check_groups(linear: &LinearId, g_idx: &[i32], groups: usize) -> Result<()> {
    let outside = |group: &i32| usize::try_from(*group).map_or(true, |group| group >= groups);
    match g_idx.iter().position(outside) {
        Some(index) => Err(Error::TensorValue {
            name: linear.g_idx(),
            index,
            expected: format!("a group from 0 to {}", groups - 1),
            found: g_idx[index].to_string(),
        }),
        None => Ok(()),
    }
}

/// The bias of a model that has biases; otherwise none, and what the file may hold must be zero.
fn bias<'a>(
    checkpoint: &'a Checkpoint,
    id: &LinearId,
    linear: &LinearConfig,
) -> Result<Option<Cow<'a, [f16]>>> {
    let name = id.bias();
    let wanted = linear.bias;
    if !wanted && !checkpoint.contains(&name) {
        return Ok(None);
    }
    let bias = halves(&checkpoint.view_shaped(&name, &linear.shape[..1])?)?;
    if wanted {
        return Ok(Some(bias));
    }
    match bias.iter().position(|&value| value != f16::ZERO) {
        Some(index) => Err(Error::TensorValue {
            name,
            index,
            expected: "0: the model has no biases".into(),
            found: bias[index].to_string(),
        }),
        None => Ok(None),
    }
}

/// The words of a tensor.
///
/// # Errors
/// When it is not I32.
pub fn integers<'a>(view: &TensorView<'a>) -> Result<Cow<'a, [i32]>> {
    if view.dtype != Dtype::I32 {
        let found = view.dtype.to_string();
        return Err(Error::TensorDtype { name: view.name.into(), expected: "I32", found });
    }
    Ok(match bytemuck::try_cast_slice(view.bytes) {
        Ok(words) => Cow::Borrowed(words),
        Err(_) => Cow::Owned(view.bytes.as_chunks().0.iter().map(|&word| i32::from_le_bytes(word)).collect()),
    })
}

/// As fp16, checked to be finite.
fn halves<'a>(view: &TensorView<'a>) -> Result<Cow<'a, [f16]>> {
    let to_vec = |bytes: &[u8]| bytes.as_chunks().0.iter().map(|&half| f16::from_le_bytes(half)).collect();
    Ok(match values::f16_bytes(view)? {
        Cow::Borrowed(bytes) => match bytemuck::try_cast_slice(bytes) {
            Ok(halves) => Cow::Borrowed(halves),
            Err(_) => Cow::Owned(to_vec(bytes)),
        },
        Cow::Owned(bytes) => Cow::Owned(to_vec(&bytes)),
    })
}
