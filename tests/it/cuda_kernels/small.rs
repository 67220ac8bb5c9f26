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
