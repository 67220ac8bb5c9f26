use std::path::Path;

use half::{bf16, f16};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{
    super::{Checkpoint, CheckpointFormat, Dtype, PackedTensors, QuantizationConfig, packed},
    Given, assert_error, dense_model, f16_bytes, folder, given, i32_bytes, parse, raw_file, small_config,
    weights_file,
};
use crate::{
    error::Result,
    variant::{Bits, GroupSize},
};

/// Positions in the layer.
const UP: usize = 5;
const DOWN: usize = 6;
const NAME: &str = "model.layers.0.mlp.up_proj";

/// A linear of the layer.
fn of<'a>(
    checkpoint: &'a Checkpoint,
    position: usize,
    quantization: &QuantizationConfig,
) -> Result<Option<PackedTensors<'a>>> {
    let config = checkpoint.config();
    packed(checkpoint, &config.linear_id(0, position), &config.layers[0].linears[position], quantization)
}

/// As the published branches of Llama 2 have it.
fn card() -> Value {
    json!({
        "bits": 4, "group_size": 16, "damp_percent": 0.01, "desc_act": false, "sym": true,
        "true_sequential": true, "model_name_or_path": null, "model_file_base_name": "model",
    })
}

fn method(mut value: Value) -> Value {
    value["quant_method"] = json!("gptq");
    value
}

fn with(mut value: Value, key: &str, to: Value) -> Value {
    value[key] = to;
    value
}

/// A folder with these settings in `config.json` and in `quantize_config.json`.
fn described(new: Option<Value>, old: Option<Value>) -> (TempDir, Checkpoint) {
    let mut config = small_config();
    if let Some(new) = new {
        config["quantization_config"] = new;
    }
    let old = old.map(|value| value.to_string().into_bytes());
    let weights = weights_file(&dense_model(&small_config()));
    let mut files = vec![("model.safetensors", &weights[..])];
    files.extend(old.as_ref().map(|bytes| ("quantize_config.json", &bytes[..])));
    let dir = folder(&config, &files);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

#[track_caller]
fn refused(value: Value, message: &str) {
    let result = QuantizationConfig::from_json(Path::new("q.json"), &value);
    assert_error(result, Path::new("no folder"), "Config", &format!("`q.json`: key `{message}"));
}

#[test]
fn read_from_either_place() {
    let new = with(method(card()), "meta", json!({"quantizer": "gptqmodel:7.7", "damp_percent": 0.05}));
    for (new, old) in [(Some(new), Some(card())), (Some(method(card())), None), (None, Some(card()))] {
        let (_dir, checkpoint) = described(new, old);
        let config = QuantizationConfig::read(&checkpoint).unwrap();
        assert_eq!((config.bits, config.group_size), (Bits::Four, GroupSize::Features(16)));
        assert_eq!((config.desc_act, config.sym, config.static_groups), (false, true, false));
        assert_eq!((config.format, config.damp_percent), (CheckpointFormat::Gptq, Some(0.01)));
    }
}

#[test]
fn what_one_place_leaves_open_the_other_says() {
    let (_dir, checkpoint) = described(
        Some(json!({"quant_method": "gptq", "bits": 3, "checkpoint_format": "gptq_v2"})),
        Some(json!({"bits": 3, "group_size": -1, "desc_act": true})),
    );
    let config = QuantizationConfig::read(&checkpoint).unwrap();
    assert_eq!((config.bits, config.group_size, config.desc_act), (Bits::Three, GroupSize::PerChannel, true));
    assert_eq!(config.format.zero_offset(), 0);
}

#[test]
fn places_that_disagree() {
    for (key, value, message) in [
        ("bits", json!(8), "bits`: expected 4, as"),
        ("group_size", json!(-1), "group_size`: expected 16, as"),
        ("desc_act", json!(true), "desc_act`: expected false, as"),
    ] {
        let (dir, checkpoint) = described(Some(method(card())), Some(with(card(), key, value.clone())));
        let message = format!(
            "`DIR/quantize_config.json`: key `{message} `quantization_config` of `config.json` says, found {value}"
        );
        assert_error(QuantizationConfig::read(&checkpoint), dir.path(), "Config", &message);
    }
}

#[test]
fn a_dense_model_says_nothing() {
    let (dir, checkpoint) = described(None, None);
    assert_error(
        QuantizationConfig::read(&checkpoint),
        dir.path(),
        "CheckpointKind",
        "`DIR`: expected a GPTQ checkpoint, found no `quantization_config` in `config.json` \
         and no `quantize_config.json`",
    );
}

#[test]
fn other_methods_and_settings_are_refused_by_name() {
    let (dir, checkpoint) = described(Some(with(card(), "quant_method", json!("awq"))), None);
    assert_error(
        QuantizationConfig::read(&checkpoint),
        dir.path(),
        "Config",
        "`DIR/config.json`: key `quantization_config.quant_method`: expected `gptq`, found `awq`",
    );
    let (dir, checkpoint) = described(Some(card()), None);
    assert_error(
        QuantizationConfig::read(&checkpoint),
        dir.path(),
        "Config",
        "`DIR/config.json`: key `quantization_config.quant_method`: expected `gptq`, found nothing",
    );
    for (key, value, message) in [
        (
            "checkpoint_format",
            json!("marlin"),
            "checkpoint_format`: expected `gptq` or `gptq_v2`, found `marlin`",
        ),
        ("is_marlin_format", json!(true), "is_marlin_format`: expected false, found true"),
        ("lm_head", json!(true), "lm_head`: expected false, found true"),
        ("bits", json!(5), "bits`: expected 2, 3, 4 or 8, found 5"),
        ("bits", Value::Null, "bits`: expected 2, 3, 4 or 8, found nothing"),
        ("group_size", json!(0), "group_size`: expected -1 or a positive integer, found 0"),
        ("group_size", Value::Null, "group_size`: expected -1 or a positive integer, found nothing"),
        ("desc_act", json!("no"), "desc_act`: expected true or false, found \"no\""),
        ("pack_dtype", json!("int64"), "pack_dtype`: expected `int32`, found `int64`"),
        ("rotation", json!("hadamard"), "rotation`: expected none, found \"hadamard\""),
        (
            "dynamic",
            json!({"-:.*down.*": {}, "+:.*up.*": {"bits": 8}}),
            "dynamic`: expected one setting for all quantized modules, found {\"bits\":8} for `+:.*up.*`",
        ),
    ] {
        refused(with(card(), key, value), message);
    }
    refused(
        with(with(card(), "checkpoint_format", json!("gptq")), "format", json!("gptq_v2")),
        "format`: expected `gptq`, as `checkpoint_format` says, found `gptq_v2`",
    );
    let skipping = with(card(), "dynamic", json!({"-:.*down.*": {}}));
    QuantizationConfig::from_json(Path::new("q.json"), &skipping).unwrap();
}

/// `up_proj` of the small model: K = 32, N = 64, groups of 16.
fn packed_up() -> Vec<Given> {
    vec![
        given(format!("{NAME}.qweight"), Dtype::I32, &[4, 64], i32_bytes(0..256)),
        given(format!("{NAME}.qzeros"), Dtype::I32, &[2, 8], i32_bytes([0x7777_7777; 16])),
        given(format!("{NAME}.scales"), Dtype::F16, &[2, 64], f16_bytes(128)),
        given(format!("{NAME}.g_idx"), Dtype::I32, &[32], i32_bytes((0..32).map(|k| k / 16))),
    ]
}

/// The dense small model with `up_proj` replaced by these tensors.
fn quantized(tensors: &[Given]) -> (TempDir, Checkpoint) {
    let mut model = dense_model(&small_config());
    model.retain(|tensor| !tensor.name.starts_with(NAME));
    model.extend_from_slice(tensors);
    let dir = folder(&small_config(), &[("model.safetensors", &weights_file(&model))]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

fn settings(changes: Value) -> QuantizationConfig {
    let mut value = card();
    for (key, change) in changes.as_object().unwrap() {
        value[key] = change.clone();
    }
    QuantizationConfig::from_json(Path::new("q.json"), &value).unwrap()
}

#[track_caller]
fn unfit(change: impl FnOnce(&mut Vec<Given>), variant: &'static str, message: &str) {
    let mut tensors = packed_up();
    change(&mut tensors);
    let (dir, checkpoint) = quantized(&tensors);
    assert_error(of(&checkpoint, UP, &settings(json!({}))), dir.path(), variant, message);
}

/// What is read of a folder without any config, and the one note.
#[track_caller]
fn inferred(change: impl FnOnce(&mut Vec<Given>)) -> (QuantizationConfig, String) {
    let mut tensors = packed_up();
    change(&mut tensors);
    let (_dir, checkpoint) = quantized(&tensors);
    let mut config = QuantizationConfig::read(&checkpoint).unwrap();
    assert!(of(&checkpoint, UP, &config).unwrap().is_some());
    let note = config.notes.remove(0);
    assert_eq!(config.notes, [""; 0]);
    (config, note.strip_prefix("no file says it, so it was inferred from the tensors: ").unwrap().to_owned())
}

#[test]
fn a_folder_that_says_nothing_is_read_from_its_tensors() {
    let (config, note) = inferred(|_| ());
    assert_eq!((config.bits, config.group_size), (Bits::Four, GroupSize::Features(16)));
    assert_eq!((config.desc_act, config.sym, config.format), (false, true, CheckpointFormat::Gptq));
    assert_eq!(
        note,
        "4 bits (shape of qweight), group size 16 (shape of scales), no act order (g_idx), symmetric, checkpoint_format \
         gptq (qzeros)"
    );
    let (config, note) = inferred(|t| t[3].bytes = i32_bytes((0..32).map(|k| k % 2)));
    assert_eq!((config.group_size, config.desc_act), (GroupSize::Features(16), true));
    assert!(note.contains(", act order (g_idx), "), "{note}");
    // A short last group: the number of groups alone would fit 16, too.
    let (config, _) = inferred(|t| t[3].bytes = i32_bytes((0..32).map(|k| k / 24)));
    assert_eq!((config.group_size, config.desc_act), (GroupSize::Features(24), false));
    let (config, _) = inferred(|t| t.truncate(3));
    assert_eq!((config.group_size, config.desc_act), (GroupSize::Features(16), false));
    let (config, note) = inferred(|t| {
        t[1] = given(format!("{NAME}.qzeros"), Dtype::I32, &[1, 8], i32_bytes([0x7777_7777; 8]));
        t[2] = given(format!("{NAME}.scales"), Dtype::F16, &[1, 64], f16_bytes(64));
        t[3].bytes = i32_bytes([0; 32]);
    });
    assert_eq!((config.group_size, config.desc_act), (GroupSize::PerChannel, false));
    assert!(note.contains("one group a row"), "{note}");
    let (config, _) = inferred(|t| t[1].bytes = i32_bytes([0x8888_8888_u32 as i32; 16]));
    assert_eq!((config.sym, config.format), (true, CheckpointFormat::GptqV2));
    let (config, note) = inferred(|t| t[1].bytes[0] = 0x76);
    assert_eq!((config.sym, config.format), (false, CheckpointFormat::Gptq));
    assert!(note.ends_with("asymmetric, checkpoint_format gptq (qzeros)"), "{note}");
    // Codes of two bits in half the words.
    let (config, _) = inferred(|t| {
        t[0] = given(format!("{NAME}.qweight"), Dtype::I32, &[2, 64], i32_bytes(0..128));
        t[1] = given(format!("{NAME}.qzeros"), Dtype::I32, &[2, 4], i32_bytes([0x5555_5555; 8]));
    });
    assert_eq!((config.bits, config.sym), (Bits::Two, true));
}

#[test]
fn tensors_that_show_no_width_are_an_error() {
    let mut tensors = packed_up();
    tensors[0] = given(format!("{NAME}.qweight"), Dtype::I32, &[5, 64], i32_bytes(0..320));
    let (dir, checkpoint) = quantized(&tensors);
    let message = "`DIR/config.json`: key `bits`: expected 2, 3, 4 or 8, found nothing";
    assert_error(QuantizationConfig::read(&checkpoint), dir.path(), "Config", message);
}

#[test]
fn settings_in_the_header_of_the_weights_are_read() {
    let with_header = |metadata: Value| {
        let mut model = dense_model(&small_config());
        model.retain(|tensor| !tensor.name.starts_with(NAME));
        model.extend(packed_up());
        let file = weights_file(&model);
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
        header["__metadata__"] = metadata;
        let file = raw_file(header.to_string().as_bytes(), &file[8 + length..]);
        let dir = folder(&small_config(), &[("gptq_model-4bit-16g.safetensors", &file)]);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        (dir, checkpoint)
    };
    for size in ["gptq_group_size", "gptq_groupsize"] {
        let (_dir, checkpoint) = with_header(json!({
            "format": "pt", "gptq_bits": "4", size: "16", "gptq_desc_act": "False", "gptq_damp_percent": "0.01",
        }));
        let config = QuantizationConfig::read(&checkpoint).unwrap();
        assert_eq!((config.bits, config.group_size), (Bits::Four, GroupSize::Features(16)));
        assert_eq!((config.desc_act, config.sym, config.damp_percent), (false, true, Some(0.01)));
        assert_eq!(
            config.notes,
            [
                "how it was quantized was read from the header of the weights, as AutoGPTQ wrote it",
                "no file says it, so it was inferred from the tensors: symmetric, checkpoint_format gptq (qzeros)",
            ]
        );
    }
    let (dir, checkpoint) = with_header(json!({"gptq_bits": "five"}));
    let message = "`DIR`: key `__metadata__.bits`: expected 2, 3, 4 or 8, found \"five\"";
    assert_error(QuantizationConfig::read(&checkpoint), dir.path(), "Config", message);
}

#[test]
fn the_file_of_optimum_is_read() {
    let settings = with(method(card()), "group_size", json!(8)).to_string();
    let model = weights_file(&dense_model(&small_config()));
    let files = [("model.safetensors", &model[..]), ("quantization_config.json", settings.as_bytes())];
    let dir = folder(&small_config(), &files);
    let config = QuantizationConfig::read(&Checkpoint::open(dir.path()).unwrap()).unwrap();
    assert_eq!((config.group_size, config.notes.len()), (GroupSize::Features(8), 1));
    assert!(config.notes[0].contains("`quantization_config.json`"), "{:?}", config.notes);
}

#[test]
fn gptq_tensors_of_auto_round_are_read() {
    let settings = json!({
        "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 16, "sym": true,
        "data_type": "int", "extra_config": {"lm_head": {"bits": 16, "data_type": "float"}},
    });
    let (_dir, checkpoint) = described(Some(settings.clone()), None);
    let config = QuantizationConfig::read(&checkpoint).unwrap();
    assert_eq!((config.bits, config.group_size), (Bits::Four, GroupSize::Features(16)));
    assert_eq!((config.desc_act, config.format), (false, CheckpointFormat::Gptq));
    assert!(config.notes.len() == 1 && config.notes[0].starts_with("`quant_method` is `auto-round` and "));
    for (key, value, message) in [
        (
            "packing_format",
            json!("auto_round:auto_awq"),
            "packing_format`: expected `auto_round:auto_gptq`, found `auto_round:auto_awq`",
        ),
        ("packing_format", Value::Null, "packing_format`: expected `auto_round:auto_gptq`, found nothing"),
        ("data_type", json!("mx_fp"), "data_type`: expected `int`, found `mx_fp`"),
        (
            "extra_config",
            json!({"model.layers.0.mlp.up_proj": {"bits": 8}}),
            "extra_config`: expected one setting for all quantized modules, found bits 8 for `model.layers.0.mlp.up_proj`",
        ),
    ] {
        refused(with(settings.clone(), key, value), message);
    }
}

#[test]
fn packed_tensors_are_views() {
    let (_dir, checkpoint) = quantized(&packed_up());
    let linear = of(&checkpoint, UP, &settings(json!({}))).unwrap().unwrap();
    assert_eq!((linear.in_features, linear.out_features, linear.groups), (32, 64, 2));
    assert_eq!(linear.qweight[..], (0..256).collect::<Vec<_>>());
    assert_eq!((linear.qzeros[15], linear.g_idx[16], linear.bias.is_none()), (0x7777_7777, 1, true));
    assert_eq!(linear.scales[3], f16::from_f32(-0.625));
    assert!(checkpoint.extra().is_empty());
    assert_eq!(of(&checkpoint, DOWN, &settings(json!({}))).unwrap(), None);
}

#[test]
fn unaligned_and_wider_tensors_are_converted() {
    let mut tensors = packed_up();
    let scales = (0..128).flat_map(|i| bf16::from_f32(i as f32 / 64.0).to_le_bytes()).collect();
    tensors[2] = given(format!("{NAME}.scales"), Dtype::BF16, &[2, 64], scales);
    tensors.insert(0, given("odd", Dtype::U8, &[1], vec![0]));
    let (_dir, checkpoint) = quantized(&tensors);
    let linear = of(&checkpoint, UP, &settings(json!({}))).unwrap().unwrap();
    assert_eq!(linear.qweight[255], 255);
    assert_eq!(linear.scales[96], f16::from_f32(1.5));
}

#[test]
fn a_missing_g_idx_is_sequential_or_an_error() {
    let (dir, checkpoint) = quantized(&packed_up()[..3]);
    let linear = |changes: Value| -> Result<Vec<i32>> {
        Ok(of(&checkpoint, UP, &settings(changes))?.unwrap().g_idx.into_owned())
    };
    let sequential: Vec<i32> = (0..32).map(|k| k / 16).collect();
    assert_eq!(linear(json!({})).unwrap(), sequential);
    assert_eq!(linear(json!({"desc_act": true, "static_groups": true})).unwrap(), sequential);
    let message = format!("tensor `{NAME}.g_idx` is missing from `DIR`");
    assert_error(linear(json!({"desc_act": true})), dir.path(), "MissingTensor", &message);
}

#[test]
fn a_short_last_group_is_legal() {
    let mut tensors = packed_up();
    tensors[3].bytes = i32_bytes((0..32).map(|k| k / 24));
    let (_dir, checkpoint) = quantized(&tensors);
    assert_eq!(of(&checkpoint, UP, &settings(json!({"group_size": 24}))).unwrap().unwrap().groups, 2);
}

#[test]
fn packed_tensors_that_do_not_fit() {
    let shape = |suffix: &str, expected: &str, found: &str| {
        format!("tensor `{NAME}.{suffix}`: expected shape {expected}, found {found}")
    };
    unfit(|t| t[0].shape = vec![8, 32], "TensorShape", &shape("qweight", "[4, 64]", "[8, 32]"));
    unfit(|t| t[1].shape = vec![16], "TensorShape", &shape("qzeros", "[2, 8]", "[16]"));
    unfit(|t| t[2].shape = vec![64, 2], "TensorShape", &shape("scales", "[2, 64]", "[64, 2]"));
    unfit(|t| t[3].shape = vec![32, 1], "TensorShape", &shape("g_idx", "[32]", "[32, 1]"));
    unfit(
        |t| t[0].dtype = Dtype::U32,
        "TensorDtype",
        &format!("tensor `{NAME}.qweight`: expected dtype I32, found U32"),
    );
    unfit(|t| drop(t.remove(2)), "MissingTensor", &format!("tensor `{NAME}.scales` is missing from `DIR`"));
    unfit(|t| t.clear(), "MissingTensor", &format!("tensor `{NAME}.qweight` is missing from `DIR`"));
    for group in [2, -1] {
        unfit(
            |t| t[3].bytes[4 * 5..4 * 6].copy_from_slice(&i32::to_le_bytes(group)),
            "TensorValue",
            &format!("tensor `{NAME}.g_idx`, element 5: expected a group from 0 to 1, found {group}"),
        );
    }
    unfit(
        |t| t[2].bytes[..2].copy_from_slice(&f16::INFINITY.to_le_bytes()),
        "NonFinite",
        &format!("tensor `{NAME}.scales`: 1 of 128 values are NaN or infinite"),
    );
}

#[test]
fn the_layout_with_float_zero_points_is_named() {
    let mut tensors = packed_up();
    tensors[1] = given(format!("{NAME}.zeros"), Dtype::F16, &[64, 1], f16_bytes(64));
    let (dir, checkpoint) = quantized(&tensors);
    let message = format!(
        "`DIR`: expected a GPTQ checkpoint with packed zero points (`qzeros`), found the oldest layout of GPTQ-for-LLaMa, \
         with float zero points (`{NAME}.zeros`)"
    );
    let refused = of(&checkpoint, UP, &settings(json!({}))).map(drop);
    for error in [refused, checkpoint.check_undeclared()].map(Result::unwrap_err) {
        assert!(error.hint().unwrap().contains("gptq quantize --model"), "{:?}", error.hint());
        assert_error::<()>(Err(error), dir.path(), "CheckpointKind", &message);
    }
    assert!(checkpoint.extra().is_empty());
    unfit(|t| drop(t.remove(1)), "MissingTensor", &format!("tensor `{NAME}.qzeros` is missing from `DIR`"));
}

#[test]
fn biases_of_a_model_without_them_must_be_zero() {
    let bias = |value: f32| {
        given(format!("{NAME}.bias"), Dtype::F16, &[64], f16::from_f32(value).to_le_bytes().repeat(64))
    };
    let mut tensors = packed_up();
    tensors.push(bias(0.0));
    let (_dir, checkpoint) = quantized(&tensors);
    assert_eq!(of(&checkpoint, UP, &settings(json!({}))).unwrap().unwrap().bias, None);
    assert!(checkpoint.extra().is_empty());
    unfit(
        |t| t.push(bias(0.5)),
        "TensorValue",
        &format!("tensor `{NAME}.bias`, element 0: expected 0: the model has no biases, found 0.5"),
    );
}

#[test]
fn biases_of_a_model_with_them_are_read() {
    let mut config = small_config();
    config["mlp_bias"] = json!(true);
    let mut model = packed_up();
    model.push(given(format!("{NAME}.bias"), Dtype::F32, &[64], 0.5f32.to_le_bytes().repeat(64)));
    let dir = folder(&config, &[("model.safetensors", &weights_file(&model))]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let linear = of(&checkpoint, UP, &settings(json!({}))).unwrap().unwrap();
    assert_eq!(linear.bias.unwrap()[63], f16::from_f32(0.5));
}

#[test]
fn sizes_that_cannot_be_packed() {
    let mut config = small_config();
    config["intermediate_size"] = json!(60);
    assert_eq!(parse(&config).unwrap().layers[0].linears[UP].shape, [60, 32]);
    let dir = folder(&config, &[("model.safetensors", &weights_file(&packed_up()))]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_error(
        of(&checkpoint, UP, &settings(json!({}))),
        dir.path(),
        "PackFactor",
        "`model.layers.0.mlp.up_proj`: out_features 60 is not a multiple of 8, which 4-bit packing needs",
    );
}
