//! The choice among several quantized models.

use serde::Serialize;

use super::{Entry, Interval, statistics::difference_of_means};

/// A smaller file is recommended up to this many times the smallest KL divergence.
pub const CLOSE: f64 = 1.25;

/// Where a file must be smaller still, it is recommended up to this many times the smallest KL divergence.
pub const FACTOR: f64 = 2.0;

/// Models of more bits are not recommended first, unless their file is no larger: all servers run 4 bits, at a quarter of fp16's size.
pub const USUAL_BITS: u32 = 4;

/// The recommended entries, by position.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recommendation {
    /// The smallest file of the candidates that are as good as `closest`, or that the windows cannot tell from it. Candidates
    /// are the entries with at most [`USUAL_BITS`] bits, and those whose file is no larger than the largest of these. If no entry
    /// has so few bits, all are candidates. (A GGUF file's embedding is quantized, so that one of 8 bits can be smaller than a branch of 4.)
    /// As good: a mean KL divergence of at most [`CLOSE`] times the smallest. Not told apart: at most [`FACTOR`] times, and the
    /// paired 95% interval of the difference includes 0.
    pub take: usize,
    /// The candidate with the smallest mean KL divergence.
    pub closest: usize,
    /// Other candidates that the windows cannot tell from `take`.
    pub untold: Vec<usize>,
    /// The entry with the smallest mean KL divergence of all, where it is no candidate.
    pub closer: Option<usize>,
    /// The smallest file with at most [`FACTOR`] times the divergence of `closest`, where it is smaller than `take`.
    pub smaller: Option<usize>,
    /// For the maintained readers of any entry that do not load `take`: the choice by the same rule among the entries that they load.
    /// (The readers of GPTQ branches and those of GGUF files are others.)
    pub for_readers: Vec<ForReaders>,
}

/// The recommended entry for readers that do not load the first one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ForReaders {
    /// Names of the readers.
    pub readers: Vec<String>,
    /// The recommended entry of those that they load; none where they load no measured entry.
    pub entry: Option<usize>,
}

/// The measured entries, and the windows' weights.
struct Measured<'a> {
    entries: &'a [Entry],
    window_tokens: &'a [usize],
}

impl Measured<'_> {
    fn kl(&self, entry: usize) -> f64 {
        self.entries[entry].kl().unwrap_or(f64::INFINITY)
    }

    fn bytes(&self, entry: usize) -> u64 {
        self.entries[entry].checkpoint.bytes
    }

    fn bits(&self, entry: usize) -> u32 {
        self.entries[entry].checkpoint.bits
    }

    fn closest(&self, among: impl Iterator<Item = usize>) -> Option<usize> {
        among.min_by(|&a, &b| self.kl(a).total_cmp(&self.kl(b)))
    }

    fn smallest(&self, among: impl Iterator<Item = usize>) -> Option<usize> {
        among.min_by(|&a, &b| self.bytes(a).cmp(&self.bytes(b)).then(self.kl(a).total_cmp(&self.kl(b))))
    }

    /// Whether the windows cannot tell two entries apart, and their divergences differ by less than [`FACTOR`].
    fn is_untold(&self, a: usize, b: usize) -> bool {
        let (Some(left), Some(right)) = (self.entries[a].main(), self.entries[b].main()) else {
            return false;
        };
        let difference = difference_of_means(&left.window_kl, &right.window_kl, self.window_tokens);
        let Interval { value, margin } = difference;
        let (least, most) = (self.kl(a).min(self.kl(b)), self.kl(a).max(self.kl(b)));
        // A single window has no margin, and tells nothing.
        most <= FACTOR * least && margin.is_none_or(|margin| value.abs() <= margin)
    }

    /// What to take of `candidates`, and the closest of them.
    fn choose(&self, candidates: &[usize]) -> Option<(usize, usize)> {
        let closest = self.closest(candidates.iter().copied())?;
        let is_close = |entry: &usize| {
            *entry == closest
                || self.kl(*entry) <= CLOSE * self.kl(closest)
                || self.is_untold(*entry, closest)
        };
        Some((self.smallest(candidates.iter().copied().filter(is_close))?, closest))
    }
}

impl Recommendation {
    /// The recommendation; none where nothing was measured. `window_tokens` are the weights of the first protocol's windows.
    pub fn new(entries: &[Entry], window_tokens: &[usize]) -> Option<Self> {
        let of = Measured { entries, window_tokens };
        let measured: Vec<usize> = (0..entries.len()).filter(|&i| of.kl(i).is_finite()).collect();
        let is_usual = |&i: &usize| of.bits(i) <= USUAL_BITS;
        let largest = measured.iter().copied().filter(is_usual).map(|i| of.bytes(i)).max();
        let (candidates, larger): (Vec<usize>, Vec<usize>) = measured
            .iter()
            .copied()
            .partition(|i| is_usual(i) || largest.is_none_or(|largest| of.bytes(*i) <= largest));
        let (take, closest) = of.choose(&candidates)?;
        let untold: Vec<usize> =
            candidates.iter().copied().filter(|&i| i != take && of.is_untold(i, take)).collect();

        let closer = of.closest(larger.into_iter()).filter(|&i| of.kl(i) < of.kl(closest));
        let smaller = measured.iter().copied().filter(|&i| of.kl(i) <= FACTOR * of.kl(closest));
        let smaller = of.smallest(smaller).filter(|&i| of.bytes(i) < of.bytes(take));

        let mut for_readers: Vec<ForReaders> = Vec::new();
        let mut readers: Vec<&str> = Vec::new();
        for reader in entries.iter().flat_map(|entry| &entry.checkpoint.readers) {
            let name = reader.name.as_str();
            if reader.living && !entries[take].is_loaded_by(name) && !readers.contains(&name) {
                readers.push(name);
            }
        }
        for reader in readers {
            let loaded = |all: &[usize]| -> Vec<usize> {
                all.iter().copied().filter(|&i| entries[i].is_loaded_by(reader)).collect()
            };
            let choice = of.choose(&loaded(&candidates)).or_else(|| of.choose(&loaded(&measured)));
            let entry = choice.map(|(take, _)| take);
            match for_readers.iter_mut().find(|known| known.entry == entry) {
                Some(known) => known.readers.push(reader.to_owned()),
                None => for_readers.push(ForReaders { readers: vec![reader.to_owned()], entry }),
            }
        }
        Some(Self { take, closest, untold, closer, smaller, for_readers })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::report::ReaderReport;

    /// Entries of `(bits, bytes)` with the KL divergence of each window.
    fn entries(all: &[(u32, u64, &[f64])]) -> Vec<Entry> {
        let entry = |(i, &(bits, bytes, kl)): (usize, &(u32, u64, &[f64]))| {
            let interval = |value: f64| json!({ "value": value, "margin": null });
            let mean = kl.iter().sum::<f64>() / kl.len() as f64;
            let measured = json!({
                "name": i.to_string(), "weight_bytes": bytes, "perplexity": interval(9.0), "perplexity_change": interval(0.1),
                "kl_divergence": interval(mean), "kl_p99": mean, "kl_max": mean, "top1_agreement": interval(0.9),
                "window_nll": kl, "window_kl": kl, "window_top1": kl,
            });
            let checkpoint = json!({
                "bits": bits, "group_size": 128, "act_order": "no", "symmetric": true, "digest": "", "bytes": bytes,
                "bits_per_weight": 4.0, "readers": [],
            });
            Entry {
                name: i.to_string(),
                variant: String::new(),
                tool: String::new(),
                run: None,
                checkpoint: serde_json::from_value(checkpoint).unwrap(),
                measured: vec![Some(serde_json::from_value(measured).unwrap())],
                pareto: false,
                linears: Vec::new(),
            }
        };
        all.iter().enumerate().map(entry).collect()
    }

    fn of(all: &[(u32, u64, &[f64])]) -> Recommendation {
        Recommendation::new(&entries(all), &vec![63; all[0].2.len()]).unwrap()
    }

    #[test]
    fn the_smallest_file_that_is_about_as_close_is_recommended() {
        // 20% farther and told apart, but within the factor; 50% farther is not.
        let found = of(&[(4, 120, &[0.010; 4]), (4, 110, &[0.012; 4]), (4, 100, &[0.015; 4])]);
        assert_eq!((found.take, found.closest, found.smaller), (1, 0, Some(2)));
        assert_eq!(found.untold, [0_usize; 0]);
        // The closest file is taken where no smaller one is about as close.
        let found = of(&[(4, 120, &[0.010; 4]), (4, 110, &[0.030; 4])]);
        assert_eq!((found.take, found.closest, found.smaller), (0, 0, None));
        // Of more bits, only beside it.
        let found = of(&[(8, 200, &[0.001; 4]), (4, 120, &[0.010; 4])]);
        assert_eq!((found.take, found.closer), (1, Some(0)));
    }

    #[test]
    fn a_file_of_more_bits_that_is_no_larger_is_recommended_by_its_divergence() {
        // As a GGUF file of 8 bits beside branches of 4, whose embedding is fp16.
        let found = of(&[(4, 120, &[0.010; 4]), (4, 110, &[0.020; 4]), (8, 115, &[0.001; 4])]);
        assert_eq!((found.take, found.closest, found.closer, found.smaller), (2, 2, None, None));
        // One that is larger than all of them stays beside them.
        let found = of(&[(4, 120, &[0.010; 4]), (8, 121, &[0.001; 4]), (8, 119, &[0.012; 4])]);
        assert_eq!((found.take, found.closest, found.closer), (2, 0, Some(1)));
    }

    #[test]
    fn readers_of_another_format_get_a_recommendation_of_their_own() {
        let reader = |name: &str| ReaderReport { name: name.into(), living: true, refused: None };
        let refusing = |name: &str| ReaderReport { refused: Some("why".into()), ..reader(name) };
        let mut all = entries(&[(4, 120, &[0.010; 4]), (4, 110, &[0.005; 4]), (4, 130, &[0.008; 4])]);
        all[0].checkpoint.readers = vec![reader("servers"), refusing("strict")];
        all[1].checkpoint.readers = vec![reader("llama.cpp")];
        all[2].checkpoint.readers = vec![reader("servers"), refusing("strict")];
        let found = Recommendation::new(&all, &[63; 4]).unwrap();
        let expected = |name: &str, entry| ForReaders { readers: vec![name.into()], entry };
        assert_eq!(found.take, 1);
        assert_eq!(found.for_readers, [expected("servers", Some(0)), expected("strict", None)]);
    }

    #[test]
    fn windows_that_cannot_tell_models_apart_decide_nothing() {
        let (scattered, level) = ([0.030, 0.001, 0.020, 0.009], [0.010; 4]);
        let found = of(&[(4, 120, &level), (4, 110, &scattered)]);
        assert_eq!((found.take, found.closest, found.untold), (1, 0, vec![0]));
        // A single window tells nothing, but what is far off is not taken for it.
        let found = of(&[(4, 120, &[0.010]), (4, 110, &[0.018])]);
        assert_eq!((found.take, found.untold), (1, vec![0]));
        let found = of(&[(4, 120, &[0.010]), (4, 110, &[0.030])]);
        assert_eq!((found.take, found.untold), (0, vec![]));
    }
}
