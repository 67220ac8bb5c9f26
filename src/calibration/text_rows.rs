//! Reads plain text and JSON lines.

use super::corpus::Rows;
use crate::error::{Error, Result};
use flate2::read::MultiGzDecoder;
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// Appends a whole text file as one row.
pub(super) fn read_text(path: &Path, rows: &mut Rows) -> Result<()> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let text = str::from_utf8(&bytes).map_err(|error| Error::Dataset {
        path: path.into(),
        problem: format!("byte {} of {} is not UTF-8", error.valid_up_to() + 1, bytes.len()),
    })?;
    rows.push(text);
    Ok(())
}

/// Appends the text under `key` of each line's JSON object; blank lines are passed over.
pub(super) fn read_json_lines(path: &Path, gzip: bool, key: &str, rows: &mut Rows) -> Result<()> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    if gzip {
        read_lines(BufReader::with_capacity(1 << 20, MultiGzDecoder::new(file)), path, key, rows)
    } else {
        read_lines(BufReader::with_capacity(1 << 20, file), path, key, rows)
    }
}

fn read_lines(mut reader: impl BufRead, path: &Path, key: &str, rows: &mut Rows) -> Result<()> {
    let broken = |problem: String| Error::Dataset { path: path.into(), problem };
    let mut line = Vec::new();
    let mut objects = 0;
    for number in 1_usize.. {
        line.clear();
        let length = reader
            .read_until(b'\n', &mut line)
            .map_err(|error| broken(format!("it cannot be read after line {}: {error}", number - 1)))?;
        if length == 0 {
            break;
        }
        let content = line.trim_ascii();
        if content.is_empty() {
            continue;
        }
        let object = match serde_json::from_slice(content) {
            Ok(Value::Object(object)) => object,
            Ok(_) => return Err(broken(format!("line {number} is not a JSON object"))),
            Err(_) if objects == 0 && matches!(content, b"[" | b"{") => {
                return Err(broken(format!(
                    "line {number} does not end what it begins: one object a line is needed"
                )));
            }
            Err(error) => return Err(broken(format!("line {number}: {}", json_problem(&error)))),
        };
        objects += 1;
        match object.get(key) {
            Some(Value::String(text)) => rows.push(text),
            Some(Value::Null) => rows.push_null(),
            Some(other) => {
                return Err(broken(format!("line {number}: `{key}` is {}, not a text", kind(other))));
            }
            None => {
                let found = object.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
                return Err(if objects == 1 {
                    Error::MissingColumn { path: path.into(), column: key.into(), found }
                } else {
                    broken(format!("line {number} has no `{key}` (keys: {found})"))
                });
            }
        }
    }
    Ok(())
}

/// The parser's reason; it counts lines within the one line it saw, so only its column is kept.
fn json_problem(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let reason = text.rsplit_once(" at line ").map_or(text.as_str(), |(reason, _)| reason);
    format!("{reason} at column {}", error.column())
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use crate::calibration::{Corpus, CorpusSource, SourceOptions};
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::io::Write;

    fn load(name: &str, content: &[u8], column: Option<&str>) -> Result<Corpus, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        let options = SourceOptions { text_column: column.map(str::to_owned), ..Default::default() };
        CorpusSource::resolve(path.to_str().unwrap(), &options)
            .and_then(|source| source.load())
            .map_err(|error| error.to_string().replace(&format!("{}/", folder.path().display()), ""))
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn plain_text_is_one_row_unchanged() {
        let corpus = load("a.txt", "one\r\n\n two\n".as_bytes(), None).unwrap();
        assert_eq!(corpus.rows().collect::<Vec<_>>(), ["one\r\n\n two\n"]);
        assert_eq!((corpus.name(), &corpus.provenance().text_column), ("a.txt", &None));
        assert_eq!(load("a.txt", b"ab\xffcd", None).unwrap_err(), "`a.txt`: byte 3 of 5 is not UTF-8");
        assert_eq!(load("a.txt", b" \n", None).unwrap_err(), "`a.txt`: it holds no text");
    }

    #[test]
    fn json_lines_are_read_packed_and_unpacked() {
        let content =
            b"{\"text\": \"a\\n\", \"n\": 1}\n\n{\"n\": 2, \"text\": null}\r\n{\"text\": \"\\u00e9\"}";
        // Two packed members after another are one file.
        let packed = [gzip(&content[..25]), gzip(&content[25..])].concat();
        let files =
            [("a.jsonl", &content[..]), ("a.json", content), ("a.jsonl.gz", &packed), ("a.json.gz", &packed)];
        for (name, content) in files {
            let corpus = load(name, content, None).unwrap();
            assert_eq!(corpus.rows().collect::<Vec<_>>(), ["a\n", "é"], "{name}");
            assert_eq!(corpus.provenance().nulls, 1);
        }
    }

    #[test]
    fn json_errors_name_the_line() {
        let error = |content: &str| load("a.jsonl", content.as_bytes(), None).unwrap_err();
        let good = "{\"text\": \"a\"}\n\n";
        assert_eq!(
            error(&format!("{good}{{\"text\": 1}}")),
            "`a.jsonl`: line 3: `text` is a number, not a text"
        );
        assert_eq!(
            error(&format!("{good}{{\"a\": 1, \"b\": 2}}")),
            "`a.jsonl`: line 3 has no `text` (keys: a, b)"
        );
        assert_eq!(error(&format!("{good}[1]")), "`a.jsonl`: line 3 is not a JSON object");
        assert_eq!(
            error(&format!("{good}{{\"text\": \"a")),
            "`a.jsonl`: line 3: EOF while parsing a string at column 11"
        );
        assert_eq!(
            error("[\n{\"text\": \"a\"}\n]"),
            "`a.jsonl`: line 1 does not end what it begins: one object a line is needed"
        );
        assert_eq!(error("{\"a\": 1, \"b\": 2}"), "`a.jsonl` has no text column `text` (columns: a, b)");
        assert_eq!(
            error("{\"text\": \"\"}\n{\"text\": null}"),
            "column `text` of a.jsonl holds no text in any of its 2 rows"
        );
        let body = load("a.jsonl", b"{\"body\": \"x\"}", Some("body")).unwrap();
        assert_eq!(body.text(), "x");
    }

    #[test]
    fn a_cut_gzip_file_is_an_error() {
        let content: String = (0..2000).map(|n| format!("{{\"text\": \"row {}\"}}\n", n * 7919)).collect();
        let packed = gzip(content.as_bytes());
        let error = load("a.json.gz", &packed[..packed.len() / 2], None).unwrap_err();
        assert!(error.starts_with("`a.json.gz`: it cannot be read after line "), "{error}");
    }
}
