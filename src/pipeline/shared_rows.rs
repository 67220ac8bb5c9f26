//! Rows of a weight are solved by all ranks of a run: given the factor, each row is solved by itself, or with feedback each block of an
//! output Hessian.

use tch::Tensor;

use super::solution_message::{MessageReader, write_numbers, write_solution};
use crate::{
    architectures::{LayerConfig, LinearConfig, StageConfig},
    cluster::{Cluster, split},
    error::{Result, TorchContext},
    gptq::{
        Hessian,
        solver::{OutputFactor, Solution, Solved, Weight, join_strands, solve_strands, strand_rows},
    },
};

/// Rows that the solver takes together. Ranks get whole tiles.
pub(super) const TILE: usize = 32;
/// Weights below which each rank solves all of them: the codes would travel longer. Tests have small models.
pub(super) const WORTH_SHARING: usize = if cfg!(test) { 1 << 10 } else { 1 << 18 };

/// Whether so many values are worth sharing among the ranks.
pub(super) fn is_worth_sharing(weights: &[Weight<'_>], cluster: &Cluster) -> bool {
    let values: usize = weights.iter().map(|weight| weight.values.numel()).sum();
    cluster.ranks() > 1 && values >= WORTH_SHARING
}

/// Number of a stage's experts, if they are spread over so many ranks, else 0.
pub(super) fn spread_experts(layer: &LayerConfig, stage: &StageConfig, ranks: usize) -> usize {
    let groups = || stage.groups.iter().filter(|group| group.expert.is_some());
    let linears = groups().flat_map(|group| &layer.linears[group.linears.clone()]);
    let weights: usize = linears.map(LinearConfig::weights).sum();
    let experts = groups().count();
    if ranks > 1 && experts > 1 && weights >= WORTH_SHARING { experts } else { 0 }
}

/// Solves `weights` on all ranks, each its rows of every weight with `solve`. Every rank gets all rows. All ranks call it.
pub(super) fn solve_shared(
    weights: &[Weight<'_>],
    cluster: &Cluster,
    solve: impl Fn(&[Weight<'_>]) -> Result<Vec<Solution>>,
) -> Result<Vec<Solution>> {
    let mut own: Vec<Option<Tensor>> = Vec::new();
    for weight in weights {
        let rows = weight.values.size()[0] as usize;
        let tiles = split(rows.div_ceil(TILE), cluster.ranks()).swap_remove(cluster.rank());
        let (first, end) = (tiles.start * TILE, (tiles.end * TILE).min(rows));
        let part = || weight.values.f_narrow(0, first as i64, (end - first) as i64);
        own.push((first < end).then(part).transpose().torch("share a weight")?);
    }
    let parts: Vec<Weight<'_>> = weights
        .iter()
        .zip(&own)
        .filter_map(|(weight, own)| own.as_ref().map(|values| Weight { values, ..*weight }))
        .collect();
    let mut solved = if parts.is_empty() { Vec::new() } else { solve(&parts)? }.into_iter();
    let mut message = Vec::new();
    for own in &own {
        // A rank may have no rows of a weight.
        write_numbers(&mut message, [u64::from(own.is_some())]);
        if let Some(solution) = own.as_ref().and_then(|_| solved.next()) {
            write_solution(&mut message, &solution)?;
        }
    }
    let messages = cluster.all_gather(message)?;
    let mut rest: Vec<_> = messages.iter().map(|message| MessageReader::new(message)).collect();
    let join = |weight: &Weight<'_>| {
        let read = |rest: &mut MessageReader<'_>| (rest.number() > 0).then(|| rest.solution());
        let parts: Vec<Solution> = rest.iter_mut().filter_map(read).collect();
        let squared_error = parts.iter().map(|part| part.squared_error).sum();
        let uncompensated = parts.iter().map(|part| part.uncompensated).sum();
        let rows: Vec<i64> = (0..weight.values.size()[0]).collect();
        let linear = Solved::joined(parts.into_iter().map(|part| part.linear).collect(), &rows)?;
        Ok(Solution { linear, squared_error, uncompensated, fallback: None })
    };
    weights.iter().map(join).collect()
}

/// Solves `weights` with feedback between their rows on all ranks: each rank has some blocks of their output Hessians. Every rank gets all
/// rows. All ranks call it.
pub(super) fn solve_strands_shared(
    hessian: &Hessian,
    weights: &[Weight<'_>],
    outputs: &[&[OutputFactor]],
    cluster: &Cluster,
    solve: &dyn Fn(&[Weight<'_>]) -> Result<Vec<Solution>>,
) -> Result<Vec<Solution>> {
    let ranks = ranks_of(&strand_rows(outputs), cluster.ranks());
    let own = solve_strands(hessian, weights, outputs, &|strand| ranks[strand] == cluster.rank(), solve)?;
    let mut message = Vec::new();
    own.iter().try_for_each(|solution| write_solution(&mut message, solution))?;
    let messages = cluster.all_gather(message)?;
    let mut rest: Vec<_> = messages.iter().map(|message| MessageReader::new(message)).collect();
    join_strands(outputs, ranks.iter().map(|&rank| rest[rank].solution()))
}

/// The rank that each of some things is given to, by their sizes: the largest first, each to the rank that has the least.
pub(super) fn ranks_of(sizes: &[usize], ranks: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&thing| (usize::MAX - sizes[thing], thing));
    let (mut of_ranks, mut given) = (vec![0; ranks], vec![0; sizes.len()]);
    for thing in order {
        let rank = (0..ranks).min_by_key(|&rank| of_ranks[rank]).unwrap_or(0);
        of_ranks[rank] += sizes[thing];
        given[thing] = rank;
    }
    given
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::{
        cluster::tests::on_all,
        ggml::BlockType,
        gptq::solver::{CpuSolver, Factor, Solver, solve_by_rows},
        variant::Variant,
    };

    const K: i64 = 64;

    fn values(rows: i64, columns: i64) -> Tensor {
        let number = |i: i64| ((i + rows).wrapping_mul(2_654_435_761) >> 7) % 2001 - 1000;
        let all: Vec<f32> = (0..rows * columns).map(|i| number(i) as f32 / 1000.0).collect();
        Tensor::from_slice(&all).view([rows, columns])
    }

    fn hessian() -> Hessian {
        let mut hessian = Hessian::new(K as usize, Device::Cpu).unwrap();
        hessian.add(&values(300, K)).unwrap();
        hessian.finish("stage").unwrap()
    }

    fn factor(variant: &Variant) -> Factor {
        CpuSolver::new().factorize(&hessian(), variant.sorting(false), 0.01, "stage").unwrap()
    }

    /// What `solve` returns for two weights is the same for any number of ranks: codes or blocks, and the error but for rounding.
    fn check(solve: impl Fn(&[Weight<'_>], &Cluster) -> Vec<Solution> + Sync) {
        let solved = |cluster: &Cluster| {
            // A narrow linear, and one that ends in part of a tile.
            let [first, second] = [values(20, K), values(150, K)];
            let weights =
                [Weight { name: "first", values: &first }, Weight { name: "second", values: &second }];
            let solutions = solve(&weights, cluster);
            let linears = solutions.iter().map(|solution| match &solution.linear {
                Solved::Blocks(linear) => linear.bytes().to_vec(),
                linear => {
                    let linear = linear.on_host().unwrap();
                    let scales = linear.scales().iter().flat_map(|scale| scale.to_le_bytes());
                    linear.codes().iter().chain(linear.zeros()).copied().chain(scales).collect()
                }
            });
            (linears.collect::<Vec<_>>(), solutions.iter().map(|s| s.squared_error).sum::<f64>())
        };
        let (expected, error) = solved(&Cluster::alone());
        for ranks in [2, 3, 8] {
            for (linears, own) in on_all(ranks, |cluster| solved(&cluster)) {
                assert!(linears == expected, "{ranks} ranks");
                assert!((own - error).abs() < 1e-6 * error, "{own} {error}");
            }
        }
    }

    #[test]
    fn rows_are_the_same_whichever_rank_solves_them() {
        let variant: Variant = "4bit-16g-act".parse().unwrap();
        check(|weights, cluster| {
            let factor = factor(&variant);
            let solve = |rows: &[Weight<'_>]| factor.solve(rows, &variant);
            if cluster.ranks() == 1 { solve(weights) } else { solve_shared(weights, cluster, solve) }.unwrap()
        });
    }

    #[test]
    fn rows_of_blocks_are_the_same_whichever_rank_solves_them() {
        check(|weights, cluster| {
            let factor = factor(&"4bit-32g".parse().unwrap());
            let solve = |rows: &[Weight<'_>]| factor.solve_blocks(rows, BlockType::Q4_0);
            if cluster.ranks() == 1 { solve(weights) } else { solve_shared(weights, cluster, solve) }.unwrap()
        });
    }

    #[test]
    fn rows_with_feedback_are_the_same_whichever_rank_solves_them() {
        let variant: Variant = "4bit-16g-act".parse().unwrap();
        let block = |n: i64| {
            let gradients = values(200, n);
            gradients.tr().mm(&gradients) / 200.0 + Tensor::eye(n, (Kind::Float, Device::Cpu))
        };
        check(|weights, cluster| {
            let factor = factor(&variant);
            let outputs = [vec![block(20)], vec![block(70), block(80)]]
                .map(|blocks| OutputFactor::all(&blocks, 0.01, Device::Cpu, "outputs").unwrap());
            let outputs: Vec<&[OutputFactor]> = outputs.iter().map(Vec::as_slice).collect();
            let solve = |rows: &[Weight<'_>]| factor.solve(rows, &variant);
            match cluster.ranks() {
                1 => solve_by_rows(&hessian(), weights, &outputs, &solve),
                _ => solve_strands_shared(&hessian(), weights, &outputs, cluster, &solve),
            }
            .unwrap()
        });
    }

    #[test]
    fn the_largest_things_are_given_first() {
        assert_eq!(ranks_of(&[5, 9, 5, 4], 2), [1, 0, 1, 0]);
        assert_eq!(ranks_of(&[1, 1], 3), [0, 1]);
    }
}
