//! Whether a run may pass: a pure function from its figures, a baseline's and thresholds to a judgement.
//!
//! What is missing, NaN or of another model or text is a reason to fail, never a check less.

mod baseline;
mod branch;
mod figures;
mod formats;
mod judgement;
mod ledger;
mod run;
mod thresholds;
mod windows;

pub use baseline::{BASELINE_SCHEMA, read_baseline, write_baseline};
pub use figures::{
    BranchFigures, CalibrationFigures, ComputeFigures, EvaluatedFigures, EvaluationFigures, Figures, LinearFigures,
    ModelFigures, Numbers,
};
pub use formats::{github, junit, markdown, text};
pub use judgement::{Check, Comparison, Growth, Judgement, Verdict};
pub use thresholds::{BranchLimits, RunLimits, Thresholds};

use ledger::Ledger;
use windows::Measured;

/// Judges a run against fp16 and a baseline.
pub fn judge(run: &Figures, baseline: &Figures, thresholds: &Thresholds) -> Judgement {
    let mut judgement = judge_alone(run, thresholds);
    let mut of_run = Ledger::of_run(&mut judgement);
    run::missing_branches(&mut of_run, run, baseline, &thresholds.run);
    run::thresholds(&mut of_run, run, baseline, thresholds);
    run::evaluated(&mut of_run, baseline, "the baseline");
    run::model(&mut of_run, run, baseline);
    run::protocol(&mut of_run, run, baseline);
    run::growing_costs(&mut of_run, run, baseline, &thresholds.run);
    let differences = run::differences(run, baseline);
    if thresholds.run.same_plan {
        differences.iter().for_each(|difference| of_run.breach("same-plan", difference.clone()));
    }
    judgement.notes.extend(differences);

    judgement.branches.clear();
    for branch in &run.branches {
        let name = branch.branch.as_str();
        let limits = thresholds.of(name);
        let mut ledger = Ledger::of_branch(&mut judgement, name);
        let Some(before) = baseline.branches.iter().find(|b| b.branch == name) else {
            ledger.breach("baseline", "the baseline has no such branch".into());
            continue;
        };
        branch::against_baseline(&mut ledger, branch, before, limits);
        let mut compared = Vec::new();
        for evaluation in &run.evaluations {
            let Ok(measured) = Measured::of(evaluation, name) else { continue };
            let same = baseline.evaluations.iter().find(|other| other.same_protocol(evaluation));
            let before = match same.map(|same| Measured::of(same, name)) {
                Some(Err(problem)) => {
                    ledger.breach("baseline", format!("in the baseline, it {problem}"));
                    None
                }
                Some(Ok(before)) => {
                    branch::paired(&mut ledger, &measured, &before, &evaluation.dataset, limits);
                    Some(before)
                }
                None => None,
            };
            compared.push(branch::comparison(name, &evaluation.dataset, &measured, before.as_ref()));
        }
        judgement.branches.extend(compared);
    }
    judgement
}

/// Judges a run against fp16 alone.
pub fn judge_alone(run: &Figures, thresholds: &Thresholds) -> Judgement {
    let mut judgement = Judgement::default();
    let mut of_run = Ledger::of_run(&mut judgement);
    run::branches(&mut of_run, run);
    run::evaluated(&mut of_run, run, "the report");
    run::costs(&mut of_run, run, &thresholds.run);
    for branch in &run.branches {
        let name = branch.branch.as_str();
        let limits = thresholds.of(name);
        let mut ledger = Ledger::of_branch(&mut judgement, name);
        branch::by_itself(&mut ledger, branch, run.model.layers, limits);
        let mut compared = Vec::new();
        for evaluation in &run.evaluations {
            match Measured::of(evaluation, name) {
                Err(problem) => ledger.breach("evaluation", problem),
                Ok(measured) => {
                    branch::against_fp16(&mut ledger, &measured, &evaluation.dataset, limits);
                    compared.push(branch::comparison(name, &evaluation.dataset, &measured, None));
                }
            }
        }
        judgement.branches.extend(compared);
    }
    judgement
}
