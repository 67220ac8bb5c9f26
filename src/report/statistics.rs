//! Means over windows, weighted by their tokens, with their 95% intervals.

use super::Interval;

/// The weighted mean.
pub fn mean(values: &[f64], weights: &[usize]) -> Interval {
    let centre = average(values, weights);
    interval(centre, values.iter().map(|v| v - centre), weights)
}

/// `exp` of the mean, with the interval of first order.
pub fn exponential_of_mean(values: &[f64], weights: &[usize]) -> Interval {
    let centre = average(values, weights);
    interval(centre.exp(), values.iter().map(|v| centre.exp() * (v - centre)), weights)
}

/// `exp(mean a) − exp(mean b)` of paired values, with the interval of first order.
pub fn difference_of_exponentials(a: &[f64], b: &[f64], weights: &[usize]) -> Interval {
    let (left, right) = (average(a, weights), average(b, weights));
    let influences = a.iter().zip(b).map(|(a, b)| left.exp() * (a - left) - right.exp() * (b - right));
    interval(left.exp() - right.exp(), influences, weights)
}

/// `mean a − mean b` of paired values.
pub fn difference_of_means(a: &[f64], b: &[f64], weights: &[usize]) -> Interval {
    let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    mean(&differences, weights)
}

/// The smallest of the values that `share` of all do not exceed; NaN of none.
pub fn quantile(mut values: Vec<f32>, share: f64) -> f64 {
    if values.is_empty() {
        return f64::NAN;
    }
    let rank = ((values.len() as f64 * share).ceil() as usize).clamp(1, values.len());
    let (_, value, _) = values.select_nth_unstable_by(rank - 1, f32::total_cmp);
    f64::from(*value)
}

fn average(values: &[f64], weights: &[usize]) -> f64 {
    let total: usize = weights.iter().sum();
    values.iter().zip(weights).map(|(v, &w)| v * w as f64).sum::<f64>() / total as f64
}

/// `value` with half its 95% interval. It is the standard error of a ratio of sums over windows, from each window's influence
/// on it (`influences`, whose weighted sum is zero). No margin for a single window.
fn interval(value: f64, influences: impl Iterator<Item = f64>, weights: &[usize]) -> Interval {
    let n = weights.len();
    if n < 2 {
        return Interval { value, margin: None };
    }
    let mean_weight = weights.iter().sum::<usize>() as f64 / n as f64;
    let squares: f64 = influences.zip(weights).map(|(d, &w)| (d * w as f64 / mean_weight).powi(2)).sum();
    let variance = squares / (n - 1) as f64;
    Interval { value, margin: Some(student(n - 1) * (variance / n as f64).sqrt()) }
}

/// The 97.5% quantile of Student's t with `freedom` degrees, by the Cornish–Fisher expansion about the normal quantile
/// (Abramowitz and Stegun 26.7.5). Small degrees, where it is poor, are in a table.
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
        let Interval { value, margin } = mean(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[9; 6]);
        assert_eq!(value, 3.5);
        // sd 1.8708, n 6, t 2.571.
        assert!((margin.unwrap() - 1.963).abs() < 3e-3);
        assert_eq!(mean(&[2.0], &[1]).margin, None);
        assert_eq!(exponential_of_mean(&[0.0, 0.0], &[1, 1]).value, 1.0);
        // Pairing removes what both have in common.
        let paired = difference_of_exponentials(&[1.1, 2.1, 3.1], &[1.0, 2.0, 3.0], &[1; 3]);
        let alone = exponential_of_mean(&[1.1, 2.1, 3.1], &[1; 3]);
        assert!(paired.margin.unwrap() < alone.margin.unwrap() / 5.0);
        let means = difference_of_means(&[1.5, 2.5, 3.5], &[1.0, 2.0, 3.0], &[1; 3]);
        assert_eq!((means.value, means.margin), (0.5, Some(0.0)));
    }

    #[test]
    fn windows_count_by_their_tokens() {
        assert_eq!(mean(&[1.0, 4.0], &[2, 1]).value, 2.0);
        assert_eq!(mean(&[1.0, 4.0], &[5, 0]).value, 1.0);
    }

    #[test]
    fn quantiles_are_values_that_occur() {
        let values: Vec<f32> = (1..=200).rev().map(|v| v as f32).collect();
        assert_eq!(quantile(values.clone(), 0.99), 198.0);
        assert_eq!(quantile(values.clone(), 1.0), 200.0);
        assert_eq!(quantile(values, 0.0), 1.0);
        assert!(quantile(Vec::new(), 0.5).is_nan());
    }
}
