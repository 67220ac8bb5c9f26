//! Whether a run passes: a pure function from its figures, a baseline's and thresholds to a judgement.
//!
//! A figure that is missing, NaN, or of another model or text is a reason to fail; no check is left out for it.

mod baseline;
mod branch;
mod checklist;
mod figures;
mod formats;
mod run;
#[cfg(test)]
mod tests;
mod thresholds;
mod windows;

pub use baseline::{BASELINE_SCHEMA, read_baseline, write_baseline};
pub use checklist::{Check, Comparison, Growth, JUDGEMENT_SCHEMA, Judgement, Verdict};
pub use figures::{
    BranchFigures, CalibrationFigures, ComputeFigures, EvaluatedFigures, EvaluationFigures, Figures,
    LinearFigures, ModelFigures, Numbers,
};
pub use formats::{github, junit, markdown, text};
pub use thresholds::{Limits, Thresholds};

use checklist::Checklist;
use windows::Measured;

/// Judges a run against fp16 and a baseline, on every evaluation that the run's figures have: see [`Figures::choose`].
pub fn judge(run: &Figures, baseline: &Figures, thresholds: &Thresholds) -> Judgement {
    judged(run, Some(baseline), thresholds)
}

/// Judges a run against fp16 alone, on every evaluation that its figures have.
pub fn judge_alone(run: &Figures, thresholds: &Thresholds) -> Judgement {
    judged(run, None, thresholds)
}

fn judged(run: &Figures, baseline: Option<&Figures>, thresholds: &Thresholds) -> Judgement {
    let mut judgement = Judgement::default();
    let mut of_run = Checklist::new(&mut judgement, None, &thresholds.limits);
    run::branches(&mut of_run, run);
    run::missing_branches(&mut of_run, run, baseline);
    run::thresholds(&mut of_run, run, baseline, thresholds);
    run::evaluated(&mut of_run, run, "the report");
    run::costs(&mut of_run, run);
    if let Some(baseline) = baseline {
        run::evaluated(&mut of_run, baseline, "the baseline");
        run::model(&mut of_run, run, baseline);
        run::protocol(&mut of_run, run, baseline);
        run::growing_costs(&mut of_run, run, baseline);
        let differences = run::differences(run, baseline);
        if thresholds.same_plan {
            differences.iter().for_each(|difference| of_run.breach("same-plan", difference.clone()));
        }
        judgement.notes.extend(differences);
    }
    for branch in &run.branches {
        let compared = judge_branch(&mut judgement, branch, run, baseline, thresholds);
        judgement.branches.extend(compared);
    }
    judgement
}

/// The checks of one branch. Returns it beside the baseline's, for each text.
fn judge_branch(
    judgement: &mut Judgement,
    branch: &BranchFigures,
    run: &Figures,
    baseline: Option<&Figures>,
    thresholds: &Thresholds,
) -> Vec<Comparison> {
    let name = branch.branch.as_str();
    let mut compared = Vec::new();
    let mut checklist = Checklist::new(judgement, Some(name), thresholds.of(name));
    branch::by_itself(&mut checklist, branch, run.model.linears);
    if let Some(baseline) = baseline {
        match baseline.branches.iter().find(|before| before.branch == name) {
            Some(before) => branch::against_baseline(&mut checklist, branch, before),
            None => checklist.breach("baseline", "the baseline has no such branch".into()),
        }
    }
    for evaluation in &run.evaluations {
        let same = baseline.and_then(|baseline| {
            let same = baseline.evaluations.iter().find(|before| before.same_protocol(evaluation))?;
            Some((baseline, same))
        });
        let measured = match Measured::of(run, evaluation, name) {
            Ok(measured) => measured,
            Err(problem) => {
                checklist.breach("evaluation", problem);
                continue;
            }
        };
        branch::against_fp16(&mut checklist, &measured);
        let before = same.and_then(|(baseline, same)| match Measured::of(baseline, same, name) {
            Ok(before) => Some(before),
            Err(problem) => {
                checklist.breach("baseline", format!("in the baseline, it {problem}"));
                None
            }
        });
        if let Some(before) = &before {
            branch::paired(&mut checklist, &measured, before);
        }
        compared.push(branch::comparison(name, &measured, before.as_ref()));
    }
    compared
}
