//! What was measured of a run's branches, with the run and since.

use std::path::Path;

use crate::{
    error::Result,
    report::{
        Comparison, EVALUATION_FILE, EvaluatedModel, Evaluation, ModelEvaluations, Report, RunInput,
        check_weights_beside,
    },
};

/// All evaluations of the run's branches, the one that decides first: those in its report, and those that `gptq eval`
/// kept in the branches' folders.
pub(super) fn evaluations(report: &Report, run: &Path) -> Result<Vec<Evaluation>> {
    let mut measured = Vec::new();
    for branch in &report.branches {
        let path = run.join(&branch.branch).join(EVALUATION_FILE);
        if path.exists() {
            let mut figures = ModelEvaluations::read(&path)?;
            check_weights_beside(&path, &figures.checkpoint.digest)?;
            figures.name.clone_from(&branch.branch);
            measured.push(figures);
        }
    }
    let input = RunInput { name: report.model.name.clone(), report: report.clone(), measured };
    let Comparison { protocols, entries, .. } = Comparison::new(vec![input], Vec::new(), None)?;
    let with_models = |(at, protocol): (usize, Evaluation)| {
        let models = entries.iter().filter_map(|entry| {
            let model = entry.measured[at].clone()?;
            Some(EvaluatedModel { name: entry.name.clone(), ..model })
        });
        Evaluation { models: models.collect(), ..protocol }
    };
    Ok(protocols.into_iter().enumerate().map(with_models).collect())
}
