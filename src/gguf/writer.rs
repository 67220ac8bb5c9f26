//! Writes a GGUF file beside its final place; it appears there when every tensor was written and read back.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::{
    header::{ALIGNMENT, MAGIC, VERSION},
    metadata::{Metadata, MetadataValue, write_text},
};
use crate::{
    error::{Error, Result},
    ggml::BlockType,
    units::hex,
};

/// Key of the digests of all tensors' bytes, in the order of the file: SHA-256 in hexadecimal.
pub const TENSOR_SHA256: &str = "gptq.tensor_sha256";
/// Key of the digest of everything before the data, in which this digest itself is written as zeros.
pub const HEADER_SHA256: &str = "gptq.header_sha256";
/// Prefix of the names of unfinished files.
const UNFINISHED: &str = ".writing-";
/// Hexadecimal digits of a digest.
const DIGITS: usize = 64;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Name in the file.
    pub name: String,
    /// Element type.
    pub kind: BlockType,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

impl GgufTensor {
    /// Bytes of its data; `None` when its rows are no whole blocks, or beyond 64 bits.
    pub fn bytes(&self) -> Option<usize> {
        let whole = self.shape.last().is_none_or(|row| row.is_multiple_of(self.kind.block_len()));
        let elements = self.shape.iter().try_fold(1usize, |all, &size| all.checked_mul(size))?;
        self.kind.bytes(elements).filter(|_| whole)
    }
}

/// Metadata and tensors of a file, with the place of every byte.
#[derive(Debug, Clone)]
pub struct GgufPlan {
    metadata: Metadata,
    tensors: Vec<GgufTensor>,
    /// Offset of each tensor from the start of the data, and its bytes.
    places: Vec<(usize, usize)>,
    data_start: usize,
    total: usize,
}

impl GgufPlan {
    /// Lays out the tensors in the order given. Digests are added to the metadata.
    ///
    /// # Errors
    /// When a tensor cannot be laid out.
    pub fn new(mut metadata: Metadata, tensors: Vec<GgufTensor>) -> Result<Self> {
        let (mut places, mut offset) = (Vec::with_capacity(tensors.len()), 0usize);
        for tensor in &tensors {
            let problem = || Error::TensorWrite {
                name: tensor.name.clone(),
                problem: format!("shape {:?} is no whole number of blocks of {}", tensor.shape, tensor.kind),
            };
            let bytes = tensor.bytes().ok_or_else(problem)?;
            places.push((offset, bytes));
            let end = offset.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(ALIGNMENT));
            offset = end.ok_or_else(problem)?;
        }
        let zeros = "0".repeat(DIGITS);
        metadata.set(HEADER_SHA256, MetadataValue::String(zeros.clone()));
        metadata.set(TENSOR_SHA256, MetadataValue::strings(tensors.iter().map(|_| &zeros)));
        let mut plan = Self { metadata, tensors, places, data_start: 0, total: 0 };
        plan.data_start = plan.header().len();
        plan.total = plan.data_start + offset;
        Ok(plan)
    }

    /// Bytes of the file.
    pub fn total_bytes(&self) -> u64 {
        self.total as u64
    }

    /// All bytes before the data, padded.
    fn header(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.iter().len() as u64).to_le_bytes());
        self.metadata.write(&mut out);
        for (tensor, (offset, _)) in self.tensors.iter().zip(&self.places) {
            write_text(&tensor.name, &mut out);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|&size| out.extend((size as u64).to_le_bytes()));
            out.extend(tensor.kind.id().to_le_bytes());
            out.extend((*offset as u64).to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out
    }
}

/// The digest of a file's header, computed with the stored digest as zeros; `stored` is that digest.
pub fn header_digest(header: &[u8], stored: &str) -> String {
    let mut copy = header.to_vec();
    let found = copy.windows(stored.len().max(1)).position(|window| window == stored.as_bytes());
    if let Some(start) = found {
        copy[start..start + stored.len()].fill(b'0');
    }
    hex(&Sha256::digest(copy))
}

/// Writes the tensors of a plan. Dropping it unfinished removes the file.
#[derive(Debug)]
pub struct GgufWriter {
    path: PathBuf,
    plan: GgufPlan,
    file: NamedTempFile,
    sha256: Vec<Option<String>>,
}

impl GgufWriter {
    /// Makes the file of `plan` beside `path`, at full size.
    ///
    /// # Errors
    /// When `path` exists, or the disk is full.
    pub fn create(path: &Path, plan: GgufPlan) -> Result<Self> {
        if path.exists() {
            return Err(Error::OutputExists { path: path.into() });
        }
        let mut builder = tempfile::Builder::new();
        builder.prefix(UNFINISHED);
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder.tempfile_in(folder(path)).map_err(Error::io("create", path))?;
        file.as_file().set_len(plan.total_bytes()).map_err(Error::io("write", path))?;
        let sha256 = vec![None; plan.tensors.len()];
        Ok(Self { path: path.into(), plan, file, sha256 })
    }

    /// Writes one tensor: any order, each once, with just its planned bytes.
    ///
    /// # Errors
    /// When it is not planned so, or the disk fails.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let error = |problem: String| Error::TensorWrite { name: name.into(), problem };
        let Some(index) = self.plan.tensors.iter().position(|tensor| tensor.name == name) else {
            return Err(error(format!("it is not among the {} planned", self.plan.tensors.len())));
        };
        let (offset, planned) = self.plan.places[index];
        if bytes.len() != planned {
            return Err(error(format!("{planned} bytes are planned, {} given", bytes.len())));
        }
        if self.sha256[index].is_some() {
            return Err(error("it is written already".into()));
        }
        self.write_at(self.plan.data_start + offset, bytes)?;
        self.sha256[index] = Some(hex(&Sha256::digest(bytes)));
        Ok(())
    }

    fn write_at(&mut self, offset: usize, bytes: &[u8]) -> Result<()> {
        let file = self.file.as_file_mut();
        let written = file.seek(SeekFrom::Start(offset as u64)).and_then(|_| file.write_all(bytes));
        written.map_err(Error::io("write", &self.path))
    }

    /// Writes the header with the digests, reads the whole file back and compares it with them, and moves it to its place.
    ///
    /// # Errors
    /// When a tensor was left out, the file is not what was written, or the disk fails.
    pub fn finish(mut self) -> Result<()> {
        let missing = self.plan.tensors.iter().zip(&self.sha256).find(|(_, digest)| digest.is_none());
        if let Some((tensor, _)) = missing {
            let problem = "it never came".into();
            return Err(Error::TensorWrite { name: tensor.name.clone(), problem });
        }
        let digests: Vec<String> = std::mem::take(&mut self.sha256).into_iter().flatten().collect();
        self.plan.metadata.set(TENSOR_SHA256, MetadataValue::strings(&digests));
        let digest = hex(&Sha256::digest(self.plan.header()));
        self.plan.metadata.set(HEADER_SHA256, MetadataValue::String(digest));
        let header = self.plan.header();
        debug_assert_eq!(header.len(), self.plan.data_start);
        self.write_at(0, &header)?;
        self.file.as_file().sync_all().map_err(Error::io("sync", &self.path))?;
        self.check(&header, &digests)?;
        let Self { path, file, .. } = self;
        let folder = folder(&path);
        match file.persist_noclobber(&path) {
            Ok(_) => {}
            Err(failed) if failed.error.kind() == std::io::ErrorKind::AlreadyExists => {
                return Err(Error::OutputExists { path });
            }
            Err(failed) => return Err(Error::io("write", &path)(failed.error)),
        }
        #[cfg(unix)]
        File::open(folder).and_then(|dir| dir.sync_all()).map_err(Error::io("sync", folder))?;
        Ok(())
    }

    /// Reopens the file and compares header and tensors with what was written.
    fn check(&self, header: &[u8], digests: &[String]) -> Result<()> {
        let broken = |problem: String| Error::Gguf { path: self.path.clone(), problem };
        let mut file = File::open(self.file.path()).map_err(Error::io("read", &self.path))?;
        let mut read = |offset: usize, count: usize| {
            let mut bytes = vec![0; count];
            let read = file.seek(SeekFrom::Start(offset as u64)).and_then(|_| file.read_exact(&mut bytes));
            read.map(|()| bytes).map_err(Error::io("read", &self.path))
        };
        if read(0, header.len())? != header {
            return Err(broken("its header is not what was written".into()));
        }
        for ((tensor, (offset, bytes)), digest) in
            self.plan.tensors.iter().zip(&self.plan.places).zip(digests)
        {
            if hex(&Sha256::digest(read(self.plan.data_start + offset, *bytes)?)) != *digest {
                return Err(broken(format!("tensor `{}` is not what was written", tensor.name)));
            }
        }
        Ok(())
    }
}

/// The folder of a file.
fn folder(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
