//! Kernel by kernel: those of a device against plain code, and what a solved linear gives away.

use half::f16;
use tch::{Device, Kind, Tensor};

use super::{
    CudaSolver, DeviceLinear, factor_of,
    host_emulation::PlainKernels,
    launch::{Compensation, Launcher, Stacked},
    panels::{Mode, Search},
};
use crate::{
    accuracy::{ScaleSearch, Scales},
    cuda::Gpu,
    gptq::{
        QuantizedLinear,
        solver::{
            Solved, Solver,
            tests::problem::{Problem, cuda, to_vec, weight},
        },
    },
    variant::{Sorting, Variant},
};

/// Sums of some hundred fp32 products in another order differ by this, relative to the largest.
const SUM_TOLERANCE: f64 = 1e-5;
/// Codes of one panel that lie on a border.
const TIES: f64 = 1e-3;

const HOPPER: usize = 227 << 10;

fn plain() -> Launcher {
    Launcher::with(Box::new(PlainKernels { shared_memory: HOPPER }))
}

fn on_device() -> Launcher {
    let gpu = Gpu::of(cuda()).unwrap_or_else(|error| panic!("{error}"));
    Launcher::new(gpu, cuda(), None).unwrap_or_else(|error| panic!("{error}"))
}

/// Does the same on the CPU by plain code and on the device by a kernel; what comes out must be equal to the bit.
fn same_to_the_bit(work: impl Fn(&Launcher) -> Vec<Tensor>) {
    let (expected, found) = (work(&plain()), work(&on_device()));
    for (i, (expected, found)) in expected.iter().zip(&found).enumerate() {
        assert!(expected.equal(&found.to_device(Device::Cpu)), "tensor {i}");
    }
}

fn random(size: &[i64], seed: i64) -> Tensor {
    tch::manual_seed(seed);
    Tensor::randn(size, (Kind::Float, Device::Cpu))
}

/// A permutation of `0..k`, and its inverse.
fn permutation(k: i64) -> (Tensor, Tensor) {
    tch::manual_seed(3);
    let order = Tensor::randperm(k, (Kind::Int64, Device::Cpu));
    (order.to_kind(Kind::Int), order.argsort(0, false).to_kind(Kind::Int))
}

#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_reorders_hessians() {
    for k in [1, 31, 300, 1027] {
        let h = random(&[k, k], 1);
        let h = &h + h.tr();
        let _ = h.diagonal(0, 0, 1).slice(0, 2, None, 7).zero_();
        let (columns, _) = permutation(k);
        same_to_the_bit(|launcher| {
            let lower = h.zeros_like().to_device(launcher.device());
            let [h, columns] = [&h, &columns].map(|t| t.to_device(launcher.device()));
            launcher.reorder_hessian(&h, &columns, &lower, 1.5, 0.1).unwrap();
            vec![lower]
        });
    }
}

#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_stacks_weights() {
    for (kind, k, rows) in [(Kind::Float, 130, 70), (Kind::Half, 64, 32), (Kind::BFloat16, 203, 5)] {
        let (first, second) = (random(&[rows, k], 1).to_kind(kind), random(&[rows + 3, k], 2).to_kind(kind));
        let (_, positions) = permutation(k);
        let dead = Tensor::arange(k, (Kind::Int64, Device::Cpu)).remainder(9).eq(4).to_kind(Kind::Uint8);
        same_to_the_bit(|launcher| {
            let there = |t: &Tensor| t.to_device(launcher.device());
            let stack = Tensor::zeros([k, 2 * rows + 3], (Kind::Float, launcher.device()));
            for (weight, at) in [(&first, 0), (&second, rows)] {
                launcher.stack(&there(weight), &there(&positions), &there(&dead), &stack, at).unwrap();
            }
            vec![stack]
        });
    }
}

#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_packs_codes() {
    for (text, k, n) in
        [("2bit-32g", 64, 48), ("3bit-32g", 96, 32), ("4bit-32g", 72, 1032), ("8bit-32g", 12, 4)]
    {
        let bits = text.parse::<Variant>().unwrap().bits;
        tch::manual_seed(4);
        // Columns of a wider stack.
        let all = Tensor::randint(i64::from(bits.max_code()) + 1, [k, n + 12], (Kind::Int64, Device::Cpu));
        let all = all.to_kind(Kind::Uint8);
        same_to_the_bit(|launcher| {
            let codes = all.to_device(launcher.device()).narrow(1, 8, n);
            let words = Tensor::zeros([k * i64::from(bits.get()) / 32, n], (Kind::Int, launcher.device()));
            launcher.pack(&codes, &words, bits).unwrap();
            vec![words]
        });
    }
}

/// Scales of the default preset.
const SEARCHED: Scales = Scales { signed: true, search: ScaleSearch::Block };

/// All buffers that a panel kernel reads or writes.
struct Panel {
    stack: Stacked,
    residuals: Tensor,
}

impl Panel {
    /// `K` columns of which the last `p` are to be solved. Groups are runs of columns.
    fn new(text: &str, (n, k, p): (i64, i64, i64)) -> Self {
        let variant: Variant = text.parse().unwrap();
        let size = variant.group_size.features(k as usize);
        let x = random(&[2 * k, k], 5);
        let factor = factor_of(x.tr().mm(&x) / k as f64).unwrap().unwrap();
        let groups: Vec<i32> = (0..k as i32).map(|i| i / size as i32).collect();
        let zeros = |size: &[i64], kind| Tensor::zeros(size, (kind, Device::Cpu));
        let g = variant.group_size.groups(k as usize) as i64;
        let (weights, residuals) = (random(&[k, n], 6) * 0.02, random(&[p, n], 7) * 0.02);
        let stack = Stacked {
            factor,
            weights,
            codes: zeros(&[k, n], Kind::Uint8),
            scales: (zeros(&[g, n], Kind::Half) + 0.004).to_kind(Kind::Half),
            zeros: zeros(&[g, n], Kind::Uint8) + 2,
            groups: Tensor::from_slice(&groups),
            columns: permutation(k).0,
            objective: zeros(&[n], Kind::Double) + 0.5,
            distance: zeros(&[n], Kind::Double),
            factors: Tensor::from_slice(&SEARCHED.factors(variant.bits, variant.symmetric)),
            group_size: size,
            variant,
        };
        Self { stack, residuals }
    }

    /// A copy. (Panels are not made twice: other tests draw from the same generator.)
    fn on(&self, launcher: &Launcher) -> Self {
        let copy = |t: &Tensor| t.to_device(launcher.device()).copy();
        let stack = Stacked {
            factor: copy(&self.stack.factor),
            weights: copy(&self.stack.weights),
            codes: copy(&self.stack.codes),
            scales: copy(&self.stack.scales),
            zeros: copy(&self.stack.zeros),
            groups: copy(&self.stack.groups),
            columns: copy(&self.stack.columns),
            objective: copy(&self.stack.objective),
            distance: copy(&self.stack.distance),
            factors: copy(&self.stack.factors),
            ..self.stack
        };
        Self { stack, residuals: copy(&self.residuals) }
    }
}

fn close(what: &str, expected: &Tensor, found: &Tensor) {
    let [expected, found] = [expected, found].map(|t| t.to_device(Device::Cpu).to_kind(Kind::Double));
    let size = f64::try_from(expected.abs().max()).unwrap();
    let error = f64::try_from((found - expected).abs().max()).unwrap();
    assert!(error <= SUM_TOLERANCE * size, "{what}: {error} of {size}");
}

#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_fits_scales_beforehand() {
    for text in ["4bit-32g", "8bit-100g-asym", "4bit--1g"] {
        let (_, positions) = permutation(300);
        let panel = Panel::new(text, (70, 300, 1));
        same_to_the_bit(|launcher| {
            let panel = panel.on(launcher);
            launcher.fit_static(&panel.stack, &positions.to_device(launcher.device())).unwrap();
            vec![panel.stack.scales, panel.stack.zeros]
        });
    }
}

/// Static searches, costs of rounding and dense weights.
#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_searches_and_rounds() {
    for text in ["4bit-32g", "8bit-100g-asym", "4bit--1g"] {
        let (columns, positions) = permutation(300);
        let panel = Panel::new(text, (70, 300, 1));
        let diagonal = random(&[300], 8).square();
        let run = |launcher: &Launcher| {
            let panel = panel.on(launcher);
            let there = |t: &Tensor| t.to_device(launcher.device());
            launcher.search_static(&panel.stack, &there(&positions)).unwrap();
            let costs = Tensor::zeros(panel.stack.scales.size(), (Kind::Float, launcher.device()));
            launcher.rounding_costs(&panel.stack, &there(&columns), &there(&diagonal), &costs).unwrap();
            [panel.stack.scales, costs]
        };
        for (expected, found) in run(&plain()).iter().zip(&run(&on_device())) {
            close(text, expected, found);
        }
    }
}

/// Each panel kernel for whole and partial tiles and steps, aligned rows and others, with residuals and without.
#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_solves_panels() {
    let (here, there) = (plain(), on_device());
    for (text, shape) in [
        ("4bit-128g", (64, 512, 256)),
        ("4bit-32g", (70, 300, 140)),
        ("2bit-48g-asym", (33, 241, 240)),
        ("8bit-16g-asym", (31, 97, 97)),
        ("3bit-100g", (128, 200, 200)),
    ] {
        let candidates = Panel::new(text, (1, 16, 16)).stack.factors.size()[0] as usize;
        let searched = Mode::Searched(Search::new(candidates, SEARCHED.finalists()));
        for (mode, with_residuals) in
            [Mode::Fitted, searched, Mode::Given].into_iter().flat_map(|m| [(m, true), (m, false)])
        {
            let ((_, k, p), panel) = (shape, Panel::new(text, shape));
            let run = |launcher: &Launcher| {
                let panel = panel.on(launcher);
                // Groups begin where the panel does.
                let start = (k - p) as usize / panel.stack.group_size * panel.stack.group_size;
                let columns = start..start + p as usize;
                let residuals = with_residuals.then_some(&panel.residuals);
                launcher.panel(mode, columns, &panel.stack, residuals, None).unwrap();
                panel
            };
            let (expected, found) = (run(&here), run(&there));
            let name = format!("{text} {shape:?} {mode:?} {with_residuals}");
            let codes = [&expected.stack.codes, &found.stack.codes].map(to_vec);
            let different = codes[0].iter().zip(&codes[1]).filter(|(a, b)| a != b).count() as f64;
            assert!(different <= TIES * codes[0].len() as f64, "{name}: {different} codes");
            close(&format!("{name}: scales"), &expected.stack.scales, &found.stack.scales);
            for (what, expected, found) in [
                ("objective", &expected.stack.objective, &found.stack.objective),
                ("distance", &expected.stack.distance, &found.stack.distance),
            ] {
                let ratio =
                    found.sum(Kind::Double).double_value(&[]) / expected.sum(Kind::Double).double_value(&[]);
                assert!((ratio - 1.0).abs() < TIES, "{name}: {what} {ratio}");
            }
            if different == 0.0 {
                close(&format!("{name}: differences"), &expected.stack.weights, &found.stack.weights);
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_compensates_panels() {
    for (n, k, p) in [(64, 512, 256), (70, 300, 77), (31, 97, 97)] {
        let panel = Panel::new("4bit-512g-asym", (n, k, p));
        let run = |launcher: &Launcher| {
            let panel = panel.on(launcher);
            let options = (Kind::Float, launcher.device());
            let x = Tensor::zeros([p, n], options);
            let (minima, maxima) = (Tensor::zeros([n], options), Tensor::zeros([n], options));
            for (first, last) in [(true, false), (false, true)] {
                let c = Compensation { x: &x, minima: &minima, maxima: &maxima, first, last };
                let columns = (k - p) as usize..k as usize;
                let residuals = (!first).then_some(&panel.residuals);
                launcher.panel(Mode::Compensate, columns, &panel.stack, residuals, Some(&c)).unwrap();
            }
            [x, minima, maxima, panel.stack.scales]
        };
        for (expected, found) in run(&plain()).iter().zip(&run(&on_device())) {
            close(&format!("{n} {k} {p}"), expected, found);
        }
    }
}

/// Two solved linears of one stack.
fn solved(solver: &CudaSolver, device: Device, text: &str) -> Vec<DeviceLinear> {
    let problem = Problem::new(96, 192, 600, 10).on(device);
    let variant: Variant = text.parse().unwrap();
    let factor = solver.factorize(&problem.hessian, variant.sorting(false), 0.01, "test").unwrap();
    let other = random(&[64, 192], 11).to_device(device);
    let solutions = factor.solve(&[weight(&problem.weight), weight(&other)], &variant).unwrap();
    let linears = solutions.into_iter().map(|s| match s.linear {
        Solved::Device(linear) => linear,
        Solved::Host(_) | Solved::Blocks(_) => panic!("{text}: on the host"),
    });
    linears.collect()
}

/// Words, scales, zeros and dense weights of linears on a device are those of the host.
fn gives_away_what_the_host_would(solver: &CudaSolver, device: Device) {
    for text in ["2bit-32g", "3bit-64g-act", "4bit-128g-act-asym", "8bit--1g", "4bit-48g-static"] {
        for linear in solved(solver, device, text) {
            let host = linear.to_host().unwrap();
            let packed = linear.pack().unwrap();
            assert_eq!(packed.words, words(&host), "{text}");
            assert_eq!((&packed.scales[..], &packed.zeros[..]), (host.scales(), host.zeros()), "{text}");
            let dense = |kind| linear.dequantize(kind).unwrap().to_device(Device::Cpu);
            let fp32 = Vec::<f32>::try_from(dense(Kind::Float).flatten(0, -1)).unwrap();
            assert_eq!(fp32, host.dequantize(|w| w), "{text}");
            let fp16 = Vec::<f16>::try_from(dense(Kind::Half).flatten(0, -1)).unwrap();
            assert_eq!(fp16, host.dequantize(f16::from_f32), "{text}");
        }
    }
}

/// Codes bit after bit along `K`.
fn words(linear: &QuantizedLinear) -> Vec<i32> {
    let (bits, n) = (linear.bits().get() as usize, linear.out_features());
    let mut words = vec![0; linear.in_features() * bits / 32 * n];
    for (i, &code) in linear.codes().iter().enumerate() {
        for bit in (0..bits).filter(|bit| code >> bit & 1 == 1) {
            let at = i / n * bits + bit;
            words[at / 32 * n + i % n] |= 1 << (at % 32);
        }
    }
    words
}

#[test]
fn linears_give_away_what_the_host_would() {
    gives_away_what_the_host_would(&CudaSolver::host_emulation(HOPPER), Device::Cpu);
}

#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_linears_give_away_what_the_host_would() {
    gives_away_what_the_host_would(
        &CudaSolver::new(cuda()).unwrap_or_else(|error| panic!("{error}")),
        cuda(),
    );
}

/// The `i`-th output feature of all parts becomes output feature `rows[i]`.
#[test]
fn joined_parts_have_their_rows_where_they_belong() {
    let parts = solved(&CudaSolver::host_emulation(HOPPER), Device::Cpu, "4bit-64g-act-asym");
    let (rows, _) = permutation(160);
    let joined = DeviceLinear::joined(&parts, &Vec::<i64>::try_from(rows.to_kind(Kind::Int64)).unwrap());
    let joined = joined.unwrap().dequantize(Kind::Float).unwrap();
    let dense: Vec<Tensor> = parts.iter().map(|part| part.dequantize(Kind::Float).unwrap()).collect();
    assert_eq!(joined.index_select(1, &rows), Tensor::cat(&dense, 1));
}

/// libtorch's flags for factors and products may change; what is read row by row must stay row-major.
#[test]
fn a_factor_is_upper_triangular_row_major_and_the_matrix_again() {
    let x = random(&[300, 90], 12).to_kind(Kind::Double);
    let matrix = x.tr().mm(&x) / 300.0;
    // Both axes reversed, and nothing above the diagonal, as from `gptq_reorder_hessian`.
    let lower = matrix.flip([0, 1]).tril(0).contiguous();
    let factor = factor_of(lower).unwrap().unwrap();
    assert!(factor.is_contiguous());
    assert!(factor.equal(&factor.triu(0)));
    let error = f64::try_from((factor.mm(&factor.tr()) - &matrix).abs().max()).unwrap();
    assert!(error < 1e-12, "{error}");
    assert!(factor_of(-Tensor::eye(5, (Kind::Float, Device::Cpu))).unwrap().is_none());
}

#[test]
fn a_device_with_little_shared_memory_is_refused() {
    let problem = Problem::new(8, 64, 200, 13);
    let factor = CudaSolver::host_emulation(16 << 10)
        .factorize(&problem.hessian, Sorting::Stored, 0.01, "test")
        .unwrap();
    let error = factor.solve(&[weight(&problem.weight)], &"4bit-32g".parse().unwrap()).unwrap_err();
    let text = "CUDA could not solve a panel of columns: blocks have only 16384 bytes of shared memory";
    assert_eq!(error.to_string(), text);
}

#[test]
fn the_solver_compiles_for_every_generation_with_nvrtc() {
    for found in crate::cuda::entries_by_generation(&super::GPTQ_BLOCK) {
        for kernel in
            ["gptq_solve_fitted", "gptq_solve_searched", "gptq_solve_given", "gptq_compensate", "gptq_pack"]
        {
            assert!(found.iter().any(|name| name == kernel), "{kernel} is not among {found:?}");
        }
    }
}
