//! Blocks of ggml: the definition of their solve in plain f64, and the CPU's solver against it.

use half::f16;
use tch::{Device, Kind, Tensor};

use super::{
    problem::{OBJECTIVE_TOLERANCE, Problem, weight},
    reference::{compensated, damped_factor, row_error},
};
use crate::{
    accuracy::{ScaleSearch, Scales},
    amx::Parts,
    error::Error,
    ggml::{Block, BlockType, SubBlock, SubStep},
    gptq::{
        BlockLinear, dead_columns,
        solver::{CpuSolver, OrRounded, OutputFactor, RtnSolver, Solved, Solver, Weight, solve_by_rows},
    },
    variant::Sorting,
};

/// Largest cost of a step above the best one, as a part of it: rounding in fp32.
const STEP_TOLERANCE: f64 = 0.001;

/// Largest distance of a code beyond the nearest, in units of the scale: rounding in fp32, or in bf16 parts on AMX.
const CODE_TOLERANCE: f64 = 0.01;

/// Largest difference of a linear's objective after a tie. Of two steps with the same error, the other one moves the codes of its
/// sub-block, and all later blocks are fitted to other weights.
const FITTED_OTHERWISE: f64 = 0.02;

const KINDS: [BlockType; 11] = [
    BlockType::Q4_0,
    BlockType::Q4_1,
    BlockType::Q5_0,
    BlockType::Q5_1,
    BlockType::Q8_0,
    BlockType::Q2_K,
    BlockType::Q3_K,
    BlockType::Q4_K,
    BlockType::Q5_K,
    BlockType::Q6_K,
    BlockType::IQ4_NL,
];

/// A linear solved by the definition.
struct Walk {
    linear: BlockLinear,
    squared_error: f64,
    other: Choices,
}

/// Choices of a followed linear, and how many of them the definition would not make.
#[derive(Debug, Default)]
struct Choices {
    blocks: usize,
    /// Blocks with another `d` or minimum.
    units: usize,
    steps: usize,
    /// Steps that cost more.
    dearer_steps: usize,
    /// Codes that are not the nearest.
    codes: usize,
}

/// Columns keep their stored order. Where a block begins, its `d` and minimum are fitted to its weights as compensated for all
/// columns before it. Where a sub-block begins, its scale and offset are fitted in the same way, and rounded to what the block
/// can store. Then its codes are chosen.
///
/// With a linear to `follow`, each of its choices replaces the one made here. Both follow the same earlier choices, and the error of
/// both is compared.
fn walk(problem: &Problem, kind: BlockType, damp: f64, scales: Scales, follow: Option<&BlockLinear>) -> Walk {
    let mut other = Choices::default();
    let (weight, hessian, k) = (problem.weight(), problem.hessian(), problem.k);
    let diagonal: Vec<f32> = (0..k).map(|i| hessian[i * k + i] as f32).collect();
    let dead = dead_columns(&diagonal);
    let u = damped_factor(&hessian, &(0..k as u32).collect::<Vec<_>>(), damp).unwrap();
    let pivots: Vec<f64> = (0..k).map(|i| u[i * k + i]).collect();
    let costs: Vec<f64> = pivots.iter().map(|pivot| pivot * pivot).collect();

    let grid = kind.grid().unwrap();
    let factors = grid.factors(scales.search != ScaleSearch::Off, scales.signed);
    let (len, sub_len) = (kind.block_len(), grid.sub_len);
    let mut bytes = vec![0; problem.n * kind.bytes(k).unwrap()];
    let mut squared_error = 0.0;
    for (row, bytes) in bytes.chunks_mut(kind.bytes(k).unwrap()).enumerate() {
        let mut w = weight[row * k..][..k].to_vec();
        dead.iter().for_each(|&column| w[column as usize] = 0.0);
        let mut d = vec![0.0; k];
        for (start, bytes) in (0..k).step_by(len).zip(bytes.chunks_mut(kind.block_bytes())) {
            let mut block = Block::EMPTY;
            let mut units = [f16::ZERO; 2];
            let theirs = follow.map(|linear| {
                let mut block = Block::EMPTY;
                let at = (row * k + start) / len * kind.block_bytes();
                block.read(kind, &linear.bytes()[at..][..kind.block_bytes()]);
                block
            });
            other.blocks += 1;
            if grid.has_sub_scales() {
                let weights = compensated(&w, &d, &u, k, start, start + len);
                let parts = weights.chunks(sub_len).zip(costs[start..].chunks(sub_len));
                let parts: Vec<_> = parts.map(|(weights, costs)| SubBlock { weights, costs }).collect();
                units = grid.block_scales(&parts, &factors);
                let followed = theirs.as_ref().map_or(units, |block| [block.d, block.min]);
                other.units += usize::from(followed != units);
                units = followed;
                [block.d, block.min] = units;
            }
            for (i, start) in (start..start + len).step_by(sub_len).enumerate() {
                let end = start + sub_len;
                let weights = compensated(&w, &d, &u, k, start, end);
                let part = SubBlock { weights: &weights, costs: &costs[start..end] };
                let mut tried = grid.candidates(&part, &factors, |step| grid.stored(step, units));
                let by_block = |step| {
                    let mut differences: Vec<f64> = Vec::new();
                    let mut cost = 0.0;
                    for (c, &w) in weights.iter().enumerate() {
                        let u = |j: usize| u[(start + j) * k + start + c];
                        let residual: f64 = differences.iter().enumerate().map(|(j, d)| u(j) * d).sum();
                        let target = w - residual / u(c);
                        let quantized = grid.weight(grid.code(target, step), step);
                        cost += ((quantized - target) * u(c)).powi(2);
                        differences.push(quantized - w);
                    }
                    cost
                };
                let finalists = scales.finalists();
                if finalists > 0 {
                    tried.truncate(finalists);
                    tried.iter_mut().for_each(|(cost, step)| *cost = by_block(*step));
                    tried.sort_by(|a, b| a.0.total_cmp(&b.0));
                }
                let (least, mut step) = tried[0];
                if let Some(block) = &theirs {
                    let (scale, offset) = block.steps(&grid.scales)[i];
                    let followed = SubStep { scale: scale.into(), offset: offset.into() };
                    let cost = if finalists > 0 { by_block(followed) } else { grid.cost(&part, followed) };
                    other.steps += 1;
                    other.dearer_steps += usize::from(cost > (1.0 + STEP_TOLERANCE) * least);
                    step = followed;
                }
                block.set_step(&grid.scales, i, step);
                for c in start..end {
                    let residual: f64 = (0..c).map(|j| u[j * k + c] * d[j]).sum();
                    let target = w[c] - residual / pivots[c];
                    let mut code = grid.code(target, step);
                    if let Some(block) = &theirs {
                        let distance = |code| (grid.weight(code, step) - target).abs() / step.scale.abs();
                        let followed = block.codes[i * sub_len + c - start];
                        other.codes += usize::from(distance(followed) > distance(code) + CODE_TOLERANCE);
                        code = followed;
                    }
                    block.codes[i * sub_len + c - start] = code;
                    d[c] = grid.weight(code, step) - w[c];
                }
            }
            block.write(kind, bytes);
        }
        squared_error += row_error(&d, &hessian);
    }
    Walk { linear: BlockLinear::new(kind, k, bytes), squared_error, other }
}

fn blocks(solved: &Solved) -> &BlockLinear {
    match solved {
        Solved::Blocks(linear) => linear,
        _ => panic!("not in blocks"),
    }
}

fn solve(problem: &Problem, solver: &dyn Solver, kind: BlockType, damp: f64) -> (BlockLinear, f64) {
    let factor = solver.factorize(&problem.hessian, Sorting::Stored, damp, "test").unwrap();
    let solution = factor.solve_blocks(&[weight(&problem.weight)], kind).unwrap().remove(0);
    (blocks(&solution.linear).clone(), solution.squared_error)
}

/// `tr(D H Dᵀ)` of a linear as a reader computes it.
fn measured(problem: &Problem, linear: &BlockLinear) -> f64 {
    let dense = linear.dequantize();
    let (w, h) = (problem.weight(), problem.hessian());
    let rows = dense.chunks(problem.k).zip(w.chunks(problem.k));
    rows.map(|(q, w)| row_error(&q.iter().zip(w).map(|(&q, w)| f64::from(q) - w).collect::<Vec<_>>(), &h))
        .sum()
}

fn agree(problem: &Problem, scales: Scales) {
    for kind in KINDS {
        let least = walk(problem, kind, 0.01, scales, None).squared_error;
        for products in [None, Some(Parts::Two), Some(Parts::One)] {
            let (fast, error) =
                solve(problem, &CpuSolver::with_products(products).with_scales(scales), kind, 0.01);
            let Walk { other, squared_error, .. } = walk(problem, kind, 0.01, scales, Some(&fast));
            let shares = [
                (other.units, other.blocks),
                (other.dearer_steps, other.steps),
                (other.codes, problem.n * problem.k),
            ];
            let [units, steps, codes] = shares.map(|(other, all)| other as f64 / all.max(1) as f64);
            // Behind products of bf16, scales are fitted to weights that are compensated a little otherwise.
            let most = if products == Some(Parts::One) { [0.5, 0.05, 1e-3] } else { [0.05, 0.01, 0.0] };
            assert!(
                units <= most[0] && steps <= most[1] && codes <= most[2],
                "{kind}, {products:?}: {other:?}"
            );
            let (same, ratio) = (error / squared_error, error / least);
            assert!(
                (same - 1.0).abs() < OBJECTIVE_TOLERANCE,
                "{kind}, {products:?}: the same choices, ratio {same}"
            );
            assert!((ratio - 1.0).abs() < FITTED_OTHERWISE, "{kind}, {products:?}: objective ratio {ratio}");
            let ratio = error / measured(problem, &fast);
            assert!(
                (ratio - 1.0).abs() < OBJECTIVE_TOLERANCE,
                "{kind}, {products:?}: reported over measured {ratio}"
            );
        }
    }
}

#[test]
fn blocks_agree_with_the_definition() {
    // 70 rows: a partial tile.
    agree(&Problem::new(70, 512, 2000, 1), Scales::PLAIN);
}

#[test]
fn blocks_agree_on_searched_scales() {
    let problem = Problem::new(40, 512, 2000, 1);
    for signed in [false, true] {
        agree(&problem, Scales { signed, search: ScaleSearch::Block });
    }
}

const SEARCHED: Scales = Scales { signed: true, search: ScaleSearch::Block };

#[test]
fn solved_blocks_beat_rounded_ones() {
    let problem = Problem::new(64, 512, 3000, 5);
    for kind in KINDS {
        let (_, solved) = solve(&problem, &CpuSolver::new().with_scales(SEARCHED), kind, 0.01);
        let (_, rounded) = solve(&problem, &RtnSolver, kind, 0.01);
        assert!(solved < 0.75 * rounded, "{kind}: {solved} {rounded}");
    }
}

/// 32 divides the columns, 256 does not.
#[test]
fn types_of_small_blocks_take_all_rows_of_whole_blocks() {
    let problem = Problem::new(40, 352, 1500, 2);
    for kind in KINDS.into_iter().filter(|kind| kind.block_len() == 32) {
        let (fast, error) = solve(&problem, &CpuSolver::new().with_scales(SEARCHED), kind, 0.01);
        let slow = walk(&problem, kind, 0.01, SEARCHED, None);
        assert_eq!(slow.linear.bytes().len(), fast.bytes().len());
        let ratio = error / slow.squared_error;
        assert!((ratio - 1.0).abs() < FITTED_OTHERWISE, "{kind}: {ratio}");
    }
}

#[test]
fn dead_columns_of_blocks_are_next_to_nothing() {
    let inputs = Tensor::randn([900, 256], (Kind::Float, Device::Cpu));
    for column in [5i64, 64, 255] {
        let _ = inputs.narrow(1, column, 1).zero_();
    }
    let problem = Problem::with_inputs(32, 256, &inputs);
    for kind in KINDS {
        let (linear, error) = solve(&problem, &CpuSolver::new().with_scales(SEARCHED), kind, 0.01);
        let ratio = error / measured(&problem, &linear);
        assert!((ratio - 1.0).abs() < OBJECTIVE_TOLERANCE, "{kind}: {ratio}");
    }
}

#[test]
fn a_weight_beyond_fp16_is_refused_in_blocks() {
    let problem = Problem::new(8, 256, 600, 6);
    let huge = &problem.weight * 1e15;
    for solver in [&CpuSolver::new() as &dyn Solver, &CpuSolver::new().with_scales(SEARCHED), &RtnSolver] {
        let factor = solver.factorize(&problem.hessian, Sorting::Stored, 0.01, "test").unwrap();
        for kind in [BlockType::Q4_0, BlockType::Q4_K, BlockType::Q6_K] {
            let error = factor.solve_blocks(&[Weight { name: "huge", values: &huge }], kind).unwrap_err();
            assert!(matches!(error, Error::Fp16Overflow { .. }), "{kind}: {error}");
            assert!(error.to_string().starts_with("huge: "), "{error}");
        }
    }
}

#[test]
fn blocks_that_cannot_be_solved_are_rounded_if_asked_for() {
    let problem = Problem::with_inputs(8, 256, &Tensor::zeros([600, 256], (Kind::Float, Device::Cpu)));
    let factor =
        OrRounded(CpuSolver::new()).factorize(&problem.hessian, Sorting::Stored, 0.01, "test").unwrap();
    let solution = factor.solve_blocks(&[weight(&problem.weight)], BlockType::Q4_K).unwrap().remove(0);
    assert!(solution.fallback.is_some());
    assert_eq!(blocks(&solution.linear).out_features(), 8);
}

#[test]
fn rows_of_blocks_are_joined_in_their_places() {
    let problem = Problem::new(70, 256, 900, 3);
    let output = Tensor::eye(70, (Kind::Float, Device::Cpu)) * 3.0;
    let outputs = OutputFactor::all(&[output], 0.01, Device::Cpu, "test").unwrap();
    let factor = CpuSolver::new().factorize(&problem.hessian, Sorting::Stored, 0.01, "test").unwrap();
    let weights = [weight(&problem.weight)];
    let solve_rows = |rows: &[Weight<'_>]| factor.solve_blocks(rows, BlockType::Q4_K);
    let by_rows = solve_by_rows(&problem.hessian, &weights, &[&outputs[..]], &solve_rows).unwrap().remove(0);
    let alone = factor.solve_blocks(&weights, BlockType::Q4_K).unwrap().remove(0);
    assert_eq!(blocks(&by_rows.linear), blocks(&alone.linear));
    let dense = by_rows.linear.dequantize(Kind::Float).unwrap();
    let direct = Tensor::from_slice(&blocks(&alone.linear).dequantize()).view([70, 256]).tr();
    assert_eq!(dense, direct);
}
