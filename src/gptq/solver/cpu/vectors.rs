//! The innermost products of the column loop, over pulp's vectors of any instruction set, because sums must stay in registers throughout:
//! what the compiler makes of plain loops is two to twenty times slower. Callers are inlined into a function that pulp compiles for the
//! instruction set of `S`.

use pulp::Simd;

use super::kernel::{COLUMNS, Columns, LANES, Lane};

/// `Σ_j factor[j, c] · source[j]` for all `c`; the end of the longer argument is ignored.
#[inline(always)]
pub(super) fn product<S: Simd>(simd: S, factor: &[Columns], source: &[Lane]) -> [Lane; COLUMNS] {
    // As many columns at a time as there are registers for their sums.
    match S::F32_LANES {
        16 => columns::<S, 8, { LANES / 16 }>(simd, factor, source),
        8 => columns::<S, 2, { LANES / 8 }>(simd, factor, source),
        4 => columns::<S, 2, { LANES / 4 }>(simd, factor, source),
        _ => columns::<S, 1, LANES>(simd, factor, source),
    }
}

/// The product, `AT_ONCE` columns at a time; a lane is `PARTS` vectors.
#[inline(always)]
fn columns<S: Simd, const AT_ONCE: usize, const PARTS: usize>(
    simd: S,
    factor: &[Columns],
    source: &[Lane],
) -> [Lane; COLUMNS] {
    let mut out = [[0.0; LANES]; COLUMNS];
    for (first, out) in (0..COLUMNS).step_by(AT_ONCE).zip(out.chunks_mut(AT_ONCE)) {
        let mut sums = [[simd.splat_f32s(0.0); PARTS]; AT_ONCE];
        for (factor, source) in factor.iter().zip(source) {
            let source = parts::<S>(source);
            for (sums, factor) in sums.iter_mut().zip(&factor[first..]) {
                let factor = simd.splat_f32s(*factor);
                for (sum, source) in sums.iter_mut().zip(source) {
                    *sum = simd.mul_add_e_f32s(factor, *source, *sum);
                }
            }
        }
        out.iter_mut().zip(&sums).for_each(|(out, sums)| parts_mut::<S>(out).copy_from_slice(sums));
    }
    out
}

/// `sums[c] += factor[c] · source` for all `c` but the first, which is the column that `source` is of.
#[inline(always)]
pub(super) fn add_to_later<S: Simd>(simd: S, sums: &mut [Lane], factor: &[f32], source: &Lane) {
    let source = parts::<S>(source);
    for (sum, factor) in sums.iter_mut().zip(factor).skip(1) {
        let factor = simd.splat_f32s(*factor);
        let parts = parts_mut::<S>(sum).iter_mut();
        parts.zip(source).for_each(|(part, source)| *part = simd.mul_add_e_f32s(factor, *source, *part));
    }
}

/// `to += more`. Of a loop over lanes within a loop over columns the compiler makes one that gathers and scatters a lane of many
/// columns, which takes as long as the products before it.
#[inline(always)]
pub(super) fn add<S: Simd>(simd: S, to: &mut Lane, more: &Lane) {
    parts_mut::<S>(to)
        .iter_mut()
        .zip(parts::<S>(more))
        .for_each(|(to, more)| *to = simd.add_f32s(*to, *more));
}

/// `to = from − to`.
#[inline(always)]
pub(super) fn subtract_from<S: Simd>(simd: S, from: &Lane, to: &mut Lane) {
    parts_mut::<S>(to)
        .iter_mut()
        .zip(parts::<S>(from))
        .for_each(|(to, from)| *to = simd.sub_f32s(*from, *to));
}

#[inline(always)]
fn parts<S: Simd>(lane: &Lane) -> &[S::f32s] {
    S::as_simd_f32s(lane).0
}

#[inline(always)]
fn parts_mut<S: Simd>(lane: &mut Lane) -> &mut [S::f32s] {
    S::as_mut_simd_f32s(lane).0
}

#[cfg(test)]
mod tests {
    use pulp::{Arch, Scalar, WithSimd};

    use super::*;

    /// The functions on fixed values, as one list.
    struct All;

    impl WithSimd for All {
        type Output = Vec<Lane>;

        fn with_simd<S: Simd>(self, simd: S) -> Vec<Lane> {
            let factor: Vec<Columns> =
                (0..21).map(|j| std::array::from_fn(|c| (j * 5 + c * 3) as f32 % 7.0 - 3.0)).collect();
            let source: Vec<Lane> =
                (0..20).map(|j| std::array::from_fn(|l| (j * 11 + l * 2) as f32 % 13.0 - 6.0)).collect();
            let mut lanes = product(simd, &factor, &source).to_vec();
            add_to_later(simd, &mut lanes[2..4], &factor[20], &source[19]);
            let (first, others) = lanes.split_at_mut(1);
            add(simd, &mut first[0], &others[0]);
            subtract_from(simd, &others[1], &mut first[0]);
            // The definition, in whole numbers, which floats have exactly.
            let sum = |c: usize, l: usize| factor.iter().zip(&source).map(|(f, s)| f[c] * s[l]).sum::<f32>();
            for l in 0..LANES {
                assert_eq!(others[2][l], sum(3, l) + factor[20][1] * source[19][l]);
                assert_eq!(first[0][l], sum(2, l) - (sum(0, l) + sum(1, l)));
                (4..COLUMNS).for_each(|c| assert_eq!(others[c - 1][l], sum(c, l)));
            }
            lanes
        }
    }

    #[test]
    fn every_instruction_set_computes_the_same() {
        let plain = All.with_simd(Scalar::new());
        assert_eq!(Arch::new().dispatch(All), plain);
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = pulp::x86::V3::try_new() {
            assert_eq!(Simd::vectorize(avx2, All), plain);
        }
    }
}
