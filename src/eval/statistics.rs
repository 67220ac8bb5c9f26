//! Means over windows and their 95% intervals.

use crate::report::Interval;

/// The mean.
pub(super) fn mean(values: &[f64]) -> Interval {
    Interval::new(average(values), margin(values))
}

/// `exp` of the mean, with the interval of first order.
pub(super) fn exponential_of_mean(values: &[f64]) -> Interval {
    let value = average(values).exp();
    Interval::new(value, margin(values).map(|m| m * value))
}

/// `exp(mean a) − exp(mean b)` of paired values, with the interval of first order.
pub(super) fn difference_of_exponentials(a: &[f64], b: &[f64]) -> Interval {
    let (left, right) = (average(a).exp(), average(b).exp());
    let linear: Vec<f64> = a.iter().zip(b).map(|(a, b)| left * a - right * b).collect();
    Interval::new(left - right, margin(&linear))
}

fn average(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Half the 95% interval of the mean; none for a single value.
fn margin(values: &[f64]) -> Option<f64> {
    let n = values.len();
    if n < 2 {
        return None;
    }
    let centre = average(values);
    let variance = values.iter().map(|v| (v - centre).powi(2)).sum::<f64>() / (n - 1) as f64;
    Some(student(n - 1) * (variance / n as f64).sqrt())
}

/// The 97.5% quantile of Student's t with `freedom` degrees, by the Cornish–Fisher expansion about the normal
/// quantile (Abramowitz and Stegun 26.7.5); the first degrees, where it is poor, are listed.
fn student(freedom: usize) -> f64 {
    const FIRST: [f64; 6] = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447];
    if let Some(&listed) = FIRST.get(freedom - 1) {
        return listed;
    }
    let (z, v) = (1.959_964_f64, freedom as f64);
    let g1 = (z.powi(3) + z) / 4.0;
    let g2 = (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / 96.0;
    let g3 = (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / 384.0;
    z + g1 / v + g2 / (v * v) + g3 / (v * v * v)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn student_quantiles_are_those_of_the_tables() {
        for (freedom, quantile) in [(1, 12.706), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)] {
            assert!((student(freedom) - quantile).abs() < 2e-3, "{freedom}: {}", student(freedom));
        }
    }

    #[test]
    fn intervals() {
        let Interval { value, margin } = mean(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(value, 3.5);
        // sd 1.8708, n 6, t 2.571.
        assert!((margin.unwrap() - 1.963).abs() < 3e-3);
        assert_eq!(mean(&[2.0]).margin, None);
        assert_eq!(exponential_of_mean(&[0.0, 0.0]).value, 1.0);
        // Pairing removes what both have in common.
        let paired = difference_of_exponentials(&[1.1, 2.1, 3.1], &[1.0, 2.0, 3.0]);
        assert!(paired.margin.unwrap() < exponential_of_mean(&[1.1, 2.1, 3.1]).margin.unwrap() / 5.0);
    }
}
