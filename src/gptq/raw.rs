//! Views of CPU tensors' memory for several threads. All `unsafe` memory access of this module is in this file.

use std::marker::PhantomData;

use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;
use tch::{Device, Kind, TchError, Tensor};

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
}

/// A slice that several threads write to, each to its own part.
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

/// Some values of a tensor of a floating-point kind.
#[derive(Clone, Copy)]
pub(super) enum Floats<'a> {
    Half(&'a [f16]),
    BFloat16(&'a [bf16]),
    Float(&'a [f32]),
}

impl Floats<'_> {
    /// As fp32.
    pub(super) fn widen(self, to: &mut [f32]) {
        match self {
            Self::Half(values) => values.convert_to_f32_slice(to),
            Self::BFloat16(values) => values.convert_to_f32_slice(to),
            Self::Float(values) => to.copy_from_slice(values),
        }
    }
}

/// Values `first..first + count` of a contiguous CPU matrix of fp16, bf16 or fp32.
pub(super) fn floats(tensor: &Tensor, first: usize, count: usize) -> Floats<'_> {
    fn part<T>(tensor: &Tensor, kind: Kind, first: usize, count: usize) -> &[T] {
        let (pointer, rows, columns) = check_kind::<T>(tensor, kind);
        // SAFETY: `check_kind` made sure that `rows·columns` values lie there; the tensor is borrowed meanwhile.
        let all = unsafe { std::slice::from_raw_parts(pointer.cast_const(), rows * columns) };
        &all[first..first + count]
    }
    match tensor.kind() {
        Kind::Half => Floats::Half(part(tensor, Kind::Half, first, count)),
        Kind::BFloat16 => Floats::BFloat16(part(tensor, Kind::BFloat16, first, count)),
        _ => Floats::Float(part(tensor, Kind::Float, first, count)),
    }
}

/// All values of a contiguous fp32 CPU matrix, to write to. The caller has the only tensor with this memory.
pub(super) fn floats_mut(tensor: &mut Tensor) -> &mut [f32] {
    let (pointer, rows, columns) = check(tensor);
    // SAFETY: `check` made sure that they lie there; the tensor is borrowed for writing meanwhile.
    unsafe { std::slice::from_raw_parts_mut(pointer, rows * columns) }
}

/// All values of a contiguous CPU matrix of some kind, or their bits, to write to. The caller has the only tensor with this
/// memory.
pub(super) fn values_mut<T: bytemuck::Pod>(tensor: &mut Tensor) -> &mut [T] {
    let (pointer, rows, columns) = check_kind::<T>(tensor, tensor.kind());
    // SAFETY: `check_kind` made sure that they lie there and are as large; any bits are a `T`; the tensor is borrowed for
    // writing meanwhile.
    unsafe { std::slice::from_raw_parts_mut(pointer, rows * columns) }
}

/// All values of a contiguous bf16 CPU matrix, as bits.
pub(super) fn bf16_bits(tensor: &Tensor) -> &[u16] {
    let (pointer, rows, columns) = check_kind::<u16>(tensor, Kind::BFloat16);
    // SAFETY: `check_kind` made sure that `rows·columns` values lie there; the tensor is borrowed meanwhile.
    unsafe { std::slice::from_raw_parts(pointer, rows * columns) }
}

/// Some columns of a fp32 or bf16 CPU matrix, in the order given. libtorch's `index_select` copies them with one thread, value by
/// value.
pub(super) fn select_columns(matrix: &Tensor, columns: &[u32]) -> Result<Tensor, TchError> {
    fn select<T: bytemuck::Pod + Send + Sync>(from: &[T], to: &mut [T], width: usize, columns: &[u32]) {
        to.par_chunks_mut(columns.len()).zip(from.par_chunks(width)).for_each(|(to, from)| {
            to.iter_mut().zip(columns).for_each(|(to, &column)| *to = from[column as usize]);
        });
    }
    let matrix = matrix.f_contiguous()?;
    let (rows, width) = (matrix.size()[0], matrix.size()[1] as usize);
    let mut selected = Tensor::f_empty([rows, columns.len() as i64], (matrix.kind(), Device::Cpu))?;
    match matrix.kind() {
        Kind::BFloat16 => select(bf16_bits(&matrix), values_mut::<u16>(&mut selected), width, columns),
        _ => select(Matrix::new(&matrix).data, floats_mut(&mut selected), width, columns),
    }
    Ok(selected)
}

/// Writes the sum of two CPU matrices of fp16, bf16 or fp32 to rows of a fp32 one, from row `first` on. Returns whether all sums are
/// finite.
pub(super) fn add_rows(sums: &mut Tensor, first: usize, a: &Tensor, b: &Tensor) -> Result<bool, TchError> {
    let (a, b) = (a.f_contiguous()?, b.f_contiguous()?);
    let (rows, k) = (a.size()[0] as usize, a.size()[1] as usize);
    let own: Vec<_> = (0..rows).map(|row| [&a, &b].map(|matrix| floats(matrix, row * k, k))).collect();
    let sums = &mut floats_mut(sums)[first * k..][..rows * k];
    let add = |wide: &mut Vec<f32>, (sums, [a, b]): (&mut [f32], [Floats<'_>; 2])| {
        a.widen(sums);
        b.widen(wide);
        sums.iter_mut().zip(wide).for_each(|(sum, value)| *sum += *value);
        largest_bits(sums) < f32::INFINITY.to_bits()
    };
    let finite = sums.par_chunks_mut(k).zip(own).map_init(|| vec![0.0; k], add);
    Ok(finite.reduce(|| true, |a, b| a && b))
}

/// Number of values that are NaN or infinite. libtorch makes a tensor of truth values first; a contiguous fp32 matrix on the CPU is read
/// once instead.
pub(super) fn count_non_finite(values: &Tensor) -> Result<u64, TchError> {
    if (values.kind(), values.device()) != (Kind::Float, Device::Cpu)
        || values.dim() != 2
        || !values.is_contiguous()
    {
        let finite = i64::try_from(values.f_isfinite()?.f_sum(Kind::Int64)?)?;
        return Ok(values.numel() as u64 - finite as u64);
    }
    let (matrix, rows) = (Matrix::new(values), values.size()[0] as usize);
    let count = |row: usize| {
        let row = matrix.row(row);
        match largest_bits(row) < f32::INFINITY.to_bits() {
            true => 0,
            false => row.iter().filter(|value| !value.is_finite()).count() as u64,
        }
    };
    Ok((0..rows).into_par_iter().map(count).sum())
}

/// The largest magnitude as bits: those of infinity or more if a value is not finite.
fn largest_bits(values: &[f32]) -> u32 {
    values.iter().fold(0, |largest, value| largest.max(value.to_bits() & !(1 << 31)))
}

/// `‖M‖²` of a contiguous fp32 CPU matrix, in fp64. Rows are summed one after another, with any number of threads.
pub(super) fn sum_of_squares(matrix: &Tensor) -> f64 {
    let (matrix, rows) = (Matrix::new(matrix), matrix.size()[0] as usize);
    let squares = |row: usize| {
        let (chunks, rest) = matrix.row(row).as_chunks::<8>();
        let mut sums = [0.0f64; 8];
        for chunk in chunks {
            sums.iter_mut().zip(chunk).for_each(|(sum, &value)| *sum += f64::from(value) * f64::from(value));
        }
        sums.iter().sum::<f64>() + rest.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>()
    };
    (0..rows).into_par_iter().map(squares).collect::<Vec<_>>().iter().sum()
}

/// Side of the square tiles in which a matrix is transposed: two of them fit the first-level cache.
const TILE: usize = 64;

/// Copies the lower triangle of a square fp32 CPU matrix onto the upper one.
pub(super) fn mirror_lower(matrix: &mut Tensor) {
    let k = matrix.size()[0] as usize;
    let shared = SharedSlice::new(floats_mut(matrix));
    (0..k.div_ceil(TILE)).into_par_iter().for_each(|block| {
        let first = block * TILE;
        let end = (first + TILE).min(k);
        for left in (0..=first).step_by(TILE) {
            let right = (left + TILE).min(k);
            for row in first..end {
                for column in left..right.min(row) {
                    // SAFETY: elements below the diagonal are only read, each element above it is written by the one
                    // task that has its column's block.
                    unsafe { shared.part(column * k + row, 1)[0] = shared.part(row * k + column, 1)[0] };
                }
            }
        }
    });
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
