//! Rows from JSON objects: a text, or a conversation in one of the usual forms.
//!
//! A conversation is `messages` (`role`, `content`), `conversations` (`from`, `value`), or `prompt` and `completion`, each a text or
//! messages.

use std::path::Path;

use serde_json::{Map, Value};

use super::corpus::Rows;
use crate::{
    chat::Message,
    error::{Error, Result},
};

/// The column of text where the user names none.
pub(super) const TEXT_COLUMN: &str = "text";

/// Columns of conversations, in the order in which they are looked for.
pub(super) const CONVERSATION_COLUMNS: [&str; 2] = ["messages", "conversations"];

/// Columns that are a conversation together.
pub(super) const PROMPT_COLUMNS: [&str; 2] = ["prompt", "completion"];

/// Which keys of an object hold its row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Field {
    /// One key: a text, or a list of messages.
    One(String),
    /// [`PROMPT_COLUMNS`].
    PromptCompletion,
}

impl Field {
    /// The key, or both: `prompt + completion`.
    pub(super) fn name(&self) -> String {
        match self {
            Self::One(key) => key.clone(),
            Self::PromptCompletion => PROMPT_COLUMNS.join(" + "),
        }
    }

    /// The named column, else the first usual one for which `has` is true.
    pub(super) fn choose(named: Option<&str>, has: impl Fn(&str) -> bool) -> Option<Self> {
        if let Some(name) = named {
            return has(name).then(|| Self::One(name.to_owned()));
        }
        let usual = [TEXT_COLUMN].into_iter().chain(CONVERSATION_COLUMNS).find(|name| has(name));
        let both = || PROMPT_COLUMNS.iter().all(|name| has(name)).then_some(Self::PromptCompletion);
        usual.map(|name| Self::One(name.to_owned())).or_else(both)
    }
}

/// Turns objects into rows. The first object decides which keys are read.
pub(super) struct Objects<'a> {
    path: &'a Path,
    named: Option<&'a str>,
    field: Option<Field>,
}

impl<'a> Objects<'a> {
    /// `named` is the column that the user chose.
    pub(super) fn new(path: &'a Path, named: Option<&'a str>) -> Self {
        Self { path, named, field: None }
    }

    /// Whether an object has been read.
    pub(super) fn begun(&self) -> bool {
        self.field.is_some()
    }

    /// Appends the row of `object`; `place` is its place, for messages: `line 3`.
    pub(super) fn push(
        &mut self,
        object: &Map<String, Value>,
        place: &str,
        rows: &mut Rows<'_>,
    ) -> Result<()> {
        let broken = |problem: String| Error::Dataset { path: self.path.into(), problem };
        let found = || object.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let field = match &self.field {
            Some(field) => field,
            None => {
                let chosen = Field::choose(self.named, |key| object.contains_key(key));
                let missing = || Error::MissingColumn {
                    path: self.path.into(),
                    column: self.named.unwrap_or(TEXT_COLUMN).into(),
                    found: found(),
                };
                let chosen = chosen.ok_or_else(missing)?;
                rows.set_column(&chosen.name());
                self.field.insert(chosen)
            }
        };
        let get = |key: &str| {
            object.get(key).ok_or_else(|| broken(format!("{place} has no `{key}` (keys: {})", found())))
        };
        let messages = match field {
            Field::One(key) => match get(key)? {
                Value::String(text) => return rows.push_text(self.path, place, text),
                Value::Null => None,
                Value::Array(items) => {
                    messages(items).map_err(|why| broken(format!("{place}: `{key}`: {why}")))?
                }
                other => {
                    return Err(broken(format!(
                        "{place}: `{key}` is {}, not a text or messages",
                        kind(other)
                    )));
                }
            },
            Field::PromptCompletion => {
                let [prompt, completion] = PROMPT_COLUMNS;
                let turns = [(prompt, "user"), (completion, "assistant")].map(|(key, role)| {
                    turn(get(key)?, role).map_err(|why| broken(format!("{place}: `{key}`: {why}")))
                });
                let [prompt, completion] = turns;
                prompt?.zip(completion?).map(|(prompt, completion)| [prompt, completion].concat())
            }
        };
        match messages {
            Some(messages) => rows.push_conversation(self.path, place, &messages),
            None => {
                rows.push_null();
                Ok(())
            }
        }
    }
}

/// One side of a prompt and its completion: a text of `role`, or messages.
fn turn(value: &Value, role: &str) -> Result<Option<Vec<Message>>, String> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(vec![Message::new(role, text)])),
        Value::Array(items) => messages(items),
        other => Err(format!("{}, not a text or messages", kind(other))),
    }
}

/// The messages of a conversation; `None` where one has no content or there are none.
fn messages(items: &[Value]) -> Result<Option<Vec<Message>>, String> {
    if items.is_empty() {
        return Ok(None);
    }
    let one = |(number, item): (usize, &Value)| {
        let at = number + 1;
        let Value::Object(item) = item else {
            return Err(format!("message {at} is {}, not an object with role and content", kind(item)));
        };
        let get = |keys: [&str; 2]| {
            let missing = || {
                let found = item.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
                format!("message {at} has neither `{}` nor `{}` (keys: {found})", keys[0], keys[1])
            };
            keys.iter().find_map(|key| item.get(*key)).ok_or_else(missing)
        };
        let role = match get(["role", "from"])? {
            Value::String(role) => known_role(role),
            other => return Err(format!("the role of message {at} is {}, not a text", kind(other))),
        };
        let content = content(get(["content", "value"])?)
            .map_err(|found| format!("the content of message {at} is {found}, not a text"))?;
        Ok(content.map(|content| Message { role, content }))
    };
    items.iter().enumerate().map(one).collect()
}

/// ShareGPT's names of roles become those of chat templates.
fn known_role(role: &str) -> String {
    match role {
        "human" => "user",
        "gpt" | "chatgpt" | "bot" | "model" => "assistant",
        other => other,
    }
    .to_owned()
}

/// A text, or a list of parts that are texts.
fn content(value: &Value) -> Result<Option<String>, &'static str> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text.clone())),
        Value::Array(parts) => {
            let text = |part: &Value| match part.get("text") {
                Some(Value::String(text)) => Ok(text.clone()),
                _ => Err("a list with parts that are not text"),
            };
            parts.iter().map(text).collect::<Result<String, _>>().map(Some)
        }
        other => Err(kind(other)),
    }
}

/// Kind of a JSON value, for messages.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
