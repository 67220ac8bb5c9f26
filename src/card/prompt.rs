//! The prompt template of a model.

use std::path::Path;

use serde::Serialize;

use crate::{
    chat::{ChatTemplate, Message},
    checkpoint::Checkpoint,
    error::Result,
};

/// Prompt template of a card.
#[derive(Debug, Serialize)]
pub(super) struct Prompt {
    /// A prompt with `{prompt}` in place of the user's text, or the source of a chat template that could not be rendered.
    pub(super) text: String,
    /// Origin: `given`, `chat template`, `raw chat template`, or `none` when the model has no chat template.
    pub(super) origin: &'static str,
}

/// The prompt template as given, else from the chat template in a branch's folder, else `{prompt}` alone.
///
/// # Errors
/// When the folder's tokenizer files cannot be read.
pub(super) fn prompt(branch: &Path, given: Option<&str>) -> Result<Prompt> {
    if let Some(text) = given {
        return Ok(Prompt { text: text.to_owned(), origin: "given" });
    }
    let Some(template) = ChatTemplate::read(branch)? else {
        return Ok(Prompt { text: "{prompt}".into(), origin: "none" });
    };
    let system = Message::new("system", "{system_message}");
    let user = Message::new("user", "{prompt}");
    // A template may refuse system messages.
    let filled = template.render(&[system, user.clone()], true).or_else(|_| template.render(&[user], true));
    Ok(match filled.ok().filter(|text| text.contains("{prompt}")) {
        Some(text) => Prompt { text, origin: "chat template" },
        None => Prompt { text: template.source().to_owned(), origin: "raw chat template" },
    })
}

/// The chat template in a GGUF file, as it is.
///
/// # Errors
/// When the file cannot be read.
pub(super) fn of_gguf(file: &Path) -> Result<Prompt> {
    let checkpoint = Checkpoint::open(file)?;
    let header = checkpoint.gguf().map(|(header, _)| header);
    Ok(match header.and_then(|header| header.metadata.text("tokenizer.chat_template")) {
        Some(template) => Prompt { text: template.to_owned(), origin: "raw chat template" },
        None => Prompt { text: "{prompt}".into(), origin: "none" },
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    fn of(files: &[(&str, &str)]) -> (String, &'static str) {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let Prompt { text, origin } = prompt(folder.path(), None).unwrap();
        (text, origin)
    }

    #[test]
    fn templates_are_filled_in() {
        assert_eq!(of(&[]), ("{prompt}".into(), "none"));
        let plain =
            "{% for m in messages %}<{{ m['role'] }}>{{ m.content.strip() }}{{ eos_token }}\n{% endfor %}";
        assert_eq!(
            of(&[
                ("chat_template.jinja", plain),
                ("tokenizer_config.json", r#"{"eos_token": {"content": "</s>"}}"#)
            ]),
            ("<system>{system_message}</s>\n<user>{prompt}</s>\n".into(), "chat template")
        );
        let no_system = json!({ "chat_template":
            "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}[INST] {{ messages[0].content }} [/INST]" });
        assert_eq!(
            of(&[("tokenizer_config.json", &no_system.to_string())]),
            ("[INST] {prompt} [/INST]".into(), "chat template")
        );
        let named =
            json!({ "chat_template": [{ "name": "default", "template": "{{ messages[1].content }}" }] });
        assert_eq!(of(&[("tokenizer_config.json", &named.to_string())]).0, "{prompt}");
    }

    #[test]
    fn a_template_that_cannot_be_filled_in_is_shown() {
        for broken in [
            "{% for",
            "{{ unknown_function() }}",
            "no place for it",
            "{% for i in range(9999999) %}{% endfor %}",
        ] {
            assert_eq!(of(&[("chat_template.jinja", broken)]), (broken.into(), "raw chat template"));
        }
        assert_eq!(prompt(Path::new("/none"), Some("USER: {prompt}")).unwrap().text, "USER: {prompt}");
    }
}
