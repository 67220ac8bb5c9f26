//! The command as it was typed, for reports.

use std::{env, path::Path};

use gptq::hub::Reference;

/// Every word of the command; of paths only the last name, so that published files do not show the machine's folders.
pub(super) fn words() -> Vec<String> {
    let mut words = vec!["gptq".to_owned()];
    words.extend(env::args_os().skip(1).map(|word| without_way(&word.to_string_lossy())));
    words
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
