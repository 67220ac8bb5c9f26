//! Cholesky factorization in place, and division by its factor, block by block.
//!
//! libtorch's own factorization works on a column-major copy and clears its upper triangle element by element, which takes as long
//! as the factorization; its substitution needs a second matrix, and has no products in bf16. Here all cubic work is libtorch's matrix
//! product.

use tch::{Kind, TchError, Tensor};

use crate::{
    amx::{self, Parts, Shape},
    gptq::raw,
    products,
};

/// Columns factorized together. Of products with inverses of blocks on the diagonal half are with zeros, so that narrow blocks save work.
/// The matrix unit needs wide ones.
fn block() -> i64 {
    if amx::available() { 768 } else { 384 }
}

/// Replaces the lower triangle of `matrix` `[K, K]`, row-major, by `L`; `L Lᵀ` is the symmetric matrix with that triangle. False, with the
/// content destroyed, when that is not positive definite. What lies above the diagonal is neither read, outside the blocks on the
/// diagonal, nor left as it was.
///
/// The products of all earlier columns are subtracted from a block together, so that it is written once. With `amx` those of each block
/// are subtracted behind it, so that values are laid out once. They have two bf16 parts: their error, 2⁻¹⁶ of the diagonal, is far below
/// the damping.
pub(super) fn in_place(matrix: &Tensor, amx: bool) -> Result<bool, TchError> {
    let k = matrix.size()[0];
    let (part, block) = (part_of(matrix), block());
    for start in (0..k).step_by(block as usize) {
        let width = block.min(k - start);
        if !amx && start > 0 {
            // A_ij −= Σ_{m<j} L_im L_jmᵀ for all rows from the corner on.
            let right = part(start, width, 0, start)?.f_neg()?.f_tr()?;
            let _ =
                part(start, k - start, start, width)?.f_addmm_(&part(start, k - start, 0, start)?, &right)?;
        }
        let mut corner = part(start, width, start, width)?;
        let (lower, info) = corner.f_linalg_cholesky_ex(false, false)?;
        if i64::try_from(info)? != 0 {
            return Ok(false);
        }
        corner.f_copy_(&lower)?;
        let below = start + width;
        if below == k {
            break;
        }
        // L_ij = A_ij L_jj⁻ᵀ for all blocks below the corner.
        let inverse = inverse(&lower)?;
        let mut panel = part(below, k - below, start, width)?;
        let solved = panel.f_mm(&inverse.f_tr()?)?;
        panel.f_copy_(&solved)?;
        if amx {
            // A_im −= L_ij L_mjᵀ for below ≤ m ≤ i.
            let mut rest = part(below, k - below, below, k - below)?;
            products::add_product(
                &mut rest,
                &solved.f_neg()?,
                &solved.f_tr()?,
                Parts::Two,
                Shape::Lower { first_row: 0 },
            )?;
        }
    }
    Ok(true)
}

/// `b (L Lᵀ)⁻¹` of the `columns` of `b` `[N, K]`, fp32 and row-major, in the order given, with `L` from [`in_place`]. What is
/// multiplied, and the result, are of kind `products`.
pub(super) fn divide(
    b: &Tensor,
    columns: &[u32],
    lower: &Tensor,
    products: Kind,
) -> Result<Tensor, TchError> {
    let k = lower.size()[0];
    let (part, block) = (part_of(lower), block());
    let corner = |start: i64| {
        let width = block.min(k - start);
        let inverse = inverse(&part(start, width, start, width)?)?.f_neg_()?;
        Ok((start, width, inverse.f_to_kind(products)?))
    };
    let corners: Vec<_> = (0..k).step_by(block as usize).map(corner).collect::<Result<_, TchError>>()?;
    // −Y, then Z, as far as they are computed.
    let mut done = products::Columns::new([b.size()[0], k], products)?;
    // −Y with Y Lᵀ = B, from the first block on: −Y_j = (B_j + Σ_{i<j} −Y_i L_jiᵀ) · −L_jj⁻ᵀ.
    for (start, width, negative_inverse) in &corners {
        let mut own = raw::select_columns(b, &columns[*start as usize..(start + width) as usize])?;
        if *start > 0 {
            done.add_product(&mut own, &(0..*start), &part(*start, *width, 0, *start)?.f_tr()?)?;
        }
        let y = products::Weight::new(negative_inverse)?.linear(&own.f_to_kind(products)?, None)?;
        done.set(*start, &y)?;
    }
    // Z with Z L = Y, from the last block on: Z_j = (−Y_j + Σ_{i>j} Z_i L_ij) · −L_jj⁻¹.
    for (start, width, negative_inverse) in corners.iter().rev() {
        let end = start + width;
        let mut sum = done.get(&(*start..end))?.f_to_kind(Kind::Float)?;
        if end < k {
            done.add_product(&mut sum, &(end..k), &part(end, k - end, *start, *width)?)?;
        }
        let z = products::Weight::new(&negative_inverse.f_tr()?)?.linear(&sum.f_to_kind(products)?, None)?;
        done.set(*start, &z)?;
    }
    Ok(done.into_matrix())
}

/// Views of blocks of a matrix: first row, rows, first column, columns.
fn part_of(matrix: &Tensor) -> impl Fn(i64, i64, i64, i64) -> Result<Tensor, TchError> + '_ {
    |row, rows, column, columns| matrix.f_narrow(0, row, rows)?.f_narrow(1, column, columns)
}

/// The inverse of a block of `L` on the diagonal. To multiply by it is as exact here as substitution, since damping bounds its condition,
/// and runs at the speed of a product.
fn inverse(corner: &Tensor) -> Result<Tensor, TchError> {
    let identity = Tensor::f_eye(corner.size()[0], (corner.kind(), corner.device()))?;
    corner.f_linalg_solve_triangular(&identity, false, true, false)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// Columns of several blocks.
    const K: i64 = 2 * 768 + 100;

    /// A positive definite matrix `[K, K]` fp64.
    fn positive_definite() -> Tensor {
        tch::manual_seed(0);
        let x = Tensor::randn([K, 2 * K], (Kind::Double, Device::Cpu));
        x.matmul(&x.tr()) / (2 * K) as f64
    }

    #[test]
    fn agrees_with_libtorch_on_several_blocks() {
        let matrix = positive_definite();
        let expected = matrix.linalg_cholesky(false);
        for amx in [false, true] {
            let found = matrix.to_kind(Kind::Float);
            assert!(in_place(&found, amx).unwrap());
            let difference = (found.tril(0).to_kind(Kind::Double) - &expected).abs().max();
            assert!(difference.double_value(&[]) < 1e-4, "{amx}: {difference:?}");
        }
    }

    #[test]
    fn divides_by_several_blocks() {
        let matrix = positive_definite();
        let lower = matrix.to_kind(Kind::Float);
        assert!(in_place(&lower, false).unwrap());
        let b = Tensor::randn([70, K], (Kind::Float, Device::Cpu));
        // bf16 has 8 bits, so that the result is rounded by up to 1/256. The largest of 70 K errors is some times the usual one.
        for (products, tolerance) in [(Kind::Float, 1e-4), (Kind::BFloat16, 0.15)] {
            let columns: Vec<u32> = (0..K as u32).rev().collect();
            let found = divide(&b.flip([1]), &columns, &lower, products).unwrap();
            assert_eq!(found.kind(), products);
            let difference = (found.to_kind(Kind::Double).mm(&matrix) - &b).abs().max();
            assert!(difference.double_value(&[]) < tolerance, "{products:?}: {difference:?}");
        }
    }

    #[test]
    fn says_when_the_matrix_is_not_positive_definite() {
        let k = block() + 50;
        let matrix = Tensor::eye(k, (Kind::Float, Device::Cpu));
        let _ = matrix.narrow(0, block() + 10, 1).narrow(1, block() + 10, 1).fill_(-1.0);
        assert!(!in_place(&matrix, false).unwrap());
    }
}
