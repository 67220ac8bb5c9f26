//! Reports: plain data of runs and evaluations, which is written as JSON, and the tables, charts and pages made from it.

mod advice;
mod charts;
pub(crate) mod choice;
mod comparison;
mod evaluation;
mod figures;
mod html;
mod json;
mod markdown;
mod provenance;
mod recommendation;
pub mod statistics;
mod text;

pub(crate) use comparison::not_loaded_by;
pub use comparison::{COMPARISON_SCHEMA, Comparison, Entry, RunInput, RunSummary, Source};
pub(crate) use evaluation::title;
pub use evaluation::{
    CheckpointReport, EVALUATION_FILE, EVALUATION_SCHEMA, EvaluatedModel, Evaluation, Interval,
    ModelEvaluations, ReaderReport, SplitReport, check_weights_beside, evaluation_file,
};
pub use html::html;
pub(crate) use json::read_schema;
pub use json::{
    BranchReport, CalibrationReport, ComputeReport, GENERATED_BY, LayerExchange, LayersComputed,
    LinearReport, ModelReport, ModelSource, Phase, PhaseReport, REPORT_FILE, REPORT_SCHEMA, Report,
    SourceReport, StageMemory, StageSeconds, Stages,
};
pub use markdown::markdown;
pub(crate) use markdown::text as markdown_text;
pub use recommendation::{CLOSE, FACTOR, ForReaders, Recommendation, USUAL_BITS};
pub use text::{comparison_table, evaluation_table, run_table};

use crate::units::bytes;
