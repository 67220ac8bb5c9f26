//! Reads the column of text or messages of a parquet file, row group by row group; no other column is touched.

use super::corpus::Rows;
use super::objects::{Field, Objects, PROMPT_COLUMNS, TEXT_COLUMN};
use super::parquet_pages;
use crate::error::{Error, Result};
use parquet::basic::Type as PhysicalType;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::ByteArrayType;
use parquet::file::reader::{ChunkReader, FileReader, SerializedFileReader};
use parquet::schema::types::{SchemaDescriptor, Type};
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Rows decoded at a time.
const BATCH: usize = 1024;

/// Appends the rows of `column` to `rows`, or of the first usual column where none is named. `sources` are the same file twice, as
/// its pages are checked beside the reader; `path` serves for messages.
pub(super) fn read<S: ChunkReader + 'static>(
    sources: [S; 2],
    path: &Path,
    column: Option<&str>,
    rows: &mut Rows<'_>,
) -> Result<()> {
    // The reader panics at some damaged pages where it should return an error; to the user it is one. The
    // rows are dropped after it, so nothing half-written is ever seen.
    let read = AssertUnwindSafe(|| read_row_groups(sources, path, column, rows));
    catch_unwind(read).unwrap_or_else(|_| {
        let problem = "it cannot be read as parquet: a page is damaged".to_owned();
        Err(Error::Dataset { path: path.into(), problem })
    })
}

fn read_row_groups<S: ChunkReader + 'static>(
    [source, unchecked]: [S; 2],
    path: &Path,
    named: Option<&str>,
    rows: &mut Rows<'_>,
) -> Result<()> {
    let broken = |problem: String| Error::Dataset { path: path.into(), problem };
    let unreadable = |error: &dyn Display| broken(format!("it cannot be read as parquet: {error}"));

    // Also without a compressor: a dictionary's text may be repeated at will.
    rows.begin_compressed(unchecked.len());
    let file = SerializedFileReader::new(source).map_err(|error| unreadable(&error))?;
    let schema = file.metadata().file_metadata().schema_descr();
    let fields = schema.root_schema().get_fields();
    let has = |name: &str| fields.iter().any(|field| field.name() == name);
    let is_group = |name: &str| fields.iter().any(|field| field.name() == name && field.is_group());
    let column = match Field::choose(named, has) {
        Some(Field::One(name)) if is_group(&name) => {
            return read_conversations(&file, &unchecked, path, named, &[&name], rows);
        }
        Some(Field::PromptCompletion) => {
            return read_conversations(&file, &unchecked, path, named, &PROMPT_COLUMNS, rows);
        }
        Some(Field::One(name)) => name,
        None => named.unwrap_or(TEXT_COLUMN).to_owned(),
    };
    let column = column.as_str();
    let index = text_column(schema, path, column)?;
    rows.set_column(column);
    let mut row_number = 0;
    for group in 0..file.num_row_groups() {
        let group = file.get_row_group(group).map_err(|error| unreadable(&error))?;
        parquet_pages::check(&unchecked, group.metadata().column(index))
            .map_err(|error| unreadable(&error))?;
        let ColumnReader::ByteArrayColumnReader(reader) =
            group.get_column_reader(index).map_err(|error| unreadable(&error))?
        else {
            return Err(broken(format!("column `{column}` changes its type between row groups")));
        };
        let expected = u64::try_from(group.metadata().num_rows()).unwrap_or(0);
        let found = read_group(reader, unreadable, |text| {
            row_number += 1;
            match text.map(str::from_utf8).transpose() {
                Ok(Some(text)) => rows.push_text(path, format_args!("row {row_number}"), text)?,
                Ok(None) => rows.push_null(),
                Err(_) => return Err(broken(format!("row {row_number} of column `{column}` is not UTF-8"))),
            }
            rows.check_size(path)
        })?;
        if found != expected {
            return Err(broken(format!(
                "column `{column}` ends after {found} of {expected} rows of a row group"
            )));
        }
    }
    Ok(())
}

/// Appends the conversations in `columns`, whose cells are lists of messages, or texts where they are a prompt and its completion.
fn read_conversations<S: ChunkReader + 'static>(
    file: &SerializedFileReader<S>,
    unchecked: &S,
    path: &Path,
    named: Option<&str>,
    columns: &[&str],
    rows: &mut Rows<'_>,
) -> Result<()> {
    let broken = |problem: String| Error::Dataset { path: path.into(), problem };
    let unreadable = |error: &dyn Display| broken(format!("it cannot be read as parquet: {error}"));
    let schema = file.metadata().file_metadata().schema_descr();
    let root = schema.root_schema();
    let wanted = root.get_fields().iter().filter(|field| columns.contains(&field.name()));
    let projection = Type::group_type_builder(root.name()).with_fields(wanted.cloned().collect());
    let projection = projection.build().map_err(|error| unreadable(&error))?;
    let mut objects = Objects::new(path, named);
    let mut number = 0;
    for group in 0..file.num_row_groups() {
        let group = file.get_row_group(group).map_err(|error| unreadable(&error))?;
        for (index, leaf) in schema.columns().iter().enumerate() {
            if leaf.path().parts().first().is_some_and(|name| columns.contains(&name.as_str())) {
                parquet_pages::check(unchecked, group.metadata().column(index))
                    .map_err(|error| unreadable(&error))?;
            }
        }
        let found = group.get_row_iter(Some(projection.clone())).map_err(|error| unreadable(&error))?;
        for row in found {
            let row = row.map_err(|error| unreadable(&error))?.to_json_value();
            number += 1;
            let Some(object) = row.as_object() else {
                return Err(broken(format!("row {number} is no record")));
            };
            objects.push(object, &format!("row {number}"), rows)?;
            rows.check_size(path)?;
        }
    }
    Ok(())
}

/// Calls `row` for each row of one row group's column chunk, `None` for null; returns how many there were.
fn read_group(
    mut reader: ColumnReaderImpl<ByteArrayType>,
    unreadable: impl Fn(&dyn Display) -> Error,
    mut row: impl FnMut(Option<&[u8]>) -> Result<()>,
) -> Result<u64> {
    let (mut levels, mut values) = (Vec::with_capacity(BATCH), Vec::with_capacity(BATCH));
    let mut total = 0;
    loop {
        levels.clear();
        values.clear();
        let (records, _, _) = reader
            .read_records(BATCH, Some(&mut levels), None, &mut values)
            .map_err(|error| unreadable(&error))?;
        if records == 0 {
            return Ok(total);
        }
        total += records as u64;
        // A column that cannot be null carries no levels: each record has its value.
        let mut values = values.iter();
        for record in 0..records {
            let value = match levels.get(record) {
                Some(0) => None,
                _ => values.next().map(|value| value.data()),
            };
            row(value)?;
        }
    }
}

/// The position of the text column among the leaf columns.
fn text_column(schema: &SchemaDescriptor, path: &Path, column: &str) -> Result<usize> {
    let broken = |problem: String| Err(Error::Dataset { path: path.into(), problem });
    let leaves = schema.columns();
    let Some(index) =
        leaves.iter().position(|leaf| leaf.path().parts().first().is_some_and(|name| name == column))
    else {
        if leaves.iter().any(|leaf| leaf.path().string() == column) {
            return broken(format!(
                "column `{column}` is nested in another; a text column at the top is needed"
            ));
        }
        let names: Vec<_> = schema.root_schema().get_fields().iter().map(|field| field.name()).collect();
        return Err(Error::MissingColumn {
            path: path.into(),
            column: column.into(),
            found: names.join(", "),
        });
    };
    let leaf = &leaves[index];
    if leaf.max_rep_level() != 0 {
        return broken(format!("column `{column}` is a list; one text a row, or messages, are needed"));
    }
    if leaf.physical_type() != PhysicalType::BYTE_ARRAY {
        return broken(format!("column `{column}` holds {}, not text", leaf.physical_type()));
    }
    Ok(index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibration::{Corpus, Provenance, Sampling};
    use crate::chat::ChatTemplate;
    use bytes::Bytes;
    use parquet::basic::Compression;
    use parquet::data_type::{ByteArray, Int32Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use std::sync::Arc;

    /// Row groups of `n` (when the schema has it) and `text`, nullable or not by the schema.
    fn parquet(schema: &str, groups: &[&[Option<&[u8]>]], dictionary: bool) -> Vec<u8> {
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = WriterProperties::builder()
            .set_dictionary_enabled(dictionary)
            .set_compression(Compression::SNAPPY);
        let mut bytes = Vec::new();
        let mut file =
            SerializedFileWriter::new(&mut bytes, schema.clone(), Arc::new(properties.build())).unwrap();
        let optional = schema.get_fields().iter().any(|field| field.name() == "text" && field.is_optional());
        for rows in groups {
            let mut group = file.next_row_group().unwrap();
            while let Some(mut column) = group.next_column().unwrap() {
                if let parquet::column::writer::ColumnWriter::ByteArrayColumnWriter(_) = column.untyped() {
                    let values: Vec<_> =
                        rows.iter().flatten().map(|row| ByteArray::from(row.to_vec())).collect();
                    let levels: Vec<_> = rows.iter().map(|row| i16::from(row.is_some())).collect();
                    let levels = optional.then_some(&levels[..]);
                    column.typed::<ByteArrayType>().write_batch(&values, levels, None).unwrap();
                } else {
                    column.typed::<Int32Type>().write_batch(&vec![7; rows.len()], None, None).unwrap();
                }
                column.close().unwrap();
            }
            group.close().unwrap();
        }
        file.close().unwrap();
        bytes
    }

    const NULLABLE: &str = "message m { required int32 n; optional binary text (UTF8); }";

    fn corpus(bytes: Vec<u8>, column: &str) -> Result<Corpus> {
        Corpus::from_parquet_bytes("x.parquet", bytes, column)
    }

    #[test]
    fn nulls_and_several_row_groups_plain_and_dictionary() {
        let groups: [&[Option<&[u8]>]; 2] =
            [&[Some(b"a\n"), None, Some(b"")], &[None, Some(b"b"), Some(b"a\n")]];
        for dictionary in [false, true] {
            let corpus = corpus(parquet(NULLABLE, &groups, dictionary), "text").unwrap();
            assert_eq!(corpus.rows().collect::<Vec<_>>(), ["a\n", "", "b", "a\n"]);
            assert_eq!((corpus.provenance().rows, corpus.provenance().nulls), (4, 2));
        }
    }

    #[test]
    fn a_dictionary_that_is_repeated_without_end_is_refused() {
        // Half a MiB is kept once, and 96 MiB of it would be read.
        let text = vec![b'a'; 1 << 19];
        let rows = vec![Some(&text[..]); 192];
        let error = corpus(parquet(NULLABLE, &[&rows], true), "text").unwrap_err().to_string();
        let problem = "`x.parquet`: it unpacks to more than ";
        assert!(error.starts_with(problem), "{error}");
    }

    #[test]
    fn a_required_column_without_a_text_mark_and_more_rows_than_a_batch() {
        let rows: Vec<_> = (0..3000).map(|n| format!("row {n}").into_bytes()).collect();
        let rows: Vec<_> = rows.iter().map(|row| Some(&row[..])).collect();
        let corpus = corpus(parquet("message m { required binary text; }", &[&rows], false), "text").unwrap();
        assert_eq!((corpus.rows().len(), corpus.rows().last()), (3000, Some("row 2999")));
    }

    #[test]
    fn columns_that_cannot_be_text_are_refused() {
        let error = |bytes, column| corpus(bytes, column).unwrap_err().to_string();
        let good = || parquet(NULLABLE, &[&[Some(b"a")]], false);
        assert_eq!(error(good(), "body"), "`x.parquet` has no text column `body` (columns: n, text)");
        assert_eq!(error(good(), "n"), "`x.parquet`: column `n` holds INT32, not text");

        let list = "message m { optional group text (LIST) { repeated group list { \
                    optional binary element (UTF8); } } }";
        let nested = parquet(list, &[], false);
        let repeated = parquet("message m { repeated binary text (UTF8); }", &[], false);
        assert_eq!(
            error(repeated, "text"),
            "`x.parquet`: column `text` is a list; one text a row, or messages, are needed"
        );
        // A list is read as messages, and here there is none.
        assert_eq!(
            error(nested.clone(), "text"),
            "column `text` of x.parquet holds no text in any of its 0 rows"
        );
        assert_eq!(
            error(nested, "text.list.element"),
            "`x.parquet`: column `text.list.element` is nested in another; a text column at the top is needed"
        );
    }

    #[test]
    fn empty_columns_bad_utf8_and_other_files_are_errors() {
        let error = |bytes| corpus(bytes, "text").unwrap_err().to_string();
        assert_eq!(
            error(parquet(NULLABLE, &[&[None, Some(b" ")], &[None]], false)),
            "column `text` of x.parquet holds no text in any of its 3 rows"
        );
        assert_eq!(
            error(parquet(NULLABLE, &[], false)),
            "column `text` of x.parquet holds no text in any of its 0 rows"
        );
        assert_eq!(
            error(parquet(NULLABLE, &[&[Some(b"a"), None, Some(b"\xff")]], false)),
            "`x.parquet`: row 3 of column `text` is not UTF-8"
        );
        assert!(error(b"{}".to_vec()).starts_with("`x.parquet`: it cannot be read as parquet: "));

        // A data page that says it is encoded with a dictionary (0x10), where there is none (0x00 is plain).
        let mut damaged = parquet(NULLABLE, &[&[Some(b"a")]], false);
        let header = [0x15, 0x00, 0x15, 0x06, 0x15, 0x06];
        let last_page = damaged.windows(6).rposition(|bytes| bytes == header).unwrap();
        damaged[last_page + 1] = 0x10;
        let problem = "a page needs a dictionary, and none is before it";
        assert_eq!(error(damaged), format!("`x.parquet`: it cannot be read as parquet: {problem}"));
    }

    #[test]
    fn conversations_are_rendered_with_the_chat_template() {
        const MESSAGES: &str = "message m { required binary prompt_id (UTF8); optional group messages (LIST) { \
            repeated group list { optional group element { optional binary content (UTF8); \
            optional binary role (UTF8); } } } }";
        let schema = Arc::new(parse_message_type(MESSAGES).unwrap());
        let mut bytes = Vec::new();
        let properties = Arc::new(WriterProperties::builder().build());
        let mut file = SerializedFileWriter::new(&mut bytes, schema, properties).unwrap();
        let mut group = file.next_row_group().unwrap();
        // Two conversations: two messages, and one.
        type Levels = Option<(&'static [i16], &'static [i16])>;
        let columns: [(&[&str], Levels); 3] = [
            (&["a", "b"], None),
            (&["Hi", "Ho", "Hm"], Some((&[4, 4, 4], &[0, 1, 0]))),
            (&["user", "assistant", "user"], Some((&[4, 4, 4], &[0, 1, 0]))),
        ];
        for (values, levels) in columns {
            let mut column = group.next_column().unwrap().unwrap();
            let values: Vec<_> = values.iter().map(|value| ByteArray::from(*value)).collect();
            let (definition, repetition) = levels.unzip();
            column.typed::<ByteArrayType>().write_batch(&values, definition, repetition).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        file.close().unwrap();

        let template = ChatTemplate::of("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}");
        let read = |bytes: Vec<u8>, chat| {
            let mut rows = Rows::new(&Sampling::joined_by_empty_line(), chat);
            read([(); 2].map(|()| Bytes::from(bytes.clone())), Path::new("x.parquet"), None, &mut rows)?;
            rows.into_corpus(Provenance::local("x.parquet"))
        };
        let corpus = read(bytes.clone(), Some(&template)).unwrap();
        assert_eq!(corpus.rows().collect::<Vec<_>>(), ["<user>Hi<assistant>Ho", "<user>Hm"]);
        assert_eq!(
            (corpus.text(), corpus.sampling()),
            ("<user>Hi<assistant>Ho<user>Hm", &Sampling::Conversations)
        );
        let error = read(bytes, None).unwrap_err().to_string();
        assert_eq!(error, "`x.parquet` needs a chat template, and the model has none");
    }
}
