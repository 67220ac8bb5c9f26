//! One packed linear: the four tensors of the checkpoint format.

use half::f16;

use super::bits::{pack_columns, pack_rows, unpack_columns, unpack_rows};
use crate::{
    checkpoint::{CheckpointFormat, PackedTensors},
    error::Result,
    gptq::{
        QuantizedLinear,
        solver::{PackedCodes, Solved},
    },
    variant::Bits,
};

/// The tensors of one quantized linear to be written, in the v1 format.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedLinear(PackedTensors<'static>);

impl PackedLinear {
    /// Packs the codes unchanged.
    ///
    /// # Panics
    /// When a dimension is not a multiple of the pack factor; plans are checked for that before any work.
    pub fn new(linear: &QuantizedLinear) -> Self {
        let (bits, n) = (linear.bits(), linear.out_features());
        let qweight = pack_rows(linear.codes(), n, bits);
        Self::of_words(bits, qweight, linear.scales(), linear.zeros(), linear.g_idx())
    }

    /// Packs on the device of the codes, with the same bytes as [`PackedLinear::new`].
    ///
    /// # Errors
    /// When memory is exhausted or the device fails.
    ///
    /// # Panics
    /// As [`PackedLinear::new`], and when the linear is in blocks of ggml.
    pub fn of_solved(linear: &Solved) -> Result<Self> {
        match linear {
            Solved::Host(linear) => Ok(Self::new(linear)),
            Solved::Device(linear) => {
                let PackedCodes { words, scales, zeros } = linear.pack()?;
                Ok(Self::of_words(linear.bits(), words, &scales, &zeros, linear.g_idx()))
            }
            Solved::Blocks(linear) => panic!("a linear of {} is not in GPTQ's format", linear.kind()),
        }
    }

    /// `qweight` `[K·b/32, N]`, `scales` and true `zeros` `[G, N]`, `g_idx` `[K]`.
    fn of_words(bits: Bits, qweight: Vec<i32>, scales: &[f16], zeros: &[u8], g_idx: &[u32]) -> Self {
        let n = qweight.len() / (g_idx.len() * bits.get() as usize / 32);
        let format = CheckpointFormat::Gptq;
        let stored: Vec<u8> = zeros.iter().map(|&z| z - format.zero_offset()).collect();
        Self(PackedTensors {
            bits,
            format,
            in_features: g_idx.len(),
            out_features: n,
            groups: scales.len() / n,
            qweight: qweight.into(),
            qzeros: pack_columns(&stored, n, bits).into(),
            scales: scales.to_vec().into(),
            g_idx: g_idx.iter().map(|&g| g as i32).collect(),
            bias: None,
        })
    }

    /// The tensors as bytes, by suffix: `qweight`, `qzeros`, `scales`, `g_idx`.
    pub fn tensors(&self) -> [(&'static str, &[u8]); 4] {
        [
            ("qweight", bytemuck::cast_slice(&self.0.qweight)),
            ("qzeros", bytemuck::cast_slice(&self.0.qzeros)),
            ("scales", bytemuck::cast_slice(&self.0.scales)),
            ("g_idx", bytemuck::cast_slice(&self.0.g_idx)),
        ]
    }

    /// The tensors as the kernels read them.
    pub fn view(&self) -> PackedView<'_> {
        PackedView::from(&self.0)
    }
}

/// A packed linear of a checkpoint, borrowed, usually from a memory map.
#[derive(Debug, Clone, Copy)]
pub struct PackedView<'a> {
    bits: Bits,
    in_features: usize,
    out_features: usize,
    groups: usize,
    qweight: &'a [i32],
    qzeros: &'a [i32],
    scales: &'a [f16],
    g_idx: &'a [i32],
    format: CheckpointFormat,
}

impl<'a> PackedView<'a> {
    /// `qweight` `[K·b/32, N]`, `qzeros` `[G, N·b/32]`, `scales` `[G, N]`, `g_idx` `[K]` with values in `0..G`.
    /// `None` when the lengths or values contradict each other.
    pub fn new(
        bits: Bits,
        out_features: usize,
        qweight: &'a [i32],
        qzeros: &'a [i32],
        scales: &'a [f16],
        g_idx: &'a [i32],
        format: CheckpointFormat,
    ) -> Option<Self> {
        let (n, k, factor) = (out_features, g_idx.len(), bits.pack_factor());
        let whole = n > 0
            && k > 0
            && [n, k].iter().all(|size| size.is_multiple_of(factor))
            && scales.len().is_multiple_of(n);
        let groups = scales.len().checked_div(n)?;
        let fits = whole
            && qweight.len() == k * bits.get() as usize / 32 * n
            && qzeros.len() == groups * (n * bits.get() as usize / 32)
            && g_idx.iter().all(|&g| usize::try_from(g).is_ok_and(|g| g < groups));
        fits.then_some(Self {
            bits,
            in_features: k,
            out_features: n,
            groups,
            qweight,
            qzeros,
            scales,
            g_idx,
            format,
        })
    }

    /// Bits a code.
    pub fn bits(&self) -> Bits {
        self.bits
    }

    /// `K`.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// `N`.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// `G`.
    pub fn groups(&self) -> usize {
        self.groups
    }

    /// Words `[K·b/32, N]`.
    pub fn qweight(&self) -> &'a [i32] {
        self.qweight
    }

    /// Words `[G, N·b/32]`.
    pub fn qzeros(&self) -> &'a [i32] {
        self.qzeros
    }

    /// `[G, N]`.
    pub fn scales(&self) -> &'a [f16] {
        self.scales
    }

    /// `[K]`, values in `0..G`.
    pub fn g_idx(&self) -> &'a [i32] {
        self.g_idx
    }

    /// Format of zero points in `qzeros`.
    pub fn format(&self) -> CheckpointFormat {
        self.format
    }

    /// Codes `[K, N]`.
    pub fn unpack_codes(&self) -> Vec<u8> {
        unpack_rows(self.qweight, self.out_features, self.bits)
    }

    /// Zero points as stored, `[G, N]`; the true zero points are larger by [`CheckpointFormat::zero_offset`].
    pub fn unpack_stored_zeros(&self) -> Vec<u8> {
        unpack_columns(self.qzeros, self.out_features, self.bits)
    }
}

impl<'a> From<&'a PackedTensors<'_>> for PackedView<'a> {
    /// # Panics
    /// Never for tensors of [`crate::checkpoint::packed`], which makes the same checks.
    fn from(tensors: &'a PackedTensors<'_>) -> Self {
        let view = Self::new(
            tensors.bits,
            tensors.out_features,
            &tensors.qweight,
            &tensors.qzeros,
            &tensors.scales,
            &tensors.g_idx,
            tensors.format,
        );
        view.expect("packed tensors are checked when they are read")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_what_the_solver_chose() {
        let (k, n) = (16, 8);
        let codes: Vec<u8> = (0..k * n).map(|i| (i * 7 % 16) as u8).collect();
        let scales = vec![f16::from_f32(0.5); 2 * n];
        let zeros: Vec<u8> = (0..2 * n).map(|i| (i % 15 + 1) as u8).collect();
        let g_idx: Vec<u32> = (0..k as u32).map(|i| (i * 5 + 1) % 2).collect();
        let linear = QuantizedLinear::new(Bits::Four, codes.clone(), scales, zeros.clone(), g_idx);
        let packed = PackedLinear::new(&linear);
        let view = packed.view();
        assert_eq!(view.unpack_codes(), codes);
        assert_eq!(view.unpack_stored_zeros(), zeros.iter().map(|z| z - 1).collect::<Vec<_>>());
        assert_eq!(view.qweight().len(), k / 8 * n);
        let again = PackedView::new(
            Bits::Four,
            n,
            view.qweight(),
            view.qzeros(),
            view.scales(),
            view.g_idx(),
            CheckpointFormat::Gptq,
        );
        assert!(again.is_some());
        assert!(
            PackedView::new(
                Bits::Four,
                n,
                view.qweight(),
                view.qzeros(),
                view.scales(),
                &[2; 16],
                CheckpointFormat::GptqV2
            )
            .is_none()
        );
    }
}
