//! Hints: the user's remedy for an error.

use std::{fmt::Display, path::Path};

use super::Error;

impl Error {
    /// The user's remedy, if there is one.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Hub(error) => return error.hint(),
            Self::Cluster(error) => error.hint().into(),
            Self::UnknownKey { nearest: Some(key), .. } => format!("did you mean `{key}`?"),
            Self::UndeclaredTensor { name, path } => match name.ends_with(".bias") {
                true => format!(
                    "if the model has biases, say so in `{}`: `attention_bias` or `mlp_bias` (or the key of its family)",
                    path.join("config.json").display()
                ),
                false => "check that the config belongs to this model: it must describe every tensor of a layer".into(),
            },
            Self::LfsPointer { path } => {
                let folder = path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
                format!("fetch the files: git -C '{}' lfs pull (`git lfs install` once before)", folder.display())
            }
            Self::PytorchFile { path, .. } => {
                let folder = path.parent().unwrap_or(path);
                let command = match path.ends_with("pytorch_model.bin") {
                    true => conversion(folder, "pytorch_model.bin"),
                    // A shard.
                    false => to_safetensors(folder, ""),
                };
                format!("convert the model: {command}")
            }
            Self::WeightsFormat { path, found } if found.ends_with(".gguf") => format!(
                "verify, inspect, eval --quantized and generate --tokenizer DIR read the file itself, {}; for all else convert it: {}",
                path.join(found).display(),
                conversion(path, found)
            ),
            Self::WeightsFormat { path, found } => format!("convert it: {}", conversion(path, found)),
            Self::CheckpointKind { found, .. } if found.contains(".zeros`") => {
                "no program reads it any more: quantize the unquantized model again: gptq quantize --model MODEL --out OUT".into()
            }
            Self::CheckpointKind { found, .. } if found.starts_with("a quantized one") => {
                "name the unquantized model that it was made from".into()
            }
            Self::SeveralWeights { path, .. } => choose_weights(&format_args!("`{}`", path.display())),
            Self::CheckpointKind { path, found, .. } if found.contains("`fp8`") => format!(
                "make it bf16 first: python -c \"from transformers import AutoModelForCausalLM as M, FineGrainedFP8Config as C; \
                 M.from_pretrained('{0}', dtype='bfloat16', quantization_config=C(dequantize=True)).save_pretrained('{0}-bf16')\"",
                path.display()
            ),
            Self::TokenizerModel { path, .. } => format!(
                "convert it: python -c \"from transformers import AutoTokenizer as T; \
                 T.from_pretrained('{0}').save_pretrained('{0}')\"",
                path.parent().unwrap_or(path).display()
            ),
            Self::NoChatTemplate { .. } => {
                "use an instruct model, put its chat_template.jinja into the folder, or use plain text".into()
            }
            Self::DatasetNotFound { fetch, .. } => fetch.clone(),
            Self::OutOfFolder { .. } => {
                "if you trust the targets of its links, copy the folder with them: cp -rL FOLDER COPY".into()
            }
            Self::MissingColumn { .. } => "name the column with --text-column".into(),
            Self::TooLittleText { .. } => "use fewer or shorter windows, or more text".into(),
            Self::SequenceTooLong { max, .. } => format!(
                "use --seq-len {max} or less; only a model whose rotary embedding is scaled takes more, with --allow-long-windows"
            ),
            Self::Value { what, found, .. } if what.starts_with("split of ") && found == "none" => "name a split with --split".into(),
            Self::GroupSize { in_features, .. } => {
                format!("use a group size up to {in_features}, or -1 for one group a row")
            }
            Self::ReaderRefuses { taken, .. } if taken.is_empty() => {
                "it loads no variant of this model: leave --require-reader out".into()
            }
            Self::ReaderRefuses { taken, .. } => format!("it loads --variant {}", taken.join(", ")),
            Self::Numerical(problem) => problem.hint().into(),
            Self::NonFinite { computed: true, .. } => {
                "the model itself produces them: check the weights of the layers before, or use --compute-dtype fp32".into()
            }
            Self::NonFinite { .. } => "the file contains them: download it again, or use another copy".into(),
            Self::OutputExists { .. } => "choose another folder, or remove this one".into(),
            Self::Journal(error) => error.hint().into(),
            Self::Resource(error) => error.hint(),
            Self::Report(error) => error.hint(),
            Self::NotForGguf { instead, .. } => instead.clone(),
            Self::Gguf { problem, .. } if problem.contains("cut short") => "download the file again".into(),
            Self::Gguf { path, problem } if problem.contains("expected `GGUF`") => {
                format!("name the folder of other checkpoints: {}", path.parent().unwrap_or(path).display())
            }
            Self::Index { .. } | Self::Safetensors { .. } => "download the file again".into(),
            Self::Torch { source, .. } if is_out_of_memory(source) => {
                "use fewer --samples, a shorter --seq-len or fewer --variant".into()
            }
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                "the disk is full: free some space and start the same command again".into()
            }
            _ => return None,
        })
    }

    /// Whether a device has too little memory for an operation; smaller operations may still fit.
    pub fn is_out_of_device_memory(&self) -> bool {
        match self {
            Self::Torch { source, .. } => reports_full_device(&source.to_string()),
            Self::Cuda { problem, .. } => problem == "out of memory",
            _ => false,
        }
    }

    /// Whether the system locks no more pages; memory that is not page-locked may still be there.
    pub fn is_out_of_page_locked_memory(&self) -> bool {
        matches!(self, Self::Cuda { problem, .. } if problem == NO_MORE_PAGES)
    }
}

/// The problem of an [`Error::Cuda`] when the system locks no more pages of memory.
pub(crate) const NO_MORE_PAGES: &str = "the system locks no more memory";

/// Whether a text of libtorch reports that a device's memory has ended. The text is that of its own allocator, CUDA's run-time
/// library, cuBLAS or cuSOLVER; the workspaces of the last two are not libtorch's. If the last two lack memory for a handle, they
/// report a status that has other causes in other calls.
fn reports_full_device(text: &str) -> bool {
    const TEXTS: [&[&str]; 6] = [
        &["CUDA out of memory"],
        &["CUDA error: out of memory"],
        &["CUBLAS_STATUS_ALLOC_FAILED"],
        &["CUSOLVER_STATUS_ALLOC_FAILED"],
        &["CUBLAS_STATUS_NOT_INITIALIZED", "cublasCreate"],
        &["CUSOLVER_STATUS_INTERNAL_ERROR", "cusolverDnCreate"],
    ];
    TEXTS.iter().any(|parts| parts.iter().all(|part| text.contains(part)))
}

/// How to choose one of several weights files.
pub(super) fn choose_weights(place: &dyn Display) -> String {
    format!(
        "name one of them in `quantize_config.json` of {place}, without `.safetensors`: {{\"model_file_base_name\": \"NAME\"}}; or \
         remove the others"
    )
}

/// The command that converts the weights file `found` of a folder.
pub(super) fn conversion(folder: &Path, found: &str) -> String {
    match found.rsplit('.').next().unwrap_or_default() {
        "gguf" => to_safetensors(folder, &format!(", gguf_file='{found}'")),
        "h5" => format!("{} (transformers 4 with TensorFlow)", to_safetensors(folder, ", from_tf=True")),
        "msgpack" => format!("{} (transformers 4 with Flax)", to_safetensors(folder, ", from_flax=True")),
        "bin" | "pt" | "pth" | "ckpt" => format!(
            "python -c \"import torch; from safetensors.torch import save_file; \
             d = torch.load('{0}/{found}', map_location='cpu', weights_only=True); \
             save_file({{k: v.contiguous().clone() for k, v in d.items()}}, '{0}/model.safetensors')\"",
            folder.display()
        ),
        _ => to_safetensors(folder, ""),
    }
}

/// The command with which transformers convert the weights of a folder.
fn to_safetensors(folder: &Path, arguments: &str) -> String {
    format!(
        "python -c \"from transformers import AutoModelForCausalLM as M; \
         M.from_pretrained('{0}'{arguments}).save_pretrained('{0}-safetensors')\"",
        folder.display()
    )
}

fn is_out_of_memory(error: &tch::TchError) -> bool {
    let text = error.to_string();
    text.contains("not enough memory") || text.contains("out of memory") || reports_full_device(&text)
}
