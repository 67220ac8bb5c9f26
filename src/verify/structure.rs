//! Checks of the files alone: names, shapes, dtypes, ranges, groups, checksums.

use std::{cmp::Reverse, collections::BTreeMap};

use rayon::prelude::*;
use serde::{Serialize, de::IgnoredAny};
use sha2::{Digest, Sha256};

use super::{Finding, zero_points::ZeroPoints};
use crate::{
    architectures::{CONFIG_FILE, LinearId},
    checkpoint::{Checkpoint, PackedTensors, QUANTIZE_CONFIG_FILE, QuantizationConfig, packed},
    emit::{CHECKSUMS_FILE, COPIED_FILES, Checksums},
    error::Error,
    folder::{self, TEXT_LIMIT, file_in, is_file_name},
    pack::PackedView,
    progress::Progress,
    units::hex,
};

/// Results of the checks of the files alone.
pub(super) struct Structure {
    pub(super) findings: Vec<Finding>,
    /// Whether there were checksums.
    pub(super) checksums: bool,
    pub(super) scales: ScaleSigns,
}

/// Number of negative scales. A scale of a symmetric grid may be negative: readers multiply by it whatever its sign.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ScaleSigns {
    /// Below zero.
    pub negative: u64,
    /// In all linears.
    pub all: u64,
}

/// Checks everything but the weights' values.
pub(super) fn check(
    checkpoint: &Checkpoint,
    quantization: &QuantizationConfig,
    progress: &dyn Progress,
) -> Structure {
    let config = checkpoint.config();
    progress.begin("checking tensors", config.linears().count() as u64);
    let (mut findings, mut signs) = (Vec::new(), ScaleSigns::default());
    let mut zero_points = ZeroPoints::new(quantization);
    for (name, shape) in config.dense_tensors() {
        if let Err(error) = checkpoint.view_shaped(&name, &shape).and_then(|_| checkpoint.bytes_f16(&name)) {
            findings.push(Finding { subject: name.clone(), problem: error.to_string() });
        }
        checkpoint.release([&name]);
    }
    let mut refused = Refused::default();
    for (id, config) in config.linears() {
        match packed(checkpoint, &id, config, quantization) {
            Err(error) => refused.add(&id, &error),
            Ok(None) => {}
            Ok(Some(tensors)) => {
                signs.negative += tensors.scales.iter().filter(|s| s.to_f32() < 0.0).count() as u64;
                signs.all += tensors.scales.len() as u64;
                linear(&id, &tensors, quantization, &mut zero_points, &mut findings);
            }
        }
        progress.advance(1);
    }
    // One finding a cause, however many linears it explains.
    findings.extend(refused.findings());
    let finding = |problem: String| Finding { subject: "qzeros".into(), problem };
    findings.extend(zero_points.causes().into_iter().map(finding));
    for name in checkpoint.extra() {
        findings.push(Finding { subject: name.into(), problem: "is not a tensor of this model".into() });
    }
    let sums = checksums(checkpoint, &mut findings);
    Structure { findings, checksums: sums, scales: signs }
}

/// Linears whose tensors were refused, by the error without the linear's name.
#[derive(Default)]
struct Refused {
    causes: Vec<(String, Finding, usize)>,
}

impl Refused {
    fn add(&mut self, id: &LinearId, error: &Error) {
        let (subject, problem) = (id.to_string(), error.to_string());
        let cause = problem.replace(&subject, "");
        match self.causes.iter_mut().find(|(known, ..)| *known == cause) {
            Some((_, _, count)) => *count += 1,
            None => self.causes.push((cause, Finding { subject, problem }, 1)),
        }
    }

    /// A finding for each cause, with the first linear's names.
    fn findings(self) -> impl Iterator<Item = Finding> {
        self.causes.into_iter().map(|(_, mut finding, count)| {
            match count {
                1 => {}
                2 => finding.problem.push_str("; the same in 1 more linear"),
                _ => finding.problem.push_str(&format!("; the same in {} more linears", count - 1)),
            }
            finding
        })
    }
}

/// Codes need no check: every bit pattern of 2, 3, 4 and 8 bits is one.
fn linear(
    id: &LinearId,
    tensors: &PackedTensors<'_>,
    quantization: &QuantizationConfig,
    zero_points: &mut ZeroPoints<'_>,
    findings: &mut Vec<Finding>,
) {
    let mut found = |subject: String, problem: Option<String>| {
        findings.extend(problem.map(|problem| Finding { subject, problem }));
    };
    found(id.g_idx(), groups(tensors, quantization));
    if !zero_points.explains(id, &tensors.qzeros) && quantization.sym {
        found(id.qzeros(), zeros(tensors, quantization));
    }
    found(id.scales(), scales(tensors));
}

/// Fault of `g_idx`, if there is one.
fn groups(tensors: &PackedTensors<'_>, quantization: &QuantizationConfig) -> Option<String> {
    let size = quantization.group_size.features(tensors.in_features);
    if quantization.sequential_groups() {
        let off = |(k, &g): (usize, &i32)| (g as usize != k / size).then_some((k, g));
        let (k, g) = tensors.g_idx.iter().enumerate().find_map(off)?;
        let expected = k / size;
        return Some(format!(
            "feature {k} is in group {g}; without act order it must be in group {expected}"
        ));
    }
    let mut counts = vec![0usize; tensors.groups];
    for &g in tensors.g_idx.iter() {
        counts[g as usize] += 1;
    }
    let full = |g: usize| size.min(tensors.in_features - g * size);
    let (g, count) = counts.iter().enumerate().find(|&(g, &count)| count != full(g))?;
    Some(format!("group {g} has {count} features, expected {}", full(g)))
}

/// Fault of a symmetric grid's zero points, if there is one.
fn zeros(tensors: &PackedTensors<'_>, quantization: &QuantizationConfig) -> Option<String> {
    let n = tensors.out_features;
    let offset = u32::from(quantization.format.zero_offset());
    let stored = PackedView::from(tensors).unpack_stored_zeros();
    let zero = |i: usize| u32::from(stored[i]) + offset;
    let expected = u32::from(tensors.bits.symmetric_zero());
    let wrong: Vec<usize> = (0..stored.len()).filter(|&i| zero(i) != expected).collect();
    let &first = wrong.first()?;
    Some(format!(
        "{} of {} zero points are wrong: group {}, output feature {} has {}, expected {expected}, the zero point of \
         a symmetric grid",
        wrong.len(),
        stored.len(),
        first / n,
        first % n,
        zero(first)
    ))
}

/// Fault of the scales, if there is one. The reader has checked that they are finite.
fn scales(tensors: &PackedTensors<'_>) -> Option<String> {
    let zero = tensors.scales.iter().filter(|s| s.to_f32() == 0.0).count();
    (zero > 0).then(|| format!("{zero} of {} scales are zero", tensors.scales.len()))
}

/// JSON files that cannot be read, are not JSON, or begin with a byte order mark, which transformers and tokenizers refuse.
pub(super) fn json_files(checkpoint: &Checkpoint, findings: &mut Vec<Finding>) {
    let json = COPIED_FILES.into_iter().filter(|name| name.ends_with(".json"));
    for name in [CONFIG_FILE, QUANTIZE_CONFIG_FILE].into_iter().chain(json) {
        if !checkpoint.dir().join(name).exists() {
            continue;
        }
        let read = file_in(checkpoint.dir(), name).and_then(|path| folder::read(&path, TEXT_LIMIT));
        let problem = read.map_or_else(|error| Some(error.to_string()), |bytes| json_problem(&bytes));
        findings.extend(problem.map(|problem| Finding { subject: name.into(), problem }));
    }
}

fn json_problem(bytes: &[u8]) -> Option<String> {
    let text = folder::without_mark(bytes);
    match serde_json::from_slice::<IgnoredAny>(text) {
        Err(error) => Some(format!("is not JSON: {error}")),
        Ok(_) if text.len() < bytes.len() => {
            Some("begins with a byte order mark, which transformers refuses".into())
        }
        Ok(_) => None,
    }
}

/// Tensors whose digests are computed at once: few, because all of them are in memory meanwhile.
const AT_ONCE: usize = 4;

/// Compares every digest; returns whether there were any.
fn checksums(checkpoint: &Checkpoint, findings: &mut Vec<Finding>) -> bool {
    let path = checkpoint.dir().join(CHECKSUMS_FILE);
    if !path.exists() {
        return false;
    }
    let text = file_in(checkpoint.dir(), CHECKSUMS_FILE).and_then(|path| folder::read(&path, TEXT_LIMIT));
    let parsed = text.map_err(|e| e.to_string()).and_then(|text| {
        let sums: Checksums = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
        match sums.algorithm.as_str() {
            "sha256" => Ok(sums),
            other => Err(format!("algorithm `{other}`, expected `sha256`")),
        }
    });
    let sums = match parsed {
        Ok(sums) => sums,
        Err(problem) => {
            findings.push(Finding { subject: CHECKSUMS_FILE.into(), problem });
            return true;
        }
    };
    let mut views: Vec<_> = checkpoint.names().filter_map(|name| checkpoint.view(name).ok()).collect();
    // Neighbours take as long as each other.
    views.sort_by_key(|view| Reverse(view.bytes.len()));
    let mut differences: Vec<Finding> = Vec::new();
    for some in views.chunks(AT_ONCE) {
        differences.par_extend(some.par_iter().filter_map(|view| {
            let difference = difference(view.name, view.bytes, &sums.tensors);
            checkpoint.release([view.name]);
            difference
        }));
    }
    differences.sort_by(|a, b| a.subject.cmp(&b.subject));
    findings.extend(differences);
    for name in sums.tensors.keys().filter(|name| !checkpoint.contains(name)) {
        findings.push(Finding { subject: name.clone(), problem: "has a checksum and is missing".into() });
    }
    for name in sums.files.keys() {
        // Only files of this folder: a name may point anywhere.
        if !is_file_name(name) {
            findings.push(Finding { subject: name.clone(), problem: "is not a plain file name".into() });
            continue;
        }
        match file_in(checkpoint.dir(), name).and_then(|path| folder::read(&path, TEXT_LIMIT)) {
            Ok(bytes) => findings.extend(difference(name, &bytes, &sums.files)),
            Err(error) => findings.push(Finding { subject: name.clone(), problem: error.to_string() }),
        }
    }
    true
}

/// A finding if the digest is not the stored one.
fn difference(name: &str, bytes: &[u8], sums: &BTreeMap<String, String>) -> Option<Finding> {
    let found = hex(&Sha256::digest(bytes));
    let problem = match sums.get(name) {
        None => "has no checksum".to_owned(),
        Some(expected) if *expected == found => return None,
        Some(expected) => {
            format!(
                "its bytes are not those that were written: sha256 {found:.12}…, expected {expected:.12}…"
            )
        }
    };
    Some(Finding { subject: name.into(), problem })
}
