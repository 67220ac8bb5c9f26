//! Which file of a folder or repository holds the weights.

use std::path::Path;

use serde_json::Value;

use super::quantization::{QUANTIZATION_KEY, QUANTIZE_CONFIG_FILE};
use crate::{
    architectures::CONFIG_FILE,
    error::{Result, quoted},
    folder::file_in,
    json::{Fields, read_json},
};

/// All weights in one file.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// Which shard each tensor is in.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// All weights in PyTorch's own format, or the index of its shards.
const PYTORCH_FILES: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];

/// Endings of names after `model_file_base_name`: all weights, or the index of their shards.
const ENDINGS: [&str; 2] = [".safetensors", ".safetensors.index.json"];
/// Name endings of weights in formats that are not read under these names.
const OTHER_WEIGHTS: [&str; 8] = [".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"];
/// All forms of weights that are read from a folder, for messages.
const FORMS: &str = "weights (`model.safetensors` or any other safetensors file, such as `gptq_model-4bit-128g.safetensors`; an index of \
                     shards; `pytorch_model.bin`)";
/// Files of trainers beside weights with such names.
const NO_WEIGHTS: [&str; 4] = ["training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt"];

/// Why files hold no weights that can be read.
#[derive(Debug, PartialEq, Eq)]
pub enum NoWeights {
    /// This is missing.
    Missing(String),
    /// Several files could be the weights; their names, quoted.
    Several(String),
    /// The weights are in another format; the name of one such file.
    OtherFormat(String),
}

/// The file with all weights, or the index of their shards (its name ends in `.index.json`), of a folder with files of these
/// names. It is the first of: what `base_names` name, `model.safetensors` or its index, the only safetensors file or index of any
/// name, `pytorch_model.bin` or its index. Files in subfolders do not count.
pub fn weights_file<'a>(names: &[&'a str], base_names: &[String]) -> Result<&'a str, NoWeights> {
    let find = |wanted: &str| names.iter().copied().find(|name| *name == wanted);
    let named = base_names.iter().flat_map(|base| ENDINGS.map(|end| format!("{base}{end}")));
    if let Some(found) =
        named.chain([WEIGHTS_FILE, INDEX_FILE].map(str::to_owned)).find_map(|name| find(&name))
    {
        return Ok(found);
    }
    match candidates(names)[..] {
        [] => {}
        [only] => return Ok(only),
        ref several => return Err(NoWeights::Several(quoted(several))),
    }
    let shards: Vec<_> = safetensors(names).collect();
    match (shards[..].first().and_then(|name| shard_base(name)), &shards[..]) {
        (None, _) => {}
        (Some(_), [only]) => return Ok(only),
        (Some(base), _) => return Err(NoWeights::Missing(format!("`{base}{}`", ENDINGS[1]))),
    }
    if let Some(pytorch) = PYTORCH_FILES.into_iter().find_map(find) {
        return Ok(pytorch);
    }
    if names.iter().any(|name| name.starts_with("pytorch_model-") && name.ends_with(".bin")) {
        return Err(NoWeights::Missing(format!("`{}`", PYTORCH_FILES[1])));
    }
    let other = |name: &&str| {
        !name.contains('/')
            && OTHER_WEIGHTS.iter().any(|end| name.ends_with(end))
            && !NO_WEIGHTS.contains(name)
    };
    Err(match names.iter().copied().find(other) {
        Some(other) => NoWeights::OtherFormat(other.into()),
        None => NoWeights::Missing(FORMS.into()),
    })
}

/// Whether several of these files could be the weights, so that `base_names` decide.
pub fn needs_base_name(names: &[&str]) -> bool {
    candidates(names).len() > 1
}

/// `model_file_base_name` of `config.json` and of `quantize_config.json` in a folder, where they have one.
///
/// # Errors
/// When a file is there and cannot be read.
pub fn base_names(folder: &Path) -> Result<Vec<String>> {
    const KEY: &str = "model_file_base_name";
    let mut found = Vec::new();
    for (file, parent) in [(CONFIG_FILE, QUANTIZATION_KEY), (QUANTIZE_CONFIG_FILE, "")] {
        let path = file_in(folder, file)?;
        if !path.exists() {
            continue;
        }
        let json = read_json(&path)?;
        let value = if parent.is_empty() { &json } else { json.get(parent).unwrap_or(&Value::Null) };
        if !value.is_null() {
            found.extend(Fields::new(&path, parent, value)?.text(KEY)?.map(str::to_owned));
        }
    }
    Ok(found)
}

/// Safetensors files that are no shards, and indices of shards without such a file.
fn candidates<'a>(names: &[&'a str]) -> Vec<&'a str> {
    let is_index = |name: &str| name.ends_with(ENDINGS[1]) && !name.contains('/');
    let has_whole =
        |index: &str| index.strip_suffix(".index.json").is_some_and(|whole| names.contains(&whole));
    let whole = safetensors(names).filter(|name| shard_base(name).is_none());
    let indices = names.iter().copied().filter(|name| is_index(name) && !has_whole(name));
    whole.chain(indices).collect()
}

fn safetensors<'a>(names: &[&'a str]) -> impl Iterator<Item = &'a str> {
    names.iter().copied().filter(|name| name.ends_with(ENDINGS[0]) && !name.contains('/'))
}

/// `model` of `model-00001-of-00002.safetensors`.
fn shard_base(name: &str) -> Option<&str> {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let (front, count) = name.strip_suffix(ENDINGS[0])?.rsplit_once("-of-")?;
    let (base, number) = front.rsplit_once('-')?;
    (is_number(count) && is_number(number)).then_some(base)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(name: &str) -> Result<&'static str, NoWeights> {
        Err(NoWeights::Missing(format!("`{name}`")))
    }

    #[test]
    fn weights_are_found_under_every_usual_name() {
        let find = |names: &[&'static str]| weights_file(names, &[]);
        assert_eq!(find(&["a.safetensors", "model.safetensors", INDEX_FILE]), Ok(WEIGHTS_FILE));
        assert_eq!(find(&["model-00001-of-00001.safetensors", INDEX_FILE]), Ok(INDEX_FILE));
        assert_eq!(find(&["a.safetensors", "pytorch_model.bin"]), Ok("a.safetensors"));
        assert_eq!(find(&["a.safetensors.index.json", "a.safetensors"]), Ok("a.safetensors"));
        // AutoGPTQ's shards and their index.
        let (index, shards) = (
            "gptq_model-4bit-32g.safetensors.index.json",
            [
                "gptq_model-4bit-32g-00001-of-00002.safetensors",
                "gptq_model-4bit-32g-00002-of-00002.safetensors",
            ],
        );
        assert_eq!(find(&[shards[0], shards[1], index]), Ok(index));
        assert_eq!(find(&shards), missing(index));
        assert_eq!(find(&shards[..1]), Ok(shards[0]));
        assert_eq!(
            find(&["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"]),
            Ok(PYTORCH_FILES[1])
        );
        assert_eq!(find(&["pytorch_model-00001-of-00001.bin"]), missing(PYTORCH_FILES[1]));
        assert_eq!(find(&["deep/model.safetensors", "README.md"]), Err(NoWeights::Missing(FORMS.into())));
        let other = |name: &str| Err(NoWeights::OtherFormat(name.into()));
        assert_eq!(find(&["optimizer.pt", "gptq_model-4bit.bin"]), other("gptq_model-4bit.bin"));
        assert_eq!(find(&["training_args.bin", "m.Q4.gguf", "original/x.bin"]), other("m.Q4.gguf"));
    }

    #[test]
    fn the_base_name_chooses_among_several_weights() {
        let names =
            ["a.safetensors", "b-00001-of-00001.safetensors", "b.safetensors.index.json", "model.bin"];
        assert!(needs_base_name(&names) && !needs_base_name(&names[..2]));
        let chosen = |base: &str| weights_file(&names, &[base.to_owned()]);
        assert_eq!((chosen("a"), chosen("b")), (Ok("a.safetensors"), Ok("b.safetensors.index.json")));
        let several = "`a.safetensors`, `b.safetensors.index.json`";
        assert_eq!(chosen("c"), Err(NoWeights::Several(several.into())));
        assert_eq!(weights_file(&names, &[]), chosen("c"));
        // What a config names goes before the usual names.
        assert_eq!(weights_file(&["model.safetensors", "a.safetensors"], &["a".into()]), Ok("a.safetensors"));
    }

    #[test]
    fn both_configs_may_have_a_base_name() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        assert!(base_names(folder.path()).unwrap().is_empty());
        write("config.json", r#"{"quantization_config": {"model_file_base_name": "a"}}"#);
        write("quantize_config.json", r#"{"model_file_base_name": null}"#);
        assert_eq!(base_names(folder.path()).unwrap(), ["a"]);
        write("config.json", "{}");
        write("quantize_config.json", r#"{"model_file_base_name": "b"}"#);
        assert_eq!(base_names(folder.path()).unwrap(), ["b"]);
        write("quantize_config.json", r#"{"model_file_base_name": 1}"#);
        assert!(base_names(folder.path()).is_err());
    }
}
