//! Checks whether a GPU's tensor cores, which sum products of fp16 and bf16 in fp32, are exact enough for Hessians. They are
//! measured against fp64 on the first batch of each shape.

use std::sync::{Mutex, PoisonError};

use tch::{Device, Kind, TchError, Tensor};

/// Largest error of an element of `H`, relative to `√(H_ii H_jj)`, that has no effect on codes.
///
/// Rounding errors of different elements are independent. So the norm of the error matrix is about `2√K` times a typical error,
/// which is at most a quarter of the largest. For `K` = 11008 that is a thousandth of the mean diagonal, a tenth of the default
/// damping, and hardly changes solutions. Results rounded to fp16 or bf16, and sums in fp16, are far less exact.
const TOLERANCE: f64 = 2e-5;

/// Rows of each block that are compared with fp64.
const ROWS: i64 = 16;

/// A device, `K`, and the inputs' kind.
type Shape = (Device, i64, Kind);

/// Shapes that were judged, and whether tensor cores were exact enough.
static JUDGED: Mutex<Vec<(Shape, bool)>> = Mutex::new(Vec::new());

fn shape(x: &Tensor) -> Shape {
    (x.device(), x.size()[1], x.kind())
}

fn judgement(x: &Tensor) -> Option<bool> {
    let judged = JUDGED.lock().unwrap_or_else(PoisonError::into_inner);
    judged.iter().find(|(s, _)| *s == shape(x)).map(|(_, exact)| *exact)
}

/// Whether to multiply inputs `[T, K]` on tensor cores: they are fp16 or bf16 on CUDA, and their shape was not found inexact.
pub(super) fn can_multiply(x: &Tensor) -> bool {
    x.device().is_cuda() && [Kind::Half, Kind::BFloat16].contains(&x.kind()) && judgement(x) != Some(false)
}

/// Whether inputs of this shape were judged before.
pub(super) fn is_known(x: &Tensor) -> bool {
    judgement(x).is_some()
}

/// The largest error of `matrix` `[K, K]` against `xᵀx` in fp64, relative to `√(H_ii H_jj)`. It looks at some rows of each
/// block of `block` rows, on and below the diagonal blocks. `x` is `[T, K]`.
pub(super) fn largest_error(matrix: &Tensor, x: &Tensor, block: i64) -> Result<f64, TchError> {
    let k = x.size()[1];
    let mut largest = 0.0f64;
    for start in (0..k).step_by(block as usize) {
        let rows = block.min(k - start);
        // Evenly spread, with the last row among them.
        let count = ROWS.min(rows);
        let sample: Vec<i64> = (1..=count).map(|i| i * rows / count - 1).collect();
        let sample = Tensor::f_from_slice(&sample)?.f_to_device(x.device())?;
        let found =
            matrix.f_narrow(0, start, rows)?.f_narrow(1, 0, start + rows)?.f_index_select(0, &sample)?;
        let right = x.f_narrow(1, 0, start + rows)?.f_to_kind(Kind::Double)?;
        let left = right.f_narrow(1, start, rows)?.f_index_select(1, &sample)?;
        let exact = left.f_tr()?.f_mm(&right)?;
        let length = |t: &Tensor| {
            t.f_square()?
                .f_sum_dim_intlist([0i64].as_slice(), false, Kind::Double)?
                .f_sqrt()?
                .f_clamp_min(f64::MIN_POSITIVE)
        };
        let error = found.f_to_kind(Kind::Double)?.f_sub(&exact)?.f_abs()?;
        let relative = error.f_div(&length(&left)?.f_unsqueeze(1)?)?.f_div(&length(&right)?)?;
        let error = f64::try_from(relative.f_max()?)?;
        // NaN stays.
        largest = if error > largest || error.is_nan() { error } else { largest };
    }
    Ok(largest)
}

/// Records whether inputs of this shape are multiplied exactly enough, and returns a warning if they are not. NaN is not
/// recorded: its inputs are refused when the Hessian is finished.
pub(super) fn judge(x: &Tensor, error: f64) -> Option<String> {
    if error.is_nan() {
        return None;
    }
    let exact = error <= TOLERANCE;
    JUDGED.lock().unwrap_or_else(PoisonError::into_inner).push((shape(x), exact));
    (!exact).then(|| {
        format!(
            "Hessians of {} {:?} inputs: tensor cores are off by {error:.1e}, more than {TOLERANCE:.0e}; multiplied in \
             plain fp32 instead",
            x.size()[1],
            x.kind()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// fp32 passes by a margin; a result rounded to bf16 or fp16, or one missing token, does not.
    #[test]
    fn the_check_sees_what_would_do_harm() {
        tch::manual_seed(0);
        let (tokens, k, block) = (512, 160, 64);
        let sizes = (Tensor::randn([k], (Kind::Float, Device::Cpu)) * 0.7).exp();
        let x = (Tensor::randn([tokens, k], (Kind::Float, Device::Cpu)) * sizes).to_kind(Kind::BFloat16);
        let wide = x.to_kind(Kind::Float);
        let fp32 = wide.tr().mm(&wide);
        let error = |matrix: &Tensor| largest_error(matrix, &x, block).unwrap();
        assert!(error(&fp32) < TOLERANCE / 10.0, "{}", error(&fp32));
        let bf16 = fp32.to_kind(Kind::BFloat16).to_kind(Kind::Float);
        let fp16 = (&fp32 / 1024.0).to_kind(Kind::Half).to_kind(Kind::Float) * 1024.0;
        let fewer = wide.narrow(0, 0, tokens - 1);
        for (name, matrix) in [("bf16", bf16), ("fp16", fp16), ("a token", fewer.tr().mm(&fewer))] {
            assert!(error(&matrix) > 5.0 * TOLERANCE, "{name}: {}", error(&matrix));
        }
        // Only the lower block triangle counts, up to its last row.
        let _ = fp32.narrow(0, 0, 64).narrow(1, 64, 96).fill_(f64::NAN);
        assert!(error(&fp32) < TOLERANCE);
        let _ = fp32.narrow(0, k - 1, 1).narrow(1, 3, 1).fill_(f64::NAN);
        assert!(error(&fp32).is_nan());
    }

    #[test]
    fn a_shape_is_judged_once_and_numbers_only() {
        let x = Tensor::zeros([1, 77], (Kind::BFloat16, Device::Cpu));
        assert_eq!((judge(&x, f64::NAN), is_known(&x)), (None, false));
        let warning = judge(&x, 1e-3).unwrap();
        assert!(
            warning.starts_with("Hessians of 77 BFloat16 inputs: tensor cores are off by 1.0e-3"),
            "{warning}"
        );
        assert!(is_known(&x) && judgement(&x) == Some(false));
        let other = Tensor::zeros([1, 78], (Kind::BFloat16, Device::Cpu));
        assert_eq!((judge(&other, 1e-6), judgement(&other)), (None, Some(true)));
    }
}
