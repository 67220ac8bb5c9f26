//! What `tests/cuda_host` sees: every kind of mistake, and none where there is none.

use half::{bf16, f16};

use super::{Random, arguments};
use crate::cuda_host::{Launch, Library, Memory, Order, tensor_map};

const ORDERS: [Order; 3] = [Order::Forward, Order::Reverse, Order::Random(1)];

fn run(kernel: &str, launch: Launch, memory: &Memory<'_>, arguments: &[Vec<u8>]) -> Result<(), String> {
    // SAFETY: the arguments of the kernel; the machine refuses what lies outside of `memory`.
    unsafe { Library::of("mistakes", &[]).launch(kernel, launch, memory, arguments) }
}

fn launch(order: Order) -> Launch {
    Launch { blocks: (1, 1, 1), threads: (64, 1), shared: 256, resident: 1, order }
}

/// The line of mistakes.cu that ends with this comment.
fn line(comment: &str) -> usize {
    let text = include_str!("../../cuda_host/mistakes.cu");
    1 + text.lines().position(|line| line.ends_with(&format!("; // {comment}"))).expect("a line so marked")
}

/// A kernel of `(out, wrong)`, in every order: what it writes, or the one error of all orders.
#[track_caller]
fn outcome(kernel: &str, launch_with: fn(Order) -> Launch, wrong: i32) -> Result<Vec<i32>, Vec<String>> {
    let results: Vec<Result<Vec<i32>, String>> = ORDERS
        .iter()
        .map(|&order| {
            let mut out = vec![-7; 64];
            let mut memory = Memory::default();
            let to = memory.write(&mut out);
            run(kernel, launch_with(order), &memory, &arguments![to, wrong]).map(|()| out)
        })
        .collect();
    let errors: Vec<String> = results.iter().filter_map(|r| r.as_ref().err().cloned()).collect();
    match errors.is_empty() {
        true => {
            let outs: Vec<Vec<i32>> = results.into_iter().map(Result::unwrap).collect();
            assert!(outs.iter().all(|out| *out == outs[0]), "{kernel}: the order shows");
            Ok(outs[0].clone())
        }
        false => {
            assert_eq!(errors.len(), ORDERS.len(), "{kernel}: seen in some orders only: {errors:?}");
            Err(errors)
        }
    }
}

/// Requires that the mistake is seen in every order, by an error with these words.
#[track_caller]
fn seen(kernel: &str, launch_with: fn(Order) -> Launch, wrong: i32, words: &[&str]) {
    let errors = outcome(kernel, launch_with, wrong).unwrap_err();
    for error in errors {
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
}

#[test]
fn races_within_a_block() {
    assert_eq!(outcome("exchange", launch, 0).unwrap(), (0..64).map(|i| i ^ 32).collect::<Vec<_>>());
    seen("exchange", launch, 1, &["exchange: race: thread ", "nothing orders the two"]);
    assert_eq!(outcome("warp_exchange", launch, 0).unwrap(), (0..64).map(|i| i ^ 1).collect::<Vec<_>>());
    seen("warp_exchange", launch, 1, &["race: ", "shared memory at mistakes.cu:"]);
    assert_eq!(outcome("overwrite", launch, 0).unwrap(), (0..64).rev().collect::<Vec<_>>());
    seen("overwrite", launch, 1, &["race: ", "shared memory"]);
}

#[test]
fn copies_that_are_used_too_early() {
    let copy = |wrong: i32, order| {
        let (mut values, mut out): (Vec<i32>, _) = ((100..164).collect(), vec![0; 64]);
        let mut memory = Memory::default();
        let (from, to) = (memory.write(&mut values), memory.write(&mut out));
        run("copied", launch(order), &memory, &arguments![from, to, wrong]).map(|()| out)
    };
    for order in ORDERS {
        assert_eq!(copy(0, order).unwrap(), (100..164).rev().collect::<Vec<_>>());
        for (wrong, words) in [
            (1, "while an asynchronous copy to it is under way"),
            (2, "while an asynchronous copy to it is under way"),
            (4, "changes meanwhile"),
            (5, "ends with copies or products under way"),
        ] {
            let error = copy(wrong, order).unwrap_err();
            assert!(error.contains(words), "{wrong}: {error}");
        }
        let error = copy(3, order).unwrap_err();
        assert!(error.contains("race: ") || error.contains("under way"), "{error}");
    }
}

#[test]
fn barriers_that_diverge() {
    assert_eq!(outcome("barrier_in_branch", launch, 0).unwrap(), [1; 64]);
    let waits =
        |threads: &str, comment| format!("threads {threads} in __syncthreads of line {}", line(comment));
    let words = ["a barrier diverges", &waits("0-39", "the first"), &waits("40-63", "the last")];
    seen("barrier_in_branch", launch, 1, &words);
    assert_eq!(outcome("lane_missing", launch, 0).unwrap(), [1; 64]);
    seen("lane_missing", launch, 1, &["wait for ever", "threads 16-31 48-63 ended"]);
    seen("lane_missing", launch, 2, &["a warp diverges"]);
}

#[test]
fn memory_that_was_not_given() {
    for order in ORDERS {
        let touch = |read: i32, write: i32, writable: bool| {
            let (from, mut to) = (vec![1; 100], vec![0; 100]);
            let mut memory = Memory::default();
            let from = memory.read(&from);
            let to = if writable { memory.write(&mut to) } else { memory.read(&to) };
            run("touch", launch(order), &memory, &arguments![from, to, read, write])
        };
        touch(99, 99, true).unwrap();
        let error = touch(100, 0, true).unwrap_err();
        assert!(
            error.starts_with("touch: thread 5 of block 0 reads 4 bytes outside of all memory"),
            "{error}"
        );
        assert!(error.ends_with(&format!("at mistakes.cu:{}", line("anywhere"))), "{error}");
        assert!(touch(-1, 0, true).unwrap_err().contains("reads 4 bytes outside"));
        assert!(touch(0, 100, true).unwrap_err().contains("writes 4 bytes outside"));
        assert!(touch(0, 0, false).unwrap_err().contains("of memory that it is given to read"));
    }
    assert_eq!(outcome("beyond_shared", launch, 64).unwrap(), [1; 64]);
    seen("beyond_shared", launch, 65, &["beyond its dynamic shared memory"]);
}

#[test]
fn undefined_behaviour() {
    let alone = |order| Launch { threads: (32, 1), ..launch(order) };
    let run_alone = |wrong: i32| {
        let mut out = vec![0; 1];
        let mut memory = Memory::default();
        let to = memory.write(&mut out);
        run("undefined", alone(Order::Forward), &memory, &arguments![to, wrong]).map(|()| out[0])
    };
    assert_eq!(run_alone(0).unwrap(), 1);
    for (wrong, words, comment) in [
        (1, "a sum overflows", "a sum"),
        (2, "a shift is too wide", "a shift"),
        (3, "a pointer is null or not aligned", "a vector"),
        (4, "an index is out of bounds", "an index"),
    ] {
        let error = run_alone(wrong).unwrap_err();
        assert!(error.ends_with(&format!("{words} at line {}", line(comment))), "{error}");
    }
}

#[test]
fn values_between_blocks() {
    let hand_over = |wrong: i32, resident: usize, order| {
        let (mut word, mut value, mut out) = (vec![0u32; 2], vec![0i32; 64], vec![0i32; 128]);
        let mut memory = Memory::default();
        let (word, value) = (memory.write(&mut word), memory.write(&mut value));
        let to = memory.write(&mut out);
        let launch = Launch { blocks: (3, 1, 1), resident, ..launch(order) };
        run("hand_over", launch, &memory, &arguments![word, value, to, wrong]).map(|()| out)
    };
    for order in ORDERS {
        let expected: Vec<i32> = (100..164).rev().cycle().take(128).collect();
        assert_eq!(hand_over(0, 3, order).unwrap(), expected);
        for wrong in [1, 2, 3] {
            let error = hand_over(wrong, 3, order).unwrap_err();
            assert!(error.contains("race: ") && error.contains("device memory"), "{wrong}: {error}");
        }
        assert!(hand_over(4, 3, order).unwrap_err().contains("the threads wait for ever"));
    }
    // The last block first: it waits for one that cannot run.
    assert!(hand_over(0, 1, Order::Reverse).unwrap_err().contains("the threads wait for ever"));

    let same_word = |wrong: i32| {
        let mut out = vec![0; 128];
        let mut memory = Memory::default();
        let to = memory.write(&mut out);
        let launch = Launch { blocks: (2, 1, 1), ..launch(Order::Forward) };
        run("same_word", launch, &memory, &arguments![to, wrong]).map(|()| out)
    };
    assert_eq!(same_word(0).unwrap(), [1; 128]);
    assert!(same_word(1).unwrap_err().contains("race: thread 1 of block 0 writes device memory"));
}

/// What Hopper does beside its threads: copies of boxes, barriers that count bytes, products of a warpgroup.
#[test]
fn boxes_that_are_copied_and_multiplied() {
    let (rows, columns) = (200, 80);
    let x: Vec<u16> =
        (0..rows * columns).map(|i| f16::from_f32((i % 13 + i / columns % 5) as f32).to_bits()).collect();
    let multiply = |wrong: i32, order| {
        let mut out = vec![0f32; 128];
        let mut memory = Memory::default();
        let map = tensor_map(memory.read(&x), (rows, columns), (256, 64));
        let to = memory.write(&mut out);
        let launch = Launch { threads: (160, 1), shared: 32768 + 16, ..launch(order) };
        run("boxes", launch, &memory, &arguments![map, to, wrong]).map(|()| out)
    };
    // The first 16 columns of both boxes; the second box's are the matrix's last.
    let sum = |token: usize| {
        let columns_of =
            (0..16).chain(64..80).map(|column| f16::from_bits(x[token * columns + column]).to_f32());
        columns_of.sum::<f32>()
    };
    // Of the second block of 8 tokens, two that are neighbours.
    let expected: Vec<f32> = (0..128).map(|thread| 8 + thread % 4 * 2).map(|t| sum(t) + sum(t + 1)).collect();
    for order in ORDERS {
        assert_eq!(multiply(0, order).unwrap(), expected);
        for (wrong, words) in [
            (1, ["multiplies by what is not there yet", "copies over what a product reads"]),
            (2, ["a copy has written, and nothing orders the two", "copies over what a product reads"]),
            (3, ["multiplies without a fence"; 2]),
            (4, ["changes registers that a product"; 2]),
            (5, ["more bytes than a barrier expects"; 2]),
            (6, ["copies over what a product reads", "ends with copies or products under way"]),
            (7, ["copies over what a product reads"; 2]),
            (8, ["by a barrier that was not published"; 2]),
            (9, ["ends with copies that nothing waits for", "a copy to it is under way"]),
            (10, ["the threads wait for ever", "a copy to it is under way"]),
        ] {
            let error = multiply(wrong, order).unwrap_err();
            let error = error.replace("an asynchronous copy", "a copy");
            assert!(words.iter().any(|words| error.contains(words)), "{wrong}, {order:?}: {error}");
        }
    }
}

#[test]
fn launches_that_no_device_would_take() {
    let mut out = vec![0; 64];
    let mut memory = Memory::default();
    let to = memory.write(&mut out);
    let refused = |kernel: &str, launch: Launch, arguments: &[Vec<u8>]| {
        run(kernel, launch, &memory, arguments).unwrap_err()
    };
    let good = launch(Order::Forward);
    assert_eq!(refused("nothing", good, &arguments![to, 0]), "nothing: there is no such kernel");
    assert!(refused("exchange", good, &arguments![to]).ends_with("another number of arguments"));
    assert!(refused("exchange", good, &arguments![to, 0i64]).ends_with("argument 1 has another size"));
    assert!(
        refused("exchange", Launch { threads: (40, 1), ..good }, &arguments![to, 0])
            .ends_with("a part of a warp")
    );
    assert!(
        refused("exchange", Launch { shared: 1 << 20, ..good }, &arguments![to, 0])
            .ends_with("shared memory")
    );
    assert!(refused("exchange", Launch { blocks: (0, 1, 1), ..good }, &arguments![to, 0]).contains("grid"));
}

/// Of 16 bits: conversions against `half`'s, which round an fp32 number once; sums of products against exact ones.
#[test]
fn numbers_are_rounded_once() {
    let mut random = Random::new(9);
    let count = 20_000;
    let bits: Vec<Vec<u16>> = (0..3).map(|_| (0..count).map(|_| random.bits() as u16).collect()).collect();
    let wide: Vec<f64> = (0..count)
        .map(|_| f64::from(((random.normal() * 2.0).exp() * random.normal() * 1e-3) as f32))
        .collect();
    let mut out = vec![0u16; 4 * count];
    let mut memory = Memory::default();
    let [a, b, c] = [0, 1, 2].map(|i| memory.read(&bits[i]));
    let (from, to) = (memory.read(&wide), memory.write(&mut out));
    let launch = Launch { threads: (32, 1), ..launch(Order::Forward) };
    run("numbers", launch, &memory, &arguments![a, b, c, from, to, count as i32]).unwrap();
    for i in 0..count {
        let operands = [0, 1, 2].map(|o| bits[o][i]);
        let [a, b, c] = operands.map(|v| f16::from_bits(v).to_f64());
        // The product is exact, and the sum is where no bit of either is lost.
        if (a * b + c) - a * b == c && (a * b + c) - c == a * b {
            let found = f16::from_bits(out[4 * i]).to_f64();
            assert!(
                nearest(a * b + c, found, |bits| f16::from_bits(bits).to_f64(), out[4 * i]),
                "{a}·{b} + {c}"
            );
        }
        let [a, b, c] = operands.map(|v| bf16::from_bits(v).to_f64());
        if (a * b + c) - a * b == c && (a * b + c) - c == a * b {
            let found = bf16::from_bits(out[4 * i + 1]).to_f64();
            assert!(
                nearest(a * b + c, found, |bits| bf16::from_bits(bits).to_f64(), out[4 * i + 1]),
                "{a}·{b} + {c}"
            );
        }
        assert_eq!(out[4 * i + 2], f16::from_f32(wide[i] as f32).to_bits(), "{}", wide[i]);
        assert_eq!(out[4 * i + 3], bf16::from_f32(wide[i] as f32).to_bits(), "{}", wide[i]);
    }
}

/// Whether no neighbour of a 16-bit number is nearer to `exact`, and at a tie the number is even.
fn nearest(exact: f64, found: f64, number: impl Fn(u16) -> f64, bits: u16) -> bool {
    if !exact.is_finite() || !found.is_finite() || bits & 0x7fff == 0 {
        return exact.is_nan() == found.is_nan();
    }
    let off = (found - exact).abs();
    [bits - 1, bits + 1]
        .into_iter()
        .map(|bits| (number(bits) - exact).abs())
        .all(|other| off < other || other.is_nan() || off == other && bits.is_multiple_of(2))
}
