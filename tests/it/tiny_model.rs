//! A random Llama, small enough to be quantized in a moment.

use std::{fs, path::Path};

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::{
    helpers::{demo, write_json},
    safetensors_file::{self, Tensor, Tensors},
};

/// What the model is like. Its tokenizer is the demo model's.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dtype: Dtype,
    pub(crate) tied: bool,
    pub(crate) biases: bool,
}

pub(crate) const LAYERS: usize = 2;
/// That of the demo's tokenizer.
pub(crate) const VOCAB: usize = 4096;
pub(crate) const CONTEXT: usize = 128;

impl Default for Model {
    fn default() -> Self {
        Self {
            hidden: 64,
            intermediate: 128,
            heads: 2,
            kv_heads: 2,
            dtype: Dtype::F16,
            tied: false,
            biases: false,
        }
    }
}

impl Model {
    /// `config.json`.
    pub(crate) fn config(&self) -> Value {
        let dtype = match self.dtype {
            Dtype::F32 => "float32",
            Dtype::BF16 => "bfloat16",
            _ => "float16",
        };
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": VOCAB,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.biases,
            "mlp_bias": self.biases,
            "torch_dtype": dtype,
        })
    }

    /// Name and shape of every tensor of the model.
    pub(crate) fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let kv = self.hidden / self.heads * self.kv_heads;
        let (hidden, intermediate) = (self.hidden, self.intermediate);
        let linears = [
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", intermediate, hidden),
            ("mlp.up_proj", intermediate, hidden),
            ("mlp.down_proj", hidden, intermediate),
        ];
        let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![VOCAB, hidden])];
        for layer in 0..LAYERS {
            let mut add = |name: String, shape: &[usize]| {
                shapes.push((format!("model.layers.{layer}.{name}"), shape.into()))
            };
            for (name, n, k) in linears {
                add(format!("{name}.weight"), &[n, k]);
                if self.biases {
                    add(format!("{name}.bias"), &[n]);
                }
            }
            add("input_layernorm.weight".into(), &[hidden]);
            add("post_attention_layernorm.weight".into(), &[hidden]);
        }
        shapes.push(("model.norm.weight".into(), vec![hidden]));
        if !self.tied {
            shapes.push(("lm_head.weight".into(), vec![VOCAB, hidden]));
        }
        shapes
    }

    /// Every tensor of the model.
    pub(crate) fn tensors(&self) -> Tensors {
        let tensor = |(name, shape): (String, Vec<usize>)| {
            let (center, width) = match name.as_str() {
                name if name.ends_with("norm.weight") => (1.0, 0.9), // unlike enough for act order to order
                name if name.ends_with(".bias") || name.starts_with("lm_head") => (0.0, 0.3),
                name if name.starts_with("model.embed") => (0.0, 1.0),
                _ => (0.0, (3.0 / shape[1] as f32).sqrt()),
            };
            let values = random(&name, shape.iter().product(), center, width);
            (name, Tensor::floats(self.dtype, &shape, &values))
        };
        self.shapes().into_iter().map(tensor).collect()
    }

    /// Writes the folder: config, tokenizer, one weights file.
    pub(crate) fn write(&self, dir: &Path) {
        self.write_without_weights(dir);
        safetensors_file::write(&dir.join("model.safetensors"), &self.tensors());
    }

    /// The same in three shards with an index.
    pub(crate) fn write_sharded(&self, dir: &Path) {
        self.write_without_weights(dir);
        let mut shards = [Tensors::new(), Tensors::new(), Tensors::new()];
        let mut weight_map = serde_json::Map::new();
        for (i, (name, tensor)) in self.tensors().into_iter().enumerate() {
            weight_map.insert(name.clone(), format!("model-0000{}-of-00003.safetensors", i % 3 + 1).into());
            shards[i % 3].insert(name, tensor);
        }
        for (i, shard) in shards.iter().enumerate() {
            safetensors_file::write(&dir.join(format!("model-0000{}-of-00003.safetensors", i + 1)), shard);
        }
        write_json(
            &dir.join("model.safetensors.index.json"),
            &json!({ "metadata": {}, "weight_map": weight_map }),
        );
    }

    fn write_without_weights(&self, dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        write_json(&dir.join("config.json"), &self.config());
        for name in
            ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]
        {
            fs::copy(demo(name), dir.join(name)).unwrap();
        }
    }
}

/// `count` numbers from `center - width` to `center + width`, the same for the same name.
fn random(name: &str, count: usize, center: f32, width: f32) -> Vec<f32> {
    let mut state = name.bytes().fold(0x5DEE_CE66_D1CE_5EED_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    });
    let mut next = || {
        // splitmix64
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) >> 40
    };
    (0..count).map(|_| center + width * (next() as f32 / (1 << 23) as f32 - 1.0)).collect()
}
