//! Finds and reads the files of a dataset.

use super::corpus::{Corpus, Provenance, ProvenanceFile, Rows};
use super::recipe::{Recipe, Sampling};
use super::text_rows::Packing;
use super::{hub_layout, parquet_rows, text_rows};
use crate::chat::ChatTemplate;
use crate::error::{Error, Result};
use crate::folder;
use crate::units::hex;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// Options of a dataset beside its name.
#[derive(Debug, Clone, Default)]
pub struct SourceOptions {
    /// The column (or JSON key) of the text or the messages, instead of the recipe's. For local files the default is `text`,
    /// then `messages`, `conversations`, and `prompt` with `completion`.
    pub text_column: Option<String>,
    /// The split of a folder of parquet files.
    pub split: Option<String>,
    /// Folders in which a recipe's files are looked for: dataset repositories or folders of them, or the
    /// `hub` folder of a Hugging Face cache.
    pub roots: Vec<PathBuf>,
    /// Bytes of memory that the rows may take.
    pub max_memory: Option<u64>,
}

/// A dataset whose files are on this machine, not read yet.
#[derive(Debug, Clone)]
pub struct CorpusSource {
    name: String,
    recipe: Option<Recipe>,
    revision: Option<String>,
    root: PathBuf,
    /// Whether the user named a file, not a folder or a recipe.
    single_file: bool,
    /// Below `root`.
    files: Vec<(String, Format)>,
    /// As the user or the recipe names it.
    text_column: Option<String>,
    sampling: Sampling,
    max_memory: Option<u64>,
}

impl CorpusSource {
    /// Finds the files of a recipe or a text.
    ///
    /// It takes the name of a built-in recipe, a recipe file (`….toml`), a text file, or a folder of parquet files with the Hub's
    /// names. Text files are `.parquet`, `.txt`, `.jsonl` and `.json`, all but the first also with `.gz` or `.zst`. A
    /// recipe's name goes before a file of the same name: write `./wikitext2` for the file.
    pub fn resolve(name_or_path: &str, options: &SourceOptions) -> Result<CorpusSource> {
        Ok(Self { max_memory: options.max_memory, ..Self::find(name_or_path, options)? })
    }

    fn find(name_or_path: &str, options: &SourceOptions) -> Result<CorpusSource> {
        if let Some(recipe) = Recipe::builtin(name_or_path) {
            return Self::of_recipe(recipe, options);
        }
        let path = Path::new(name_or_path);
        if name_or_path.is_empty() || !path.exists() {
            return Err(Error::UnknownDataset { name: name_or_path.into(), known: Recipe::names() });
        }
        if path.is_dir() {
            Self::of_folder(path, options)
        } else if path.extension().is_some_and(|extension| extension == "toml") {
            Self::of_recipe(Recipe::read(path)?, options)
        } else {
            Self::of_file(path, options)
        }
    }

    fn of_recipe(recipe: Recipe, options: &SourceOptions) -> Result<Self> {
        if let Some(split) = options.split.as_ref().filter(|split| *split != recipe.split()) {
            let what = format!("split of recipe `{}`", recipe.name());
            let expected = format!("`{}`", recipe.split());
            return Err(Error::Value { what, expected, found: split.clone() });
        }
        let mut files = Vec::new();
        for path in recipe.paths() {
            let format = Format::of(Path::new(&path))?;
            files.push((path, format));
        }
        let hub_layout::Located { root, revision } = hub_layout::locate(&recipe, &options.roots)?;
        let column = options.text_column.clone().unwrap_or_else(|| recipe.text_column().to_owned());
        Ok(Self {
            name: recipe.name().to_owned(),
            revision,
            root,
            single_file: false,
            files,
            text_column: Some(column),
            sampling: recipe.sampling().clone(),
            max_memory: None,
            recipe: Some(recipe),
        })
    }

    fn of_folder(path: &Path, options: &SourceOptions) -> Result<Self> {
        let name = last_name(path);
        let files = hub_layout::split_files(path, &name, options.split.as_deref())?;
        let files = files.into_iter().map(|file| (file, Format::Parquet)).collect();
        Ok(Self::local(name, path.into(), false, files, options.text_column.clone()))
    }

    fn of_file(path: &Path, options: &SourceOptions) -> Result<Self> {
        let name = last_name(path);
        let format = Format::of(path)?;
        let none = |option: &str, found: &Option<String>| match found {
            Some(found) => Err(Error::Value {
                what: format!("{option} of `{name}`"),
                expected: "none, as the file has none".into(),
                found: found.clone(),
            }),
            None => Ok(()),
        };
        none("split", &options.split)?;
        if let Format::Text(_) = format {
            none("text column", &options.text_column)?;
        }
        let root = path.parent().unwrap_or(Path::new("")).to_owned();
        Ok(Self::local(name.clone(), root, true, vec![(name, format)], options.text_column.clone()))
    }

    fn local(
        name: String,
        root: PathBuf,
        single_file: bool,
        files: Vec<(String, Format)>,
        text_column: Option<String>,
    ) -> Self {
        let sampling = Sampling::joined_by_empty_line();
        let (recipe, revision, max_memory) = (None, None, None);
        Self { name, recipe, revision, root, single_file, files, text_column, sampling, max_memory }
    }

    /// The recipe's name, or the name of the file or folder without its path.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The recipe, if it is one.
    pub fn recipe(&self) -> Option<&Recipe> {
        self.recipe.as_ref()
    }

    /// Reads the files. `chat` is the model's chat template, for rows that are conversations.
    ///
    /// # Errors
    /// When a file cannot be read or holds no text, or conversations are there and no template.
    pub fn load(&self, chat: Option<&ChatTemplate>) -> Result<Corpus> {
        let mut rows = Rows::new(&self.sampling, chat).within(self.max_memory);
        let mut files = Vec::new();
        for (name, format) in &self.files {
            // A file that the user named may be a link to anywhere; files of a folder may not.
            let path = match self.single_file {
                true => self.root.join(name),
                false => folder::file_in(&self.root, name)?,
            };
            check_no_pointer(&path)?;
            let column = self.text_column.as_deref();
            match format {
                Format::Parquet => {
                    let open = || File::open(&path).map_err(Error::io("read", &path));
                    parquet_rows::read([open()?, open()?], &path, column, &mut rows)?;
                }
                Format::Text(packing) => text_rows::read_text(&path, *packing, &mut rows)?,
                Format::Json(packing) => text_rows::read_json(&path, *packing, column, &mut rows)?,
            }
            files.push(ProvenanceFile { name: name.clone(), sha256: sha256_of(&path)? });
        }
        rows.into_corpus(Provenance {
            repository: self.recipe.as_ref().map(|recipe| recipe.repository().to_owned()),
            revision: self.revision.clone(),
            files,
            text_column: self.text_column.clone(),
            ..Provenance::local(&self.name)
        })
    }
}

/// Format of a file, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Parquet,
    Text(Packing),
    Json(Packing),
}

impl Format {
    fn of(path: &Path) -> Result<Self> {
        let name = path.to_string_lossy().to_ascii_lowercase();
        let packed = [(".gz", Packing::Gzip), (".zst", Packing::Zstd)];
        let packed = packed.into_iter().find_map(|(end, packing)| Some((name.strip_suffix(end)?, packing)));
        let (name, packing) = packed.unwrap_or((name.as_str(), Packing::None));
        match Path::new(name).extension().and_then(|extension| extension.to_str()) {
            Some("parquet") if packing == Packing::None => Ok(Self::Parquet),
            Some("txt") => Ok(Self::Text(packing)),
            Some("jsonl" | "json") => Ok(Self::Json(packing)),
            _ => Err(Error::Dataset {
                path: path.into(),
                problem: "its name must end in .parquet, .txt, .jsonl, .json or .toml; .txt, .jsonl and .json may be \
                          packed as .gz or .zst"
                    .into(),
            }),
        }
    }
}

/// The last part of a path, also of `.` and `..`.
fn last_name(path: &Path) -> String {
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    name(path).or_else(|| name(&path.canonicalize().ok()?)).unwrap_or_else(|| "folder".into())
}

/// Refuses a pointer of git-lfs, which would be read as a text.
fn check_no_pointer(path: &Path) -> Result<()> {
    let mut beginning = Vec::new();
    let file = File::open(path).map_err(Error::io("read", path))?;
    file.take(64).read_to_end(&mut beginning).map_err(Error::io("read", path))?;
    folder::check_not_pointer(path, &beginning)
}

fn sha256_of(path: &Path) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut file = BufReader::with_capacity(1 << 20, File::open(path).map_err(Error::io("read", path))?);
    loop {
        let bytes = file.fill_buf().map_err(Error::io("read", path))?;
        if bytes.is_empty() {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(bytes);
        let read = bytes.len();
        file.consume(read);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::calibration::test_support::demo;

    fn resolve(name: &str, options: &SourceOptions) -> Result<CorpusSource, String> {
        CorpusSource::resolve(name, options).map_err(|error| error.to_string())
    }

    fn options(text_column: Option<&str>, split: Option<&str>) -> SourceOptions {
        let own = |option: Option<&str>| option.map(str::to_owned);
        SourceOptions { text_column: own(text_column), split: own(split), ..Default::default() }
    }

    #[test]
    fn neither_a_recipe_nor_a_file() {
        let known =
            "is neither a recipe (wikitext2, wikitext2-test, c4, ultrachat, smoltalk) nor a file or folder";
        for name in ["wikitext", "", "/no/such/file.txt"] {
            let error = resolve(name, &SourceOptions::default()).unwrap_err();
            assert_eq!(error, format!("dataset `{name}` {known}"));
        }
    }

    #[test]
    fn a_recipe_reads_its_files_from_a_root() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("wikitext/wikitext-2-raw-v1");
        fs::create_dir_all(&folder).unwrap();
        fs::copy(demo().join("calibration.parquet"), folder.join("train-00000-of-00001.parquet")).unwrap();
        let options = SourceOptions { roots: vec![root.path().into()], ..Default::default() };
        let source = resolve("wikitext2", &options).unwrap();
        assert_eq!((source.name(), source.recipe().unwrap().evaluate()), ("wikitext2", "wikitext2-test"));

        let corpus = source.load(None).unwrap();
        let provenance = corpus.provenance();
        assert_eq!(provenance.files[0].name, "wikitext-2-raw-v1/train-00000-of-00001.parquet");
        assert_eq!(provenance.repository.as_deref(), Some("Salesforce/wikitext"));
        assert_eq!(provenance.revision, None);
        // No path of this machine goes into the report.
        let json = serde_json::to_string(provenance).unwrap();
        assert!(!json.contains(root.path().to_str().unwrap()), "{json}");

        let column = SourceOptions { text_column: Some("body".into()), ..options.clone() };
        let error = resolve("wikitext2", &column).unwrap().load(None).unwrap_err().to_string();
        assert!(error.ends_with("has no text column `body` (columns: text)"), "{error}");
        let split = SourceOptions { split: Some("test".into()), ..options };
        assert_eq!(
            resolve("wikitext2", &split).unwrap_err(),
            "split of recipe `wikitext2`: expected `train`, found `test`"
        );
    }

    #[test]
    fn a_folder_is_joined_in_the_order_of_its_files() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("texts/plain");
        fs::create_dir_all(&folder).unwrap();
        for (file, number) in [("evaluation", 0), ("calibration", 1)] {
            let to = folder.join(format!("train-0000{number}-of-00002.parquet"));
            fs::copy(demo().join(format!("{file}.parquet")), to).unwrap();
        }
        let load = |path: PathBuf| {
            resolve(path.to_str().unwrap(), &options(None, None)).unwrap().load(None).unwrap()
        };
        let both = load(root.path().join("texts"));
        let parts = ["evaluation", "calibration"].map(|file| load(demo().join(format!("{file}.parquet"))));
        assert_eq!(both.text(), format!("{}\n\n{}", parts[0].text(), parts[1].text()));
        assert_eq!(both.name(), "texts");
        let names: Vec<_> = both.provenance().files.iter().map(|file| &file.name[..]).collect();
        assert_eq!(names, ["plain/train-00000-of-00002.parquet", "plain/train-00001-of-00002.parquet"]);
        assert_eq!(both.provenance().files[1].sha256, parts[1].provenance().files[0].sha256);
    }

    #[test]
    fn options_that_do_not_fit_and_other_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| {
            let path = folder.path().join(name);
            fs::write(&path, "x").unwrap();
            path.to_str().unwrap().to_owned()
        };
        assert_eq!(
            resolve(&path("a.txt"), &options(Some("body"), None)).unwrap_err(),
            "text column of `a.txt`: expected none, as the file has none, found `body`"
        );
        assert_eq!(
            resolve(&path("a.jsonl"), &options(None, Some("test"))).unwrap_err(),
            "split of `a.jsonl`: expected none, as the file has none, found `test`"
        );
        for name in ["a.csv", "a.parquet.gz", "a"] {
            let error = resolve(&path(name), &options(None, None)).unwrap_err();
            assert!(error.contains("its name must end in .parquet, .txt"), "{error}");
        }
    }

    #[test]
    fn pointers_of_git_lfs_are_no_text() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.parquet", "a.txt", "a.jsonl", "a.json.gz", "a.txt.zst"] {
            let path = folder.path().join(name);
            fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n").unwrap();
            let source = resolve(path.to_str().unwrap(), &options(None, None)).unwrap();
            assert!(
                matches!(source.load(None), Err(Error::LfsPointer { path: found }) if found == path),
                "{name}"
            );
        }
    }

    #[test]
    fn a_recipe_file_of_ones_own() {
        let folder = tempfile::tempdir().unwrap();
        let recipe = "repository = 'me/texts'\nrevision = 'main'\nconfig = ''\nsplit = 'train'\nfiles = ['a.txt']\n\
                      text_column = 'text'\nsampling = 'stream'\njoin = ''\nevaluate = 'mine'\n";
        fs::write(folder.path().join("mine.toml"), recipe).unwrap();
        fs::write(folder.path().join("a.txt"), "some text").unwrap();
        let options = SourceOptions { roots: vec![folder.path().into()], ..Default::default() };
        let source = resolve(folder.path().join("mine.toml").to_str().unwrap(), &options).unwrap();
        assert_eq!((source.name(), source.load(None).unwrap().text()), ("mine", "some text"));
    }

    #[test]
    fn names_are_without_the_way_to_them() {
        assert_eq!(last_name(Path::new("/a/b.txt")), "b.txt");
        assert_eq!(last_name(Path::new("/a/b/")), "b");
        assert!(!last_name(Path::new(".")).contains(['/', '.']));
    }
}
