//! A model's chat template: from messages to the text that the model was trained to read.
//!
//! The template is Jinja, in `chat_template.jinja` or under `chat_template` in `tokenizer_config.json`. It is rendered as
//! transformers renders it: blocks are trimmed, `raise_exception` and `strftime_now` exist, and Python's string methods work.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};

use minijinja::{Environment, ErrorKind, syntax::SyntaxConfig, value::Serde};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    error::{Error, Result},
    folder,
};

const TEMPLATE_FILE: &str = "chat_template.jinja";
const CONFIG_FILE: &str = "tokenizer_config.json";

/// The template's name in its environment.
const NAME: &str = "chat_template";

/// Instructions that one rendering may take, so that a hostile template ends.
const FUEL: u64 = 10_000_000;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Its text.
    pub content: String,
}

impl Message {
    /// A message of `role` with the text `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A chat template and the special tokens that it may name.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    /// The file it comes from, for messages.
    file: &'static str,
    source: String,
    bos_token: String,
    eos_token: String,
    /// Compiles the template when it is rendered first.
    environment: Environment<'static>,
}

impl ChatTemplate {
    /// The template in a model's folder; `None` where the model has none.
    ///
    /// # Errors
    /// When a file cannot be read or is not JSON.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let (_, config) = tokenizer_config(dir)?;
        let own = folder::file_in(dir, TEMPLATE_FILE)?;
        let (file, source) = match own.exists() {
            true => (TEMPLATE_FILE, Some(folder::read_text(&own)?)),
            false => (CONFIG_FILE, in_config(&config)),
        };
        let [bos_token, eos_token] = ["bos_token", "eos_token"].map(|key| special_token(&config, key));
        Ok(source.map(|source| Self::new(file, source, bos_token, eos_token)))
    }

    #[cfg(test)]
    pub(crate) fn of(source: &str) -> Self {
        Self::new(TEMPLATE_FILE, source.to_owned(), "<s>", "</s>")
    }

    fn new(file: &'static str, source: String, bos_token: &str, eos_token: &str) -> Self {
        let mut environment = Environment::new();
        environment.set_syntax(syntax());
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| on_fixed_date(&format));
        let template = without_generation_marks(&source).into_owned();
        environment.set_loader(move |name| Ok((name == NAME).then(|| template.clone())));
        Self { file, source, bos_token: bos_token.to_owned(), eos_token: eos_token.to_owned(), environment }
    }

    /// The template itself.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of a conversation. With `answer` it ends where the assistant's next message begins.
    ///
    /// # Errors
    /// When the template is broken or refuses the messages; the error holds its reason.
    pub fn render(&self, messages: &[Message], answer: bool) -> Result<String> {
        let values = json!({
            "messages": messages,
            "add_generation_prompt": answer,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
        });
        let template = self.environment.get_template(NAME);
        let rendered = template.and_then(|template| template.render(minijinja::Value::from(Serde(values))));
        rendered.map_err(|error| {
            let line = error.line().map_or_else(String::new, |line| format!("line {line}: "));
            let reason = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
            Error::ChatTemplate { file: self.file, problem: format!("{line}{reason}") }
        })
    }
}

/// The path and the content of `tokenizer_config.json` in a model's folder; `null` where there is none.
///
/// # Errors
/// When it cannot be read or is not JSON.
pub(crate) fn tokenizer_config(dir: &Path) -> Result<(PathBuf, Value)> {
    let path = folder::file_in(dir, CONFIG_FILE)?;
    if !path.exists() {
        return Ok((path, Value::Null));
    }
    match serde_json::from_slice(folder::without_mark(&folder::read(&path, folder::TEXT_LIMIT)?)) {
        Ok(config) => Ok((path, config)),
        Err(source) => Err(Error::Json { path, source }),
    }
}

/// The special token `key` of `tokenizer_config.json`, a text or an object with `content`; empty where there is none.
pub(crate) fn special_token<'a>(config: &'a Value, key: &str) -> &'a str {
    let token = &config[key];
    token.as_str().or_else(|| token["content"].as_str()).unwrap_or_default()
}

/// The syntax that transformers uses: a line with only a tag leaves no line behind.
pub(crate) fn syntax() -> SyntaxConfig {
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true).keep_trailing_newline(true);
    syntax.build().expect("the usual delimiters")
}

/// `chat_template`: one template, or several of which one is named `default`.
fn in_config(config: &Value) -> Option<String> {
    match config.get("chat_template")? {
        Value::String(template) => Some(template.clone()),
        Value::Array(several) => {
            let default = several.iter().find(|one| one["name"] == "default")?;
            default["template"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}

/// `strftime` of 26 July 2024, the date that Llama 3's template takes where it has no clock. The same input must give the same
/// tokens on any day.
fn on_fixed_date(format: &str) -> String {
    let parts = [
        ("%d", "26"),
        ("%b", "Jul"),
        ("%B", "July"),
        ("%m", "07"),
        ("%Y", "2024"),
        ("%A", "Friday"),
        ("%a", "Fri"),
    ];
    parts.iter().fold(format.to_owned(), |text, (code, value)| text.replace(code, value))
}

/// `{% generation %}` marks the assistant's text for training masks. Jinja has no such tag; the text is the same without it.
fn without_generation_marks(source: &str) -> Cow<'_, str> {
    let is_mark = |tag: &str| {
        let words = tag.trim_matches(['-', '+']).trim();
        words == "generation" || words == "endgeneration"
    };
    if !source.contains("generation") {
        return Cow::Borrowed(source);
    }
    let (mut text, mut rest) = (String::with_capacity(source.len()), source);
    while let Some((before, tag)) = rest.split_once("{%") {
        let Some((inside, after)) = tag.split_once("%}") else { break };
        text.push_str(before);
        // An `if` block keeps what the mark does to white space around it.
        match is_mark(inside) {
            true => text.push_str(&format!(
                "{{%{}%}}",
                inside.replace("endgeneration", "endif").replace("generation", "if true")
            )),
            false => text.push_str(&format!("{{%{inside}%}}")),
        }
        rest = after;
    }
    text.push_str(rest);
    Cow::Owned(text)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn template(files: &[(&str, &str)]) -> Option<ChatTemplate> {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        ChatTemplate::read(folder.path()).unwrap()
    }

    fn rendered(source: &str, answer: bool) -> String {
        let messages = [Message::new("user", "Hi"), Message::new("assistant", "Ho ")];
        let config = r#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}}"#;
        let template = template(&[(TEMPLATE_FILE, source), (CONFIG_FILE, config)]).unwrap();
        template.render(&messages, answer).unwrap_or_else(|error| error.to_string())
    }

    #[test]
    fn messages_become_text_as_transformers_makes_it() {
        // The template of SmolLM2 without its default system message, and what
        // `tokenizer.apply_chat_template(..., tokenize=False)` of transformers 5.23 makes of it.
        let chatml = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
                      '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
                      {% endif %}";
        let text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo <|im_end|>\n";
        assert_eq!(rendered(chatml, false), text);
        assert_eq!(rendered(chatml, true), format!("{text}<|im_start|>assistant\n"));
        let blocks = "{{ bos_token }}\n{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m.content.strip() }}]\n  \
                      {% else %}\n{{ m.content.strip() + eos_token }}\n  {% endif %}\n{% endfor %}\n";
        assert_eq!(rendered(blocks, false), "<s>\n[Hi]\nHo</s>\n");
    }

    #[test]
    fn marks_for_training_change_nothing() {
        let marked =
            "{% for m in messages %}{% generation %}{{ m.content }}{%- endgeneration -%}  {% endfor %}";
        assert_eq!(rendered(marked, false), "HiHo ");
    }

    #[test]
    fn what_a_template_refuses_is_its_own_reason() {
        let strict = "{% if messages[0].role == 'user' %}\n{{ raise_exception('system first') }}{% endif %}";
        assert_eq!(
            rendered(strict, false),
            "the chat template in `chat_template.jinja` cannot be applied: line 2: system first"
        );
        assert!(rendered("{% for", false).contains("cannot be applied: line 1"));
        let endless =
            rendered("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", true);
        assert!(endless.contains("cannot be applied"), "{endless}");
    }

    #[test]
    fn one_template_is_chosen_and_none_is_none() {
        assert!(template(&[]).is_none());
        assert!(template(&[(CONFIG_FILE, r#"{"bos_token": "<s>"}"#)]).is_none());
        let several = json!({"chat_template": [
            {"name": "tool_use", "template": "tools"}, {"name": "default", "template": "chat"}
        ]});
        assert_eq!(template(&[(CONFIG_FILE, &several.to_string())]).unwrap().source(), "chat");
    }
}
