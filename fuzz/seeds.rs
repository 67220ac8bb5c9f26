//! Writes the inputs that each fuzz target begins with: `fuzz/corpus/TARGET/`.

mod bodies;

use std::{fs, path::Path, sync::Arc};

use parquet::{
    basic::Compression,
    data_type::{ByteArray, ByteArrayType},
    file::{properties::WriterProperties, writer::SerializedFileWriter},
    schema::parser::parse_message_type,
};

fn main() {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("fuzz is in the project");
    let write = |target: &str, name: &str, bytes: &[u8]| {
        let folder = project.join("fuzz/corpus").join(target);
        fs::create_dir_all(&folder).and_then(|()| fs::write(folder.join(name), bytes)).expect("a seed is written");
    };
    let read = |path: &Path| fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));

    let (branch, sharded) = (bodies::branch(), bodies::sharded());
    for (name, bytes) in branch.iter().chain(&sharded) {
        let target = match *name {
            "config.json" => "config",
            "quantize_config.json" => "quantize_config",
            "model.safetensors.index.json" => "safetensors_index",
            name if name.ends_with(".safetensors") => "safetensors_header",
            _ => continue,
        };
        write(target, name, bytes);
    }
    for (sharding, files) in [(0u8, &branch), (0x80, &sharded)] {
        for (i, (name, bytes)) in files.iter().enumerate() {
            let input = |how: u8, rest: &[u8]| [&[sharding | i as u8, how], rest].concat();
            write("verify", &format!("{sharding}-whole-{name}"), &input(0, bytes));
            write("verify", &format!("{sharding}-part-{name}"), &input(1, &[&[9, 0, 0, 0], &bytes[9..40]].concat()));
        }
    }

    write("gguf", "model", &bodies::gguf_file());

    let golden = project.join("tests/golden");
    let pytorch = read(&golden.join("pytorch/pytorch_model.bin"));
    write("pytorch", "file", &[&[0], &pytorch[..]].concat());
    let mut archive = zip::ZipArchive::new(std::io::Cursor::new(&pytorch)).expect("a zip file");
    let name = archive.file_names().flatten().find(|name| name.ends_with("data.pkl")).expect("a pickle").into_owned();
    let mut pickle = vec![1];
    std::io::copy(&mut archive.by_name(&name).expect("it is there"), &mut pickle).expect("it is read");
    write("pytorch", "pickle", &pickle);
    for model in ["bpe", "unigram"] {
        let model_file = read(&golden.join("sentencepiece").join(model).join("tokenizer.model"));
        write("tokenizer", model, &[&[0], &model_file[..]].concat());
    }
    let small = r#"{"version": "1.0", "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "_"}, {"type": "Replace", "pattern": {"String": " "}, "content": "_"}]},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "decoder": {"type": "ByteFallback"}, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "o+"}, "behavior": "Isolated", "invert": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<s>", "fuse_unk": true, "byte_fallback": true,
            "vocab": {"<s>": 0, "_": 1, "t": 2, "h": 3, "e": 4, "th": 5, "the": 6}, "merges": ["t h", "th e"]}}"#;
    write("tokenizer", "json", &[&[1], small.as_bytes()].concat());
    write("tokenizer", "json-long", &[&[3], small.as_bytes()].concat());

    let models = project.join("tests/golden/models");
    for model in fs::read_dir(models).expect("golden models").flatten().map(|entry| entry.path()) {
        let name = model.file_name().expect("a folder").to_string_lossy().into_owned();
        if model.is_dir() {
            write("config", &name, &read(&model.join("config.json")));
        }
    }
    for recipe in fs::read_dir(project.join("calibration")).expect("recipes").flatten().map(|entry| entry.path()) {
        if recipe.extension().is_some_and(|extension| extension == "toml") {
            write("plan", &recipe.file_name().expect("a file").to_string_lossy(), &read(&recipe));
        }
    }
    let plan = "dataset = \"x.jsonl\"\nsplit = \"a\"\ntext-column = \"t\"\nsamples = 3\nseq-len = 16\nseed = 1\n\
                variants = [\"4bit-128g\", \"3bit--1g-act-asym\", \"8bit-64g-static\"]\ndamp = 0.01\n\
                shared-hessian = true\ncompute-dtype = \"bf16\"\ndevice = \"cpu\"\nmax-shard-size = 5000000000\n\
                max-memory = 1000\non-failure = \"rtn\"\n";
    write("plan", "plan", plan.as_bytes());

    for (i, text) in ["{\"text\": \"a \\u00e9\"}\n\n{\"text\": null}\n{\"n\": [1, {}], \"text\": \"\"}\r\n", "[1]", "{\n",
        r#"[{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}, {"messages": null}]"#,
        r#"{"messages": [{"role": "user", "content": "Hi"}]}"#, r#"[{"text": "a"}, {"text": "b"}]"#]
        .iter()
        .enumerate()
    {
        for kind in [0u8, 2, 3] {
            write("jsonl", &format!("{kind}-{i}"), &[&[kind], text.as_bytes()].concat());
        }
    }
    // gzip of `{"text": "a"}`, stored.
    let stored = b"{\"text\": \"a\"}\n";
    let mut gzip = vec![1, 0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0, 3, 1];
    gzip.extend((stored.len() as u16).to_le_bytes().into_iter().chain((!(stored.len() as u16)).to_le_bytes()));
    gzip.extend(stored);
    write("jsonl", "gzip", &gzip);
    // The same in a frame of zstd with one raw block.
    let size = stored.len() as u8;
    let zstd = [&[4, 0x28, 0xB5, 0x2F, 0xFD, 0x20, size, size << 3 | 1, 0, 0][..], stored].concat();
    write("jsonl", "zstd", &zstd);
    for (name, base) in [("base-name", "other"), ("base-name-outside", "../other")] {
        let config = format!(r#"{{"bits": 4, "group_size": 16, "desc_act": true, "model_file_base_name": "{base}"}}"#);
        write("quantize_config", name, config.as_bytes());
    }

    for (name, compression) in
        [("plain", Compression::UNCOMPRESSED), ("snappy", Compression::SNAPPY), ("lz4", Compression::LZ4_RAW)]
    {
        for dictionary in [false, true] {
            write("parquet", &format!("{name}-{dictionary}"), &parquet_file(compression, dictionary));
        }
    }
}

fn parquet_file(compression: Compression, dictionary: bool) -> Vec<u8> {
    let schema = "message m { optional binary text (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).expect("it is a schema"));
    let properties = WriterProperties::builder().set_dictionary_enabled(dictionary).set_compression(compression).build();
    let mut bytes = Vec::new();
    let mut file = SerializedFileWriter::new(&mut bytes, schema, Arc::new(properties)).expect("a writer");
    for _ in 0..2 {
        let mut group = file.next_row_group().expect("a row group");
        let mut column = group.next_column().expect("a column").expect("the text");
        let rows = ["one", "two", "one", "a longer row of text"].map(|row| ByteArray::from(row.as_bytes().to_vec()));
        column.typed::<ByteArrayType>().write_batch(&rows, Some(&[1, 1, 0, 1, 1]), None).expect("rows");
        column.close().expect("written");
        group.close().expect("written");
    }
    file.close().expect("written");
    bytes
}
