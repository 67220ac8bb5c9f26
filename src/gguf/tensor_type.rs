//! Element types of GGUF tensors, as ggml numbers and lays them out.

use std::fmt;

use crate::ggml::BlockType;

/// The element type of a tensor: plain numbers, or blocks of codes with their scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TensorType {
    /// Plain fp32.
    F32,
    /// Plain fp16.
    F16,
    /// Plain bf16.
    BF16,
    /// 32 codes of 4 bits and a scale.
    Q4_0,
    /// 32 codes of 4 bits, a scale and a minimum.
    Q4_1,
    /// 32 codes of 5 bits and a scale.
    Q5_0,
    /// 32 codes of 5 bits, a scale and a minimum.
    Q5_1,
    /// 32 codes of 8 bits and a scale.
    Q8_0,
    /// 256 codes of 2 bits, 4-bit scales and minima of 16 codes each.
    Q2K,
    /// 256 codes of 3 bits, 6-bit scales of 16 codes each.
    Q3K,
    /// 256 codes of 4 bits, 6-bit scales and minima of 32 codes each.
    Q4K,
    /// 256 codes of 5 bits, 6-bit scales and minima of 32 codes each.
    Q5K,
    /// 256 codes of 6 bits, 8-bit scales of 16 codes each.
    Q6K,
    /// 32 codes of 4 bits for levels that are not evenly spaced, and a scale.
    IQ4NL,
}

/// Type, number in files, elements and bytes of a block.
const LAYOUTS: [(TensorType, u32, usize, usize); 14] = [
    (TensorType::F32, 0, 1, 4),
    (TensorType::F16, 1, 1, 2),
    (TensorType::BF16, 30, 1, 2),
    (TensorType::Q4_0, 2, 32, 18),
    (TensorType::Q4_1, 3, 32, 20),
    (TensorType::Q5_0, 6, 32, 22),
    (TensorType::Q5_1, 7, 32, 24),
    (TensorType::Q8_0, 8, 32, 34),
    (TensorType::Q2K, 10, 256, 84),
    (TensorType::Q3K, 11, 256, 110),
    (TensorType::Q4K, 12, 256, 144),
    (TensorType::Q5K, 13, 256, 176),
    (TensorType::Q6K, 14, 256, 210),
    (TensorType::IQ4NL, 20, 32, 18),
];

/// Numbers and names of types that are not read, for messages.
const OTHERS: [(u32, &str); 21] = [
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

impl TensorType {
    /// All types that are read.
    pub fn all() -> impl Iterator<Item = Self> {
        LAYOUTS.iter().map(|layout| layout.0)
    }

    /// The type of a number in a file; otherwise what that number stands for.
    ///
    /// # Errors
    /// When the type is not read.
    pub fn from_id(id: u32) -> Result<Self, String> {
        let found = LAYOUTS.iter().find(|layout| layout.1 == id).map(|layout| layout.0);
        found.ok_or_else(|| match OTHERS.iter().find(|other| other.0 == id) {
            Some((_, name)) => format!("type {id} ({name})"),
            None => format!("type {id}, which is none of ggml's"),
        })
    }

    /// The layout of its blocks; `None` for bf16.
    pub fn block_type(self) -> Option<BlockType> {
        BlockType::from_id(self.id())
    }

    /// Its number in files.
    pub fn id(self) -> u32 {
        self.layout().1
    }

    /// Elements of a block.
    pub fn block_len(self) -> usize {
        self.layout().2
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.layout().3
    }

    /// Bytes of `elements`, a whole number of blocks; `None` beyond 64 bits, or when they are no whole number of blocks.
    pub fn bytes(self, elements: usize) -> Option<usize> {
        let whole = elements.is_multiple_of(self.block_len());
        (elements / self.block_len()).checked_mul(self.block_bytes()).filter(|_| whole)
    }

    /// Whether an element is a number by itself.
    pub fn is_plain(self) -> bool {
        self.block_len() == 1
    }

    /// Bits of a code.
    pub fn bits(self) -> u32 {
        match self {
            Self::F32 => 32,
            Self::F16 | Self::BF16 => 16,
            Self::Q2K => 2,
            Self::Q3K => 3,
            Self::Q4_0 | Self::Q4_1 | Self::Q4K | Self::IQ4NL => 4,
            Self::Q5_0 | Self::Q5_1 | Self::Q5K => 5,
            Self::Q6K => 6,
            Self::Q8_0 => 8,
        }
    }

    /// Codes that share a scale.
    pub fn group_len(self) -> usize {
        match self {
            Self::Q2K | Self::Q3K | Self::Q6K => 16,
            other => other.block_len().min(32),
        }
    }

    /// Whether scales have no minima beside them.
    pub fn is_symmetric(self) -> bool {
        !matches!(self, Self::Q4_1 | Self::Q5_1 | Self::Q2K | Self::Q4K | Self::Q5K)
    }

    fn layout(self) -> (Self, u32, usize, usize) {
        let found = LAYOUTS.into_iter().find(|layout| layout.0 == self);
        found.expect("each type has a layout")
    }
}

impl fmt::Display for TensorType {
    /// `Q4_0`, `Q6_K`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.block_type() {
            Some(blocks) => blocks.fmt(f),
            None => f.write_str("BF16"),
        }
    }
}

impl From<BlockType> for TensorType {
    fn from(blocks: BlockType) -> Self {
        Self::from_id(blocks.id()).expect("all layouts of blocks are read")
    }
}
