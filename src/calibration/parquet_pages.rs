//! Checks the page headers of a parquet column before its pages are decoded. The decoder allocates the sizes that the headers
//! state, so headers that state more than the file can hold are refused.
//!
//! Headers are Thrift structs in the compact protocol; `parquet.thrift` of the Parquet format describes them. Known fields must
//! have their types, so that the decoder reads the same bytes in the same way.

use std::io::{Error, ErrorKind, Read, Result, Take};

use parquet::file::{metadata::ColumnChunkMetaData, reader::ChunkReader};

/// Bytes of a page that may be compressed by any factor.
const ORDINARY_PAGE: u64 = 64 << 20;
/// Largest compression factor of a larger page.
const LARGEST_FACTOR: u64 = 256;
/// Nesting depth of structs and lists.
const DEEPEST: usize = 16;

/// Returns an error with the reason if the pages of a column chunk contradict their headers.
pub(super) fn check(source: &impl ChunkReader, chunk: &ColumnChunkMetaData) -> Result<()> {
    let start = chunk.dictionary_page_offset().unwrap_or(chunk.data_page_offset());
    let (Ok(mut at), Ok(length)) = (u64::try_from(start), u64::try_from(chunk.compressed_size())) else {
        return broken("a column begins or ends before the file");
    };
    let Some(end) = at.checked_add(length).filter(|&end| end <= source.len()) else {
        return broken("a column ends after the file");
    };
    let mut has_dictionary = false;
    while at < end {
        let bytes = source.get_read(at).map_err(Error::other)?.take(end - at);
        let mut thrift = Thrift { bytes };
        let page = page_header(&mut thrift)?;
        let left = thrift.bytes.limit();
        if page.compressed > left {
            return broken("a page ends after its column");
        }
        if page.uncompressed > ORDINARY_PAGE.max(page.compressed.saturating_mul(LARGEST_FACTOR)) {
            return broken("a page cannot be as large as its header says");
        }
        // A length of four bytes stands before each text.
        if page.dictionary_values > page.uncompressed / 4 {
            return broken("a dictionary cannot hold as many values as its header says");
        }
        has_dictionary |= page.kind == DICTIONARY_PAGE;
        // The decoder panics there.
        if page.needs_dictionary && !has_dictionary {
            return broken("a page needs a dictionary, and none is before it");
        }
        at = end - left + page.compressed;
    }
    Ok(())
}

#[derive(Default)]
struct PageHeader {
    kind: u64,
    uncompressed: u64,
    compressed: u64,
    dictionary_values: u64,
    /// Whether the values of a data page are places in a dictionary.
    needs_dictionary: bool,
}

/// The kind of a dictionary's page, as it is stored: 2, zigzag.
const DICTIONARY_PAGE: u64 = 4;
/// The encodings of places in a dictionary, as they are stored: 2 and 8, zigzag.
const DICTIONARY_ENCODINGS: [u64; 2] = [4, 16];

fn page_header(thrift: &mut Thrift<impl Read>) -> Result<PageHeader> {
    let mut page = PageHeader::default();
    thrift.fields(|thrift, field| {
        match field {
            (2, I32) => page.uncompressed = thrift.size()?,
            (3, I32) => page.compressed = thrift.size()?,
            (1, I32) => page.kind = thrift.number()?,
            // A checksum.
            (4, I32) => thrift.skip(I32, DEEPEST)?,
            // A data page, and one of the second version.
            (5, STRUCT) => thrift.fields(|thrift, field| match field {
                (2, I32) => {
                    page.needs_dictionary |= DICTIONARY_ENCODINGS.contains(&thrift.number()?);
                    Ok(())
                }
                (1..=4, I32) => thrift.skip(I32, DEEPEST),
                (5, STRUCT) => thrift.statistics(),
                (1..=5, _) => broken(DAMAGED),
                (_, kind) => thrift.skip(kind, DEEPEST),
            })?,
            (8, STRUCT) => thrift.fields(|thrift, field| match field {
                (4, I32) => {
                    page.needs_dictionary |= DICTIONARY_ENCODINGS.contains(&thrift.number()?);
                    Ok(())
                }
                (1..=6, I32) => thrift.skip(I32, DEEPEST),
                (7, TRUE | FALSE) => Ok(()),
                (8, STRUCT) => thrift.statistics(),
                (1..=8, _) => broken(DAMAGED),
                (_, kind) => thrift.skip(kind, DEEPEST),
            })?,
            (7, STRUCT) => thrift.fields(|thrift, field| {
                match field {
                    (1, I32) => page.dictionary_values = thrift.size()?,
                    (2, I32) => thrift.skip(I32, DEEPEST)?,
                    (3, TRUE | FALSE) => {}
                    (1..=3, _) => return broken(DAMAGED),
                    (_, kind) => thrift.skip(kind, DEEPEST)?,
                }
                Ok(())
            })?,
            (6, STRUCT) => thrift.skip(STRUCT, DEEPEST)?,
            (1..=8, _) => return broken(DAMAGED),
            (_, kind) => thrift.skip(kind, DEEPEST)?,
        }
        Ok(())
    })?;
    Ok(page)
}

const DAMAGED: &str = "the header of a page is damaged";

fn broken<T>(problem: &str) -> Result<T> {
    Err(Error::new(ErrorKind::InvalidData, problem))
}

// The compact protocol's types of fields.
const STOP: u8 = 0;
const TRUE: u8 = 1;
const FALSE: u8 = 2;
const BYTE: u8 = 3;
const I16: u8 = 4;
const I32: u8 = 5;
const I64: u8 = 6;
const DOUBLE: u8 = 7;
const BINARY: u8 = 8;
const LIST: u8 = 9;
const STRUCT: u8 = 12;

struct Thrift<R> {
    bytes: Take<R>,
}

impl<R: Read> Thrift<R> {
    /// Calls `field` with the number and the type of each field of a struct, which it must read.
    fn fields(&mut self, mut field: impl FnMut(&mut Self, (u8, u8)) -> Result<()>) -> Result<()> {
        let mut number = 0_u8;
        loop {
            let (step, kind) = self.halves()?;
            if kind == STOP {
                return Ok(());
            }
            number = match number.checked_add(step) {
                // A step of 0 announces an explicit field number, for gaps that no struct here has.
                Some(next) if step > 0 => next,
                _ => return broken(DAMAGED),
            };
            field(self, (number, kind))?;
        }
    }

    fn statistics(&mut self) -> Result<()> {
        self.fields(|thrift, field| match field {
            (1 | 2 | 5 | 6, BINARY) | (3 | 4, I64) | (7 | 8, TRUE | FALSE) => thrift.skip(field.1, DEEPEST),
            (1..=8, _) => broken(DAMAGED),
            (_, kind) => thrift.skip(kind, DEEPEST),
        })
    }

    fn skip(&mut self, kind: u8, deepest: usize) -> Result<()> {
        let Some(deepest) = deepest.checked_sub(1) else { return broken(DAMAGED) };
        match kind {
            // As a field it has no bytes.
            TRUE | FALSE => Ok(()),
            BYTE => self.skip_bytes(1),
            I16 | I32 | I64 => self.number().map(drop),
            DOUBLE => self.skip_bytes(8),
            BINARY => {
                let length = self.number()?;
                self.skip_bytes(length)
            }
            STRUCT => self.fields(|thrift, (_, kind)| thrift.skip(kind, deepest)),
            LIST => {
                let (short, kind) = self.halves()?;
                let count = if short == 15 { self.number()? } else { u64::from(short) };
                if matches!(kind, TRUE | FALSE) {
                    return broken(DAMAGED);
                }
                // Each takes a byte at least, so that this ends.
                (0..count).try_for_each(|_| self.skip(kind, deepest))
            }
            _ => broken(DAMAGED),
        }
    }

    fn skip_bytes(&mut self, count: u64) -> Result<()> {
        let skipped = std::io::copy(&mut self.bytes.by_ref().take(count), &mut std::io::sink())?;
        if skipped == count { Ok(()) } else { broken(DAMAGED) }
    }

    /// A number of bytes or values: zigzag, not negative, at most 31 bits.
    fn size(&mut self) -> Result<u64> {
        match self.number()? {
            zigzag if zigzag % 2 == 0 && zigzag / 2 <= i32::MAX as u64 => Ok(zigzag / 2),
            _ => broken(DAMAGED),
        }
    }

    /// Seven bits a byte, the lowest first.
    fn number(&mut self) -> Result<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7F) << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        broken(DAMAGED)
    }

    fn halves(&mut self) -> Result<(u8, u8)> {
        self.byte().map(|byte| (byte >> 4, byte & 0xF))
    }

    fn byte(&mut self) -> Result<u8> {
        let mut byte = [0];
        match self.bytes.read_exact(&mut byte) {
            Ok(()) => Ok(byte[0]),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => broken(DAMAGED),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn read(bytes: &[u8]) -> Result<(PageHeader, u64)> {
        let mut thrift = Thrift { bytes: Cursor::new(bytes).take(bytes.len() as u64) };
        let page = page_header(&mut thrift)?;
        Ok((page, thrift.bytes.limit()))
    }

    #[test]
    fn sizes_are_read_and_the_rest_is_passed_over() {
        // Type 0, sizes 300 and 5, a data page of 2 values with statistics, and a field of the future, a list of structs.
        let header = [
            0x15, 0, 0x15, 0xD8, 4, 0x15, 10, 0x2C, 0x15, 4, 0x15, 0, 0x15, 6, 0x15, 6, 0x1C, 0x18, 2, b'a',
            b'b', 0x26, 0, 0, 0, 0x49, 0x2C, 0x11, 0, 0, 0, 9, 9,
        ];
        let (page, left) = read(&header).unwrap();
        assert_eq!((page.uncompressed, page.compressed, page.dictionary_values, left), (300, 5, 0, 2));
        assert_eq!((page.kind, page.needs_dictionary), (0, false));
        // A dictionary of 3 values.
        let (page, left) = read(&[0x15, 4, 0x15, 40, 0x15, 40, 0x4C, 0x15, 6, 0x15, 0, 0x11, 0, 0]).unwrap();
        assert_eq!((page.uncompressed, page.dictionary_values, left), (20, 3, 0));
        assert_eq!((page.kind, page.needs_dictionary), (DICTIONARY_PAGE, false));
        // Data pages of both versions, whose values are places in a dictionary.
        for header in [
            &[0x15, 0, 0x15, 2, 0x15, 2, 0x2C, 0x15, 4, 0x15, 16, 0, 0][..],
            &[0x15, 6, 0x15, 2, 0x15, 2, 0x5C, 0x15, 4, 0x15, 0, 0x15, 4, 0x15, 4, 0, 0],
        ] {
            assert!(read(header).unwrap().0.needs_dictionary);
        }
    }

    #[test]
    fn what_is_no_header_is_refused() {
        let damaged: [&[u8]; 8] = [
            &[],
            // Cut off.
            &[0x15, 0, 0x15],
            // A negative size, one beyond 31 bits, a number without end.
            &[0x25, 1, 0],
            &[0x25, 0x80, 0x80, 0x80, 0x80, 0x20, 0],
            &[0x25, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF],
            // A size that is a list; a list of booleans; a number of its own.
            &[0x29, 0x15, 0, 0],
            &[0x99, 0xF1, 0xFF, 0xFF, 0xFF, 0xFF, 7, 0],
            &[0x05, 4, 0, 0],
        ];
        for bytes in damaged {
            let error = read(bytes).err().unwrap_or_else(|| panic!("{bytes:?} was read"));
            assert_eq!(error.to_string(), DAMAGED, "{bytes:?}");
        }
        // A list of lists of lists.
        let nested = [&[0x99_u8][..], &[0x19; 40]].concat();
        assert!(read(&nested).is_err());
    }
}
