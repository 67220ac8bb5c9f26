//! Whether a run may pass: a pure function from its figures, a baseline's and thresholds to a judgement.
//!
//! What is missing, NaN or of another model or text is a reason to fail, never a check less.

mod baseline;
mod branch;
mod checklist;
mod figures;
mod formats;
mod judgement;
mod run;
#[cfg(test)]
mod tests;
mod thresholds;
mod windows;

pub use baseline::{BASELINE_SCHEMA, read_baseline, write_baseline};
pub use figures::{
    BranchFigures, CalibrationFigures, ComputeFigures, EvaluatedFigures, EvaluationFigures, Figures,
    LinearFigures, ModelFigures, Numbers,
};
pub use formats::{github, junit, markdown, text};
pub use judgement::{Check, Comparison, Growth, JUDGEMENT_SCHEMA, Judgement, Verdict};
pub use thresholds::{BranchLimits, RunLimits, Thresholds};

use checklist::Checklist;
use windows::Measured;

/// Judges a run against fp16 and a baseline.
pub fn judge(run: &Figures, baseline: &Figures, thresholds: &Thresholds) -> Judgement {
    let mut judgement = Judgement::default();
    let mut of_run = Checklist::of_run(&mut judgement);
    by_itself(&mut of_run, run, Some(baseline), thresholds);
    run::evaluated(&mut of_run, baseline, "the baseline");
    run::model(&mut of_run, run, baseline);
    run::protocol(&mut of_run, run, baseline);
    run::growing_costs(&mut of_run, run, baseline, &thresholds.run);
    let differences = run::differences(run, baseline);
    if thresholds.run.same_plan {
        differences.iter().for_each(|difference| of_run.breach("same-plan", difference.clone()));
    }
    judgement.notes.extend(differences);
    for branch in &run.branches {
        judge_branch(&mut judgement, branch, run, Some(baseline), thresholds);
    }
    judgement
}

/// Judges a run against fp16 alone.
pub fn judge_alone(run: &Figures, thresholds: &Thresholds) -> Judgement {
    let mut judgement = Judgement::default();
    by_itself(&mut Checklist::of_run(&mut judgement), run, None, thresholds);
    for branch in &run.branches {
        judge_branch(&mut judgement, branch, run, None, thresholds);
    }
    judgement
}

fn by_itself(
    checklist: &mut Checklist<'_>,
    run: &Figures,
    baseline: Option<&Figures>,
    thresholds: &Thresholds,
) {
    run::branches(checklist, run);
    run::missing_branches(checklist, run, baseline, &thresholds.run);
    run::thresholds(checklist, run, baseline, thresholds);
    run::evaluated(checklist, run, "the report");
    run::costs(checklist, run, &thresholds.run);
}

fn judge_branch(
    judgement: &mut Judgement,
    branch: &BranchFigures,
    run: &Figures,
    baseline: Option<&Figures>,
    thresholds: &Thresholds,
) {
    let name = branch.branch.as_str();
    let limits = thresholds.of(name);
    let mut compared = Vec::new();
    let mut checklist = Checklist::of_branch(judgement, name);
    branch::by_itself(&mut checklist, branch, run.model.layers, limits);
    if let Some(baseline) = baseline {
        match baseline.branches.iter().find(|before| before.branch == name) {
            Some(before) => branch::against_baseline(&mut checklist, branch, before, limits),
            None => checklist.breach("baseline", "the baseline has no such branch".into()),
        }
    }
    for evaluation in &run.evaluations {
        // Of texts that the baseline does not have, one branch alone may have been evaluated, by hand.
        let same = baseline.and_then(|baseline| {
            let same = baseline.evaluations.iter().find(|before| before.same_protocol(evaluation))?;
            Some((baseline, same))
        });
        let optional = baseline.is_some() && same.is_none();
        if optional && !evaluation.models.iter().any(|model| model.name == name) {
            continue;
        }
        let measured = match Measured::of(run, evaluation, name) {
            Ok(measured) => measured,
            Err(problem) => {
                checklist.breach("evaluation", problem);
                continue;
            }
        };
        branch::against_fp16(&mut checklist, &measured, limits);
        let before = same.and_then(|(baseline, same)| match Measured::of(baseline, same, name) {
            Ok(before) => Some(before),
            Err(problem) => {
                checklist.breach("baseline", format!("in the baseline, it {problem}"));
                None
            }
        });
        if let Some(before) = &before {
            branch::paired(&mut checklist, &measured, before, limits);
        }
        compared.push(branch::comparison(name, &measured, before.as_ref()));
    }
    judgement.branches.append(&mut compared);
}
