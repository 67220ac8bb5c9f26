//! Which of several quantized models to take.

use serde::Serialize;

use super::{Entry, Interval, statistics::difference_of_means};

/// The smaller file may be this many times as far from the unquantized model as the closest one.
pub const FACTOR: f64 = 2.0;

/// Which to take, by position among the entries.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recommendation {
    /// Smallest mean KL divergence; of those that cannot be told from that by paired windows, the smallest file.
    pub closest: usize,
    /// Those that cannot be told from the smallest mean KL divergence, `closest` left out.
    pub as_close: Vec<usize>,
    /// The smallest file with at most [`FACTOR`] times that divergence, where it is smaller than the closest.
    pub smaller: Option<usize>,
    /// The closest of those that every reader takes that takes any of them, where `closest` is refused by one.
    pub everywhere: Option<usize>,
}

impl Recommendation {
    /// None where nothing was measured. `window_tokens` are the weights of the first protocol's windows.
    pub fn new(entries: &[Entry], window_tokens: &[usize]) -> Option<Self> {
        let kl = |i: &usize| entries[*i].kl().unwrap_or(f64::INFINITY);
        let measured: Vec<usize> =
            (0..entries.len()).filter(|&i| entries[i].kl().is_some_and(f64::is_finite)).collect();
        let best = *measured.iter().min_by(|a, b| kl(a).total_cmp(&kl(b)))?;
        let alike = |i: &usize| {
            let (a, b) = (entries[*i].main(), entries[best].main());
            let (Some(a), Some(b)) = (a, b) else { return false };
            let Interval { value, margin } = difference_of_means(&a.window_kl, &b.window_kl, window_tokens);
            margin.is_some_and(|margin| value <= margin)
        };
        let mut close: Vec<usize> = measured.iter().copied().filter(|i| *i == best || alike(i)).collect();
        let size = |i: &usize| entries[*i].checkpoint.bytes;
        close.sort_by(|a, b| size(a).cmp(&size(b)).then(kl(a).total_cmp(&kl(b))));
        let closest = close.remove(0);

        let smaller = measured.iter().copied().filter(|i| kl(i) <= FACTOR * kl(&best));
        let smaller = smaller.min_by(|a, b| size(a).cmp(&size(b)).then(kl(a).total_cmp(&kl(b))));
        let smaller = smaller.filter(|i| size(i) < size(&closest));

        let refusals = |i: &usize| entries[*i].readers().1.len();
        let fewest = measured.iter().map(refusals).min()?;
        let everywhere = measured.iter().copied().filter(|i| refusals(i) == fewest);
        let everywhere = everywhere.min_by(|a, b| kl(a).total_cmp(&kl(b)));
        let everywhere = everywhere.filter(|i| refusals(&closest) > fewest && *i != closest);
        Some(Self { closest, as_close: close, smaller, everywhere })
    }
}
