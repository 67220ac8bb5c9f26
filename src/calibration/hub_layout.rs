//! Places of a dataset repository's files on this machine.

use super::recipe::Recipe;
use crate::error::{Error, Result, quoted};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A recipe's files, found.
pub(super) struct Located {
    /// The folder of the repository's root.
    pub(super) root: PathBuf,
    /// The commit, if a Hugging Face cache records it.
    pub(super) revision: Option<String>,
}

/// Looks for all files of a recipe below each root in turn. A root is a folder with the repository in it (`wikitext/` or
/// `Salesforce/wikitext/`), the repository itself, or the `hub` folder of a Hugging Face cache. In a cache the recipe's
/// revision comes first, then the one of `main` at the download.
pub(super) fn locate(recipe: &Recipe, roots: &[PathBuf]) -> Result<Located> {
    let paths = recipe.paths();
    let complete = |place: &Located| paths.iter().all(|path| place.root.join(path).is_file());
    if let Some(found) = roots.iter().flat_map(|root| candidates(recipe, root)).find(complete) {
        return Ok(found);
    }
    let places = match roots {
        [] => "no folder, as none was given".into(),
        _ => quoted(roots.iter().map(|root| root.display())),
    };
    let (name, fetch) = (recipe.name().to_owned(), recipe.fetch_command());
    Err(Error::DatasetNotFound { name, files: quoted(paths), places, fetch })
}

fn candidates(recipe: &Recipe, root: &Path) -> Vec<Located> {
    let cache = root.join(format!("datasets--{}", recipe.repository().replace('/', "--")));
    let reference = |name: &str| fs::read_to_string(cache.join("refs").join(name)).ok();
    let commits = [Some(recipe.revision().to_owned()), reference(recipe.revision()), reference("main")];
    let snapshots = commits.into_iter().flatten().map(|commit| {
        let commit = commit.trim().to_owned();
        Located { root: cache.join("snapshots").join(&commit), revision: Some(commit) }
    });
    let name = recipe.repository().rsplit('/').next().unwrap_or_default();
    let folders = [root.join(name), root.join(recipe.repository()), root.to_owned()];
    snapshots.chain(folders.map(|root| Located { root, revision: None })).collect()
}

/// Depth of folders that are looked into: `CONFIGURATION/SPLIT/0000.parquet`.
const DEEPEST: usize = 2;

/// One file of a split. The Hub names it `train-00000-of-00001.parquet`, possibly with a hash after the count; its converter
/// `0000.parquet`; Spark `part-00000-….parquet`. It can also be `train.parquet`.
#[derive(Debug, PartialEq, Eq)]
struct Shard {
    /// `None` if the folder's name is the split.
    split: Option<String>,
    /// The number in the name, where numbers must be without gaps: Spark leaves some out.
    index: Option<usize>,
    /// Number of files of the split, if the name has it.
    count: Option<usize>,
}

impl Shard {
    fn parse(file_name: &str) -> Option<Self> {
        let stem = file_name.strip_suffix(".parquet")?;
        let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if stem.is_empty() || stem.starts_with(['.', '_']) {
            return None;
        }
        if let Some(shard) = Self::of_hub(stem) {
            return Some(shard);
        }
        if is_number(stem) {
            return Some(Self { split: None, index: stem.parse().ok(), count: None });
        }
        let spark =
            stem.strip_prefix("part-").and_then(|rest| rest.split(['-', '.']).next()).is_some_and(is_number);
        Some(match spark {
            true => Self { split: None, index: None, count: None },
            false => Self { split: Some(stem.into()), index: None, count: Some(1) },
        })
    }

    fn of_hub(stem: &str) -> Option<Self> {
        let number = |digits: &str| (digits.len() == 5).then(|| digits.parse().ok()).flatten();
        let (front, count) = stem.rsplit_once("-of-")?;
        let (split, index) = front.rsplit_once('-')?;
        let (count, hash) = count.split_once('-').unwrap_or((count, ""));
        let named = !split.is_empty() && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
        named.then_some(())?;
        Some(Self { split: Some(split.to_owned()), index: Some(number(index)?), count: Some(number(count)?) })
    }
}

/// The files of one split of a folder of parquet files, in order, as paths below `folder`. The default split is `train`, or the
/// only one.
pub(super) fn split_files(folder: &Path, name: &str, split: Option<&str>) -> Result<Vec<String>> {
    let mut splits = splits_of(folder, name)?;
    let known = quoted(splits.keys());
    let only = if splits.len() == 1 { splits.keys().next().cloned() } else { None };
    let default = if splits.contains_key("train") { Some("train".to_owned()) } else { only };
    let wanted = split.map(str::to_owned).or(default);
    let Some((split, shards)) = wanted.as_ref().and_then(|wanted| splits.remove_entry(wanted)) else {
        return Err(Error::Value {
            what: format!("split of `{name}`"),
            expected: if splits.len() == 1 { known } else { format!("one of {known}") },
            found: wanted.unwrap_or_else(|| "none".into()),
        });
    };
    let total = shards.len();
    let in_place = |(at, (shard, _)): (usize, &(Shard, String))| {
        shard.index.is_none_or(|index| index == at) && shard.count.is_none_or(|count| count == total)
    };
    if !shards.iter().enumerate().all(in_place) {
        let names = quoted(shards.iter().map(|(_, name)| name));
        let count = shards.iter().filter_map(|(shard, _)| shard.count).max();
        let count = count.map_or_else(String::new, |count| format!("{count} files, "));
        return Err(Error::Dataset {
            path: folder.into(),
            problem: format!("split `{split}` should be {count}numbered from 0, and is {names}"),
        });
    }
    Ok(shards.into_iter().map(|(_, file)| file).collect())
}

/// Files of each split, as paths below the folder.
type Splits = BTreeMap<String, Vec<(Shard, String)>>;

/// The splits in the folder itself, in folders of it with a split each, or in its one configuration folder.
fn splits_of(folder: &Path, name: &str) -> Result<Splits> {
    let mut found = layouts(folder, name, "", DEEPEST)?;
    match found.len() {
        1 => Ok(found.remove(0).1),
        0 => {
            let (files, folders) = entries(folder)?;
            let beside = match files.len() + folders.len() {
                0 => "it is empty".to_owned(),
                count => {
                    let named = quoted(files.iter().chain(&folders).take(3));
                    format!("it has {named}{}", if count > 3 { " and more" } else { "" })
                }
            };
            let problem = format!(
                "neither it nor a folder in it has parquet files (`train-00000-of-00001.parquet`, `part-00000-….parquet`, \
                 `train/0000.parquet`, `train.parquet`); {beside}"
            );
            Err(Error::Dataset { path: folder.into(), problem })
        }
        _ => Err(Error::Value {
            what: format!("dataset `{name}`"),
            expected: "a folder with one configuration (name one of its folders instead)".into(),
            found: found.into_iter().map(|(below, _)| below).collect::<Vec<_>>().join("`, `"),
        }),
    }
}

/// The configurations in the folder at `below`, each with its path below `root`. `name` is the folder's, which is the split of
/// files without one in their names.
fn layouts(root: &Path, name: &str, below: &str, deepest: usize) -> Result<Vec<(String, Splits)>> {
    let (files, folders) = entries(&root.join(below))?;
    let path = |name: &str| if below.is_empty() { name.to_owned() } else { format!("{below}/{name}") };
    let mut here = Splits::new();
    for file in files {
        if let Some(shard) = Shard::parse(&file) {
            let split = shard.split.clone().unwrap_or_else(|| name.to_owned());
            here.entry(split).or_default().push((shard, path(&file)));
        }
    }
    if !here.is_empty() {
        here.values_mut().for_each(|shards| shards.sort_by(|a, b| (a.0.index, &a.1).cmp(&(b.0.index, &b.1))));
        return Ok(vec![(below.to_owned(), here)]);
    }
    let Some(deepest) = deepest.checked_sub(1) else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for folder in folders.iter().filter(|folder| !folder.starts_with(['.', '_'])) {
        found.extend(layouts(root, folder, &path(folder), deepest)?);
    }
    // Folders that are a split each are one configuration together.
    let is_split = |(at, splits): &(String, Splits)| {
        splits.len() == 1 && splits.keys().all(|split| at.rsplit('/').next() == Some(split))
    };
    if !found.is_empty() && found.iter().all(is_split) {
        return Ok(vec![(below.to_owned(), found.into_iter().flat_map(|(_, splits)| splits).collect())]);
    }
    Ok(found)
}

/// The names of the files and of the folders in a folder, sorted.
fn entries(folder: &Path) -> Result<(Vec<String>, Vec<String>)> {
    let (mut files, mut folders) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        // Names on the Hub are Unicode.
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        // Files in a Hugging Face cache are links; `is_dir` follows them.
        if path.is_dir() { folders.push(name.to_owned()) } else { files.push(name.to_owned()) }
    }
    files.sort();
    folders.sort();
    Ok((files, folders))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    fn folder(files: &[&str]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        folder
    }

    fn files_of(folder: &TempDir, split: Option<&str>) -> Result<Vec<String>, String> {
        split_files(folder.path(), "texts", split)
            .map_err(|error| error.to_string().replace(&folder.path().display().to_string(), "DIR"))
    }

    #[test]
    fn shard_names() {
        let shard = |name| Shard::parse(name).map(|shard| (shard.split, shard.index, shard.count));
        let named = |split: &str, index, count| Some((Some(split.to_owned()), index, count));
        assert_eq!(shard("train-00002-of-00010.parquet"), named("train", Some(2), Some(10)));
        assert_eq!(shard("a-b-00000-of-00001-a09b74b3ef9c3b56.parquet"), named("a-b", Some(0), Some(1)));
        assert_eq!(shard("train.parquet"), named("train", None, Some(1)));
        assert_eq!(shard("0012.parquet"), Some((None, Some(12), None)));
        let spark = "part-00003-8a2c46b5-1f0e-4d0b-9a63-0d2b5c4f7e11-c000.snappy.parquet";
        assert_eq!(shard(spark), Some((None, None, None)));
        for other in
            ["train-00000-of-00001.json", ".parquet", "_metadata.parquet", ".part-0.parquet", "a.parquet.crc"]
        {
            assert_eq!(shard(other), None, "{other}");
        }
    }

    #[test]
    fn folders_as_spark_and_the_converter_of_the_hub_name_them() {
        let spark = ["part-00000-8a2c-c000.snappy.parquet", "part-00002-8a2c-c000.snappy.parquet"];
        assert_eq!(
            files_of(&folder(&[spark[1], "_SUCCESS", spark[0], ".part-0.parquet.crc"]), None).unwrap(),
            spark
        );

        let below = folder(&["test/0000.parquet", "train/0001.parquet", "train/0000.parquet", "README.md"]);
        assert_eq!(files_of(&below, None).unwrap(), ["train/0000.parquet", "train/0001.parquet"]);
        assert_eq!(files_of(&below, Some("test")).unwrap(), ["test/0000.parquet"]);
        let converted = folder(&["default/train/0000.parquet", "default/test/0000.parquet"]);
        assert_eq!(files_of(&converted, None).unwrap(), ["default/train/0000.parquet"]);
        let alone = folder(&["default/train/0000.parquet"]);
        assert_eq!(files_of(&alone, None).unwrap(), ["default/train/0000.parquet"]);
        let whole = folder(&["train.parquet", "validation.parquet"]);
        assert_eq!(files_of(&whole, Some("validation")).unwrap(), ["validation.parquet"]);
        assert_eq!(
            files_of(&folder(&["train/0000.parquet", "train/0002.parquet"]), None).unwrap_err(),
            "`DIR`: split `train` should be numbered from 0, and is `train/0000.parquet`, `train/0002.parquet`"
        );
    }

    #[test]
    fn a_folder_of_splits_or_with_one_configuration() {
        let here = folder(&["train-00001-of-00002.parquet", "train-00000-of-00002.parquet", "README.md"]);
        let train = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"];
        assert_eq!(files_of(&here, None).unwrap(), train);
        assert_eq!(files_of(&here, Some("train")).unwrap(), train);

        let below =
            folder(&["raw/test-00000-of-00001.parquet", "raw/validation-00000-of-00001.parquet", "doc/a.md"]);
        assert_eq!(files_of(&below, Some("test")).unwrap(), ["raw/test-00000-of-00001.parquet"]);
        assert_eq!(
            files_of(&below, None).unwrap_err(),
            "split of `texts`: expected one of `test`, `validation`, found `none`"
        );
        let hint = split_files(below.path(), "texts", None).unwrap_err().hint();
        assert_eq!(hint.as_deref(), Some("name a split with --split"));
        assert_eq!(
            files_of(&below, Some("train")).unwrap_err(),
            "split of `texts`: expected one of `test`, `validation`, found `train`"
        );

        let only = folder(&["test-00000-of-00001.parquet"]);
        assert_eq!(files_of(&only, None).unwrap(), ["test-00000-of-00001.parquet"]);
        assert_eq!(files_of(&only, Some("x")).unwrap_err(), "split of `texts`: expected `test`, found `x`");
    }

    #[test]
    fn folders_that_are_not_one_dataset() {
        assert_eq!(
            files_of(&folder(&["a.txt", "b/c.txt"]), None).unwrap_err(),
            "`DIR`: neither it nor a folder in it has parquet files (`train-00000-of-00001.parquet`, `part-00000-….parquet`, \
             `train/0000.parquet`, `train.parquet`); it has `a.txt`, `b`"
        );
        assert_eq!(
            files_of(&folder(&["a/train-00000-of-00001.parquet", "b/train-00000-of-00001.parquet"]), None)
                .unwrap_err(),
            "dataset `texts`: expected a folder with one configuration (name one of its folders instead), \
             found `a`, `b`"
        );
        assert_eq!(
            files_of(&folder(&["a/train-00000-of-00003.parquet", "a/train-00002-of-00003.parquet"]), None)
                .unwrap_err(),
            "`DIR`: split `train` should be 3 files, numbered from 0, and is `a/train-00000-of-00003.parquet`, \
             `a/train-00002-of-00003.parquet`"
        );
    }

    #[test]
    fn a_recipe_is_found_in_every_layout() {
        let recipe = Recipe::builtin("wikitext2-test").unwrap();
        let file = "wikitext-2-raw-v1/test-00000-of-00001.parquet";
        let found = |place: &str, extra: &[(&str, &str)]| {
            let root = folder(&[&format!("{place}{file}")]);
            for (path, content) in extra {
                fs::create_dir_all(root.path().join(path).parent().unwrap()).unwrap();
                fs::write(root.path().join(path), content).unwrap();
            }
            let located = locate(&recipe, &["/nowhere".into(), root.path().into()]).ok()?;
            assert!(located.root.join(file).is_file());
            Some((
                located.root.strip_prefix(root.path()).unwrap().to_str().unwrap().to_owned(),
                located.revision,
            ))
        };
        for place in ["", "wikitext", "Salesforce/wikitext"] {
            let below = if place.is_empty() { String::new() } else { format!("{place}/") };
            assert_eq!(found(&below, &[]), Some((place.to_owned(), None)));
        }
        let cache = "datasets--Salesforce--wikitext";
        let pinned = format!("{cache}/snapshots/{}", recipe.revision());
        assert_eq!(found(&format!("{pinned}/"), &[]), Some((pinned, Some(recipe.revision().to_owned()))));
        let main = format!("{cache}/refs/main");
        let other = format!("{cache}/snapshots/abc");
        assert_eq!(
            found(&format!("{other}/"), &[(&main, "abc\n")]),
            Some((other.clone(), Some("abc".into())))
        );
        assert_eq!(found(&format!("{other}/"), &[]), None);
        assert_eq!(found("wikitext/other/", &[]), None);
    }

    #[test]
    fn a_recipe_that_is_not_here_names_files_places_and_command() {
        let recipe = Recipe::builtin("wikitext2").unwrap();
        let Err(error) = locate(&recipe, &["/nowhere".into(), "/no/hub".into()]) else { unreachable!() };
        assert_eq!(
            error.to_string(),
            "the files of dataset `wikitext2` are not on this machine: looked for \
             `wikitext-2-raw-v1/train-00000-of-00001.parquet` in `/nowhere`, `/no/hub`"
        );
        assert_eq!(
            error.hint().unwrap(),
            "hf download Salesforce/wikitext wikitext-2-raw-v1/train-00000-of-00001.parquet --repo-type dataset \
             --revision b08601e04326c79dfdd32d625aee71d232d685c3"
        );
        let Err(error) = locate(&recipe, &[]) else { unreachable!() };
        assert!(error.to_string().ends_with(" in no folder, as none was given"), "{error}");
    }
}
