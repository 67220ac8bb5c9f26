//! Benchmarks of the CPU's kernels: `cargo bench --bench cpu [FILTER]`.
//!
//! A rate is in floating-point operations (`item/s`) or in bytes a second. `limit` measures what this machine reaches at
//! the same kind of work: libtorch's matrix product, a copy, and a read of memory.

// Sets what OpenMP reads before `main`, as the program does.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[path = "../src/cli/environment.rs"]
mod environment;
mod random;

use divan::{
    Bencher, black_box,
    counter::{BytesCount, ItemsCount},
};
use gptq::{kernels::CpuMatmul, pack::PackedLinear, variant::Variant};
use tch::{Device, Kind, Tensor};

fn main() {
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
        amx::Parts,
        gptq::{
            CrossCovariance, Hessian,
            solver::{CpuSolver, Factorized, Solver, Weight},
        },
    };

    use super::*;

    const TOKENS: usize = 4096;
    const DAMP: f64 = 0.01;

    /// The parts of products between panels that are fast on this machine; `None` is fp32.
    fn products() -> Vec<Option<Parts>> {
        let mut products = vec![None];
        if gptq::amx::available() {
            products.push(Some(Parts::Two));
        }
        if gptq::amx::has_bf16_products() {
            products.push(Some(Parts::One));
        }
        products
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
        let solver = CpuSolver::new();
        let flops = ItemsCount::new(SHAPE.1.pow(3) / 3);
        bencher.counter(flops).bench_local(|| factorized(&solver, &hessian));
    }

    /// `B (H + λI)⁻¹`, for the targets of asymmetric calibration.
    #[divan::bench(args = [Kind::BFloat16, Kind::Float])]
    fn divide(bencher: Bencher<'_, '_>, products: Kind) {
        let (n, k) = SHAPE;
        let solver = CpuSolver::new();
        let factor = factorized(&solver, &hessian_of(&random_matrix(TOKENS, k)));
        let b = random_matrix(n, k);
        let flops = ItemsCount::new(2 * n * k.pow(2));
        bencher.counter(flops).bench_local(|| factor.divide(&b, products).expect("a solution"));
    }

    /// With scales of the range, or searched by the block; the operations of the search are not counted.
    #[divan::bench(args = products(), consts = [false, true])]
    fn solve<const SEARCHED: bool>(bencher: Bencher<'_, '_>, products: Option<Parts>) {
        let (n, k) = SHAPE;
        let searched = Scales { signed: true, search: ScaleSearch::Block };
        let scales = if SEARCHED { searched } else { Scales::PLAIN };
        let solver = CpuSolver::with_products(products).with_scales(scales);
        let factor = factorized(&solver, &hessian_of(&random_matrix(TOKENS, k)));
        let values = random_matrix(n, k);
        let weight = [Weight { name: "bench", values: &values }];
        let flops = ItemsCount::new(n * k.pow(2));
        bencher.counter(flops).bench_local(|| factor.solve(&weight, &variant()).expect("a solution"));
    }
}

/// A layer of the shape of TinyLlama's, with random weights.
#[divan::bench_group(sample_count = 5, sample_size = 1)]
mod layer {
    use std::{env, fs, path::PathBuf, process};

    use gptq::{
        checkpoint::Checkpoint,
        gptq::solver::Solved,
        model::{Dense, Layer, Linear, Transformer},
    };

    use super::*;

    const HIDDEN: usize = 2048;
    const INTERMEDIATE: usize = 5632;
    const HEADS: usize = 32;
    const KV_HEADS: usize = 4;
    const SEQ_LEN: usize = 512;
    const BATCH: usize = 2;
    /// Weights of the layer's linears.
    const WEIGHTS: usize =
        2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN / HEADS * KV_HEADS + 3 * HIDDEN * INTERMEDIATE;

    /// A folder with a model of one layer, removed at the end.
    struct Model(PathBuf);

    impl Drop for Model {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    impl Model {
        fn new() -> Self {
            let folder = env::temp_dir().join(format!("gptq-bench-{}", process::id()));
            fs::create_dir_all(&folder).expect("a temporary folder");
            let config = serde_json::json!({
                "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
                "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
                "vocab_size": 256, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
            });
            fs::write(folder.join("config.json"), config.to_string()).expect("space for a config");
            let of_kv = HIDDEN / HEADS * KV_HEADS;
            let mut tensors = Vec::new();
            for (name, shape) in [
                ("self_attn.q_proj", [HIDDEN, HIDDEN]),
                ("self_attn.k_proj", [of_kv, HIDDEN]),
                ("self_attn.v_proj", [of_kv, HIDDEN]),
                ("self_attn.o_proj", [HIDDEN, HIDDEN]),
                ("mlp.gate_proj", [INTERMEDIATE, HIDDEN]),
                ("mlp.up_proj", [INTERMEDIATE, HIDDEN]),
                ("mlp.down_proj", [HIDDEN, INTERMEDIATE]),
            ] {
                let weight = (random_matrix(shape[0], shape[1]) * 0.02).to_kind(Kind::Half);
                tensors.push((format!("model.layers.0.{name}.weight"), weight));
            }
            for norm in ["layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"] {
                let ones = Tensor::ones([HIDDEN as i64], (Kind::Half, Device::Cpu));
                tensors.push((format!("model.{norm}.weight"), ones));
            }
            for name in ["model.embed_tokens.weight", "lm_head.weight"] {
                tensors.push((name.to_owned(), random_matrix(256, HIDDEN).to_kind(Kind::Half)));
            }
            let file = folder.join("model.safetensors");
            Tensor::write_safetensors(&tensors, file).expect("space for a layer");
            Self(folder)
        }

        fn checkpoint(&self) -> Checkpoint {
            Checkpoint::open(&self.0).expect("a complete model")
        }
    }

    /// The operations of attention are not counted.
    #[divan::bench(args = [Kind::BFloat16, Kind::Float])]
    fn forward(bencher: Bencher<'_, '_>, kind: Kind) {
        let model = Model::new();
        let checkpoint = model.checkpoint();
        let transformer = Transformer::new(&checkpoint, SEQ_LEN, kind, Device::Cpu).expect("a known model");
        let linears = checkpoint.config().layers[0].linears.len();
        let linear = |position| {
            let (weight, bias) = transformer.weight(0, position, kind).expect("a weight of the model");
            Box::new(Dense::new(weight, bias)) as Box<dyn Linear>
        };
        let parts = transformer.parts(0).expect("parts of the model");
        let layer = Layer::new(0, parts, (0..linears).map(linear).collect());
        let size = [BATCH, SEQ_LEN, HIDDEN].map(|n| n as i64);
        let hidden = Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind);
        let flops = ItemsCount::new(2 * BATCH * SEQ_LEN * WEIGHTS);
        let _guard = tch::no_grad_guard();
        bencher
            .counter(flops)
            .bench_local(|| transformer.forward(&layer, &hidden, None).expect("hidden states of the model"));
    }

    /// From files that the system has in memory.
    #[divan::bench]
    fn read_weights(bencher: Bencher<'_, '_>) {
        let model = Model::new();
        let checkpoint = model.checkpoint();
        let transformer =
            Transformer::new(&checkpoint, SEQ_LEN, Kind::Half, Device::Cpu).expect("a known model");
        let linears = checkpoint.config().layers[0].linears.len();
        bencher.counter(BytesCount::new(2 * WEIGHTS)).bench_local(|| {
            let read = |position| transformer.weight(0, position, Kind::Half).expect("a weight of the model");
            (0..linears).map(read).collect::<Vec<_>>()
        });
    }

    /// Of a solved linear for forward passes. The bytes are those of the weights.
    #[divan::bench(args = [Kind::BFloat16, Kind::Float])]
    fn dequantize(bencher: Bencher<'_, '_>, kind: Kind) {
        let solved = Solved::Host(random::linear(SHAPE, &variant()));
        let bytes = BytesCount::new(SHAPE.0 * SHAPE.1 * kind.elt_size_in_bytes());
        bencher.counter(bytes).bench_local(|| solved.dequantize(kind).expect("memory for a weight"));
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
    multiply(bencher, rows, &variant());
}

/// The same with act order.
#[divan::bench(args = [1, 16, 512, 2048], sample_count = 5, sample_size = 16)]
fn matmul_act_order(bencher: Bencher<'_, '_>, rows: usize) {
    multiply(bencher, rows, &"4bit-128g-act".parse().expect("the variant is well formed"));
}

fn multiply(bencher: Bencher<'_, '_>, rows: usize, variant: &Variant) {
    let (n, k) = MATMUL;
    // One after another, so that weights come from memory and threads stay awake, as in a model.
    let packed = vec![PackedLinear::new(&random::linear(MATMUL, variant)); LARGE / (n * k / 2)];
    let linears: Vec<_> = packed.iter().map(|packed| CpuMatmul::new(packed.view())).collect();
    let mut linears = linears.iter().cycle();
    let x: Vec<f32> = (0..rows * k).map(|i| (i % 13) as f32 - 6.0).collect();
    let mut y = vec![0.0; rows * n];
    let bytes: usize = packed[0].tensors().iter().map(|(_, bytes)| bytes.len()).sum();
    bencher
        .counter(BytesCount::new(bytes))
        .counter(ItemsCount::new(2 * rows * n * k))
        .bench_local(|| linears.next().expect("no end").forward(&x, rows, black_box(&mut y)));
}
