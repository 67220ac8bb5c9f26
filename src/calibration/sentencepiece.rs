//! Tokenizers of models that have only SentencePiece's `tokenizer.model`, built from the parts of `tokenizers`.
//!
//! The file is a `ModelProto` of SentencePiece's `sentencepiece_model.proto`. Ids are those of SentencePiece and of transformers'
//! `LlamaTokenizer`: every text between special tokens gets a space in front. With `"legacy": false` in `tokenizer_config.json`
//! only the front of the whole text gets one, unless a space or a special token is there already.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use prost::Message;
use serde_json::Value;
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, NormalizerWrapper,
    decoders::{self, byte_fallback::ByteFallback, fuse::Fuse, strip::Strip},
    models::{
        bpe::{BPE, Vocab},
        unigram::Unigram,
    },
    normalizers::{self, Precompiled, Prepend, Replace, replace::ReplacePattern},
    pre_tokenizers::metaspace::{Metaspace, PrependScheme},
    processors::template::TemplateProcessing,
};

use crate::{
    chat,
    error::{Error, Result},
    folder,
    json::{Fields, read_json},
};

/// Replacement of a space.
const SPACE: &str = "▁";

/// Bytes of the longest piece. Trained models stay far below; the time to derive merges grows with the square.
const LONGEST_PIECE: usize = 1024;

/// Classes of `tokenizer_config.json`, without a final `Fast`, that take ids and pieces as the file has them.
const CLASSES: [&str; 5] =
    ["LlamaTokenizer", "LLaMATokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "InternLM3Tokenizer"];

#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, required, tag = "2")]
    trainer: Trainer,
    #[prost(message, required, tag = "3")]
    normalizer: Normalizer,
}

#[derive(Clone, PartialEq, Message)]
struct Piece {
    #[prost(string, required, tag = "1")]
    text: String,
    #[prost(float, required, tag = "2")]
    score: f32,
    #[prost(int32, required, tag = "3", default = "1")]
    kind: i32,
}

// Kinds of pieces.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

#[derive(Clone, PartialEq, Message)]
struct Trainer {
    #[prost(int32, required, tag = "3", default = "1")]
    model_type: i32,
    #[prost(bool, required, tag = "24")]
    treat_whitespace_as_suffix: bool,
    #[prost(bool, required, tag = "35")]
    byte_fallback: bool,
    #[prost(int32, required, tag = "40", default = "0")]
    unk_id: i32,
    #[prost(int32, required, tag = "41", default = "1")]
    bos_id: i32,
    #[prost(int32, required, tag = "42", default = "2")]
    eos_id: i32,
}

// Types of models.
const UNIGRAM: i32 = 1;
const BPE_MODEL: i32 = 2;

#[derive(Clone, PartialEq, Message)]
struct Normalizer {
    #[prost(bytes = "vec", required, tag = "2")]
    precompiled_charsmap: Vec<u8>,
    #[prost(bool, required, tag = "3", default = "true")]
    add_dummy_prefix: bool,
    #[prost(bool, required, tag = "4", default = "true")]
    remove_extra_whitespaces: bool,
    #[prost(bool, required, tag = "5", default = "true")]
    escape_whitespaces: bool,
}

/// Settings of the tokenizer in the JSON files of a folder.
#[derive(Debug, Default)]
struct Settings {
    bos: Option<String>,
    eos: Option<String>,
    /// Whether every text has BOS before it, and EOS after it.
    add: [bool; 2],
    legacy: bool,
    add_prefix_space: bool,
    /// Tokens by id, as `tokenizer_config.json` and `added_tokens.json` name them.
    added: BTreeMap<u32, AddedToken>,
}

impl Settings {
    fn read(dir: &Path) -> Result<Self> {
        let (path, config) = chat::tokenizer_config(dir)?;
        let json = |source| Error::Json { path: path.clone(), source };
        let config = if config.is_null() { Value::Object(Default::default()) } else { config };
        let fields = Fields::new(&path, "", &config)?;
        if let Some(class) = fields.text("tokenizer_class")?
            && !CLASSES.contains(&class.trim_end_matches("Fast"))
        {
            let expected = format!("one of {} with `tokenizer.model` alone", CLASSES.join(", "));
            return Err(fields.error("tokenizer_class", expected, class));
        }
        let mut added = BTreeMap::new();
        let more = folder::file_in(dir, "added_tokens.json")?;
        if more.exists() {
            let ids: BTreeMap<String, u32> = serde_json::from_value(read_json(&more)?)
                .map_err(|source| Error::Json { path: more, source })?;
            added.extend(ids.into_iter().map(|(content, id)| (id, AddedToken::from(content, true))));
        }
        if let Some(tokens) = fields.get("added_tokens_decoder") {
            let tokens: BTreeMap<u32, AddedToken> = serde_json::from_value(tokens.clone()).map_err(json)?;
            added.extend(tokens);
        }
        let named = |key| Some(chat::special_token(&config, key)).filter(|token| !token.is_empty());
        Ok(Self {
            bos: named("bos_token").map(str::to_owned),
            eos: named("eos_token").map(str::to_owned),
            add: [
                fields.boolean("add_bos_token")?.unwrap_or(true),
                fields.boolean("add_eos_token")?.unwrap_or(false),
            ],
            legacy: fields.boolean("legacy")?.unwrap_or(true),
            add_prefix_space: fields.boolean("add_prefix_space")?.unwrap_or(true),
            added,
        })
    }
}

/// The tokenizer in the file `path` of the folder `dir`, with the settings of the folder's JSON files.
///
/// # Errors
/// If a file cannot be read, is not of its format, or needs a feature that is not supported.
pub(super) fn read(dir: &Path, path: &Path) -> Result<tokenizers::Tokenizer> {
    let settings = Settings::read(dir)?;
    let bytes = folder::read(path, folder::TEXT_LIMIT)?;
    build(&bytes, settings)
        .map_err(|problem| Error::TokenizerModel { path: path.into(), problem: problem.to_string() })
}

/// Score of each piece of the file `tokenizer.model` in `dir`, and whether it is the unknown token; `None` without such a file.
/// SentencePiece joins pieces by falling score, which `tokenizer.json` does not hold.
///
/// # Errors
/// When the file cannot be read or is not of its format.
pub fn sentencepiece_scores(dir: &Path) -> Result<Option<HashMap<String, (f32, bool)>>> {
    let path = folder::file_in(dir, "tokenizer.model")?;
    if !path.exists() {
        return Ok(None);
    }
    let model = ModelProto::decode(&folder::read(&path, folder::TEXT_LIMIT)?[..]);
    let model = model.map_err(|error| Error::TokenizerModel {
        path,
        problem: format!("it is not a SentencePiece model: {error}"),
    })?;
    let pieces = model.pieces.into_iter().map(|piece| (piece.text, (piece.score, piece.kind == UNKNOWN)));
    Ok(Some(pieces.collect()))
}

fn build(bytes: &[u8], settings: Settings) -> tokenizers::Result<tokenizers::Tokenizer> {
    let broken = |error| format!("it is not a SentencePiece model: {error}");
    let ModelProto { pieces, trainer, normalizer } = ModelProto::decode(bytes).map_err(broken)?;
    check(&pieces, &trainer, &normalizer)?;
    let prefix = normalizer.add_dummy_prefix && settings.add_prefix_space;
    // Where runs of spaces become one, a space at the front is never there already.
    let at_front_only = !settings.legacy && !normalizer.remove_extra_whitespaces;

    let mut tokenizer = tokenizers::Tokenizer::new(model(&pieces, &trainer)?);
    let mut steps: Vec<NormalizerWrapper> = Vec::new();
    if !normalizer.precompiled_charsmap.is_empty() {
        let charsmap = Precompiled::from(&normalizer.precompiled_charsmap)
            .map_err(|error| format!("its map of characters cannot be read: {error}"))?;
        steps.push(charsmap.into());
    }
    if normalizer.remove_extra_whitespaces {
        let extra = format!("\\A +|[ {SPACE}]+\\z| +(?= )");
        steps.push(Replace::new(ReplacePattern::Regex(extra), "")?.into());
    }
    steps.push(Replace::new(" ", SPACE)?.into());
    if prefix && at_front_only {
        // It puts the space in front alone; the text stays one piece.
        tokenizer.with_pre_tokenizer(Some(Metaspace::new('▁', PrependScheme::First, false)));
    } else if prefix {
        steps.push(Prepend::new(SPACE.into()).into());
    }
    tokenizer.with_normalizer(Some(normalizers::Sequence::new(steps)))?;
    let mut steps: Vec<DecoderWrapper> =
        vec![Replace::new(SPACE, " ")?.into(), ByteFallback::default().into(), Fuse::default().into()];
    if prefix {
        steps.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(decoders::sequence::Sequence::new(steps)));

    let mut added: BTreeMap<u32, AddedToken> = BTreeMap::new();
    for (id, piece) in (0..).zip(&pieces) {
        if [UNKNOWN, CONTROL, USER_DEFINED].contains(&piece.kind) {
            let token = AddedToken::from(piece.text.clone(), piece.kind != USER_DEFINED);
            // A normalized token would get the prefix too, and be found behind a space alone.
            added.insert(id, token.normalized(piece.kind == USER_DEFINED && !prefix));
        }
    }
    for (id, token) in settings.added {
        let normalized = added.get(&id).is_some_and(|piece| piece.normalized);
        added.insert(id, token.normalized(normalized));
    }
    tokenizer.add_tokens(added.values().cloned())?;
    for (id, AddedToken { content, .. }) in &added {
        let found = tokenizer.token_to_id(content);
        if found != Some(*id) {
            let found = found.map_or_else(|| "nothing".into(), |id| id.to_string());
            return Err(format!("token `{content}` should have id {id}, and has {found}").into());
        }
    }

    let mut template = vec!["$A".to_owned()];
    let mut special = Vec::new();
    let names = [(settings.bos, trainer.bos_id), (settings.eos, trainer.eos_id)];
    for (at_end, (name, id)) in [false, true].into_iter().zip(names) {
        let own = || usize::try_from(id).ok().and_then(|id| Some(pieces.get(id)?.text.clone()));
        let Some(token) = name.or_else(own).filter(|_| settings.add[usize::from(at_end)]) else { continue };
        let id = tokenizer.token_to_id(&token).ok_or_else(|| format!("it has no token `{token}`"))?;
        template.insert(if at_end { template.len() } else { 0 }, token.clone());
        special.push((token, id));
    }
    let template = TemplateProcessing::builder().try_single(template)?.special_tokens(special).build()?;
    tokenizer.with_post_processor(Some(template));
    Ok(tokenizer)
}

/// Refuses what `tokenizers` cannot do as SentencePiece does it.
fn check(pieces: &[Piece], trainer: &Trainer, normalizer: &Normalizer) -> Result<(), String> {
    let unsupported = |what: &str| Err(format!("it is a SentencePiece model {what}, which is not supported"));
    match trainer.model_type {
        UNIGRAM | BPE_MODEL => {}
        3 => return unsupported("of type `word`"),
        4 => return unsupported("of type `char`"),
        other => return unsupported(&format!("of the unknown type {other}")),
    }
    if trainer.treat_whitespace_as_suffix {
        return unsupported("with `treat_whitespace_as_suffix`");
    }
    if !normalizer.escape_whitespaces {
        return unsupported("without `escape_whitespaces`");
    }
    if pieces.is_empty() {
        return Err("it is not a SentencePiece model: it has no pieces".into());
    }
    let mut ids = HashMap::new();
    for (id, piece) in pieces.iter().enumerate() {
        if piece.kind == UNUSED {
            return unsupported(&format!("with unused pieces (`{}`)", piece.text));
        }
        if !(1..=LONGEST_PIECE).contains(&piece.text.len()) {
            let length = piece.text.len();
            return Err(format!("piece {id} should have 1 to {LONGEST_PIECE} bytes, and has {length}"));
        }
        if let Some(first) = ids.insert(&piece.text, id) {
            return Err(format!("piece `{}` is there twice: {first} and {id}", piece.text));
        }
    }
    Ok(())
}

fn model(pieces: &[Piece], trainer: &Trainer) -> tokenizers::Result<ModelWrapper> {
    let unknown = usize::try_from(trainer.unk_id).ok().filter(|&id| id < pieces.len());
    let unknown = unknown.ok_or_else(|| {
        format!("its unknown token {} is not one of its {} pieces", trainer.unk_id, pieces.len())
    })?;
    if trainer.model_type == UNIGRAM {
        let scores = pieces.iter().map(|piece| (piece.text.clone(), f64::from(piece.score))).collect();
        return Ok(Unigram::from(scores, Some(unknown), trainer.byte_fallback)?.into());
    }
    let vocab: Vocab = pieces.iter().zip(0..).map(|(piece, id)| (piece.text.clone(), id)).collect();
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges(pieces))
        .unk_token(pieces[unknown].text.clone())
        .fuse_unk(true)
        .byte_fallback(trainer.byte_fallback)
        .build()?;
    Ok(model.into())
}

/// All pairs of pieces whose union is a piece, by falling score of the union. SentencePiece joins neighbours in this order, and has
/// no list of pairs.
fn merges(pieces: &[Piece]) -> Vec<(String, String)> {
    let joinable = |piece: &&Piece| [NORMAL, USER_DEFINED].contains(&piece.kind);
    let ids: HashMap<&str, usize> = (pieces.iter().enumerate())
        .filter(|(_, piece)| joinable(piece))
        .map(|(id, piece)| (piece.text.as_str(), id))
        .collect();
    let mut merges = Vec::new();
    for piece in pieces.iter().filter(joinable) {
        for (at, _) in piece.text.char_indices().skip(1) {
            let (left, right) = piece.text.split_at(at);
            if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                merges.push((piece.score, [*l, *r], (left.to_owned(), right.to_owned())));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    merges.into_iter().map(|(.., pair)| pair).collect()
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use serde_json::json;

    use super::*;
    use crate::calibration::Tokenizer;

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/sentencepiece").join(name)
    }

    /// The tokenizer of the golden model `name` in a folder with other files too.
    fn open(name: &str, files: &[(&str, Value)]) -> Result<Tokenizer, String> {
        let folder = tempfile::tempdir().unwrap();
        fs::copy(golden(name).join("tokenizer.model"), folder.path().join("tokenizer.model")).unwrap();
        for (file, content) in files {
            fs::write(folder.path().join(file), content.to_string()).unwrap();
        }
        Tokenizer::open(folder.path())
            .map_err(|error| error.to_string().replace(&format!("{}/", folder.path().display()), ""))
    }

    #[track_caller]
    fn check_ids(tokenizer: &Tokenizer, golden_key: &str) {
        let all: Value = serde_json::from_slice(&fs::read(golden("ids.json")).unwrap()).unwrap();
        let texts: Vec<(String, Vec<u32>)> = serde_json::from_value(all[golden_key].clone()).unwrap();
        for (text, ids) in texts {
            assert_eq!(tokenizer.encode_rendered(&text).unwrap(), ids, "{text:?}");
            assert_eq!(tokenizer.encode(&text).unwrap(), [&[1], &ids[..]].concat(), "{text:?}");
        }
    }

    #[test]
    fn ids_are_those_of_sentencepiece() {
        check_ids(&open("bpe", &[]).unwrap(), "bpe");
        check_ids(&open("unigram", &[]).unwrap(), "unigram");
        let legacy =
            json!({"tokenizer_class": "LlamaTokenizer", "legacy": false, "bos_token": {"content": "<s>"}});
        check_ids(&open("bpe", &[("tokenizer_config.json", legacy)]).unwrap(), "bpe, legacy false");
    }

    #[test]
    fn text_comes_back() {
        let tokenizer = open("bpe", &[]).unwrap();
        for text in ["  leading spaces", "café 😀\n\n日本語 x ", "1 2"] {
            assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text);
        }
    }

    #[test]
    fn settings_of_the_folder_count() {
        let both = json!({"add_bos_token": false, "add_eos_token": true, "eos_token": "", "add_prefix_space": false});
        let tokenizer = open("bpe", &[("tokenizer_config.json", both)]).unwrap();
        let ids = tokenizer.encode("Hello").unwrap();
        assert_eq!((ids.last(), tokenizer.decode(&ids).unwrap().as_str()), (Some(&2), "Hello"));
        assert_ne!(&ids[..ids.len() - 1], &open("bpe", &[]).unwrap().encode("Hello").unwrap()[1..]);

        let token = |content: &str| json!({"content": content, "lstrip": false, "rstrip": false, "normalized": true, "single_word": false, "special": true});
        let files = |id: &str| {
            [
                ("added_tokens.json", json!({"[PAD]": 600})),
                (
                    "tokenizer_config.json",
                    json!({"added_tokens_decoder": {"1": token("<s>"), id: token("<|x|>")}}),
                ),
            ]
        };
        assert_eq!(open("bpe", &files("601")).unwrap().encode("<|x|>[PAD]").unwrap(), [1, 601, 600]);
        assert_eq!(
            open("bpe", &files("700")).unwrap_err(),
            "`tokenizer.model` cannot be used, and there is no `tokenizer.json`: token `<|x|>` should have id 700, and has 601"
        );
        assert_eq!(
            open("bpe", &[("tokenizer_config.json", json!({"bos_token": "<bos>"}))]).unwrap_err(),
            "`tokenizer.model` cannot be used, and there is no `tokenizer.json`: it has no token `<bos>`"
        );
        let other = json!({"tokenizer_class": "XLMRobertaTokenizer"});
        let error = open("bpe", &[("tokenizer_config.json", other)]).unwrap_err();
        assert!(error.contains("`tokenizer_class`") && error.contains("XLMRobertaTokenizer"), "{error}");
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let bytes = fs::read(golden("bpe").join("tokenizer.model")).unwrap();
        let good = ModelProto::decode(&bytes[..]).unwrap();
        let problem = |change: fn(&mut ModelProto)| {
            let mut model = good.clone();
            change(&mut model);
            build(&model.encode_to_vec(), Settings { legacy: true, ..Settings::default() })
                .unwrap_err()
                .to_string()
        };
        let of_type = "it is a SentencePiece model of type `word`, which is not supported";
        assert_eq!(problem(|model| model.trainer.model_type = 3), of_type);
        assert_eq!(problem(|model| model.trainer.model_type = 4), of_type.replace("word", "char"));
        assert_eq!(
            problem(|model| model.normalizer.escape_whitespaces = false),
            "it is a SentencePiece model without `escape_whitespaces`, which is not supported"
        );
        assert_eq!(
            problem(|model| model.pieces[300].kind = UNUSED),
            format!(
                "it is a SentencePiece model with unused pieces (`{}`), which is not supported",
                good.pieces[300].text
            )
        );
        assert_eq!(
            problem(|model| model.pieces[5].text = "<s>".into()),
            "piece `<s>` is there twice: 1 and 5"
        );
        assert_eq!(
            problem(|model| model.pieces[5].text.clear()),
            "piece 5 should have 1 to 1024 bytes, and has 0"
        );
        assert_eq!(
            problem(|model| model.trainer.unk_id = 900),
            "its unknown token 900 is not one of its 600 pieces"
        );
        let error = build(b"{\"model\": 1}", Settings::default()).unwrap_err().to_string();
        assert!(error.starts_with("it is not a SentencePiece model: "), "{error}");
    }
}
