//! Views of CPU tensors' memory for several threads; the only `unsafe` about memory in this module.

use std::marker::PhantomData;

use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

/// A contiguous fp32 CPU matrix, read only.
pub(super) struct Matrix<'a> {
    data: &'a [f32],
    columns: usize,
}

impl<'a> Matrix<'a> {
    /// # Panics
    /// When `tensor` is not a contiguous fp32 matrix on the CPU.
    pub(super) fn new(tensor: &'a Tensor) -> Self {
        let (pointer, rows, columns) = check(tensor);
        // SAFETY: `check` made sure that `rows·columns` floats lie there; the tensor is borrowed for `'a`, and nothing
        // in this module's parent writes to it meanwhile.
        let data = unsafe { std::slice::from_raw_parts(pointer, rows * columns) };
        Self { data, columns }
    }

    pub(super) fn row(&self, row: usize) -> &'a [f32] {
        &self.data[row * self.columns..][..self.columns]
    }

    /// The whole matrix, row-major.
    pub(super) fn all(&self) -> &'a [f32] {
        self.data
    }
}

/// A contiguous fp32 CPU matrix that several threads write to, each in columns of its own.
pub(super) struct SharedMatrix<'a> {
    data: SharedSlice<'a, f32>,
    columns: usize,
}

impl<'a> SharedMatrix<'a> {
    /// # Panics
    /// When `tensor` is not a contiguous fp32 matrix on the CPU.
    pub(super) fn new(tensor: &'a Tensor) -> Self {
        let (pointer, rows, columns) = check(tensor);
        Self { data: SharedSlice { pointer, len: rows * columns, borrow: PhantomData }, columns }
    }

    /// # Safety
    /// No two threads may use overlapping columns of the same row at once.
    #[expect(clippy::mut_from_ref, reason = "the point of the type; see Safety")]
    pub(super) unsafe fn row_part(&self, row: usize, first: usize, len: usize) -> &mut [f32] {
        // SAFETY: passed on to the caller.
        unsafe { self.data.part(row * self.columns + first, len) }
    }
}

/// A slice that several threads write to, each in a part of its own.
pub(super) struct SharedSlice<'a, T> {
    pointer: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: `part` is the only access, and its contract forbids overlapping use.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { pointer: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// # Safety
    /// No two threads may use overlapping parts at once.
    #[expect(clippy::mut_from_ref, reason = "the point of the type; see Safety")]
    pub(super) unsafe fn part(&self, first: usize, len: usize) -> &mut [T] {
        assert!(first + len <= self.len, "part lies inside the slice");
        // SAFETY: inside the slice by the assertion, and not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(first), len) }
    }
}

/// Side of the square tiles in which a matrix is transposed: two of them fit the first-level cache.
const TILE: usize = 64;

/// Copies the lower triangle of a square fp32 CPU matrix onto the upper one.
pub(super) fn mirror_lower(matrix: &Tensor) {
    let k = matrix.size()[0] as usize;
    let shared = SharedMatrix::new(matrix);
    (0..k.div_ceil(TILE)).into_par_iter().for_each(|block| {
        let first = block * TILE;
        let end = (first + TILE).min(k);
        for left in (0..=first).step_by(TILE) {
            let right = (left + TILE).min(k);
            for row in first..end {
                for column in left..right.min(row) {
                    // SAFETY: elements below the diagonal are only read, each element above it is written by the one
                    // task that has its column's block.
                    unsafe { shared.row_part(column, row, 1)[0] = shared.row_part(row, column, 1)[0] };
                }
            }
        }
    });
}

/// `Σ product ∘ weight` over the columns before and from `split` on; contiguous bf16 CPU matrices `[N, C]` and `[N, K]`,
/// `C ≤ K`. The result does not depend on the number of threads.
pub(super) fn inner_products_bf16(product: &Tensor, weight: &Tensor, split: usize) -> [f64; 2] {
    fn view(tensor: &Tensor) -> (&[u16], usize) {
        let (pointer, rows, columns) = check_kind::<u16>(tensor, Kind::BFloat16);
        // SAFETY: `check_kind` made sure that `rows·columns` values lie there; the tensor is borrowed meanwhile.
        (unsafe { std::slice::from_raw_parts(pointer, rows * columns) }, columns)
    }
    let ((product, columns), (weight, stride)) = (view(product), view(weight));
    let rows = product.par_chunks(columns).zip(weight.par_chunks(stride));
    let sums = rows.map(|(p, w)| [dot_bf16(&p[..split], w), dot_bf16(&p[split..], &w[split..])]);
    let sums: Vec<[f64; 2]> = sums.collect();
    sums.iter().fold([0.0; 2], |[a, b], [c, d]| [a + c, b + d])
}

/// `Σ a·b` of bf16 bit patterns, as long as `a`.
fn dot_bf16(a: &[u16], b: &[u16]) -> f64 {
    const LANES: usize = 16;
    let wide = |bits: u16| f32::from_bits(u32::from(bits) << 16);
    let mut sums = [0.0f32; LANES];
    let (chunks, rest) = a.as_chunks::<LANES>();
    for (a, b) in chunks.iter().zip(b.as_chunks::<LANES>().0) {
        for lane in 0..LANES {
            sums[lane] += wide(a[lane]) * wide(b[lane]);
        }
    }
    let tail: f64 =
        rest.iter().zip(&b[chunks.len() * LANES..]).map(|(&a, &b)| f64::from(wide(a) * wide(b))).sum();
    sums.iter().map(|&s| f64::from(s)).sum::<f64>() + tail
}

fn check(tensor: &Tensor) -> (*mut f32, usize, usize) {
    check_kind(tensor, Kind::Float)
}

/// Pointer, rows and columns of a contiguous CPU matrix whose elements, of kind `kind`, are as large as `T`.
fn check_kind<T>(tensor: &Tensor, kind: Kind) -> (*mut T, usize, usize) {
    assert_eq!((tensor.kind(), tensor.device()), (kind, Device::Cpu));
    assert_eq!(kind.elt_size_in_bytes(), size_of::<T>());
    assert!(tensor.is_contiguous() && tensor.dim() == 2);
    let size = tensor.size();
    (tensor.data_ptr().cast(), size[0] as usize, size[1] as usize)
}
