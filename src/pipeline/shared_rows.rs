//! Rows of a weight are solved by all ranks of a run: given the factor, each row is solved by itself.

use half::f16;
use tch::Tensor;

use super::worker_pool::split;
use crate::{
    cluster::Cluster,
    error::{Result, TorchContext},
    gptq::{
        QuantizedLinear,
        solver::{Solution, Solved, Weight},
    },
    variant::Bits,
};

/// Rows that the solver takes together. Ranks get whole tiles.
const TILE: usize = 32;
/// Weights of a group below which each rank solves all of it: the codes would travel longer.
const WORTH_SHARING: usize = 1 << 18;

/// Whether so many values are worth sharing among the ranks.
pub(super) fn is_worth_sharing(weights: &[Weight<'_>], cluster: &Cluster) -> bool {
    let values: usize = weights.iter().map(|weight| weight.values.numel()).sum();
    cluster.ranks() > 1 && values >= WORTH_SHARING
}

/// Solves `weights` on all ranks, each its rows of every weight with `solve`. Every rank gets all rows. All ranks call it.
pub(super) fn solve_shared(
    weights: &[Weight<'_>],
    bits: Bits,
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
        let solution = own.as_ref().and_then(|_| solved.next());
        write(&mut message, solution)?;
    }
    let messages = cluster.all_gather(message)?;
    let mut rest: Vec<&[u8]> = messages.iter().map(Vec::as_slice).collect();
    let join = |weight: &Weight<'_>| {
        let parts: Vec<Solution> = rest.iter_mut().filter_map(|rest| read(rest, bits)).collect();
        let squared_error = parts.iter().map(|part| part.squared_error).sum();
        let uncompensated = parts.iter().map(|part| part.uncompensated).sum();
        let rows: Vec<i64> = (0..weight.values.size()[0]).collect();
        let linear = Solved::joined(parts.into_iter().map(|part| part.linear).collect(), &rows)?;
        Ok(Solution { linear, squared_error, uncompensated, fallback: None })
    };
    weights.iter().map(join).collect()
}

/// Appends the rows of a rank to its message.
///
/// The order is: number of rows, columns, groups, squared error, count of uncompensated features; then codes, scales, zeros and
/// groups as raw bytes.
fn write(message: &mut Vec<u8>, solution: Option<Solution>) -> Result<()> {
    let Some(solution) = solution else {
        message.extend(0u64.to_le_bytes());
        return Ok(());
    };
    let linear = solution.linear.on_host()?;
    for number in [linear.out_features(), linear.in_features(), linear.groups()] {
        message.extend((number as u64).to_le_bytes());
    }
    message.extend(solution.squared_error.to_le_bytes());
    message.extend((solution.uncompensated as u64).to_le_bytes());
    message.extend(linear.codes());
    message.extend(linear.scales().iter().flat_map(|scale| scale.to_le_bytes()));
    message.extend(linear.zeros());
    message.extend(linear.g_idx().iter().flat_map(|group| group.to_le_bytes()));
    Ok(())
}

/// Takes the next rows from a rank's message; `None` if the rank has none of this weight.
fn read<'m>(rest: &mut &'m [u8], bits: Bits) -> Option<Solution> {
    let mut take = |count: usize| {
        let all: &'m [u8] = rest;
        let (own, others) = all.split_at(count);
        *rest = others;
        own
    };
    let mut number = || u64::from_le_bytes(take(8).try_into().expect("8 bytes"));
    let n = number() as usize;
    if n == 0 {
        return None;
    }
    let (k, groups) = (number() as usize, number() as usize);
    let squared_error = f64::from_bits(number());
    let uncompensated = number() as usize;
    let codes = take(k * n).to_vec();
    let scales = take(2 * groups * n).chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect();
    let zeros = take(groups * n).to_vec();
    let g_idx = take(4 * k).chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("4 bytes")));
    let linear = QuantizedLinear::new(bits, codes, scales, zeros, g_idx.collect());
    Some(Solution { linear: Solved::Host(linear), squared_error, uncompensated, fallback: None })
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::{
        cluster::tests::on_all,
        gptq::{
            Hessian,
            solver::{CpuSolver, Solver},
        },
        variant::Variant,
    };

    #[test]
    fn rows_are_the_same_whichever_rank_solves_them() {
        let (k, variant): (i64, Variant) = (64, "4bit-16g-act".parse().unwrap());
        let values = |rows: i64| {
            let number = |i: i64| ((i + rows).wrapping_mul(2_654_435_761) >> 7) % 2001 - 1000;
            let all: Vec<f32> = (0..rows * k).map(|i| number(i) as f32 / 1000.0).collect();
            Tensor::from_slice(&all).view([rows, k])
        };
        let solved = |cluster: &Cluster| {
            // A narrow linear, and one that ends in part of a tile.
            let [first, second, inputs] = [values(20), values(150), values(300)];
            let mut hessian = Hessian::new(k as usize, Device::Cpu).unwrap();
            hessian.add(&inputs).unwrap();
            let factor = CpuSolver::new().factorize(
                &hessian.finish("stage").unwrap(),
                variant.sorting(false),
                0.01,
                "stage",
            );
            let factor = factor.unwrap();
            let weights =
                [Weight { name: "first", values: &first }, Weight { name: "second", values: &second }];
            let solutions = match cluster.ranks() {
                1 => factor.solve(&weights, &variant).unwrap(),
                _ => {
                    let solve = |rows: &[Weight<'_>]| factor.solve(rows, &variant);
                    solve_shared(&weights, variant.bits, cluster, solve).unwrap()
                }
            };
            let linears = solutions.iter().map(|s| s.linear.on_host().unwrap().into_owned());
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
}
