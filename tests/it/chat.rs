//! Conversations: calibrating and evaluating on them, several texts in one run, and answers in the model's own form.

use std::fs;

use gptq::{
    calibration::{CorpusSource, SourceOptions, Tokenizer, Tokens, Windows},
    chat::ChatTemplate,
};

use crate::helpers::{Lab, copy, demo, read_json, text_of};

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}\
                        {% if add_generation_prompt %}[assistant]{% endif %}";

/// The tiny model with a chat template.
fn lab() -> Lab {
    let lab = Lab::new();
    fs::write(lab.model().join("chat_template.jinja"), TEMPLATE).unwrap();
    lab
}

/// A file of conversations, long enough for a few windows of 64 tokens.
fn conversations(lab: &Lab) -> String {
    let line = |number: usize| {
        let words = "the old house stood by the river ".repeat(1 + number % 3);
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"{number} {words}\"}}, {{\"role\": \"assistant\", \"content\": \"yes\"}}]}}\n"
        )
    };
    let path = lab.path("chat.jsonl");
    fs::write(&path, (0..40).map(line).collect::<String>()).unwrap();
    text_of(&path)
}

#[test]
fn a_run_calibrates_on_conversations_in_the_models_own_form() {
    let lab = lab();
    let chat = conversations(&lab);
    lab.quantize(&["--dataset", &chat, "--variant", "4bit-32g", "--eval", &chat, "--eval-windows", "2"])
        .succeeds();
    let report = read_json(&lab.out().join("run.json"));
    let source = &report["calibration"]["sources"][0];
    assert_eq!((&source["dataset"], &source["sampling"]), (&"chat.jsonl".into(), &"conversations".into()));
    assert_eq!((&source["text_column"], &source["rows"]), (&"messages".into(), &40.into()));
    assert_eq!(report["evaluations"][0]["dataset"], "chat.jsonl");

    // The tokens are those of the rendered conversations.
    let template = ChatTemplate::read(&lab.model()).unwrap();
    let corpus =
        CorpusSource::resolve(&chat, &SourceOptions::default()).unwrap().load(template.as_ref()).unwrap();
    assert!(corpus.text().starts_with("<s>[user] 0 the old house"), "{}", &corpus.text()[..60]);
    let tokenizer = Tokenizer::open(&lab.model()).unwrap();
    let tokens = Tokens::new(&corpus, &tokenizer, 4096).unwrap();
    let windows = Windows::random(&tokens, 4, 64, 0).unwrap();
    assert_eq!(report["calibration"]["sha256"], windows.digest());
}

#[test]
fn a_model_without_a_template_takes_no_conversations() {
    let lab = Lab::new();
    let chat = conversations(&lab);
    lab.quantize(&["--dataset", &chat, "--variant", "4bit-32g"]).fails_with(
        "error: `[LAB]/chat.jsonl` needs a chat template, and the model has none\n\
         hint: use an instruct model, put its chat_template.jinja into the folder, or use plain text",
    );
    assert!(!lab.out().exists());
}

#[test]
fn several_texts_share_the_windows_by_weight() {
    let lab = lab();
    let chat = conversations(&lab);
    let text = text_of(&demo("evaluation.parquet"));
    let datasets = ["--dataset".to_owned(), format!("{text}:3"), "--dataset".to_owned(), format!("{chat}:1")];
    let flags = [datasets.each_ref().map(String::as_str).as_slice(), &["--variant", "4bit-32g"]].concat();
    lab.quantize(&flags).succeeds();
    let report = read_json(&lab.out().join("run.json"));
    let sources = report["calibration"]["sources"].as_array().unwrap();
    let named: Vec<_> =
        sources.iter().map(|s| (s["dataset"].as_str().unwrap(), s["samples"].as_u64().unwrap())).collect();
    assert_eq!(named, [("evaluation.parquet", 3), ("chat.jsonl", 1)]);
    assert_eq!(report["plan"]["dataset"], serde_json::json!(["evaluation.parquet:3", "chat.jsonl:1"]));
    let config = read_json(&lab.out().join("gptq-4bit-32g-actorder_False/config.json"));
    assert_eq!(
        config["quantization_config"]["meta"]["dataset"],
        "evaluation.parquet (3 windows) and chat.jsonl (1 windows)"
    );
    let card =
        lab.run(&["card", &text_of(&lab.out()), "--print", "gptq-4bit-32g-actorder_False"]).succeeds().stdout;
    assert!(card.contains("| evaluation.parquet + chat.jsonl | 64 |"), "{card}");
    assert!(card.contains("- Calibration text: chat.jsonl, 1 windows\n"), "{card}");
    // What is refused names the dataset.
    let one = ["quantize", "--model", &text_of(&lab.model()), "--out", &text_of(&lab.path("other"))];
    let split = [&one[..], &flags, &["--samples", "4", "--seq-len", "64", "--split", "train"]].concat();
    lab.run(&split).fails_with(
        "error: split: expected none with several datasets; a recipe file (.toml) can say it of one of them, found `train`",
    );
}

#[test]
fn an_answer_begins_where_the_template_puts_it() {
    let lab = Lab::empty();
    let model = lab.path("demo");
    copy(&demo(""), &model);
    let model = text_of(&model);
    let greedy = ["--temperature", "0", "--repetition-penalty", "1", "--max-tokens", "8"];
    let refused = lab.run(&[&["generate", &model, "--chat", "--prompt", "Hi"][..], &greedy].concat());
    refused.fails_with(
        "error: --chat needs a chat template, and the model has none\n\
         hint: use an instruct model, put its chat_template.jinja into the folder, or use plain text",
    );
    fs::write(lab.path("demo").join("chat_template.jinja"), TEMPLATE).unwrap();
    let chat =
        lab.run(&[&["generate", &model, "--chat", "--prompt", "Hi", "--json"][..], &greedy].concat()).json();
    // The same text by hand: the tokenizer adds the BOS that the template writes itself.
    let prompt = "[user] Hi\n[assistant]";
    let plain = lab.run(&[&["generate", &model, "--prompt", prompt, "--json"][..], &greedy].concat()).json();
    assert_eq!((&chat["text"], &chat["prompt_tokens"]), (&plain["text"], &plain["prompt_tokens"]));
}
