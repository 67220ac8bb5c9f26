use std::path::Path;

use serde_json::{Value, json};

use super::*;

/// One layer, grouped-query attention, sizes that 3-bit packing takes.
pub(crate) fn small_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
        "vocab_size": 8, "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "torch_dtype": "float16",
    })
}

pub(crate) fn parse(value: &Value) -> Result<ModelConfig> {
    ModelConfig::from_json("config.json", value)
}

/// `[out, in]` of a linear of the first layer.
fn shape(config: &ModelConfig, path: &str) -> [usize; 2] {
    config.layers[0].linears.iter().find(|linear| &*linear.path == path).expect(path).shape
}

fn rope(config: &ModelConfig) -> &RopeConfig {
    config.layers[0].attention.rope.as_ref().unwrap()
}

fn windows(config: &ModelConfig) -> Vec<Option<usize>> {
    config.layers.iter().map(|layer| layer.attention.window).collect()
}

/// The small config with these keys set.
fn with(changes: Value) -> Value {
    let mut config = small_config();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn without(key: &str) -> Value {
    let mut config = small_config();
    config.as_object_mut().unwrap().remove(key);
    config
}

#[track_caller]
fn refused(config: &Value, message: &str) {
    let error = parse(config).unwrap_err();
    assert!(matches!(error, Error::Config { .. }), "{error:?}");
    assert_eq!(error.to_string(), message);
}

#[test]
fn llama_2_as_published() {
    let config = parse(&json!({
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": null, "tie_word_embeddings": false, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0", "use_cache": true, "vocab_size": 32000,
    }))
    .unwrap();
    let attention = &config.layers[31].attention;
    assert_eq!((attention.head_dim, attention.num_kv_heads, attention.window), (128, 32, None));
    let expected =
        RopeConfig { theta: 10_000.0, scaling: RopeScaling::None, rotary_dim: 128, interleaved: false };
    assert_eq!(*rope(&config), expected);
    assert_eq!((config.bos_token_id, &config.eos_token_ids[..]), (Some(1), &[2][..]));
    assert_eq!(config.dtype.as_deref(), Some("float16"));
    assert_eq!(shape(&config, "mlp.down_proj"), [4096, 11008]);
    // 32 layers of 7 linears with 4 packed tensors each, and the dense ones: 963 in the published files.
    assert_eq!(config.linears().count() * 4 + config.dense_tensors().len(), 963);
    let stages: Vec<String> = config.layers[0].stages.iter().map(StageConfig::name).collect();
    assert_eq!(stages, ["q/k/v", "o", "gate/up", "down"]);
    assert_eq!(config.raw()["transformers_version"], "4.31.0.dev0");
}

#[test]
fn llama_3_1_scales_its_rotary_embedding() {
    let config = parse(&with(json!({
        "rope_theta": 500000.0, "eos_token_id": [128001, 128008, 128009],
        "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    })))
    .unwrap();
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    assert_eq!((rope(&config).theta, &rope(&config).scaling), (500_000.0, &scaling));
    assert_eq!(config.eos_token_ids, [128001, 128008, 128009]);
    let mut twice = config.raw().clone();
    twice["original_max_position_embeddings"] = json!(8192);
    assert_eq!(rope(&parse(&twice).unwrap()), rope(&config));
    twice["original_max_position_embeddings"] = json!(4096);
    refused(
        &twice,
        "`config.json`: key `original_max_position_embeddings`: expected 8192, as in `rope_scaling`, found 4096",
    );
}

#[test]
fn tinyllama_shares_key_heads() {
    let config = parse(&with(json!({
        "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 5632,
    })))
    .unwrap();
    assert_eq!(shape(&config, "self_attn.k_proj"), [256, 2048]);
    assert_eq!(shape(&config, "self_attn.q_proj"), [2048, 2048]);
}

#[test]
fn a_head_may_be_wider_than_its_part_of_the_hidden_state() {
    let config = parse(&with(json!({"head_dim": 16}))).unwrap();
    assert_eq!(shape(&config, "self_attn.q_proj"), [64, 32]);
    assert_eq!(shape(&config, "self_attn.o_proj"), [32, 64]);
    assert_eq!(parse(&with(json!({"head_dim": null}))).unwrap().layers[0].attention.head_dim, 8);
}

#[test]
fn mistral_has_a_window_and_no_biases() {
    let mistral = |mut changes: Value| {
        changes["architectures"] = json!(["MistralForCausalLM"]);
        changes["model_type"] = json!("mistral");
        parse(&with(changes)).unwrap()
    };
    let config = mistral(json!({"sliding_window": 4096, "attention_bias": true}));
    assert_eq!((config.class, windows(&config)), ("MistralForCausalLM", vec![Some(4096)]));
    assert!(config.linear_biases().is_empty());
    assert_eq!(windows(&mistral(json!({"sliding_window": null}))), [None]);
    assert_eq!(windows(&mistral(json!({}))), [Some(4096)], "transformers' default");
    assert_eq!(windows(&parse(&with(json!({"sliding_window": 4096}))).unwrap()), [None], "Llama has none");
}

#[test]
fn mistral_layers_may_differ() {
    let of = |types: Value| {
        parse(&with(json!({
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8,
            "num_hidden_layers": 2, "layer_types": types,
        })))
    };
    let windows = |types: Value| windows(&of(types).unwrap());
    assert_eq!(windows(Value::Null), [Some(8); 2]);
    assert_eq!(windows(json!(["sliding_attention", "sliding_attention"])), [Some(8); 2]);
    assert_eq!(windows(json!(["full_attention", "full_attention"])), [None; 2]);
    assert_eq!(windows(json!(["sliding_attention", "full_attention"])), [Some(8), None]);
    for types in [json!("full_attention"), json!(["full_attention"]), json!(["full_attention", "linear"])] {
        let message = format!(
            "`config.json`: key `layer_types`: expected `sliding_attention` or `full_attention` for each of 2 \
             layers, found {types}"
        );
        assert_eq!(of(types).unwrap_err().to_string(), message);
    }
}

#[test]
fn transformers_5_layout() {
    let config = parse(&with(json!({
        "dtype": "bfloat16", "rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0},
    })))
    .unwrap();
    assert_eq!((rope(&config).theta, &rope(&config).scaling), (1e6, &RopeScaling::Linear { factor: 2.0 }));
    assert_eq!(config.dtype.as_deref(), Some("bfloat16"));
    let both = json!({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}});
    assert_eq!(rope(&parse(&with(both)).unwrap()).theta, 1e6);
    let differing =
        json!({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}});
    refused(
        &with(differing),
        "`config.json`: key `rope_parameters`: expected the same rotary embedding as the older keys, \
         RopeConfig { theta: 10000.0, scaling: None, rotary_dim: 8, interleaved: false }, \
         found RopeConfig { theta: 1000000.0, scaling: None, rotary_dim: 8, interleaved: false }",
    );
    let null = json!({"rope_theta": null, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}});
    assert_eq!(rope(&parse(&with(null)).unwrap()).theta, 1e6);
    let linear = json!({"rope_type": "linear", "factor": 2.0});
    let mut parameters = linear.clone();
    parameters["rope_theta"] = json!(1e6);
    refused(
        &with(json!({"rope_scaling": linear, "rope_parameters": parameters})),
        "`config.json`: key `rope_parameters`: expected the same rotary embedding as the older keys, \
         RopeConfig { theta: 10000.0, scaling: Linear { factor: 2.0 }, rotary_dim: 8, interleaved: false }, \
         found RopeConfig { theta: 1000000.0, scaling: Linear { factor: 2.0 }, rotary_dim: 8, interleaved: false }",
    );
}

#[test]
fn rope_scaling_types() {
    let scaling = |value: Value| parse(&with(json!({"rope_scaling": value})));
    let dynamic = scaling(json!({"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 99}));
    assert_eq!(rope(&dynamic.unwrap()).scaling, RopeScaling::Dynamic { factor: 2.0, original_max: 16 });
    let linear = scaling(json!({"type": "linear", "factor": 4})).unwrap();
    assert_eq!(rope(&linear).scaling, RopeScaling::Linear { factor: 4.0 });
    for (value, message) in [
        (
            json!({"type": "ntk", "factor": 2.0}),
            "type`: expected `default`, `linear`, `dynamic`, `llama3`, `yarn` or `longrope`, found `ntk`",
        ),
        (
            json!({"rope_type": "longrope"}),
            "short_factor`: expected 4 numbers above 0, one for each frequency, found nothing",
        ),
        (json!({"type": "linear"}), "factor`: expected a number above 0, found nothing"),
        (json!({"type": "linear", "factor": 0.5}), "factor`: expected a number of at least 1, found 0.5"),
        (
            json!({"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}),
            "high_freq_factor`: expected a number above low_freq_factor 4, found 4",
        ),
        (
            json!({"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}),
            "original_max_position_embeddings`: expected an integer from 1 to 2147483647, found nothing",
        ),
        (
            json!({"type": "default", "partial_rotary_factor": 0.5}),
            "partial_rotary_factor`: expected 1: all of a head is rotated, found 0.5",
        ),
        (
            json!({"full_attention": {"rope_type": "default"}}),
            "full_attention`: expected one rotary embedding for all layers, found {\"rope_type\":\"default\"}",
        ),
    ] {
        refused(
            &with(json!({"rope_scaling": value})),
            &format!("`config.json`: key `rope_scaling.{message}"),
        );
    }
}

#[test]
fn defaults_are_those_of_transformers() {
    let mut config = small_config();
    for key in ["num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "torch_dtype"] {
        config.as_object_mut().unwrap().remove(key);
    }
    let config = parse(&config).unwrap();
    let attention = &config.layers[0].attention;
    assert_eq!(
        (attention.num_kv_heads, config.max_position_embeddings, config.final_norm.eps),
        (4, 2048, 1e-6)
    );
    assert!(!config.tie_word_embeddings && config.linear_biases().is_empty());
    assert_eq!((config.bos_token_id, config.eos_token_ids, config.dtype), (None, vec![], None));
}

#[test]
fn biases_and_ties_as_configured() {
    let config = parse(&with(json!({"attention_bias": true, "tie_word_embeddings": true}))).unwrap();
    let biased = ["q_proj", "k_proj", "v_proj", "o_proj"];
    assert_eq!(config.linear_biases(), biased.map(|name| format!("model.layers.0.self_attn.{name}.bias")));
    assert!(!config.dense_tensors().iter().any(|(name, _)| name == "lm_head.weight"));
}

#[test]
fn what_cannot_be_used_is_named() {
    for (changes, message) in [
        (json!({"hidden_size": 0}), "hidden_size`: expected an integer from 1 to 2147483647, found 0"),
        (
            json!({"hidden_size": "32"}),
            "hidden_size`: expected an integer from 1 to 2147483647, found \"32\"",
        ),
        (
            json!({"vocab_size": 1u64 << 40}),
            "vocab_size`: expected an integer from 1 to 2147483647, found 1099511627776",
        ),
        (json!({"num_hidden_layers": 5000}), "num_hidden_layers`: expected at most 4096, found 5000"),
        (
            json!({"num_key_value_heads": 3}),
            "num_key_value_heads`: expected a divisor of num_attention_heads 4, found 3",
        ),
        (
            json!({"num_attention_heads": 3, "num_key_value_heads": 3}),
            "num_attention_heads`: expected a divisor of hidden_size 32, found 3",
        ),
        (json!({"head_dim": 7}), "head_dim`: expected an even number, found 7"),
        (
            json!({"head_dim": 1 << 30}),
            "head_dim`: expected num_attention_heads * head_dim below 2147483648, found 1073741824",
        ),
        (json!({"rms_norm_eps": -1}), "rms_norm_eps`: expected a number above 0, found -1"),
        (
            json!({"hidden_act": "tanh"}),
            "hidden_act`: expected `silu`, `gelu`, `gelu_pytorch_tanh`, `relu` or `relu2`, found `tanh`",
        ),
        (json!({"tie_word_embeddings": 1}), "tie_word_embeddings`: expected true or false, found 1"),
        (
            json!({"eos_token_id": "</s>"}),
            "eos_token_id`: expected a token id or a list of them, found \"</s>\"",
        ),
        (
            json!({"model_type": "mistral"}),
            "model_type`: expected the model type of `LlamaForCausalLM`, found `mistral`",
        ),
    ] {
        refused(&with(changes), &format!("`config.json`: key `{message}"));
    }
    refused(
        &without("num_attention_heads"),
        "`config.json`: key `num_attention_heads`: expected an integer from 1 to 2147483647, found nothing",
    );
    refused(&json!([]), "`config.json`: key `.`: expected an object, found []");
}

#[test]
fn other_architectures_are_refused_by_name() {
    let gpt = with(json!({"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}));
    let error = parse(&gpt).unwrap_err();
    assert!(matches!(error, Error::UnsupportedArchitecture { .. }), "{error:?}");
    let begin = "`config.json` holds architecture `GPTNeoXForCausalLM`, which is not supported \
                 (supported: LlamaForCausalLM, ";
    assert!(error.to_string().starts_with(begin), "{error}");
    let unnamed = with(json!({"architectures": null, "model_type": "gpt_neox"}));
    assert!(matches!(parse(&unnamed).unwrap_err(), Error::UnsupportedArchitecture { .. }));
    assert_eq!(parse(&without("architectures")).unwrap().class, "LlamaForCausalLM");
}

#[test]
fn names_of_modules() {
    let config = parse(&with(json!({"num_hidden_layers": 4}))).unwrap();
    let id = config.linear_id(3, 0);
    assert_eq!(id.to_string(), "model.layers.3.self_attn.q_proj");
    assert_eq!(id.qweight(), "model.layers.3.self_attn.q_proj.qweight");
}

#[test]
fn folders_without_a_config() {
    let dir = tempfile::tempdir().unwrap();
    let error = |dir: &Path| ModelConfig::read(dir).unwrap_err();
    assert!(matches!(error(dir.path()), Error::NotACheckpoint { .. }));
    assert!(matches!(error(&dir.path().join("absent")), Error::Io { .. }));
    std::fs::write(dir.path().join(CONFIG_FILE), "{\"a\": ").unwrap();
    assert!(matches!(error(dir.path()), Error::Json { .. }));
}
