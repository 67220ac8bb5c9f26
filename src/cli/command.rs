//! The command as it was typed, for reports.

use std::{env, path::Path};

use gptq::hub::Reference;

/// Every word of the command; of paths only the last name, so that published files do not show the machine's folders.
pub(super) fn words() -> Vec<String> {
    let mut words = vec!["gptq".to_owned()];
    words.extend(env::args_os().skip(1).map(|word| without_way(&word.to_string_lossy())));
    words
}

/// The command as a line for a shell, which resumes the run: without `--restart`, which would discard it.
pub(super) fn resume() -> String {
    let words = env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    resume_line(words)
}

fn resume_line(words: impl Iterator<Item = String>) -> String {
    let words = words.filter(|word| word != "--restart").map(|word| quoted(&word));
    ["gptq".to_owned()].into_iter().chain(words).collect::<Vec<_>>().join(" ")
}

/// A word as a shell reads it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@,%+".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

/// `--model=/data/Llama` → `--model=Llama`, `../text.parquet` → `text.parquet`; a repository on the Hub stays whole.
fn without_way(word: &str) -> String {
    let (option, value) = match word.split_once('=') {
        Some((option, value)) if option.starts_with("--") => (&word[..=option.len()], value),
        _ => ("", word),
    };
    let named = || value.parse::<Reference>().is_ok() && !Path::new(value).exists();
    let name = match Path::new(value).file_name() {
        _ if named() => value.to_owned(),
        Some(name) if value.contains(std::path::is_separator) => name.to_string_lossy().into_owned(),
        _ => value.to_owned(),
    };
    format!("{option}{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_that_resumes_is_quoted_and_does_not_restart() {
        let words =
            ["quantize", "--restart", "--model", "my model", "--out=it's", "--variant", "4bit-32g", ""];
        let expected = r"gptq quantize --model 'my model' '--out=it'\''s' --variant 4bit-32g ''";
        assert_eq!(resume_line(words.map(str::to_owned).into_iter()), expected);
    }

    #[test]
    fn the_way_to_a_file_stays_out() {
        let short = [
            "--model=some/Llama@v1",
            "--model=/data/Llama",
            "/data/Llama/",
            "../text.parquet",
            "4bit-32g",
            "--seq-len=8",
            "-1",
            ".",
        ];
        let expected = [
            "--model=some/Llama@v1",
            "--model=Llama",
            "Llama",
            "text.parquet",
            "4bit-32g",
            "--seq-len=8",
            "-1",
            ".",
        ];
        assert_eq!(short.map(without_way), expected);
    }
}
