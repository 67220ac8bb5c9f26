//! The library's error type: every variant names the thing, what was expected and what was found.

mod cluster;
mod hint;
mod hub;
mod run;

use std::{
    fmt::Display,
    path::{Path, PathBuf},
};

pub use cluster::ClusterError;
pub(crate) use hint::NO_MORE_PAGES;
pub use hub::HubError;
pub use run::{JournalError, NumericalError, ReportError, ResourceError};

/// The library's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the library.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The Hub or a git remote.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The ranks of a run on several machines.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// An operation on a file or folder failed.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// The attempted action: `read`, `create`, `write`, …
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A JSON file does not parse.
    #[error("`{}` is not the JSON expected here: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        source: serde_json::Error,
    },
    /// A TOML file (plan or recipe) does not parse.
    #[error("`{}` is not the TOML expected here: {message}", path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        message: String,
    },
    /// A plan or recipe holds an unknown key.
    #[error("unknown key `{key}` in `{}`", path.display())]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key as written.
        key: String,
        /// The nearest key that exists.
        nearest: Option<String>,
    },
    /// A value from the user is not a valid one.
    #[error("{what}: expected {expected}, found `{found}`")]
    Value {
        /// The option or key.
        what: String,
        /// The expected value.
        expected: String,
        /// The found value.
        found: String,
    },
    /// The checkpoint holds a model of another family.
    #[error("`{}` holds architecture `{found}`, which is not supported (supported: {supported})", path.display())]
    UnsupportedArchitecture {
        /// `config.json`.
        path: PathBuf,
        /// The architecture it names.
        found: String,
        /// The supported architectures.
        supported: String,
    },
    /// A key of `config.json` is missing or cannot be used.
    #[error("`{}`: key `{key}`: expected {expected}, found {found}", path.display())]
    Config {
        /// `config.json` or `quantize_config.json`.
        path: PathBuf,
        /// The key.
        key: String,
        /// The expected value.
        expected: String,
        /// The found value.
        found: String,
    },
    /// A folder that should be a checkpoint is not one.
    #[error("`{}` is not a checkpoint folder: it has no {missing}", path.display())]
    NotACheckpoint {
        /// The folder.
        path: PathBuf,
        /// The missing file.
        missing: String,
    },
    /// The folder has weights in unsupported formats only.
    #[error("`{}` has only `{found}`; expected safetensors or `pytorch_model.bin`", path.display())]
    WeightsFormat {
        /// The folder.
        path: PathBuf,
        /// The file found.
        found: String,
    },
    /// The folder has several weights files, and no setting chooses one.
    #[error("`{}` has several weights files: {found}", path.display())]
    SeveralWeights {
        /// The folder.
        path: PathBuf,
        /// Their names, quoted.
        found: String,
    },
    /// The index names a shard that is not there.
    #[error("`{}` says tensor `{tensor}` is in `{shard}`, but {problem}", index.display())]
    Index {
        /// `model.safetensors.index.json`.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shard named.
        shard: String,
        /// The problem there.
        problem: &'static str,
    },
    /// A decoder layer has a tensor that is not in the config and would change what the model computes.
    #[error("tensor `{name}` of `{}` is not zero, and the config does not describe it: the model would compute other results", path.display())]
    UndeclaredTensor {
        /// The tensor.
        name: String,
        /// The folder.
        path: PathBuf,
    },
    /// A PyTorch checkpoint cannot be read.
    #[error("`{}` cannot be read as a PyTorch checkpoint: {problem}", path.display())]
    PytorchFile {
        /// The file.
        path: PathBuf,
        /// The problem.
        problem: String,
    },
    /// A clone without git-lfs has pointers in place of large files.
    #[error("`{}` is a pointer of git-lfs, not the file itself: this clone was made without its large files", path.display())]
    LfsPointer {
        /// The file.
        path: PathBuf,
    },
    /// A safetensors file is cut short or contradicts itself.
    #[error("`{}` is not a whole safetensors file: {problem}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// The problem, with numbers.
        problem: String,
    },
    /// A GGUF file is cut short, contradicts itself, or has unsupported contents.
    #[error("`{}` cannot be read as a GGUF file: {problem}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// The problem, with numbers.
        problem: String,
    },
    /// A branch that no GGUF file can hold as it is.
    #[error("`{}` cannot become a GGUF file as it is: {problem}", path.display())]
    NotForGguf {
        /// The branch.
        path: PathBuf,
        /// The obstacle.
        problem: String,
        /// What to make instead.
        instead: String,
    },
    /// A link, or a file name in an index, points outside the model's folder.
    #[error("`{}` points outside its folder, to `{}`", path.display(), target.display())]
    OutOfFolder {
        /// The file, by its name.
        path: PathBuf,
        /// The path it leads to.
        target: PathBuf,
    },
    /// A tensor the model needs is not in the checkpoint.
    #[error("tensor `{name}` is missing from `{}`", path.display())]
    MissingTensor {
        /// The tensor.
        name: String,
        /// The checkpoint folder.
        path: PathBuf,
    },
    /// A tensor's shape disagrees with the config.
    #[error("tensor `{name}`: expected shape {expected:?}, found {found:?}")]
    TensorShape {
        /// The tensor.
        name: String,
        /// Shape that follows from the config.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A tensor's dtype is not a supported one.
    #[error("tensor `{name}`: expected dtype {expected}, found {found}")]
    TensorDtype {
        /// The tensor.
        name: String,
        /// The supported dtypes.
        expected: &'static str,
        /// The dtype in the file.
        found: String,
    },
    /// A tensor holds a number it must not hold.
    #[error("tensor `{name}`, element {index}: expected {expected}, found {found}")]
    TensorValue {
        /// The tensor.
        name: String,
        /// Position, counted row by row from 0.
        index: usize,
        /// The expected value.
        expected: String,
        /// The found value.
        found: String,
    },
    /// A tensor given to the writer differs from the planned one.
    #[error("cannot write tensor `{name}`: {problem}")]
    TensorWrite {
        /// The tensor.
        name: String,
        /// The problem, with numbers.
        problem: String,
    },
    /// NaN or infinity in place of numbers.
    #[error("{place}: {count} of {total} values are NaN or infinite")]
    NonFinite {
        /// The tensor, or the activation and its layer.
        place: String,
        /// Number of values that are not finite.
        count: u64,
        /// Of how many.
        total: u64,
        /// Whether the model computed them; otherwise a file holds them.
        computed: bool,
    },
    /// A weight that fp16 cannot hold.
    #[error("{place}: value {value} does not fit fp16 (largest 65504)")]
    Fp16Overflow {
        /// The tensor, and where in it.
        place: String,
        /// The value.
        value: f32,
    },
    /// The tokenizer cannot be used.
    #[error("`{}`: {problem}", path.display())]
    Tokenizer {
        /// `tokenizer.json` or `tokenizer.model`.
        path: PathBuf,
        /// The problem.
        problem: String,
    },
    /// A SentencePiece `tokenizer.model` without `tokenizer.json` beside it, which cannot be used.
    #[error("`{}` cannot be used, and there is no `tokenizer.json`: {problem}", path.display())]
    TokenizerModel {
        /// `tokenizer.model`.
        path: PathBuf,
        /// The problem.
        problem: String,
    },
    /// A chat template is broken, or refuses a conversation.
    #[error("the chat template in `{file}` cannot be applied: {problem}")]
    ChatTemplate {
        /// The file that holds it.
        file: &'static str,
        /// Its line, and the reason.
        problem: String,
    },
    /// Conversations need a chat template, and the model has none.
    #[error("{what} needs a chat template, and the model has none")]
    NoChatTemplate {
        /// The dataset or option that needs it.
        what: String,
    },
    /// A dataset name that is neither a recipe nor a file.
    #[error("dataset `{name}` is neither a recipe ({known}) nor a file or folder")]
    UnknownDataset {
        /// The name as given.
        name: String,
        /// The recipes that exist.
        known: String,
    },
    /// A recipe's files are not on this machine.
    #[error("the files of dataset `{name}` are not on this machine: looked for {files} in {places}")]
    DatasetNotFound {
        /// The recipe.
        name: String,
        /// The files looked for.
        files: String,
        /// The searched folders.
        places: String,
        /// The command that fetches them.
        fetch: String,
    },
    /// A dataset file cannot be read.
    #[error("`{}`: {problem}", path.display())]
    Dataset {
        /// The file.
        path: PathBuf,
        /// The problem, with numbers.
        problem: String,
    },
    /// The text column does not exist.
    #[error("`{}` has no text column `{column}` (columns: {found})", path.display())]
    MissingColumn {
        /// The file.
        path: PathBuf,
        /// The requested column.
        column: String,
        /// The columns that exist.
        found: String,
    },
    /// The text column is empty.
    #[error("column `{column}` of {dataset} holds no text in any of its {rows} rows")]
    EmptyColumn {
        /// The dataset.
        dataset: String,
        /// The column.
        column: String,
        /// Rows read.
        rows: usize,
    },
    /// The text is too short for the requested windows.
    #[error(
        "{dataset} has {tokens} tokens; the windows ({windows} of {seq_len} tokens) need at least {needed}"
    )]
    TooLittleText {
        /// The dataset.
        dataset: String,
        /// Tokens it has.
        tokens: usize,
        /// Requested windows.
        windows: usize,
        /// Tokens a window.
        seq_len: usize,
        /// Tokens needed.
        needed: usize,
    },
    /// A window longer than the model's context.
    #[error("sequence length {seq_len} is above the model's max_position_embeddings {max}")]
    SequenceTooLong {
        /// Requested tokens.
        seq_len: usize,
        /// The model's limit.
        max: usize,
    },
    /// A token id outside the vocabulary.
    #[error("{dataset}: token id {id} at position {position} is outside the vocabulary of {vocab}")]
    TokenOutOfRange {
        /// The dataset.
        dataset: String,
        /// The id.
        id: u32,
        /// Its position in the text.
        position: usize,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// A variant that a required reader does not take.
    #[error("variant {variant}: {reader} (--require-reader) does not load it: it {why}")]
    ReaderRefuses {
        /// The reader.
        reader: String,
        /// The variant.
        variant: String,
        /// The reason: `refuses act order (desc_act)`.
        why: String,
        /// Variants of this model that the reader takes.
        taken: Vec<String>,
    },
    /// A linear whose shape the format cannot hold.
    #[error("`{linear}`: {dimension} {size} is not a multiple of {multiple}, which {bits}-bit packing needs")]
    PackFactor {
        /// The linear.
        linear: String,
        /// `in_features` or `out_features`.
        dimension: &'static str,
        /// Its size.
        size: usize,
        /// The multiple needed.
        multiple: usize,
        /// Bits a code.
        bits: u32,
    },
    /// A group size that does not fit a linear.
    #[error("`{linear}`: group size {group_size} is larger than its {in_features} input features")]
    GroupSize {
        /// The linear.
        linear: String,
        /// The requested group size.
        group_size: usize,
        /// Input features.
        in_features: usize,
    },
    /// A stage or a linear cannot be solved numerically.
    #[error(transparent)]
    Numerical(#[from] NumericalError),
    /// The output exists already.
    #[error("`{}` exists already", path.display())]
    OutputExists {
        /// The file or folder.
        path: PathBuf,
    },
    /// An interrupted run cannot be resumed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The machine has too little disk space or memory.
    #[error(transparent)]
    Resource(#[from] ResourceError),
    /// Figures cannot be reported or compared.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// A checkpoint of another kind than the command needs: GPTQ or unquantized.
    #[error("`{}`: expected {expected}, found {found}", path.display())]
    CheckpointKind {
        /// The folder.
        path: PathBuf,
        /// The expected kind.
        expected: &'static str,
        /// The found kind.
        found: String,
    },
    /// Two models that cannot be compared.
    #[error("`{}` cannot be compared with `{}`: {problem}", left.display(), right.display())]
    NotComparable {
        /// One folder.
        left: PathBuf,
        /// The other.
        right: PathBuf,
        /// The differences.
        problem: String,
    },
    /// A signal or the caller stopped the run.
    #[error("stopped on request")]
    Interrupted,
    /// A device cannot be used.
    #[error("device `{device}` cannot be used: {problem}")]
    Device {
        /// As given.
        device: String,
        /// Why.
        problem: String,
    },
    /// An operation of the CUDA driver or compiler failed.
    #[error("CUDA could not {action}: {problem}")]
    Cuda {
        /// The attempted action.
        action: String,
        /// Its reason.
        problem: String,
    },
    /// An operation of libtorch failed.
    #[error("libtorch could not {action}: {}", without_backtrace(source))]
    Torch {
        /// The attempted action.
        action: String,
        /// libtorch's reason.
        source: tch::TchError,
    },
}

impl Error {
    /// An [`Error::Io`] for `path`, for `map_err`.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}

/// `` `a`, `b` ``: names, for messages.
pub(crate) fn quoted(names: impl IntoIterator<Item: Display>) -> String {
    names.into_iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// An [`Error::Toml`] with the line and the parser's message, without its excerpt; `text` is what was parsed.
pub(crate) fn toml_error(path: &Path, text: &str, error: &toml::de::Error) -> Error {
    let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
    let place = line.map_or_else(String::new, |line| format!("line {line}: "));
    Error::Toml { path: path.into(), message: format!("{place}{}", error.message()) }
}

/// Adds the attempted action to a libtorch error.
pub trait TorchContext<T> {
    /// `action` completes the sentence "libtorch could not …".
    fn torch(self, action: &str) -> Result<T>;
}

impl<T> TorchContext<T> for std::result::Result<T, tch::TchError> {
    fn torch(self, action: &str) -> Result<T> {
        self.map_err(|source| Error::Torch { action: action.to_owned(), source })
    }
}

/// The message without the C++ stack that libtorch appends.
fn without_backtrace(error: &tch::TchError) -> String {
    let text = error.to_string();
    text.split("\nException raised from").next().unwrap_or_default().trim_end().to_owned()
}

#[cfg(test)]
mod tests;
