//! Vectors of 16 lanes for the CPU kernels, with the instruction set chosen at run time. All `unsafe` code of the CPU kernels is
//! here and in `simd_x86`.
//!
//! A [`Kernel`] is written once over the trait [`Simd`] and compiled once for every instruction set of [`Isa::run`].

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
pub(super) use super::simd_x86::{Avx2, Avx512};

/// Lanes of a vector.
pub(super) const LANES: usize = 16;

/// Memory of one vector, on a cache line of its own.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Lanes(pub(super) [f32; LANES]);

impl Lanes {
    pub(super) const ZERO: Self = Self([0.0; LANES]);
}

/// The vector operations of one instruction set.
///
/// A value proves that the CPU has the instruction set, so that the methods are safe to call. Functions with a `Simd` argument
/// must be `#[inline(always)]` up to [`Kernel::run`]; otherwise each operation is a function call.
pub(super) trait Simd: Copy {
    /// 16 numbers.
    type Floats: Copy;
    /// 16 packed words.
    type Words: Copy;
    /// Whether loops over the codes of a unit are unrolled, for constant shifts.
    const UNROLLED: bool;

    fn splat(self, value: f32) -> Self::Floats;
    fn load(self, from: &[f32; LANES]) -> Self::Floats;
    fn store(self, value: Self::Floats, to: &mut [f32; LANES]);
    fn sub(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    fn add(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a * b + c`, rounded once where the instruction set can, else twice.
    fn mul_add(self, a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    fn load_words(self, from: &[i32; LANES]) -> Self::Words;
    /// The `bits` bits of `high:low` that start at bit `shift < 32` of `low`, as numbers. `high` is used only if the bits reach
    /// beyond `low`.
    fn codes(self, low: Self::Words, high: Self::Words, shift: u32, bits: u32) -> Self::Floats;
}

/// Work that is compiled for every instruction set.
pub(super) trait Kernel {
    /// Does the work; must be `#[inline(always)]`. `ROWS` x `VECTORS`: the tile of sums that fits the registers.
    fn run<S: Simd, const ROWS: usize, const VECTORS: usize>(self, simd: S);
}

/// An instruction set that this CPU has.
#[derive(Clone, Copy, Debug)]
pub(super) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    Portable,
}

impl Isa {
    /// The best instruction set of this CPU.
    pub(super) fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available()[0])
    }

    /// Every instruction set of this CPU, best first, never empty.
    pub(super) fn available() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(Avx512::detect().map(Self::Avx512));
            all.extend(Avx2::detect().map(Self::Avx2));
        }
        all.push(Self::Portable);
        all
    }

    /// The `ROWS` with which [`Isa::run`] calls a kernel.
    pub(super) fn tile_rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => AVX512_ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => AVX2_ROWS,
            Self::Portable => PORTABLE_ROWS,
        }
    }

    /// Runs `kernel` as compiled for this instruction set.
    pub(super) fn run(self, kernel: impl Kernel) {
        match self {
            // SAFETY: the value proves that the CPU has the instructions.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) => unsafe { run_avx512(simd, kernel) },
            // SAFETY: the value proves that the CPU has the instructions.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => unsafe { run_avx2(simd, kernel) },
            Self::Portable => kernel.run::<_, PORTABLE_ROWS, 1>(Portable),
        }
    }
}

#[cfg(target_arch = "x86_64")]
const AVX512_ROWS: usize = 8;
#[cfg(target_arch = "x86_64")]
const AVX2_ROWS: usize = 6;
const PORTABLE_ROWS: usize = 4;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn run_avx512(simd: Avx512, kernel: impl Kernel) {
    kernel.run::<_, AVX512_ROWS, 2>(simd);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2(simd: Avx2, kernel: impl Kernel) {
    kernel.run::<_, AVX2_ROWS, 1>(simd);
}

/// Arrays, which the compiler vectorizes with the instructions that every CPU of the target has.
#[derive(Clone, Copy)]
struct Portable;

/// True where `f32::mul_add` is an instruction on every CPU of the target; elsewhere it would be a slow library call.
const PORTABLE_FMA: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

/// A method of [`Simd`] that is the same for each lane.
macro_rules! by_lane {
    ($name:ident, $operator:tt) => {
        #[inline(always)]
        fn $name(self, mut a: Self::Floats, b: Self::Floats) -> Self::Floats {
            for l in 0..LANES {
                a[l] $operator b[l];
            }
            a
        }
    };
}

impl Simd for Portable {
    type Floats = [f32; LANES];
    type Words = [u32; LANES];
    const UNROLLED: bool = false;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Floats {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::Floats {
        *from
    }

    #[inline(always)]
    fn store(self, value: Self::Floats, to: &mut [f32; LANES]) {
        *to = value;
    }

    by_lane!(sub, -=);
    by_lane!(add, +=);
    by_lane!(mul, *=);

    #[inline(always)]
    fn mul_add(self, a: Self::Floats, b: Self::Floats, mut c: Self::Floats) -> Self::Floats {
        for l in 0..LANES {
            c[l] = if PORTABLE_FMA { a[l].mul_add(b[l], c[l]) } else { a[l] * b[l] + c[l] };
        }
        c
    }

    #[inline(always)]
    fn load_words(self, from: &[i32; LANES]) -> Self::Words {
        let mut words = [0; LANES];
        for l in 0..LANES {
            words[l] = from[l] as u32;
        }
        words
    }

    #[inline(always)]
    fn codes(self, low: Self::Words, high: Self::Words, shift: u32, bits: u32) -> Self::Floats {
        let mut codes = [0.0; LANES];
        for l in 0..LANES {
            let mut code = low[l] >> shift;
            if shift + bits > 32 {
                code |= high[l] << (32 - shift);
            }
            codes[l] = (code & ((1 << bits) - 1)) as i32 as f32;
        }
        codes
    }
}

/// Prefetches the cache line of `data[index]`; does nothing without such an instruction or element.
#[inline(always)]
pub(super) fn prefetch<T>(data: &[T], index: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(element) = data.get(index) {
        super::simd_x86::prefetch(element);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (data, index);
}
