//! Metadata of a GGUF file: keys with typed values, in the order of the file.

/// The type of a value or of an array's elements, with its number in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[expect(missing_docs, reason = "the names say it")]
pub enum ElementType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ElementType {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// The type of a number in a file.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u32 == id)
    }

    /// Bytes of a value; `None` for strings and arrays.
    pub fn size(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }
}

/// One value.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum MetadataValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    U64(u64),
    I64(i64),
    F64(f64),
    /// Elements as they lie in the file.
    Array {
        /// Their type, which is no array.
        kind: ElementType,
        /// Their number.
        count: usize,
        /// Their bytes.
        bytes: Vec<u8>,
    },
}

impl MetadataValue {
    /// An array of strings.
    pub fn strings<S: AsRef<str>>(texts: impl IntoIterator<Item = S>) -> Self {
        let (mut count, mut bytes) = (0, Vec::new());
        for text in texts {
            count += 1;
            write_text(text.as_ref(), &mut bytes);
        }
        Self::Array { kind: ElementType::String, count, bytes }
    }

    /// An array of fp32 numbers.
    pub fn floats(numbers: &[f32]) -> Self {
        let bytes = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        Self::Array { kind: ElementType::F32, count: numbers.len(), bytes }
    }

    /// An array of signed 32-bit integers.
    pub fn integers(numbers: &[i32]) -> Self {
        let bytes = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        Self::Array { kind: ElementType::I32, count: numbers.len(), bytes }
    }

    /// The strings of an array of strings; bytes that are not UTF-8 become `\u{fffd}`.
    pub fn texts(&self) -> Option<Vec<String>> {
        let Self::Array { kind: ElementType::String, count, bytes } = self else { return None };
        let (mut texts, mut rest) = (Vec::with_capacity(*count), &bytes[..]);
        while let Some((length, after)) = rest.split_first_chunk() {
            let (text, after) = after.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
            texts.push(String::from_utf8_lossy(text).into_owned());
            rest = after;
        }
        Some(texts)
    }

    /// The type.
    pub fn kind(&self) -> ElementType {
        match self {
            Self::U8(_) => ElementType::U8,
            Self::I8(_) => ElementType::I8,
            Self::U16(_) => ElementType::U16,
            Self::I16(_) => ElementType::I16,
            Self::U32(_) => ElementType::U32,
            Self::I32(_) => ElementType::I32,
            Self::F32(_) => ElementType::F32,
            Self::Bool(_) => ElementType::Bool,
            Self::String(_) => ElementType::String,
            Self::U64(_) => ElementType::U64,
            Self::I64(_) => ElementType::I64,
            Self::F64(_) => ElementType::F64,
            Self::Array { .. } => ElementType::Array,
        }
    }

    /// An integer of any type that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(value) => Some(value.into()),
            Self::U16(value) => Some(value.into()),
            Self::U32(value) => Some(value.into()),
            Self::U64(value) => Some(value),
            Self::I8(value) => value.try_into().ok(),
            Self::I16(value) => value.try_into().ok(),
            Self::I32(value) => value.try_into().ok(),
            Self::I64(value) => value.try_into().ok(),
            _ => None,
        }
    }

    /// A floating-point number of either type.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(value) => Some(value.into()),
            Self::F64(value) => Some(value),
            _ => None,
        }
    }

    /// A text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(text) => Some(text),
            _ => None,
        }
    }

    /// For messages: the value, of arrays their length.
    pub fn shown(&self) -> String {
        match self {
            Self::String(text) => format!("`{text}`"),
            Self::Array { kind, count, .. } => format!("an array of {count} {kind:?}"),
            other => format!("{other:?}"),
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::U8(value) => out.push(*value),
            Self::Bool(value) => out.push((*value).into()),
            Self::I8(value) => out.extend(value.to_le_bytes()),
            Self::U16(value) => out.extend(value.to_le_bytes()),
            Self::I16(value) => out.extend(value.to_le_bytes()),
            Self::U32(value) => out.extend(value.to_le_bytes()),
            Self::I32(value) => out.extend(value.to_le_bytes()),
            Self::F32(value) => out.extend(value.to_le_bytes()),
            Self::U64(value) => out.extend(value.to_le_bytes()),
            Self::I64(value) => out.extend(value.to_le_bytes()),
            Self::F64(value) => out.extend(value.to_le_bytes()),
            Self::String(text) => write_text(text, out),
            Self::Array { kind, count, bytes } => {
                out.extend((*kind as u32).to_le_bytes());
                out.extend((*count as u64).to_le_bytes());
                out.extend(bytes);
            }
        }
    }
}

/// Keys and values in the order of the file, each key once.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Metadata(Vec<(String, MetadataValue)>);

impl Metadata {
    /// Adds a value, or replaces the one of this key.
    pub fn set(&mut self, key: impl Into<String>, value: MetadataValue) {
        let key = key.into();
        match self.0.iter_mut().find(|(known, _)| *known == key) {
            Some((_, old)) => *old = value,
            None => self.0.push((key, value)),
        }
    }

    /// Adds a value of a key that is new.
    pub(super) fn push(&mut self, key: String, value: MetadataValue) {
        self.0.push((key, value));
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&MetadataValue> {
        self.0.iter().find(|(known, _)| known == key).map(|(_, value)| value)
    }

    /// The text of `key`.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// All keys and values.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &MetadataValue)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The entries as they lie in a file.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        for (key, value) in &self.0 {
            write_text(key, out);
            out.extend((value.kind() as u32).to_le_bytes());
            value.write(out);
        }
    }
}

/// A text with its length in front.
pub(super) fn write_text(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
