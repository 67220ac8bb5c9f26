//! The tokenizer as GGUF metadata: tokens, their types and scores or merges, special tokens, chat template.

use std::{collections::HashMap, path::Path};

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{
    architectures::CONFIG_FILE,
    calibration::{Tokenizer, sentencepiece_scores},
    chat::{self, ChatTemplate},
    error::{Error, Result},
    gguf::{Metadata, MetadataValue},
    units::hex,
};

/// Digests of the ids of [`PROBE`], and names of pre-tokenizers.
const PRE_TOKENIZERS: &str = include_str!("pre_tokenizers.txt");

/// The text by whose ids llama.cpp's converter distinguishes pre-tokenizers (`get_vocab_base_pre`).
const PROBE: &str = "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u{200d}🌫\u{fe0f} (multiple emojis concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL";

/// Types of tokens, as llama.cpp numbers them.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Score of tokens that no merge makes.
const NO_MERGE: f32 = -1e9;

/// Keys of special tokens, and their names in `tokenizer_config.json` and `config.json`.
const SPECIAL: [(&str, &str); 7] = [
    ("bos_token_id", "bos"),
    ("eos_token_id", "eos"),
    ("unknown_token_id", "unk"),
    // Spelled so in the format.
    ("seperator_token_id", "sep"),
    ("padding_token_id", "pad"),
    ("cls_token_id", "cls"),
    ("mask_token_id", "mask"),
];

/// Adds the tokenizer in the folder `dir` of a model with `vocab` embeddings; `config` is its `config.json`.
///
/// # Errors
/// When it cannot be read, or is of a kind that llama.cpp does not have.
pub(super) fn add(metadata: &mut Metadata, dir: &Path, config: &Value, vocab: usize) -> Result<()> {
    let tokenizer = Tokenizer::open(dir)?;
    let json = tokenizer.to_json()?;
    let problem = |problem: String| Error::Tokenizer { path: tokenizer.path().into(), problem };
    let model = &json["model"];
    if model["type"] != "BPE" {
        let found = model["type"].as_str().unwrap_or("unnamed");
        return Err(problem(format!(
            "its model is `{found}`, and files for llama.cpp are written of `BPE` alone"
        )));
    }
    let fallback = model["byte_fallback"] == true;
    let byte_level = json["pre_tokenizer"].to_string().contains(r#""type":"ByteLevel""#);
    if fallback == byte_level {
        let found = if fallback { "both" } else { "none" };
        return Err(problem(format!(
            "expected either byte fallback, as SentencePiece has it, or a byte-level pre-tokenizer, as GPT-2 has it; found {found}"
        )));
    }
    let vocabulary = Vocabulary::read(&json, vocab).map_err(problem)?;
    let mut set = |key: &str, value| metadata.set(format!("tokenizer.ggml.{key}"), value);
    if fallback {
        set("model", MetadataValue::String("llama".into()));
        set("pre", MetadataValue::String("default".into()));
        let own = sentencepiece_scores(dir)?;
        set("tokens", MetadataValue::strings(&vocabulary.tokens));
        set("scores", MetadataValue::floats(&vocabulary.scores(&json, own.as_ref())));
        set("token_type", MetadataValue::integers(&vocabulary.types(own.as_ref(), true)));
        if !has_prefix_space(&json) {
            set("add_space_prefix", MetadataValue::Bool(false));
        }
    } else {
        set("model", MetadataValue::String("gpt2".into()));
        set("pre", MetadataValue::String(pre_tokenizer(&tokenizer)?.into()));
        set("tokens", MetadataValue::strings(&vocabulary.tokens));
        set("token_type", MetadataValue::integers(&vocabulary.types(None, false)));
        let merges = merges(&json).ok_or_else(|| problem("its merges cannot be read".into()))?;
        // A space separates the two parts; one inside a part is written as byte-level BPE writes it.
        let line =
            |(left, right): (&str, &str)| format!("{} {}", left.replace(' ', "Ġ"), right.replace(' ', "Ġ"));
        set("merges", MetadataValue::strings(merges.into_iter().map(line)));
    }
    let (_, settings) = chat::tokenizer_config(dir)?;
    let special = |name: &str| {
        let text = chat::special_token(&settings, &format!("{name}_token"));
        let added = vocabulary.added.iter().find(|token| !text.is_empty() && token.text == text);
        let in_config = || config[format!("{name}_token_id")].as_u64();
        added.map(|token| token.id as u64).or_else(in_config).filter(|id| *id < vocab as u64)
    };
    for (key, name) in SPECIAL {
        if let Some(id) = special(name) {
            set(key, MetadataValue::U32(id as u32));
        }
    }
    let Some([front, end]) = tokenizer.special_tokens_of_texts()? else {
        return Err(problem("the special tokens that it adds depend on the text".into()));
    };
    for (key, ids, name) in [("add_bos_token", front, "bos"), ("add_eos_token", end, "eos")] {
        let own = special(name).map(|id| vec![id as u32]);
        if !ids.is_empty() && Some(&ids) != own.as_ref() {
            let path = dir.join(CONFIG_FILE).display().to_string();
            return Err(problem(format!(
                "it adds tokens {ids:?} to every text, which llama.cpp does only with the {name} token of `{path}` and \
                 `tokenizer_config.json`"
            )));
        }
        set(key, MetadataValue::Bool(!ids.is_empty()));
    }
    set("add_sep_token", MetadataValue::Bool(false));
    if let Some(template) = ChatTemplate::read(dir)? {
        metadata.set("tokenizer.chat_template", MetadataValue::String(template.source().to_owned()));
    }
    Ok(())
}

/// A token that `tokenizer.json` lists beside its model.
struct Added {
    id: usize,
    text: String,
    special: bool,
}

/// Tokens by id. Ids without a token are `[PAD17]`.
struct Vocabulary {
    tokens: Vec<String>,
    is_token: Vec<bool>,
    added: Vec<Added>,
}

impl Vocabulary {
    fn read(json: &Value, size: usize) -> Result<Self, String> {
        let mut tokens: Vec<String> = (0..size).map(|id| format!("[PAD{id}]")).collect();
        let mut is_token = vec![false; size];
        let vocab = json["model"]["vocab"].as_object().ok_or("its vocabulary cannot be read")?;
        let listed = vocab.iter().filter_map(|(text, id)| Some((text.as_str(), id.as_u64()?)));
        let mut added = Vec::new();
        for token in json["added_tokens"].as_array().into_iter().flatten() {
            let (Some(text), Some(id)) = (token["content"].as_str(), token["id"].as_u64()) else {
                return Err("an added token has no text or no id".into());
            };
            added.push(Added { id: id as usize, text: text.to_owned(), special: token["special"] == true });
        }
        let more = added.iter().map(|token| (token.text.as_str(), token.id as u64));
        for (text, id) in listed.chain(more) {
            let Some(place) = usize::try_from(id).ok().filter(|id| *id < size) else {
                return Err(format!("token `{text}` has id {id}, and the model has {size} embeddings"));
            };
            text.clone_into(&mut tokens[place]);
            is_token[place] = true;
        }
        // Spaces of tokens that users defined are written as such.
        for token in added.iter().filter(|token| !token.is_control()) {
            tokens[token.id] = token.text.replace('▁', " ");
        }
        Ok(Self { tokens, is_token, added })
    }

    /// The order in which neighbours are joined: SentencePiece's scores, else minus the place of the first merge that makes a token.
    fn scores(&self, json: &Value, own: Option<&HashMap<String, (f32, bool)>>) -> Vec<f32> {
        let mut first: HashMap<String, f32> = HashMap::new();
        for (place, (left, right)) in merges(json).into_iter().flatten().enumerate() {
            first.entry(format!("{left}{right}")).or_insert(-(place as f32));
        }
        let score = |token: &String| match own {
            Some(own) => own.get(token).map(|(score, _)| *score),
            None => first.get(token).copied(),
        };
        let mut scores: Vec<f32> = self.tokens.iter().map(|token| score(token).unwrap_or(NO_MERGE)).collect();
        self.added.iter().for_each(|token| scores[token.id] = -1000.0);
        scores
    }

    fn types(&self, own: Option<&HashMap<String, (f32, bool)>>, bytes: bool) -> Vec<i32> {
        let is_byte = |token: &str| {
            let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
            digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
        };
        let all = self.tokens.iter().zip(&self.is_token);
        let mut types: Vec<i32> = all
            .map(|(token, is_token)| match token {
                _ if !is_token => UNUSED,
                byte if bytes && is_byte(byte) => BYTE,
                _ => NORMAL,
            })
            .collect();
        for token in &self.added {
            let is_unknown = own.and_then(|own| own.get(&token.text)).is_some_and(|(_, unknown)| *unknown);
            types[token.id] = match token.is_control() {
                _ if is_unknown => UNKNOWN,
                true => CONTROL,
                false => USER_DEFINED,
            };
        }
        types
    }
}

impl Added {
    /// Whether a token never occurs in a text: special tokens, and those that llama.cpp's converter classifies as special by
    /// their form.
    fn is_control(&self) -> bool {
        let text = self.text.as_str();
        let between = |start: &str, end: &str| text.starts_with(start) && text.ends_with(end);
        self.special
            || ["<pad>", "<mask>", "<2mass>", "[@BOS@]"].contains(&text)
            || between("<|", "|>")
            || between("<｜", "｜>")
            || between("<unused", ">")
    }
}

/// The merges of a BPE model, in their order, as pairs.
fn merges(json: &Value) -> Option<Vec<(&str, &str)>> {
    fn pair(merge: &Value) -> Option<(&str, &str)> {
        match merge {
            Value::String(text) => text.split_once(' '),
            _ => Some((merge.get(0)?.as_str()?, merge.get(1)?.as_str()?)),
        }
    }
    json["model"]["merges"].as_array()?.iter().map(pair).collect()
}

/// Whether the normalizer or the pre-tokenizer puts a space before a text.
fn has_prefix_space(json: &Value) -> bool {
    fn any(value: &Value, is: &dyn Fn(&Value) -> bool) -> bool {
        is(value)
            || ["normalizers", "pretokenizers"].iter().any(|list| {
                value[*list].as_array().is_some_and(|steps| steps.iter().any(|step| any(step, is)))
            })
    }
    let prepends = |step: &Value| match step["type"].as_str() {
        Some("Prepend") => step["prepend"] == "▁",
        Some("Metaspace") => step["prepend_scheme"] != "never" && step["add_prefix_space"] != false,
        _ => false,
    };
    any(&json["normalizer"], &prepends) || any(&json["pre_tokenizer"], &prepends)
}

/// llama.cpp's name of the way a byte-level tokenizer splits texts.
fn pre_tokenizer(tokenizer: &Tokenizer) -> Result<&'static str> {
    // The ids as Python prints a list of them.
    let digest = hex(&Sha256::digest(format!("{:?}", tokenizer.encode(PROBE)?)));
    let lines = PRE_TOKENIZERS.lines().filter(|line| !line.starts_with('#'));
    let found = lines.filter_map(|line| line.split_once(' ')).find(|(known, _)| *known == digest);
    found.map(|(_, name)| name).ok_or_else(|| Error::Tokenizer {
        path: tokenizer.path().into(),
        problem: format!(
            "llama.cpp's converter has no name for the way it splits texts (digest {digest} of its probe text)"
        ),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn demo() -> Value {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("calibration/demo/tokenizer.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn tokens_have_types_and_the_order_of_merges() {
        let mut json = demo();
        let more = json!({"id": 4097, "content": "a▁b", "special": false});
        json["added_tokens"].as_array_mut().unwrap().push(more);
        let vocabulary = Vocabulary::read(&json, 4099).unwrap();
        let of = |id: usize| (vocabulary.tokens[id].as_str(), vocabulary.types(None, true)[id]);
        assert_eq!([of(0), of(1), of(3)], [("<unk>", CONTROL), ("<s>", CONTROL), ("<0x00>", BYTE)]);
        assert_eq!([of(4096), of(4097)], [("[PAD4096]", UNUSED), ("a b", USER_DEFINED)]);
        let scores = vocabulary.scores(&json, None);
        let score = |token: &str| scores[vocabulary.tokens.iter().position(|known| known == token).unwrap()];
        // The first five merges of the file.
        assert_eq!(["▁t", "he", "▁a", "in", "▁the"].map(score), [0.0, -1.0, -2.0, -3.0, -4.0]);
        assert_eq!((score("<s>"), score("<0x00>")), (-1000.0, NO_MERGE));
        let own = HashMap::from([("▁t".to_owned(), (-7.5, false)), ("<unk>".to_owned(), (0.0, true))]);
        assert_eq!(
            vocabulary.scores(&json, Some(&own))[vocabulary.tokens.iter().position(|t| t == "▁t").unwrap()],
            -7.5
        );
        assert_eq!(vocabulary.types(Some(&own), true)[0], UNKNOWN);
        let error = Vocabulary::read(&json, 4000).err().unwrap();
        assert!(error.ends_with(", and the model has 4000 embeddings"), "{error}");
    }

    #[test]
    fn tokens_that_look_special_are_control_tokens() {
        let control = |text: &str| Added { id: 0, text: text.to_owned(), special: false }.is_control();
        assert!(["<|im_start|>", "<｜end｜>", "<unused7>", "<pad>"].into_iter().all(control));
        assert!(!["<b>", "<|x", "unused7>"].into_iter().any(control));
    }

    #[test]
    fn a_space_in_front_comes_from_the_normalizer_or_the_pre_tokenizer() {
        let mut json = demo();
        assert!(has_prefix_space(&json));
        json["normalizer"] = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        assert!(!has_prefix_space(&json));
        for (scheme, prefix) in [("first", true), ("always", true), ("never", false)] {
            json["pre_tokenizer"] =
                json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme});
            assert_eq!(has_prefix_space(&json), prefix, "{scheme}");
        }
    }

    #[test]
    fn merges_of_both_layouts_are_read() {
        let expected = Some(vec![("a", "b"), ("ab", "c")]);
        assert_eq!(merges(&json!({"model": {"merges": ["a b", "ab c"]}})), expected);
        assert_eq!(merges(&json!({"model": {"merges": [["a", "b"], ["ab", "c"]]}})), expected);
        assert_eq!(merges(&json!({"model": {"merges": ["ab"]}})), None);
    }

    #[test]
    fn the_table_of_pre_tokenizers_is_whole() {
        let lines: Vec<_> = PRE_TOKENIZERS.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(lines.len(), 97);
        let whole = |line: &&str| {
            line.split_once(' ').is_some_and(|(digest, name)| digest.len() == 64 && !name.is_empty())
        };
        assert!(lines.iter().all(whole));
        // Its own digest, by which another text would be seen.
        assert_eq!(hex(&Sha256::digest(PROBE))[..16], *"a36179c1e2b1cfcf");
    }
}
