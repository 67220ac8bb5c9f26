//! The form in which a model expects to be spoken to.

use std::{fs, path::Path};

use minijinja::{Environment, value::Serde};
use serde::Serialize;
use serde_json::{Value, json};

use super::syntax;

/// What a card says about prompts.
#[derive(Debug, Serialize)]
pub(super) struct Prompt {
    /// A prompt with `{prompt}` in the user's place, or the template that could not be filled in.
    pub(super) text: String,
    /// Where it comes from: `given`, `chat template`, `raw chat template`, or `none` when the model continues text.
    pub(super) origin: &'static str,
}

/// As given, else from the chat template in a branch's folder, else just the text.
pub(super) fn prompt(branch: &Path, given: Option<&str>) -> Prompt {
    if let Some(text) = given {
        return Prompt { text: text.to_owned(), origin: "given" };
    }
    let Some((template, tokens)) = chat_template(branch) else {
        return Prompt { text: "{prompt}".into(), origin: "none" };
    };
    let system = json!({ "role": "system", "content": "{system_message}" });
    let user = json!({ "role": "user", "content": "{prompt}" });
    let filled =
        fill(&template, &[system, user.clone()], &tokens).or_else(|| fill(&template, &[user], &tokens));
    match filled.filter(|text| text.contains("{prompt}")) {
        Some(text) => Prompt { text, origin: "chat template" },
        None => Prompt { text: template, origin: "raw chat template" },
    }
}

/// The template and the special tokens it may name.
fn chat_template(branch: &Path) -> Option<(String, Value)> {
    let config = fs::read(branch.join("tokenizer_config.json")).ok();
    let config: Value = config.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
    let own = fs::read_to_string(branch.join("chat_template.jinja")).ok();
    let listed = || match config.get("chat_template")? {
        Value::String(template) => Some(template.clone()),
        Value::Array(several) => {
            let default = several.iter().find(|one| one["name"] == "default")?;
            default["template"].as_str().map(str::to_owned)
        }
        _ => None,
    };
    let template = own.or_else(listed)?;
    let token = |key: &str| {
        let token = &config[key];
        token.as_str().or_else(|| token["content"].as_str()).unwrap_or_default().to_owned()
    };
    let tokens = json!({ "bos_token": token("bos_token"), "eos_token": token("eos_token") });
    Some((template, tokens))
}

fn fill(template: &str, messages: &[Value], tokens: &Value) -> Option<String> {
    let mut environment = Environment::new();
    environment.set_syntax(syntax());
    environment.set_fuel(Some(100_000));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message))
    });
    let values = json!({
        "messages": messages,
        "add_generation_prompt": true,
        "bos_token": tokens["bos_token"],
        "eos_token": tokens["eos_token"],
    });
    environment.render_str(template, minijinja::Value::from(Serde(values))).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(files: &[(&str, &str)]) -> (String, &'static str) {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let Prompt { text, origin } = prompt(folder.path(), None);
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
        assert_eq!(prompt(Path::new("/none"), Some("USER: {prompt}")).text, "USER: {prompt}");
    }
}
