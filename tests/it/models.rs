//! The forward pass against the logits that transformers computed for the tiny models of tests/golden/models.

use std::{collections::BTreeSet, fs, path::Path};

use gptq::{
    architectures::{CONFIG_FILE, supported_classes},
    checkpoint::{Checkpoint, WEIGHTS_FILE},
    model::{Compute, Decoder, Runner},
    rotation::{Rotated, rotated_bytes},
};
use safetensors::{SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

/// Tokens of a window.
const SEQ_LEN: usize = 32;
/// Difference that rounding in fp32 explains: the logits' standard deviation is about 2, and what was measured is
/// 3e-5 at most.
const TOLERANCE: f64 = 2e-4;
/// A model that is changed in one thing that matters is off by at least this.
const CLEARLY_WRONG: f64 = 100.0 * TOLERANCE;

/// One thing that a model can be changed in.
enum Change {
    /// The value at a JSON pointer into config.json.
    Config(&'static str, Value),
    /// Each key and value head in the place of the next one.
    KvHeads,
}
use Change::{Config, KvHeads};

#[test]
fn llama2_mha() {
    check("llama2-mha", [Config("/rope_parameters/rope_theta", json!(11_000.0)), KvHeads]);
}

#[test]
fn llama3_gqa_rope() {
    let changes = [
        Config("/rope_parameters/rope_theta", json!(400_000.0)),
        Config("/rope_parameters/factor", json!(4.0)),
        Config("/rope_parameters/low_freq_factor", json!(2.0)),
        Config("/rope_parameters/high_freq_factor", json!(3.0)),
        Config("/rope_parameters/original_max_position_embeddings", json!(15)),
        Config("/rope_parameters/rope_type", json!("default")),
        KvHeads,
    ];
    check("llama3-gqa-rope", changes);
}

#[test]
fn llama31_old_keys() {
    let changes = [
        Config("/rope_theta", json!(100_000.0)),
        Config("/rope_scaling/factor", json!(4.0)),
        Config("/rope_scaling", Value::Null),
    ];
    check("llama31-old-keys", changes);
}

#[test]
fn linear_rope() {
    check("linear-rope", [Config("/rope_scaling/factor", json!(2.1)), Config("/rope_scaling", Value::Null)]);
}

/// Without effect on a sequence shorter than `max_position_embeddings`.
#[test]
fn dynamic_rope() {
    check("dynamic-rope", [Config("/max_position_embeddings", json!(SEQ_LEN - 1))]);
}

#[test]
fn tied() {
    check("tied", [Config("/rope_parameters/rope_theta", json!(11_000.0)), KvHeads]);
}

#[test]
fn biased() {
    check("biased", []);
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models/biased");
    for key in ["/attention_bias", "/mlp_bias"] {
        let changed = with_config(&dir, key, json!(false));
        let checkpoint = Checkpoint::open(changed.path()).unwrap();
        let refused = Runner::dense(&checkpoint, SEQ_LEN, Compute::CPU).err().unwrap();
        assert!(refused.to_string().contains(".bias` of "), "{refused}");
    }
}

#[test]
fn head_dim() {
    check("head-dim", [Config("/rope_parameters/rope_theta", json!(11_000.0))]);
}

#[test]
fn mistral_window() {
    let windows = [json!(7), json!(9), Value::Null];
    check("mistral-window", windows.map(|window| Config("/sliding_window", window)));
}

#[test]
fn eps_theta() {
    let changes =
        [Config("/rms_norm_eps", json!(1e-5)), Config("/rope_parameters/rope_theta", json!(2_000_000.0))];
    check("eps-theta", changes);
}

/// Every family's models; each with something changed that only it has.
#[test]
fn other_families() {
    let rope = |theta: f64| Config("/rope_parameters/rope_theta", json!(theta));
    check("qwen2", [KvHeads]);
    check("qwen2-window", [Config("/max_window_layers", json!(0)), Config("/sliding_window", json!(7))]);
    check("qwen3", [rope(11_000.0), Config("/rms_norm_eps", json!(0.1))]);
    check("phi3", []);
    check("phi3-longrope", [Config("/original_max_position_embeddings", json!(64))]);
    check("gemma", [rope(11_000.0)]);
    check(
        "gemma2",
        [Config("/query_pre_attn_scalar", json!(64)), Config("/attn_logit_softcapping", Value::Null)],
    );
    check("gemma2", [Config("/final_logit_softcapping", json!(2.0)), Config("/sliding_window", json!(7))]);
    check("gemma3", [Config("/query_pre_attn_scalar", json!(64)), Config("/sliding_window", json!(7))]);
    check("gemma3-nested", []);
    check("olmo2", [Config("/rms_norm_eps", json!(0.1))]);
    check("olmo3", [Config("/sliding_window", json!(7))]);
    check(
        "granite",
        [
            Config("/embedding_multiplier", json!(1.0)),
            Config("/residual_multiplier", json!(1.0)),
            Config("/attention_multiplier", json!(1.0)),
            Config("/logits_scaling", json!(1.0)),
        ],
    );
    check("smollm3", [Config("/no_rope_layers", json!([1, 1]))]);
    check("seed-oss", []);
    check("glm4", [Config("/partial_rotary_factor", json!(1.0))]);
    check("cohere", [Config("/logit_scale", json!(1.0))]);
    check("cohere-plain", []);
    check("starcoder2", [Config("/norm_epsilon", json!(0.1))]);
    check("stablelm", [Config("/layer_norm_eps", json!(0.1))]);
    check("ministral", [Config("/sliding_window", json!(7))]);
    check("yarn", []);
    check("mixtral", [Config("/num_experts_per_tok", json!(1))]);
    check("qwen2-moe", [Config("/norm_topk_prob", json!(true)), Config("/num_experts_per_tok", json!(1))]);
    check("qwen3-moe", [Config("/norm_topk_prob", json!(false))]);
}

#[test]
fn every_family_describes_all_tensors_of_its_golden_model() {
    let mut classes = BTreeSet::new();
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models")).unwrap() {
        let dir = entry.unwrap().path();
        if !dir.is_dir() {
            continue;
        }
        let checkpoint = Checkpoint::open(&dir).unwrap();
        checkpoint.check().unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        assert_eq!(checkpoint.extra(), Vec::<&str>::new(), "{}", dir.display());
        classes.insert(checkpoint.config().class);
    }
    // An old spelling; and transformers has only the config of InternLM3, whose model is Llama's.
    let without: Vec<&str> = supported_classes().filter(|class| !classes.contains(class)).collect();
    assert_eq!(without, ["LLaMAForCausalLM", "InternLM3ForCausalLM"], "classes without a golden model");
}

/// `tests/golden/pytorch/pytorch_model.bin` was saved with `torch.save` from the weights of `llama2-mha`.
#[test]
fn weights_in_pytorch_format_are_the_same() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let (dir, file) = (golden.join("models/llama2-mha"), golden.join("pytorch/pytorch_model.bin"));
    let copy = tempfile::tempdir().unwrap();
    fs::copy(dir.join(CONFIG_FILE), copy.path().join(CONFIG_FILE)).unwrap();
    fs::copy(&file, copy.path().join("pytorch_model.bin")).unwrap();
    let (expected, found) = (Checkpoint::open(&dir).unwrap(), Checkpoint::open(copy.path()).unwrap());
    found.check().unwrap();
    for name in expected.names() {
        let [expected, found] = [&expected, &found].map(|checkpoint| checkpoint.view(name).unwrap());
        assert_eq!((found.dtype, found.shape), (expected.dtype, expected.shape), "{name}");
        assert!(found.bytes == expected.bytes, "{name}");
    }
    assert!(difference(copy.path(), &dir) < TOLERANCE);

    // In shards, and cut short.
    fs::rename(copy.path().join("pytorch_model.bin"), copy.path().join("pytorch_model-00001-of-00001.bin"))
        .unwrap();
    let map: serde_json::Map<String, Value> =
        found.names().map(|name| (name.to_owned(), json!("pytorch_model-00001-of-00001.bin"))).collect();
    fs::write(copy.path().join("pytorch_model.bin.index.json"), json!({"weight_map": map}).to_string())
        .unwrap();
    Checkpoint::open(copy.path()).unwrap().check().unwrap();
    let bytes = fs::read(&file).unwrap();
    fs::write(copy.path().join("pytorch_model-00001-of-00001.bin"), &bytes[..bytes.len() / 2]).unwrap();
    let error = Checkpoint::open(copy.path()).unwrap_err();
    assert!(error.to_string().contains("cannot be read as a PyTorch checkpoint"), "{error}");
}

#[test]
fn a_rotated_model_computes_the_same() {
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models")).unwrap() {
        let dir = entry.unwrap().path();
        if !dir.is_dir() {
            continue;
        }
        let place = tempfile::tempdir().unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        if let Some(reason) = checkpoint.config().rotation_refusal() {
            let refused = Rotated::write(&checkpoint, place.path(), &mut || Ok(())).err().unwrap();
            assert!(refused.to_string().contains(&reason), "{refused}");
            continue;
        }
        let rotated = Rotated::write(&checkpoint, place.path(), &mut || Ok(())).unwrap();
        let names = rotated.checkpoint().names();
        let bytes: u64 = names.map(|name| rotated.checkpoint().view(name).unwrap().bytes.len() as u64).sum();
        assert_eq!(rotated_bytes(checkpoint.config()), bytes);
        let difference = difference(rotated.checkpoint().dir(), &dir);
        assert!(difference < TOLERANCE, "{}: logits differ by {difference:e}", dir.display());
        drop(rotated);
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
    }
}

fn check<const N: usize>(name: &str, changes: [Change; N]) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models").join(name);
    let difference = difference(&dir, &dir);
    assert!(difference < TOLERANCE, "{name}: logits differ by {difference:e}");
    for prompt in [1, 5, SEQ_LEN - 1] {
        let difference = decoded_difference(&dir, prompt);
        assert!(
            difference < TOLERANCE,
            "{name}, prompt of {prompt}: decoded logits differ by {difference:e}"
        );
    }
    for change in changes {
        let (what, changed) = match change {
            Config(pointer, value) => (format!("{pointer} = {value}"), with_config(&dir, pointer, value)),
            KvHeads => ("key and value heads in another order".into(), with_next_kv_heads(&dir)),
        };
        let difference = self::difference(changed.path(), &dir);
        assert!(difference > CLEARLY_WRONG, "{name} with {what}: logits differ by {difference:e} only");
    }
}

/// Token ids `[W, SEQ_LEN]`, flattened, and their logits `[W, SEQ_LEN, vocab]`.
fn expected(golden: &Path) -> (Vec<i64>, Tensor) {
    let tensors = Tensor::read_safetensors(golden.join("expected.safetensors")).unwrap();
    let find = |name: &str| tensors.iter().find(|(n, _)| n == name).expect(name).1.shallow_clone();
    assert_eq!(tensors.len(), 2);
    (Vec::<i64>::try_from(find("tokens").flatten(0, -1)).unwrap(), find("logits"))
}

/// Largest difference of logits when the first window is decoded with a key-value cache: a prompt of `prompt` tokens, the
/// others one by one.
fn decoded_difference(dir: &Path, prompt: usize) -> f64 {
    let (tokens, expected) = expected(dir);
    let checkpoint = Checkpoint::open(dir).unwrap();
    let runner = Runner::open(&checkpoint, SEQ_LEN, Compute::CPU).unwrap();
    let layers = 0..checkpoint.config().num_layers();
    let packed: Vec<_> = layers.map(|layer| runner.packed_layer(layer).unwrap()).collect();
    let mut decoder = Decoder::new(&runner, &packed, SEQ_LEN).unwrap();
    let mut logits = decoder.advance(&tokens[..prompt]).unwrap();
    let mut largest = 0.0f64;
    for position in prompt..=SEQ_LEN {
        let right = expected.get(0).get(position as i64 - 1);
        let difference = (Tensor::from_slice(&logits) - right).abs().max().double_value(&[]);
        largest = largest.max(difference);
        if position < SEQ_LEN {
            logits = decoder.advance(&tokens[position..=position]).unwrap();
        }
    }
    largest
}

/// Largest difference of the logits of the model in `dir` from the expected ones in `golden`.
fn difference(dir: &Path, golden: &Path) -> f64 {
    let (tokens, expected) = expected(golden);

    let checkpoint = Checkpoint::open(dir).unwrap();
    let runner = Runner::dense(&checkpoint, SEQ_LEN, Compute::CPU).unwrap();
    let hidden = runner.hidden_states(&tokens, SEQ_LEN, || ()).unwrap();
    let logits: Vec<Tensor> = hidden.iter().map(|batch| runner.logits(batch).unwrap()).collect();
    let logits = Tensor::cat(&logits, 0);
    assert_eq!((logits.size(), logits.kind()), (expected.size(), Kind::Float));
    (logits - expected).abs().max().double_value(&[])
}

/// A copy of the model in `dir` with another value in config.json.
fn with_config(dir: &Path, pointer: &str, value: Value) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(dir.join(CONFIG_FILE)).unwrap()).unwrap();
    *config.pointer_mut(pointer).unwrap_or_else(|| panic!("{}: no {pointer}", dir.display())) = value;
    fs::write(copy.path().join(CONFIG_FILE), config.to_string()).unwrap();
    fs::copy(dir.join(WEIGHTS_FILE), copy.path().join(WEIGHTS_FILE)).unwrap();
    copy
}

/// A copy of the model in `dir` with the key and value heads of every layer moved up by one.
fn with_next_kv_heads(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    fs::copy(dir.join(CONFIG_FILE), copy.path().join(CONFIG_FILE)).unwrap();
    let heads = Checkpoint::open(dir).unwrap().config().layers[0].attention.num_kv_heads;
    let file = fs::read(dir.join(WEIGHTS_FILE)).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let moved: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| {
            let mut bytes = tensor.data().to_vec();
            if name.ends_with("k_proj.weight") || name.ends_with("v_proj.weight") {
                let head = bytes.len() / heads;
                bytes.rotate_left(head);
            }
            (name, tensor.dtype(), tensor.shape().to_vec(), bytes)
        })
        .collect();
    let views = moved
        .iter()
        .map(|(name, dtype, shape, bytes)| (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &copy.path().join(WEIGHTS_FILE)).unwrap();
    copy
}
