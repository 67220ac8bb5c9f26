//! One output: bits, group size, column order and grid, and the branch name that follows from them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    error::Error,
    ggml::{BlockGrid, Mix},
};

/// Bits a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Bits {
    /// 2 bits, codes 0..=3.
    Two = 2,
    /// 3 bits, codes 0..=7.
    Three = 3,
    /// 4 bits, codes 0..=15.
    Four = 4,
    /// 8 bits, codes 0..=255.
    Eight = 8,
}

impl Bits {
    /// All widths of the format.
    pub const ALL: [Self; 4] = [Self::Two, Self::Three, Self::Four, Self::Eight];

    /// The width with `bits` bits, if the format has it.
    pub fn new(bits: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|b| b.get() == bits)
    }

    /// The number of bits.
    pub fn get(self) -> u32 {
        self as u32
    }

    /// The largest code, `2^b − 1`.
    pub fn max_code(self) -> u8 {
        ((1u32 << self.get()) - 1) as u8
    }

    /// The zero point of the symmetric grid, `2^(b−1)`.
    pub fn symmetric_zero(self) -> u8 {
        1 << (self.get() - 1)
    }

    /// Both dimensions of a linear must be multiples of this for whole 32-bit words: 16, 32, 8 or 4.
    pub fn pack_factor(self) -> usize {
        match self {
            Self::Three => 32,
            _ => 32 / self.get() as usize,
        }
    }
}

/// Input features that share one scale and zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GroupSize {
    /// One group a row; `-1` in files.
    PerChannel,
    /// This many input features a group; the last group may be shorter.
    Features(usize),
}

impl GroupSize {
    /// Smallest and largest size accepted.
    pub const RANGE: std::ops::RangeInclusive<usize> = 16..=1024;

    /// Features a group, for a linear with `in_features`.
    pub fn features(self, in_features: usize) -> usize {
        match self {
            Self::PerChannel => in_features,
            Self::Features(size) => size,
        }
    }

    /// Groups of a linear with `in_features`: `ceil(K/g)`.
    pub fn groups(self, in_features: usize) -> usize {
        in_features.div_ceil(self.features(in_features))
    }

    /// As written in `config.json`: -1 or the size.
    pub fn as_config(self) -> i64 {
        match self {
            Self::PerChannel => -1,
            Self::Features(size) => size as i64,
        }
    }
}

/// Order of input features in the solver, and of the groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// As stored; groups are runs of neighbouring features.
    Sequential,
    /// Act order: descending Hessian diagonal; groups follow that order, so `g_idx` is a permutation.
    Act,
    /// Act order over static groups: descending diagonal, but groups are runs of neighbouring features whose
    /// scales are fitted beforehand, so `g_idx` stays sequential.
    ActStatic,
}

/// Order of input features before quantization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sorting {
    /// As stored.
    Stored,
    /// By descending Hessian diagonal.
    Descending,
    /// Groups of this many neighbours by their largest diagonal, features within a group by theirs; a shorter last group
    /// stays the last.
    Grouped(usize),
}

impl Order {
    /// `desc_act` in files: whether `g_idx` is a permutation. Readers that look at the flag alone would refuse act order with static
    /// groups, whose `g_idx` is sequential, if it were set there.
    pub fn desc_act(self) -> bool {
        self == Self::Act
    }
}

/// A named list of variants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VariantSet {
    /// The four branches of the model cards of 2023: three of them with act order.
    Card,
    /// Variants that current servers run at full speed: symmetric, sequential `g_idx`, 4 and 8 bits.
    Serve,
    /// Both, each variant once.
    All,
}

impl VariantSet {
    /// Its variants, the one of branch `main` first.
    pub fn variants(self) -> Vec<Variant> {
        const CARD: [&str; 4] = ["4bit-128g", "4bit-32g-act", "4bit-64g-act", "4bit-128g-act"];
        const SERVE: [&str; 4] = ["4bit-128g", "4bit-64g", "4bit-32g", "8bit-128g"];
        let texts = match self {
            Self::Card => CARD.to_vec(),
            Self::Serve => SERVE.to_vec(),
            Self::All => [&CARD[..], &SERVE[1..]].concat(),
        };
        texts.into_iter().map(|text| text.parse().expect("the variants of sets are well formed")).collect()
    }
}

/// One output of a run. Written as `4bit-128g`, `4bit-32g-act`, `4bit-128g-static`, `3bit--1g-asym`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Variant {
    /// Bits a code.
    pub bits: Bits,
    /// Input features a group.
    pub group_size: GroupSize,
    /// Column order.
    pub order: Order,
    /// Symmetric grid: the zero point is `2^(b−1)` everywhere.
    pub symmetric: bool,
}

impl Variant {
    /// Whether every scale is known before the first column. Otherwise the solver fits it where its group begins.
    pub fn scales_known_beforehand(&self) -> bool {
        self.order == Order::ActStatic || self.group_size == GroupSize::PerChannel
    }

    /// Order of this variant's features in the solver. Without act order `group_aware` can sort them; groups stay runs
    /// of neighbouring features.
    pub fn sorting(&self, group_aware: bool) -> Sorting {
        match (self.order, group_aware, self.group_size) {
            (Order::Sequential, false, _) => Sorting::Stored,
            (Order::Sequential, true, GroupSize::Features(size)) => Sorting::Grouped(size),
            _ => Sorting::Descending,
        }
    }

    /// The branch of this variant: `main` if it is the variant `main`, which is `4bit-128g` for `None`. Else
    /// `gptq-{bits}bit-{g}g-actorder_{True|False}`, with `-static` and `-asym` if they apply.
    pub fn branch(&self, main: Option<Self>) -> String {
        if *self == main.unwrap_or_else(|| VariantSet::Card.variants()[0]) {
            return "main".into();
        }
        let mut name = format!(
            "gptq-{}bit-{}g-actorder_{}",
            self.bits.get(),
            self.group_size.as_config(),
            if self.order == Order::Sequential { "False" } else { "True" }
        );
        if self.order == Order::ActStatic {
            name.push_str("-static");
        }
        if !self.symmetric {
            name.push_str("-asym");
        }
        name
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}bit-{}g", self.bits.get(), self.group_size.as_config())?;
        f.write_str(match self.order {
            Order::Sequential => "",
            Order::Act => "-act",
            Order::ActStatic => "-static",
        })?;
        f.write_str(if self.symmetric { "" } else { "-asym" })
    }
}

/// Text form of a variant.
const FORM: &str = "{bits}bit-{group}g[-act|-static][-asym], e.g. 4bit-32g-act";

impl FromStr for Variant {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let fail = |expected: &str| Error::Value {
            what: "variant".into(),
            expected: expected.into(),
            found: text.into(),
        };
        let (bits, rest) = text.split_once("bit-").ok_or_else(|| fail(FORM))?;
        let bits = bits.parse().ok().and_then(Bits::new).ok_or_else(|| fail("2, 3, 4 or 8 bits"))?;
        let end = rest.find('g').ok_or_else(|| fail(FORM))?;
        let (group, flags) = (&rest[..end], &rest[end + 1..]);
        let group_size = match group.parse::<i64>() {
            Ok(-1) => GroupSize::PerChannel,
            Ok(size) if usize::try_from(size).is_ok_and(|s| GroupSize::RANGE.contains(&s)) => {
                GroupSize::Features(size as usize)
            }
            _ => return Err(fail("a group size of -1 or 16 to 1024")),
        };
        let (order, flags) = match flags {
            f if f.starts_with("-act") => (Order::Act, &f[4..]),
            f if f.starts_with("-static") => (Order::ActStatic, &f[7..]),
            f => (Order::Sequential, f),
        };
        let symmetric = match flags {
            "" => true,
            "-asym" => false,
            _ => return Err(fail(FORM)),
        };
        Ok(Self { bits, group_size, order, symmetric })
    }
}

/// One output of a run, written as its variant or its mix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Output {
    /// A branch in GPTQ's format.
    Gptq(Variant),
    /// A GGUF file for llama.cpp.
    Gguf(Mix),
}

impl Output {
    /// The variant of a branch in GPTQ's format.
    pub fn gptq(&self) -> Option<Variant> {
        match self {
            Self::Gptq(variant) => Some(*variant),
            Self::Gguf(_) => None,
        }
    }

    /// Its name in the output folder: [`Variant::branch`], or that of a GGUF file.
    pub fn branch(&self, main: Option<Variant>) -> String {
        match self {
            Self::Gptq(variant) => variant.branch(main),
            Self::Gguf(mix) => format!("model-{}.gguf", mix.name()),
        }
    }

    /// Order of its features in the solver. Blocks of ggml hold neighbouring features, and their scales are fitted in the
    /// order of the blocks.
    pub fn sorting(&self, group_aware: bool) -> Sorting {
        match self {
            Self::Gptq(variant) => variant.sorting(group_aware),
            Self::Gguf(_) => Sorting::Stored,
        }
    }

    /// Bits of a code; of most tensors of a GGUF file.
    pub fn bits(&self) -> u32 {
        match self {
            Self::Gptq(variant) => variant.bits.get(),
            Self::Gguf(mix) => main_grid(*mix).levels.count().next_power_of_two().ilog2(),
        }
    }

    /// Input features that share a scale; in most tensors of a GGUF file.
    pub fn group_size(&self) -> GroupSize {
        match self {
            Self::Gptq(variant) => variant.group_size,
            Self::Gguf(mix) => GroupSize::Features(main_grid(*mix).sub_len),
        }
    }

    /// Column order.
    pub fn order(&self) -> Order {
        self.gptq().map_or(Order::Sequential, |variant| variant.order)
    }

    /// Whether the grid is symmetric; of most tensors of a GGUF file.
    pub fn symmetric(&self) -> bool {
        match self {
            Self::Gptq(variant) => variant.symmetric,
            Self::Gguf(mix) => !main_grid(*mix).has_offsets(),
        }
    }
}

fn main_grid(mix: Mix) -> BlockGrid {
    mix.main_type().grid().expect("a mix has codes")
}

impl From<Variant> for Output {
    fn from(variant: Variant) -> Self {
        Self::Gptq(variant)
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gptq(variant) => variant.fmt(f),
            Self::Gguf(mix) => mix.fmt(f),
        }
    }
}

impl FromStr for Output {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match (text.parse(), text.contains("bit")) {
            (Ok(mix), _) => Ok(Self::Gguf(mix)),
            (Err(_), true) => text.parse().map(Self::Gptq),
            (Err(_), false) => {
                let mixes = Mix::ALL.map(|mix| mix.to_string()).join(", ");
                let what = "variant".into();
                Err(Error::Value {
                    what,
                    expected: format!("{FORM}, or a GGUF file: {mixes}"),
                    found: text.into(),
                })
            }
        }
    }
}

impl Serialize for Output {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Output {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for Variant {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Variant {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_what_it_parses() {
        for text in ["4bit-128g", "4bit-32g-act", "3bit--1g", "8bit-64g-static-asym", "2bit-16g-asym"] {
            assert_eq!(text.parse::<Variant>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn refuses_what_the_format_cannot_hold() {
        for text in ["", "4bit", "5bit-128g", "4bit-0g", "4bit-8g", "4bit-2048g", "4bit-128", "4bit-32g-foo"]
        {
            assert!(text.parse::<Variant>().is_err(), "{text}");
        }
    }

    #[test]
    fn outputs_are_variants_and_mixes() {
        let output: Output = "4bit-32g-act".parse().unwrap();
        assert_eq!(
            (output.to_string().as_str(), output.bits(), output.order()),
            ("4bit-32g-act", 4, Order::Act)
        );
        let shape = |text: &str| {
            let output: Output = text.parse().unwrap();
            assert_eq!((output.to_string().as_str(), output.gptq()), (text, None));
            (output.bits(), output.group_size().as_config(), output.symmetric())
        };
        assert_eq!(["q4_k_m", "q3_k_m", "q8_0"].map(shape), [(4, 32, false), (3, 16, true), (8, 32, true)]);
        assert_eq!("q4_k_m".parse::<Output>().unwrap().branch(None), "model-Q4_K_M.gguf");
        for (text, part) in [("4bit-8g", "group size"), ("q4_k_x", "q4_k_m"), ("", "4bit-32g-act")] {
            let error = text.parse::<Output>().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn branches_of_the_card() {
        let names: Vec<_> = VariantSet::Card.variants().iter().map(|variant| variant.branch(None)).collect();
        assert_eq!(
            names,
            [
                "main",
                "gptq-4bit-32g-actorder_True",
                "gptq-4bit-64g-actorder_True",
                "gptq-4bit-128g-actorder_True"
            ]
        );
        let serve: Vec<_> = VariantSet::Serve.variants().iter().map(|variant| variant.branch(None)).collect();
        assert_eq!(
            serve,
            [
                "main",
                "gptq-4bit-64g-actorder_False",
                "gptq-4bit-32g-actorder_False",
                "gptq-8bit-128g-actorder_False"
            ]
        );
        assert_eq!(VariantSet::All.variants().len(), 7);
        let per_channel: Variant = "4bit--1g".parse().unwrap();
        assert_eq!(per_channel.branch(None), "gptq-4bit--1g-actorder_False");
        assert_eq!(per_channel.branch(Some(per_channel)), "main");
        let usual: Variant = "4bit-128g".parse().unwrap();
        assert_eq!(usual.branch(Some(per_channel)), "gptq-4bit-128g-actorder_False");
    }
}
