//! The header of a GGUF file: everything before the data. Every number in it is checked against the file before it is used.

use std::{
    collections::HashSet,
    ops::Range,
    path::{Path, PathBuf},
};

use super::metadata::{ElementType, Metadata, MetadataValue};
use crate::{
    error::{Error, Result},
    ggml::BlockType,
};

/// First bytes of a file.
pub(super) const MAGIC: [u8; 4] = *b"GGUF";
/// The newest version; the one before has the same layout.
pub(super) const VERSION: u32 = 3;
/// Alignment of data in bytes, if the file has no other.
pub(super) const ALIGNMENT: usize = 32;
/// The key of another alignment.
const ALIGNMENT_KEY: &str = "general.alignment";
/// The largest accepted alignment.
const MAX_ALIGNMENT: u64 = 1 << 20;
/// Most axes of a tensor.
const MAX_AXES: u32 = 4;
/// The longest name of a tensor that llama.cpp takes is 63; longer ones are not read either.
const MAX_NAME: u64 = 1 << 16;

/// Numbers and names of types that are not read, for messages.
const UNREAD_TYPES: [(u32, &str); 21] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (4, "Q4_2"),
    (5, "Q4_3"),
];

/// A parsed header.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Keys and values.
    pub metadata: Metadata,
    /// Tensors in the order of the file.
    pub tensors: Vec<TensorInfo>,
    /// Start of the data, bytes from the start of the file.
    pub data_start: usize,
}

/// A tensor and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// Element type.
    pub kind: BlockType,
    /// Sizes, outermost first (files have them innermost first).
    pub shape: Vec<usize>,
    /// Bytes from the start of the file; inside it.
    pub range: Range<usize>,
}

impl Header {
    /// Parses the header of `file`, the whole file; `path` is what errors name.
    ///
    /// # Errors
    /// When the file is cut short, contradicts itself, or holds what is not read: another version, byte order or element type.
    pub fn parse(path: &Path, file: &[u8]) -> Result<Self> {
        Reader { path, file, at: 0 }.header()
    }

    /// Its tensor `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }
}

/// A position in the file.
struct Reader<'a> {
    path: &'a Path,
    file: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn error(&self, problem: impl Into<String>) -> Error {
        Error::Gguf { path: PathBuf::from(self.path), problem: problem.into() }
    }

    fn left(&self) -> usize {
        self.file.len() - self.at
    }

    fn take(&mut self, count: u64, what: &str) -> Result<&'a [u8]> {
        let taken = usize::try_from(count).ok().and_then(|count| self.file.get(self.at..)?.get(..count));
        let Some(taken) = taken else {
            return Err(self.error(format!(
                "{what} takes {count} bytes from byte {}, and {} are left; the file is cut short or its header is wrong",
                self.at,
                self.left()
            )));
        };
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N as u64, what)?);
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn name(&mut self, what: &str) -> Result<String> {
        let length = self.u64(what)?;
        if length > MAX_NAME {
            return Err(self.error(format!("{what} has {length} bytes; at most {MAX_NAME} are allowed")));
        }
        let bytes = self.take(length, what)?;
        let text = std::str::from_utf8(bytes);
        text.map(str::to_owned).map_err(|_| self.error(format!("{what} is not UTF-8")))
    }

    fn header(mut self) -> Result<Header> {
        let magic: [u8; 4] = self.array("its first word")?;
        if magic != MAGIC {
            let found = magic.escape_ascii();
            return Err(self.error(format!("it begins with `{found}`, expected `GGUF`")));
        }
        match self.u32("its version")? {
            2 | VERSION => {}
            1 => return Err(self.error("it is of version 1, of 2023; versions 2 and 3 are read")),
            swapped if swapped.swap_bytes() <= VERSION => {
                return Err(self.error("its numbers are big-endian; little-endian files are read"));
            }
            other => return Err(self.error(format!("it is of version {other}; versions 2 and 3 are read"))),
        }
        let tensors = self.u64("its number of tensors")?;
        let keys = self.u64("its number of metadata keys")?;
        // The shortest tensor: an empty name, no axis. The shortest entry: an empty key and a byte.
        for (what, count, smallest) in [("metadata keys", keys, 13), ("tensors", tensors, 24)] {
            if count.saturating_mul(smallest) > self.left() as u64 {
                return Err(self.error(format!(
                    "it says it has {count} {what}, which take at least {smallest} bytes each, and {} bytes follow",
                    self.left()
                )));
            }
        }
        let metadata = self.metadata(keys)?;
        let alignment = match metadata.get(ALIGNMENT_KEY) {
            None => ALIGNMENT,
            Some(value) => match value.as_u64() {
                Some(size) if size.is_power_of_two() && size <= MAX_ALIGNMENT => size as usize,
                _ => {
                    let found = value.shown();
                    return Err(self.error(format!(
                        "key `{ALIGNMENT_KEY}`: expected a power of two up to {MAX_ALIGNMENT}, found {found}"
                    )));
                }
            },
        };
        let mut infos = Vec::new();
        let mut offsets = Vec::new();
        for index in 0..tensors {
            let (tensor, offset) = self.tensor(index)?;
            infos.push(tensor);
            offsets.push(offset);
        }
        let data_start = self.at.next_multiple_of(alignment);
        self.place(&mut infos, &offsets, data_start, alignment)?;
        Ok(Header { metadata, tensors: infos, data_start })
    }

    fn metadata(&mut self, count: u64) -> Result<Metadata> {
        let mut metadata = Metadata::default();
        let mut known = HashSet::new();
        for index in 0..count {
            let key = self.name(&format!("metadata key {index}"))?;
            let kind = self.u32("the type of a value")?;
            let Some(kind) = ElementType::from_id(kind) else {
                return Err(
                    self.error(format!("key `{key}`: its value is of type {kind}, which does not exist"))
                );
            };
            let value = self.value(&key, kind)?;
            if !known.insert(key.clone()) {
                return Err(self.error(format!("key `{key}` is there twice")));
            }
            metadata.push(key, value);
        }
        Ok(metadata)
    }

    fn value(&mut self, key: &str, kind: ElementType) -> Result<MetadataValue> {
        let what = format!("the value of `{key}`");
        let what = what.as_str();
        Ok(match kind {
            ElementType::U8 => MetadataValue::U8(self.array::<1>(what)?[0]),
            ElementType::I8 => MetadataValue::I8(i8::from_le_bytes(self.array(what)?)),
            ElementType::U16 => MetadataValue::U16(u16::from_le_bytes(self.array(what)?)),
            ElementType::I16 => MetadataValue::I16(i16::from_le_bytes(self.array(what)?)),
            ElementType::U32 => MetadataValue::U32(self.u32(what)?),
            ElementType::I32 => MetadataValue::I32(i32::from_le_bytes(self.array(what)?)),
            ElementType::F32 => MetadataValue::F32(f32::from_le_bytes(self.array(what)?)),
            ElementType::U64 => MetadataValue::U64(self.u64(what)?),
            ElementType::I64 => MetadataValue::I64(i64::from_le_bytes(self.array(what)?)),
            ElementType::F64 => MetadataValue::F64(f64::from_le_bytes(self.array(what)?)),
            ElementType::Bool => match self.array::<1>(what)?[0] {
                flag @ (0 | 1) => MetadataValue::Bool(flag == 1),
                other => {
                    return Err(self.error(format!("key `{key}`: expected a flag of 0 or 1, found {other}")));
                }
            },
            ElementType::String => {
                let length = self.u64(what)?;
                MetadataValue::String(String::from_utf8_lossy(self.take(length, what)?).into_owned())
            }
            ElementType::Array => {
                let element = self.u32(what)?;
                let count = self.u64(what)?;
                let element = ElementType::from_id(element).filter(|kind| *kind != ElementType::Array);
                let Some(element) = element else {
                    return Err(
                        self.error(format!("key `{key}`: its elements are of a type that is not read"))
                    );
                };
                let start = self.at;
                match element.size() {
                    Some(size) => {
                        self.take(count.saturating_mul(size as u64), what)?;
                    }
                    None => {
                        if count.saturating_mul(8) > self.left() as u64 {
                            return Err(self.error(format!(
                                "key `{key}`: it says it has {count} texts, and {} bytes follow",
                                self.left()
                            )));
                        }
                        for _ in 0..count {
                            let length = self.u64(what)?;
                            self.take(length, what)?;
                        }
                    }
                }
                // Fits: the elements are in the file.
                let count = count as usize;
                MetadataValue::Array { kind: element, count, bytes: self.file[start..self.at].to_vec() }
            }
        })
    }

    /// A tensor without its place, and the offset of its data from the start of all data.
    fn tensor(&mut self, index: u64) -> Result<(TensorInfo, u64)> {
        let name = self.name(&format!("the name of tensor {index}"))?;
        let axes = self.u32("a tensor's number of axes")?;
        if axes > MAX_AXES {
            return Err(
                self.error(format!("tensor `{name}` has {axes} axes; at most {MAX_AXES} are allowed"))
            );
        }
        let mut shape = Vec::with_capacity(axes as usize);
        for _ in 0..axes {
            shape.push(self.u64("a tensor's shape")?);
        }
        shape.reverse();
        let id = self.u32("a tensor's type")?;
        let kind = BlockType::from_id(id).ok_or_else(|| {
            let found = match UNREAD_TYPES.iter().find(|other| other.0 == id) {
                Some((_, name)) => format!("type {id} ({name})"),
                None => format!("type {id}, which is none of ggml's"),
            };
            let read = BlockType::ALL.map(BlockType::name).join(", ");
            self.error(format!("tensor `{name}` is of {found}; types that are read: {read}"))
        })?;
        let sizes: Option<Vec<usize>> = shape.iter().map(|&size| usize::try_from(size).ok()).collect();
        let elements = sizes
            .as_ref()
            .and_then(|sizes| sizes.iter().try_fold(1usize, |all, &size| all.checked_mul(size)));
        let (Some(sizes), Some(elements)) = (sizes, elements) else {
            return Err(self.error(format!("tensor `{name}`: shape {shape:?} is beyond any file")));
        };
        if elements == 0 {
            return Err(self.error(format!("tensor `{name}`: shape {shape:?} has no elements")));
        }
        if !sizes.last().unwrap_or(&1).is_multiple_of(kind.block_len()) {
            return Err(self.error(format!(
                "tensor `{name}`: rows of {} elements are no whole blocks of {kind}, which have {}",
                sizes.last().unwrap_or(&1),
                kind.block_len()
            )));
        }
        let Some(bytes) = kind.bytes(elements) else {
            return Err(self.error(format!("tensor `{name}`: shape {shape:?} of {kind} is beyond any file")));
        };
        let offset = self.u64("a tensor's offset")?;
        Ok((TensorInfo { name, kind, shape: sizes, range: 0..bytes }, offset))
    }

    /// Sets the places. As llama.cpp reads a file, each tensor starts where the one before it ends, but for padding.
    fn place(
        &self,
        tensors: &mut [TensorInfo],
        offsets: &[u64],
        data_start: usize,
        alignment: usize,
    ) -> Result<()> {
        let mut known = HashSet::new();
        let (mut expected, mut before) = (0usize, "the start of the data".to_owned());
        for (tensor, &offset) in tensors.iter_mut().zip(offsets) {
            let name = &tensor.name;
            if !known.insert(name.clone()) {
                return Err(self.error(format!("tensor `{name}` is there twice")));
            }
            if offset != expected as u64 {
                let what = if offset < expected as u64 { "overlaps" } else { "leaves a hole after" };
                return Err(self.error(format!(
                    "tensor `{name}` starts at {offset} and {what} {before}, which ends at {expected} with its padding"
                )));
            }
            let bytes = tensor.range.len();
            let end =
                data_start.checked_add(expected).and_then(|start| Some((start, start.checked_add(bytes)?)));
            let Some((start, end)) = end.filter(|(_, end)| *end <= self.file.len()) else {
                return Err(self.error(format!(
                    "tensor `{name}` takes {bytes} bytes from byte {expected} of the data, and the file holds {} bytes of \
                     data; the file is cut short",
                    self.file.len().saturating_sub(data_start)
                )));
            };
            tensor.range = start..end;
            // In range: the end is inside the file.
            expected = (expected + bytes).next_multiple_of(alignment);
            before = format!("tensor `{name}`");
        }
        Ok(())
    }
}
