//! What each fuzz target does with its input. Nothing here looks at results: an error is as good as a success, and a panic, an
//! overflow, too much memory or too much time is a finding. `tests/it/fuzz_findings.rs` runs the same functions on every
//! input that was ever one.

#![allow(dead_code, reason = "each target uses one of them")]

use std::{
    cell::OnceCell,
    fs,
    io::{Cursor, Write},
    path::{Path, PathBuf},
};

use gptq::{
    calibration::{Corpus, CorpusSource, SourceOptions, Tokenizer, tokenizer_notes},
    chat::{ChatTemplate, Message},
    checkpoint::{Checkpoint, OPTIMUM_CONFIG_FILE, QuantizationConfig, packed},
    eval::describe,
    ggml::BlockType,
    gguf::{GgufPlan, GgufTensor, GgufWriter, Metadata, MetadataValue, names},
    plan::Plan,
    progress::Silent,
    verify,
};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

const CONFIG: &str = "config.json";
const QUANTIZE_CONFIG: &str = "quantize_config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const CHECKSUMS: &str = "checksums.json";
const GGUF: &str = "model.gguf";
const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

/// `data` as the weights of a branch.
pub(crate) fn safetensors_header(data: &[u8]) {
    read_with(branch(), WEIGHTS, data);
}

/// `data` as the index of a branch in two shards, under the usual name and under one of AutoGPTQ's.
pub(crate) fn safetensors_index(data: &[u8]) {
    read_with(sharded(), INDEX, data);
    let files = sharded().into_iter().filter(|(name, _)| *name != INDEX);
    read_with(files.collect(), "gptq_model-4bit-16g.safetensors.index.json", data);
}

/// `data` as the config of a branch, and as `generation_config.json`.
pub(crate) fn config(data: &[u8]) {
    read_with(branch(), CONFIG, data);
    with_folder(|folder| {
        branch().into_iter().for_each(|(name, bytes)| folder.write(name, &bytes));
        folder.write("generation_config.json", data);
        let checkpoint = Checkpoint::open(&folder.path()).expect("the branch is good");
        let _ = checkpoint.stop_token_ids(&folder.path());
    });
}

/// `data` as `quantize_config.json`, as optimum's config, and as `quantization_config` in the config.
pub(crate) fn quantize_config(data: &[u8]) {
    with_folder(|folder| {
        branch().into_iter().for_each(|(name, bytes)| folder.write(name, &bytes));
        let mut config = model_config();
        folder.write(CONFIG, config.to_string().as_bytes());
        folder.write(QUANTIZE_CONFIG, data);
        read_all(&folder.path());
        fs::remove_file(folder.path().join(QUANTIZE_CONFIG)).expect("it is ours");
        folder.write(OPTIMUM_CONFIG_FILE, data);
        read_all(&folder.path());
        let Ok(value) = serde_json::from_slice::<Value>(data) else { return };
        config["quantization_config"] = value;
        folder.write(CONFIG, config.to_string().as_bytes());
        read_all(&folder.path());
        // `model_file_base_name` chooses among several weights files.
        folder.write("other.safetensors", &file_of(&tensors()));
        fs::rename(folder.path().join(WEIGHTS), folder.path().join("some.safetensors")).expect("it is ours");
        read_all(&folder.path());
    });
}

/// `data` as a parquet file of text, and of messages.
pub(crate) fn parquet(data: &[u8]) {
    for column in ["text", "messages"] {
        let _ = Corpus::from_parquet_bytes("fuzz", data.to_vec(), column);
    }
}

/// `data` without its first byte as a file of text, whose kind that byte decides.
pub(crate) fn jsonl(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    let names = ["a.jsonl", "a.jsonl.gz", "a.json", "a.txt", "a.json.zst", "a.txt.gz"];
    let name = names[usize::from(*kind) % names.len()];
    with_folder(|folder| {
        folder.write(name, data);
        folder.write("chat_template.jinja", b"{% for m in messages %}{{ m.role + m.content }}{% endfor %}");
        let template = ChatTemplate::read(&folder.path()).unwrap();
        let path = folder.path().join(name);
        let source = CorpusSource::resolve(&path.to_string_lossy(), &SourceOptions::default());
        let _ = source.and_then(|source| source.load(template.as_ref()));
    });
}

/// `data` as a chat template, and as the file that may hold one.
pub(crate) fn chat_template(data: &[u8]) {
    with_folder(|folder| {
        for name in ["tokenizer_config.json", "chat_template.jinja"] {
            folder.write(name, data);
            let _ = tokenizer_notes(&folder.path());
            if let Ok(Some(template)) = ChatTemplate::read(&folder.path()) {
                let _ = template.render(&[Message::new("user", "Hi"), Message::new("assistant", "Ho")], true);
            }
        }
    });
}

/// `data` without its first byte as a tokenizer. That byte decides its format, and whether a text is so long that it is cut
/// into pieces.
pub(crate) fn tokenizer(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    with_folder(|folder| {
        folder.write(if kind & 1 == 0 { "tokenizer.model" } else { "tokenizer.json" }, data);
        let _ = tokenizer_notes(&folder.path());
        match Tokenizer::open(&folder.path()) {
            Ok(tokenizer) => {
                let text = "The old\n\n café 你好\n".repeat(if kind & 2 == 0 { 1 } else { 6000 });
                drop((tokenizer.special_tokens_of_texts(), tokenizer.encode(&text)))
            }
            Err(error) => drop((error.to_string(), error.hint())),
        }
    });
}

/// `data` without its first byte as weights in PyTorch's format: the whole file, or the pickle in it.
pub(crate) fn pytorch(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    let whole = if kind & 1 == 0 { data.to_vec() } else { pytorch_file(data) };
    with_folder(|folder| {
        folder.write(CONFIG, model_config().to_string().as_bytes());
        folder.write("pytorch_model.bin", &whole);
        read_all(&folder.path());
    });
}

/// A file in PyTorch's format with this pickle and a storage of 64 bytes.
fn pytorch_file(pickle: &[u8]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in [("archive/data.pkl", pickle), ("archive/data/0", &[0x3C; 64])] {
        zip.start_file(name, stored).and_then(|()| Ok(zip.write_all(bytes)?)).expect("memory takes it");
    }
    zip.finish().expect("memory takes it").into_inner()
}

/// `data` as a plan, and as a recipe.
pub(crate) fn plan(data: &[u8]) {
    with_folder(|folder| {
        folder.write("plan.toml", data);
        let path = folder.path().join("plan.toml");
        if let Ok(plan) = Plan::read(&path) {
            let _ = plan.check();
            let _: Vec<String> = plan.variants.iter().map(|variant| plan.branch(variant)).collect();
        }
        let roots = vec![folder.path()];
        let options = SourceOptions { roots, ..SourceOptions::default() };
        let _ = CorpusSource::resolve(&path.to_string_lossy(), &options).and_then(|source| source.load(None));
    });
}

/// A branch of which one file is changed: the first byte says which, the second how, the others what it becomes.
pub(crate) fn verify(data: &[u8]) {
    let [file, how, rest @ ..] = data else { return };
    with_folder(|folder| {
        let (mut files, whole) = (if file & 0x80 == 0 { branch() } else { sharded() }, how & 1 == 0);
        let count = files.len();
        let (_, bytes) = &mut files[usize::from(file & 0x7F) % count];
        match rest.split_first_chunk::<4>() {
            Some((at, new)) if !whole && !bytes.is_empty() => {
                let at = u32::from_le_bytes(*at) as usize % bytes.len();
                let end = bytes.len().min(at + new.len());
                bytes[at..end].copy_from_slice(&new[..end - at]);
            }
            _ => *bytes = rest.to_vec(),
        }
        files.into_iter().for_each(|(name, bytes)| folder.write(name, &bytes));
        if let Ok(verification) = verify::verify(&folder.path(), None, None, &Silent) {
            let _ = serde_json::to_string(&verification);
        }
    });
}

/// `data` as a GGUF file.
pub(crate) fn gguf(data: &[u8]) {
    with_folder(|folder| {
        folder.write(GGUF, data);
        let path = folder.path().join(GGUF);
        let _ = verify::verify(&path, None, None, &Silent);
        match Checkpoint::open(&path) {
            Ok(checkpoint) => {
                let _ = (checkpoint.bytes_total(), describe(&checkpoint));
                for name in checkpoint.names() {
                    let _ = (checkpoint.bytes_f16(name), checkpoint.rows(name, 0..1));
                }
            }
            Err(error) => drop((error.to_string(), error.hint())),
        }
    });
}

/// A branch's files, one of them replaced, through everything that reads them.
fn read_with(files: Vec<(&'static str, Vec<u8>)>, name: &str, data: &[u8]) {
    with_folder(|folder| {
        files.into_iter().for_each(|(name, bytes)| folder.write(name, &bytes));
        folder.write(name, data);
        read_all(&folder.path());
    });
}

/// Opens a folder and looks at everything in it, as a run, `inspect` and `verify` do.
fn read_all(dir: &Path) {
    let _ = verify::verify(dir, None, None, &Silent);
    let checkpoint = match Checkpoint::open(dir) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return drop((error.to_string(), error.hint())),
    };
    let _ = (checkpoint.check(), checkpoint.bytes_total(), checkpoint.extra().len());
    for name in checkpoint.names() {
        let _ = checkpoint.view(name).map(|view| view.bytes.iter().fold(0u8, |sum, byte| sum ^ byte));
        let _ = checkpoint.bytes_f16(name);
    }
    let _ = checkpoint.config().dense_tensors();
    match QuantizationConfig::read(&checkpoint) {
        Ok(quantization) => {
            let _ = verify::readers(checkpoint.config(), &quantization, &checkpoint);
            let _ = verify::tensor_parallel(checkpoint.config(), &quantization, &checkpoint);
            let _ = verify::notes(&checkpoint, &quantization);
            for (id, linear) in checkpoint.config().linears() {
                let _ = packed(&checkpoint, &id, linear, &quantization);
            }
        }
        Err(error) => drop((error.to_string(), error.hint())),
    }
}

/// A temporary folder whose files are written anew for each input.
struct Folder(TempDir);

impl Folder {
    fn path(&self) -> PathBuf {
        self.0.path().into()
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.0.path().join(name), bytes).expect("the temporary folder can be written to");
    }
}

/// Calls `work` with an empty folder that is this thread's own.
fn with_folder(work: impl FnOnce(&Folder)) {
    thread_local!(static FOLDER: OnceCell<Folder> = const { OnceCell::new() });
    FOLDER.with(|folder| {
        let folder =
            folder.get_or_init(|| Folder(TempDir::with_prefix("gptq-fuzz-").expect("a temporary folder")));
        for entry in fs::read_dir(folder.path()).expect("it is there").flatten() {
            fs::remove_file(entry.path()).expect("it is ours");
        }
        work(folder);
    });
}

const HIDDEN: usize = 32;
const VOCAB: usize = 16;
const GROUP: usize = 16;

fn model_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": VOCAB, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "torch_dtype": "float16", "rope_scaling": null
    })
}

fn quantization() -> Value {
    json!({
        "bits": 4, "group_size": GROUP, "damp_percent": 0.01, "desc_act": true, "sym": true, "true_sequential": true,
        "static_groups": false, "quant_method": "gptq", "checkpoint_format": "gptq", "meta": { "quantizer": ["x:1"] }
    })
}

type Tensors = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

fn tensors() -> Tensors {
    let one = |count: usize| [0x00, 0x3C].repeat(count);
    let words = |count: usize, word: u32| word.to_le_bytes().repeat(count);
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), Dtype::F16, vec![VOCAB, HIDDEN], one(VOCAB * HIDDEN)),
        ("model.norm.weight".to_owned(), Dtype::F16, vec![HIDDEN], one(HIDDEN)),
    ];
    let layer = "model.layers.0.";
    for name in ["input_layernorm", "post_attention_layernorm"] {
        tensors.push((format!("{layer}{name}.weight"), Dtype::F16, vec![HIDDEN], one(HIDDEN)));
    }
    let attention = ["q", "k", "v", "o"].map(|name| format!("{layer}self_attn.{name}_proj"));
    let mlp = ["gate", "up", "down"].map(|name| format!("{layer}mlp.{name}_proj"));
    let (words_per, groups) = (HIDDEN / 8, HIDDEN / GROUP);
    for linear in attention.into_iter().chain(mlp) {
        let g_idx = (0..HIDDEN as u32).flat_map(|k| (k % 2).to_le_bytes()).collect();
        tensors.extend([
            (
                format!("{linear}.qweight"),
                Dtype::I32,
                vec![words_per, HIDDEN],
                words(words_per * HIDDEN, 0x789A_BCDE),
            ),
            (
                format!("{linear}.qzeros"),
                Dtype::I32,
                vec![groups, words_per],
                words(groups * words_per, 0x7777_7777),
            ),
            (format!("{linear}.scales"), Dtype::F16, vec![groups, HIDDEN], one(groups * HIDDEN)),
            (format!("{linear}.g_idx"), Dtype::I32, vec![HIDDEN], g_idx),
        ]);
    }
    tensors
}

fn file_of(tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).expect("shapes are those of the bytes"))
    });
    safetensors::serialize(views, None).expect("they can be written")
}

/// The files of a good branch.
pub(crate) fn branch() -> Vec<(&'static str, Vec<u8>)> {
    let mut config = model_config();
    config["quantization_config"] = quantization();
    let sums = json!({ "algorithm": "sha256", "tensors": {}, "files": { CONFIG: "00" } });
    vec![
        (CONFIG, config.to_string().into_bytes()),
        (QUANTIZE_CONFIG, quantization().to_string().into_bytes()),
        (WEIGHTS, file_of(&tensors())),
        (CHECKSUMS, sums.to_string().into_bytes()),
    ]
}

/// A good GGUF file of one layer.
pub(crate) fn gguf_file() -> Vec<u8> {
    let mut metadata = Metadata::default();
    metadata.set("general.architecture", MetadataValue::String("llama".into()));
    metadata.set("general.alignment", MetadataValue::U32(32));
    for (key, size) in [
        ("block_count", 1),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", HIDDEN),
        ("context_length", 64),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 2),
        ("rope.dimension_count", HIDDEN / 2),
    ] {
        metadata.set(format!("llama.{key}"), MetadataValue::U32(size as u32));
    }
    metadata.set("llama.attention.layer_norm_rms_epsilon", MetadataValue::F32(1e-5));
    metadata.set("llama.rope.scaling.type", MetadataValue::String("none".into()));
    metadata.set("tokenizer.ggml.tokens", MetadataValue::strings(["a", "b"]));
    let mut tensors = vec![(names::ROPE_FREQS.to_owned(), BlockType::F32, vec![HIDDEN / 4])];
    for (name, dtype, shape, _) in tensors_of_dense() {
        let kind = match dtype {
            Dtype::F16 if shape.len() > 1 => BlockType::Q8_0,
            Dtype::F16 => BlockType::F32,
            _ => BlockType::Q4_0,
        };
        tensors.push((names::in_gguf(&name).expect("a tensor of Llama"), kind, shape));
    }
    let tensors = tensors.into_iter().map(|(name, kind, shape)| GgufTensor { name, kind, shape });
    let tensors: Vec<GgufTensor> = tensors.collect();
    let plan = GgufPlan::new(metadata, tensors.clone()).expect("whole blocks");
    let folder = TempDir::with_prefix("gptq-fuzz-").expect("a temporary folder");
    let path = folder.path().join(GGUF);
    let mut writer = GgufWriter::create(&path, plan).expect("the temporary folder can be written to");
    for tensor in &tensors {
        let bytes = vec![0x38; tensor.bytes().expect("whole blocks")];
        writer.write(&tensor.name, &bytes).expect("it is planned");
    }
    writer.finish().expect("all tensors are written");
    fs::read(path).expect("it is there")
}

/// The dense tensors of the branch, and a weight for each linear.
fn tensors_of_dense() -> Tensors {
    let all = tensors().into_iter();
    all.filter_map(|(name, dtype, shape, bytes)| match name.strip_suffix(".qweight") {
        Some(linear) => Some((format!("{linear}.weight"), dtype, vec![HIDDEN, HIDDEN], Vec::new())),
        None if name.ends_with(".weight") => Some((name, dtype, shape, bytes)),
        None => None,
    })
    .collect()
}

/// The same in two shards.
pub(crate) fn sharded() -> Vec<(&'static str, Vec<u8>)> {
    let tensors = tensors();
    let (first, second) = tensors.split_at(tensors.len() / 2);
    let place =
        |part: &Tensors, shard: &str| part.iter().map(|t| (t.0.clone(), shard.into())).collect::<Vec<_>>();
    let mut map = place(&first.to_vec(), SHARDS[0]);
    map.extend(place(&second.to_vec(), SHARDS[1]));
    let index =
        json!({ "metadata": {}, "weight_map": map.into_iter().collect::<serde_json::Map<String, Value>>() });
    let mut files = branch();
    files.retain(|(name, _)| *name != WEIGHTS);
    files.extend([
        (INDEX, index.to_string().into_bytes()),
        (SHARDS[0], file_of(first)),
        (SHARDS[1], file_of(second)),
    ]);
    files
}
