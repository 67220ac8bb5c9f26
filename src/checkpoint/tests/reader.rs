use serde_json::json;

use super::{
    super::{Checkpoint, Dtype},
    Given, assert_error, dense_model, f16_bytes, folder, given, raw_file, small_config, weights_file,
};

/// Opens a folder whose `model.safetensors` is `file` and expects this problem.
#[track_caller]
fn broken(file: &[u8], problem: &str) {
    let dir = folder(&small_config(), &[("model.safetensors", file)]);
    let message = format!("`DIR/model.safetensors` is not a whole safetensors file: {problem}");
    assert_error(Checkpoint::open(dir.path()), dir.path(), "Safetensors", &message);
}

/// Checks the small model after `change`; expects this error.
#[track_caller]
fn unfit(change: impl FnOnce(&mut Vec<Given>), variant: &'static str, message: &str) {
    let mut model = dense_model(&small_config());
    change(&mut model);
    let dir = folder(&small_config(), &[("model.safetensors", &weights_file(&model))]);
    assert_error(Checkpoint::open(dir.path()).unwrap().check(), dir.path(), variant, message);
}

fn position(model: &[Given], name: &str) -> usize {
    model.iter().position(|tensor| tensor.name == name).unwrap()
}

#[test]
fn opens_a_model_in_one_file() {
    let model = dense_model(&small_config());
    let dir = folder(&small_config(), &[("model.safetensors", &weights_file(&model))]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    checkpoint.check().unwrap();
    assert_eq!(checkpoint.names().count(), model.len());
    assert!(checkpoint.names().is_sorted());
    assert_eq!(checkpoint.bytes_total(), model.iter().map(|t| t.bytes.len() as u64).sum::<u64>());
    for tensor in &model {
        let view = checkpoint.view(&tensor.name).unwrap();
        assert_eq!((view.dtype, view.shape, view.bytes), (Dtype::F16, &tensor.shape[..], &tensor.bytes[..]));
    }
    assert!(checkpoint.extra().is_empty());
}

#[test]
fn opens_a_file_of_another_name_when_it_is_the_only_one() {
    let file = weights_file(&dense_model(&small_config()));
    let dir = folder(&small_config(), &[("gptq_model-4bit-128g.safetensors", &file)]);
    Checkpoint::open(dir.path()).unwrap().check().unwrap();
    std::fs::write(dir.path().join("other.safetensors"), &file).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    let hint = error.hint().unwrap();
    assert!(hint.starts_with("name one of them in `quantize_config.json` of `"), "{hint}");
    assert_error::<Checkpoint>(
        Err(error),
        dir.path(),
        "SeveralWeights",
        "`DIR` has several weights files: `gptq_model-4bit-128g.safetensors`, `other.safetensors`",
    );
    // `model_file_base_name` decides, in the older config or in the newer one.
    std::fs::write(dir.path().join("other.safetensors"), weights_file(&[])).unwrap();
    let names = ["other", "gptq_model-4bit-128g"];
    for (name, tensors) in names.into_iter().zip([0, dense_model(&small_config()).len()]) {
        let old = json!({"model_file_base_name": name}).to_string();
        std::fs::write(dir.path().join("quantize_config.json"), old).unwrap();
        assert_eq!(Checkpoint::open(dir.path()).unwrap().names().count(), tensors);
    }
    std::fs::remove_file(dir.path().join("quantize_config.json")).unwrap();
    let mut config = small_config();
    config["quantization_config"] = json!({"model_file_base_name": "other"});
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().names().count(), 0);
}

#[test]
fn folders_without_weights() {
    let dir = folder(&small_config(), &[]);
    assert_error(
        Checkpoint::open(dir.path()),
        dir.path(),
        "NotACheckpoint",
        "`DIR` is not a checkpoint folder: it has no weights (`model.safetensors` or any other safetensors file, such as \
         `gptq_model-4bit-128g.safetensors`; an index of shards; `pytorch_model.bin`)",
    );
    let dir = folder(&small_config(), &[("tf_model.h5", b"x"), ("training_args.bin", b"x")]);
    assert_error(
        Checkpoint::open(dir.path()),
        dir.path(),
        "WeightsFormat",
        "`DIR` has only `tf_model.h5`; expected safetensors or `pytorch_model.bin`",
    );
}

#[test]
fn headers_that_cannot_be_read() {
    broken(b"", "it has 0 bytes, and the header's length alone takes 8");
    broken(b"1234567", "it has 7 bytes, and the header's length alone takes 8");
    broken(
        &[&u64::MAX.to_le_bytes()[..], b"{}"].concat(),
        "it says its header has 18446744073709551615 bytes; at most 100000000 are allowed",
    );
    broken(
        &[&1000u64.to_le_bytes()[..], b"{}"].concat(),
        "it says its header has 1000 bytes, and only 2 follow; the file is cut short",
    );
    broken(&raw_file(b"{\"a\xFF\":{}}", b""), "its header is not UTF-8 from byte 3 on");
    broken(
        &raw_file(b"{\"a\":", b""),
        "its header is not the JSON expected: EOF while parsing a value at line 1 column 5",
    );
    broken(
        &raw_file(br#"{"a":{"dtype":"F17","shape":[1],"data_offsets":[0,2]}}"#, b"ab"),
        "its header is not the JSON expected: unknown variant `F17`, expected one of `BOOL`, `F4`, `F6_E2M3`, \
         `F6_E3M2`, `U8`, `I8`, `F8_E5M2`, `F8_E4M3`, `F8_E8M0`, `F8_E4M3FNUZ`, `F8_E5M2FNUZ`, `I16`, `U16`, \
         `F16`, `BF16`, `I32`, `U32`, `F32`, `C64`, `F64`, `I64`, `U64` at line 1 column 54",
    );
}

#[test]
fn headers_that_lie() {
    let header =
        |entries: serde_json::Value, data: usize| raw_file(entries.to_string().as_bytes(), &vec![0; data]);
    let f16 = |shape: &[usize], start: usize, end: usize| json!({"dtype": "F16", "shape": shape, "data_offsets": [start, end]});
    broken(
        &header(json!({"a": f16(&[2, 3], 0, 10)}), 10),
        "tensor `a`: shape [2, 3] of F16 takes 12 bytes, and its offsets 0..10 hold 10",
    );
    broken(
        &header(json!({"a": f16(&[2, 3], 0, 12)}), 7),
        "tensor `a` ends at byte 12 of the data, and the file holds 7; the file is cut short",
    );
    broken(
        &header(json!({"a": f16(&[4], 0, 8), "b": f16(&[4], 4, 12)}), 12),
        "tensor `b` starts at 4 and overlaps tensor `a`, which ends at 8",
    );
    broken(
        &header(json!({"a": f16(&[4], 0, 8), "b": f16(&[4], 16, 24)}), 24),
        "tensor `b` starts at 16 and leaves a hole after tensor `a`, which ends at 8",
    );
    broken(&header(json!({"a": f16(&[1], 4, 2)}), 4), "tensor `a` ends at 2, before its start 4");
    broken(
        &header(json!({"a": f16(&[usize::MAX, 2], 0, 4)}), 4),
        "tensor `a`: shape [18446744073709551615, 2] of F16 is beyond any file",
    );
    broken(
        &header(json!({"a": f16(&[4], 0, 8)}), 12),
        "its header describes 8 bytes of data, and the file holds 12",
    );
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let whole = weights_file(&dense_model(&small_config()));
    for length in (0..whole.len()).step_by(97) {
        let dir = folder(&small_config(), &[("model.safetensors", &whole[..length])]);
        assert!(Checkpoint::open(dir.path()).is_err(), "{length} of {} bytes", whole.len());
    }
}

#[test]
fn every_tensor_is_checked_before_any_work() {
    unfit(
        |model| drop(model.remove(position(model, "model.layers.0.mlp.up_proj.weight"))),
        "MissingTensor",
        "tensor `model.layers.0.mlp.up_proj.weight` is missing from `DIR`",
    );
    unfit(
        |model| drop(model.remove(position(model, "lm_head.weight"))),
        "MissingTensor",
        "tensor `lm_head.weight` is missing from `DIR`",
    );
    unfit(
        |model| {
            let at = position(model, "model.layers.0.mlp.down_proj.weight");
            model[at].shape.reverse();
        },
        "TensorShape",
        "tensor `model.layers.0.mlp.down_proj.weight`: expected shape [32, 64], found [64, 32]",
    );
    unfit(
        |model| {
            let at = position(model, "model.norm.weight");
            model[at] = given("model.norm.weight", Dtype::F64, &[32], vec![0; 256]);
        },
        "TensorDtype",
        "tensor `model.norm.weight`: expected dtype F16, BF16 or F32, found F64",
    );
    unfit(
        |model| model.push(given("model.layers.0.self_attn.q_proj.qweight", Dtype::I32, &[1], vec![0; 4])),
        "CheckpointKind",
        "`DIR`: expected an unquantized fp16, bf16 or fp32 model, found a quantized one \
         (tensor `model.layers.0.self_attn.q_proj.qweight`)",
    );
}

#[test]
fn a_quantized_config_is_not_dense() {
    let mut config = small_config();
    config["quantization_config"] = json!({"quant_method": "awq"});
    let dir = folder(&config, &[("model.safetensors", &weights_file(&dense_model(&config)))]);
    assert_error(
        Checkpoint::open(dir.path()).unwrap().check(),
        dir.path(),
        "CheckpointKind",
        "`DIR`: expected an unquantized fp16, bf16 or fp32 model, found a quantized one \
         (quant_method `awq` in `config.json`)",
    );
}

#[test]
fn biases_that_the_config_asks_for_are_needed() {
    let mut config = small_config();
    config["attention_bias"] = json!(true);
    let dir = folder(&config, &[("model.safetensors", &weights_file(&dense_model(&config)))]);
    assert_error(
        Checkpoint::open(dir.path()).unwrap().check(),
        dir.path(),
        "MissingTensor",
        "tensor `model.layers.0.self_attn.q_proj.bias` is missing from `DIR`",
    );
}

#[test]
fn a_tied_output_layer_is_the_embedding_if_it_is_stored() {
    let mut config = small_config();
    let mut model = dense_model(&config);
    config["tie_word_embeddings"] = json!(true);
    let check = |model: &[Given]| {
        let dir = folder(&config, &[("model.safetensors", &weights_file(model))]);
        (Checkpoint::open(dir.path()).unwrap().check(), dir)
    };
    let head = position(&model, "lm_head.weight");
    model[head].bytes = model[position(&model, "model.embed_tokens.weight")].bytes.clone();
    check(&model).0.unwrap();
    model[head].bytes[0] ^= 1;
    let (result, dir) = check(&model);
    assert_error(
        result,
        dir.path(),
        "Config",
        "`DIR/config.json`: key `tie_word_embeddings`: expected false, as `lm_head.weight` is stored and is not \
         the embedding, found true",
    );
    model.remove(head);
    check(&model).0.unwrap();
}

#[test]
fn tensors_nobody_asked_for_are_listed() {
    let mut model = dense_model(&small_config());
    for name in
        ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.7.mlp.up_proj.weight", "value_head"]
    {
        model.push(given(name, Dtype::F16, &[2], f16_bytes(2)));
    }
    let dir = folder(&small_config(), &[("model.safetensors", &weights_file(&model))]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    checkpoint.check().unwrap();
    assert_eq!(checkpoint.extra(), ["model.layers.7.mlp.up_proj.weight", "value_head"]);
}

/// Resident bytes of the map of one file, from the kernel's own account.
#[cfg(target_os = "linux")]
fn resident(file: &std::path::Path) -> u64 {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let after = maps.split_once(file.to_str().unwrap()).unwrap().1;
    let line = after.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[cfg(target_os = "linux")]
#[test]
fn released_tensors_leave_memory_and_come_back() {
    /// Pages at the ends may be shared with neighbours, and the kernel maps a few around each fault.
    const SLACK: u64 = 256 << 10;
    let mut config = small_config();
    config["hidden_size"] = json!(1024);
    config["intermediate_size"] = json!(2048);
    config["num_hidden_layers"] = json!(3);
    let dir = folder(&config, &[("model.safetensors", &weights_file(&dense_model(&config)))]);
    let file = dir.path().canonicalize().unwrap().join("model.safetensors");
    let checkpoint = Checkpoint::open(&dir.path().canonicalize().unwrap()).unwrap();
    let names: Vec<_> = checkpoint.names().map(str::to_owned).collect();
    let (mut first, mut last) = (0, 0);
    for layer in 0..3 {
        let mut layer_bytes = 0;
        for name in names.iter().filter(|name| name.starts_with(&format!("model.layers.{layer}."))) {
            layer_bytes += checkpoint.bytes_f16(name).unwrap().len() as u64;
        }
        let read = resident(&file);
        checkpoint.release_layer(layer);
        last = resident(&file);
        first = if layer == 0 { last } else { first };
        assert!(read >= layer_bytes, "{read} resident of {layer_bytes} read");
        assert!(last + layer_bytes <= read + SLACK, "{read} before, {last} after");
    }
    assert!(last <= first + SLACK, "resident memory grew from {first} to {last}");
    let name = "model.layers.0.mlp.up_proj.weight";
    assert_eq!(checkpoint.view(name).unwrap().bytes, f16_bytes(2048 * 1024));
    checkpoint.release([name, "no such tensor"]);
    assert!(resident(&file) <= last + SLACK);
}
