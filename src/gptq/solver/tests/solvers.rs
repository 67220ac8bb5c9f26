//! Requirements on every solver, on the CPU and on a CUDA device.

use tch::{Device, Kind, Tensor};

use super::{
    problem::{CODES_THAT_MAY_DIFFER, OBJECTIVE_TOLERANCE, Problem, cuda, solve, variants, weight},
    reference::damped_factor,
    torch::TorchSolver,
};
use crate::{
    accuracy::{AccuracyOptions, Quality, ScaleSearch, Scales},
    amx::Parts,
    error::Error,
    gptq::{
        ColumnOrder, Grid, Hessian, QuantizedLinear, Step,
        solver::{CpuSolver, CudaSolver, RtnSolver, Solver, Weight},
    },
    variant::{Sorting, Variant},
};

/// In steps: the largest difference of two codes' distances to a target between them that products of bf16 may take for a tie.
const BF16_TIE: f64 = 0.06;

/// All solvers that run on the CPU. The CUDA solver runs twice, with plain code for its kernels, with much and with little
/// shared memory.
fn on_cpu(scales: Scales) -> [Box<dyn Solver>; 6] {
    [
        Box::new(CpuSolver::with_products(None).with_scales(scales)),
        Box::new(CpuSolver::with_products(Some(Parts::Two)).with_scales(scales)),
        Box::new(CpuSolver::with_products(Some(Parts::One)).with_scales(scales)),
        Box::new(TorchSolver::new(scales)),
        Box::new(CudaSolver::host_emulation(227 << 10).with_scales(scales)),
        Box::new(CudaSolver::host_emulation(99 << 10).with_scales(scales)),
    ]
}

/// All solvers of a CUDA device.
fn on_cuda(scales: Scales) -> [Box<dyn Solver>; 2] {
    let ours = CudaSolver::new(cuda()).unwrap_or_else(|error| panic!("{error}"));
    [Box::new(ours.with_scales(scales)), Box::new(TorchSolver::new(scales))]
}

/// A check as a test of the solvers here, and as one of those on a device.
macro_rules! everywhere {
    ($check:ident, $here:ident, $on_device:ident) => {
        #[test]
        fn $here() {
            $check(on_cpu, Device::Cpu);
        }

        #[test]
        #[ignore = "needs a CUDA device: scripts/gpu-check"]
        fn $on_device() {
            $check(on_cuda, cuda());
        }
    };
}

everywhere!(
    agree_with_the_definition,
    solvers_agree_with_the_definition,
    cuda_device_solvers_agree_with_the_definition
);
everywhere!(
    agree_on_searched_scales,
    solvers_agree_on_searched_scales,
    cuda_device_solvers_agree_on_searched_scales
);
everywhere!(
    solve_stacked_weights_as_if_alone,
    stacked_weights_are_solved_as_if_alone,
    cuda_device_stacked_weights_are_solved_as_if_alone
);
everywhere!(solve_twice_the_same, two_solves_are_byte_identical, cuda_device_two_solves_are_byte_identical);
everywhere!(
    zero_and_count_dead_columns,
    dead_columns_get_zero_weights_and_are_counted,
    cuda_device_dead_columns_get_zero_weights_and_are_counted
);
everywhere!(
    raise_damping_only_when_needed,
    damping_is_raised_only_when_needed_and_said,
    cuda_device_damping_is_raised_only_when_needed_and_said
);
everywhere!(
    refuse_a_weight_beyond_fp16,
    a_weight_beyond_fp16_is_refused,
    cuda_device_a_weight_beyond_fp16_is_refused
);

fn agree_with_the_definition<const N: usize>(
    solvers: impl Fn(Scales) -> [Box<dyn Solver>; N],
    device: Device,
) {
    let solvers = &solvers(Scales::PLAIN);
    // 600 columns: several panels, partial last groups; 70 rows: a partial tile.
    let problem = Problem::new(70, 600, 2000, 1).on(device);
    agree(&problem, &variants(), solvers, &AccuracyOptions::NONE);
}

/// The same where scales are searched for. Scales that cost next to the same may be chosen the other way round.
fn agree_on_searched_scales<const N: usize>(
    solvers: impl Fn(Scales) -> [Box<dyn Solver>; N],
    device: Device,
) {
    let problem = Problem::new(70, 300, 1000, 1).on(device);
    for (signed, search) in
        [(true, ScaleSearch::Off), (false, ScaleSearch::Block), (true, ScaleSearch::Block)]
    {
        let scales = Scales { signed, search };
        let accuracy = AccuracyOptions { scales, group_aware: true, ..AccuracyOptions::NONE };
        let texts = ["4bit-128g-act", "4bit-32g", "2bit-64g-asym", "4bit-48g-static", "3bit--1g"];
        let variants = texts.map(|text| text.parse().unwrap());
        agree(&problem, &variants, &solvers(scales), &accuracy);
    }
}

fn agree(problem: &Problem, variants: &[Variant], solvers: &[Box<dyn Solver>], accuracy: &AccuracyOptions) {
    for (of, solver) in variants.iter().flat_map(|v| solvers.iter().map(move |s| (v, s))) {
        let slow = match solver.name() {
            "libtorch" => problem.reference_with(of, 0.01, accuracy),
            _ => problem.reference_or_rounded(of, 0.01, accuracy),
        };
        let fast = problem.fast_with(&**solver, of, 0.01, accuracy);
        let variant = format!("{of}, {}, {accuracy}", solver.name());
        assert_eq!(slow.linear.g_idx(), fast.linear.g_idx(), "{variant}");
        if solver.name() == "cpu-bf16" {
            let rounded = problem.fast_with(&RtnSolver, of, 0.01, accuracy).linear;
            let far = farthest_code(problem, &fast.linear, &rounded, accuracy.sorting(of));
            assert!(far <= BF16_TIE, "{variant}: a code is {far} steps from its target");
        } else {
            let pairs = slow.linear.codes().iter().zip(fast.linear.codes());
            let different = pairs.filter(|(a, b)| a != b).count() as f64 / slow.linear.codes().len() as f64;
            assert!(different <= CODES_THAT_MAY_DIFFER, "{variant}: {different} of the codes differ");
        }
        let ratio = fast.squared_error / slow.squared_error;
        assert!((ratio - 1.0).abs() < OBJECTIVE_TOLERANCE * 5.0, "{variant}: objective ratio {ratio}");
        let direct = problem.objective(&fast.linear);
        let ratio = fast.squared_error / direct;
        assert!((ratio - 1.0).abs() < OBJECTIVE_TOLERANCE, "{variant}: reported over measured {ratio}");
    }
}

/// How much farther a code is from its target, as compensated for the codes before it, than the nearest code, in steps; the largest of
/// the rows that are not as in `rounded`.
fn farthest_code(
    problem: &Problem,
    linear: &QuantizedLinear,
    rounded: &QuantizedLinear,
    sorting: Sorting,
) -> f64 {
    let (n, k) = (problem.n, problem.k);
    let (grid, hessian) = (Grid::new(linear.bits(), true), problem.hessian());
    let diagonal: Vec<f32> = (0..k).map(|i| hessian[i * k + i] as f32).collect();
    let order = ColumnOrder::new(sorting, &diagonal);
    let u = damped_factor(&hessian, order.columns(), 0.01).unwrap();
    let (weights, levels) = (problem.weight(), linear.dequantize(f64::from));
    let mut farthest = 0.0f64;
    let codes = |linear: &QuantizedLinear, row| -> Vec<u8> {
        linear.codes().iter().skip(row).step_by(n).copied().collect()
    };
    for row in (0..n).filter(|&row| codes(linear, row) != codes(rounded, row)) {
        let mut d: Vec<f64> = Vec::new();
        for (i, column) in order.columns().iter().map(|&column| column as usize).enumerate() {
            let weight = weights[row * k + column];
            let residual: f64 = d.iter().enumerate().map(|(j, d)| u[j * k + i] * d).sum();
            let target = weight - residual / u[i * k + i];
            let level = levels[column * n + row];
            let group = linear.g_idx()[column] as usize;
            let step =
                Step { scale: linear.scales()[group * n + row], zero: linear.zeros()[group * n + row] };
            let nearest = step.weight(grid.code(target, step));
            let farther = (level - target).abs() - (nearest - target).abs();
            farthest = farthest.max(farther / f64::from(step.scale).abs());
            d.push(level - weight);
        }
    }
    farthest
}

fn solve_stacked_weights_as_if_alone<const N: usize>(
    solvers: impl Fn(Scales) -> [Box<dyn Solver>; N],
    device: Device,
) {
    let solvers = &solvers(Scales::PLAIN);
    let problem = Problem::new(40, 256, 800, 2).on(device);
    let other = Tensor::randn([24, 256], (Kind::Float, device));
    let variant: Variant = "4bit-64g-act".parse().unwrap();
    for solver in solvers {
        let factor = solver.factorize(&problem.hessian, Sorting::Descending, 0.01, "test").unwrap();
        let both = solve(&*factor, &[&problem.weight, &other], &variant);
        let alone = solve(&*factor, &[&other], &variant);
        assert_eq!(both[1].linear.out_features(), 24);
        assert_eq!(both[1].linear.g_idx(), alone[0].linear.g_idx());
        let same = both[1].linear.codes().iter().zip(alone[0].linear.codes()).filter(|(a, b)| a == b).count();
        assert!(same as f64 > 0.995 * (24.0 * 256.0), "{}: {same}", solver.name());
        let ratio = both[1].squared_error / alone[0].squared_error;
        assert!((ratio - 1.0).abs() < OBJECTIVE_TOLERANCE, "{}: {ratio}", solver.name());
    }
}

fn solve_twice_the_same<const N: usize>(solvers: impl Fn(Scales) -> [Box<dyn Solver>; N], device: Device) {
    let solvers = &solvers(Scales::PLAIN);
    let problem = Problem::new(96, 320, 900, 3).on(device);
    for (variant, solver) in variants().into_iter().flat_map(|v| solvers.iter().map(move |s| (v, s))) {
        let [one, other] =
            [(); 2].map(|()| problem.fast_with(&**solver, &variant, 0.01, &AccuracyOptions::NONE));
        assert_eq!(one.linear, other.linear, "{variant}, {}", solver.name());
        assert_eq!(
            one.squared_error.to_bits(),
            other.squared_error.to_bits(),
            "{variant}, {}",
            solver.name()
        );
    }
}

fn zero_and_count_dead_columns<const N: usize>(
    solvers: impl Fn(Scales) -> [Box<dyn Solver>; N],
    device: Device,
) {
    let solvers = &solvers(Scales::PLAIN);
    let inputs = Tensor::randn([600, 128], (Kind::Float, Device::Cpu));
    for column in [5i64, 64, 127] {
        let _ = inputs.narrow(1, column, 1).zero_();
    }
    let problem = Problem::with_inputs(32, 128, &inputs).on(device);
    for (text, solver) in ["4bit-32g", "4bit-32g-act", "4bit-64g-static"]
        .iter()
        .flat_map(|t| solvers.iter().map(move |s| (t, s)))
    {
        let variant: Variant = text.parse().unwrap();
        let factor = solver.factorize(&problem.hessian, variant.sorting(false), 0.01, "test").unwrap();
        let name = format!("{text}, {}", solver.name());
        assert_eq!(factor.facts().dead_columns, 3, "{name}");
        let solution = solve(&*factor, &[&problem.weight], &variant).remove(0);
        let dense = solution.linear.dequantize(|w| w);
        for column in [5, 64, 127] {
            assert!(dense[column * 32..][..32].iter().all(|&w| w == 0.0), "{name}");
        }
        let slow = problem.reference(&variant, 0.01);
        let ratio = solution.squared_error / slow.squared_error;
        assert!((ratio - 1.0).abs() < 5.0 * OBJECTIVE_TOLERANCE, "{name}: {ratio}");
    }
}

fn raise_damping_only_when_needed<const N: usize>(
    solvers: impl Fn(Scales) -> [Box<dyn Solver>; N],
    device: Device,
) {
    let solvers = &solvers(Scales::PLAIN);
    // 20 tokens for 64 features: rank 20, so that without damping the factorization fails.
    let inputs = Tensor::randn([20, 64], (Kind::Float, Device::Cpu));
    let problem = Problem::with_inputs(8, 64, &inputs).on(device);
    for solver in solvers {
        let facts =
            |damp| solver.factorize(&problem.hessian, Sorting::Stored, damp, "test").unwrap().facts().clone();
        let raised = facts(0.0);
        assert!(raised.damp_raised > 0 && raised.damp >= 0.01, "{}: {raised:?}", solver.name());
        let plain = facts(0.01);
        assert_eq!((plain.damp, plain.damp_raised), (0.01, 0), "{}", solver.name());
    }
}

fn refuse_a_weight_beyond_fp16<const N: usize>(
    solvers: impl Fn(Scales) -> [Box<dyn Solver>; N],
    device: Device,
) {
    let problem = Problem::new(8, 64, 200, 6).on(device);
    let huge = &problem.weight * 1e9;
    let searched = |search| solvers(Scales { signed: true, search });
    let [plain, block] = [ScaleSearch::Off, ScaleSearch::Block].map(searched);
    for solver in plain.iter().chain(&block) {
        let factor = solver.factorize(&problem.hessian, Sorting::Stored, 0.01, "test").unwrap();
        let weights = [weight(&problem.weight), Weight { name: "huge", values: &huge }];
        let error = factor.solve(&weights, &"4bit-32g".parse().unwrap()).unwrap_err();
        assert!(matches!(error, Error::Fp16Overflow { .. }), "{}: {error}", solver.name());
        assert!(error.to_string().starts_with("huge: scale of group 0, output feature 0"), "{error}");
    }
}

/// Another shape than those above: several blocks of rows on every device, and panels enough for products of some size.
#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_solver_agrees_with_libtorchs() {
    let problem = Problem::new(1000, 1536, 6000, 8).on(cuda());
    let [ours, libtorchs] = on_cuda(Scales::PLAIN);
    for variant in variants() {
        let fast = problem.fast_with(&*ours, &variant, 0.01, &AccuracyOptions::NONE);
        let plain = problem.fast_with(&*libtorchs, &variant, 0.01, &AccuracyOptions::NONE);
        assert_eq!(fast.linear.g_idx(), plain.linear.g_idx(), "{variant}");
        let pairs = fast.linear.codes().iter().zip(plain.linear.codes());
        let different = pairs.filter(|(a, b)| a != b).count() as f64 / fast.linear.codes().len() as f64;
        assert!(different <= CODES_THAT_MAY_DIFFER, "{variant}: {different} of the codes differ");
        let ratio = fast.squared_error / plain.squared_error;
        assert!((ratio - 1.0).abs() < OBJECTIVE_TOLERANCE, "{variant}: objective ratio {ratio}");
    }
}

/// With a dead feature and sorted columns.
#[test]
fn a_quotient_solves_the_system() {
    tch::manual_seed(5);
    let (k, n) = (600, 75);
    let x = Tensor::randn([2 * k, k], (Kind::Float, Device::Cpu));
    let _ = x.narrow(1, 17, 1).zero_();
    let mut hessian = Hessian::new(k as usize, Device::Cpu).unwrap();
    hessian.add(&x).unwrap();
    let hessian = hessian.finish("test").unwrap();
    let b = Tensor::randn([n, k], (Kind::Float, Device::Cpu));
    let _ = b.narrow(1, 17, 1).zero_();
    for sorting in ["4bit-128g", "4bit-128g-act"].map(|v| v.parse::<Variant>().unwrap().sorting(false)) {
        for solver in [&CpuSolver::new() as &dyn Solver, &TorchSolver::default()] {
            let factor = solver.factorize(&hessian, sorting, 0.01, "test").unwrap();
            let found = factor.divide(&b, Kind::Float).unwrap().unwrap().to_kind(Kind::Double);
            let mean =
                f64::try_from(hessian.matrix().diagonal(0, 0, 1).sum(Kind::Double)).unwrap() / (k - 1) as f64;
            let damped = hessian.matrix().to_kind(Kind::Double)
                + Tensor::eye(k, (Kind::Double, Device::Cpu)) * (0.01 * mean);
            let difference = (found.mm(&damped) - b.to_kind(Kind::Double)).abs().max();
            assert!(difference.double_value(&[]) < 1e-5, "{difference:?}");
        }
    }
}

/// The column loop in libtorch's operations on a shape of `cargo bench --bench cuda`, measured for `scripts/gpu-check`: JSON on a line.
#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
#[expect(clippy::print_stdout, reason = "figures for a script")]
fn cuda_device_plain_loop_takes() {
    let (n, k) = (4096, 11008);
    let problem = Problem::new(n, k, 12_000, 8).on(cuda());
    let variant: Variant = "4bit-128g".parse().unwrap();
    let lines = [Quality::Fast, Quality::Standard].map(|quality| {
        let solver = TorchSolver::new(quality.options().scales);
        let factor = solver.factorize(&problem.hessian, Sorting::Stored, 0.01, "test").unwrap();
        let begun = std::time::Instant::now();
        factor.solve(&[weight(&problem.weight)], &variant).unwrap();
        let seconds = begun.elapsed().as_secs_f64();
        format!(
            "{{\"quality\": \"{quality}\", \"out_features\": {n}, \"in_features\": {k}, \"seconds\": {seconds}}}"
        )
    });
    println!("plain loop: [{}]", lines.join(", "));
}
