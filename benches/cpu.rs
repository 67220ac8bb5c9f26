//! Benchmarks of the CPU's kernels: `cargo bench --bench cpu [FILTER]`.
//!
//! A rate is in floating-point operations (`item/s`) or in bytes a second. `limit` measures what this machine reaches at
//! the same kind of work: libtorch's matrix product, a copy, and a read of memory.

// Sets what OpenMP reads before `main`, as the program does.
#[path = "../src/cli/environment.rs"]
mod environment;
mod random;

use divan::{
    Bencher, black_box,
    counter::{BytesCount, ItemsCount},
};
use gptq::{kernels, pack::PackedLinear, variant::Variant};
use tch::{Device, Kind, Tensor};

fn main() {
    environment::prepare();
    divan::main();
}

/// Bytes, more than the caches have.
const LARGE: usize = 256 << 20;
/// Output and input features of the linear that is solved and packed.
const SHAPE: (usize, usize) = (4096, 11008);
/// Output and input features of the linear that is multiplied.
const MATMUL: (usize, usize) = (4096, 4096);

fn variant() -> Variant {
    "4bit-128g".parse().expect("the variant is well formed")
}

/// A matrix of normally distributed values.
fn random_matrix(rows: usize, columns: usize) -> Tensor {
    Tensor::randn([rows as i64, columns as i64], (Kind::Float, Device::Cpu))
}

#[divan::bench_group(sample_count = 5, sample_size = 1)]
mod limit {
    use rayon::prelude::*;

    use super::*;

    #[divan::bench(args = [Kind::Float, Kind::BFloat16])]
    fn product(bencher: Bencher<'_, '_>, kind: Kind) {
        let size = 3072;
        let a = random_matrix(size, size).to_kind(kind);
        bencher.counter(ItemsCount::new(2 * size.pow(3))).bench_local(|| a.matmul(&a));
    }

    /// Bytes read and bytes written both count.
    #[divan::bench]
    fn copy(bencher: Bencher<'_, '_>) {
        let source = vec![1u8; LARGE];
        let mut target = vec![0u8; LARGE];
        bencher.counter(BytesCount::new(2 * LARGE)).bench_local(|| {
            target
                .par_chunks_mut(1 << 20)
                .zip(source.par_chunks(1 << 20))
                .for_each(|(to, from)| to.copy_from_slice(from));
            black_box(&target);
        });
    }

    #[divan::bench]
    fn read(bencher: Bencher<'_, '_>) {
        let source = vec![1u64; LARGE / 8];
        bencher.counter(BytesCount::new(LARGE)).bench_local(|| {
            source.par_chunks(1 << 17).map(|c| c.iter().fold(0, |a, b| a ^ b)).reduce(|| 0, |a, b| a ^ b)
        });
    }
}

#[divan::bench_group(sample_count = 5, sample_size = 1)]
mod solver {
    use gptq::{
        accuracy::{ScaleSearch, Scales},
        gptq::{
            CrossCovariance, Hessian,
            solver::{CpuSolver, Factorized, Solver, Weight},
        },
    };

    use super::*;

    const TOKENS: usize = 4096;
    const DAMP: f64 = 0.01;

    /// What the column loop's products are computed with. On AMX a product is three of bf16.
    #[derive(Debug, Clone, Copy)]
    enum Products {
        Amx,
        Fp32,
    }

    /// The kinds that this machine has.
    fn products() -> Vec<Products> {
        if gptq::amx::available() { vec![Products::Amx, Products::Fp32] } else { vec![Products::Fp32] }
    }

    fn hessian_of(x: &Tensor) -> Hessian {
        let mut hessian = Hessian::new(SHAPE.1, Device::Cpu).expect("a Hessian of zeros");
        hessian.add(x).expect("finite inputs");
        hessian.finish("bench").expect("inputs that are not zero")
    }

    fn factorized(solver: &CpuSolver, hessian: &Hessian) -> Box<dyn Factorized> {
        solver
            .factorize(hessian, variant().sorting(false), DAMP, "bench")
            .expect("a positive definite Hessian")
    }

    /// One triangle of the product: half of `2·T·K²` operations.
    #[divan::bench(args = [Kind::BFloat16, Kind::Float])]
    fn hessian(bencher: Bencher<'_, '_>, kind: Kind) {
        let x = random_matrix(TOKENS, SHAPE.1).to_kind(kind);
        bencher.counter(ItemsCount::new(TOKENS * SHAPE.1.pow(2))).bench_local(|| hessian_of(&x));
    }

    /// Of inputs whose linear has fewer than half as many outputs, so that the sums are those of `W D`.
    #[divan::bench(args = [Kind::BFloat16, Kind::Float])]
    fn cross_covariance(bencher: Bencher<'_, '_>, kind: Kind) {
        let (n, k) = SHAPE;
        let (x, reference) = (random_matrix(TOKENS, k).to_kind(kind), random_matrix(TOKENS, k).to_kind(kind));
        let weight = random_matrix(n, k);
        bencher.counter(ItemsCount::new(4 * TOKENS * n * k)).bench_local(|| {
            let sums = CrossCovariance::of_weights(&[&weight], kind, Device::Cpu);
            let mut sums = sums.expect("a cross-covariance of zeros");
            sums.add(&x, &reference).expect("inputs of the same shape");
            sums
        });
    }

    #[divan::bench]
    fn output_energy(bencher: Bencher<'_, '_>) {
        let (n, k) = SHAPE;
        let hessian = hessian_of(&random_matrix(TOKENS, k));
        let weight = random_matrix(n, k);
        let flops = ItemsCount::new(n * k.pow(2));
        bencher.counter(flops).bench_local(|| hessian.output_energy(&weight).expect("finite weights"));
    }

    #[divan::bench]
    fn factorize(bencher: Bencher<'_, '_>) {
        let hessian = hessian_of(&random_matrix(TOKENS, SHAPE.1));
        let solver = CpuSolver::with_amx(gptq::amx::available());
        let flops = ItemsCount::new(SHAPE.1.pow(3) / 3);
        bencher.counter(flops).bench_local(|| factorized(&solver, &hessian));
    }

    /// `B (H + λI)⁻¹`, for the targets of asymmetric calibration.
    #[divan::bench(args = [Kind::BFloat16, Kind::Float])]
    fn divide(bencher: Bencher<'_, '_>, products: Kind) {
        let (n, k) = SHAPE;
        let solver = CpuSolver::with_amx(gptq::amx::available());
        let factor = factorized(&solver, &hessian_of(&random_matrix(TOKENS, k)));
        let b = random_matrix(n, k);
        let flops = ItemsCount::new(2 * n * k.pow(2));
        bencher.counter(flops).bench_local(|| factor.divide(&b, products).expect("a solution"));
    }

    /// With scales of the range, or searched by the block; the operations of the search are not counted.
    #[divan::bench(args = products(), consts = [false, true])]
    fn solve<const SEARCHED: bool>(bencher: Bencher<'_, '_>, products: Products) {
        let (n, k) = SHAPE;
        let searched = Scales { signed: true, search: ScaleSearch::Block };
        let solver = CpuSolver::with_amx(matches!(products, Products::Amx)).with_scales(if SEARCHED {
            searched
        } else {
            Scales::PLAIN
        });
        let factor = factorized(&solver, &hessian_of(&random_matrix(TOKENS, k)));
        let values = random_matrix(n, k);
        let weight = [Weight { name: "bench", values: &values }];
        let flops = ItemsCount::new(n * k.pow(2));
        bencher.counter(flops).bench_local(|| factor.solve(&weight, &variant()).expect("a solution"));
    }
}

/// The bytes are those of the codes before and after.
#[divan::bench(sample_count = 5, sample_size = 1)]
fn pack(bencher: Bencher<'_, '_>) {
    let linear = random::linear(SHAPE, &variant());
    let packed = linear.codes().len() * variant().bits.get() as usize / 8;
    let bytes = BytesCount::new(linear.codes().len() + packed);
    bencher.counter(bytes).bench_local(|| PackedLinear::new(&linear));
}

/// Activations in rows. One row reads every weight once and computes next to nothing, so that its limit is `limit::read`.
#[divan::bench(args = [1, 16, 512, 2048], sample_count = 5, sample_size = 16)]
fn matmul(bencher: Bencher<'_, '_>, rows: usize) {
    let (n, k) = MATMUL;
    // One after another, so that weights come from memory and threads stay awake, as in a model.
    let packed = vec![PackedLinear::new(&random::linear(MATMUL, &variant())); LARGE / (n * k / 2)];
    let mut views = packed.iter().map(PackedLinear::view).cycle();
    let x: Vec<f32> = (0..rows * k).map(|i| (i % 13) as f32 - 6.0).collect();
    let mut y = vec![0.0; rows * n];
    let bytes: usize = packed[0].tensors().iter().map(|(_, bytes)| bytes.len()).sum();
    bencher
        .counter(BytesCount::new(bytes))
        .counter(ItemsCount::new(2 * rows * n * k))
        .bench_local(|| kernels::matmul(&x, rows, &views.next().unwrap(), black_box(&mut y)));
}
