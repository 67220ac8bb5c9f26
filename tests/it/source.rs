//! Just enough reading of Rust source text to check rules about it: comments and strings are taken out, then words are
//! looked at.

use std::collections::BTreeSet;

/// The code without comments, and with strings and characters emptied; lines stay where they are.
pub(crate) fn code(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let word = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
        let (length, kept) = if rest.starts_with("//") {
            (rest.find('\n').unwrap_or(rest.len()), "")
        } else if rest.starts_with("/*") {
            (rest.find("*/").map_or(rest.len(), |end| end + 2), "")
        } else if let Some(length) = raw_string(rest) {
            (length, "\"\"")
        } else if let Some(quoted) = rest.strip_prefix('"') {
            (1 + end_of_string(quoted), "\"\"")
        } else if let Some(length) = character(rest) {
            (length, "''")
        } else {
            let length = word.max(first.len_utf8());
            (length, &rest[..length])
        };
        code.push_str(kept);
        if kept.is_empty() || kept == "\"\"" {
            code.extend(rest[..length].chars().filter(|&c| c == '\n'));
        }
        rest = &rest[length..];
    }
    code
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Bytes of the raw string that `text` starts with.
fn raw_string(text: &str) -> Option<usize> {
    let after = text.strip_prefix("br").or_else(|| text.strip_prefix('r'))?;
    let quoted = after.trim_start_matches('#');
    let hashes = after.len() - quoted.len();
    let inside = quoted.strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let closed = inside.find(&end).map_or(inside.len(), |at| at + end.len());
    Some(text.len() - inside.len() + closed)
}

/// Bytes up to and with the closing quote, from behind the opening one.
fn end_of_string(quoted: &str) -> usize {
    let mut escaped = false;
    for (at, c) in quoted.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    quoted.len()
}

/// Bytes of the character literal that `text` starts with; a lifetime is none.
fn character(text: &str) -> Option<usize> {
    let inside = text.strip_prefix('\'')?;
    if inside.starts_with('\\') {
        return inside[2..].find('\'').map(|at| at + 4);
    }
    let length = inside.chars().next()?.len_utf8();
    inside[length..].starts_with('\'').then_some(length + 2)
}

/// Code with its `#[cfg(test)]` modules taken out.
pub(crate) fn without_tests(code: &str) -> String {
    let mut kept = String::new();
    let mut rest = code;
    while let Some(at) = rest.find("#[cfg(test)]") {
        kept.push_str(&rest[..at]);
        let after = &rest[at..];
        let end = match (after.find('{'), after.find(';')) {
            (Some(open), semicolon) if semicolon.is_none_or(|s| open < s) => open + block(&after[open..]),
            (_, semicolon) => semicolon.map_or(after.len(), |s| s + 1),
        };
        rest = &after[end..];
    }
    kept + rest
}

/// Bytes of the block in braces that `code` starts with.
fn block(code: &str) -> usize {
    let mut depth = 0usize;
    for (at, c) in code.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at + 1;
        }
    }
    code.len()
}

/// Whether `word` stands in the code by itself; `println!` is a word too.
pub(crate) fn mentions(code: &str, word: &str) -> bool {
    code.match_indices(word).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        !before.is_some_and(is_word) && !after.is_some_and(is_word)
    })
}

/// The modules at the top of the crate that the code names, by `crate::` or by enough `super::` for a file that lies
/// `depth` modules below the top.
pub(crate) fn top_modules(code: &str, depth: usize) -> BTreeSet<String> {
    let mut modules = BTreeSet::new();
    let code: String = code.split_whitespace().collect::<Vec<_>>().join(" ");
    for way in ["crate::".to_owned(), "super::".repeat(depth)] {
        for (at, _) in code.match_indices(&way) {
            let inside_a_word = code[..at].chars().next_back().is_some_and(is_word);
            let longer = way.starts_with("super") && code[..at].ends_with("super::");
            if !inside_a_word && !longer {
                modules.extend(first_names(&code[at + way.len()..]));
            }
        }
    }
    modules
}

/// `a::b` → `a`; `{a::{b, c}, d}` → `a`, `d`.
fn first_names(path: &str) -> Vec<String> {
    let name = |text: &str| -> String { text.trim_start().chars().take_while(|&c| is_word(c)).collect() };
    if !path.starts_with('{') {
        return vec![name(path)];
    }
    let inside = &path[1..block(path) - 1];
    let mut depth = 0;
    let parts = inside.split(|c| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        c == ',' && depth == 0
    });
    parts.map(name).filter(|name| !name.is_empty()).collect()
}

#[test]
fn comments_and_strings_are_not_code() {
    let text = r##"let a = "// no \" comment"; // tch
let b = r#"a " b"#; /* tch
*/ let c: &'a str = "x"; let d = '"'; let e = '\''; f(b'{');"##;
    let expected = "let a = \"\"; \nlet b = \"\"; \n let c: &'a str = \"\"; let d = ''; let e = ''; f(b'');";
    assert_eq!(code(text), expected);
}

#[test]
fn test_modules_are_left_out() {
    let text = "fn a() {}\n#[cfg(test)]\nmod tests { fn b() { {} } }\n#[cfg(test)]\nmod more;\nfn c() {}";
    let kept: String = without_tests(text).split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(kept, "fn a() {} fn c() {}");
}

#[test]
fn words_stand_by_themselves() {
    assert!(mentions("use tch::Tensor;", "tch") && mentions("x(tch)", "tch"));
    assert!(!mentions("match x", "tch") && !mentions("tch_like", "tch"));
    assert!(mentions("println!()", "println!") && !mentions("eprintln!()", "println!"));
}

#[test]
fn top_modules_are_found_in_every_form() {
    let found = |code: &str, depth: usize| top_modules(code, depth).into_iter().collect::<Vec<_>>().join(" ");
    assert_eq!(found("use crate::pack::bits;", 1), "pack");
    assert_eq!(
        found("use crate::{\n  error::{Error, Result},\n  plan::Plan,\n};\ncrate::emit::f()", 2),
        "emit error plan"
    );
    assert_eq!(found("use super::verify::x;", 1), "verify");
    assert_eq!(found("use super::verify::x; use super::super::eval;", 2), "eval");
    assert_eq!(found("use super::{report::{a, b}, verify};", 1), "report verify");
    assert_eq!(found("my_crate::x", 1), "");
}
