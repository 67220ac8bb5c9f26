use std::fs;

use safetensors::SafeTensors;
use serde_json::Value;

use super::{
    super::{Dtype, ShardPlan, ShardWriter, TensorSpec, write_file_atomically},
    assert_error,
};
use crate::error::Error;

fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> TensorSpec {
    TensorSpec { name: name.into(), dtype, shape: shape.into() }
}

/// 12 bytes of F16, 8 of I32.
fn small() -> Vec<TensorSpec> {
    vec![spec("a", Dtype::F16, &[2, 3]), spec("b", Dtype::I32, &[2])]
}

#[test]
fn a_small_file_byte_by_byte() {
    let dir = tempfile::tempdir().unwrap();
    let plan = ShardPlan::new(small(), u64::MAX).unwrap();
    let total = plan.total_bytes();
    let mut writer = ShardWriter::create(dir.path(), plan).unwrap();
    writer.write("b", &[9; 8]).unwrap();
    writer.write("a", &[7; 12]).unwrap();
    let written = writer.finish().unwrap();

    let header = concat!(
        r#"{"__metadata__":{"format":"pt"},"#,
        r#""a":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},"#,
        r#""b":{"dtype":"I32","shape":[2],"data_offsets":[12,20]}}"#,
    );
    let mut expected = vec![144, 0, 0, 0, 0, 0, 0, 0];
    expected.extend(header.as_bytes());
    expected.resize(8 + 144, b' ');
    expected.extend([7; 12]);
    expected.extend([9; 8]);
    let bytes = fs::read(dir.path().join("model.safetensors")).unwrap();
    assert_eq!(bytes, expected);

    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!((file.len(), file.tensor("a").unwrap().data()), (2, &[7; 12][..]));
    assert_eq!(total, bytes.len() as u64);
    assert_eq!(written.files, [("model.safetensors".to_owned(), total)]);
    // sha256sum of eight bytes 0x09.
    assert_eq!(
        written.tensor_sha256["b"],
        "a01bd6d7c4521a8132395250da445216e0ceacc3d8abd937a11d6d9383f2576e"
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "one file and no index");
}

#[test]
fn shards_and_their_index() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = vec![
        spec("a", Dtype::F16, &[4]),
        spec("large", Dtype::F16, &[10]),
        spec("c", Dtype::I32, &[1]),
        spec("b", Dtype::I32, &[1]),
        spec("d", Dtype::F16, &[1]),
    ];
    let plan = ShardPlan::new(tensors, 8).unwrap();
    assert_eq!(plan.tensor_bytes(), 8 + 20 + 4 + 4 + 2);
    assert_eq!(
        plan.files().collect::<Vec<_>>(),
        [1, 2, 3, 4].map(|i| format!("model-0000{i}-of-00004.safetensors"))
    );
    let mut writer = ShardWriter::create(dir.path(), plan).unwrap();
    for (name, bytes) in [("d", 2), ("c", 4), ("large", 20), ("a", 8), ("b", 4)] {
        writer.write(name, &vec![name.as_bytes()[0]; bytes]).unwrap();
    }
    let written = writer.finish().unwrap();
    let index = fs::read_to_string(dir.path().join("model.safetensors.index.json")).unwrap();
    assert_eq!(
        index,
        r#"{
  "metadata": {
    "total_size": 38
  },
  "weight_map": {
    "a": "model-00001-of-00004.safetensors",
    "b": "model-00003-of-00004.safetensors",
    "c": "model-00003-of-00004.safetensors",
    "d": "model-00004-of-00004.safetensors",
    "large": "model-00002-of-00004.safetensors"
  }
}
"#
    );
    assert_eq!(written.files.len(), 5);
    for (name, size) in &written.files {
        let bytes = fs::read(dir.path().join(name)).unwrap();
        assert_eq!(bytes.len() as u64, *size);
        if name.ends_with(".safetensors") {
            let file = SafeTensors::deserialize(&bytes).unwrap();
            assert!(file.iter().all(|(name, view)| view.data().iter().all(|&b| b == name.as_bytes()[0])));
        }
    }
    let parsed: Value = serde_json::from_str(&index).unwrap();
    assert_eq!(parsed["metadata"]["total_size"], 38);
}

#[test]
fn integers_are_aligned() {
    let odd = spec("odd", Dtype::F16, &[3]);
    let tensors = vec![odd, spec("i", Dtype::I32, &[1]), spec("even", Dtype::F16, &[2])];
    let dir = tempfile::tempdir().unwrap();
    let mut writer = ShardWriter::create(dir.path(), ShardPlan::new(tensors, u64::MAX).unwrap()).unwrap();
    for (name, bytes) in [("odd", 6), ("i", 4), ("even", 4)] {
        writer.write(name, &vec![0; bytes]).unwrap();
    }
    writer.finish().unwrap();
    let bytes = fs::read(dir.path().join("model.safetensors")).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    assert!(header.is_multiple_of(8));
    assert_eq!(metadata.offset_keys(), ["i", "even", "odd"]);
}

#[test]
fn tensors_otherwise_than_planned() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = ShardWriter::create(dir.path(), ShardPlan::new(small(), u64::MAX).unwrap()).unwrap();
    let refused = |result, message: &str| assert_error(result, dir.path(), "TensorWrite", message);
    refused(writer.write("x", &[]), "cannot write tensor `x`: it is not among the 2 planned");
    refused(writer.write("a", &[0; 13]), "cannot write tensor `a`: 12 bytes are planned, 13 given");
    writer.write("a", &[0; 12]).unwrap();
    refused(writer.write("a", &[0; 12]), "cannot write tensor `a`: it is written already");
    let message = "cannot write tensor `b`: it never came; 1 of 2 tensors did";
    assert_error(writer.finish(), dir.path(), "TensorWrite", message);
}

#[test]
fn plans_that_cannot_be() {
    let twice = vec![spec("a", Dtype::F16, &[4]), spec("a", Dtype::F16, &[4])];
    for (size, files) in [(u64::MAX, "1 and 1"), (8, "1 and 2")] {
        let message = format!("cannot write tensor `a`: it is planned twice, in files {files}");
        assert_error(ShardPlan::new(twice.clone(), size), "no folder".as_ref(), "TensorWrite", &message);
    }
    let vast = vec![spec("a", Dtype::F16, &[usize::MAX, 2])];
    let message = "cannot write tensor `a`: shape [18446744073709551615, 2] is beyond any file";
    assert_error(ShardPlan::new(vast, 8), "no folder".as_ref(), "TensorWrite", message);
}

#[test]
fn nothing_is_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("model-00002-of-00002.safetensors"), "precious").unwrap();
    assert_error(
        ShardWriter::create(dir.path(), ShardPlan::new(small(), 12).unwrap()),
        dir.path(),
        "Io",
        "cannot create `DIR/model-00002-of-00002.safetensors`: File exists (os error 17)",
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the first shard is removed again");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named() {
    let path = std::path::Path::new("/dev/full");
    let mut full = fs::OpenOptions::new().write(true).open(path).unwrap();
    let error = super::super::writer::write_at(&mut full, path, 0, b"data").unwrap_err();
    assert!(matches!(&error, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull));
    assert!(error.hint().unwrap().contains("the disk is full"));
}

#[test]
fn files_are_replaced_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.json");
    write_file_atomically(&path, b"one").unwrap();
    write_file_atomically(&path, b"two").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"two");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let plain = dir.path().join("plain");
        fs::write(&plain, "x").unwrap();
        let mode = |path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&path), mode(&plain), "as readable as any new file");
    }
    let absent = dir.path().join("absent/report.json");
    assert!(matches!(write_file_atomically(&absent, b"x"), Err(Error::Io { action: "create", .. })));
}
