//! What the documentation says of the tests is so.

use std::fs;

use crate::helpers::{files_below, repository};

/// The names in the last column of the tables of `docs/reliability.md`.
fn named_tests(text: &str) -> Vec<&str> {
    let rows = text.lines().filter(|line| line.starts_with("| ") && line.ends_with("` |"));
    let last = rows.filter_map(|row| row.trim_end_matches(" |").rsplit_once("| ")).map(|(_, last)| last);
    last.flat_map(|cell| cell.split(", ")).map(|name| name.trim_matches('`')).collect()
}

#[test]
fn every_test_that_is_named_exists() {
    let text = fs::read_to_string(repository().join("docs/reliability.md")).unwrap();
    let named = named_tests(&text);
    assert!(named.len() > 30, "{named:?}");
    let mut sources = String::new();
    for folder in ["src", "tests"] {
        let folder = repository().join(folder);
        for file in files_below(&folder).iter().filter(|file| file.extension().is_some_and(|e| e == "rs")) {
            sources += &fs::read_to_string(folder.join(file)).unwrap();
        }
    }
    for name in named {
        let found = sources.contains(&format!("fn {name}(")) || sources.contains(&format!("    {name},\n"));
        assert!(found, "docs/reliability.md names a test `{name}`, which does not exist");
    }
}

#[test]
fn names_are_taken_from_the_last_column() {
    let table = "| a | b | test |\n|---|---|---|\n| x `y` | z | `one`, `two` |\n| no test | here |\n";
    assert_eq!(named_tests(table), ["one", "two"]);
}

/// `docs/readers.md` holds the table that the program applies. `GPTQ_UPDATE_DOCS=1 scripts/test readers_doc` writes it anew.
#[test]
fn the_readers_doc_is_the_table_of_the_program() {
    const MARKS: [&str; 2] = ["<!-- readers -->\n", "<!-- end of readers -->"];
    let path = repository().join("docs/readers.md");
    let text = fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(MARKS[0]).unwrap();
    let (found, after) = rest.split_once(MARKS[1]).unwrap();
    let expected = format!("\n{}\n", gptq::verify::readers_markdown());
    if std::env::var_os("GPTQ_UPDATE_DOCS").is_some() {
        fs::write(&path, [before, MARKS[0], &expected, MARKS[1], after].concat()).unwrap();
        return;
    }
    assert_eq!(found, expected, "docs/readers.md is not what src/verify/readers.toml says");
}
