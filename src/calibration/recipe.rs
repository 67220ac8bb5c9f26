//! Dataset recipes: which files of which repository hold the text, and how it becomes windows.
//!
//! The built-in ones are the TOML files in `calibration/` at the top of the repository; a recipe file of the user has the same
//! keys.

use crate::error::{Error, Result, toml_error};
use crate::folder;
use serde::{Deserialize, Serialize};
use std::path::{Component, Path};

/// A dataset: a repository on the Hub, its files, and the rule that turns them into windows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    name: String,
    keys: Keys,
    sampling: Sampling,
}

/// Rule that makes windows of the rows of a dataset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "sampling")]
pub enum Sampling {
    /// The rows are joined into one text, tokenized once, and windows are cut from it anywhere.
    Stream {
        /// The text between two rows.
        join: String,
    },
    /// Each window is cut from one row that has more tokens than the window; only drawn rows are tokenized.
    Documents,
    /// Rows are conversations, rendered with the model's chat template. They are drawn in random order and tokenized one by
    /// one without further special tokens; windows are cut from them one after another.
    Conversations,
}

impl Sampling {
    /// The rule for local files and for WikiText: rows joined with an empty line.
    pub fn joined_by_empty_line() -> Self {
        Self::Stream { join: "\n\n".into() }
    }
}

/// The keys of a recipe file, as written.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Keys {
    repository: String,
    revision: String,
    config: String,
    split: String,
    files: Vec<String>,
    text_column: String,
    sampling: String,
    join: Option<String>,
    evaluate: String,
}

const KEYS: [&str; 9] =
    ["repository", "revision", "config", "split", "files", "text_column", "sampling", "join", "evaluate"];

/// Name and text of each built-in recipe, in the order they are listed.
const BUILTIN: [(&str, &str); 5] = [
    ("wikitext2", include_str!("../../calibration/wikitext2.toml")),
    ("wikitext2-test", include_str!("../../calibration/wikitext2-test.toml")),
    ("c4", include_str!("../../calibration/c4.toml")),
    ("ultrachat", include_str!("../../calibration/ultrachat.toml")),
    ("smoltalk", include_str!("../../calibration/smoltalk.toml")),
];

impl Recipe {
    /// The built-in recipe of that name.
    pub fn builtin(name: &str) -> Option<Recipe> {
        let (name, text) = BUILTIN.iter().find(|(known, _)| *known == name)?;
        let path = format!("calibration/{name}.toml");
        Some(Self::from_toml(path, text).expect("the built-in recipes are correct; a test reads them all"))
    }

    /// The recipe in a file.
    ///
    /// # Errors
    /// When it cannot be read, or is none.
    pub fn read(path: &Path) -> Result<Recipe> {
        Self::from_toml(path, &folder::read_text(path)?)
    }

    /// The names of the built-in recipes, for messages: `wikitext2, wikitext2-test, …`.
    pub(super) fn names() -> String {
        BUILTIN.map(|(name, _)| name).join(", ")
    }

    /// Parses a recipe; its name is that of the file without `.toml`. `path` gives the name and is named in errors; the file is
    /// not read.
    pub fn from_toml(path: impl AsRef<Path>, text: &str) -> Result<Recipe> {
        let path = path.as_ref();
        let table: toml::Table = toml::from_str(text).map_err(|error| toml_error(path, text, &error))?;
        if let Some(key) = table.keys().find(|key| !KEYS.contains(&key.as_str())) {
            return Err(Error::UnknownKey { path: path.into(), key: key.clone(), nearest: nearest_key(key) });
        }
        let keys: Keys = toml::from_str(text).map_err(|error| toml_error(path, text, &error))?;
        let name = path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let refuse = |key: &str, expected: &str, found: &str| Error::Value {
            what: format!("key `{key}` of recipe `{name}`"),
            expected: expected.to_owned(),
            found: found.to_owned(),
        };

        if keys.repository.split('/').filter(|part| is_plain(part)).count() != 2
            || !is_plain(&keys.repository)
        {
            return Err(refuse("repository", "`owner/name`", &keys.repository));
        }
        if !is_plain(&keys.revision) {
            return Err(refuse("revision", "a commit, tag or branch", &keys.revision));
        }
        if !keys.config.is_empty() && !is_plain(&keys.config) {
            return Err(refuse("config", "a folder of the repository, or nothing", &keys.config));
        }
        if keys.files.is_empty() {
            return Err(refuse("files", "at least one file", "[]"));
        }
        if let Some(file) = keys.files.iter().find(|file| !is_plain(file)) {
            return Err(refuse("files", "paths below the config folder", file));
        }
        let sampling = match (keys.sampling.as_str(), &keys.join) {
            ("stream", Some(join)) => Sampling::Stream { join: join.clone() },
            ("stream", None) => return Err(refuse("join", "a string, as sampling is `stream`", "nothing")),
            ("documents", None) => Sampling::Documents,
            ("conversations", None) => Sampling::Conversations,
            (whole @ ("documents" | "conversations"), Some(join)) => {
                let expected = format!("nothing, as sampling is `{whole}`");
                return Err(refuse("join", &expected, &join.escape_debug().to_string()));
            }
            (other, _) => {
                return Err(refuse("sampling", "`stream`, `documents` or `conversations`", other));
            }
        };
        if keys.evaluate != name && !BUILTIN.iter().any(|(known, _)| *known == keys.evaluate) {
            let expected = format!("a recipe ({}) or `{name}`", Self::names());
            return Err(refuse("evaluate", &expected, &keys.evaluate));
        }
        Ok(Recipe { name, keys, sampling })
    }

    /// The name the user gives: `wikitext2`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The dataset repository on the Hub: `Salesforce/wikitext`.
    pub fn repository(&self) -> &str {
        &self.keys.repository
    }

    /// The commit, tag or branch of the repository.
    pub fn revision(&self) -> &str {
        &self.keys.revision
    }

    /// The split its files hold: `train`.
    pub fn split(&self) -> &str {
        &self.keys.split
    }

    /// Its files as paths below the repository's root: `wikitext-2-raw-v1/train-00000-of-00001.parquet`.
    pub fn paths(&self) -> Vec<String> {
        let Keys { config, files, .. } = &self.keys;
        let below = |file: &String| if config.is_empty() { file.clone() } else { format!("{config}/{file}") };
        files.iter().map(below).collect()
    }

    /// The column (or JSON key) with the text.
    pub fn text_column(&self) -> &str {
        &self.keys.text_column
    }

    /// Rule that makes windows of its rows.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// The recipe that perplexity is measured with after calibrating with this one.
    pub fn evaluate(&self) -> &str {
        &self.keys.evaluate
    }

    /// The command that brings its files into the Hugging Face cache.
    pub fn fetch_command(&self) -> String {
        format!(
            "hf download {} {} --repo-type dataset --revision {}",
            self.repository(),
            self.paths().join(" "),
            self.revision()
        )
    }
}

/// Whether `path` is relative and stays below where it starts.
fn is_plain(path: &str) -> bool {
    !path.is_empty() && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}

fn nearest_key(key: &str) -> Option<String> {
    // Words below this similarity are unrelated.
    const ALIKE: f64 = 0.75;
    let likeness = |known: &&str| strsim::jaro_winkler(known, key);
    let nearest = KEYS.into_iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?;
    (likeness(&nearest) >= ALIKE).then(|| nearest.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
repository = "someone/texts"
revision = "main"
config = ""
split = "train"
files = ["a.jsonl", "more/b.jsonl"]
text_column = "body"
sampling = "stream"
join = "\n"
evaluate = "mine"
"#;

    fn error(text: &str) -> String {
        Recipe::from_toml("some/where/mine.toml", text).unwrap_err().to_string()
    }

    #[test]
    fn built_in_recipes_are_correct_and_name_each_other() {
        let recipes = BUILTIN.map(|(name, _)| Recipe::builtin(name).unwrap());
        assert_eq!(
            recipes.iter().map(Recipe::name).collect::<Vec<_>>(),
            ["wikitext2", "wikitext2-test", "c4", "ultrachat", "smoltalk"]
        );
        let evaluate: Vec<_> = recipes.iter().map(Recipe::evaluate).collect();
        assert_eq!(evaluate, ["wikitext2-test"; 5]);
        assert!(Recipe::builtin("wikitext-2").is_none());

        let [train, test, c4, ultrachat, smoltalk] = &recipes;
        assert_eq!(train.paths(), ["wikitext-2-raw-v1/train-00000-of-00001.parquet"]);
        assert_eq!(test.paths(), ["wikitext-2-raw-v1/test-00000-of-00001.parquet"]);
        assert_eq!(c4.paths(), ["en/c4-train.00000-of-01024.json.gz"]);
        assert_eq!(train.sampling(), &Sampling::joined_by_empty_line());
        assert_eq!(c4.sampling(), &Sampling::Documents);
        assert_eq!([ultrachat, smoltalk].map(Recipe::sampling), [&Sampling::Conversations; 2]);
        assert_eq!(smoltalk.paths(), ["data/all/train-00000-of-00009.parquet"]);
        assert_eq!(
            c4.fetch_command(),
            "hf download allenai/c4 en/c4-train.00000-of-01024.json.gz --repo-type dataset \
             --revision 1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
        );
    }

    #[test]
    fn a_recipe_of_ones_own_is_named_after_its_file() {
        let recipe = Recipe::from_toml("some/where/mine.toml", GOOD).unwrap();
        assert_eq!(
            (recipe.name(), recipe.repository(), recipe.evaluate()),
            ("mine", "someone/texts", "mine")
        );
        assert_eq!(recipe.paths(), ["a.jsonl", "more/b.jsonl"]);
    }

    #[test]
    fn unknown_key_names_the_nearest() {
        let unknown = |line: &str| Recipe::from_toml("mine.toml", &format!("{GOOD}{line}\n")).unwrap_err();
        let near = unknown("text_colum = \"x\"");
        assert_eq!(near.to_string(), "unknown key `text_colum` in `mine.toml`");
        assert_eq!(near.hint().as_deref(), Some("did you mean `text_column`?"));
        assert!(matches!(unknown("zzz = 1"), Error::UnknownKey { nearest: None, .. }));
    }

    #[test]
    fn broken_toml_and_wrong_types_name_the_line() {
        let broken = error(&GOOD.replace("split = ", "split "));
        assert!(
            broken.starts_with("`some/where/mine.toml` is not the TOML expected here: line 5: "),
            "{broken}"
        );
        let wrong = error(&GOOD.replace("\"train\"", "3"));
        assert!(wrong.contains("line 5: invalid type: integer `3`"), "{wrong}");
        let missing = error(&GOOD.replace("split = \"train\"", ""));
        assert!(missing.contains("missing field `split`"), "{missing}");
    }

    #[test]
    fn values_that_cannot_work_are_refused() {
        let cases = [
            (
                "someone/texts",
                "texts",
                "key `repository` of recipe `mine`: expected `owner/name`, found `texts`",
            ),
            (
                "someone/texts",
                "a/b/c",
                "key `repository` of recipe `mine`: expected `owner/name`, found `a/b/c`",
            ),
            (
                "main",
                "../x",
                "key `revision` of recipe `mine`: expected a commit, tag or branch, found `../x`",
            ),
            (
                "more/b",
                "../b",
                "key `files` of recipe `mine`: expected paths below the config folder, found `../b.jsonl`",
            ),
            (
                "\"mine\"",
                "\"yours\"",
                "key `evaluate` of recipe `mine`: expected a recipe (wikitext2, wikitext2-test, c4, ultrachat, smoltalk) or `mine`, \
                 found `yours`",
            ),
            (
                "stream",
                "all",
                "key `sampling` of recipe `mine`: expected `stream`, `documents` or `conversations`, found `all`",
            ),
            (
                "stream",
                "documents",
                r"key `join` of recipe `mine`: expected nothing, as sampling is `documents`, found `\n`",
            ),
            (
                "join = \"\\n\"",
                "",
                "key `join` of recipe `mine`: expected a string, as sampling is `stream`, found `nothing`",
            ),
            (
                r#"["a.jsonl", "more/b.jsonl"]"#,
                "[]",
                "key `files` of recipe `mine`: expected at least one file, found `[]`",
            ),
        ];
        for (from, to, expected) in cases {
            assert!(GOOD.contains(from), "{from}");
            assert_eq!(error(&GOOD.replace(from, to)), expected);
        }
    }
}
