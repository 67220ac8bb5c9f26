//! The plan for `int4_matmul.cu`: its macros and launches for a linear, a number of tokens and a device.

use super::layout::{CHUNK, LANES, PADDED_FEATURES, STRIP, THREADS, TILES, WARPS, chunk_bytes, param_bytes};
use super::repack::Repacked;
use crate::cuda::Macro;

/// Output features of a block of `int4_matmul_many_*`.
const MANY_FEATURES: usize = PADDED_FEATURES;
/// Tokens of a block of `int4_matmul_wgmma_256`.
pub const WGMMA_TOKENS: usize = 256;
/// Static shared memory of kernels, bytes: 16, which ptxas rounds up to the alignment of dynamic memory (docs/kernels.md).
const STATIC_SHARED: usize = 128;
/// Tokens of one launch of `int4_matmul_few_16`.
const FEW_TOKENS: usize = 16;
/// The most tokens for which the weights may be read once for each 16 tokens.
const SLICED_TOKENS: usize = 64;
/// `FEW_STRIPS` and `FEW_STAGES`, the most bytes in flight first. The first shape that fits the shared memory is used.
const FEW_SHAPES: [(usize, usize); 7] = [(8, 3), (8, 2), (4, 3), (4, 2), (2, 3), (2, 2), (1, 2)];
/// Kernels for many tokens, and the relative cost of a token. It is an estimate from the reads of shared memory for each product, and
/// from the published rates of `wgmma` and `mma`.
const MANY_SHAPES: [(Product, usize); 4] =
    [(Product::Wgmma, 5), (Product::Many(256), 8), (Product::Many(128), 9), (Product::Many(64), 10)];

/// Whether devices of compute capability 9.0 use [`Product::Wgmma`] by default. It has not run on a GPU: `scripts/gpu-check`
/// tests it and prints which kernel is faster.
pub const WGMMA_VERIFIED: bool = false;

/// Properties of a device that plans depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Shared memory of a block at most, bytes: 99 KiB on sm_86 and sm_89, 163 on sm_80, 227 on sm_90.
    pub shared_memory: usize,
    /// Whether [`Product::Wgmma`] may be used.
    pub wgmma: bool,
}

/// Values of the macros of `int4_matmul.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Build {
    bits: usize,
    bf16: bool,
    zeros: bool,
    group_tiles: usize,
    few_strips: usize,
    few_stages: usize,
    many_stages: usize,
}

/// Kernels that multiply, with the most tokens of a launch, or the tokens of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Product {
    /// Weights are read once for up to 8 or 16 tokens; stream-K.
    Few(usize),
    /// Blocks of 64, 128 or 256 tokens by 128 output features.
    Many(usize),
    /// Blocks of 256 tokens by 128 output features, for compute capability 9.0 only.
    Wgmma,
}

impl Product {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Few(8), Self::Few(16), Self::Many(64), Self::Many(128), Self::Many(256), Self::Wgmma];

    /// The kernel's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Few(8) => "int4_matmul_few_8",
            Self::Few(_) => "int4_matmul_few_16",
            Self::Many(64) => "int4_matmul_many_64",
            Self::Many(128) => "int4_matmul_many_128",
            Self::Many(_) => "int4_matmul_many_256",
            Self::Wgmma => "int4_matmul_wgmma_256",
        }
    }

    /// The most tokens of a launch, or the tokens of a block.
    fn tokens(self) -> usize {
        match self {
            Self::Few(tokens) | Self::Many(tokens) => tokens,
            Self::Wgmma => WGMMA_TOKENS,
        }
    }

    /// Threads of a block.
    pub fn threads(self) -> usize {
        match self {
            Self::Few(_) | Self::Many(_) => THREADS,
            // And a warpgroup of which a warp copies.
            Self::Wgmma => THREADS + 128,
        }
    }
}

/// One launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// The kernel.
    pub product: Product,
    /// The first token, and how many.
    pub tokens: (usize, usize),
}

impl Build {
    /// The configuration for a linear with activations in bf16 or fp16; `None` if the device has too little shared memory for
    /// all configurations.
    pub fn new(linear: &Repacked, bf16: bool, limits: Limits) -> Option<Self> {
        let Repacked { bits, zeros, group_tiles, .. } = *linear;
        let build = |(few_strips, few_stages), many_stages| Self {
            bits,
            bf16,
            zeros,
            group_tiles,
            few_strips,
            few_stages,
            many_stages,
        };
        let room = limits.shared_memory.checked_sub(STATIC_SHARED)?;
        // A fourth stage if the widest block still fits.
        let stages = match build(FEW_SHAPES[0], 4).shared_bytes(Product::Many(256)) <= room {
            true => 4,
            false => 3,
        };
        FEW_SHAPES
            .into_iter()
            .map(|shape| build(shape, stages))
            .find(|build| build.fits(Product::Few(16), limits) && build.fits(Product::Many(64), limits))
    }

    /// Values of the source's macros, for the build that has a kernel.
    pub fn macros(&self, product: Product) -> Vec<Macro> {
        vec![
            ("BITS", self.bits as i64),
            ("BF16", i64::from(self.bf16)),
            ("ZEROS", i64::from(self.zeros)),
            ("GROUP_TILES", self.group_tiles as i64),
            ("FEW_STRIPS", self.few_strips as i64),
            ("FEW_STAGES", self.few_stages as i64),
            ("MANY_STAGES", self.many_stages as i64),
            ("WGMMA", i64::from(product == Product::Wgmma)),
        ]
    }

    /// Dynamic shared memory of a block, bytes.
    pub fn shared_bytes(&self, product: Product) -> usize {
        let params = |strips: usize| strips * (TILES / self.group_tiles) * param_bytes(self.zeros);
        match product {
            Product::Few(tokens) => {
                let activations = tokens * CHUNK * 2;
                let weights = self.few_strips * chunk_bytes(self.bits);
                let stage = (weights + activations + params(self.few_strips)).next_multiple_of(128);
                WARPS * (self.few_stages * stage + self.values(tokens) * LANES * size_of::<f32>())
            }
            Product::Many(_) | Product::Wgmma => {
                let strips = MANY_FEATURES / STRIP;
                // Two barriers of 8 bytes.
                let barriers = if product == Product::Wgmma { 16 } else { 0 };
                let activations = product.tokens() * CHUNK * 2;
                self.many_stages * (activations + strips * chunk_bytes(self.bits) + params(strips) + barriers)
            }
        }
    }

    /// Whether a block of this kernel fits the device.
    pub fn fits(&self, product: Product, limits: Limits) -> bool {
        let allowed = product != Product::Wgmma || limits.wgmma;
        allowed && self.shared_bytes(product) + STATIC_SHARED <= limits.shared_memory
    }

    /// Accumulators of a lane of `few`.
    fn values(&self, tokens: usize) -> usize {
        self.few_strips * (tokens / 8) * 4
    }

    /// Blocks of a launch, x and y. `resident` is the number of the kernel's blocks that are resident at the same time. `few`
    /// must not exceed it when it gathers, and does not profit from more blocks when it does not.
    pub fn blocks(&self, launch: &Launch, n: usize, k: usize, resident: usize) -> (usize, usize) {
        match launch.product {
            Product::Few(_) => {
                let units = n.div_ceil(self.few_strips * STRIP) * k.div_ceil(CHUNK);
                (units.min(resident), 1)
            }
            product => (launch.tokens.1.div_ceil(product.tokens()), n.div_ceil(MANY_FEATURES)),
        }
    }

    /// Values (fp32) of the workspace `partials` for a number of blocks.
    pub fn partials(&self, launch: &Launch, blocks: usize) -> usize {
        match launch.product {
            Product::Few(tokens) => blocks * 2 * self.values(tokens) * LANES,
            Product::Many(_) | Product::Wgmma => 0,
        }
    }

    /// Words of the workspace `counters`: zero before the first launch and after each launch.
    pub fn counters(&self, n: usize) -> usize {
        2 + n.div_ceil(self.few_strips * STRIP)
    }

    /// The launches for `m` tokens, in order.
    pub fn launches(&self, m: usize, n: usize, limits: Limits) -> Vec<Launch> {
        if m <= FEW_TOKENS || m <= SLICED_TOKENS && self.worth_slicing(m, n, limits) {
            let slice = |first: usize| {
                let tokens = FEW_TOKENS.min(m - first);
                Launch { product: Product::Few(if tokens <= 8 { 8 } else { 16 }), tokens: (first, tokens) }
            };
            return (0..m).step_by(FEW_TOKENS).map(slice).collect();
        }
        // The longest time of a multiprocessor, in tokens.
        let cost = |&(product, each): &(Product, usize)| {
            let tokens = product.tokens();
            let blocks = m.div_ceil(tokens) * n.div_ceil(MANY_FEATURES);
            blocks.div_ceil(limits.multiprocessors) * tokens * each
        };
        let fitting = MANY_SHAPES.iter().filter(|(product, _)| self.fits(*product, limits));
        let (product, _) = *fitting.min_by_key(|shape| cost(shape)).expect("a build fits 64 tokens");
        vec![Launch { product, tokens: (0, m) }]
    }

    /// `many` reads the weights once, with a part of the chip; `few` once per 16 tokens, with all of it.
    fn worth_slicing(&self, m: usize, n: usize, limits: Limits) -> bool {
        m.div_ceil(FEW_TOKENS) * n.div_ceil(MANY_FEATURES) < limits.multiprocessors
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cuda::compile, kernels::Features};

    const H200: Limits = Limits { multiprocessors: 132, shared_memory: 227 << 10, wgmma: false };
    const WGMMA: Limits = Limits { wgmma: true, ..H200 };
    const A100: Limits = Limits { multiprocessors: 108, shared_memory: 163 << 10, wgmma: false };
    const L4: Limits = Limits { multiprocessors: 58, shared_memory: 99 << 10, wgmma: false };

    fn linear(bits: usize, zeros: bool, group_tiles: usize) -> Repacked {
        Repacked {
            weights: Vec::new(),
            params: Vec::new(),
            features: Features::InPlace,
            bits,
            in_features: 4096,
            out_features: 4096,
            positions: 4096,
            columns: 4096,
            group: 16 * group_tiles,
            zeros,
            group_tiles,
        }
    }

    fn all() -> impl Iterator<Item = Repacked> {
        [4, 8].into_iter().flat_map(|bits| {
            [false, true].into_iter().flat_map(move |zeros| [1, 2, 4].map(move |t| linear(bits, zeros, t)))
        })
    }

    #[test]
    fn every_device_has_a_build_that_fits() {
        let (widest, wide) = (Product::Many(256), Product::Many(128));
        for (limits, widest) in [(H200, widest), (A100, widest), (L4, wide), (WGMMA, Product::Wgmma)] {
            for linear in all() {
                let build = Build::new(&linear, false, limits).unwrap();
                let mut fitting = Product::ALL.into_iter().filter(|p| build.fits(*p, limits));
                assert_eq!(fitting.next_back(), Some(widest), "{limits:?} {build:?}");
                assert!(build.fits(Product::Few(16), limits) && build.fits(Product::Few(8), limits));
            }
        }
        assert_eq!(Build::new(&linear(4, false, 4), false, Limits { shared_memory: 16 << 10, ..L4 }), None);
        assert_eq!(Build::new(&linear(4, false, 4), false, Limits { shared_memory: 0, ..L4 }), None);
    }

    #[test]
    fn builds_of_the_card_s_branches() {
        let build = |bits, limits| Build::new(&linear(bits, false, 4), true, limits).unwrap();
        let shape = |b: Build| (b.few_strips, b.few_stages, b.many_stages);
        assert_eq!([H200, A100, L4].map(|limits| shape(build(4, limits))), [(8, 3, 4), (4, 3, 4), (4, 2, 3)]);
        assert_eq!([H200, A100, L4].map(|limits| shape(build(8, limits))), [(4, 3, 4), (4, 2, 4), (2, 2, 3)]);
        let h200 = build(4, H200);
        assert_eq!(h200.shared_bytes(Product::Few(16)), 8 * (3 * 6400 + 8192));
        assert_eq!(h200.shared_bytes(Product::Many(256)), 4 * (32768 + 4096 + 256));
        assert_eq!(h200.shared_bytes(Product::Wgmma), 4 * (32768 + 4096 + 256 + 16));
        let macros = h200.macros(Product::Few(8));
        assert!(
            ["BF16", "FEW_STRIPS", "WGMMA"].iter().zip([1, 8, 0]).all(|(&n, v)| macros.contains(&(n, v)))
        );
        assert!(h200.macros(Product::Wgmma).contains(&("WGMMA", 1)));
    }

    #[test]
    fn builds_compile_for_their_generation_with_nvrtc() {
        for (limits, architecture) in [(WGMMA, "compute_90a"), (A100, "compute_80"), (L4, "compute_89")] {
            for (bits, bf16, zeros, group_tiles) in
                [(4, false, false, 4), (4, true, true, 1), (8, false, true, 2), (8, true, false, 4)]
            {
                let build = Build::new(&linear(bits, zeros, group_tiles), bf16, limits).unwrap();
                let compiled = |product| {
                    let ptx =
                        compile(&super::super::INT4_MATMUL, architecture, &build.macros(product)).unwrap();
                    // Arrays that are indexed at run time would be in local memory.
                    assert!(!ptx.contains(".local"), "{build:?} for {architecture}");
                    ptx
                };
                let has = |ptx: &str, name| {
                    let entry = format!(".entry {name}(");
                    assert!(ptx.contains(&entry), "{name} of {build:?} for {architecture}");
                };
                let ptx = compiled(Product::Few(8));
                let plain = Product::ALL.into_iter().filter(|&product| product != Product::Wgmma);
                plain.map(Product::name).chain(["int4_gather"]).for_each(|name| has(&ptx, name));
                if limits.wgmma {
                    has(&compiled(Product::Wgmma), Product::Wgmma.name());
                }
            }
        }
    }

    #[test]
    fn tokens_decide_the_kernel() {
        let build = Build::new(&linear(4, false, 4), false, H200).unwrap();
        let products = |m, n| -> Vec<_> { build.launches(m, n, H200).iter().map(|l| l.product).collect() };
        for (m, n, expected) in [
            (1, 4096, vec![Product::Few(8)]),
            (8, 11008, vec![Product::Few(8)]),
            (9, 4096, vec![Product::Few(16)]),
            (16, 4096, vec![Product::Few(16)]),
            // 32 blocks leave most of 132 multiprocessors idle; 86 do not.
            (20, 4096, vec![Product::Few(16), Product::Few(8)]),
            (64, 4096, vec![Product::Few(16); 4]),
            (64, 11008, vec![Product::Many(64)]),
            (256, 4096, vec![Product::Many(64)]),
            (2048, 4096, vec![Product::Many(256)]),
            (2048, 11008, vec![Product::Many(256)]),
        ] {
            assert_eq!(products(m, n), expected, "{m} tokens, {n} features");
        }
        let asked = |m| build.launches(m, 4096, WGMMA)[0].product;
        assert_eq!([64, 256, 2048].map(asked), [Product::Few(16), Product::Many(64), Product::Wgmma]);
        assert_eq!(build.launches(2053, 4104, WGMMA)[0].product, Product::Wgmma, "as in device_tests.rs");
        let small = Build::new(&linear(4, false, 4), false, L4).unwrap();
        assert_eq!(small.launches(4096, 4096, L4)[0].product, Product::Many(128), "256 does not fit");
    }

    #[test]
    fn launches_cover_every_token_once() {
        for limits in [H200, A100, L4, WGMMA] {
            for linear in all() {
                let build = Build::new(&linear, false, limits).unwrap();
                for (m, n) in (1..70).chain([127, 2047, 2048]).flat_map(|m| [8, 4096, 11008].map(|n| (m, n)))
                {
                    let mut next = 0;
                    for launch in build.launches(m, n, limits) {
                        let (first, count) = launch.tokens;
                        assert_eq!(first, next);
                        next += count;
                        if let Product::Few(most) = launch.product {
                            assert!(count <= most);
                        }
                    }
                    assert_eq!(next, m);
                }
            }
        }
    }

    #[test]
    fn grids_and_workspaces() {
        let build = Build::new(&linear(4, false, 4), false, H200).unwrap();
        let few = Launch { product: Product::Few(16), tokens: (0, 16) };
        // 86 blocks of strips by 64 chunks, more than are resident; 1 by 1, fewer.
        assert_eq!(build.blocks(&few, 11008, 4096, 132), (132, 1));
        assert_eq!(build.blocks(&few, 64, 64, 132), (1, 1));
        assert_eq!((build.partials(&few, 132), build.counters(11008)), (132 * 2 * 64 * 32, 88));
        let many = Launch { product: Product::Many(256), tokens: (0, 2049) };
        assert_eq!((build.blocks(&many, 11008, 4096, 1), build.partials(&many, 774)), ((9, 86), 0));
    }
}
