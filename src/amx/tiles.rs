//! One square of the product: on tile registers, with AVX-512's bf16 dot products, or in plain Rust.

use std::marker::PhantomData;

use super::{
    Parts, SIDE,
    operand::{CHUNK, Line, TILE},
};

/// Whether this processor has AMX with bf16 and the system permits this process to use it.
pub fn available() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return *x86::AVAILABLE;
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    false
}

/// Whether bf16 products with fp32 sums are faster here than fp32 products: with AMX, or with AVX-512's bf16 dot products on AMD's
/// processors. On a Xeon (Sapphire Rapids) dot products reach half the speed of fp32.
pub fn has_bf16_products() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return available() || has_dot_products() && x86::is_from_amd();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    false
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn has_dot_products() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
}

/// The tile registers of this thread, set up until this is dropped. With AMX no other code of the thread may use them meanwhile, nor
/// make another one: no tasks of rayon are started or waited for, and libtorch is not called.
pub struct Tiles {
    amx: bool,
    /// Registers belong to a thread.
    _of_thread: PhantomData<*const ()>,
}

impl Tiles {
    /// Sets up the registers, if there are any.
    pub fn new() -> Self {
        let amx = available();
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if amx {
            // SAFETY: AMX is available.
            unsafe { x86::configure() };
        }
        Self { amx, _of_thread: PhantomData }
    }

    /// `c[i·stride + j] += Σ_d left[d, i] · right[d, j]` for `i, j < SIDE`, over a strip of each operand (see
    /// [`Operand`](super::Operand)) or the same range of whole chunks of both. If [`has_bf16_products`] is false, plain Rust computes
    /// it slowly.
    ///
    /// # Panics
    /// When the operands differ in length, or are not whole chunks, or `c` is too short.
    pub fn multiply_add(&self, left: &[Line], right: &[Line], parts: Parts, c: &mut [f32], stride: usize) {
        assert_eq!(left.len(), right.len(), "operands have one depth");
        assert!(left.len().is_multiple_of(parts.chunk_len()), "operands are whole chunks");
        assert!(stride >= SIDE && c.len() >= (SIDE - 1) * stride + SIDE, "the square lies in `c`");
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if self.amx {
            // SAFETY: AMX is available and set up, and the assertions above are the function's conditions.
            return unsafe { x86::multiply_add(left, right, parts, c.as_mut_ptr(), stride) };
        }
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if has_dot_products() {
            // SAFETY: the features were detected on the line above.
            return unsafe { dot_products::multiply_add(left, right, parts, c, stride) };
        }
        plain(left, right, parts, c, stride);
    }
}

impl Default for Tiles {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if self.amx {
            // SAFETY: AMX is available.
            unsafe { x86::release() };
        }
    }
}

/// The definition.
pub(super) fn plain(left: &[Line], right: &[Line], parts: Parts, c: &mut [f32], stride: usize) {
    let value =
        |pair: u32, odd: usize| f32::from_bits(if odd == 1 { pair & 0xFFFF_0000 } else { pair << 16 });
    let chunks = left.chunks_exact(parts.chunk_len()).zip(right.chunks_exact(parts.chunk_len()));
    for (left, right) in chunks {
        for &(x, y) in parts.products() {
            let (left, right) = (&left[x * CHUNK..][..CHUNK], &right[y * CHUNK..][..CHUNK]);
            for i in 0..SIDE {
                for j in 0..SIDE {
                    let right = &right[j / TILE * TILE..][..TILE];
                    let terms = (0..SIDE)
                        .map(|d| value(left[i].0[d / 2], d % 2) * value(right[d / 2].0[j % TILE], d % 2));
                    c[i * stride + j] += terms.sum::<f32>();
                }
            }
        }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod dot_products {
    use std::arch::x86_64::{
        __m512, __m512bh, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };

    use super::{CHUNK, Line, Parts, SIDE, TILE};

    /// Rows of the square that are computed together: with both halves of a row, 16 registers hold their sums.
    const ROWS: usize = 8;

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn multiply_add(left: &[Line], right: &[Line], parts: Parts, c: &mut [f32], stride: usize) {
        let len = parts.chunk_len();
        for first in (0..SIDE).step_by(ROWS) {
            let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
            for (left, right) in left.chunks_exact(len).zip(right.chunks_exact(len)) {
                for &(x, y) in parts.products() {
                    let left = &left[x * CHUNK + first..][..ROWS];
                    let right = &right[y * CHUNK..][..CHUNK];
                    for pair in 0..TILE {
                        let columns = [right[pair].0, right[TILE + pair].0];
                        for (sums, left) in sums.iter_mut().zip(left) {
                            let row = [left.0[pair]; 16];
                            for (sum, columns) in sums.iter_mut().zip(columns) {
                                *sum = _mm512_dpbf16_ps(*sum, values(row), values(columns));
                            }
                        }
                    }
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                for (half, sum) in sums.iter().enumerate() {
                    add(&mut c[(first + i) * stride + half * TILE..][..TILE], *sum);
                }
            }
        }
    }

    /// 32 bf16 values.
    #[inline(always)]
    fn values(pairs: [u32; 16]) -> __m512bh {
        // SAFETY: both are 64 bytes, any of which are values.
        unsafe { std::mem::transmute(pairs) }
    }

    #[target_feature(enable = "avx512f")]
    fn add(to: &mut [f32], sum: __m512) {
        assert_eq!(to.len(), TILE);
        // SAFETY: 16 floats lie there.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), _mm512_add_ps(_mm512_loadu_ps(to.as_ptr()), sum)) };
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod x86 {
    use std::{
        arch::{asm, x86_64::__cpuid_count},
        sync::LazyLock,
    };

    use super::{Line, Parts};

    pub(super) static AVAILABLE: LazyLock<bool> = LazyLock::new(|| in_processor() && permitted());

    fn in_processor() -> bool {
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        let leaves = __cpuid_count(0, 0).eax;
        leaves >= 7 && __cpuid_count(7, 0).edx & (AMX_BF16 | AMX_TILE) == AMX_BF16 | AMX_TILE
    }

    pub(super) fn is_from_amd() -> bool {
        let id = __cpuid_count(0, 0);
        [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
    }

    /// Linux permits the large register state only to processes that request it.
    fn permitted() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: the call changes nothing but this process's permission.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }

    /// Palette 1, and all eight registers with 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        bytes_per_row: [u16; 16],
        rows: [u8; 16],
    }

    static CONFIG: Config = {
        let (mut bytes_per_row, mut rows) = ([0; 16], [0; 16]);
        let mut tile = 0;
        while tile < 8 {
            bytes_per_row[tile] = 64;
            rows[tile] = 16;
            tile += 1;
        }
        Config { palette: 1, start_row: 0, reserved: [0; 14], bytes_per_row, rows }
    };

    /// # Safety
    /// AMX must be available.
    pub(super) unsafe fn configure() {
        // SAFETY: reads the configuration.
        unsafe {
            asm!("ldtilecfg [{config}]", config = in(reg) &raw const CONFIG, options(nostack, readonly))
        }
    }

    /// # Safety
    /// AMX must be available.
    pub(super) unsafe fn release() {
        // SAFETY: frees the registers.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
    }

    /// # Safety
    /// AMX must be available, and [`configure`] called before. The slices must have one length, a multiple of `parts.chunk_len()`. `c` must point to 32 rows of
    /// 32 floats, `stride` floats apart, without other users.
    pub(super) unsafe fn multiply_add(
        left: &[Line],
        right: &[Line],
        parts: Parts,
        c: *mut f32,
        stride: usize,
    ) {
        let chunks = left.len() / parts.chunk_len();
        if chunks == 0 {
            return;
        }
        // Registers 0 to 3 hold the square's quarters, 4 and 5 tiles of the left operand, 6 and 7 of the right one. A chunk
        // begins with the product of the first parts; `$step` are the others'.
        macro_rules! on_tiles {
            ($bytes:literal $(, $step:literal)* $(,)?) => {
                // SAFETY: reads `chunks` chunks of both operands and the square, writes the square and the registers.
                unsafe {
                    asm!(
                        "tileloadd tmm0, [{c} + {row}]",
                        "tileloadd tmm1, [{c} + {row} + 64]",
                        "tileloadd tmm2, [{below} + {row}]",
                        "tileloadd tmm3, [{below} + {row} + 64]",
                        "2:",
                        "tileloadd tmm4, [{left} + {line}]",
                        "tileloadd tmm6, [{right} + {line}]",
                        "tileloadd tmm7, [{right} + {line} + 1024]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tileloadd tmm5, [{left} + {line} + 1024]",
                        "tdpbf16ps tmm1, tmm4, tmm7",
                        "tdpbf16ps tmm2, tmm5, tmm6",
                        "tdpbf16ps tmm3, tmm5, tmm7",
                        $($step,)*
                        concat!("add {left}, ", $bytes),
                        concat!("add {right}, ", $bytes),
                        "dec {chunks}",
                        "jnz 2b",
                        "tilestored [{c} + {row}], tmm0",
                        "tilestored [{c} + {row} + 64], tmm1",
                        "tilestored [{below} + {row}], tmm2",
                        "tilestored [{below} + {row} + 64], tmm3",
                        c = in(reg) c,
                        below = in(reg) c.add(16 * stride),
                        row = in(reg) 4 * stride,
                        line = in(reg) 64usize,
                        left = inout(reg) left.as_ptr() => _,
                        right = inout(reg) right.as_ptr() => _,
                        chunks = inout(reg) chunks => _,
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                        options(nostack),
                    )
                }
            };
        }
        match parts {
            Parts::One => on_tiles!(2048),
            // Products in the order of `Parts::products`.
            Parts::Two => on_tiles!(
                4096,
                "tileloadd tmm6, [{right} + {line} + 2048]",
                "tileloadd tmm7, [{right} + {line} + 3072]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm4, [{left} + {line} + 2048]",
                "tileloadd tmm6, [{right} + {line}]",
                "tileloadd tmm7, [{right} + {line} + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{left} + {line} + 3072]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
            ),
        }
    }
}
