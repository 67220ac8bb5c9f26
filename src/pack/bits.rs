//! Little-endian bit streams of codes in 32-bit words, along the first axis (`qweight`) or the second (`qzeros`).
//!
//! All widths are one rule: code `i` occupies bits `b·i .. b·(i+1)` of the stream. 3-bit codes cross word borders.

use rayon::prelude::*;

use crate::variant::Bits;

/// Codes and words of one period of the stream, the shortest run of codes that fills whole words.
fn period(bits: Bits) -> (usize, usize) {
    let codes = bits.pack_factor();
    (codes, codes * bits.get() as usize / 32)
}

/// Packs codes `[K, N]` along `K`: words `[K·b/32, N]`.
///
/// # Panics
/// When `K` is not a multiple of the pack factor or the codes are not `[K, n]`.
pub fn pack_rows(codes: &[u8], n: usize, bits: Bits) -> Vec<i32> {
    let (rows, words) = period(bits);
    assert!(n > 0 && codes.len().is_multiple_of(rows * n), "codes are [K, N] with K a multiple of {rows}");
    let mut packed = vec![0i32; codes.len() / rows * words];
    packed.par_chunks_mut(words * n).zip(codes.par_chunks(rows * n)).for_each(|(packed, codes)| {
        for (row, codes) in codes.chunks_exact(n).enumerate() {
            let bit = row * bits.get() as usize;
            let (word, shift) = (bit / 32, bit % 32);
            for (packed, &code) in packed[word * n..][..n].iter_mut().zip(codes) {
                *packed |= (u32::from(code) << shift) as i32;
            }
            if shift + bits.get() as usize > 32 {
                for (packed, &code) in packed[(word + 1) * n..][..n].iter_mut().zip(codes) {
                    *packed |= (u32::from(code) >> (32 - shift)) as i32;
                }
            }
        }
    });
    packed
}

/// The inverse of [`pack_rows`].
///
/// # Panics
/// When the words are not `[K·b/32, N]` for whole periods.
pub fn unpack_rows(packed: &[i32], n: usize, bits: Bits) -> Vec<u8> {
    let (rows, words) = period(bits);
    assert!(n > 0 && packed.len().is_multiple_of(words * n), "words are [K·b/32, N]");
    let mut codes = vec![0u8; packed.len() / words * rows];
    codes.par_chunks_mut(rows * n).zip(packed.par_chunks(words * n)).for_each(|(codes, packed)| {
        for (row, codes) in codes.chunks_exact_mut(n).enumerate() {
            let bit = row * bits.get() as usize;
            let (word, shift) = (bit / 32, bit % 32);
            for (column, code) in codes.iter_mut().enumerate() {
                let mut value = packed[word * n + column] as u32 >> shift;
                if shift + bits.get() as usize > 32 {
                    value |= (packed[(word + 1) * n + column] as u32) << (32 - shift);
                }
                *code = value as u8 & bits.max_code();
            }
        }
    });
    codes
}

/// Packs values `[G, N]` along `N`: words `[G, N·b/32]`.
///
/// # Panics
/// When `N` is not a multiple of the pack factor or the values are not `[G, N]`.
pub fn pack_columns(values: &[u8], n: usize, bits: Bits) -> Vec<i32> {
    let (columns, words) = period(bits);
    assert!(n.is_multiple_of(columns) && values.len().is_multiple_of(n), "N is a multiple of {columns}");
    let mut packed = Vec::with_capacity(values.len() / columns * words);
    for chunk in values.chunks_exact(columns) {
        let mut stream = [0u32; 4];
        for (i, &value) in chunk.iter().enumerate() {
            let bit = i * bits.get() as usize;
            let wide = u64::from(value) << (bit % 32);
            stream[bit / 32] |= wide as u32;
            stream[bit / 32 + 1] |= (wide >> 32) as u32;
        }
        packed.extend(stream[..words].iter().map(|&w| w as i32));
    }
    packed
}

/// The inverse of [`pack_columns`]; `n` is the number of values a row.
///
/// # Panics
/// When the words are not `[G, N·b/32]`.
pub fn unpack_columns(packed: &[i32], n: usize, bits: Bits) -> Vec<u8> {
    let (columns, words) = period(bits);
    assert!(n.is_multiple_of(columns), "N is a multiple of {columns}");
    let mut values = Vec::with_capacity(packed.len() / words * columns);
    for chunk in packed.chunks_exact(words) {
        for i in 0..columns {
            let bit = i * bits.get() as usize;
            let low = u64::from(chunk[bit / 32] as u32);
            let high = chunk.get(bit / 32 + 1).map_or(0, |&w| u64::from(w as u32));
            values.push(((high << 32 | low) >> (bit % 32)) as u8 & bits.max_code());
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn unpacking_gives_what_was_packed(
            bits in prop::sample::select(&Bits::ALL[..]), periods in 1usize..4, n in 1usize..5, seed: u64,
        ) {
            let factor = bits.pack_factor();
            let codes: Vec<u8> = (0..periods * factor * n * factor)
                .map(|i| (seed.wrapping_mul(i as u64 | 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8 & bits.max_code())
                .collect();
            let n = n * factor;
            prop_assert_eq!(&unpack_rows(&pack_rows(&codes, n, bits), n, bits), &codes);
            prop_assert_eq!(&unpack_columns(&pack_columns(&codes, n, bits), n, bits), &codes);
        }
    }

    #[test]
    fn words_of_the_format() {
        let eight: Vec<u8> = (1..=8).collect();
        assert_eq!(pack_rows(&eight, 1, Bits::Four), [0x8765_4321_u32 as i32]);
        assert_eq!(pack_columns(&[7; 8], 8, Bits::Four), [0x7777_7777]);
        assert_eq!(pack_columns(&[0x7F; 4], 4, Bits::Eight), [0x7F7F_7F7F]);
        assert_eq!(pack_columns(&[1; 16], 16, Bits::Two), [0x5555_5555]);
        // 3 bits: code 10 lies on bits 30..33, code 21 on bits 63..66.
        let mut codes = [0u8; 32];
        codes[10] = 0b111;
        codes[21] = 0b011;
        let words = [0b11 << 30, (1u32 | 1 << 31) as i32, 0b01];
        assert_eq!(pack_rows(&codes, 1, Bits::Three), words);
        assert_eq!(pack_columns(&codes, 32, Bits::Three), words);
    }
}
