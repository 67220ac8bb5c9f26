//! What a run made and how good it is: plain data, written as `run.json`; everything shown is made from it.

mod evaluation;
mod json;
pub mod statistics;
mod text;

pub use evaluation::{
    CheckpointReport, EVALUATION_FILE, EVALUATION_SCHEMA, EvaluatedModel, Evaluation, Interval,
    ModelEvaluations, ReaderReport,
};
pub use json::{
    BranchReport, CalibrationReport, ComputeReport, GENERATED_BY, LinearReport, ModelReport, REPORT_FILE,
    REPORT_SCHEMA, Report, StageSeconds,
};
pub use text::{bytes, evaluation_table, run_table};
