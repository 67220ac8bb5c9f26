//! What a run made and how good it is: plain data, written as `run.json`; everything shown is made from it.

mod json;
mod text;

pub use json::{
    BranchReport, CalibrationReport, ComputeReport, EvaluatedModel, Evaluation, Interval, LayersComputed,
    LinearReport, ModelReport, REPORT_FILE, REPORT_SCHEMA, Report,
};
pub use text::{bytes, duration, evaluation_table, run_table};
