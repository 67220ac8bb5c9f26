use std::path::Path;

use serde_json::{Value, json};

use super::{
    super::{Architecture, LinearId, LinearKind, LlamaConfig, RopeScaling, dense_tensors, linear_shape},
    assert_error, folder, parse, small_config, told,
};

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
    assert_error(parse(config), Path::new("no folder"), "Config", message);
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
    assert_eq!((config.head_dim, config.num_kv_heads, config.rope.theta), (128, 32, 10_000.0));
    assert_eq!((config.rope.scaling, config.sliding_window), (RopeScaling::None, None));
    assert_eq!((config.bos_token_id, &config.eos_token_ids[..]), (Some(1), &[2][..]));
    assert_eq!(config.dtype.as_deref(), Some("float16"));
    assert_eq!(linear_shape(&config, LinearKind::Down), [4096, 11008]);
    // 32 layers of 7 linears with 4 packed tensors each, and the dense ones: 963 in the published files.
    assert_eq!(LinearId::all(&config).count() * 4 + dense_tensors(&config).len(), 963);
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
    assert_eq!((config.rope.theta, config.rope.scaling), (500_000.0, scaling));
    assert_eq!(config.eos_token_ids, [128001, 128008, 128009]);
    let mut twice = config.raw().clone();
    twice["original_max_position_embeddings"] = json!(8192);
    assert_eq!(parse(&twice).unwrap().rope, config.rope);
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
    assert_eq!(linear_shape(&config, LinearKind::K), [256, 2048]);
    assert_eq!(linear_shape(&config, LinearKind::Q), [2048, 2048]);
}

#[test]
fn a_head_may_be_wider_than_its_part_of_the_hidden_state() {
    let config = parse(&with(json!({"head_dim": 16}))).unwrap();
    assert_eq!(linear_shape(&config, LinearKind::Q), [64, 32]);
    assert_eq!(linear_shape(&config, LinearKind::O), [32, 64]);
    assert_eq!(parse(&with(json!({"head_dim": null}))).unwrap().head_dim, 8);
}

#[test]
fn mistral_has_a_window_and_no_biases() {
    let mistral = |mut changes: Value| {
        changes["architectures"] = json!(["MistralForCausalLM"]);
        changes["model_type"] = json!("mistral");
        parse(&with(changes)).unwrap()
    };
    let config = mistral(json!({"sliding_window": 4096, "attention_bias": true}));
    assert_eq!((config.architecture, config.sliding_window), (Architecture::Mistral, Some(4096)));
    assert!(!config.attention_bias);
    assert_eq!(mistral(json!({"sliding_window": null})).sliding_window, None);
    assert_eq!(mistral(json!({})).sliding_window, Some(4096), "transformers' default");
    assert_eq!(parse(&with(json!({"sliding_window": 4096}))).unwrap().sliding_window, None, "Llama has none");
}

#[test]
fn mistral_layers_may_differ() {
    let of = |types: Value| {
        parse(&with(json!({
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8,
            "num_hidden_layers": 2, "layer_types": types,
        })))
    };
    let windows =
        |types: Value| of(types).map(|config| (config.sliding_window, config.mixed_windows)).unwrap();
    assert_eq!(windows(Value::Null), (Some(8), false));
    assert_eq!(windows(json!(["sliding_attention", "sliding_attention"])), (Some(8), false));
    assert_eq!(windows(json!(["full_attention", "full_attention"])), (None, false));
    assert_eq!(windows(json!(["sliding_attention", "full_attention"])), (Some(8), true));
    for types in [json!("full_attention"), json!(["full_attention"]), json!(["full_attention", "linear"])] {
        let message = format!(
            "`config.json`: key `layer_types`: expected `sliding_attention` or `full_attention` for each of 2 \
             layers, found {types}"
        );
        assert_error(of(types), Path::new("no folder"), "Config", &message);
    }
}

#[test]
fn transformers_5_layout() {
    let config = parse(&with(json!({
        "dtype": "bfloat16", "rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0},
    })))
    .unwrap();
    assert_eq!((config.rope.theta, config.rope.scaling), (1e6, RopeScaling::Linear { factor: 2.0 }));
    assert_eq!(config.dtype.as_deref(), Some("bfloat16"));
    let both = json!({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}});
    assert_eq!(parse(&with(both)).unwrap().rope.theta, 1e6);
    let differing =
        json!({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}});
    refused(
        &with(differing),
        "`config.json`: key `rope_parameters`: expected the same rotary embedding as the older keys, \
         Rope { theta: 10000.0, scaling: None }, found Rope { theta: 1000000.0, scaling: None }",
    );
    let null = json!({"rope_theta": null, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}});
    assert_eq!(parse(&with(null)).unwrap().rope.theta, 1e6);
    let linear = json!({"rope_type": "linear", "factor": 2.0});
    let mut parameters = linear.clone();
    parameters["rope_theta"] = json!(1e6);
    refused(
        &with(json!({"rope_scaling": linear, "rope_parameters": parameters})),
        "`config.json`: key `rope_parameters`: expected the same rotary embedding as the older keys, \
         Rope { theta: 10000.0, scaling: Linear { factor: 2.0 } }, \
         found Rope { theta: 1000000.0, scaling: Linear { factor: 2.0 } }",
    );
}

#[test]
fn rope_scaling_types() {
    let scaling = |value: Value| parse(&with(json!({"rope_scaling": value})));
    let dynamic = scaling(json!({"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 99}));
    assert_eq!(dynamic.unwrap().rope.scaling, RopeScaling::Dynamic { factor: 2.0, original_max: 16 });
    let linear = scaling(json!({"type": "linear", "factor": 4})).unwrap();
    assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 4.0 });
    for (value, message) in [
        (
            json!({"type": "yarn", "factor": 2.0}),
            "type`: expected `default`, `linear`, `dynamic` or `llama3`, found `yarn`",
        ),
        (
            json!({"rope_type": "longrope"}),
            "rope_type`: expected `default`, `linear`, `dynamic` or `llama3`, found `longrope`",
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
    assert_eq!((config.num_kv_heads, config.max_position_embeddings, config.rms_norm_eps), (4, 2048, 1e-6));
    assert!(!config.tie_word_embeddings && !config.attention_bias && !config.mlp_bias);
    assert_eq!((config.bos_token_id, config.eos_token_ids, config.dtype), (None, vec![], None));
}

#[test]
fn biases_and_ties_as_configured() {
    let config = parse(&with(json!({"attention_bias": true, "tie_word_embeddings": true}))).unwrap();
    assert!(LinearKind::O.has_bias(&config) && !LinearKind::Down.has_bias(&config));
    assert!(!dense_tensors(&config).iter().any(|(name, _)| name == "lm_head.weight"));
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
        (json!({"hidden_act": "gelu"}), "hidden_act`: expected `silu`, found `gelu`"),
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
    let qwen = with(json!({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}));
    assert_error(
        parse(&qwen),
        Path::new("no folder"),
        "UnsupportedArchitecture",
        "`config.json` holds architecture `Qwen2ForCausalLM`, which is not supported \
         (supported: LlamaForCausalLM, MistralForCausalLM)",
    );
    let unnamed = with(json!({"architectures": null, "model_type": "gpt_neox"}));
    assert_eq!(told(parse(&unnamed), Path::new("no folder")).0, "UnsupportedArchitecture");
    assert_eq!(parse(&without("architectures")).unwrap().architecture, Architecture::Llama);
}

#[test]
fn names_of_modules() {
    let id = LinearId { layer: 3, kind: LinearKind::Q };
    assert_eq!(id.to_string(), "model.layers.3.self_attn.q_proj");
    assert_eq!(id.qweight(), "model.layers.3.self_attn.q_proj.qweight");
}

#[test]
fn folders_without_a_config() {
    let dir = tempfile::tempdir().unwrap();
    assert_error(
        LlamaConfig::read(dir.path()),
        dir.path(),
        "NotACheckpoint",
        "`DIR` is not a checkpoint folder: `config.json` not found in it",
    );
    assert_error(
        LlamaConfig::read(&dir.path().join("absent")),
        dir.path(),
        "Io",
        "cannot read `DIR/absent`: No such file or directory (os error 2)",
    );
    let broken = folder(&small_config(), &[("config.json", b"{\"a\": ")]);
    assert_error(
        LlamaConfig::read(broken.path()),
        broken.path(),
        "Json",
        "`DIR/config.json` is not the JSON expected here: EOF while parsing a value at line 1 column 6",
    );
}
