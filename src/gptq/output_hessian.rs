//! Output Hessians: the cost of errors in a linear's outputs at the end of the model.

use tch::{Device, Kind, TchError, Tensor};

use super::{hessian::takes_bf16_products, raw};
use crate::{
    amx,
    error::{Error, Result, TorchContext},
};

/// Output features of a block; more output features are split into blocks of about this size.
const BLOCK: usize = 2048;
/// Blocks begin at multiples of this many output features, so that heads are not cut.
const GRAIN: usize = 128;

/// `G = 1/T Σ g gᵀ` over calibration tokens; `g` is the gradient of `−log p(y)` with respect to a linear's output, and `y` is
/// drawn from the model's own prediction. `G ⊗ H` approximates the Fisher information of the linear's weight (K-FAC, arXiv
/// 1503.05671; used by YAQA, arXiv 2505.22988). An error `D` of the weight moves the model's predictions by a KL divergence of
/// about `½ tr(G D H Dᵀ)`.
///
/// Only blocks on the diagonal are kept, one for each run of neighbouring output features.
#[derive(Debug)]
pub struct OutputHessian {
    /// `[n, n]` fp32 each, for consecutive runs of output features.
    blocks: Vec<Tensor>,
    tokens: u64,
}

impl OutputHessian {
    /// An empty output Hessian for `out_features` outputs.
    ///
    /// # Errors
    /// When libtorch cannot allocate it.
    pub fn new(out_features: usize, device: Device) -> Result<Self> {
        let zeros = |n: usize| {
            let n = n as i64;
            Tensor::f_zeros([n, n], (Kind::Float, device)).torch("allocate an output Hessian")
        };
        let blocks = output_blocks(out_features).into_iter().map(zeros).collect::<Result<_>>()?;
        Ok(Self { blocks, tokens: 0 })
    }

    /// Resumes from [`OutputHessian::into_sums`], the sums over `tokens` tokens.
    ///
    /// # Errors
    /// When the sums cannot be copied to the device.
    pub fn from_sums(sums: Vec<Tensor>, tokens: u64, device: Device) -> Result<Self> {
        let moved = |sum: Tensor| sum.f_to_device(device).torch("copy an output Hessian");
        Ok(Self { blocks: sums.into_iter().map(moved).collect::<Result<_>>()?, tokens })
    }

    /// The undivided sums, block by block.
    pub fn into_sums(self) -> Vec<Tensor> {
        self.blocks
    }

    /// Adds the gradients of a batch, `[…, N]` fp32, which are multiplied in `kind`: bf16 where the processor is faster with it, else
    /// fp32.
    ///
    /// # Errors
    /// When libtorch cannot compute it.
    pub fn add(&mut self, gradients: &Tensor, kind: Kind) -> Result<()> {
        let mut accumulate = || -> Result<(), TchError> {
            let n: i64 = self.blocks.iter().map(|block| block.size()[0]).sum();
            let g = gradients.f_reshape([-1, n])?;
            self.tokens += g.size()[0] as u64;
            let mut first = 0;
            for block in &mut self.blocks {
                let rows = block.size()[0];
                let part = g.f_narrow(1, first, rows)?;
                if takes_bf16_products(kind, block.device()) {
                    let part = part.f_to_kind(kind)?.f_contiguous()?;
                    let (n, x) = (rows as usize, raw::bf16_bits(&part));
                    amx::cross_gram(raw::floats_mut(block), n, 0..n, x, x, true);
                } else {
                    let _ = block.f_addmm_(&part.f_tr()?, &part)?;
                }
                first += rows;
            }
            Ok(())
        };
        accumulate().torch("accumulate an output Hessian")
    }

    /// Adds another device's sums over other tokens.
    ///
    /// # Errors
    /// When the sums cannot be copied.
    pub fn absorb(&mut self, other: Self) -> Result<()> {
        for (block, more) in self.blocks.iter_mut().zip(&other.blocks) {
            let added = more.f_to_device(block.device()).and_then(|more| block.f_add_(&more).map(drop));
            added.torch("add two output Hessians")?;
        }
        self.tokens += other.tokens;
        Ok(())
    }

    /// The mean over tokens, block by block. `linear` is its name in errors.
    ///
    /// # Errors
    /// When a gradient was NaN or infinite.
    pub fn finish(self, linear: &str) -> Result<Vec<Tensor>> {
        let (mut broken, mut total) = (0, 0);
        let tokens = self.tokens.max(1) as f64;
        for block in &self.blocks {
            let divide = || raw::count_non_finite(&block.shallow_clone().f_div_scalar_(tokens)?);
            total += block.numel() as u64;
            broken += divide().torch("scale an output Hessian")?;
        }
        if broken > 0 {
            let place = format!("gradients of the outputs of {linear}");
            return Err(Error::NonFinite { place, count: broken, total, computed: true });
        }
        Ok(self.blocks)
    }
}

/// Sizes of the blocks of output features, as even as multiples of `GRAIN` allow.
pub fn output_blocks(out_features: usize) -> Vec<usize> {
    let parts = out_features.div_ceil(BLOCK);
    let grains = out_features.div_ceil(GRAIN);
    let end = |part: usize| (part * grains / parts * GRAIN).min(out_features);
    (0..parts).map(|part| end(part + 1) - end(part)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_whole_grains_of_about_a_block() {
        assert_eq!(output_blocks(384), [384]);
        assert_eq!(output_blocks(2048), [2048]);
        assert_eq!(output_blocks(4096), [2048, 2048]);
        for n in [5, 2050, 11008, 28672, 100_001] {
            let blocks = output_blocks(n);
            assert_eq!(blocks.iter().sum::<usize>(), n);
            assert!(blocks.iter().all(|&n| n > 0 && n <= BLOCK + GRAIN), "{blocks:?}");
            assert!(blocks.iter().rev().skip(1).all(|n| n.is_multiple_of(GRAIN)), "{blocks:?}");
        }
    }

    #[test]
    fn it_is_the_mean_of_outer_products() {
        tch::manual_seed(5);
        let g = Tensor::randn([2, 30, 7], (Kind::Float, Device::Cpu));
        let flat = g.reshape([-1, 7]);
        let expected = flat.tr().mm(&flat) / 60.0;
        let empty = || OutputHessian::new(7, Device::Cpu).unwrap();
        for (kind, tolerance) in [(Kind::Float, 1e-6), (Kind::BFloat16, 0.005)] {
            let (mut one, mut other) = (empty(), empty());
            one.add(&g.narrow(0, 0, 1), kind).unwrap();
            other.add(&g.narrow(0, 1, 1), kind).unwrap();
            one.absorb(other).unwrap();
            assert!(one.finish("test").unwrap()[0].allclose(&expected, 1e-5, tolerance, false), "{kind:?}");
        }

        let mut broken = empty();
        broken.add(&(g * f64::INFINITY), Kind::Float).unwrap();
        assert!(matches!(broken.finish("test"), Err(Error::NonFinite { .. })));
    }
}
