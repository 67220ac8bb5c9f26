//! Stores evaluations in the folder of the evaluated model.

use std::path::PathBuf;

use super::{describe, folder_name};
use crate::{
    checkpoint::{Checkpoint, write_json_atomically},
    error::Result,
    report::{
        EVALUATION_SCHEMA, EvaluatedModel, Evaluation, GENERATED_BY, ModelEvaluations, evaluation_file,
    },
};

/// Adds the figures of `model`, which is one of `evaluation`'s, to the evaluations in the folder of `checkpoint`. Figures
/// of other weights that the file holds are discarded. Returns the file.
///
/// # Errors
/// When the checkpoint is not a quantized one, or the file cannot be read or written.
pub fn store(checkpoint: &Checkpoint, evaluation: &Evaluation, model: &EvaluatedModel) -> Result<PathBuf> {
    let path = evaluation_file(checkpoint.dir());
    let described = describe(checkpoint)?;
    let known = if path.exists() { Some(ModelEvaluations::read(&path)?) } else { None };
    let mut known = match known {
        Some(known) if known.checkpoint.digest == described.digest => known,
        _ => ModelEvaluations {
            schema: EVALUATION_SCHEMA.into(),
            generated_by: String::new(),
            name: String::new(),
            checkpoint: described.clone(),
            evaluations: Vec::new(),
        },
    };
    known.generated_by = GENERATED_BY.into();
    known.name = folder_name(checkpoint.dir());
    known.checkpoint = described;
    let model = EvaluatedModel { name: known.name.clone(), ..model.clone() };
    known.add(Evaluation { models: vec![model], ..evaluation.clone() });
    write_json_atomically(&path, &known)?;
    Ok(path)
}
