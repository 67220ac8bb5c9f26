//! Solved linears as messages between the ranks of a run.

use half::f16;

use crate::{
    cluster::message::{NUMBER, number, of_numbers},
    error::Result,
    ggml::BlockType,
    gptq::{
        BlockLinear, QuantizedLinear,
        solver::{Solution, Solved},
    },
    variant::Bits,
};

/// The format of a linear is a number: the bits of a code, or this and ggml's number of a type.
const BLOCKS: u64 = 256;

/// Appends a linear to a message: its format, rows, columns and groups; then codes, scales, zeros and groups as they are, or blocks.
pub(super) fn write_linear(message: &mut Vec<u8>, linear: &Solved) -> Result<()> {
    if let Solved::Blocks(linear) = linear {
        let format = BLOCKS + u64::from(linear.kind().id());
        write_numbers(message, [format, linear.out_features() as u64, linear.in_features() as u64, 0]);
        message.extend(linear.bytes());
        return Ok(());
    }
    let linear = linear.on_host()?;
    let sizes = [linear.out_features(), linear.in_features(), linear.groups()].map(|size| size as u64);
    let [n, k, groups] = sizes;
    write_numbers(message, [u64::from(linear.bits().get()), n, k, groups]);
    message.extend(linear.codes());
    message.extend(linear.scales().iter().flat_map(|scale| scale.to_le_bytes()));
    message.extend(linear.zeros());
    message.extend(linear.g_idx().iter().flat_map(|group| group.to_le_bytes()));
    Ok(())
}

/// Appends a solution without a fallback to a message.
pub(super) fn write_solution(message: &mut Vec<u8>, solution: &Solution) -> Result<()> {
    write_numbers(message, [solution.squared_error.to_bits(), solution.uncompensated as u64]);
    write_linear(message, &solution.linear)
}

pub(super) fn write_numbers<const N: usize>(message: &mut Vec<u8>, numbers: [u64; N]) {
    message.extend(of_numbers(&numbers));
}

/// Bytes of a linear in a message.
pub(super) fn linear_bytes(n: usize, k: usize, format: Format) -> usize {
    let numbers = 4 * NUMBER;
    numbers
        + match format {
            Format::Gptq { groups } => n * k + 3 * groups * n + 4 * k,
            Format::Blocks(kind) => n * kind.bytes(k).unwrap_or(0),
        }
}

/// What the bytes of a linear depend on beside its shape.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Format {
    Gptq { groups: usize },
    Blocks(BlockType),
}

/// The rest of a message.
pub(super) struct MessageReader<'m>(&'m [u8]);

impl<'m> MessageReader<'m> {
    pub(super) fn new(message: &'m [u8]) -> Self {
        Self(message)
    }

    pub(super) fn bytes(&mut self, count: usize) -> &'m [u8] {
        let (own, others) = self.0.split_at(count);
        self.0 = others;
        own
    }

    pub(super) fn number(&mut self) -> u64 {
        number(self.bytes(NUMBER))
    }

    pub(super) fn solution(&mut self) -> Solution {
        let squared_error = f64::from_bits(self.number());
        let uncompensated = self.number() as usize;
        Solution { linear: self.linear(), squared_error, uncompensated, fallback: None }
    }

    pub(super) fn linear(&mut self) -> Solved {
        let format = self.number();
        let (n, k, groups) = (self.number() as usize, self.number() as usize, self.number() as usize);
        if format >= BLOCKS {
            let kind = BlockType::from_id((format - BLOCKS) as u32).expect("a type that a rank has solved");
            let bytes = self.bytes(n * kind.bytes(k).expect("rows are whole blocks"));
            return Solved::Blocks(BlockLinear::new(kind, k, bytes.to_vec()));
        }
        let bits = Bits::new(format as u32).expect("bits that a rank has solved");
        let codes = self.bytes(k * n).to_vec();
        let (scales, _) = self.bytes(2 * groups * n).as_chunks();
        let scales = scales.iter().map(|bytes| f16::from_le_bytes(*bytes)).collect();
        let zeros = self.bytes(groups * n).to_vec();
        let (g_idx, _) = self.bytes(4 * k).as_chunks();
        let g_idx = g_idx.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        Solved::Host(QuantizedLinear::new(bits, codes, scales, zeros, g_idx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linears_are_read_as_they_were_written() {
        let (n, k, groups) = (5, 6, 2);
        let codes = (0..n * k).map(|i| (i % 16) as u8).collect();
        let scales = (0..groups * n).map(|i| f16::from_f32(i as f32 / 7.0)).collect();
        let zeros = (0..groups * n).map(|i| (i % 15) as u8).collect();
        let linear = QuantizedLinear::new(Bits::Four, codes, scales, zeros, vec![0, 1, 0, 1, 1, 0]);
        let kind = BlockType::Q4_0;
        let blocks = (0..2 * kind.bytes(64).unwrap()).map(|i| i as u8).collect();
        let blocks = BlockLinear::new(kind, 64, blocks);
        let mut message = Vec::new();
        write_linear(&mut message, &Solved::Host(linear.clone())).unwrap();
        assert_eq!(message.len(), linear_bytes(n, k, Format::Gptq { groups }));
        let first = message.len();
        let solution = Solution {
            linear: Solved::Blocks(blocks.clone()),
            squared_error: 0.1,
            uncompensated: 3,
            fallback: None,
        };
        write_solution(&mut message, &solution).unwrap();
        assert_eq!(message.len() - first, 16 + linear_bytes(2, 64, Format::Blocks(kind)));

        let mut rest = MessageReader::new(&message);
        assert_eq!(rest.linear().on_host().unwrap().into_owned(), linear);
        let found = rest.solution();
        assert_eq!((found.squared_error, found.uncompensated), (0.1, 3));
        assert!(matches!(found.linear, Solved::Blocks(found) if found == blocks));
        assert!(rest.0.is_empty());
    }
}
