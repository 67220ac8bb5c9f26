//! The files of a model repository that are fetched.

use std::{collections::BTreeSet, path::Path};

use serde::Deserialize;

use crate::{
    architectures::CONFIG_FILE,
    checkpoint::{NoWeights, OPTIMUM_CONFIG_FILE, QUANTIZE_CONFIG_FILE, weights_file},
    emit::{CHECKSUMS_FILE, COPIED_FILES, is_licence},
    error::{Error, Result},
    folder::without_mark,
};

/// The card of a repository.
pub const CARD_FILE: &str = "README.md";

/// The needed files of a model.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Their names.
    pub(super) files: Vec<String>,
    /// The one of them that names the shards of the weights, which are needed too; `None` if the weights are one file.
    pub(super) index: Option<String>,
}

/// The needed files of a repository with files of these names; none is in a subfolder. `base_names` are those of its configs.
pub(super) fn of_model(names: &[&str], base_names: &[String]) -> Result<Wanted, NoWeights> {
    let mut files = configs(names)?;
    let weights = weights_file(names, base_names)?;
    let beside = |name: &&str| {
        [OPTIMUM_CONFIG_FILE, CHECKSUMS_FILE, CARD_FILE].contains(name)
            || COPIED_FILES.contains(name)
            || is_licence(name)
    };
    files.extend(names.iter().copied().filter(beside).map(str::to_owned));
    files.push(weights.to_owned());
    let index = weights.ends_with(".json").then(|| weights.to_owned());
    Ok(Wanted { files, index })
}

/// The configs of a repository with files of these names.
pub(super) fn configs(names: &[&str]) -> Result<Vec<String>, NoWeights> {
    if !names.contains(&CONFIG_FILE) {
        return Err(NoWeights::Missing(format!("`{CONFIG_FILE}`")));
    }
    let found = [CONFIG_FILE, QUANTIZE_CONFIG_FILE].into_iter().filter(|name| names.contains(name));
    Ok(found.map(str::to_owned).collect())
}

#[derive(Deserialize)]
struct Index {
    weight_map: std::collections::BTreeMap<String, String>,
}

/// The shards that an index names.
pub(super) fn shards(index: &Path) -> Result<BTreeSet<String>> {
    let text = std::fs::read(index).map_err(Error::io("read", index))?;
    let parsed: Index = serde_json::from_slice(without_mark(&text))
        .map_err(|source| Error::Json { path: index.into(), source })?;
    Ok(parsed.weight_map.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needed(names: &[&str]) -> Result<Vec<String>, NoWeights> {
        of_model(&[&["config.json", ".gitattributes", "x.py"], names].concat(), &[])
            .map(|wanted| wanted.files)
    }

    #[test]
    fn only_what_is_needed() {
        let names = [
            "LICENSE.txt",
            "USE_POLICY.md",
            "README.md",
            "tokenizer.json",
            "tokenizer.model",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "pytorch_model-00001-of-00001.bin",
            "original/consolidated.00.pth",
            "consolidated.safetensors",
            "original/tokenizer.model",
        ];
        let expected = [
            "config.json",
            "LICENSE.txt",
            "USE_POLICY.md",
            "README.md",
            "tokenizer.json",
            "tokenizer.model",
            "model.safetensors.index.json",
        ];
        assert_eq!(needed(&names).unwrap(), expected);
        let index = |name: &str| of_model(&["config.json", name], &[]).unwrap().index;
        assert_eq!(index("model.safetensors.index.json").unwrap(), "model.safetensors.index.json");
        assert_eq!(index("model.safetensors"), None);
        let whole = ["model.safetensors", "model.safetensors.index.json", "b.safetensors"];
        assert_eq!(needed(&whole).unwrap(), ["config.json", "model.safetensors"]);
        let named_freely = ["gptq_model-4bit-128g.safetensors", "quantize_config.json", "model.bin"];
        assert_eq!(
            needed(&named_freely).unwrap(),
            ["config.json", "quantize_config.json", "gptq_model-4bit-128g.safetensors"]
        );
    }

    #[test]
    fn weights_in_pytorch_format_come_last() {
        let index = "pytorch_model.bin.index.json";
        let names = [index, "pytorch_model-00001-of-00001.bin", "training_args.bin"];
        assert_eq!(needed(&names).unwrap(), ["config.json", index]);
        assert_eq!(of_model(&["config.json", index], &[]).unwrap().index.unwrap(), index);
        assert_eq!(
            needed(&[index, "pytorch_model.bin", "old/a.safetensors"]).unwrap()[1..],
            ["pytorch_model.bin"]
        );
        assert_eq!(needed(&["pytorch_model.bin", "a.safetensors"]).unwrap()[1..], ["a.safetensors"]);
    }

    #[test]
    fn what_lacks_is_named() {
        let config = NoWeights::Missing("`config.json`".into());
        assert_eq!(of_model(&["model.safetensors"], &[]), Err(config));
        assert_eq!(needed(&["tf_model.h5"]), Err(NoWeights::OtherFormat("tf_model.h5".into())));
        assert!(matches!(needed(&["a.safetensors", "b.safetensors"]), Err(NoWeights::Several(_))));
        assert!(matches!(needed(&["deep/model.safetensors"]), Err(NoWeights::Missing(_))));
    }

    #[test]
    fn weights_that_the_config_names_are_needed() {
        let names = ["config.json", "quantize_config.json", "a.safetensors", "b.safetensors"];
        let wanted = of_model(&names, &["b".into()]).unwrap();
        assert_eq!(wanted.files, ["config.json", "quantize_config.json", "b.safetensors"]);
    }

    #[test]
    fn shards_of_an_index() {
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join("model.safetensors.index.json");
        std::fs::write(&index, r#"{"weight_map": {"a": "2", "b": "1", "c": "2"}}"#).unwrap();
        assert_eq!(shards(&index).unwrap().into_iter().collect::<Vec<_>>(), ["1", "2"]);
        std::fs::write(&index, "{}").unwrap();
        assert!(matches!(shards(&index), Err(Error::Json { .. })));
    }
}
