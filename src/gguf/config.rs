//! The `config.json` of a GGUF file's model, so that the rest of the crate reads it like any other.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{
    ARCHITECTURES, Header,
    blocks::dequantize,
    names::{OUTPUT, ROPE_FREQS, TOKEN_EMBEDDING},
};
use crate::error::{Error, Result};

/// Keys of sizes: after the architecture's name in the file, and in `config.json`.
const SIZES: [(&str, &str); 5] = [
    ("block_count", "num_hidden_layers"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("context_length", "max_position_embeddings"),
];

/// `config.json` of the model in a file. `file` is the whole file; `path` is what errors name.
///
/// # Errors
/// When the architecture is not read, or a key is missing or of another type.
pub fn model_config(path: &Path, header: &Header, file: &[u8]) -> Result<Value> {
    Keys { path, header }.config(file)
}

struct Keys<'a> {
    path: &'a Path,
    header: &'a Header,
}

impl Keys<'_> {
    fn error(&self, key: &str, expected: &str, found: impl Into<String>) -> Error {
        let (key, expected, found) = (key.to_owned(), expected.to_owned(), found.into());
        Error::Config { path: self.path.into(), key, expected, found }
    }

    fn integer(&self, key: &str) -> Result<Option<u64>> {
        let Some(value) = self.header.metadata.get(key) else { return Ok(None) };
        let number = value.as_u64();
        number.map(Some).ok_or_else(|| self.error(key, "an integer that is not negative", value.shown()))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.header.metadata.get(key) else { return Ok(None) };
        let number = value.as_f64().filter(|number| number.is_finite());
        // The decimal number that was meant, not the fp32 number beside it.
        let decimal = number.map(|number| (number as f32).to_string().parse().unwrap_or(number));
        decimal.map(Some).ok_or_else(|| self.error(key, "a number", value.shown()))
    }

    fn config(&self, file: &[u8]) -> Result<Value> {
        let key = "general.architecture";
        let Some(name) = self.header.metadata.text(key) else {
            return Err(self.error(key, "the name of an architecture", "nothing"));
        };
        if self.integer("split.count")?.is_some_and(|count| count > 1) {
            let found = "a part of a model; join the parts with `llama-gguf-split --merge`";
            return Err(self.error("split.count", "1", found));
        }
        let Some((architecture, class, model_type)) =
            ARCHITECTURES.into_iter().find(|(known, ..)| *known == name)
        else {
            let supported = ARCHITECTURES.map(|(known, ..)| known).join(", ");
            let (path, found) = (self.path.into(), name.to_owned());
            return Err(Error::UnsupportedArchitecture { path, found, supported });
        };
        let own = |key: &str| format!("{architecture}.{key}");
        if let Some(experts) = self.integer(&own("expert_count"))?.filter(|experts| *experts > 0) {
            return Err(self.error(&own("expert_count"), "0: experts are not read", experts.to_string()));
        }
        let mut config = Map::new();
        config.insert("architectures".into(), json!([class]));
        config.insert("model_type".into(), model_type.into());
        for (key, theirs) in SIZES {
            let key = own(key);
            let size = self.integer(&key)?.ok_or_else(|| self.error(&key, "an integer", "nothing"))?;
            config.insert(theirs.into(), size.into());
        }
        let heads = &config["num_attention_heads"];
        let kv_heads = self.integer(&own("attention.head_count_kv"))?.map_or(heads.clone(), Value::from);
        config.insert("num_key_value_heads".into(), kv_heads);
        let [key_length, value_length] =
            ["attention.key_length", "attention.value_length"].map(|key| self.integer(&own(key)));
        let (key_length, value_length) = (key_length?, value_length?);
        if let (Some(key_length), Some(value_length)) = (key_length, value_length)
            && key_length != value_length
        {
            let expected = format!("{key_length}, as `attention.key_length`");
            return Err(self.error(&own("attention.value_length"), &expected, value_length.to_string()));
        }
        let width = config["hidden_size"].as_u64().unwrap_or(0);
        let default = width / config["num_attention_heads"].as_u64().unwrap_or(1).max(1);
        let head_dim = key_length.unwrap_or(default);
        config.insert("head_dim".into(), head_dim.into());
        if let Some(rotated) = self.integer(&own("rope.dimension_count"))?.filter(|count| *count != head_dim)
        {
            let expected = format!("{head_dim}: all features of a head are rotated");
            return Err(self.error(&own("rope.dimension_count"), &expected, rotated.to_string()));
        }
        let eps = own("attention.layer_norm_rms_epsilon");
        let eps = self.number(&eps)?.ok_or_else(|| self.error(&eps, "a number", "nothing"))?;
        config.insert("rms_norm_eps".into(), eps.into());
        let theta = self.number(&own("rope.freq_base"))?.unwrap_or(10_000.0);
        config.insert("rope_theta".into(), theta.into());
        if let Some(scaling) = self.rope_scaling(architecture, file)? {
            config.insert("rope_scaling".into(), scaling);
        }
        let embedding = self.header.tensor(TOKEN_EMBEDDING);
        let rows = embedding.and_then(|embedding| embedding.shape.first().copied());
        let rows = rows
            .ok_or_else(|| Error::MissingTensor { name: TOKEN_EMBEDDING.into(), path: self.path.into() })?;
        config.insert("vocab_size".into(), rows.into());
        let has = |name: &str| self.header.tensor(name).is_some();
        config.insert("tie_word_embeddings".into(), (!has(OUTPUT)).into());
        config.insert("attention_bias".into(), has("blk.0.attn_output.bias").into());
        config.insert("mlp_bias".into(), has("blk.0.ffn_gate.bias").into());
        for (key, theirs) in [("bos", "bos_token_id"), ("eos", "eos_token_id")] {
            if let Some(id) = self.integer(&format!("tokenizer.ggml.{key}_token_id"))? {
                config.insert(theirs.into(), id.into());
            }
        }
        Ok(Value::Object(config))
    }

    /// `rope_scaling`, where rotary frequencies are scaled.
    fn rope_scaling(&self, architecture: &str, file: &[u8]) -> Result<Option<Value>> {
        let own = |key: &str| format!("{architecture}.rope.scaling.{key}");
        let kind_key = own("type");
        let kind = self.header.metadata.text(&kind_key).unwrap_or("none");
        let factor = self.number(&own("factor"))?;
        if let Some(factors) = self.header.tensor(ROPE_FREQS) {
            if kind != "none" {
                return Err(self.error(
                    &kind_key,
                    &format!("none beside `{ROPE_FREQS}`"),
                    format!("`{kind}`"),
                ));
            }
            let mut numbers = vec![0.0; factors.shape.iter().product()];
            dequantize(factors.kind, &file[factors.range.clone()], &mut numbers);
            let context = self.integer(&format!("{architecture}.context_length"))?;
            // A factor for each frequency, whatever the length: what LongRoPE has with the same factors twice.
            return Ok(Some(json!({
                "rope_type": "longrope",
                "short_factor": numbers,
                "long_factor": numbers,
                "original_max_position_embeddings": context,
                "attention_factor": 1.0,
            })));
        }
        // Some files name a kind of scaling that their factor of 1 does not apply.
        match (kind, factor) {
            ("none", _) | ("linear", None) => Ok(None),
            ("linear", Some(factor)) => Ok(Some(json!({ "rope_type": "linear", "factor": factor }))),
            ("yarn", Some(factor)) => {
                let mut scaling = json!({ "rope_type": "yarn", "factor": factor });
                if let Some(context) = self.integer(&own("original_context_length"))? {
                    scaling["original_max_position_embeddings"] = context.into();
                }
                for (key, theirs) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
                    if let Some(number) = self.number(&own(key))? {
                        scaling[theirs] = number.into();
                    }
                }
                if let Some(more) = self.number(&own("attn_factor"))? {
                    scaling["attention_factor"] = (more * (1.0 + 0.1 * factor.ln())).into();
                }
                Ok(Some(scaling))
            }
            (other, _) => {
                Err(self.error(&kind_key, "`none`, `linear` or `yarn` with a factor", format!("`{other}`")))
            }
        }
    }
}
