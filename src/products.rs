//! Products of libtorch's tensors on the CPU, by [`crate::amx`] where the processor has a matrix unit.

use std::ops::Range;

use tch::{Device, Kind, TchError, Tensor};

use crate::amx::{
    Operand, Parts, Shape, Side, Sums, Values, View, add_rows_product, available, multiply, multiply_by,
};

/// A weight `[N, K]` in the layout in which this machine multiplies it fastest.
#[derive(Debug)]
pub struct Weight(Layout);

#[derive(Debug)]
enum Layout {
    /// Possibly a transposed view.
    Plain(Tensor),
    /// bf16 on the CPU, for the matrix unit.
    Strips { operand: Operand, size: [i64; 2] },
}

impl Weight {
    /// Of a matrix on any device, of any kind.
    ///
    /// # Errors
    /// When memory is exhausted.
    pub fn new(matrix: &Tensor) -> Result<Self, TchError> {
        match (matrix.kind(), matrix.device()) == (Kind::BFloat16, Device::Cpu) && available() {
            true => Self::in_strips(matrix),
            false => Ok(Self(Layout::Plain(matrix.shallow_clone()))),
        }
    }

    fn in_strips(matrix: &Tensor) -> Result<Self, TchError> {
        let size = [matrix.size()[0], matrix.size()[1]];
        let matrix = with_unit_stride(matrix)?;
        let operand = Operand::new(view(&matrix).transposed(), Side::Right, Parts::One);
        Ok(Self(Layout::Strips { operand, size }))
    }

    /// `x Wᵀ + bias`: `x` `[…, K]` → `[…, N]`, of the weight's kind and device. bf16 is rounded from fp32 sums.
    ///
    /// # Errors
    /// When memory is exhausted, or sizes contradict each other.
    pub fn linear(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, TchError> {
        let (operand, [n, k]) = match &self.0 {
            Layout::Plain(weight) => return x.f_linear(weight, bias),
            Layout::Strips { operand, size } => (operand, *size),
        };
        let mut size = x.size();
        let x = x.f_reshape([-1, k])?.f_contiguous()?;
        let product = Tensor::f_empty([x.size()[0], n], (Kind::BFloat16, Device::Cpu))?;
        // SAFETY: a new contiguous tensor of bf16, which has no other user yet.
        let values = unsafe { std::slice::from_raw_parts_mut(product.data_ptr().cast(), product.numel()) };
        multiply_by(view(&x), operand, n as usize, values);
        *size.last_mut().expect("an axis of features") = n;
        let product = product.f_view(size.as_slice())?;
        match bias {
            Some(bias) => product.f_add(bias),
            None => Ok(product),
        }
    }
}

/// A matrix `[M, D]` on the CPU whose columns are computed block by block, each by a product with those that are known. On the matrix
/// unit each block is laid out once for all these products.
#[derive(Debug)]
pub struct Columns {
    matrix: Tensor,
    /// The matrix in bf16, transposed.
    operand: Option<Operand>,
}

impl Columns {
    /// Without values yet.
    ///
    /// # Errors
    /// When memory is exhausted.
    pub fn new([m, depth]: [i64; 2], kind: Kind) -> Result<Self, TchError> {
        let matrix = Tensor::f_empty([m, depth], (kind, Device::Cpu))?;
        let laid_out = kind == Kind::BFloat16 && available();
        let operand = laid_out.then(|| Operand::zeros(depth as usize, m as usize, Parts::One));
        Ok(Self { matrix, operand })
    }

    /// Sets some columns, `[M, …]` of the matrix's kind. The first has a multiple of [`crate::amx::SIDE`] as its number.
    ///
    /// # Errors
    /// When sizes contradict each other.
    pub fn set(&mut self, first: i64, values: &Tensor) -> Result<(), TchError> {
        self.matrix.f_narrow(1, first, values.size()[1])?.f_copy_(values)?;
        if let Some(operand) = &mut self.operand {
            let values = with_unit_stride(values)?;
            operand.set_rows(first as usize, view(&values).transposed(), Side::Left);
        }
        Ok(())
    }

    /// Some columns.
    ///
    /// # Errors
    /// When there are fewer.
    pub fn get(&self, columns: &Range<i64>) -> Result<Tensor, TchError> {
        self.matrix.f_narrow(1, columns.start, columns.end - columns.start)
    }

    /// Adds the product of some columns, as in [`Columns::set`], with `right` `[D, N]` in fp32 to `sums` `[M, N]` fp32, whose columns are
    /// contiguous.
    ///
    /// # Errors
    /// When memory is exhausted.
    pub fn add_product(
        &self,
        sums: &mut Tensor,
        columns: &Range<i64>,
        right: &Tensor,
    ) -> Result<(), TchError> {
        let Some(operand) = &self.operand else {
            let (left, kind) = (self.get(columns)?, self.matrix.kind());
            return match kind {
                Kind::Float => sums.f_addmm_(&left, right).map(drop),
                _ => sums.f_add_(&left.f_mm(&right.f_to_kind(kind)?)?).map(drop),
            };
        };
        let right = with_unit_stride(right)?;
        let (m, own) = (sums.size()[0] as usize, columns.start as usize..columns.end as usize);
        add_rows_product((operand, own), view(&right), rows_mut(sums), m);
        Ok(())
    }

    /// The whole matrix.
    pub fn into_matrix(self) -> Tensor {
        self.matrix
    }
}

/// `sums += left · right`, of `[M, D]` and `[D, N]` in fp32 or bf16, with each fp32 value in `parts`; `sums` `[M, N]` fp32, whose columns
/// are contiguous. Of a `Lower` shape only the part on and below the diagonal. Neither operand is a view of the memory of `sums`.
///
/// # Errors
/// When memory is exhausted.
///
/// # Panics
/// When the sizes or kinds contradict this.
pub fn add_product(
    sums: &mut Tensor,
    left: &Tensor,
    right: &Tensor,
    parts: Parts,
    shape: Shape,
) -> Result<(), TchError> {
    let (left, right) = (with_unit_stride(left)?, with_unit_stride(right)?);
    let [m, n] = two(&sums.size());
    assert!(view(&left).size()[0] == m && view(&right).size()[1] == n, "[M, N]");
    let (values, stride) = rows_mut(sums);
    multiply(view(&left), view(&right), parts, Sums { values, stride, add: true, shape });
    Ok(())
}

/// The memory of a matrix in fp32 on the CPU, and the values from one row to the next. Nothing else uses its memory, nor what lies between
/// its rows, while the slice is there.
///
/// # Panics
/// When its columns are not contiguous.
fn rows_mut(matrix: &mut Tensor) -> (&mut [f32], usize) {
    let ([m, n], [row, column]) = (two(&matrix.size()), two(&matrix.stride()));
    assert_eq!((matrix.kind(), matrix.device()), (Kind::Float, Device::Cpu));
    if m == 0 || n == 0 {
        return (&mut [], row);
    }
    assert!(column == 1 && row >= n, "columns are contiguous");
    // SAFETY: the first of `m` rows of `n` floats lies at the pointer, and they are `row` floats apart. The matrix is borrowed for
    // writing.
    (unsafe { std::slice::from_raw_parts_mut(matrix.data_ptr().cast(), (m - 1) * row + n) }, row)
}

fn two(numbers: &[i64]) -> [usize; 2] {
    let [a, b] = numbers else { panic!("a matrix has two axes") };
    [*a as usize, *b as usize]
}

fn with_unit_stride(matrix: &Tensor) -> Result<Tensor, TchError> {
    match matrix.stride().contains(&1) {
        true => Ok(matrix.shallow_clone()),
        false => matrix.f_contiguous(),
    }
}

/// # Panics
/// When the tensor is not a matrix of fp32 or bf16 on the CPU with a stride of 1.
fn view(matrix: &Tensor) -> View<'_> {
    assert_eq!(matrix.device(), Device::Cpu);
    let (size, strides) = (two(&matrix.size()), two(&matrix.stride()));
    let count =
        if size.contains(&0) { 0 } else { (size[0] - 1) * strides[0] + (size[1] - 1) * strides[1] + 1 };
    let pointer = matrix.data_ptr();
    // SAFETY: the last value of the matrix lies `count - 1` values behind the first, in the tensor's memory, which is borrowed.
    let values = unsafe {
        match matrix.kind() {
            Kind::BFloat16 => Values::BFloat16(std::slice::from_raw_parts(pointer.cast(), count)),
            Kind::Float => Values::Float(std::slice::from_raw_parts(pointer.cast(), count)),
            kind => panic!("a product of {kind:?}"),
        }
    };
    View::new(values, size, strides)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(size: [i64; 2], seed: i64) -> Tensor {
        tch::manual_seed(seed);
        Tensor::randn(size, (Kind::Float, Device::Cpu))
    }

    #[test]
    fn weights_multiply_as_libtorchs_do() {
        let x = random([2 * 37, 100], 1).view([2, 37, 100]);
        for weight in [random([50, 100], 2), random([100, 50], 3).tr()] {
            let expected = x.to_kind(Kind::BFloat16).to_kind(Kind::Double);
            let expected = expected.matmul(&weight.to_kind(Kind::BFloat16).to_kind(Kind::Double).tr());
            let laid_out = Weight::in_strips(&weight.to_kind(Kind::BFloat16)).unwrap();
            let found = laid_out.linear(&x.to_kind(Kind::BFloat16), None).unwrap();
            assert_eq!((found.size(), found.kind()), (vec![2, 37, 50], Kind::BFloat16));
            let off = (found.to_kind(Kind::Double) - &expected).abs() / (expected.abs() + 1.0);
            assert!(off.max().double_value(&[]) < 1.0 / 256.0, "{off}");
        }
    }

    /// Numbers that are not finite must not become finite ones.
    #[test]
    fn what_is_not_finite_stays_so() {
        let weight = Weight::in_strips(&random([40, 64], 4).to_kind(Kind::BFloat16)).unwrap();
        for value in [f64::NAN, f64::INFINITY] {
            let x = random([33, 64], 5).to_kind(Kind::BFloat16);
            let _ = x.get(7).narrow(0, 3, 1).fill_(value);
            let rows = weight.linear(&x, None).unwrap().isfinite().all_dim(1, false);
            assert_eq!((0..33).filter(|&row| rows.int64_value(&[row]) == 0).collect::<Vec<_>>(), [7]);
        }
    }

    #[test]
    fn products_are_added_to_a_part_of_a_matrix() {
        let (left, right) = (random([70, 300], 6), random([45, 300], 7).tr());
        let matrix = random([100, 100], 8);
        let expected = matrix.copy();
        let _ = expected.narrow(0, 20, 70).narrow(1, 30, 45).g_add_(&left.mm(&right));
        let mut part = matrix.narrow(0, 20, 70).narrow(1, 30, 45);
        add_product(&mut part, &left, &right, Parts::Two, Shape::Full).unwrap();
        assert!((matrix - expected).abs().max().double_value(&[]) < 2e-3);
    }
}
