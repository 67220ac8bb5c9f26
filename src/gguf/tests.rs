//! The container: what is written is read again, and each kind of bad file is an error that names what is wrong.

use std::path::Path;

use super::*;
use crate::{error::Error, ggml::BlockType, units::hex};
use sha2::{Digest, Sha256};

/// A file, part by part.
#[derive(Clone)]
struct Raw {
    version: u32,
    tensors: Vec<RawTensor>,
    counts: Option<(u64, u64)>,
    entries: Vec<Vec<u8>>,
    data: usize,
}

#[derive(Clone)]
struct RawTensor {
    name: &'static str,
    /// Innermost first, as in files.
    shape: Vec<u64>,
    kind: u32,
    offset: u64,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(key)[..], &kind.to_le_bytes(), value].concat()
}

/// Two tensors of 32 fp32 numbers and one block of Q4_0.
fn raw() -> Raw {
    let tensor = |name, kind, offset| RawTensor { name, shape: vec![32], kind, offset };
    Raw {
        version: 3,
        tensors: vec![tensor("a", 0, 0), tensor("b", 0, 128), tensor("c", 2, 256)],
        counts: None,
        entries: vec![entry("general.architecture", 8, &text("llama")), entry("x", 4, &7u32.to_le_bytes())],
        data: 256 + 18,
    }
}

impl Raw {
    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        let (tensors, keys) = self.counts.unwrap_or((self.tensors.len() as u64, self.entries.len() as u64));
        out.extend(tensors.to_le_bytes());
        out.extend(keys.to_le_bytes());
        self.entries.iter().for_each(|entry| out.extend(entry));
        for tensor in &self.tensors {
            out.extend(text(tensor.name));
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().for_each(|size| out.extend(size.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(32) + self.data, 1);
        out
    }
}

fn parse(bytes: &[u8]) -> Result<Header, String> {
    Header::parse(Path::new("x.gguf"), bytes).map_err(|error| error.to_string())
}

/// The problem that the error names.
#[track_caller]
fn refused(change: impl FnOnce(&mut Raw)) -> String {
    let mut raw = raw();
    change(&mut raw);
    let error = parse(&raw.bytes()).unwrap_err();
    let start = "`x.gguf` cannot be read as a GGUF file: ";
    error.strip_prefix(start).unwrap_or_else(|| panic!("{error}")).to_owned()
}

#[test]
fn a_good_file_is_read() {
    let bytes = raw().bytes();
    let header = parse(&bytes).unwrap();
    assert_eq!(header.metadata.text("general.architecture"), Some("llama"));
    assert_eq!(header.metadata.get("x"), Some(&MetadataValue::U32(7)));
    let found: Vec<_> =
        header.tensors.iter().map(|t| (t.name.as_str(), t.kind, t.range.start - header.data_start)).collect();
    let expected = [("a", BlockType::F32, 0), ("b", BlockType::F32, 128), ("c", BlockType::Q4_0, 256)];
    assert_eq!(found, expected);
    assert_eq!(header.tensor("c").unwrap().range.end, bytes.len());
    // The version before has the same layout.
    assert_eq!(parse(&Raw { version: 2, ..raw() }.bytes()).unwrap(), header);
}

#[test]
fn a_file_that_is_cut_short_is_refused_at_every_length() {
    let bytes = raw().bytes();
    for length in 0..bytes.len() {
        let error = parse(&bytes[..length]).unwrap_err();
        assert!(error.contains("cut short") || error.contains("follow"), "{length}: {error}");
        let path = "x.gguf".into();
        let hint = Error::Gguf { path, problem: error.clone() }.hint();
        assert!(hint.is_some() || error.contains("follow"), "{error}");
    }
    assert_eq!(
        parse(&bytes[..bytes.len() - 1]).unwrap_err(),
        "`x.gguf` cannot be read as a GGUF file: tensor `c` takes 18 bytes from byte 256 of the data, and the file holds 273 \
         bytes of data; the file is cut short"
    );
}

#[test]
fn other_formats_versions_and_byte_orders_are_named() {
    let starting = |start: &[u8]| {
        let mut bytes = raw().bytes();
        bytes[..start.len()].copy_from_slice(start);
        parse(&bytes).unwrap_err()
    };
    assert!(starting(b"PK\x03\x04").ends_with("it begins with `PK\\x03\\x04`, expected `GGUF`"));
    assert!(starting(b"GGUF\x01\0\0\0").ends_with("it is of version 1, of 2023; versions 2 and 3 are read"));
    assert!(starting(b"GGUF\x09\0\0\0").ends_with("it is of version 9; versions 2 and 3 are read"));
    assert!(starting(b"GGUF\0\0\0\x03").contains("big-endian"));
}

#[test]
fn counts_and_lengths_that_lie_are_refused_before_memory_is_taken() {
    let huge = 1u64 << 63;
    assert!(
        refused(|raw| raw.counts = Some((huge, 2))).starts_with(&format!("it says it has {huge} tensors"))
    );
    assert!(
        refused(|raw| raw.counts = Some((3, huge)))
            .starts_with("it says it has 9223372036854775808 metadata keys")
    );
    assert!(refused(|raw| raw.counts = Some((4, 2))).starts_with("the name of tensor 3 has "));
    let key_of = |length: u64| move |raw: &mut Raw| raw.entries[0] = length.to_le_bytes().to_vec();
    assert!(refused(key_of(huge)).contains("metadata key 0 has 9223372036854775808 bytes"));
    assert!(refused(key_of(60_000)).contains("metadata key 0 takes 60000 bytes"));
    let value = |kind: u32, bytes: Vec<u8>| move |raw: &mut Raw| raw.entries[1] = entry("x", kind, &bytes);
    assert!(
        refused(value(8, huge.to_le_bytes().to_vec()))
            .contains("the value of `x` takes 9223372036854775808 bytes")
    );
    let array = |kind: u32, count: u64| [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
    assert!(refused(value(9, array(6, huge))).contains("the value of `x` takes 18446744073709551615 bytes"));
    assert!(refused(value(9, array(8, huge))).contains("key `x`: it says it has 9223372036854775808 texts"));
    assert!(refused(value(9, array(9, 1))).contains("its elements are of a type that is not read"));
    assert!(refused(value(13, vec![])).contains("its value is of type 13, which does not exist"));
    assert!(refused(value(7, vec![2])).contains("expected a flag of 0 or 1, found 2"));
    let twice = |raw: &mut Raw| raw.entries[1] = entry("general.architecture", 0, &[1]);
    assert_eq!(refused(twice), "key `general.architecture` is there twice");
    let alignment =
        |size: u32| move |raw: &mut Raw| raw.entries[1] = entry("general.alignment", 4, &size.to_le_bytes());
    for size in [0, 3, 1 << 31] {
        assert!(refused(alignment(size)).contains("expected a power of two up to 1048576, found U32("));
    }
}

#[test]
fn tensors_that_contradict_the_file_are_named() {
    let tensor = |change: fn(&mut RawTensor)| move |raw: &mut Raw| change(&mut raw.tensors[1]);
    assert_eq!(
        refused(tensor(|t| t.offset = 64)),
        "tensor `b` starts at 64 and overlaps tensor `a`, which ends at 128 with its padding"
    );
    assert!(refused(tensor(|t| t.offset = 160)).contains("leaves a hole after tensor `a`"));
    assert!(refused(tensor(|t| t.offset = u64::MAX)).contains("starts at 18446744073709551615"));
    assert!(refused(|raw| raw.tensors[0].offset = 32).contains("leaves a hole after the start of the data"));
    assert!(
        refused(tensor(|t| t.shape = vec![1 << 63, 2]))
            .contains("`b`: shape [2, 9223372036854775808] is beyond")
    );
    assert!(refused(tensor(|t| t.shape = vec![1 << 62])).contains("of F32 is beyond any file"));
    assert!(refused(tensor(|t| t.shape = vec![1 << 40])).contains("takes 4398046511104 bytes from byte 128"));
    assert!(refused(tensor(|t| t.shape = vec![32, 0])).contains("has no elements"));
    assert!(refused(tensor(|t| t.shape = vec![1; 5])).contains("`b` has 5 axes"));
    assert_eq!(
        refused(|raw| raw.tensors[2].shape = vec![48]),
        "tensor `c`: rows of 48 elements are no whole blocks of Q4_0, which have 32"
    );
    assert!(
        refused(tensor(|t| t.kind = 23))
            .starts_with("tensor `b` is of type 23 (IQ4_XS); types that are read: F32, F16")
    );
    assert!(
        refused(tensor(|t| t.kind = 77)).starts_with("tensor `b` is of type 77, which is none of ggml's")
    );
    assert_eq!(refused(tensor(|t| t.name = "a")), "tensor `a` is there twice");
}

fn written() -> (GgufPlan, Vec<(&'static str, Vec<u8>)>) {
    let mut metadata = Metadata::default();
    metadata.set("general.architecture", MetadataValue::String("llama".into()));
    metadata.set("tokens", MetadataValue::strings(["a", "▁the", ""]));
    metadata.set("scores", MetadataValue::floats(&[0.5, -1.0]));
    metadata.set("types", MetadataValue::integers(&[1, -3]));
    metadata.set("flag", MetadataValue::Bool(true));
    let tensor =
        |name: &str, kind, shape: &[usize]| GgufTensor { name: name.into(), kind, shape: shape.into() };
    let tensors = vec![
        tensor("odd", BlockType::F16, &[3]),
        tensor("blocks", BlockType::Q8_0, &[2, 32]),
        tensor("last", BlockType::F32, &[1]),
    ];
    let data = vec![("odd", vec![1; 6]), ("blocks", vec![2; 68]), ("last", vec![3; 4])];
    (GgufPlan::new(metadata, tensors).unwrap(), data)
}

#[test]
fn what_is_written_is_read_again_with_its_digests() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let (plan, data) = written();
    let total = plan.total_bytes();
    let mut writer = GgufWriter::create(&path, plan.clone()).unwrap();
    // In any order.
    data.iter().rev().for_each(|(name, bytes)| writer.write(name, bytes).unwrap());
    assert!(!path.exists());
    writer.finish().unwrap();

    let bytes = std::fs::read(&path).unwrap();
    assert_eq!((bytes.len() as u64, bytes.len() % 32), (total, 0));
    let header = Header::parse(&path, &bytes).unwrap();
    assert_eq!(header.metadata.get("tokens").unwrap().texts().unwrap(), ["a", "▁the", ""]);
    assert_eq!(header.metadata.get("scores"), Some(&MetadataValue::floats(&[0.5, -1.0])));
    assert_eq!(header.tensor("blocks").unwrap().shape, [2, 32]);
    let digests = header.metadata.get(TENSOR_SHA256).unwrap().texts().unwrap();
    for ((name, data), digest) in data.iter().zip(digests) {
        assert_eq!(bytes[header.tensor(name).unwrap().range.clone()], *data);
        assert_eq!(digest, hex(&Sha256::digest(data)));
    }
    let stored = header.metadata.text(HEADER_SHA256).unwrap();
    assert_eq!(header_digest(&bytes[..header.data_start], stored), stored);
    let mut damaged = bytes[..header.data_start].to_vec();
    damaged[header.data_start / 2] ^= 1;
    assert_ne!(header_digest(&damaged, stored), stored);

    // The name is taken now, and nothing else is in the folder.
    let error = GgufWriter::create(&path, plan).unwrap_err().to_string();
    assert!(error.ends_with("m.gguf` exists already"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_file_appears_only_when_all_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let (plan, data) = written();
    let mut writer = GgufWriter::create(&path, plan).unwrap();
    let error = |result: crate::Result<()>| result.unwrap_err().to_string();
    assert_eq!(error(writer.write("x", &[])), "cannot write tensor `x`: it is not among the 3 planned");
    assert_eq!(error(writer.write("odd", &[0])), "cannot write tensor `odd`: 6 bytes are planned, 1 given");
    writer.write("odd", &data[0].1).unwrap();
    assert_eq!(error(writer.write("odd", &data[0].1)), "cannot write tensor `odd`: it is written already");
    assert_eq!(error(writer.finish()), "cannot write tensor `blocks`: it never came");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let tensors = vec![GgufTensor { name: "x".into(), kind: BlockType::Q8_0, shape: vec![2, 16] }];
    let error = GgufPlan::new(Metadata::default(), tensors).unwrap_err().to_string();
    assert_eq!(error, "cannot write tensor `x`: shape [2, 16] is no whole number of blocks of Q8_0");
}

#[test]
fn a_model_is_described_by_its_metadata() {
    let header = |change: &dyn Fn(&mut Metadata)| {
        let mut metadata = Metadata::default();
        metadata.set("general.architecture", MetadataValue::String("llama".into()));
        for (key, size) in [
            ("block_count", 2),
            ("embedding_length", 64),
            ("feed_forward_length", 96),
            ("context_length", 128),
        ] {
            metadata.set(format!("llama.{key}"), MetadataValue::U32(size));
        }
        metadata.set("llama.attention.head_count", MetadataValue::U32(4));
        metadata.set("llama.attention.layer_norm_rms_epsilon", MetadataValue::F32(1e-5));
        change(&mut metadata);
        let embedding = TensorInfo {
            name: names::TOKEN_EMBEDDING.into(),
            kind: BlockType::F32,
            shape: vec![100, 64],
            range: 0..0,
        };
        Header { metadata, tensors: vec![embedding], data_start: 0 }
    };
    let config = |change: &dyn Fn(&mut Metadata)| {
        model_config(Path::new("x.gguf"), &header(change), &[]).map_err(|error| error.to_string())
    };
    let plain = config(&|_| ()).unwrap();
    assert_eq!(plain["architectures"], serde_json::json!(["LlamaForCausalLM"]));
    let numbers = ["vocab_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta"];
    assert_eq!(numbers.map(|key| plain[key].as_f64().unwrap()), [100.0, 4.0, 16.0, 1e-5, 10_000.0]);
    assert_eq!((&plain["tie_word_embeddings"], plain.get("rope_scaling")), (&true.into(), None));

    let set =
        |key: &'static str, value: MetadataValue| config(&move |metadata| metadata.set(key, value.clone()));
    let text = |text: &str| MetadataValue::String(text.into());
    let yarn = config(&|metadata| {
        metadata.set("llama.rope.scaling.type", text("yarn"));
        metadata.set("llama.rope.scaling.factor", MetadataValue::F32(4.0));
        metadata.set("llama.rope.scaling.original_context_length", MetadataValue::U32(64));
    });
    let expected =
        serde_json::json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64});
    assert_eq!(yarn.unwrap()["rope_scaling"], expected);
    for (key, value, problem) in [
        (
            "general.architecture",
            text("mamba"),
            "holds architecture `mamba`, which is not supported (supported: llama, qwen2, qwen3)",
        ),
        (
            "llama.block_count",
            text("two"),
            "key `llama.block_count`: expected an integer that is not negative, found `two`",
        ),
        (
            "llama.expert_count",
            MetadataValue::U32(8),
            "key `llama.expert_count`: expected 0: experts are not read, found 8",
        ),
        ("split.count", MetadataValue::U16(3), "join the parts with `llama-gguf-split --merge`"),
        (
            "llama.rope.scaling.type",
            text("longrope"),
            "expected `none`, `linear` or `yarn` with a factor, found `longrope`",
        ),
        (
            "llama.rope.dimension_count",
            MetadataValue::U32(8),
            "expected 16: all features of a head are rotated, found 8",
        ),
    ] {
        let error = set(key, value).unwrap_err();
        assert!(error.contains(problem), "{error}");
    }
}
