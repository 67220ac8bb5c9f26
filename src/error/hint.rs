//! What the user can do about an error.

use super::Error;

impl Error {
    /// What the user can do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::UnknownKey { nearest: Some(key), .. } => format!("did you mean `{key}`?"),
            Self::WeightsFormat { path, .. } => format!(
                "convert it: python -c \"from transformers import AutoModelForCausalLM as M; \
                 M.from_pretrained('{0}').save_pretrained('{0}-safetensors')\"",
                path.display()
            ),
            Self::TokenizerModelOnly { path } => format!(
                "convert it: python -c \"from transformers import AutoTokenizer as T; \
                 T.from_pretrained('{0}').save_pretrained('{0}')\"",
                path.display()
            ),
            Self::DatasetNotFound { fetch, .. } => fetch.clone(),
            Self::MissingColumn { .. } => "name the column with --text-column".into(),
            Self::TooLittleText { .. } => "use fewer or shorter windows, or more text".into(),
            Self::SequenceTooLong { max, .. } => format!("use --seq-len {max} or less"),
            Self::GroupSize { in_features, .. } => {
                format!("use a group size up to {in_features}, or -1 for one group a row")
            }
            Self::NotPositiveDefinite { .. } => {
                "use more or more varied calibration text (--samples), or a larger --damp".into()
            }
            Self::NoBaseline { .. } => "make it from a run that is good, with --update".into(),
            Self::OutputExists { .. } => "choose another folder, or remove this one".into(),
            Self::DiskSpace { .. } => "free some space or choose a folder on another disk".into(),
            Self::Index { .. } | Self::Safetensors { .. } => "download the file again".into(),
            Self::Memory { memory, .. } if memory.starts_with("device") => {
                "use fewer --variant, a shorter --seq-len, or a device with more memory".into()
            }
            Self::Memory { .. } => {
                "allow more with --max-memory, or use fewer --variant or a shorter --seq-len".into()
            }
            Self::Torch { source, .. } if is_out_of_memory(source) => {
                "use fewer --samples, a shorter --seq-len or fewer --variant".into()
            }
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                "the disk is full: free some space and start again; nothing half-written was left".into()
            }
            _ => return None,
        })
    }
}

impl Error {
    /// Whether a device has too little memory for an operation, which smaller operations might still fit.
    pub fn is_out_of_device_memory(&self) -> bool {
        match self {
            Self::Torch { source, .. } => source.to_string().contains("CUDA out of memory"),
            Self::Cuda { problem, .. } => problem == "out of memory",
            _ => false,
        }
    }
}

fn is_out_of_memory(error: &tch::TchError) -> bool {
    let text = error.to_string();
    text.contains("not enough memory") || text.contains("out of memory")
}
