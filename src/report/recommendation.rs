//! The choice among several quantized models.

use serde::Serialize;

use super::{Entry, Interval, statistics::difference_of_means};

/// A smaller file is recommended up to this many times the smallest KL divergence.
pub const FACTOR: f64 = 2.0;

/// Models of more bits are not recommended first: all servers run 4 bits, at a quarter of fp16's size.
pub const USUAL_BITS: u32 = 4;

/// The recommended entries, by position.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recommendation {
    /// The entry with the smallest mean KL divergence among those with at most [`USUAL_BITS`] bits, or among all where there are
    /// none. Of several whose difference over paired windows is not significant, the smallest file.
    pub closest: usize,
    /// The other entries whose divergence does not differ significantly from the smallest.
    pub as_close: Vec<usize>,
    /// The entry with the smallest mean KL divergence of all, where it has more bits than `closest`.
    pub closer: Option<usize>,
    /// The smallest file with at most [`FACTOR`] times the smallest divergence, where it is smaller than `closest`.
    pub smaller: Option<usize>,
    /// For the maintained readers that do not load `closest`: the closest entry that they load.
    pub for_readers: Vec<ForReaders>,
}

/// The recommended entry for readers that do not load the closest one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ForReaders {
    /// Names of the readers.
    pub readers: Vec<String>,
    /// The closest entry that they load; none where they load no measured entry.
    pub entry: Option<usize>,
}

impl Recommendation {
    /// The recommendation; none where nothing was measured. `window_tokens` are the weights of the first protocol's windows.
    pub fn new(entries: &[Entry], window_tokens: &[usize]) -> Option<Self> {
        let kl = |i: &usize| entries[*i].kl().unwrap_or(f64::INFINITY);
        let measured: Vec<usize> =
            (0..entries.len()).filter(|&i| entries[i].kl().is_some_and(f64::is_finite)).collect();
        let bits = |i: &usize| entries[*i].checkpoint.bits;
        let usual: Vec<usize> = measured.iter().copied().filter(|i| bits(i) <= USUAL_BITS).collect();
        let candidates = if usual.is_empty() { &measured } else { &usual };
        let best = *candidates.iter().min_by(|a, b| kl(a).total_cmp(&kl(b)))?;
        let alike = |i: &usize| {
            let (a, b) = (entries[*i].main(), entries[best].main());
            let (Some(a), Some(b)) = (a, b) else { return false };
            let Interval { value, margin } = difference_of_means(&a.window_kl, &b.window_kl, window_tokens);
            margin.is_some_and(|margin| value <= margin)
        };
        let mut close: Vec<usize> = candidates.iter().copied().filter(|i| *i == best || alike(i)).collect();
        let size = |i: &usize| entries[*i].checkpoint.bytes;
        close.sort_by(|a, b| size(a).cmp(&size(b)).then(kl(a).total_cmp(&kl(b))));
        let closest = close.remove(0);

        let closer = measured.iter().copied().min_by(|a, b| kl(a).total_cmp(&kl(b)));
        let closer = closer.filter(|i| kl(i) < kl(&best) && bits(i) > bits(&closest));

        let smaller = measured.iter().copied().filter(|i| kl(i) <= FACTOR * kl(&best));
        let smaller = smaller.min_by(|a, b| size(a).cmp(&size(b)).then(kl(a).total_cmp(&kl(b))));
        let smaller = smaller.filter(|i| size(i) < size(&closest));

        let mut for_readers: Vec<ForReaders> = Vec::new();
        for reader in entries[closest].not_loaded_by() {
            let takes = |i: &usize| entries[*i].is_loaded_by(reader);
            let closest_of =
                |all: &[usize]| all.iter().copied().filter(takes).min_by(|a, b| kl(a).total_cmp(&kl(b)));
            let entry = closest_of(candidates).or_else(|| closest_of(&measured));
            match for_readers.iter_mut().find(|known| known.entry == entry) {
                Some(known) => known.readers.push(reader.to_owned()),
                None => for_readers.push(ForReaders { readers: vec![reader.to_owned()], entry }),
            }
        }
        Some(Self { closest, as_close: close, closer, smaller, for_readers })
    }
}
