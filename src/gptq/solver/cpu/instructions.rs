//! The innermost product of the column loop, once for each instruction set.
//!
//! Left to the compiler it is two to twenty times slower: sums must stay in registers throughout.

use super::kernel::{COLUMNS, Columns, LANES, Lane};

/// An instruction set. Its functions may be called only where the processor has it, and must be inlined into a function
/// that is compiled for it.
pub(super) trait Instructions {
    /// `Σ_j factor[j, c] · source[j]` for all `c`; of the longer argument only the beginning.
    fn product(factor: &[Columns], source: &[Lane]) -> [Lane; COLUMNS];

    /// `sum += Σ_j factor[j, c] · source[j]`; of the longer argument only the beginning.
    fn add_column(sum: &mut Lane, factor: &[Columns], c: usize, source: &[Lane]);
}

/// What every processor has.
pub(super) struct Plain;

impl Instructions for Plain {
    #[inline(always)]
    fn product(factor: &[Columns], source: &[Lane]) -> [Lane; COLUMNS] {
        let mut sums = [[0.0; LANES]; COLUMNS];
        for (factor, source) in factor.iter().zip(source) {
            for (sum, factor) in sums.iter_mut().zip(factor) {
                for l in 0..LANES {
                    sum[l] += factor * source[l];
                }
            }
        }
        sums
    }

    #[inline(always)]
    fn add_column(sum: &mut Lane, factor: &[Columns], c: usize, source: &[Lane]) {
        for (factor, source) in factor.iter().zip(source) {
            for l in 0..LANES {
                sum[l] += factor[c] * source[l];
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{COLUMNS, Columns, Instructions, LANES, Lane};

    /// AVX-512F and FMA.
    pub(in super::super) struct Avx512;
    /// AVX2 and FMA.
    pub(in super::super) struct Avx2;

    /// All columns at once: 16 of 32 registers hold sums of 16 lanes.
    impl Instructions for Avx512 {
        #[inline(always)]
        fn product(factor: &[Columns], source: &[Lane]) -> [Lane; COLUMNS] {
            const PARTS: usize = LANES / 16;
            let mut out = [[0.0; LANES]; COLUMNS];
            // SAFETY: the caller has the instructions; every load and store is inside the array it is made from.
            unsafe {
                let mut sums = [[_mm512_setzero_ps(); PARTS]; COLUMNS];
                for (factor, source) in factor.iter().zip(source) {
                    let source: [_; PARTS] =
                        std::array::from_fn(|p| _mm512_loadu_ps(source.as_ptr().add(16 * p)));
                    for c in 0..COLUMNS {
                        let factor = _mm512_set1_ps(factor[c]);
                        for p in 0..PARTS {
                            sums[c][p] = _mm512_fmadd_ps(factor, source[p], sums[c][p]);
                        }
                    }
                }
                for (out, sums) in out.iter_mut().zip(sums) {
                    for (p, sum) in sums.into_iter().enumerate() {
                        _mm512_storeu_ps(out.as_mut_ptr().add(16 * p), sum);
                    }
                }
            }
            out
        }

        #[inline(always)]
        fn add_column(sum: &mut Lane, factor: &[Columns], c: usize, source: &[Lane]) {
            // SAFETY: as above.
            unsafe {
                for p in 0..LANES / 16 {
                    let mut part = _mm512_loadu_ps(sum.as_ptr().add(16 * p));
                    for (factor, source) in factor.iter().zip(source) {
                        let source = _mm512_loadu_ps(source.as_ptr().add(16 * p));
                        part = _mm512_fmadd_ps(_mm512_set1_ps(factor[c]), source, part);
                    }
                    _mm512_storeu_ps(sum.as_mut_ptr().add(16 * p), part);
                }
            }
        }
    }

    /// Two columns at a time: 8 of 16 registers hold sums of 8 lanes.
    impl Instructions for Avx2 {
        #[inline(always)]
        fn product(factor: &[Columns], source: &[Lane]) -> [Lane; COLUMNS] {
            const PARTS: usize = LANES / 8;
            let mut out = [[0.0; LANES]; COLUMNS];
            for first in (0..COLUMNS).step_by(2) {
                // SAFETY: as above.
                unsafe {
                    let mut sums = [[_mm256_setzero_ps(); PARTS]; 2];
                    for (factor, source) in factor.iter().zip(source) {
                        let factors = [_mm256_set1_ps(factor[first]), _mm256_set1_ps(factor[first + 1])];
                        for p in 0..PARTS {
                            let source = _mm256_loadu_ps(source.as_ptr().add(8 * p));
                            for c in 0..2 {
                                sums[c][p] = _mm256_fmadd_ps(factors[c], source, sums[c][p]);
                            }
                        }
                    }
                    for (out, sums) in out[first..].iter_mut().zip(sums) {
                        for (p, sum) in sums.into_iter().enumerate() {
                            _mm256_storeu_ps(out.as_mut_ptr().add(8 * p), sum);
                        }
                    }
                }
            }
            out
        }

        #[inline(always)]
        fn add_column(sum: &mut Lane, factor: &[Columns], c: usize, source: &[Lane]) {
            // SAFETY: as above.
            unsafe {
                for p in 0..LANES / 8 {
                    let mut part = _mm256_loadu_ps(sum.as_ptr().add(8 * p));
                    for (factor, source) in factor.iter().zip(source) {
                        let source = _mm256_loadu_ps(source.as_ptr().add(8 * p));
                        part = _mm256_fmadd_ps(_mm256_set1_ps(factor[c]), source, part);
                    }
                    _mm256_storeu_ps(sum.as_mut_ptr().add(8 * p), part);
                }
            }
        }
    }
}
