//! Writes safetensors files. The place of every byte is planned first, so that tensors can be written in any order, one at a
//! time.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use rayon::prelude::*;
use safetensors::Dtype;
use serde::Serialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::{
    checkpoint::weights_file::{INDEX_FILE, WEIGHTS_FILE},
    error::{Error, Result},
    units::hex,
};

/// One tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the file.
    pub name: String,
    /// Element type, of whole bytes.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Bytes of all elements; `None` beyond 64 bits.
    fn bytes(&self) -> Option<u64> {
        let size =
            self.shape.iter().try_fold(self.dtype.bitsize() / 8, |product, &size| product.checked_mul(size));
        size.map(|size| size as u64)
    }
}

/// Place of every tensor: one `model.safetensors`, or numbered shards and an index.
#[derive(Debug, Clone)]
pub struct ShardPlan {
    shards: Vec<Shard>,
    places: HashMap<String, Place>,
    tensor_bytes: u64,
}

#[derive(Debug, Clone)]
struct Shard {
    file: String,
    /// Length, JSON and padding: everything before the data.
    header: Vec<u8>,
    /// Bytes of the whole file.
    bytes: u64,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    shard: usize,
    /// From the start of the file, bytes.
    offset: u64,
    bytes: u64,
}

impl ShardPlan {
    /// Lays the tensors out in the given order, in as few files as that order allows. A file has at most `max_shard_size` bytes
    /// of data; a larger tensor has a file of its own.
    ///
    /// Data starts at a multiple of 8 bytes, and I32 tensors at multiples of 4. The format allows no holes, so fp16 tensors
    /// with an odd number of elements go to the end of their file.
    pub fn new(tensors: Vec<TensorSpec>, max_shard_size: u64) -> Result<Self> {
        let mut groups: Vec<Vec<(TensorSpec, u64)>> = vec![Vec::new()];
        let (mut group_bytes, mut tensor_bytes) = (0u64, 0u64);
        for tensor in tensors {
            let too_large =
                || write_error(&tensor.name, format!("shape {:?} is beyond any file", tensor.shape));
            let bytes = tensor.bytes().ok_or_else(too_large)?;
            tensor_bytes = tensor_bytes.checked_add(bytes).ok_or_else(too_large)?;
            match groups.last_mut() {
                Some(group) if group.is_empty() || group_bytes + bytes <= max_shard_size => {
                    group_bytes += bytes;
                    group.push((tensor, bytes));
                }
                _ => {
                    group_bytes = bytes;
                    groups.push(vec![(tensor, bytes)]);
                }
            }
        }
        let count = groups.len();
        let mut plan = Self { shards: Vec::with_capacity(count), places: HashMap::new(), tensor_bytes };
        for (index, mut group) in groups.into_iter().enumerate() {
            group.sort_by_key(|(_, bytes)| !bytes.is_multiple_of(4));
            let file = match count {
                1 => WEIGHTS_FILE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            plan.add_shard(file, group)?;
        }
        Ok(plan)
    }

    fn add_shard(&mut self, file: String, group: Vec<(TensorSpec, u64)>) -> Result<()> {
        let mut entries = Map::new();
        entries.insert("__metadata__".into(), json!({ "format": "pt" }));
        let mut offset = 0u64;
        for (tensor, bytes) in &group {
            let entry = json!({
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "data_offsets": [offset, offset + bytes],
            });
            entries.insert(tensor.name.clone(), entry);
            offset += bytes;
        }
        let mut json = Value::Object(entries).to_string().into_bytes();
        json.resize(json.len().next_multiple_of(8), b' ');
        let mut header = (json.len() as u64).to_le_bytes().to_vec();
        header.append(&mut json);

        let (shard, mut start) = (self.shards.len(), header.len() as u64);
        let bytes = start.checked_add(offset);
        for (tensor, bytes) in group {
            let place = Place { shard, offset: start, bytes };
            start = start.saturating_add(bytes);
            if let Some(other) = self.places.insert(tensor.name.clone(), place) {
                let problem = format!("it is planned twice, in files {} and {}", other.shard + 1, shard + 1);
                return Err(write_error(&tensor.name, problem));
            }
        }
        let bytes = bytes.ok_or_else(|| write_error(&file, "the file is beyond 64 bits".into()))?;
        self.shards.push(Shard { file, header, bytes });
        Ok(())
    }

    /// Bytes of all weight files, headers included.
    pub fn total_bytes(&self) -> u64 {
        self.shards.iter().fold(0, |sum, shard| sum.saturating_add(shard.bytes))
    }

    /// Bytes of all tensors: the index's `total_size`.
    #[cfg(test)]
    pub(super) fn tensor_bytes(&self) -> u64 {
        self.tensor_bytes
    }

    /// Names of the weight files, in order, the index not among them.
    #[cfg(test)]
    pub(super) fn files(&self) -> impl Iterator<Item = &str> {
        self.shards.iter().map(|shard| shard.file.as_str())
    }

    /// `model.safetensors.index.json`, names sorted; `None` for a single file.
    fn index(&self) -> Option<String> {
        if self.shards.len() < 2 {
            return None;
        }
        let weight_map: BTreeMap<&str, &str> = self
            .places
            .iter()
            .map(|(name, place)| (name.as_str(), self.shards[place.shard].file.as_str()))
            .collect();
        let index = json!({ "metadata": { "total_size": self.tensor_bytes }, "weight_map": weight_map });
        Some(format!("{index:#}\n"))
    }
}

/// Files and bytes that the writer wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Every file's name and bytes, the index included.
    pub files: Vec<(String, u64)>,
    /// SHA-256 of each tensor's bytes, in hexadecimal.
    pub tensor_sha256: BTreeMap<String, String>,
}

/// Writes the tensors of a plan into a folder. A writer that is dropped unfinished leaves its files as they are;
/// the caller removes the folder.
#[derive(Debug)]
pub struct ShardWriter {
    dir: PathBuf,
    plan: ShardPlan,
    files: Vec<File>,
    sha256: BTreeMap<String, String>,
}

impl ShardWriter {
    /// Makes the files of `plan` in the folder `dir`, at full size and with their headers. The disk space is
    /// taken now where the file system can do so. On failure no file is left.
    pub fn create(dir: &Path, plan: ShardPlan) -> Result<Self> {
        let mut files = Vec::with_capacity(plan.shards.len());
        for shard in &plan.shards {
            match create_shard(&dir.join(&shard.file), shard) {
                Ok(file) => files.push(file),
                Err(error) => {
                    for made in &plan.shards[..files.len()] {
                        let _ = fs::remove_file(dir.join(&made.file));
                    }
                    return Err(error);
                }
            }
        }
        Ok(Self { dir: dir.into(), plan, files, sha256: BTreeMap::new() })
    }

    /// Reopens the files that an earlier writer of the same `plan` left in `dir`. `sha256` are the digests of the tensors that
    /// it wrote; all are read again and compared.
    ///
    /// # Errors
    /// When a file is missing or is not what that writer left.
    pub fn reopen(dir: &Path, plan: ShardPlan, sha256: BTreeMap<String, String>) -> Result<Self> {
        let broken = |path: &Path, problem: String| Error::Safetensors { path: path.into(), problem };
        let mut files = Vec::with_capacity(plan.shards.len());
        for shard in &plan.shards {
            let path = dir.join(&shard.file);
            let file =
                File::options().read(true).write(true).open(&path).map_err(Error::io("open", &path))?;
            let bytes = file.metadata().map_err(Error::io("read", &path))?.len();
            if bytes != shard.bytes {
                return Err(broken(&path, format!("{bytes} bytes, where {} were planned", shard.bytes)));
            }
            if read_at(&file, &path, 0, shard.header.len())? != shard.header {
                return Err(broken(&path, "its header is not the one that was written".into()));
            }
            files.push(file);
        }
        let check = |(name, expected): (&String, &String)| {
            let place = plan
                .places
                .get(name)
                .ok_or_else(|| write_error(name, "it is not among the planned".into()))?;
            let path = dir.join(&plan.shards[place.shard].file);
            let bytes = read_at(&files[place.shard], &path, place.offset, place.bytes as usize)?;
            if hex(&Sha256::digest(bytes)) == *expected {
                return Ok(());
            }
            Err(broken(&path, format!("tensor `{name}` is not what was written")))
        };
        sha256.par_iter().try_for_each(check)?;
        Ok(Self { dir: dir.into(), plan, files, sha256 })
    }

    /// Makes what was written so far durable. Returns the digests of the tensors so far, hexadecimal SHA-256.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn sync(&self) -> Result<&BTreeMap<String, String>> {
        for (shard, file) in self.plan.shards.iter().zip(&self.files) {
            file.sync_data().map_err(Error::io("sync", self.dir.join(&shard.file)))?;
        }
        Ok(&self.sha256)
    }

    /// Writes one tensor, little-endian and row-major. Any order; each once, with just its planned bytes.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let Some(&place) = self.plan.places.get(name) else {
            return Err(write_error(name, format!("it is not among the {} planned", self.plan.places.len())));
        };
        if bytes.len() as u64 != place.bytes {
            return Err(write_error(
                name,
                format!("{} bytes are planned, {} given", place.bytes, bytes.len()),
            ));
        }
        if self.sha256.contains_key(name) {
            return Err(write_error(name, "it is written already".into()));
        }
        let path = self.dir.join(&self.plan.shards[place.shard].file);
        let file = &mut self.files[place.shard];
        let (written, digest) =
            rayon::join(|| write_at(file, &path, place.offset, bytes), || Sha256::digest(bytes));
        written?;
        self.sha256.insert(name.to_owned(), hex(&digest));
        Ok(())
    }

    /// Checks that every tensor was written, syncs the files and writes the index.
    pub fn finish(self) -> Result<Written> {
        let planned = self.plan.places.len();
        if let Some(name) = self.plan.places.keys().filter(|name| !self.sha256.contains_key(*name)).min() {
            let problem = format!("it never came; {} of {planned} tensors did", self.sha256.len());
            return Err(write_error(name, problem));
        }
        let mut written = Vec::new();
        for (shard, file) in self.plan.shards.iter().zip(&self.files) {
            file.sync_all().map_err(Error::io("sync", self.dir.join(&shard.file)))?;
            written.push((shard.file.clone(), shard.bytes));
        }
        match self.plan.index() {
            Some(index) => {
                write_file_atomically(&self.dir.join(INDEX_FILE), index.as_bytes())?;
                written.push((INDEX_FILE.to_owned(), index.len() as u64));
            }
            None => sync_dir(&self.dir)?,
        }
        Ok(Written { files: written, tensor_sha256: self.sha256 })
    }
}

fn create_shard(path: &Path, shard: &Shard) -> Result<File> {
    let mut file = File::create_new(path).map_err(Error::io("create", path))?;
    let filled = allocate(&file, shard.bytes)
        .map_err(Error::io("write", path))
        .and_then(|()| write_at(&mut file, path, 0, &shard.header));
    match filled {
        Ok(()) => Ok(file),
        Err(error) => {
            let _ = fs::remove_file(path);
            Err(error)
        }
    }
}

/// Gives the file its size, with disk space behind it where the file system can.
fn allocate(file: &File, bytes: u64) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::{fs::FallocateFlags, io::Errno};
        match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
            Err(Errno::NOTSUP | Errno::NOSYS | Errno::INVAL) => {}
            other => return other.map_err(Into::into),
        }
    }
    file.set_len(bytes)
}

pub(super) fn write_at(file: &mut File, path: &Path, offset: u64, bytes: &[u8]) -> Result<()> {
    let written = file.seek(SeekFrom::Start(offset)).and_then(|_| file.write_all(bytes));
    written.map_err(Error::io("write", path))
}

/// Reads without moving the file's position, so that several threads can.
fn read_at(file: &File, path: &Path, offset: u64, count: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; count];
    file.read_exact_at(&mut bytes, offset).map_err(Error::io("read", path))?;
    Ok(bytes)
}

/// Writes a value as indented JSON, as [`write_file_atomically`] does.
///
/// # Errors
/// When the file cannot be written.
pub fn write_json_atomically(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text =
        serde_json::to_vec_pretty(value).map_err(|source| Error::Json { path: path.into(), source })?;
    text.push(b'\n');
    write_file_atomically(path, &text)
}

/// Prefix of the names of files that [`write_file_atomically`] has not finished.
pub const UNFINISHED: &str = ".writing-";

/// Writes a whole file so that its name holds the old contents or the new, never a part: into a temporary
/// sibling, synced, then renamed.
pub fn write_file_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = match path.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(UNFINISHED);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(dir).map_err(Error::io("create", path))?;
    file.write_all(bytes).map_err(Error::io("write", path))?;
    file.as_file().sync_all().map_err(Error::io("sync", path))?;
    file.persist(path).map_err(|failed| Error::io("write", path)(failed.error))?;
    sync_dir(dir)
}

/// Makes the folder's entries durable, on systems that can sync a folder.
fn sync_dir(dir: &Path) -> Result<()> {
    #[cfg(unix)]
    File::open(dir).and_then(|folder| folder.sync_all()).map_err(Error::io("sync", dir))?;
    #[cfg(not(unix))]
    let _ = dir;
    Ok(())
}

fn write_error(name: &str, problem: String) -> Error {
    Error::TensorWrite { name: name.into(), problem }
}
