//! What stands around the column loop: packing, reordering a Hessian, stacking weights.

use gptq::{gptq::Grid, pack::pack_rows, variant::Bits};
use half::{bf16, f16};

use super::{Random, arguments};
use crate::cuda_host::{Launch, Library, Memory, Order};

fn launch(blocks: (usize, usize), threads: (u32, u32), order: Order) -> Launch {
    Launch { blocks: (blocks.0, blocks.1, 1), threads, shared: 0, resident: 3, order }
}

fn library() -> std::sync::Arc<Library> {
    Library::of("gptq_block", &[("GPTQ_WARPS", 8)])
}

#[test]
fn packed_words_are_those_of_pack() {
    let mut random = Random::new(5);
    for bits in Bits::ALL {
        // A range of columns of a wider stack, one of them beyond a block's 1024 features.
        for (n, stride, k, order) in
            [(4, 4, 32, Order::Forward), (1028, 1040, 32, Order::Reverse), (36, 44, 96, Order::Random(1))]
        {
            let max = usize::from(bits.max_code()) + 1;
            let codes: Vec<u8> = (0..k * stride).map(|_| random.below(max) as u8).collect();
            let mut packed = vec![-1i32; k * bits.get() as usize / 32 * n];
            let grid = (usize::div_ceil(n, 1024), k / bits.pack_factor());
            let mut memory = Memory::default();
            let (from, to) = (memory.read(&codes), memory.write(&mut packed));
            let arguments = arguments![from, stride as i64, to, n as i32, bits.get() as i32];
            // SAFETY: the arguments of the kernel; `memory` has all that they point to.
            unsafe { library().launch("gptq_pack", launch(grid, (256, 1), order), &memory, &arguments) }
                .unwrap();
            let own: Vec<u8> = codes.chunks(stride).flat_map(|row| &row[..n]).copied().collect();
            assert_eq!(packed, pack_rows(&own, n, bits), "{bits:?}, {n} features");
        }
    }
}

/// Codes and steps of a range of columns of a wider stack, in each type that forward passes run in.
#[test]
fn dense_weights_are_the_codes_values() {
    let mut random = Random::new(6);
    let (k, n, stride, first, groups) = (20usize, 300usize, 340usize, 8usize, 3usize);
    let codes: Vec<u8> = (0..k * stride).map(|_| random.below(256) as u8).collect();
    let scales: Vec<f16> = (0..groups * stride).map(|_| f16::from_f64(0.01 * random.normal())).collect();
    let zeros: Vec<u8> = (0..groups * stride).map(|_| random.below(256) as u8).collect();
    let g_idx: Vec<i32> = (0..k).map(|_| random.below(groups) as i32).collect();
    let expected: Vec<f32> = (0..k * n)
        .map(|i| {
            let (row, column) = (i / n, i % n + first);
            let step = g_idx[row] as usize * stride + column;
            let offset = f32::from(codes[row * stride + column]) - f32::from(zeros[step]);
            offset * scales[step].to_f32()
        })
        .collect();
    let run = |name: &str, dense: &mut [u16]| {
        let mut memory = Memory::default();
        let codes = memory.read(&codes) + first as u64;
        let (scales, zeros) = (memory.read(&scales) + 2 * first as u64, memory.read(&zeros) + first as u64);
        let (groups, to) = (memory.read(&g_idx), memory.write(dense));
        let (stride, n) = (stride as i64, n as i32);
        let arguments = arguments![codes, stride, scales, zeros, stride, groups, to, n];
        let launch = launch((2, k), (256, 1), Order::Random(3));
        // SAFETY: the arguments of the kernel; `memory` has all that they point to.
        unsafe { library().launch(name, launch, &memory, &arguments) }.unwrap();
    };
    let mut wide = vec![0u16; 2 * k * n];
    run("gptq_dequantize_f32", &mut wide);
    let wide: Vec<u32> = wide.chunks(2).map(|half| u32::from(half[0]) | u32::from(half[1]) << 16).collect();
    assert_eq!(wide, expected.iter().map(|w| w.to_bits()).collect::<Vec<_>>());
    let mut half = vec![0u16; k * n];
    run("gptq_dequantize_f16", &mut half);
    assert_eq!(half, expected.iter().map(|&w| f16::from_f32(w).to_bits()).collect::<Vec<_>>());
    run("gptq_dequantize_bf16", &mut half);
    assert_eq!(half, expected.iter().map(|&w| bf16::from_f32(w).to_bits()).collect::<Vec<_>>());
}

/// `Σ H_ii d_i²` of rounding each group to nearest.
#[test]
fn costs_of_rounding_are_those_of_the_grid() {
    let mut random = Random::new(8);
    let (k, n, group) = (70usize, 37usize, 32usize);
    let weights: Vec<f32> = (0..k * n).map(|_| random.normal() as f32).collect();
    let diagonal: Vec<f32> = (0..k).map(|_| (random.normal().exp()) as f32).collect();
    let members: Vec<i32> = random.order(k).into_iter().map(|i| i as i32).collect();
    for (bits, symmetric) in [(4u32, 1i32), (2, 0), (8, 1)] {
        let mut costs = vec![-1f32; 3 * n];
        let mut memory = Memory::default();
        let (from, of, h) = (memory.read(&weights), memory.read(&members), memory.read(&diagonal));
        let to = memory.write(&mut costs);
        let sizes = (n as i32, k as i32, group as i32, bits as i32);
        let arguments = arguments![from, of, h, to, sizes.0, sizes.1, sizes.2, sizes.3, symmetric];
        // SAFETY: the arguments of the kernel; `memory` has all that they point to.
        unsafe {
            let launch = launch((2, 3), (32, 8), Order::Reverse);
            library().launch("gptq_rounding_costs", launch, &memory, &arguments)
        }
        .unwrap();
        let grid = Grid::new(Bits::new(bits).unwrap(), symmetric != 0);
        for (i, &found) in costs.iter().enumerate() {
            let own: Vec<(f64, f64)> = members[i / n * group..k.min((i / n + 1) * group)]
                .iter()
                .map(|&m| (f64::from(weights[m as usize * n + i % n]), f64::from(diagonal[m as usize])))
                .collect();
            let (low, high) =
                own.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &(w, _)| (l.min(w), h.max(w)));
            let step = grid.fit(low, high);
            let cost: f64 = own.iter().map(|&(w, h)| h * (step.weight(grid.code(w, step)) - w).powi(2)).sum();
            assert!((f64::from(found) - cost).abs() < 1e-4 * cost, "{bits} bits: {found} {cost}");
        }
    }
}

/// Ranges of every size and sign: of zeros, below and beyond what fp16 holds, on one side of zero.
#[test]
fn scales_are_those_of_the_grid() {
    let mut random = Random::new(4);
    let edges =
        [(0.0f32, 0.0), (-1e-12, 1e-12), (0.0, 1e-7), (-1e9, 1e9), (-1e9, 0.5), (0.1, 0.7), (-1.0, -0.5)];
    let ranges: Vec<(f32, f32)> = (0..1000)
        .map(|i| match edges.get(i) {
            Some(&edge) => edge,
            None => {
                let size = (random.fraction() * 34.0 - 20.0).exp2();
                let ends = [0, 1].map(|_| (size * random.normal()) as f32);
                (ends[0].min(ends[1]), ends[0].max(ends[1]))
            }
        })
        .collect();
    // Two groups of 9 features, taken in another order; a range's ends are anywhere in a group, its middle elsewhere.
    let (n, group, groups) = (ranges.len(), 9, 2);
    let k = groups * group;
    let order = random.order(k);
    let mut positions = vec![0i32; k];
    order.iter().zip(0..).for_each(|(&feature, position)| positions[feature] = position);
    let range_of = |g: usize, column: usize| ranges[(column + g * 500) % n];
    let mut weights = vec![0.0f32; k * n];
    for (g, column) in (0..groups).flat_map(|g| (0..n).map(move |column| (g, column))) {
        let (low, high) = range_of(g, column);
        let places = random.order(group);
        for (i, &place) in places.iter().enumerate() {
            let weight = [low, high, low / 2.0 + high / 2.0][i.min(2)];
            weights[positions[g * group + place] as usize * n + column] = weight;
        }
    }
    for (bits, symmetric) in Bits::ALL.into_iter().flat_map(|bits| [(bits, false), (bits, true)]) {
        let (mut scales, mut zeros) = (vec![f16::NAN; groups * n], vec![0xffu8; groups * n]);
        let mut memory = Memory::default();
        let (from, by) = (memory.read(&weights), memory.read(&positions));
        let (to, zero) = (memory.write(&mut scales), memory.write(&mut zeros));
        let sizes = [n as i32, k as i32, group as i32, bits.get() as i32, i32::from(symmetric)];
        let arguments = arguments![from, by, to, zero, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]];
        let launch = launch((n.div_ceil(32), groups), (32, 8), Order::Random(1));
        // SAFETY: as above.
        unsafe { library().launch("gptq_fit_static", launch, &memory, &arguments) }.unwrap();
        for (g, column) in (0..groups).flat_map(|g| (0..n).map(move |column| (g, column))) {
            let (low, high) = range_of(g, column);
            let expected = Grid::new(bits, symmetric).fit(f64::from(low), f64::from(high));
            let (scale, zero) = (scales[g * n + column], zeros[g * n + column]);
            assert_eq!(scale.to_bits(), expected.scale.to_bits(), "{bits:?}, {symmetric}: {low}..{high}");
            // With an infinite scale the linear is refused.
            assert!(
                zero == expected.zero || scale.is_infinite(),
                "{bits:?}, {symmetric}: {low}..{high}: {zero}"
            );
        }
    }
}

#[test]
fn a_hessian_is_reordered_and_damped() {
    for (k, order) in [(20, Order::Forward), (300, Order::Random(2)), (1, Order::Reverse)] {
        let mut random = Random::new(8);
        let columns: Vec<i32> = random.order(k).into_iter().map(|c| c as i32).collect();
        let dead = k / 3 * 2 + 1;
        let value = |a: usize, b: usize| match a == dead || b == dead {
            true => 0.0,
            false => (a.min(b) * 1000 + a.max(b) + 1) as f32,
        };
        let hessian: Vec<f32> = (0..k * k).map(|i| value(i / k, i % k)).collect();
        let mut lower = vec![f32::NAN; k * k];
        let (mean, lambda) = (7.0f64, 0.25f64);
        let mut memory = Memory::default();
        let (from, by, to) = (memory.read(&hessian), memory.read(&columns), memory.write(&mut lower));
        let arguments = arguments![from, by, to, k as i32, mean, lambda];
        let launch = launch((k, 1), (256, 1), order);
        // SAFETY: as above.
        unsafe { library().launch("gptq_reorder_hessian", launch, &memory, &arguments) }.unwrap();
        for (i, j) in (0..k).flat_map(|i| (0..k).map(move |j| (i, j))) {
            let (a, b) = (columns[i] as usize, columns[j] as usize);
            let expected = match j.cmp(&i) {
                std::cmp::Ordering::Less => value(a, b),
                std::cmp::Ordering::Equal if a == dead => 7.25,
                std::cmp::Ordering::Equal => value(a, a) + 0.25,
                std::cmp::Ordering::Greater => 0.0,
            };
            assert_eq!(lower[i * k + j], expected, "row {i}, column {j} of {k}");
        }
    }
}

/// Stacks a weight of any type, and compares the stack with what it is by definition.
fn check_stack<T: bytemuck::Pod>(kernel: &str, narrow: impl Fn(f32) -> T, order: Order) {
    for (rows, k, n, first) in [(40, 100, 75, 35), (32, 64, 32, 0), (3, 65, 9, 2), (1, 1, 1, 0)] {
        let mut random = Random::new(6);
        let columns = random.order(k);
        let mut positions = vec![0i32; k];
        columns.iter().zip(0..).for_each(|(&feature, position)| positions[feature] = position);
        let dead: Vec<u8> = (0..k).map(|_| u8::from(random.below(10) == 0)).collect();
        // Exact in every type.
        let value = |row: usize, feature: usize| ((row * 37 + feature * 11) % 255 + 1) as f32;
        let weight: Vec<T> = (0..rows * k).map(|i| narrow(value(i / k, i % k))).collect();
        let mut stack = vec![-1.0f32; k * n];
        let mut memory = Memory::default();
        let (weight, positions) = (memory.read(&weight), memory.read(&positions));
        let (marks, to) = (memory.read(&dead), memory.write(&mut stack));
        let sizes = [rows as i32, k as i32, n as i32, first as i32];
        let arguments = arguments![weight, positions, marks, to, sizes[0], sizes[1], sizes[2], sizes[3]];
        let launch = launch((k.div_ceil(64), rows.div_ceil(32)), (32, 8), order);
        // SAFETY: as above.
        unsafe { library().launch(kernel, launch, &memory, &arguments) }.unwrap();
        for (i, column) in (0..k).flat_map(|i| (0..n).map(move |column| (i, column))) {
            let expected = match (column.checked_sub(first).filter(|row| *row < rows), dead[columns[i]]) {
                (None, _) => -1.0,
                (Some(_), 1) => 0.0,
                (Some(row), _) => value(row, columns[i]),
            };
            assert_eq!(stack[i * n + column], expected, "{kernel}: column {i}, feature {column}");
        }
    }
}

#[test]
fn weights_are_stacked() {
    check_stack("gptq_stack_f32", |v| v, Order::Forward);
    check_stack("gptq_stack_f16", f16::from_f32, Order::Reverse);
    check_stack("gptq_stack_bf16", bf16::from_f32, Order::Random(3));
}
