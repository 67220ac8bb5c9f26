//! Cholesky factorization in place, block by block.
//!
//! libtorch's own works on a column-major copy and clears its upper triangle element by element, which takes as long
//! as the factorization; this one leaves all cubic work to libtorch's matrix product and needs no second matrix.

use tch::{TchError, Tensor};

/// Columns factorized together.
const BLOCK: i64 = 768;

/// Replaces the lower triangle of `matrix` `[K, K]`, row-major, by `L`; `L Lᵀ` is the symmetric matrix with that triangle.
/// False, with the content destroyed, when that is not positive definite. What lies above the diagonal is neither read, outside
/// the blocks on the diagonal, nor left as it was.
pub(super) fn in_place(matrix: &Tensor) -> Result<bool, TchError> {
    let k = matrix.size()[0];
    let part = |row: i64, rows: i64, column: i64, columns: i64| {
        matrix.f_narrow(0, row, rows)?.f_narrow(1, column, columns)
    };
    for start in (0..k).step_by(BLOCK as usize) {
        let width = BLOCK.min(k - start);
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
        // L_ij = A_ij L_jj⁻ᵀ for all blocks below the corner. Inverting the small triangle and multiplying is as exact
        // here as substitution, since damping bounds its condition, and runs at the speed of a product.
        let identity = Tensor::f_eye(width, (matrix.kind(), matrix.device()))?;
        let inverse = lower.f_linalg_solve_triangular(&identity, false, true, false)?;
        let mut panel = part(below, k - below, start, width)?;
        let solved = panel.f_mm(&inverse.f_tr()?)?;
        panel.f_copy_(&solved)?;
        let negative = solved.f_neg()?;
        // A_im −= L_ij L_mjᵀ for below ≤ m ≤ i.
        for row in (below..k).step_by(BLOCK as usize) {
            let rows = BLOCK.min(k - row);
            let left = negative.f_narrow(0, row - below, rows)?;
            let right = part(below, row + rows - below, start, width)?.f_tr()?;
            let mut target = part(row, rows, below, row + rows - below)?;
            let _ = target.f_addmm_(&left, &right)?;
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn agrees_with_libtorch_on_several_blocks() {
        let k = 2 * BLOCK + 100;
        tch::manual_seed(0);
        let x = Tensor::randn([k, 2 * k], (Kind::Double, Device::Cpu));
        let matrix = x.matmul(&x.tr()) / (2 * k) as f64;
        let expected = matrix.linalg_cholesky(false);
        let found = matrix.to_kind(Kind::Float);
        assert!(in_place(&found).unwrap());
        let difference = (found.tril(0).to_kind(Kind::Double) - expected).abs().max();
        assert!(difference.double_value(&[]) < 1e-4, "{difference:?}");
    }

    #[test]
    fn says_when_the_matrix_is_not_positive_definite() {
        let k = BLOCK + 50;
        let matrix = Tensor::eye(k, (Kind::Float, Device::Cpu));
        let _ = matrix.narrow(0, BLOCK + 10, 1).narrow(1, BLOCK + 10, 1).fill_(-1.0);
        assert!(!in_place(&matrix).unwrap());
    }
}
