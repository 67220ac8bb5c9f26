//! The unquantized model's predictions on disk, so that another quantized model is compared without running it again.
//!
//! A file is named by a digest of its [`Key`] and has, after eight bytes of magic, a sequence of blocks: length (u64),
//! XXH3-64 of the content (u64), content. The first block is the key as JSON, each other one a window's predictions.
//! Numbers are little-endian. A file is complete or absent, and every block is checked before the first is used.

use std::{
    fs::{self, File},
    io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use serde::Serialize;
use tempfile::NamedTempFile;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::prediction::Prediction;
use crate::error::{Error, Result};

const MAGIC: &[u8; 8] = b"gptqprd2";

/// Beginning of the files' names.
const PREFIX: &str = "predictions-";

/// A file of stored predictions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StoredPredictions {
    /// The file.
    pub path: PathBuf,
    /// Bytes.
    pub bytes: u64,
}

/// The predictions in a cache folder, sorted by name; none if there is no such folder.
///
/// # Errors
/// When the folder cannot be read.
pub fn stored_predictions(dir: &Path) -> Result<Vec<StoredPredictions>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
        let entry = entry.map_err(Error::io("read", dir))?;
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            let bytes = entry.metadata().map_err(Error::io("read", entry.path()))?.len();
            found.push(StoredPredictions { path: entry.path(), bytes });
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// Inputs that predictions depend on.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Key {
    /// Digest of the tensors.
    pub(super) model: String,
    /// Digest of the config, which determines the computation.
    pub(super) config: String,
    /// Digest of the token ids.
    pub(super) tokens: String,
    pub(super) windows: usize,
    pub(super) seq_len: usize,
    pub(super) stride: usize,
    /// Kind and device of the computation.
    pub(super) compute: String,
    pub(super) vocab: usize,
}

impl Key {
    fn json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("texts and numbers are JSON")
    }

    /// Path of its file, which may not exist yet.
    pub(super) fn path(&self, dir: &Path) -> PathBuf {
        dir.join(format!("{PREFIX}{:032x}", xxh3_128(&self.json())))
    }
}

/// A checked file, read window by window.
#[derive(Debug)]
pub(super) struct Reader {
    file: BufReader<File>,
    path: PathBuf,
    key: Key,
}

/// Result of a look-up on disk.
#[derive(Debug)]
pub(super) enum Found {
    Nothing,
    /// The file cannot be used, for this reason.
    Damaged(String),
    Whole(Reader),
}

impl Reader {
    /// Looks for predictions.
    pub(super) fn open(dir: &Path, key: &Key) -> Found {
        let path = key.path(dir);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Found::Nothing,
            Err(error) => return Found::Damaged(error.to_string()),
        };
        let mut reader = Self { file: BufReader::with_capacity(1 << 20, file), path, key: key.clone() };
        match reader.check() {
            Ok(()) => Found::Whole(reader),
            Err(problem) => Found::Damaged(problem),
        }
    }

    /// The next window's predictions.
    ///
    /// # Errors
    /// When the file has changed since it was opened.
    pub(super) fn window(&mut self, positions: usize) -> Result<Vec<Prediction>> {
        let damaged = |problem: String| Error::Dataset { path: self.path.clone(), problem };
        let block = block(&mut self.file).map_err(damaged)?;
        let mut rest = &block[..];
        let read = |_| Prediction::read(self.key.vocab, &mut rest);
        let predictions = (0..positions).map(read).collect::<Option<Vec<_>>>();
        match predictions {
            Some(predictions) if rest.is_empty() => Ok(predictions),
            _ => Err(damaged("a window's predictions are not whole".into())),
        }
    }

    /// Skips some windows.
    ///
    /// # Errors
    /// When the file has changed since it was opened.
    pub(super) fn skip(&mut self, windows: usize) -> Result<()> {
        let damaged = |problem: String| Error::Dataset { path: self.path.clone(), problem };
        (0..windows).try_for_each(|_| block(&mut self.file).map(drop)).map_err(damaged)
    }

    /// Reads and checks the whole file, then seeks to the first window.
    fn check(&mut self) -> Result<(), String> {
        let mut magic = [0; MAGIC.len()];
        self.file.read_exact(&mut magic).map_err(|e| e.to_string())?;
        if magic != *MAGIC {
            return Err("it is another kind of file".into());
        }
        if block(&mut self.file)? != self.key.json() {
            return Err("it is of another model or text".into());
        }
        let first = self.file.stream_position().map_err(|e| e.to_string())?;
        for _ in 0..self.key.windows {
            block(&mut self.file)?;
        }
        if self.file.read(&mut [0]).map_err(|e| e.to_string())? != 0 {
            return Err("it is longer than its windows".into());
        }
        self.file.seek(SeekFrom::Start(first)).map_err(|e| e.to_string())?;
        Ok(())
    }
}

/// The next block's content, checked.
fn block(file: &mut BufReader<File>) -> Result<Vec<u8>, String> {
    let short = |_| "it ends too early".to_owned();
    let mut head = [[0; 8]; 2];
    head.iter_mut().try_for_each(|word| file.read_exact(word)).map_err(short)?;
    let [length, sum] = head.map(u64::from_le_bytes);
    // Takes no more memory than the file has bytes, even if `length` is larger.
    let mut content = Vec::new();
    file.take(length).read_to_end(&mut content).map_err(|e| e.to_string())?;
    if content.len() as u64 != length {
        return Err("it ends too early".into());
    }
    if xxh3_64(&content) != sum {
        return Err("a checksum does not fit".into());
    }
    Ok(content)
}

/// A window's predictions as they are stored.
pub(super) fn bytes_of(predictions: &[Prediction], vocab: usize) -> Vec<u8> {
    let mut content = Vec::new();
    predictions.iter().for_each(|prediction| prediction.write(vocab, &mut content));
    content
}

/// A file that is being written.
#[derive(Debug)]
pub(super) struct Writer {
    file: BufWriter<NamedTempFile>,
    path: PathBuf,
    vocab: usize,
    /// Reused.
    content: Vec<u8>,
}

impl Writer {
    /// Begins a file.
    pub(super) fn create(dir: &Path, key: &Key) -> Result<Self> {
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        let file = tempfile::Builder::new().prefix(".predictions-").tempfile_in(dir);
        let file = BufWriter::with_capacity(1 << 20, file.map_err(Error::io("create a file in", dir))?);
        let mut writer = Self { file, path: key.path(dir), vocab: key.vocab, content: Vec::new() };
        writer.file.write_all(MAGIC).map_err(Error::io("write", &writer.path))?;
        writer.content = key.json();
        writer.block()?;
        Ok(writer)
    }

    /// Adds a window.
    pub(super) fn window(&mut self, predictions: &[Prediction]) -> Result<()> {
        self.content.clear();
        predictions.iter().for_each(|p| p.write(self.vocab, &mut self.content));
        self.block()
    }

    /// Adds a window in the bytes that [`bytes_of`] gives.
    pub(super) fn window_bytes(&mut self, content: &[u8]) -> Result<()> {
        self.content.clear();
        self.content.extend(content);
        self.block()
    }

    /// Puts the file in its place; returns that and its size.
    pub(super) fn finish(self) -> Result<(PathBuf, u64)> {
        let Self { file, path, .. } = self;
        let write = || -> std::io::Result<u64> {
            let file = file.into_inner().map_err(|e| e.into_error())?;
            file.as_file().sync_all()?;
            let bytes = file.as_file().metadata()?.len();
            file.persist(&path)?;
            Ok(bytes)
        };
        let bytes = write().map_err(Error::io("write", &path))?;
        Ok((path, bytes))
    }

    fn block(&mut self) -> Result<()> {
        let head = [self.content.len() as u64, xxh3_64(&self.content)].map(u64::to_le_bytes);
        let file = &mut self.file;
        let written = file.write_all(&head.concat()).and_then(|()| file.write_all(&self.content));
        written.map_err(Error::io("write", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> Key {
        let text = |t: &str| t.to_owned();
        let (model, config, tokens, compute) = (text("a"), text("b"), text("c"), text("fp32"));
        Key { model, config, tokens, windows: 2, seq_len: 3, stride: 3, compute, vocab: 4 }
    }

    fn written(dir: &Path) -> (PathBuf, Vec<Prediction>) {
        let log_p = [0.1f32, 0.2, 0.3, 0.4].map(f32::ln);
        let predictions = vec![Prediction::new(&log_p, 1), Prediction::new(&log_p, 2)];
        let mut writer = Writer::create(dir, &key()).unwrap();
        (0..2).for_each(|_| writer.window(&predictions).unwrap());
        let (path, bytes) = writer.finish().unwrap();
        assert_eq!((path.clone(), bytes), (key().path(dir), fs::metadata(&path).unwrap().len()));
        (path, predictions)
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Reader::open(dir.path(), &key()), Found::Nothing));
        let (_, predictions) = written(&dir.path().join("new"));
        let Found::Whole(mut reader) = Reader::open(&dir.path().join("new"), &key()) else { panic!() };
        assert_eq!(reader.window(2).unwrap(), predictions);
        assert_eq!(reader.window(2).unwrap(), predictions);
        assert!(reader.window(2).is_err());
        let Found::Whole(mut reader) = Reader::open(&dir.path().join("new"), &key()) else { panic!() };
        reader.skip(1).unwrap();
        assert_eq!(reader.window(2).unwrap(), predictions);
        assert!(reader.skip(1).is_err());
        let other = Key { tokens: "d".into(), ..key() };
        assert!(matches!(Reader::open(&dir.path().join("new"), &other), Found::Nothing));
        assert_eq!(fs::read_dir(dir.path().join("new")).unwrap().count(), 1);
    }

    /// Every byte changed, every length cut off, and one byte too many.
    #[test]
    fn damage_is_found_before_anything_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let (path, _) = written(dir.path());
        let whole = fs::read(&path).unwrap();
        let damaged = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            matches!(Reader::open(dir.path(), &key()), Found::Damaged(_))
        };
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            assert!(damaged(&bytes), "byte {at}");
            assert!(damaged(&whole[..at]), "cut off at {at}");
        }
        assert!(damaged(&[&whole[..], &[0]].concat()));
        assert!(!damaged(&whole));
    }
}
