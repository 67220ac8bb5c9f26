//! Long texts, tokenized in pieces on all cores, to the same ids as a whole.
//!
//! A tokenizer needs about a hundred times the memory of what it tokenizes at once. A text is cut between a line break and
//! the next line, where that changes no id:
//!
//! - The normalizer changes characters one by one, and leaves line breaks alone.
//! - Either the pre-tokenizer splits by a regular expression. What it does at a line break depends on the run of white space there and
//!   on the words beside it, so the two lines at each cut are tokenized together and apart, and must agree.
//! - Or no token of a BPE model holds a line break before another character. No merge then crosses a cut, and merges on its two
//!   sides do not depend on each other. (In a Unigram model the rounding of sums from the start of a word decides between equal
//!   segmentations, so it is never cut.) The lines are compared here too.
//!
//! A piece is tokenized behind the line break before it, whose ids are dropped: a prefix that is added to a text goes there.

use rayon::prelude::*;
use serde_json::Value;
use tokenizers::{ModelWrapper, Tokenizer};

use crate::progress::Progress;

/// Bytes of a piece, at least.
const PIECE: usize = 64 << 10;
/// Line breaks that are tried for a cut.
const ATTEMPTS: usize = 64;
/// Bytes of the longest line beside a cut.
const LONGEST_LINE: usize = 1 << 20;

/// Whether a text of `bytes` is worth cutting.
pub(super) fn is_long(bytes: usize) -> bool {
    bytes >= 2 * PIECE
}

/// The ids of a text without added special tokens; `None` where the text cannot be cut.
pub(super) fn encode(
    tokenizer: &Tokenizer,
    text: &str,
    progress: &dyn Progress,
) -> tokenizers::Result<Option<Vec<u32>>> {
    if !is_long(text.len()) || !can_be_cut(tokenizer) {
        return Ok(None);
    }
    let newline = ids(tokenizer, "\n")?;
    let cuts: Vec<Option<usize>> = (1..text.len() / PIECE)
        .into_par_iter()
        .map(|piece| find_cut(tokenizer, text, &newline, piece * PIECE..(piece + 1) * PIECE))
        .collect::<tokenizers::Result<_>>()?;
    let mut starts: Vec<usize> = std::iter::once(0).chain(cuts.into_iter().flatten()).collect();
    if starts.len() == 1 {
        return Ok(None);
    }
    starts.push(text.len());
    if text.len() >= 1_000_000 {
        progress.begin("tokenizing, MB", (text.len() / 1_000_000) as u64);
    }
    let megabytes = |end: usize| (end / 1_000_000) as u64;
    let pieces: Vec<Option<Vec<u32>>> = starts
        .par_windows(2)
        .map(|piece| {
            let found = behind_newline(tokenizer, text, piece[0]..piece[1], &newline)?;
            progress.advance(megabytes(piece[1]) - megabytes(piece[0]));
            Ok(found)
        })
        .collect::<tokenizers::Result<_>>()?;
    Ok(pieces.into_iter().collect::<Option<Vec<_>>>().map(|pieces| pieces.concat()))
}

/// Bytes of memory that tokenizing a text takes for a while.
pub(super) fn memory(tokenizer: &Tokenizer, text: &str) -> u64 {
    /// Bytes for each byte that is tokenized at once.
    const FACTOR: usize = 100;
    let at_once = match is_long(text.len()) && can_be_cut(tokenizer) {
        true => {
            let longest = text.split('\n').map(str::len).max().unwrap_or_default();
            text.len().min(rayon::current_num_threads() * 2 * longest.max(PIECE))
        }
        false => text.len(),
    };
    (at_once * FACTOR) as u64
}

fn ids(tokenizer: &Tokenizer, text: &str) -> tokenizers::Result<Vec<u32>> {
    Ok(tokenizer.encode_fast(text, false)?.get_ids().to_vec())
}

/// The ids of a part of a text, tokenized with the line break before it. `None` if they do not begin with those of the line
/// break, `newline`.
fn behind_newline(
    tokenizer: &Tokenizer,
    text: &str,
    part: std::ops::Range<usize>,
    newline: &[u32],
) -> tokenizers::Result<Option<Vec<u32>>> {
    match part.start {
        0 => ids(tokenizer, &text[part]).map(Some),
        start => Ok(ids(tokenizer, &text[start - 1..part.end])?.strip_prefix(newline).map(<[u32]>::to_vec)),
    }
}

/// The first start of a line in `place` at which a cut changes no id of the two lines beside it.
fn find_cut(
    tokenizer: &Tokenizer,
    text: &str,
    newline: &[u32],
    place: std::ops::Range<usize>,
) -> tokenizers::Result<Option<usize>> {
    let bytes = text.as_bytes();
    let starts_line = |&at: &usize| bytes[at - 1] == b'\n' && bytes[at] != b'\n';
    for cut in place.filter(starts_line).take(ATTEMPTS) {
        let before = (1..cut).rev().take(LONGEST_LINE).find(starts_line);
        let after = (cut + 1..bytes.len()).take(LONGEST_LINE).find(starts_line);
        let (Some(before), Some(after)) = (before, after) else { continue };
        // All of a run of white space must be seen.
        if text[before..cut].trim().is_empty() || text[cut..after].trim().is_empty() {
            continue;
        }
        let together = ids(tokenizer, &text[before - 1..after])?;
        let left = ids(tokenizer, &text[before - 1..cut])?;
        let right = behind_newline(tokenizer, text, cut..after, newline)?;
        if right.is_some_and(|right| together == [left, right].concat()) {
            return Ok(Some(cut));
        }
    }
    Ok(None)
}

/// Whether the parts of a tokenizer are those that the proof above is about.
fn can_be_cut(tokenizer: &Tokenizer) -> bool {
    let ModelWrapper::BPE(model) = tokenizer.get_model() else { return false };
    if model.continuing_subword_prefix.is_some() || model.end_of_word_suffix.is_some() {
        return false;
    }
    let json = |part: serde_json::Result<Value>| part.unwrap_or(Value::Bool(false));
    let normalizer = json(serde_json::to_value(tokenizer.get_normalizer()));
    let splitter = json(serde_json::to_value(tokenizer.get_pre_tokenizer()));
    let (normalizers, splitters) = (parts(&normalizer, "normalizers"), parts(&splitter, "pretokenizers"));
    let kind = |part: &Value| part["type"].as_str().unwrap_or_default().to_owned();
    let is_local = |part: &&Value| match kind(part).as_str() {
        "NFC" | "NFD" | "NFKC" | "NFKD" | "Prepend" => true,
        "Replace" => part["pattern"]["String"].as_str().is_some_and(|pattern| !pattern.contains('\n')),
        _ => false,
    };
    let is_known =
        |part: &&Value| ["ByteLevel", "Digits", "Metaspace", "Split"].contains(&kind(part).as_str());
    if !normalizers.iter().all(is_local) || !splitters.iter().all(is_known) {
        return false;
    }
    let by_expression = |part: &&Value| match kind(part).as_str() {
        "ByteLevel" => part["use_regex"] != false,
        "Split" => part["pattern"]["Regex"].is_string(),
        _ => false,
    };
    if splitters.iter().any(by_expression) {
        return true;
    }
    let bytes_of_characters = splitters.iter().any(|part| kind(part) == "ByteLevel");
    let newline = if bytes_of_characters { 'Ċ' } else { '\n' };
    let vocabulary = tokenizer.get_vocab(false);
    const FALLBACK: &str = "<0x0A>";
    let ends_with_breaks = |token: &String| {
        !token.trim_end_matches(newline).contains(newline) && (token == FALLBACK || !token.contains(FALLBACK))
    };
    let all_bytes = || (0..=255).all(|byte| vocabulary.contains_key(&format!("<0x{byte:02X}>")));
    let known = vocabulary.contains_key(&newline.to_string()) || (model.byte_fallback && all_bytes());
    known && !model.ignore_merges && vocabulary.keys().all(ends_with_breaks)
}

/// The parts of a sequence, of a single part, or of nothing.
fn parts<'a>(part: &'a Value, key: &str) -> Vec<&'a Value> {
    match (part, part[key].as_array()) {
        (Value::Null, _) => Vec::new(),
        (_, Some(list)) => list.iter().flat_map(|part| parts(part, key)).collect(),
        (part, None) => vec![part],
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::calibration::test_support::demo;
    use crate::progress::Silent;

    /// Text with every kind of line: prose, indentation, blank lines with and without spaces, Windows' line ends and other
    /// scripts. Some could be merged across a line break.
    fn text() -> String {
        let lines = [
            "The old house stood by the river.\n",
            " = Heading = \n",
            "\n\n",
            "    indented by four\n",
            "\tby a tab\n",
            "  \n",
            "ends with spaces   \n",
            "1234567 and 89\n",
            "\r\n",
            "'s, \"quoted\" -- dashes...\n\n\n",
            "日本語の文章 café 😀\n",
            "don't we'll I'M\n",
            "\u{301}combining\n",
            "<s>special</s>\n",
            "a\n",
            "b\n\n",
            "  c\n",
            "}\n",
            "\n  \n x\n",
        ];
        let mut state = 1_u64;
        let mut text = String::new();
        while text.len() < 6 * PIECE {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            text.push_str(lines[(state >> 33) as usize % lines.len()]);
        }
        text
    }

    /// Requires that the text is cut, or is not, and that its ids are those of the whole.
    #[track_caller]
    fn check(tokenizer: &Tokenizer, is_cut: bool) {
        let text = text();
        let pieces = encode(tokenizer, &text, &Silent).unwrap();
        assert_eq!(pieces.is_some(), is_cut);
        if let Some(pieces) = pieces {
            assert!(pieces == ids(tokenizer, &text).unwrap());
        }
    }

    fn changed(change: impl FnOnce(&mut Value)) -> Tokenizer {
        let file = std::fs::read(demo().join("tokenizer.json")).unwrap();
        let mut json: Value = serde_json::from_slice(&file).unwrap();
        change(&mut json);
        Tokenizer::from_bytes(serde_json::to_vec(&json).unwrap()).unwrap()
    }

    /// A byte-level BPE with merges over white space, as some vocabularies have them.
    fn byte_level(pre_tokenizer: Value) -> Tokenizer {
        changed(|json| {
            let mut symbols: Vec<char> =
                ('!'..='~').chain('\u{a1}'..='\u{ac}').chain('\u{ae}'..='\u{ff}').collect();
            symbols.extend('\u{100}'..='\u{143}');
            let mut vocab: Vec<String> = symbols.iter().map(char::to_string).collect();
            let pairs =
                [("Ġ", "Ġ"), ("Ċ", "Ċ"), ("Ġ", "Ċ"), ("ĊĊ", "Ċ"), (".", "Ċ"), ("t", "h"), ("th", "e")];
            let merges: Vec<String> = pairs.iter().map(|(left, right)| format!("{left} {right}")).collect();
            vocab.extend(merges.iter().map(|pair| pair.replace(' ', "")));
            let vocab: serde_json::Map<String, Value> =
                vocab.into_iter().enumerate().map(|(id, token)| (token, id.into())).collect();
            json["model"] = json!({"type": "BPE", "vocab": vocab, "merges": merges});
            json["normalizer"] = json!({"type": "NFC"});
            json["pre_tokenizer"] = pre_tokenizer;
            json["post_processor"] = Value::Null;
            json["decoder"] = Value::Null;
            json["added_tokens"] = json!([]);
        })
    }

    #[test]
    fn pieces_have_the_ids_of_the_whole_with_sentencepiece_bpe() {
        check(&changed(|_| ()), true);
        let metaspace = |scheme: &str, split: bool| {
            changed(|json| {
                json["normalizer"] = Value::Null;
                json["pre_tokenizer"] = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split});
            })
        };
        for (scheme, split) in [("first", false), ("always", true), ("never", true)] {
            check(&metaspace(scheme, split), true);
        }
        // A token with a line break before another character may cross a cut.
        let crossing = changed(|json| json["model"]["vocab"]["\na"] = 5000.into());
        check(&crossing, false);
        let regex = changed(|json| {
            json["normalizer"] = json!({"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": "▁"});
        });
        check(&regex, false);
    }

    #[test]
    fn pieces_have_the_ids_of_the_whole_with_byte_level_bpe() {
        check(
            &byte_level(
                json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}),
            ),
            true,
        );
        check(
            &byte_level(
                json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
            ),
            true,
        );
        let pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        let bytes =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let split =
            json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        check(&byte_level(json!({"type": "Sequence", "pretokenizers": [split, bytes]})), true);
        let digits = json!({"type": "Digits", "individual_digits": true});
        let whole =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        check(&byte_level(json!({"type": "Sequence", "pretokenizers": [digits, whole]})), true);
        // Without an expression, merges may reach as far as the vocabulary lets them.
        check(&byte_level(bytes), true);
    }

    #[test]
    fn a_unigram_model_is_tokenized_as_a_whole() {
        let unigram = changed(|json| {
            let vocab = json!([["<unk>", 0.0], ["▁", -1.0], ["a", -2.0], ["aa", -3.0], ["\n", -2.0]]);
            json["model"] = json!({"type": "Unigram", "unk_id": 0, "vocab": vocab});
            json["added_tokens"] = json!([]);
            json["post_processor"] = Value::Null;
        });
        check(&unigram, false);
    }
}
