//! [`Simd`] on AVX-512 and on AVX2 with FMA.
//!
//! Every `unsafe` block here calls instructions that the CPU has, as the value `self` proves: only `detect` makes such values.
//! Pointers come from references to arrays of the length that is read or written.

use std::arch::x86_64::*;

use super::simd::{LANES, Simd};

/// The proof that this CPU has avx512f, avx2 and fma.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx512(());

impl Avx512 {
    pub(super) fn detect() -> Option<Self> {
        (Avx2::detect().is_some() && is_x86_feature_detected!("avx512f")).then_some(Self(()))
    }
}

/// The proof that this CPU has avx2 and fma.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx2(());

impl Avx2 {
    pub(super) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
    }
}

/// The number of the lowest `bits` bits of 0 to 15, for each `bits` up to 4.
const NUMBERS: [[f32; 16]; 5] = {
    let mut numbers = [[0.0; 16]; 5];
    let mut i = 0;
    while i < 5 * 16 {
        numbers[i / 16][i % 16] = (i % 16 % (1 << (i / 16))) as f32;
        i += 1;
    }
    numbers
};

/// A method of [`Simd`] that is one instruction.
macro_rules! instruction {
    ($name:ident($($argument:ident),*) = $instruction:ident) => {
        #[inline(always)]
        fn $name(self, $($argument: __m512),*) -> __m512 {
            // SAFETY: see the head of this file.
            unsafe { $instruction($($argument),*) }
        }
    };
}

impl Simd for Avx512 {
    type Floats = __m512;
    type Words = __m512i;
    const UNROLLED: bool = true;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: see the head of this file.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> __m512 {
        // SAFETY: see the head of this file.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, value: __m512, to: &mut [f32; LANES]) {
        // SAFETY: see the head of this file.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), value) }
    }

    instruction!(sub(a, b) = _mm512_sub_ps);
    instruction!(add(a, b) = _mm512_add_ps);
    instruction!(mul(a, b) = _mm512_mul_ps);
    instruction!(mul_add(a, b, c) = _mm512_fmadd_ps);

    #[inline(always)]
    fn load_words(self, from: &[i32; LANES]) -> __m512i {
        // SAFETY: see the head of this file.
        unsafe { _mm512_loadu_epi32(from.as_ptr()) }
    }

    #[inline(always)]
    fn codes(self, low: __m512i, high: __m512i, shift: u32, bits: u32) -> __m512 {
        // SAFETY: see the head of this file.
        unsafe {
            let mut code = _mm512_srl_epi32(low, _mm_cvtsi32_si128(shift as i32));
            if shift + bits > 32 {
                code = _mm512_or_si512(code, _mm512_sll_epi32(high, _mm_cvtsi32_si128(32 - shift as i32)));
            }
            if bits <= 4 {
                // The lowest four bits of each lane choose one of 16 numbers.
                return _mm512_permutexvar_ps(code, _mm512_loadu_ps(NUMBERS[bits as usize].as_ptr()));
            }
            _mm512_cvtepi32_ps(_mm512_and_si512(code, _mm512_set1_epi32((1 << bits) - 1)))
        }
    }
}

/// Two registers of eight.
type Pair<T> = [T; 2];

/// A method of [`Simd`] that is the same instruction on both registers.
macro_rules! two_instructions {
    ($name:ident($($argument:ident),*) = $instruction:ident) => {
        #[inline(always)]
        fn $name(self, $($argument: Pair<__m256>),*) -> Pair<__m256> {
            // SAFETY: see the head of this file.
            unsafe { [$instruction($($argument[0]),*), $instruction($($argument[1]),*)] }
        }
    };
}

impl Simd for Avx2 {
    type Floats = Pair<__m256>;
    type Words = Pair<__m256i>;
    const UNROLLED: bool = true;

    #[inline(always)]
    fn splat(self, value: f32) -> Pair<__m256> {
        // SAFETY: see the head of this file.
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Pair<__m256> {
        let [low, high] = halves(from);
        // SAFETY: see the head of this file.
        unsafe { [_mm256_loadu_ps(low.as_ptr()), _mm256_loadu_ps(high.as_ptr())] }
    }

    #[inline(always)]
    fn store(self, value: Pair<__m256>, to: &mut [f32; LANES]) {
        let (low, high) = to.split_at_mut(LANES / 2);
        // SAFETY: see the head of this file; both halves have eight elements.
        unsafe {
            _mm256_storeu_ps(low.as_mut_ptr(), value[0]);
            _mm256_storeu_ps(high.as_mut_ptr(), value[1]);
        }
    }

    two_instructions!(sub(a, b) = _mm256_sub_ps);
    two_instructions!(add(a, b) = _mm256_add_ps);
    two_instructions!(mul(a, b) = _mm256_mul_ps);
    two_instructions!(mul_add(a, b, c) = _mm256_fmadd_ps);

    #[inline(always)]
    fn load_words(self, from: &[i32; LANES]) -> Pair<__m256i> {
        let [low, high] = halves(from);
        // SAFETY: see the head of this file.
        unsafe { [_mm256_loadu_si256(low.as_ptr().cast()), _mm256_loadu_si256(high.as_ptr().cast())] }
    }

    #[inline(always)]
    fn codes(self, low: Pair<__m256i>, high: Pair<__m256i>, shift: u32, bits: u32) -> Pair<__m256> {
        let half = |low: __m256i, high: __m256i| {
            // SAFETY: see the head of this file.
            unsafe {
                let mut code = _mm256_srl_epi32(low, _mm_cvtsi32_si128(shift as i32));
                if shift + bits > 32 {
                    code =
                        _mm256_or_si256(code, _mm256_sll_epi32(high, _mm_cvtsi32_si128(32 - shift as i32)));
                }
                _mm256_cvtepi32_ps(_mm256_and_si256(code, _mm256_set1_epi32((1 << bits) - 1)))
            }
        };
        [half(low[0], high[0]), half(low[1], high[1])]
    }
}

#[inline(always)]
fn halves<T>(whole: &[T; LANES]) -> [&[T; LANES / 2]; 2] {
    let (low, high) = whole.split_at(LANES / 2);
    [low.try_into().expect("eight"), high.try_into().expect("eight")]
}

/// Prefetches the cache line of `element`.
#[inline(always)]
pub(super) fn prefetch<T>(element: &T) {
    // SAFETY: SSE is part of x86_64, and a prefetch has no effect that a program can see.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(element).cast()) };
}

/// Prefetches the cache line of `element` into the second-level cache.
#[inline(always)]
pub(super) fn prefetch_to_l2<T>(element: &T) {
    // SAFETY: as for `prefetch`.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(element).cast()) };
}
