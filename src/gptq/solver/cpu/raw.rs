//! Views of tensor memory for the threads of the solver; the only `unsafe` about memory there.

use std::marker::PhantomData;

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

fn check(tensor: &Tensor) -> (*mut f32, usize, usize) {
    assert_eq!((tensor.kind(), tensor.device()), (Kind::Float, Device::Cpu));
    assert!(tensor.is_contiguous() && tensor.dim() == 2);
    let size = tensor.size();
    (tensor.data_ptr().cast(), size[0] as usize, size[1] as usize)
}
