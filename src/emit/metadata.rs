//! `config.json` and `quantize_config.json` of a branch.
//!
//! The two differ on purpose. `quantize_config.json` holds exactly the keys of the model cards' era, because AutoGPTQ up to
//! 0.4.2 refuses any other; `quantization_config` in `config.json` is what transformers, vLLM, TGI,
//! GPTQModel and llama.cpp read.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{
    accuracy::{AccuracyOptions, Quality},
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
    // transformers 5 writes `dtype`, 4 `torch_dtype`; a reader of one does not know the other.
    if config.contains_key("dtype") {
        config.insert("dtype".into(), "float16".into());
    }
    config.insert("torch_dtype".into(), "float16".into());
    add_older_rope_keys(&mut config);
    config.insert("quantization_config".into(), quantization);
    config.into()
}

/// transformers 5 keeps the base and the scaling of RoPE in `rope_parameters`. Readers built on transformers 4 read only
/// `rope_theta` and `rope_scaling`, and would silently compute with a base of 10000. Parameters by layer type have no older
/// keys.
fn add_older_rope_keys(config: &mut Map<String, Value>) {
    let Some(Value::Object(parameters)) = config.get("rope_parameters") else { return };
    let Some(theta) = parameters.get("rope_theta").cloned() else { return };
    let kind = parameters.get("rope_type").or_else(|| parameters.get("type")).cloned();
    let scaling = match kind {
        Some(kind) if kind != "default" => {
            let mut scaling = parameters.clone();
            scaling.shift_remove("rope_theta");
            // Until transformers 4.43 the key was `type`.
            scaling.insert("type".into(), kind);
            Value::Object(scaling)
        }
        _ => Value::Null,
    };
    config.entry("rope_theta").or_insert(theta);
    config.entry("rope_scaling").or_insert(scaling);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::variant::VariantSet;

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

    #[test]
    fn older_readers_find_the_rope_of_a_newer_config() {
        let rope = |parameters: Value| {
            let source = json!({"dtype": "bfloat16", "rope_parameters": parameters});
            let config = quantized_config_json(&source, &VariantSet::Card.variants()[0], &provenance());
            assert_eq!(config["rope_parameters"], source["rope_parameters"]);
            assert_eq!((&config["dtype"], &config["torch_dtype"]), (&"float16".into(), &"float16".into()));
            (config["rope_theta"].clone(), config["rope_scaling"].clone())
        };
        let plain = json!({"rope_type": "default", "rope_theta": 100000.0});
        assert_eq!(rope(plain), (100000.0.into(), Value::Null));
        let llama3 =
            json!({"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0});
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "type": "llama3"});
        assert_eq!(rope(llama3), (500000.0.into(), scaling));
        // What the source spells itself stays as it is, and so do parameters by layer type.
        let both = json!({"rope_theta": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 2.0}});
        assert_eq!(
            quantized_config_json(&both, &VariantSet::Card.variants()[0], &provenance())["rope_theta"],
            1.0
        );
        let by_layer = rope(json!({"full_attention": {"rope_type": "default", "rope_theta": 3.0}}));
        assert_eq!(by_layer, (Value::Null, Value::Null));
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
