//! `config.json` and `quantize_config.json` of a branch.
//!
//! The two differ on purpose. `quantize_config.json` holds exactly the keys of the model cards' era, because AutoGPTQ up to
//! 0.4.2 refuses any other; `quantization_config` in `config.json` is what transformers, vLLM, TGI,
//! GPTQModel and llama.cpp read.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{
    accuracy::{AccuracyOptions, Quality},
    architectures::add_older_keys,
    checkpoint::CheckpointFormat,
    variant::{Order, Variant},
};

/// Origin of a branch, for `meta`. It has no machine paths and no run-time settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// `gptq:0.1.0`, in a list, as GPTQModel writes its own.
    pub quantizer: Vec<String>,
    /// Recipe or file name of the calibration text.
    pub dataset: String,
    /// SHA-256 of the calibration token ids.
    pub dataset_sha256: String,
    /// Calibration windows.
    pub samples: usize,
    /// Tokens a window.
    pub seq_len: usize,
    /// Seed of the windows.
    pub seed: u64,
    /// Damping, as a fraction of the mean Hessian diagonal.
    pub damp_percent: f64,
    /// Whether Hessians came from the unquantized model.
    pub shared_hessian: bool,
    /// The preset: `fast`, `standard` or `best`.
    pub quality: Quality,
    /// What that turned on.
    #[serde(flatten)]
    pub accuracy: AccuracyOptions,
}

/// `quantize_config.json`.
pub fn quantize_config_json(variant: &Variant, provenance: &Provenance) -> Value {
    let mut config = json!({
        "bits": variant.bits.get(),
        "group_size": variant.group_size.as_config(),
        "damp_percent": provenance.damp_percent,
        "desc_act": variant.order.desc_act(),
        "sym": variant.symmetric,
        // Later stages of a layer see the earlier ones quantized, unless all Hessians came from the fp16 model.
        "true_sequential": !provenance.shared_hessian,
        "model_name_or_path": null,
        "model_file_base_name": "model",
    });
    if variant.order == Order::ActStatic {
        config["static_groups"] = true.into();
    }
    config
}

/// The source's `config.json` with `quantization_config` added and the dtype of the dense tensors set to fp16.
pub fn quantized_config_json(source: &Value, variant: &Variant, provenance: &Provenance) -> Value {
    let quantization = json!({
        "bits": variant.bits.get(),
        "group_size": variant.group_size.as_config(),
        "damp_percent": provenance.damp_percent,
        "desc_act": variant.order.desc_act(),
        "static_groups": variant.order == Order::ActStatic,
        "sym": variant.symmetric,
        "true_sequential": !provenance.shared_hessian,
        "lm_head": false,
        "quant_method": "gptq",
        // llama.cpp adds 1 to the zero points only when this says so.
        "checkpoint_format": CheckpointFormat::Gptq.name(),
        "pack_dtype": "int32",
        // transformers takes true where this is missing, and refuses it together with desc_act.
        "act_group_aware": provenance.accuracy.group_aware && variant.order == Order::Sequential,
        "meta": provenance,
    });
    let mut config: Map<String, Value> = source.as_object().cloned().unwrap_or_default();
    config.insert("torch_dtype".into(), "float16".into());
    add_older_spellings(&mut config);
    // The decoder's part, where the model has other inputs too.
    if let Some(decoder) = config.get_mut("text_config").and_then(Value::as_object_mut) {
        add_older_spellings(decoder);
    }
    config.insert("quantization_config".into(), quantization);
    config.into()
}

/// Writes what transformers 4 and 5 spell otherwise in both spellings, with fp16 as the type of the dense tensors.
fn add_older_spellings(config: &mut Map<String, Value>) {
    if config.contains_key("dtype") {
        config.insert("dtype".into(), "float16".into());
        config.insert("torch_dtype".into(), "float16".into());
    } else if config.contains_key("torch_dtype") {
        config.insert("torch_dtype".into(), "float16".into());
    }
    add_older_keys(config);
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use super::*;
    use crate::{architectures::ModelConfig, variant::VariantSet};

    fn provenance() -> Provenance {
        Provenance {
            quantizer: vec!["gptq:0.1.0".into()],
            dataset: "wikitext2".into(),
            dataset_sha256: "00".into(),
            samples: 128,
            seq_len: 2048,
            seed: 0,
            damp_percent: 0.01,
            shared_hessian: false,
            quality: Quality::Standard,
            accuracy: Quality::Standard.options(),
        }
    }

    #[test]
    fn quantize_config_is_that_of_the_model_cards_era() {
        let text = quantize_config_json(&VariantSet::Card.variants()[0], &provenance()).to_string();
        assert_eq!(
            text,
            r#"{"bits":4,"group_size":128,"damp_percent":0.01,"desc_act":false,"sym":true,"true_sequential":true,"model_name_or_path":null,"model_file_base_name":"model"}"#
        );
        let with_static = quantize_config_json(&"4bit-128g-static".parse().unwrap(), &provenance());
        assert_eq!((&with_static["static_groups"], &with_static["desc_act"]), (&true.into(), &false.into()));
    }

    /// `tests/golden/rope` has configs as transformers 5 saves them, those of their branches, and what transformers 4 and 5 read in
    /// the latter; `scripts/make-golden-rope` makes it.
    #[test]
    fn transformers_4_and_5_read_the_same_rotary_embedding() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/rope");
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let mut golden: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            let mut branch =
                quantized_config_json(&golden["source"], &VariantSet::Card.variants()[0], &provenance());
            branch.as_object_mut().unwrap().remove("quantization_config");
            if std::env::var_os("GPTQ_UPDATE_GOLDEN").is_some() {
                golden["branch"] = branch;
                fs::write(&path, format!("{golden:#}\n")).unwrap();
                continue;
            }
            assert_eq!(golden["branch"], branch, "{name}: run scripts/make-golden-rope");
            let read: Vec<&Value> = golden["read"].as_object().unwrap().values().collect();
            let [older, newer] = read[..] else { panic!("{name}: {read:?}") };
            assert_eq!(older, newer, "{name}");
            // And this program reads in the branch what it reads in the source.
            let of = |config: &Value| -> Vec<_> {
                let config = ModelConfig::from_json(&path, config).unwrap();
                config.layers.iter().map(|layer| layer.attention.rope.clone()).collect()
            };
            let ropes = of(&branch);
            assert_eq!(ropes, of(&golden["source"]), "{name}");
            let read =
                newer.as_object().unwrap().values().map(|of_layers| of_layers["base"].as_f64().unwrap());
            let own = ropes.iter().flatten().map(|rope| rope.theta);
            let sorted = |bases: &mut dyn Iterator<Item = f64>| -> BTreeSet<String> {
                bases.map(|base| base.to_string()).collect()
            };
            assert_eq!(sorted(&mut own.into_iter()), sorted(&mut read.into_iter()), "{name}");
            names.insert(name);
        }
        let expected = [
            "default",
            "dynamic",
            "gemma3",
            "gemma3-nested",
            "linear",
            "llama3",
            "longrope",
            "olmo3",
            "partial",
            "yarn",
        ];
        assert!(names.is_empty() || names.iter().eq(expected), "{names:?}");
    }

    #[test]
    fn what_a_config_spells_for_older_readers_stays() {
        let both = json!({"rope_theta": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 2.0}});
        let config = quantized_config_json(&both, &VariantSet::Card.variants()[0], &provenance());
        assert_eq!((&config["rope_theta"], &config["rope_scaling"]), (&1.0.into(), &Value::Null));
    }

    #[test]
    fn config_keeps_the_source_and_says_fp16() {
        for (key, source) in [
            ("dtype", json!({"hidden_size": 8, "dtype": "bfloat16"})),
            ("torch_dtype", json!({"hidden_size": 8, "torch_dtype": "float32"})),
            ("torch_dtype", json!({"hidden_size": 8})),
        ] {
            let config = quantized_config_json(&source, &VariantSet::Card.variants()[1], &provenance());
            assert_eq!((&config["hidden_size"], &config[key]), (&8.into(), &"float16".into()));
            let quantization = &config["quantization_config"];
            assert_eq!(quantization["desc_act"], true);
            // Of act order's branch.
            assert_eq!(quantization["act_group_aware"], false);
            let main = quantized_config_json(&source, &VariantSet::Card.variants()[0], &provenance());
            assert_eq!(main["quantization_config"]["act_group_aware"], true);
            assert_eq!(quantization["checkpoint_format"], "gptq");
            let meta = &quantization["meta"];
            assert_eq!((&meta["dataset"], &meta["quality"]), (&"wikitext2".into(), &"standard".into()));
            assert_eq!((&meta["signed_scales"], &meta["scale_search"]), (&true.into(), &"block".into()));
            assert_eq!(meta["asymmetric"], 1.0);
        }
    }
}
