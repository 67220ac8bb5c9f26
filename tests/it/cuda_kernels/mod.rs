//! The texts of `src/cuda`, compiled for this machine and run thread by thread (`tests/cuda_host`), against plain
//! definitions of what they compute.

mod linear;
mod matmul;
mod mistakes;
mod panels;
mod problem;
mod product;
#[path = "../../../src/gptq/solver/tests/reference.rs"]
mod reference;
mod small;
mod solve;
mod solver;

// For `reference`.
use gptq::{
    accuracy::{AccuracyOptions, Scales},
    gptq::{ColumnOrder, Grid, QuantizedLinear, Step, dead_columns},
    variant::{Order, Variant},
};

/// Bytes of arguments, in the order of the kernel's parameters.
macro_rules! arguments {
    ($($value:expr),* $(,)?) => { [$(bytemuck::bytes_of(&$value).to_vec()),*] };
}
pub(crate) use arguments;

/// Numbers that look random and are always the same.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// splitmix64.
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// From 0 up to, but not, 1.
    pub(crate) fn fraction(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    /// Mean 0, variance 1, nearly normal.
    pub(crate) fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.fraction()).sum::<f64>() - 6.0
    }

    /// A permutation of `0..length`.
    pub(crate) fn order(&mut self, length: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..length).collect();
        (1..length).rev().for_each(|i| order.swap(i, self.below(i + 1)));
        order
    }
}
