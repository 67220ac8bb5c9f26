//! What the kernels of `gptq_block.cu` promise, in plain code on the CPU: so that everything around them (panels, products,
//! orders, groups, addresses) is tested without a GPU. How they do it is tested elsewhere.

use tch::Device;

use super::{
    kernels::Kernels,
    launch::PanelArguments,
    panels::{LANES, Mode, Search},
};
use crate::{
    cuda::{Argument, Grid},
    error::Result,
    gptq::{self, Step},
    variant::Bits,
};

pub(super) struct PlainKernels {
    pub(super) shared_memory: usize,
}

impl Kernels for PlainKernels {
    fn device(&self) -> Device {
        Device::Cpu
    }

    fn shared_memory(&self) -> usize {
        self.shared_memory
    }

    unsafe fn launch(&self, name: &'static str, grid: Grid, arguments: &[Argument]) -> Result<()> {
        assert!(grid.shared <= self.shared_memory);
        if let [Argument::Struct(bytes)] = arguments {
            let a: PanelArguments = bytemuck::pod_read_unaligned(bytes);
            let [candidates, finalists, at_once] =
                [a.candidates, a.finalists, a.at_once].map(|count| count as usize);
            let searched = Mode::Searched(Search { candidates, finalists, at_once });
            let modes = [Mode::Fitted, searched, Mode::Given, Mode::Compensate];
            let mode = modes.into_iter().find(|m| m.kernel() == name).expect("a panel kernel");
            assert_eq!((grid.blocks, grid.threads), (((a.n as usize).div_ceil(LANES), 1, 1), (256, 1)));
            assert_eq!(grid.shared, mode.shared_memory(a.columns as usize, a.group_size as usize));
            // SAFETY: the arguments are those of the kernel, which touches no more than this does.
            (0..a.n as usize).for_each(|lane| unsafe { solve_lane(mode, &a, lane) });
            return Ok(());
        }
        let arguments = Arguments(arguments);
        // SAFETY: as above.
        unsafe {
            match name {
                "gptq_fit_static" => fit_static(&arguments, grid),
                "gptq_search_static" => search_static(&arguments, grid),
                "gptq_rounding_costs" => rounding_costs(&arguments, grid),
                "gptq_dequantize_f32" => dequantize(&arguments, grid, |v: f32| v),
                "gptq_dequantize_f16" => dequantize(&arguments, grid, half::f16::from_f32),
                "gptq_dequantize_bf16" => dequantize(&arguments, grid, half::bf16::from_f32),
                "gptq_pack" => pack(&arguments, grid),
                "gptq_reorder_hessian" => reorder_hessian(&arguments, grid),
                "gptq_stack_f32" => stack(&arguments, grid, |v: f32| v),
                "gptq_stack_f16" => stack(&arguments, grid, half::f16::to_f32),
                "gptq_stack_bf16" => stack(&arguments, grid, half::bf16::to_f32),
                name => panic!("no kernel {name}"),
            }
        }
        Ok(())
    }
}

struct Arguments<'a>(&'a [Argument]);

impl Arguments<'_> {
    fn pointer<T>(&self, i: usize) -> *mut T {
        let Argument::Pointer(address) = self.0[i] else { panic!("argument {i} is {:?}", self.0[i]) };
        address as *mut T
    }

    fn int(&self, i: usize) -> usize {
        let Argument::Int(value) = self.0[i] else { panic!("argument {i} is {:?}", self.0[i]) };
        value as usize
    }

    fn double(&self, i: usize) -> f64 {
        let Argument::Double(value) = self.0[i] else { panic!("argument {i} is {:?}", self.0[i]) };
        value
    }
}

/// # Safety
/// `a` points to what `PanelArguments` says in `gptq_block.cu`.
unsafe fn solve_lane(mode: Mode, a: &PanelArguments, lane: usize) {
    let (n, p, size) = (a.n as usize, a.columns as usize, a.group_size as usize);
    let grid = grid(a.bits as usize, a.symmetric as usize);
    // SAFETY: the caller's promise.
    unsafe {
        let factor = |j: usize, c: usize| *(a.factor as *const f32).add(j * a.factor_stride as usize + c);
        let weight = |c: usize| *(a.weights as *const f32).add(c * n + lane);
        let group = |c: usize| *(a.groups as *const i32).add(c) as usize * n + lane;
        let mut sums: Vec<f32> = (0..p)
            .map(|c| if a.residuals == 0 { 0.0 } else { *(a.residuals as *const f32).add(c * n + lane) })
            .collect();
        // x of some columns, and the smallest and the largest of their compensated weights.
        let compensated = |sums: &[f32], from: usize, to: usize| {
            let (mut x, mut min, mut max) = (sums[from..to].to_vec(), f32::INFINITY, f32::NEG_INFINITY);
            for c in from..to {
                x[c - from] /= factor(c, c);
                for later in c + 1..to {
                    x[later - from] -= factor(c, later) * x[c - from];
                }
                (min, max) = (min.min(weight(c) - x[c - from]), max.max(weight(c) - x[c - from]));
            }
            (x, min, max)
        };
        let set = |group: usize, step: Step| {
            *(a.scales as *mut half::f16).add(group) = step.scale;
            *(a.zeros as *mut u8).add(group) = step.zero;
        };
        if mode == Mode::Compensate {
            let (x, mut min, mut max) = compensated(&sums, 0, p);
            let (minima, maxima) = ((a.minima as *mut f32).add(lane), (a.maxima as *mut f32).add(lane));
            if a.flags & 1 == 0 {
                (min, max) = (min.min(*minima), max.max(*maxima));
            }
            (*minima, *maxima) = (min, max);
            x.iter().enumerate().for_each(|(c, &x)| *(a.differences as *mut f32).add(c * n + lane) = x);
            if a.flags & 2 != 0 {
                set(group(0), grid.fit(f64::from(min), f64::from(max)));
            }
            return;
        }
        for c in 0..p {
            if c.is_multiple_of(size) && matches!(mode, Mode::Fitted | Mode::Searched(_)) {
                let end = (c + size).min(p);
                let (x, min, max) = compensated(&sums, c, end);
                let step = match mode {
                    Mode::Searched(search) => {
                        let weights: Vec<f32> = (c..end).map(|i| weight(i) - x[i - c]).collect();
                        let block = |j: usize, i: usize| factor(c + j, c + i);
                        let factors = std::slice::from_raw_parts(a.factors as *const f64, search.candidates);
                        searched(grid, factors, search.finalists, &weights, block, true)
                    }
                    _ => grid.fit(f64::from(min), f64::from(max)),
                };
                set(group(c), step);
            }
            let step = Step {
                scale: *(a.scales as *const half::f16).add(group(c)),
                zero: *(a.zeros as *const u8).add(group(c)),
            };
            let target = weight(c) - sums[c] / factor(c, c);
            let code = grid.code(f64::from(target), step);
            let (quantized, row) = (step.weight(code) as f32, *(a.rows as *const i32).add(c) as usize);
            *(a.codes as *mut u8).add(row * n + lane) = code;
            let difference = quantized - weight(c);
            *(a.objective as *mut f64).add(lane) += f64::from((quantized - target) * factor(c, c)).powi(2);
            *(a.distance as *mut f64).add(lane) += f64::from(difference).powi(2);
            *(a.differences as *mut f32).add(c * n + lane) = difference;
            for later in c + 1..p {
                sums[later] += factor(c, later) * difference;
            }
        }
    }
}

/// The best step for a group of `weights`: the best finalist by the block, if there is more than one, and `factor(j, i)` is
/// `Ũ_gg`.
fn searched(
    grid: gptq::Grid,
    factors: &[f64],
    finalists: usize,
    weights: &[f32],
    factor: impl Fn(usize, usize) -> f32,
    by_block: bool,
) -> Step {
    let wide = |w: f32| f64::from(w);
    let (min, max) =
        weights.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &w| (l.min(w), h.max(w)));
    let quantized = |target: f32, step: Step| step.weight(grid.code(wide(target), step)) as f32;
    let number = |cost: f32| cost.min(f32::INFINITY);
    let mut tried: Vec<(f32, Step)> = factors
        .iter()
        .map(|&f| {
            let step = grid.fit_scaled(wide(min), wide(max), f);
            let costs =
                weights.iter().enumerate().map(|(i, &w)| ((quantized(w, step) - w) * factor(i, i)).powi(2));
            (number(costs.sum::<f32>()), step)
        })
        .collect();
    tried.sort_by(|a, b| a.0.total_cmp(&b.0));
    if by_block && finalists > 1 {
        tried.truncate(finalists);
        for (cost, step) in &mut tried {
            let mut differences: Vec<f32> = Vec::with_capacity(weights.len());
            let mut sum = 0.0;
            for (i, &w) in weights.iter().enumerate() {
                let residual: f32 = differences.iter().enumerate().map(|(j, d)| factor(j, i) * d).sum();
                let target = w - residual / factor(i, i);
                let q = quantized(target, *step);
                sum += ((q - target) * factor(i, i)).powi(2);
                differences.push(q - w);
            }
            *cost = number(sum);
        }
        tried.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    tried[0].1
}

fn grid(bits: usize, symmetric: usize) -> gptq::Grid {
    gptq::Grid::new(Bits::new(bits as u32).unwrap(), symmetric != 0)
}

/// # Safety
/// The kernel's arguments.
unsafe fn fit_static(a: &Arguments<'_>, launch: Grid) {
    let (weights, positions) = (a.pointer::<f32>(0), a.pointer::<i32>(1));
    let (scales, zeros) = (a.pointer::<half::f16>(2), a.pointer::<u8>(3));
    let (n, k, size) = (a.int(4), a.int(5), a.int(6));
    assert_eq!((launch.blocks, launch.threads), ((n.div_ceil(32), k.div_ceil(size), 1), (32, 8)));
    for (group, lane) in (0..k.div_ceil(size)).flat_map(|group| (0..n).map(move |lane| (group, lane))) {
        let features = group * size..((group + 1) * size).min(k);
        // SAFETY: the caller's promise.
        let weights = features.map(|f| unsafe { *weights.add(*positions.add(f) as usize * n + lane) });
        let (min, max) = weights.fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), w| (l.min(w), h.max(w)));
        let step = grid(a.int(7), a.int(8)).fit(f64::from(min), f64::from(max));
        // SAFETY: the caller's promise.
        unsafe {
            *scales.add(group * n + lane) = step.scale;
            *zeros.add(group * n + lane) = step.zero;
        }
    }
}

/// # Safety
/// The kernel's arguments.
unsafe fn search_static(a: &Arguments<'_>, launch: Grid) {
    let (weights, positions, factor) = (a.pointer::<f32>(0), a.pointer::<i32>(1), a.pointer::<f32>(2));
    let (scales, zeros) = (a.pointer::<half::f16>(4), a.pointer::<u8>(5));
    let (n, k, size) = (a.int(6), a.int(7), a.int(8));
    assert_eq!((launch.blocks, launch.threads), ((n.div_ceil(32), k.div_ceil(size), 1), (32, 8)));
    // SAFETY: the caller's promise.
    let factors = unsafe { std::slice::from_raw_parts(a.pointer::<f64>(3), a.int(11)) };
    for (group, lane) in (0..k.div_ceil(size)).flat_map(|group| (0..n).map(move |lane| (group, lane))) {
        let features = group * size..((group + 1) * size).min(k);
        // SAFETY: the caller's promise.
        let positions: Vec<usize> = features.map(|f| unsafe { *positions.add(f) } as usize).collect();
        // SAFETY: the caller's promise.
        let own: Vec<f32> = positions.iter().map(|p| unsafe { *weights.add(p * n + lane) }).collect();
        // SAFETY: the caller's promise.
        let pivot = |i: usize, _: usize| unsafe { *factor.add(positions[i] * (k + 1)) };
        let step = searched(grid(a.int(9), a.int(10)), factors, 1, &own, pivot, false);
        // SAFETY: the caller's promise.
        unsafe {
            *scales.add(group * n + lane) = step.scale;
            *zeros.add(group * n + lane) = step.zero;
        }
    }
}

/// # Safety
/// The kernel's arguments.
unsafe fn rounding_costs(a: &Arguments<'_>, launch: Grid) {
    let (weights, members, diagonal) = (a.pointer::<f32>(0), a.pointer::<i32>(1), a.pointer::<f32>(2));
    let (n, k, size) = (a.int(4), a.int(5), a.int(6));
    assert_eq!((launch.blocks, launch.threads), ((n.div_ceil(32), k.div_ceil(size), 1), (32, 8)));
    let grid = grid(a.int(7), a.int(8));
    for (group, lane) in (0..k.div_ceil(size)).flat_map(|group| (0..n).map(move |lane| (group, lane))) {
        let members = (group * size..((group + 1) * size).min(k))
            // SAFETY: the caller's promise.
            .map(|i| unsafe { *members.add(i) } as usize);
        // SAFETY: the caller's promise.
        let own: Vec<(f32, f32)> =
            members.map(|p| unsafe { (*weights.add(p * n + lane), *diagonal.add(p)) }).collect();
        let (min, max) =
            own.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &(w, _)| (l.min(w), h.max(w)));
        let step = grid.fit(f64::from(min), f64::from(max));
        let cost = own.iter().map(|&(w, h)| {
            let d = step.weight(grid.code(f64::from(w), step)) as f32 - w;
            d * d * h
        });
        // SAFETY: the caller's promise.
        unsafe { *a.pointer::<f32>(3).add(group * n + lane) = cost.sum() };
    }
}

/// # Safety
/// The kernel's arguments.
unsafe fn dequantize<T>(a: &Arguments<'_>, launch: Grid, narrow: impl Fn(f32) -> T) {
    let (Argument::Long(stride), Argument::Long(step_stride)) = (&a.0[1], &a.0[4]) else {
        panic!("{:?}", a.0)
    };
    let (codes, scales, zeros) = (a.pointer::<u8>(0), a.pointer::<half::f16>(2), a.pointer::<u8>(3));
    let (groups, dense, n) = (a.pointer::<i32>(5), a.pointer::<T>(6), a.int(7));
    assert_eq!((launch.blocks.0, launch.threads), (n.div_ceil(256), (256, 1)));
    for (row, column) in (0..launch.blocks.1).flat_map(|row| (0..n).map(move |column| (row, column))) {
        // SAFETY: the caller's promise.
        unsafe {
            let step = *groups.add(row) as usize * *step_stride as usize + column;
            let offset = f32::from(*codes.add(row * *stride as usize + column)) - f32::from(*zeros.add(step));
            dense.add(row * n + column).write(narrow(offset * f32::from(*scales.add(step))));
        }
    }
}

/// # Safety
/// The kernel's arguments.
unsafe fn pack(a: &Arguments<'_>, launch: Grid) {
    let Argument::Long(stride) = a.0[1] else { panic!("{:?}", a.0) };
    let (n, bits) = (a.int(3), Bits::new(a.int(4) as u32).unwrap());
    assert_eq!((launch.blocks.0, launch.threads), (n.div_ceil(1024), (256, 1)));
    let k = launch.blocks.1 * bits.pack_factor();
    let codes = a.pointer::<u8>(0);
    let bits = bits.get() as usize;
    for (word, column) in (0..k * bits / 32).flat_map(|word| (0..n).map(move |column| (word, column))) {
        // Bit after bit of the stream along K.
        let stream = (0..32).map(|bit| ((word * 32 + bit) / bits, (word * 32 + bit) % bits, bit));
        let packed = stream.fold(0u32, |packed, (row, from, to)| {
            // SAFETY: the caller's promise.
            let code = unsafe { *codes.add(row * stride as usize + column) };
            packed | u32::from(code >> from & 1) << to
        });
        // SAFETY: the caller's promise.
        unsafe { *a.pointer::<u32>(2).add(word * n + column) = packed };
    }
}

/// # Safety
/// The kernel's arguments.
unsafe fn reorder_hessian(a: &Arguments<'_>, launch: Grid) {
    let (hessian, columns, lower) = (a.pointer::<f32>(0), a.pointer::<i32>(1), a.pointer::<f32>(2));
    let (k, mean, lambda) = (a.int(3), a.double(4), a.double(5));
    assert_eq!((launch.blocks, launch.threads), ((k, 1, 1), (256, 1)));
    for (i, j) in (0..k).flat_map(|i| (0..k).map(move |j| (i, j))) {
        // SAFETY: the caller's promise.
        unsafe {
            let value = *hessian.add(*columns.add(i) as usize * k + *columns.add(j) as usize);
            let diagonal = || (if value == 0.0 { mean } else { f64::from(value) } + lambda) as f32;
            *lower.add(i * k + j) = if i == j {
                diagonal()
            } else if j < i {
                value
            } else {
                0.0
            };
        }
    }
}

/// # Safety
/// The kernel's arguments.
unsafe fn stack<T: Copy>(a: &Arguments<'_>, launch: Grid, widen: impl Fn(T) -> f32) {
    let (weight, positions) = (a.pointer::<T>(0), a.pointer::<i32>(1));
    let (dead, stack) = (a.pointer::<u8>(2), a.pointer::<f32>(3));
    let (rows, k, n, first) = (a.int(4), a.int(5), a.int(6), a.int(7));
    assert_eq!((launch.blocks, launch.threads), ((k.div_ceil(64), rows.div_ceil(32), 1), (32, 8)));
    for (row, feature) in (0..rows).flat_map(|row| (0..k).map(move |feature| (row, feature))) {
        // SAFETY: the caller's promise.
        unsafe {
            let value = if *dead.add(feature) == 0 { widen(*weight.add(row * k + feature)) } else { 0.0 };
            *stack.add(*positions.add(feature) as usize * n + first + row) = value;
        }
    }
}
