//! Reads plain text and JSON, packed or not.

use super::corpus::{Rows, unpacked_limit, unpacks_to_too_much};
use super::objects::{Objects, kind};
use crate::error::{Error, Result};
use flate2::read::MultiGzDecoder;
use serde::Deserializer as _;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde_json::Value;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::Path;

/// Compression of a file, by the last ending of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    None,
    Gzip,
    Zstd,
}

/// The unpacked content of a file. Reading more than a file of its size may hold is an error.
fn open(path: &Path, packing: Packing) -> Result<Box<dyn BufRead>> {
    const BUFFER: usize = 1 << 20;
    let file = File::open(path).map_err(Error::io("read", path))?;
    let limit = unpacked_limit(file.metadata().map_err(Error::io("read", path))?.len());
    Ok(match packing {
        Packing::None => Box::new(BufReader::with_capacity(BUFFER, file)),
        Packing::Gzip => {
            Box::new(BufReader::with_capacity(BUFFER, Bounded::new(MultiGzDecoder::new(file), limit)))
        }
        Packing::Zstd => {
            let decoder = zstd::Decoder::new(file).map_err(Error::io("read", path))?;
            Box::new(BufReader::with_capacity(BUFFER, Bounded::new(decoder, limit)))
        }
    })
}

/// A reader of at most `limit` bytes; one more is an error.
struct Bounded<R> {
    inner: R,
    limit: u64,
    left: u64,
}

impl<R> Bounded<R> {
    fn new(inner: R, limit: u64) -> Self {
        Self { inner, limit, left: limit }
    }
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(bytes)?;
        match self.left.checked_sub(count as u64) {
            Some(left) => self.left = left,
            None => {
                return Err(std::io::Error::new(ErrorKind::FileTooLarge, unpacks_to_too_much(self.limit)));
            }
        }
        Ok(count)
    }
}

/// The byte order mark that some editors put in front of UTF-8. It is no part of the text.
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// Appends a whole text file as one row, its line ends as Python's text mode reads them: all of them become `\n`.
pub(super) fn read_text(path: &Path, packing: Packing, rows: &mut Rows<'_>) -> Result<()> {
    let mut bytes = Vec::new();
    open(path, packing)?
        .take(rows.worth_reading())
        .read_to_end(&mut bytes)
        .map_err(Error::io("read", path))?;
    rows.check_memory(path, bytes.len() as u64)?;
    let text = str::from_utf8(&bytes).map_err(|error| Error::Dataset {
        path: path.into(),
        problem: format!("byte {} of {} is not UTF-8", error.valid_up_to() + 1, bytes.len()),
    })?;
    let text = text.strip_prefix('\u{FEFF}').unwrap_or(text);
    match text.contains('\r') {
        true => rows.push_text(path, "it", &text.replace("\r\n", "\n").replace('\r', "\n")),
        false => rows.push_text(path, "it", text),
    }
}

/// Appends the rows of a file of JSON objects: one a line (blank lines are skipped), or all in one array. `column` is the key that
/// the user asked for.
pub(super) fn read_json(
    path: &Path,
    packing: Packing,
    column: Option<&str>,
    rows: &mut Rows<'_>,
) -> Result<()> {
    let mut reader = open(path, packing)?;
    let mut objects = Objects::new(path, column);
    match skip_byte_order_mark(&mut reader).and_then(|()| first_byte(&mut reader)) {
        Ok(Some(b'[')) => read_array(reader, path, &mut objects, rows),
        Ok(_) => read_lines(reader, path, &mut objects, rows),
        Err(error) => {
            let problem = format!("it cannot be read after line 0: {error}");
            Err(Error::Dataset { path: path.into(), problem })
        }
    }
}

fn skip_byte_order_mark(reader: &mut impl BufRead) -> std::io::Result<()> {
    if reader.fill_buf()?.starts_with(BYTE_ORDER_MARK) {
        reader.consume(BYTE_ORDER_MARK.len());
    }
    Ok(())
}

/// The first byte that is not white space. It stays in the reader with the white space before it, so that lines keep their
/// numbers; a buffer of white space alone is consumed.
fn first_byte(reader: &mut impl BufRead) -> std::io::Result<Option<u8>> {
    Ok(reader.fill_buf()?.iter().copied().find(|byte| !byte.is_ascii_whitespace()))
}

/// One array of objects, read one by one.
fn read_array(reader: impl Read, path: &Path, objects: &mut Objects<'_>, rows: &mut Rows<'_>) -> Result<()> {
    let mut failed = None;
    let items = Items { objects, rows, failed: &mut failed };
    let mut json = serde_json::Deserializer::from_reader(reader);
    let read = json.deserialize_seq(items).and_then(|()| json.end());
    match (failed, read) {
        (Some(error), _) => Err(error),
        (None, Ok(())) => Ok(()),
        (None, Err(error)) => Err(Error::Json { path: path.into(), source: error }),
    }
}

/// Passes each object of an array to `objects`. An error of this crate stops the parser and is stored in `failed`.
struct Items<'a, 'o, 'r> {
    objects: &'a mut Objects<'o>,
    rows: &'a mut Rows<'r>,
    failed: &'a mut Option<Error>,
}

impl<'de> Visitor<'de> for Items<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let mut number = 0_usize;
        while let Some(item) = items.next_element::<serde_json::Map<String, Value>>()? {
            number += 1;
            if let Err(error) = self.objects.push(&item, &format!("item {number}"), self.rows) {
                *self.failed = Some(error);
                return Err(A::Error::custom("a row that cannot be used"));
            }
        }
        Ok(())
    }
}

fn read_lines(
    mut reader: impl BufRead,
    path: &Path,
    objects: &mut Objects<'_>,
    rows: &mut Rows<'_>,
) -> Result<()> {
    let broken = |problem: String| Error::Dataset { path: path.into(), problem };
    let mut line = Vec::new();
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
            Ok(other) => return Err(broken(format!("line {number} is {}, not an object", kind(&other)))),
            Err(_) if !objects.begun() && content == b"{" => {
                return Err(broken(format!(
                    "line {number} does not end what it begins: one object a line is needed, or one array of objects"
                )));
            }
            Err(error) => return Err(broken(format!("line {number}: {}", json_problem(&error)))),
        };
        objects.push(&object, &format!("line {number}"), rows)?;
    }
    Ok(())
}

/// The parser's reason and column. It parsed a single line, so its line number is left out.
fn json_problem(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let reason = text.rsplit_once(" at line ").map_or(text.as_str(), |(reason, _)| reason);
    format!("{reason} at column {}", error.column())
}

#[cfg(test)]
mod tests {
    use crate::calibration::{Corpus, CorpusSource, Sampling, SourceOptions};
    use crate::chat::ChatTemplate;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::io::Write;

    fn load(name: &str, content: &[u8], column: Option<&str>) -> Result<Corpus, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        let options = SourceOptions { text_column: column.map(str::to_owned), ..Default::default() };
        CorpusSource::resolve(path.to_str().unwrap(), &options)
            .and_then(|source| source.load(None))
            .map_err(|error| error.to_string().replace(&format!("{}/", folder.path().display()), ""))
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn plain_text_is_one_row_as_text_mode_reads_it() {
        for content in ["one\n\n two\n", "one\r\n\r\n two\r\n", "\u{FEFF}one\n\n two\n", "one\r\r two\r"] {
            let corpus = load("a.txt", content.as_bytes(), None).unwrap();
            assert_eq!(corpus.rows().collect::<Vec<_>>(), ["one\n\n two\n"], "{content:?}");
        }
        let corpus = load("a.txt", b"one", None).unwrap();
        assert_eq!((corpus.name(), &corpus.provenance().text_column), ("a.txt", &None));
        assert_eq!(load("a.txt", b"ab\xffcd", None).unwrap_err(), "`a.txt`: byte 3 of 5 is not UTF-8");
        assert_eq!(load("a.txt", b" \n", None).unwrap_err(), "`a.txt`: it holds no text");
    }

    #[test]
    fn a_text_that_takes_more_than_the_memory_is_refused_while_it_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let text = "a line of text\n".repeat(20_000);
        let rows = "{\"text\": \"a line of text\"}\n".repeat(20_000);
        for (name, content) in [
            ("a.txt", text.clone().into_bytes()),
            ("a.txt.gz", gzip(text.as_bytes())),
            ("a.jsonl", rows.clone().into_bytes()),
            ("a.jsonl.gz", gzip(rows.as_bytes())),
        ] {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            let load = |max_memory: Option<u64>| {
                let options = SourceOptions { max_memory, ..Default::default() };
                CorpusSource::resolve(path.to_str().unwrap(), &options).unwrap().load(None)
            };
            let error = load(Some(100_000)).unwrap_err().to_string();
            let start = "too little memory: available 100.0 kB, needed at least 100.0 kB for the text of `";
            assert!(error.starts_with(start) && error.contains(name), "{error}");
            assert_eq!(load(Some(2_000_000)).unwrap().text(), load(None).unwrap().text());
        }
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
            "`a.jsonl`: line 3: `text` is a number, not a text or messages"
        );
        assert_eq!(
            error(&format!("{good}{{\"a\": 1, \"b\": 2}}")),
            "`a.jsonl`: line 3 has no `text` (keys: a, b)"
        );
        assert_eq!(error(&format!("{good}[1]")), "`a.jsonl`: line 3 is a list, not an object");
        assert_eq!(
            error(&format!("{good}{{\"text\": \"a")),
            "`a.jsonl`: line 3: EOF while parsing a string at column 11"
        );
        assert_eq!(
            error("{\n\"text\": \"a\"}\n"),
            "`a.jsonl`: line 1 does not end what it begins: one object a line is needed, or one array of objects"
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

    #[test]
    fn files_that_unpack_to_far_more_than_they_hold_are_refused() {
        // 96 MiB, of which gzip keeps a thousandth, and zstd less.
        let line = format!("{{\"text\": \"{}\"}}\n", "a".repeat((1 << 20) - 13));
        let lines = line.repeat(96);
        let problem =
            "it unpacks to more than 67.1 MB; at most 256 times the size of the file, or 67.1 MB, is read";
        let zstd = zstd::encode_all(lines.as_bytes(), 1).unwrap();
        for (name, content) in
            [("a.txt.gz", &gzip(lines.as_bytes())), ("a.jsonl.zst", &zstd), ("a.txt.zst", &zstd)]
        {
            let error = load(name, content, None).unwrap_err();
            assert!(error.contains(name) && error.contains(problem), "{error}");
        }
        assert_eq!(load("a.jsonl", lines.as_bytes(), None).unwrap().rows().len(), 96);
    }

    #[test]
    fn arrays_and_packed_text() {
        let array = b" [{\"text\": \"a\"},\n {\"text\": null}, {\"text\": \"b\"}]\n";
        for (name, content) in
            [("a.json", array.to_vec()), ("a.jsonl.zst", zstd::encode_all(&array[..], 3).unwrap())]
        {
            let corpus = load(name, &content, None).unwrap();
            assert_eq!(corpus.rows().collect::<Vec<_>>(), ["a", "b"], "{name}");
            assert_eq!(corpus.provenance().nulls, 1);
        }
        assert_eq!(load("a.txt.gz", &gzip(b"one\ntwo"), None).unwrap().text(), "one\ntwo");
        assert_eq!(
            load("a.txt.zst", &zstd::encode_all(&b"one"[..], 3).unwrap(), None).unwrap().text(),
            "one"
        );

        let marked = ["\u{FEFF}{\"text\": \"a\"}\n", "\u{FEFF}[{\"text\": \"a\"}]"];
        assert!(marked.iter().all(|json| load("a.json", json.as_bytes(), None).unwrap().text() == "a"));
        let error = |content: &str| load("a.json", content.as_bytes(), None).unwrap_err();
        assert_eq!(
            error("[{\"text\": \"a\"}, {\"body\": 1}]"),
            "`a.json`: item 2 has no `text` (keys: body)"
        );
        assert!(error("[{\"text\": \"a\"}, 3]").contains("invalid type: integer `3`"));
        assert!(error("[{\"text\": \"a\"}").contains("EOF while parsing"));
        let cut = zstd::encode_all(&b"one two three"[..], 3).unwrap();
        assert!(
            load("a.txt.zst", &cut[..cut.len() - 3], None)
                .unwrap_err()
                .starts_with("cannot read `a.txt.zst`")
        );
    }

    #[test]
    fn conversations_in_every_usual_form() {
        let template = ChatTemplate::of(
            "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\
             <{{ m.role }}>{{ m.content }}{% endfor %}",
        );
        let load = |lines: &str| {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("chat.jsonl");
            std::fs::write(&path, lines).unwrap();
            let source = CorpusSource::resolve(path.to_str().unwrap(), &SourceOptions::default()).unwrap();
            source
                .load(Some(&template))
                .map_err(|e| e.to_string().replace(&format!("{}/", folder.path().display()), ""))
        };
        let forms = [
            r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}"#,
            r#"{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}"#,
            r#"{"prompt": "Hi", "completion": "Ho"}"#,
            r#"{"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Ho"}]}"#,
            r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "Ho"}]}"#,
        ];
        for form in forms {
            let corpus = load(form).unwrap();
            assert_eq!(corpus.rows().collect::<Vec<_>>(), ["<user>Hi<assistant>Ho"], "{form}");
            assert_eq!(corpus.sampling(), &Sampling::Conversations);
        }

        // What a template refuses, and what has no content, is counted and left out.
        let tool = r#"{"messages": [{"role": "tool", "content": "x"}]}"#;
        let empty = r#"{"messages": [{"role": "assistant", "content": null}]}"#;
        let corpus = load(&[forms[0], tool, empty, tool].join("\n")).unwrap();
        let provenance = corpus.provenance();
        let refused = provenance.refused.as_ref().unwrap();
        assert_eq!((provenance.rows, provenance.nulls, refused.count, refused.first), (1, 1, 2, 2));
        assert!(refused.reason.ends_with("no tools"), "{}", refused.reason);
        let all = load(tool).unwrap_err();
        assert!(
            all.starts_with(
                "`chat.jsonl`: none of its 1 conversations can be used: row 1: the chat template"
            ),
            "{all}"
        );

        assert_eq!(
            load(r#"{"messages": [{"speaker": "user"}]}"#).unwrap_err(),
            "`chat.jsonl`: line 1: `messages`: message 1 has neither `role` nor `from` (keys: speaker)"
        );
        assert_eq!(
            load(r#"{"messages": ["Hi"]}"#).unwrap_err(),
            "`chat.jsonl`: line 1: `messages`: message 1 is a text, not an object with role and content"
        );
        let plain = r#"{"text": "plain"}"#;
        let conversation = r#"{"text": [{"role": "user", "content": "Hi"}]}"#;
        assert_eq!(
            load(&format!("{plain}\n{conversation}")).unwrap_err(),
            "`chat.jsonl`: line 2 is a conversation, and rows before it are plain text: one dataset cannot hold both"
        );
        assert_eq!(
            load(&format!("{conversation}\n\n{plain}")).unwrap_err(),
            "`chat.jsonl`: line 3 is plain text, and rows before it are conversations: one dataset cannot hold both"
        );
    }
}
