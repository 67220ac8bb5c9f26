use serde_json::{Value, json};
use tempfile::TempDir;

use super::{
    super::{Checkpoint, INDEX_FILE},
    Given, assert_error, dense_model, folder, small_config, weights_file,
};

const FIRST: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";

/// The small model in two shards, the first with 3 tensors.
fn halves() -> (Vec<Given>, Vec<Given>) {
    let mut first = dense_model(&small_config());
    let second = first.split_off(3);
    (first, second)
}

fn sharded(first: &[Given], second: &[Given], change: impl FnOnce(&mut Value)) -> TempDir {
    let mut map = serde_json::Map::new();
    for (shard, tensors) in [(FIRST, first), (SECOND, second)] {
        map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), json!(shard))));
    }
    let mut index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    change(&mut index);
    let index = index.to_string();
    let files =
        [(INDEX_FILE, index.into_bytes()), (FIRST, weights_file(first)), (SECOND, weights_file(second))];
    folder(&small_config(), &files.each_ref().map(|(name, bytes)| (*name, &bytes[..])))
}

#[test]
fn opens_shards() {
    let (first, second) = halves();
    let dir = sharded(&first, &second, |_| {});
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    checkpoint.check().unwrap();
    assert_eq!(checkpoint.view("model.embed_tokens.weight").unwrap().bytes, first[0].bytes);
    assert_eq!(checkpoint.view(&second[0].name).unwrap().bytes, second[0].bytes);
}

#[test]
fn opens_shards_under_the_names_of_autogptq() {
    let (first, second) = halves();
    let dir = sharded(&first, &second, |index| {
        for shard in index["weight_map"].as_object_mut().unwrap().values_mut() {
            *shard = json!(shard.as_str().unwrap().replace("model-", "gptq_model-4bit-32g-"));
        }
    });
    for name in [INDEX_FILE, FIRST, SECOND] {
        let new = name.replacen("model", "gptq_model-4bit-32g", 1);
        std::fs::rename(dir.path().join(name), dir.path().join(new)).unwrap();
    }
    Checkpoint::open(dir.path()).unwrap().check().unwrap();
}

#[test]
fn a_shard_that_is_not_there() {
    let (first, second) = halves();
    let dir = sharded(&first, &second, |_| {});
    std::fs::remove_file(dir.path().join(SECOND)).unwrap();
    assert_error(
        Checkpoint::open(dir.path()),
        dir.path(),
        "Index",
        "`DIR/model.safetensors.index.json` says tensor `lm_head.weight` is in \
         `model-00002-of-00002.safetensors`, but there is no such file",
    );
}

#[test]
fn a_shard_cut_short() {
    let (first, second) = halves();
    let dir = sharded(&first, &second, |_| {});
    let whole = weights_file(&second);
    std::fs::write(dir.path().join(SECOND), &whole[..whole.len() - 1]).unwrap();
    assert_error(
        Checkpoint::open(dir.path()),
        dir.path(),
        "Safetensors",
        "`DIR/model-00002-of-00002.safetensors` is not a whole safetensors file: \
         tensor `model.layers.0.mlp.down_proj.weight` ends at byte 21056 of the data, \
         and the file holds 21055; the file is cut short",
    );
}

#[test]
fn an_index_that_points_nowhere() {
    let (first, second) = halves();
    let index_error = |change: fn(&mut Value), message: &str| {
        let dir = sharded(&first, &second, change);
        let message = format!("`DIR/model.safetensors.index.json` says tensor {message}");
        assert_error(Checkpoint::open(dir.path()), dir.path(), "Index", &message);
    };
    index_error(
        |index| index["weight_map"]["model.embed_tokens.weight"] = json!(SECOND),
        "`model.embed_tokens.weight` is in `model-00002-of-00002.safetensors`, but that file does not hold it",
    );
    for outside in ["../model.safetensors", "/etc/passwd", "..", "", "a\\b"] {
        let dir = sharded(&first, &second, |index| index["weight_map"]["ghost"] = json!(outside));
        assert_error(
            Checkpoint::open(dir.path()),
            dir.path(),
            "Index",
            &format!(
                "`DIR/model.safetensors.index.json` says tensor `ghost` is in `{outside}`, \
                 but that is not a plain file name"
            ),
        );
    }
}

#[test]
fn a_tensor_that_the_index_lists_in_vain_is_an_error_only_if_it_is_needed() {
    let (first, mut second) = halves();
    let dir = sharded(&first, &second, |index| index["weight_map"]["ghost"] = json!(FIRST));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    checkpoint.check().unwrap();
    let expected = "`model.safetensors.index.json` lists tensors that no shard holds (1): `ghost`; the model does not need them";
    assert_eq!(checkpoint.absent().as_deref(), Some(expected));

    let lost = second.remove(0);
    let dir = sharded(&first, &second, |index| index["weight_map"][&lost.name] = json!(SECOND));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.absent(), None);
    let message = format!(
        "`DIR/model.safetensors.index.json` says tensor `{}` is in `{SECOND}`, but that file does not hold it",
        lost.name
    );
    assert_error(checkpoint.check(), dir.path(), "Index", &message);
}

#[test]
fn an_index_of_another_form() {
    let (first, second) = halves();
    let config_error = |change: fn(&mut Value), message: &str| {
        let dir = sharded(&first, &second, change);
        let message = format!("`DIR/model.safetensors.index.json`: key `weight_map{message}");
        assert_error(Checkpoint::open(dir.path()), dir.path(), "Config", &message);
    };
    config_error(
        |index| drop(index.as_object_mut().unwrap().remove("weight_map")),
        "`: expected an object, found null",
    );
    config_error(
        |index| index["weight_map"]["lm_head.weight"] = json!(2),
        ".lm_head.weight`: expected the name of a shard, found 2",
    );
}

#[test]
fn a_tensor_in_two_shards() {
    let (first, mut second) = halves();
    second.push(first[0].clone());
    let dir = sharded(&first, &second, |_| {});
    assert_error(
        Checkpoint::open(dir.path()),
        dir.path(),
        "Safetensors",
        "`DIR/model-00002-of-00002.safetensors` is not a whole safetensors file: \
         tensor `model.embed_tokens.weight` is also in `DIR/model-00001-of-00002.safetensors`",
    );
}
