//! The text and the hint of every error.

use std::{fmt::Write, io};

use tch::TchError;

use super::*;

/// Errors of an enum, at least one of each of its variants: a variant that is not in the list is a compile error.
macro_rules! every {
    ($enum:ident: $($variant:ident $fields:tt)*) => {{
        #[allow(unreachable_patterns, reason = "a variant whose hint depends on its fields is there several times")]
        let _complete = |error: &$enum| match error {
            $($enum::$variant { .. } => {})*
        };
        vec![$(Error::from($enum::$variant $fields)),*]
    }};
}

/// `Variant`, or `Variant::Inner` for the enums within [`Error`].
fn name(error: &Error) -> String {
    let debug = format!("{error:?}");
    debug.split([' ', '{', ')']).next().unwrap_or_default().replace('(', "::")
}

#[track_caller]
fn snapshot(file: &str, errors: &[Error]) {
    let mut text = String::new();
    for error in errors {
        writeln!(text, "{}\n  error: {error}", name(error)).unwrap();
        if let Some(hint) = error.hint() {
            writeln!(text, "  hint: {hint}").unwrap();
        }
    }
    insta::assert_snapshot!(file, text);
}

fn json_error() -> serde_json::Error {
    serde_json::from_str::<u32>("{").unwrap_err()
}

#[test]
fn texts_of_errors() {
    let hub = || HubError::Reference { found: "a/b/c".into(), expected: "OWNER/NAME" };
    let errors = every! { Error:
        Io { action: "read", path: "model/config.json".into(), source: io::Error::other("it is in use") }
        Io { action: "write", path: "out/a".into(), source: io::Error::new(io::ErrorKind::StorageFull, "no space left") }
        Json { path: "model/config.json".into(), source: json_error() }
        Toml { path: "plan.toml".into(), message: "line 1: invalid type: string \"many\", expected usize".into() }
        UnknownKey { path: "plan.toml".into(), key: "sample".into(), nearest: Some("samples".into()) }
        UnknownKey { path: "plan.toml".into(), key: "zebra".into(), nearest: None }
        Value { what: "samples".into(), expected: "at least 1".into(), found: "0".into() }
        UnsupportedArchitecture { path: "model/config.json".into(), found: "GPTNeoXForCausalLM".into(), supported: "LlamaForCausalLM, MistralForCausalLM".into() }
        Config { path: "model/config.json".into(), key: "hidden_size".into(), expected: "an integer".into(), found: "\"64\"".into() }
        NotACheckpoint { path: "model".into(), missing: "`config.json`".into() }
        WeightsFormat { path: "model".into(), found: "tf_model.h5".into() }
        WeightsFormat { path: "model".into(), found: "llama-4bit.pt".into() }
        WeightsFormat { path: "model".into(), found: "llama.Q4_K_M.gguf".into() }
        SeveralWeights { path: "model".into(), found: "`a.safetensors`, `b.safetensors`".into() }
        Index { index: "model/model.safetensors.index.json".into(), tensor: "lm_head.weight".into(), shard: "model-00002-of-00002.safetensors".into(), problem: "there is no such file" }
        UndeclaredTensor { name: "model.layers.1.self_attn.o_proj.bias".into(), path: "model".into() }
        UndeclaredTensor { name: "model.layers.1.self_attn.q_norm.weight".into(), path: "model".into() }
        PytorchFile { path: "model/pytorch_model.bin".into(), problem: "its pickle calls `os.system`".into() }
        LfsPointer { path: "model/model.safetensors".into() }
        LfsPointer { path: "model.safetensors".into() }
        Safetensors { path: "model/model.safetensors".into(), problem: "it has 0 bytes".into() }
        Gguf { path: "m.gguf".into(), problem: "its name takes 9 bytes from byte 24, and 2 are left; the file is cut short".into() }
        NotForGguf { path: "out/main".into(), problem: "`q_proj` is asymmetric".into(), instead: "make a symmetric branch".into() }
        OutOfFolder { path: "model/tokenizer.json".into(), target: "/etc/passwd".into() }
        MissingTensor { name: "model.norm.weight".into(), path: "model".into() }
        TensorShape { name: "model.norm.weight".into(), expected: vec![64], found: vec![64, 1] }
        TensorDtype { name: "model.norm.weight".into(), expected: "F16, BF16 or F32", found: "I32".into() }
        TensorValue { name: "model.layers.0.mlp.up_proj.g_idx".into(), index: 5, expected: "a group below 2".into(), found: "7".into() }
        TensorWrite { name: "model.norm.weight".into(), problem: "expected 128 bytes, found 64".into() }
        NonFinite { place: "inputs of layer 1, down".into(), count: 2, total: 128, computed: true }
        NonFinite { place: "tensor `model.norm.weight`".into(), count: 1, total: 64, computed: false }
        Fp16Overflow { place: "tensor `lm_head.weight`, element 3".into(), value: 70_000.0 }
        Tokenizer { path: "model/tokenizer.json".into(), problem: "it has no model".into() }
        TokenizerModel { path: "model/tokenizer.model".into(), problem: "its model type is WORD".into() }
        ChatTemplate { file: "chat_template.jinja", problem: "line 2: unknown filter".into() }
        NoChatTemplate { what: "--chat".into() }
        UnknownDataset { name: "wikitext".into(), known: "wikitext2, c4".into() }
        DatasetNotFound { name: "c4".into(), files: "`en/c4-train.00000-of-01024.json.gz`".into(), places: "`data`".into(), fetch: "hf download allenai/c4".into() }
        Dataset { path: "text.jsonl".into(), problem: "line 2 has no `text`".into() }
        MissingColumn { path: "text.parquet".into(), column: "body".into(), found: "text".into() }
        EmptyColumn { dataset: "text.jsonl".into(), column: "text".into(), rows: 2 }
        TooLittleText { dataset: "text.txt".into(), tokens: 4, windows: 4, seq_len: 64, needed: 256 }
        SequenceTooLong { seq_len: 4096, max: 2048 }
        TokenOutOfRange { dataset: "text.txt".into(), id: 1004, position: 1, vocab: 1000 }
        PackFactor { linear: "model.layers.0.mlp.up_proj".into(), dimension: "out_features", size: 100, multiple: 8, bits: 4 }
        GroupSize { linear: "model.layers.0.mlp.up_proj".into(), group_size: 128, in_features: 64 }
        ReaderRefuses { reader: "vLLM 0.30 and newer".into(), variant: "4bit-32g-act".into(), why: "refuses act order (desc_act)".into(), taken: vec!["4bit-128g".into(), "4bit-32g".into()] }
        ReaderRefuses { reader: "vLLM 0.30 and newer".into(), variant: "4bit-128g".into(), why: "needs whole groups, K = 90 ends in a partial one".into(), taken: Vec::new() }
        OutputExists { path: "out".into() }
        CheckpointKind { path: "model".into(), expected: "a GPTQ checkpoint", found: "an unquantized one".into() }
        CheckpointKind { path: "model".into(), expected: "an unquantized checkpoint", found: "one that is quantized with `fp8`".into() }
        NotComparable { left: "model".into(), right: "out/main".into(), problem: "32 and 16 layers".into() }
        Interrupted {}
        Device { device: "cuda".into(), problem: "libtorch has no CUDA part".into() }
        Cuda { action: "launch `solve`".into(), problem: "out of memory".into() }
        Torch { action: "multiply".into(), source: TchError::Torch("sizes differ\nException raised from add at x.cpp".into()) }
        Torch { action: "multiply".into(), source: TchError::Torch("CUDA out of memory".into()) }
        Hub { 0: hub() }
        Cluster { 0: ClusterError::WithoutMpi }
        Numerical { 0: NumericalError::EmptyHessian { stage: "layer 0, q/k/v".into() } }
        Journal { 0: JournalError::Busy { path: "out".into() } }
        Resource { 0: ResourceError::DiskSpace { path: "out".into(), available: "1.0 GB".into(), needed: "4.0 GB".into() } }
        Report { 0: ReportError::NoBaseline { path: "baseline.json".into() } }
    };
    snapshot("errors", &errors);
}

#[test]
fn memory_that_ends_on_a_device_is_known_whoever_allocates() {
    let torch = |text: &str| Error::Torch { action: "multiply".into(), source: TchError::Torch(text.into()) };
    for text in [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
    ] {
        assert!(torch(text).is_out_of_device_memory(), "{text}");
        assert!(torch(text).hint().is_some(), "{text}");
    }
    assert!(
        Error::Cuda { action: "launch".into(), problem: "out of memory".into() }.is_out_of_device_memory()
    );
    for text in [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm(handle)`",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnXpotrf(handle)`",
        "sizes differ",
    ] {
        assert!(!torch(text).is_out_of_device_memory(), "{text}");
    }
}

#[test]
fn texts_of_errors_of_the_hub() {
    let repository = || "owner/name".to_owned();
    let endpoint = || "https://huggingface.co".to_owned();
    let page = || "https://huggingface.co/owner/name".to_owned();
    let errors = every! { HubError:
        Reference { found: "a/b/c".into(), expected: "OWNER/NAME" }
        NotFound { kind: "model", repository: repository(), endpoint: endpoint(), token: false }
        NotFound { kind: "model", repository: repository(), endpoint: endpoint(), token: true }
        Revision { repository: repository(), revision: "dev".into(), known: "`main`".into() }
        Gated { repository: repository(), page: page(), token: false }
        Gated { repository: repository(), page: page(), token: true }
        Unauthorized { action: "read owner/name".into(), message: "401 Unauthorized".into(), token: false }
        Unauthorized { action: "read owner/name".into(), message: "403 Forbidden".into(), token: true }
        File { repository: repository(), revision: "main".into(), file: "config.json".into() }
        WeightsFormat { repository: repository(), found: "tf_model.h5".into() }
        WeightsFormat { repository: repository(), found: "llama-4bit.pt".into() }
        SeveralWeights { repository: repository(), found: "`a.safetensors`, `b.safetensors`".into() }
        NotCached { why: "HF_HUB_OFFLINE is set".into(), repository: repository(), revision: "main".into(), missing: "`config.json`".into(), offline: true }
        NotCached { why: "no answer".into(), repository: repository(), revision: "main".into(), missing: "`config.json`".into(), offline: false }
        Unreachable { endpoint: endpoint(), problem: "connection refused".into() }
        RateLimited { endpoint: endpoint(), after: Some(60) }
        RateLimited { endpoint: endpoint(), after: None }
        Answer { action: "read owner/name".into(), message: "500 Internal Server Error".into() }
        NoXet { endpoint: endpoint(), repository: repository(), found: "basic".into() }
        Branch { branch: "dev".into(), known: "`main`".into() }
        Licence { model: repository(), licence: "llama2".into() }
        NotProven { branch: "main".into(), place: "the Hub".into(), file: "config.json".into(), expected: "sha256 1".into(), found: "sha256 2".into() }
        Git { action: "push".into(), problem: "it is not installed".into(), hint: Some("on Debian and Ubuntu: sudo apt install git-lfs") }
        Git { action: "push".into(), problem: "rejected".into(), hint: None }
        Template { path: "card.jinja".into(), problem: "line 2: unknown filter".into() }
        Cut { repository: repository(), file: "model.safetensors".into(), got: 10, size: 20, problem: "connection reset".into() }
        Content { repository: repository(), file: "model.safetensors".into(), expected: "20 bytes".into(), found: "10 bytes".into() }
    };
    snapshot("hub_errors", &errors);
}

#[test]
fn texts_of_errors_of_a_run() {
    let memory = |memory: &str, flag: Option<&str>| {
        Error::from(ResourceError::Memory {
            memory: memory.into(),
            available: "1.0 GB".into(),
            needed: "4.0 GB for the layer".into(),
            flag: flag.map(str::to_owned),
        })
    };
    let mut errors = every! { NumericalError:
        NotPositiveDefinite { stage: "layer 0, q/k/v".into(), damp: 1.0 }
        EmptyHessian { stage: "layer 0, q/k/v".into() }
        Unsolved { linear: "model.layers.0.mlp.up_proj".into(), problem: "3 of 64 scales are NaN".into() }
    };
    errors.extend(every! { JournalError:
        Broken { path: "out/journal.json".into(), problem: "it ends after 10 bytes".into() }
        Differs { path: "out".into(), layers: 3, total: 32, differences: "samples: 128 then, 64 now".into() }
        Busy { path: "out".into() }
    });
    errors.extend(every! { ClusterError:
        WithoutMpi {}
        Start { problem: "it runs already".into() }
        Silent { name: "rank 1 (node-b)".into(), seconds: 60 }
        Differs { name: "rank 1 (node-b)".into(), differences: "samples (128 on rank 0, 64 on rank 1)".into() }
        NotShared { name: "rank 1 (node-b)".into(), folder: "out/.journal.partial".into() }
    });
    errors.extend(every! { ResourceError:
        DiskSpace { path: "out".into(), available: "1.0 GB".into(), needed: "4.0 GB".into() }
        Memory { memory: "memory".into(), available: "1.0 GB".into(), needed: "4.0 GB for the layer".into(), flag: None }
    });
    errors.push(memory("memory", Some("--max-memory 2GiB")));
    errors.push(memory("device memory", None));
    errors.extend(every! { ReportError:
        Stale { path: "out/main/eval.json".into() }
        NoBaseline { path: "baseline.json".into() }
    });
    snapshot("run_errors", &errors);
}
