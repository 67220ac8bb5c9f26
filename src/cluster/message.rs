//! Numbers as messages: 8 bytes each, little-endian.

/// Bytes of a number.
pub const NUMBER: usize = size_of::<u64>();

/// Whole numbers as a message.
pub fn of_numbers(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// The whole numbers of a message.
pub fn numbers(message: &[u8]) -> Vec<u64> {
    let (numbers, _) = message.as_chunks();
    numbers.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect()
}

/// The whole number that a message begins with.
///
/// # Panics
/// When the message is shorter than a number.
pub fn number(message: &[u8]) -> u64 {
    u64::from_le_bytes(*message.first_chunk().expect("a message that begins with a number"))
}

/// Numbers as a message.
pub fn of_floats(floats: &[f64]) -> Vec<u8> {
    floats.iter().flat_map(|float| float.to_le_bytes()).collect()
}

/// The numbers of a message.
pub fn floats(message: &[u8]) -> Vec<f64> {
    let (floats, _) = message.as_chunks();
    floats.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect()
}
