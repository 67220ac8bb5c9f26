//! The CUDA solver as it is, on the CPU's memory, with the kernels of `gptq_block.cu` run by the host: what launches them and
//! what they are, together.

use gptq::{
    accuracy::{AccuracyOptions, Quality, Scales},
    cuda::{Argument, Grid},
    error::{Error, Result},
    gptq::{
        Hessian,
        solver::{CudaSolver, Kernels, Solved, Solver, Weight},
    },
    pack::PackedLinear,
    variant::Variant,
};
use tch::{Device, Kind, Tensor};

use super::reference;
use crate::cuda_host::{Launch, Library, Memory, Order};

/// fp32 moves a target that lies at a tie to either side; later codes of the row then aim at another point.
const CODES_THAT_MAY_DIFFER: f64 = 0.02;
/// The objective is quadratic about its minimum, so ties do not show in it.
const OBJECTIVE_TOLERANCE: f64 = 5e-3;
const DAMP: f64 = 0.01;

struct HostKernels {
    shared_memory: usize,
    order: Order,
}

impl Kernels for HostKernels {
    fn device(&self) -> Device {
        Device::Cpu
    }

    fn shared_memory(&self) -> usize {
        self.shared_memory
    }

    unsafe fn launch(&self, name: &'static str, grid: Grid, arguments: &[Argument]) -> Result<()> {
        assert!(grid.shared <= self.shared_memory, "{name}: {grid:?}");
        let launch = Launch {
            blocks: grid.blocks,
            threads: grid.threads,
            shared: grid.shared,
            resident: 2,
            order: self.order,
        };
        let values: Vec<Vec<u8>> = arguments.iter().map(bytes).collect();
        let library = Library::of("gptq_block", &[("GPTQ_WARPS", 8)]);
        // SAFETY: the caller's promise. What the tensors' memory is, the machine does not know here.
        let result = unsafe { library.launch(name, launch, &Memory::default(), &values) };
        result.map_err(|problem| Error::Cuda { action: format!("launch {name} as {grid:?}"), problem })
    }
}

fn bytes(argument: &Argument) -> Vec<u8> {
    match argument {
        Argument::Pointer(v) => v.to_ne_bytes().into(),
        Argument::Int(v) => v.to_ne_bytes().into(),
        Argument::Unsigned(v) => v.to_ne_bytes().into(),
        Argument::Long(v) => v.to_ne_bytes().into(),
        Argument::Double(v) => v.to_ne_bytes().into(),
        Argument::Struct(bytes) => bytes.clone(),
    }
}

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double).flatten(0, -1)).unwrap()
}

/// Inputs of different size, correlated; a feature is dead.
fn hessian(k: i64) -> Hessian {
    let f32 = (Kind::Float, Device::Cpu);
    let mix = Tensor::randn([k, k], f32) * 0.3 + Tensor::eye(k, f32);
    let inputs = Tensor::randn([3 * k, k], f32).matmul(&mix) * (Tensor::randn([k], f32) * 0.7).exp();
    let _ = inputs.narrow(1, 5, 1).zero_();
    let mut hessian = Hessian::new(k as usize, Device::Cpu).unwrap();
    hessian.add(&inputs).unwrap();
    hessian.finish("test").unwrap()
}

#[test]
fn the_cuda_solver_agrees_with_the_definition() {
    let k = 288;
    tch::manual_seed(11);
    let hessian = hessian(k);
    let h = values(hessian.matrix());
    // Three weights of one stage, each in another type; together they fill no whole tiles.
    let weights: Vec<Tensor> = [(32, Kind::Float), (40, Kind::BFloat16), (8, Kind::Half)]
        .map(|(n, kind)| (Tensor::randn([n, k], (Kind::Float, Device::Cpu)) * 0.02).to_kind(kind))
        .into();
    let standard = Quality::Standard.options().scales;
    for (i, (text, scales)) in [
        ("4bit-128g", Scales::PLAIN),
        ("4bit-32g-act", Scales::PLAIN),
        ("3bit--1g-act-asym", Scales::PLAIN),
        ("8bit-48g-static", Scales::PLAIN),
        ("4bit-280g-act-asym", Scales::PLAIN),
        ("2bit-64g-asym", Scales::PLAIN),
        ("4bit-128g-act", standard),
        ("4bit-64g", standard),
        ("4bit-48g-static", standard),
    ]
    .into_iter()
    .enumerate()
    {
        let variant: Variant = text.parse().unwrap();
        let accuracy = AccuracyOptions { scales, ..AccuracyOptions::NONE };
        // Of the larger one, panels have 256 columns.
        let shared_memory = [227 << 10, 99 << 10][i % 2];
        let order = [Order::Forward, Order::Random(5), Order::Reverse][i % 3];
        let solver = CudaSolver::with_kernels(Box::new(HostKernels { shared_memory, order })).unwrap();
        let solver = solver.with_scales(scales);
        let factor = solver.factorize(&hessian, variant.sorting(false), DAMP, "test").unwrap();
        let stage: Vec<Weight<'_>> = weights.iter().map(|values| Weight { name: "weight", values }).collect();
        let solutions = factor.solve(&stage, &variant).unwrap_or_else(|error| panic!("{variant}: {error}"));
        for (solution, weight) in solutions.iter().zip(&weights) {
            let definition =
                reference::solve(&values(weight), &h, k as usize, DAMP, &variant, &accuracy, true).unwrap();
            let Solved::Device(device) = &solution.linear else { panic!("{variant}: not on the device") };
            let linear = device.to_host().unwrap();
            assert_eq!(linear.g_idx(), definition.linear.g_idx(), "{variant}");
            let pairs = linear.codes().iter().zip(definition.linear.codes());
            let different = pairs.filter(|(a, b)| a != b).count() as f64 / linear.codes().len() as f64;
            assert!(different <= CODES_THAT_MAY_DIFFER, "{variant}: {different} of the codes differ");
            let ratio = solution.squared_error / definition.squared_error;
            assert!((ratio - 1.0).abs() < OBJECTIVE_TOLERANCE, "{variant}: objective ratio {ratio}");
            if linear.out_features().is_multiple_of(variant.bits.pack_factor()) {
                let packed = PackedLinear::of_solved(&solution.linear).unwrap();
                assert_eq!(
                    packed.tensors(),
                    PackedLinear::new(&linear).tensors(),
                    "{variant}: packed by the kernel"
                );
            }
        }
    }
}
