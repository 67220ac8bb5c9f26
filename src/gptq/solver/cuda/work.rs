//! Launches and bytes of a solve, from shapes: what a solve costs beside its arithmetic, before there is a device to measure it.

use std::ops::AddAssign;

use tch::{Device, Kind};

use super::panels::{Mode, Plan, Search};
use crate::{
    accuracy::Scales,
    gptq::{CrossCovariance, Grid, hessian::row_blocks},
    variant::Variant,
};

/// What is launched on the device, and the bytes of its memory that are read and written. An operation of libtorch counts as one
/// launch; copies between host and device are none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Launches of our kernels.
    pub kernels: usize,
    /// Products of libtorch between panels.
    pub products: usize,
    /// Other operations of libtorch.
    pub operations: usize,
    /// Operations of libtorch for the sums of Hessians and cross-covariances, before the solve.
    pub sums: usize,
    /// Bytes that kernels and products read and write; what blocks of one launch read again is in a cache.
    pub bytes: u64,
}

/// A stage that is solved: linears that share their inputs.
#[derive(Debug, Clone)]
pub struct StageShape<'a> {
    /// `N` of each linear.
    pub out_features: &'a [usize],
    /// `K`.
    pub in_features: usize,
    /// Bytes of a stored weight.
    pub weight_bytes: usize,
}

/// Operations of libtorch, as the code has them.
mod operations {
    /// `CudaSolver::factorize`: the diagonal, the decomposition, the reversal and its copy, the extremes.
    pub(super) const FACTORIZE: usize = 5;
    /// `Columns::new`: two sums set to zero, the costs of rounding summed up.
    pub(super) const COLUMNS: usize = 3;
    /// `RowSums::of`: scales that do not fit fp16 counted, all sums stacked.
    pub(super) const SUMS: usize = 4;
    /// `Hessian::finish`: the sums scaled, the diagonal.
    pub(super) const FINISH: usize = 2;
    /// `CrossCovariance::add`: the difference of the inputs, the product.
    pub(super) const ADD_DIFFERENCES: usize = 2;
    /// `targets`: the cross-covariance checked and scaled; a division by the factor; each weight's target.
    pub(super) const CROSS_COVARIANCE: usize = 3;
    pub(super) const DIVIDE: usize = 5;
    pub(super) const TARGET: usize = 5;
    /// `Hessian::output_energies`: the Hessian scaled; each weight.
    pub(super) const UNIT_HESSIAN: usize = 7;
    pub(super) const ENERGY: usize = 5;
    /// `scale_search.rs`, between panels, for a group: each candidate, and each column of the finalists.
    pub(super) const CANDIDATE: usize = 12;
    pub(super) const COLUMN: usize = 15;
}

const FP32: u64 = 4;

impl Work {
    /// All launches of the solve.
    pub fn launches(&self) -> usize {
        self.kernels + self.products + self.operations
    }

    /// Work of one variant of a stage: factorization, targets (`asymmetric`), columns, packed words, and dense weights for the
    /// next stage. `shared_memory` is that of a block; `None` if it is too little.
    pub fn of_stage(
        shape: &StageShape<'_>,
        variant: &Variant,
        scales: Scales,
        asymmetric: bool,
        shared_memory: usize,
    ) -> Option<Self> {
        let (k, linears) = (shape.in_features, shape.out_features.len());
        let size = variant.group_size.features(k);
        let known = variant.scales_known_beforehand();
        let candidates = Grid::new(variant.bits, variant.symmetric).factors(scales).len();
        let plan = match scales != Scales::PLAIN && !known {
            true => Plan::searched(k, size, Search::new(candidates, scales.finalists()), shared_memory),
            false => Plan::new(k, size, known, shared_memory),
        }?;
        let n: usize = shape.out_features.iter().sum();
        let (rows, columns) = (n as u64, k as u64);
        let codes = rows * columns;
        let mut work = Self {
            // Reordering; the costs of rounding; scales that are known beforehand. A linear: stacking, packing, dense weights.
            kernels: 2 + usize::from(known) + 3 * linears,
            products: 0,
            sums: 0,
            operations: operations::FACTORIZE
                + operations::COLUMNS
                + operations::SUMS
                + operations::UNIT_HESSIAN
                + operations::ENERGY * linears,
            bytes: 0,
        };
        if asymmetric {
            // Of many rows one division serves all.
            let divisions = if n > k { 1 } else { linears };
            work.operations +=
                operations::CROSS_COVARIANCE + operations::DIVIDE * divisions + operations::TARGET * linears;
        }
        if plan.searches_between(scales != Scales::PLAIN, known) {
            let of_group = operations::CANDIDATE * candidates + operations::COLUMN * size;
            work.operations += variant.group_size.groups(k) * of_group;
        }
        let packed = codes * u64::from(variant.bits.get()) / 8;
        work.bytes += columns * columns * FP32 * 4; // reordered, decomposed, reversed
        work.bytes += codes * (shape.weight_bytes as u64 + FP32); // stacked
        work.bytes += codes * FP32 * if known { 3 } else { 2 }; // costs of rounding, static scales
        work.bytes += codes + packed + codes * 3; // packed; dense in 16 bits
        for panel in &plan.panels {
            let width = panel.columns.len() as u64;
            let solved = match panel.mode {
                Mode::Compensate => panel.group.start,
                _ => panel.columns.start,
            } as u64;
            let residuals = if solved > 0 || panel.columns.start > 0 { FP32 } else { 0 };
            // Weights, twice where scales are found; residuals; differences; codes.
            let each = match panel.mode {
                Mode::Fitted | Mode::Searched(_) => 3 * FP32 + 1,
                Mode::Given => 2 * FP32 + 1,
                Mode::Compensate => 2 * FP32,
            };
            work.kernels += 1;
            work.bytes += rows * width * (each + residuals) + width * width / 2 * FP32;
            let inside = match panel.mode {
                Mode::Compensate => (panel.columns.start - panel.group.start) as u64,
                _ => 0,
            };
            for from in [solved, inside].into_iter().filter(|&from| from > 0) {
                work.products += 1;
                work.bytes += (from * width + from * rows + width * rows) * FP32;
            }
        }
        Some(work)
    }

    /// Sums of a stage over so many batches of 16-bit inputs: the Hessian, and the cross-covariance (`asymmetric`).
    pub fn of_sums(shape: &StageShape<'_>, batches: usize, asymmetric: bool) -> Self {
        let (k, n) = (shape.in_features, shape.out_features.iter().sum::<usize>());
        let blocks = row_blocks(k as i64, Kind::BFloat16, Device::Cuda(0)).len();
        // Each block but the first is mirrored.
        let mut sums = batches * blocks + operations::FINISH + blocks - 1;
        if asymmetric {
            // The weights are joined, and multiply each difference.
            let product = usize::from(CrossCovariance::sums_products(n as u64, k as u64));
            sums += batches * (operations::ADD_DIFFERENCES + product) + product;
        }
        Self { sums, ..Self::default() }
    }
}

impl AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        self.kernels += other.kernels;
        self.products += other.products;
        self.operations += other.operations;
        self.sums += other.sums;
        self.bytes += other.bytes;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use tch::{Device, Kind};

    use super::*;
    use crate::{
        accuracy::Quality,
        cuda::{Argument, Grid as LaunchGrid},
        error::Result,
        gptq::solver::{
            CudaSolver, Kernels, Solver,
            cuda::host_emulation::PlainKernels,
            tests::problem::{Problem, weight},
        },
        variant::Variant,
    };

    const ADA: usize = 99 << 10;
    const HOPPER: usize = 227 << 10;

    /// Stages of a layer of Llama 2 7B.
    const LLAMA: [(&[usize], usize); 4] =
        [(&[4096; 3], 4096), (&[4096], 4096), (&[11008; 2], 4096), (&[4096], 11008)];

    fn layer(variant: &str, quality: Quality, shared_memory: usize) -> Work {
        let (variant, options) = (variant.parse().unwrap(), quality.options());
        let mut all = Work::default();
        for (out_features, in_features) in LLAMA {
            let shape = StageShape { out_features, in_features, weight_bytes: 2 };
            let asymmetric = options.asymmetric > 0.0;
            all += Work::of_stage(&shape, &variant, options.scales, asymmetric, shared_memory).unwrap();
        }
        all
    }

    #[test]
    fn a_layer_of_7b_takes_at_most_400_launches() {
        for variant in ["4bit-128g", "4bit-128g-act", "4bit-64g-act", "4bit-32g-act", "8bit-128g"] {
            let work = layer(variant, Quality::Standard, HOPPER);
            assert!(work.launches() <= 400, "{variant}: {work:?} are {}", work.launches());
            // A solve reads and writes some 20 GB: a few milliseconds at the speed of a copy.
            assert!((10e9..30e9).contains(&(work.bytes as f64)), "{variant}: {work:?}");
            assert!(layer(variant, Quality::Fast, HOPPER).launches() <= 320, "{variant}");
        }
        // Narrower panels of a smaller device.
        assert!(layer("4bit-128g", Quality::Standard, ADA).launches() <= 600);
    }

    /// The default calibration, 128 windows of 2048 tokens, in batches of 8192 tokens: see docs/kernels.md.
    #[test]
    fn sums_of_a_layer_of_7b_take_689_launches() {
        let sums = |asymmetric| {
            let mut all = Work::default();
            for (out_features, in_features) in LLAMA {
                let shape = StageShape { out_features, in_features, weight_bytes: 2 };
                all += Work::of_sums(&shape, 32, asymmetric);
            }
            all.sums
        };
        assert_eq!((sums(true), sums(false)), (689, 400));
    }

    /// Groups that are wider than a panel are searched by operations of libtorch, group by group: see docs/kernels.md.
    #[test]
    fn searched_groups_wider_than_a_panel_take_many_launches() {
        for (variant, shared_memory) in [("4bit--1g", HOPPER), ("4bit--1g", ADA), ("4bit-256g", HOPPER)] {
            assert!(layer(variant, Quality::Standard, shared_memory).launches() <= 600, "{variant}");
        }
        for (variant, shared_memory, thousands) in
            [("4bit-512g", HOPPER, 404), ("4bit-1024g", HOPPER, 379), ("4bit-256g", ADA, 450)]
        {
            let launches = layer(variant, Quality::Standard, shared_memory).launches();
            assert!(launches / 1000 == thousands, "{variant}: {launches}");
            assert!(layer(variant, Quality::Fast, shared_memory).launches() <= 1000, "{variant}");
        }
    }

    /// Counts launches.
    struct Counting(PlainKernels, Arc<AtomicUsize>);

    impl Kernels for Counting {
        fn device(&self) -> Device {
            self.0.device()
        }

        fn shared_memory(&self) -> usize {
            self.0.shared_memory()
        }

        unsafe fn launch(&self, name: &'static str, grid: LaunchGrid, arguments: &[Argument]) -> Result<()> {
            self.1.fetch_add(1, Ordering::Relaxed);
            // SAFETY: the caller's promise.
            unsafe { self.0.launch(name, grid, arguments) }
        }
    }

    /// The kernels of a solve are those that were planned.
    #[test]
    fn kernels_are_launched_as_planned() {
        let (n, k) = (24, 600);
        let problem = Problem::new(n, k, 700, 2);
        for quality in [Quality::Fast, Quality::Standard] {
            for text in ["4bit-128g-act", "4bit-32g", "4bit-48g-static", "4bit--1g", "4bit-300g"] {
                for shared_memory in [HOPPER, ADA] {
                    let variant: Variant = text.parse().unwrap();
                    let scales = quality.options().scales;
                    let count = Arc::new(AtomicUsize::new(0));
                    let kernels = Counting(PlainKernels { shared_memory }, Arc::clone(&count));
                    let solver = CudaSolver::with_kernels(Box::new(kernels)).unwrap().with_scales(scales);
                    let factor =
                        solver.factorize(&problem.hessian, variant.sorting(false), 0.01, "test").unwrap();
                    let weights = [weight(&problem.weight), weight(&problem.weight)];
                    for solution in factor.solve(&weights, &variant).unwrap() {
                        drop(solution.linear.dequantize(Kind::Half).unwrap());
                        let crate::gptq::solver::Solved::Device(linear) = &solution.linear else {
                            panic!("{text}: on the host")
                        };
                        linear.pack().unwrap();
                    }
                    let shape = StageShape { out_features: &[n, n], in_features: k, weight_bytes: 4 };
                    let planned = Work::of_stage(&shape, &variant, scales, false, shared_memory).unwrap();
                    assert_eq!(count.load(Ordering::Relaxed), planned.kernels, "{text}, {quality}");
                }
            }
        }
    }
}
