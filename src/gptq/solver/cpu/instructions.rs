//! The innermost product of the column loop, written once for each instruction set, because sums must stay in registers
//! throughout: what the compiler makes of plain loops is two to twenty times slower.

use super::kernel::{COLUMNS, Columns, LANES, Lane};

/// An instruction set. Its functions may be called only if the processor has it, and must be inlined into a function
/// that is compiled for it: see [`on_best_instructions`].
pub(super) trait Instructions {
    /// `Σ_j factor[j, c] · source[j]` for all `c`; the end of the longer argument is ignored.
    fn product(factor: &[Columns], source: &[Lane]) -> [Lane; COLUMNS];

    /// `sum += Σ_j factor[j, c] · source[j]`; the end of the longer argument is ignored.
    fn add_column(sum: &mut Lane, factor: &[Columns], c: usize, source: &[Lane]);

    /// `to += more`. Of a loop over lanes within a loop over columns the compiler makes one that gathers and scatters a lane of many
    /// columns, which takes as long as the products before it.
    fn add(to: &mut Lane, more: &Lane);

    /// `to = from − to`.
    fn subtract_from(from: &Lane, to: &mut Lane);
}

/// Instructions that every processor has.
pub(super) struct Plain;

/// Defines a function that runs `$body::<I>`, compiled for the best instruction set `I` of this processor.
macro_rules! on_best_instructions {
    (
        $(#[$doc:meta])*
        fn $name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)? = $body:ident
    ) => {
        $(#[$doc])*
        pub(super) fn $name($($argument: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                use super::instructions::{Avx2, Avx512};

                #[target_feature(enable = "avx512f,fma")]
                fn avx512($($argument: $type),*) $(-> $result)? {
                    $body::<Avx512>($($argument),*)
                }

                #[target_feature(enable = "avx2,fma")]
                fn avx2($($argument: $type),*) $(-> $result)? {
                    $body::<Avx2>($($argument),*)
                }

                if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("fma") {
                    // SAFETY: the features were detected on the line above.
                    return unsafe { avx512($($argument),*) };
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: the features were detected on the line above.
                    return unsafe { avx2($($argument),*) };
                }
            }
            $body::<super::instructions::Plain>($($argument),*)
        }
    };
}
pub(super) use on_best_instructions;

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

    #[inline(always)]
    fn add(to: &mut Lane, more: &Lane) {
        for l in 0..LANES {
            to[l] += more[l];
        }
    }

    #[inline(always)]
    fn subtract_from(from: &Lane, to: &mut Lane) {
        for l in 0..LANES {
            to[l] = from[l] - to[l];
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

    /// `add` and `subtract_from` in registers of so many lanes.
    macro_rules! add_and_subtract {
        ($width:literal, $load:ident, $store:ident, $add:ident, $subtract:ident) => {
            #[inline(always)]
            fn add(to: &mut Lane, more: &Lane) {
                for (to, more) in to.as_chunks_mut::<$width>().0.iter_mut().zip(more.as_chunks::<$width>().0)
                {
                    // SAFETY: the caller has the instructions; both have as many floats as a register.
                    unsafe { $store(to.as_mut_ptr(), $add($load(to.as_ptr()), $load(more.as_ptr()))) };
                }
            }

            #[inline(always)]
            fn subtract_from(from: &Lane, to: &mut Lane) {
                for (to, from) in to.as_chunks_mut::<$width>().0.iter_mut().zip(from.as_chunks::<$width>().0)
                {
                    // SAFETY: the caller has the instructions; both have as many floats as a register.
                    unsafe { $store(to.as_mut_ptr(), $subtract($load(from.as_ptr()), $load(to.as_ptr()))) };
                }
            }
        };
    }

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

        add_and_subtract!(16, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_add_ps, _mm512_sub_ps);
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

        add_and_subtract!(8, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_add_ps, _mm256_sub_ps);
    }
}
