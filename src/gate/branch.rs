//! The checks of one branch.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    checklist::{Checklist, Comparison, finite, percent, signed, size},
    figures::{BranchFigures, LinearFigures},
    windows::Measured,
};

/// Checks that need neither a baseline nor an evaluation. `expected` is the number of the model's linears.
pub(super) fn by_itself(checklist: &mut Checklist<'_>, branch: &BranchFigures, expected: Option<usize>) {
    let linears = &branch.linears;
    let found = linears.iter().map(|linear| linear.name.as_str()).collect::<BTreeSet<_>>().len();
    match expected {
        Some(expected) => {
            let is_whole = found == expected && linears.len() == expected && expected > 0;
            checklist.check("linears", !is_whole, format!("{found} of {expected} linears were quantized"));
        }
        None => checklist.breach(
            "linears",
            format!("{found} linears were quantized, and the report does not say how many the model has"),
        ),
    }

    let worst = linears.iter().filter_map(|l| Some((finite(l.relative_error)?, l)));
    let worst = worst.max_by(|a, b| a.0.total_cmp(&b.0));
    let all_known = linears.iter().all(|l| finite(l.relative_error).is_some_and(|e| e >= 0.0));
    let what = worst.map_or_else(
        || "error of linears".to_owned(),
        |(_, l)| format!("error of {}, the worst linear,", l.name),
    );
    checklist.bounded("max-linear-error", &what, worst.map(|(e, _)| e).filter(|_| all_known), error);

    let sum = |of: fn(&LinearFigures) -> Option<u32>| {
        linears.iter().map(|l| of(l).map(f64::from)).sum::<Option<f64>>()
    };
    let raised = sum(|l| l.damp_raised.map(|times| times.min(1)));
    let fallbacks = sum(|l| Some(l.fallback.is_some().into()));
    checklist.bounded("max-damp-raised", "linears with raised damping:", raised, count);
    checklist.bounded("max-dead-columns", "dead input features:", sum(|l| l.dead_columns), count);
    checklist.bounded("max-fallbacks", "linears rounded instead of solved:", fallbacks, count);
    let what = "significant bits that scales use, of fp16's 11:";
    checklist.bounded("min-scale-bits", what, branch.scale_bits, count);
    checklist.bounded("max-size", "size", branch.bytes, size);
}

/// Checks of an evaluation that need no baseline.
pub(super) fn against_fp16(checklist: &mut Checklist<'_>, measured: &Measured) {
    let text = &measured.text;
    let (ppl, fp16) = (measured.perplexity(), measured.reference_perplexity());
    let what = format!("perplexity {ppl:.4} on {text}, fp16's is {fp16:.4}:");
    checklist.bounded("max-perplexity-change", &what, Some(ppl - fp16), |change| format!("{change:+.4}"));
    checklist.bounded("max-perplexity-increase", &what, Some(ppl / fp16 - 1.0), percent);
    let what = format!("KL divergence on {text}");
    checklist.bounded("max-kl", &what, Some(measured.kl_divergence()), kl);
    let what = format!("top-1 agreement on {text}");
    checklist.bounded("min-top1", &what, Some(measured.top1_agreement()), share);
}

/// Checks against the baseline's branch that need no evaluation.
pub(super) fn against_baseline(
    checklist: &mut Checklist<'_>,
    branch: &BranchFigures,
    baseline: &BranchFigures,
) {
    if branch.variant != baseline.variant {
        let finding = format!("variant {}, the baseline's is {}", branch.variant, baseline.variant);
        checklist.breach("variant", finding);
    }
    checklist.grows_at_most("max-size-growth", "size", branch.bytes, baseline.bytes, size);

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
        let what = format!("error of {name}");
        checklist.grows_at_most("max-linear-error-growth", &what, Some(now), Some(before), error);
    }
    let mean =
        |of: fn(&(&str, f64, f64)) -> f64| Some(pairs.iter().map(of).sum::<f64>() / pairs.len() as f64);
    let (now, before) = (mean(|p| p.1), mean(|p| p.2));
    checklist.grows_at_most("max-mean-error-growth", "mean error of linears", now, before, error);
}

/// Checks against the baseline's evaluation of the branch on the same text, window by window.
pub(super) fn paired(checklist: &mut Checklist<'_>, measured: &Measured, baseline: &Measured) {
    let text = &measured.text;
    let (now, before) = (kl(measured.kl_divergence()), kl(baseline.kl_divergence()));
    let what = format!("KL divergence {now} on {text}, the baseline's is {before}");
    checklist.paired("max-kl-growth", &what, measured.kl_growth(baseline), percent);
    let (now, before) = (measured.perplexity(), baseline.perplexity());
    let what = format!("perplexity {now:.4} on {text}, the baseline's is {before:.4}");
    checklist.paired("max-perplexity-growth", &what, measured.perplexity_growth(baseline), percent);
    let (now, before) = (share(measured.top1_agreement()), share(baseline.top1_agreement()));
    let what = format!("drop of top-1 agreement to {now} on {text}, from the baseline's {before}");
    checklist.paired("max-top1-drop", &what, measured.top1_drop(baseline), |share| signed(share, 2));
}

/// A branch beside the baseline's, for tables.
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

fn count(number: f64) -> String {
    number.to_string()
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
