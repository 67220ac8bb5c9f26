//! The checks of one branch.

use std::collections::BTreeMap;

use super::{
    checklist::{Checklist, finite, percent, signed, size},
    figures::{BranchFigures, LinearFigures},
    judgement::{Comparison, Growth},
    thresholds::BranchLimits,
    windows::Measured,
};
/// Linears of a decoder layer.
const LINEARS: usize = 7;

/// What needs no baseline, and no text.
pub(super) fn by_itself(
    checklist: &mut Checklist<'_>,
    branch: &BranchFigures,
    layers: usize,
    limits: &BranchLimits,
) {
    let linears = &branch.linears;
    let expected = layers * LINEARS;
    let finding = format!("{} of {expected} linears were quantized", linears.len());
    checklist.check("linears", linears.len() != expected || linears.is_empty(), finding);

    let worst = linears.iter().filter_map(|l| Some((finite(l.relative_error)?, l)));
    let worst = worst.max_by(|a, b| a.0.total_cmp(&b.0));
    let all_known = linears.iter().all(|l| finite(l.relative_error).is_some_and(|e| e >= 0.0));
    let what = worst.map_or_else(
        || "error of linears".to_owned(),
        |(_, l)| format!("error of {}, the worst linear,", l.name),
    );
    checklist.at_most(
        "max-linear-error",
        &what,
        worst.map(|(e, _)| e).filter(|_| all_known),
        limits.max_linear_error,
        error,
    );

    let sum = |of: fn(&LinearFigures) -> Option<u32>| {
        linears.iter().map(|l| of(l).map(f64::from)).sum::<Option<f64>>()
    };
    let count = |n: f64| n.to_string();
    let raised = sum(|l| l.damp_raised.map(|times| times.min(1)));
    checklist.at_most(
        "max-damp-raised",
        "linears with raised damping:",
        raised,
        limits.max_damp_raised,
        count,
    );
    let dead = sum(|l| l.dead_columns);
    checklist.at_most("max-dead-columns", "dead input features:", dead, limits.max_dead_columns, count);
    let fallbacks = sum(|l| Some(l.fallback.is_some().into()));
    checklist.at_most(
        "max-fallbacks",
        "linears rounded instead of solved:",
        fallbacks,
        limits.max_fallbacks,
        count,
    );
    checklist.at_least(
        "min-scale-bits",
        "significant bits that scales use, of fp16's 11:",
        branch.scale_bits,
        limits.min_scale_bits,
        count,
    );
    checklist.at_most("max-size", "size", branch.bytes, limits.max_size, size);
}

/// What needs a text and no baseline.
pub(super) fn against_fp16(checklist: &mut Checklist<'_>, measured: &Measured, limits: &BranchLimits) {
    let text = &measured.text;
    let (ppl, fp16) = (measured.perplexity(), measured.reference_perplexity());
    let what = format!("perplexity {ppl:.4} on {text}, fp16's is {fp16:.4}:");
    let change = |change: f64| format!("{change:+.4}");
    checklist.at_most("max-perplexity-change", &what, Some(ppl - fp16), limits.max_perplexity_change, change);
    let increase = Some(ppl / fp16 - 1.0);
    checklist.at_most("max-perplexity-increase", &what, increase, limits.max_perplexity_increase, percent);
    let what = format!("KL divergence on {text}");
    checklist.at_most("max-kl", &what, Some(measured.kl_divergence()), limits.max_kl, kl);
    let what = format!("top-1 agreement on {text}");
    checklist.at_least("min-top1", &what, Some(measured.top1_agreement()), limits.min_top1, share);
}

/// What needs the baseline's branch and no text.
pub(super) fn against_baseline(
    checklist: &mut Checklist<'_>,
    branch: &BranchFigures,
    baseline: &BranchFigures,
    limits: &BranchLimits,
) {
    if branch.variant != baseline.variant {
        let finding = format!("variant {}, the baseline's is {}", branch.variant, baseline.variant);
        checklist.breach("variant", finding);
    }
    checklist.grows_at_most(
        "max-size-growth",
        "size",
        branch.bytes,
        baseline.bytes,
        limits.max_size_growth,
        size,
    );

    let before: BTreeMap<&str, Option<f64>> =
        baseline.linears.iter().map(|l| (l.name.as_str(), finite(l.relative_error))).collect();
    let pairs = branch.linears.iter().map(|l| {
        let before = before.get(l.name.as_str()).copied().flatten().filter(|&before| before > 0.0)?;
        Some((l.name.as_str(), finite(l.relative_error)?, before))
    });
    let Some(pairs) = pairs.collect::<Option<Vec<_>>>().filter(|p| !p.is_empty() && p.len() == before.len())
    else {
        let finding = "the linears are not those of the baseline, or some have no error".to_owned();
        return checklist.breach("max-linear-error-growth", finding);
    };
    let growth = |pair: &(&str, f64, f64)| pair.1 / pair.2;
    if let Some(&(name, now, before)) = pairs.iter().max_by(|a, b| growth(a).total_cmp(&growth(b))) {
        let (check, what) = ("max-linear-error-growth", format!("error of {name}"));
        checklist.grows_at_most(check, &what, Some(now), Some(before), limits.max_linear_error_growth, error);
    }
    let mean =
        |of: fn(&(&str, f64, f64)) -> f64| Some(pairs.iter().map(of).sum::<f64>() / pairs.len() as f64);
    let (check, what, limit) =
        ("max-mean-error-growth", "mean error of linears", limits.max_mean_error_growth);
    checklist.grows_at_most(check, what, mean(|p| p.1), mean(|p| p.2), limit, error);
}

/// What needs the baseline's branch on the same text, window by window. A change that the windows' scatter could explain
/// is none.
pub(super) fn paired(
    checklist: &mut Checklist<'_>,
    measured: &Measured,
    baseline: &Measured,
    limits: &BranchLimits,
) {
    let text = &measured.text;
    let mut check = |check: &str, what: &str, growth: Growth, limit: f64, show: &dyn Fn(f64) -> String| {
        if limit.is_infinite() {
            return;
        }
        let finding = format!(
            "{what}: {} (95% over paired windows {} to {}); at most {} allowed",
            show(growth.value),
            show(growth.low),
            show(growth.high),
            show(limit)
        );
        let within = growth.value <= limit || growth.low <= 0.0;
        checklist.check(check, !within || growth.value.is_nan(), finding);
    };
    let (now, before) = (measured.kl_divergence(), baseline.kl_divergence());
    let what = format!("KL divergence {} on {text}, the baseline's is {}", kl(now), kl(before));
    check("max-kl-growth", &what, measured.kl_growth(baseline), limits.max_kl_growth, &percent);
    let (now, before) = (measured.perplexity(), baseline.perplexity());
    let what = format!("perplexity {now:.4} on {text}, the baseline's is {before:.4}");
    check(
        "max-perplexity-growth",
        &what,
        measured.perplexity_growth(baseline),
        limits.max_perplexity_growth,
        &percent,
    );
    let (now, before) = (measured.top1_agreement(), baseline.top1_agreement());
    let what =
        format!("drop of top-1 agreement to {} on {text}, from the baseline's {}", share(now), share(before));
    check("max-top1-drop", &what, measured.top1_drop(baseline), limits.max_top1_drop, &points);
}

/// A branch beside the baseline's, for people.
pub(super) fn comparison(branch: &str, measured: &Measured, baseline: Option<&Measured>) -> Comparison {
    Comparison {
        branch: branch.to_owned(),
        dataset: measured.text.clone(),
        kl_divergence: measured.kl_divergence(),
        baseline_kl_divergence: baseline.map(Measured::kl_divergence),
        growth: baseline.map(|baseline| measured.kl_growth(baseline)),
        perplexity_change: measured.perplexity() - measured.reference_perplexity(),
        top1_agreement: measured.top1_agreement(),
    }
}

fn kl(nats: f64) -> String {
    format!("{nats:.6}")
}

fn error(relative: f64) -> String {
    format!("{relative:.4}")
}

fn share(share: f64) -> String {
    format!("{:.2}%", share * 100.0)
}

fn points(share: f64) -> String {
    signed(share, 2)
}
