//! To a bare repository on disk through git and git-lfs, and back by what the card says.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    helpers::{Lab, Output, demo, entries, files_below, read_json, text_of},
    tiny_model::Model,
};

const ACT: &str = "gptq-4bit-32g-actorder_True";
const BRANCHES: [&str; 4] = ["main", ACT, "gptq-4bit-64g-actorder_True", "gptq-4bit-128g-actorder_True"];

/// The demo model in its four branches, and an empty remote.
fn demo_run() -> (Lab, PathBuf) {
    let lab = Lab::empty();
    let model = text_of(demo("config.json").parent().unwrap());
    lab.quantize(&["--model", &model]).succeeds();
    let remote = lab.path("remote.git");
    git(&lab, &["init", "--quiet", "--bare", "--initial-branch=main", &text_of(&remote)]);
    (lab, remote)
}

/// A small run of two branches, and an empty remote.
fn small_run() -> (Lab, PathBuf) {
    let lab = Lab::with(&Model { hidden: 128, ..Model::default() });
    lab.quantize(&["--variant", "4bit-128g", "--variant", "4bit-32g-act"]).succeeds();
    let remote = lab.path("remote.git");
    git(&lab, &["init", "--quiet", "--bare", "--initial-branch=main", &text_of(&remote)]);
    (lab, remote)
}

fn publish(lab: &Lab, remote: &Path, flags: &[&str]) -> Output {
    let (out, to) = (text_of(&lab.out()), format!("git:{}", remote.display()));
    lab.run(&[&["publish", &out, "--to", &to], flags].concat())
}

/// git, as a user would run it, with nothing of this machine's settings but git-lfs.
#[track_caller]
fn git(lab: &Lab, arguments: &[&str]) -> String {
    let output = git_command(lab).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn git_command(lab: &Lab) -> Command {
    let mut command = Command::new("git");
    let home = lab.path("git-home");
    if !home.exists() {
        fs::create_dir(&home).unwrap();
        let lfs = "[filter \"lfs\"]\n clean = git-lfs clean -- %f\n smudge = git-lfs smudge -- %f\n process = git-lfs filter-process\n required = true\n[user]\n name = a\n email = a@b\n";
        fs::write(home.join(".gitconfig"), lfs).unwrap();
    }
    command.env("HOME", home).env("GIT_CONFIG_NOSYSTEM", "1").current_dir(lab.path(""));
    command
}

#[test]
fn any_variant_can_be_main_and_a_run_without_one_is_warned_of() {
    let lab = Lab::with(&Model { hidden: 128, ..Model::default() });
    let remote = lab.path("remote.git");
    git(&lab, &["init", "--quiet", "--bare", "--initial-branch=main", &text_of(&remote)]);
    let variants = ["--variant", "4bit-128g", "--variant", "4bit-32g-act"];
    lab.quantize(&[&variants[..], &["--main", "4bit-32g-act"]].concat()).succeeds();
    assert_eq!(entries(&lab.out()), ["gptq-4bit-128g-actorder_False", "main", "run.json"]);
    assert_eq!(read_json(&lab.out().join("main/config.json"))["quantization_config"]["group_size"], 32);
    let published = publish(&lab, &remote, &["--dry-run"]).succeeds();
    assert!(!published.stderr.contains("has no branch `main`"), "{}", published.stderr);

    let without = text_of(&lab.path("without"));
    lab.quantize(&["--variant", "4bit-32g", "--out", &without]).succeeds();
    let to = format!("git:{}", remote.display());
    let published = lab.run(&["publish", &without, "--to", &to, "--dry-run"]).succeeds();
    assert!(published.stderr.contains("warning: the run has no branch `main`"), "{}", published.stderr);

    let none = lab.quantize(&["--variant", "4bit-32g", "--main", "8bit-128g", "--out", "none"]);
    let expected = "error: main: expected one of the variants 4bit-32g, found `8bit-128g`";
    assert!(none.stderr.starts_with(expected), "{}", none.stderr);
}

#[test]
fn the_folder_of_a_run_stands_for_its_branches() {
    let (lab, _) = small_run();
    let out = text_of(&lab.out());
    let names = ["main", ACT];
    for command in ["verify", "inspect"] {
        let json = lab.run(&[command, &out, "--json"]).json();
        assert_eq!(json.as_object().unwrap().len(), 2, "{json}");
        assert!(names.iter().all(|name| json.get(name).is_some()), "{json}");
        let text = lab.run(&[command, &out]).succeeds().stdout;
        assert!(names.iter().all(|name| text.lines().any(|line| line == *name)), "{text}");
    }
    let measured = lab.eval(&[&lab.out()]);
    let models = measured["models"].as_array().unwrap().iter().map(|model| model["name"].as_str().unwrap());
    assert_eq!(models.collect::<Vec<_>>(), names);
}

/// Runs a card's command in a folder of its own, and gives the folder that it names.
#[track_caller]
fn by_the_card(lab: &Lab, command: &str, inside: &str) -> PathBuf {
    let inside = lab.path(inside);
    fs::create_dir(&inside).unwrap();
    let output = git_command(lab).args(command.split(' ').skip(1)).current_dir(&inside).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    inside.join(command.rsplit(' ').next().unwrap())
}

fn clone(lab: &Lab, remote: &Path, branch: &str, to: &str) -> PathBuf {
    let remote = format!("file://{}", remote.display());
    git(lab, &["clone", "--quiet", "--single-branch", "--branch", branch, &remote, to]);
    lab.path(to)
}

#[test]
fn four_branches_are_cloned_and_loaded_with_git_lfs() {
    let (lab, remote) = demo_run();
    let outcome = publish(&lab, &remote, &["--json"]).json();
    for (at, branch) in BRANCHES.into_iter().enumerate() {
        let card = git(&lab, &["-C", &text_of(&remote), "show", &format!("{branch}:README.md")]);
        let command = card.lines().find(|line| line.starts_with("git clone ")).expect("a command");
        let folder = by_the_card(&lab, command, &format!("clone-{at}"));
        assert_eq!(outcome[at]["commit"], git(&lab, &["-C", &text_of(&folder), "rev-parse", "HEAD"]));
        let source = lab.out().join(branch);
        for file in entries(&source) {
            assert!(
                fs::read(source.join(&file)).unwrap() == fs::read(folder.join(&file)).unwrap(),
                "{branch} {file}"
            );
        }
        // What git itself holds of the weights is a pointer.
        let pointer = git(&lab, &["-C", &text_of(&folder), "cat-file", "blob", "HEAD:model.safetensors"]);
        assert!(pointer.starts_with("version https://git-lfs.github.com/spec/v1\noid sha256:"), "{pointer}");
        assert_eq!(git(&lab, &["-C", &text_of(&folder), "status", "--porcelain"]), "");
        lab.verify(&folder, &[]).succeeds();
    }
    let said = lab.run(&[
        "generate",
        &text_of(&lab.path("clone-1").join("demo-GPTQ")),
        "--prompt",
        "The",
        "--max-tokens",
        "4",
    ]);
    said.succeeds();
    assert!(entries(&lab.out()).iter().all(|name| !name.starts_with('.')), "nothing is left behind");
}

#[test]
fn only_what_changed_is_sent_on_top_of_what_is_there_with_git_lfs() {
    let (lab, remote) = small_run();
    // What somebody had there before: a file of theirs, attributes of theirs, and weights of another name.
    let theirs = lab.path("theirs");
    git(&lab, &["init", "--quiet", "--initial-branch=main", &text_of(&theirs)]);
    for (name, text) in [("NOTES.md", "mine"), (".gitattributes", "*.png binary"), ("old.safetensors", "x")] {
        fs::write(theirs.join(name), text).unwrap();
    }
    let in_theirs = |arguments: &[&str]| git(&lab, &[&["-C", &text_of(&theirs)], arguments].concat());
    in_theirs(&["add", "."]);
    in_theirs(&["commit", "--quiet", "-m", "theirs"]);
    in_theirs(&["push", "--quiet", &text_of(&remote), "main"]);
    let before = in_theirs(&["rev-parse", "HEAD"]);

    let outcome = publish(&lab, &remote, &["--json"]).json();
    assert_eq!(outcome[0]["deleted"], serde_json::json!(["old.safetensors"]));
    let bare = text_of(&remote);
    assert_eq!(git(&lab, &["-C", &bare, "rev-parse", "main~1"]), before);
    assert_eq!(git(&lab, &["-C", &bare, "show", "main:NOTES.md"]), "mine");
    let attributes = git(&lab, &["-C", &bare, "show", "main:.gitattributes"]);
    assert_eq!(attributes, "*.png binary\n*.safetensors filter=lfs diff=lfs merge=lfs -text");

    // Nothing new: no commit.
    let heads = git(&lab, &["-C", &bare, "for-each-ref"]);
    let again = publish(&lab, &remote, &[]).succeeds();
    assert!(again.stdout.contains("nothing to send"), "{}", again.stdout);
    assert_eq!(git(&lab, &["-C", &bare, "for-each-ref"]), heads);

    // One file of one branch.
    fs::write(lab.out().join(ACT).join("EXTRA.md"), "{}\n").unwrap();
    let dry = publish(&lab, &remote, &["--dry-run"]).succeeds();
    assert!(dry.stdout.contains("would send 1 files") && dry.stdout.contains("+ EXTRA.md"), "{}", dry.stdout);
    assert_eq!(git(&lab, &["-C", &bare, "for-each-ref"]), heads, "a dry run sends nothing");
    let outcome = publish(&lab, &remote, &["--json", "--branch", ACT]).json();
    assert_eq!(outcome[0]["sent"], serde_json::json!(["EXTRA.md"]));
    assert_eq!(outcome.as_array().unwrap().len(), 1);
    assert_eq!(git(&lab, &["-C", &bare, "rev-list", "--count", ACT]), "2");
}

#[test]
fn history_goes_only_by_force_with_git_lfs() {
    let (lab, remote) = small_run();
    publish(&lab, &remote, &[]).succeeds();
    fs::write(lab.out().join("main/EXTRA.md"), "{}\n").unwrap();
    publish(&lab, &remote, &["--branch", "main"]).succeeds();
    let bare = text_of(&remote);
    let count = |branch: &str| git(&lab, &["-C", &bare, "rev-list", "--count", branch]);
    assert_eq!(count("main"), "2");
    publish(&lab, &remote, &["--force", "--branch", "main"]).succeeds();
    assert_eq!((count("main"), count(ACT)), ("1".into(), "1".into()));
    lab.verify(&clone(&lab, &remote, "main", "again"), &[]).succeeds();
}

#[test]
fn what_cannot_be_published_says_why_with_git_lfs() {
    let (lab, remote) = small_run();
    publish(&lab, &lab.path("nowhere.git"), &[]).fails_with(
        "error: git could not read the remote's branches: fatal: '[LAB]/nowhere.git' does not appear to be a git \
         repository; fatal: Could not read from remote repository.\n\
         hint: make the repository first: git init --bare PATH, or on the server's page",
    );
    publish(&lab, &remote, &["--branch", "dev"])
        .fails_with(&format!("error: the run has no branch `dev` (it has `main`, `{ACT}`)"));
    let secret =
        lab.run(&["publish", &text_of(&lab.out()), "--to", "git:https://me:hf_secret@127.0.0.1:1/x"]);
    assert!(
        secret.stderr.starts_with("error: --to git:: expected an address without name or password"),
        "{}",
        secret.stderr
    );
    assert!(!secret.stderr.contains("hf_secret"));

    // A hook refuses: nothing is there, and the next time it is.
    let hook = remote.join("hooks/update");
    fs::write(&hook, "#!/bin/sh\necho not today >&2\nexit 1\n").unwrap();
    Command::new("chmod").args(["+x", &text_of(&hook)]).status().unwrap();
    let refused = publish(&lab, &remote, &[]);
    assert_eq!(refused.code, Some(2));
    assert!(
        refused.stderr.contains("error: git could not send branch main: remote: not today"),
        "{}",
        refused.stderr
    );
    fs::remove_file(hook).unwrap();
    publish(&lab, &remote, &[]).succeeds();

    // Damage is found before anything is sent.
    let weights = lab.out().join(ACT).join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let damaged = publish(&lab, &remote, &[]);
    assert_eq!(damaged.code, Some(2));
    assert!(
        damaged.stderr.contains("model.safetensors") || damaged.stderr.contains("lm_head"),
        "{}",
        damaged.stderr
    );
}

#[test]
fn a_token_is_given_to_git_without_being_seen_with_git_lfs() {
    let (lab, _) = small_run();
    let bin = lab.path("bin");
    fs::create_dir(&bin).unwrap();
    // A git that writes down how it is called, and whom it would tell the token.
    let real = String::from_utf8(Command::new("sh").args(["-c", "command -v git"]).output().unwrap().stdout)
        .unwrap();
    let log = lab.path("git.log");
    let script = format!(
        "#!/bin/sh\necho \"$@\" >> {log}\nexec {real} \"$@\"\n",
        log = log.display(),
        real = real.trim()
    );
    fs::write(bin.join("git"), script).unwrap();
    Command::new("chmod").args(["+x", &text_of(&bin.join("git"))]).status().unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let out = text_of(&lab.out());
    // Nobody listens there: git fails, and says so.
    let variables =
        [("PATH", path.as_str()), ("HF_TOKEN", "hf_secret"), ("HF_ENDPOINT", "http://127.0.0.1:1")];
    let failed =
        lab.run_with(&variables, &["publish", &out, "--to", "git:http://127.0.0.1:1/me/tiny", "--verbose"]);
    assert_eq!(failed.code, Some(2));
    let calls = fs::read_to_string(&log).unwrap();
    assert!(calls.contains("config credential.http://127.0.0.1:1.helper"), "{calls}");
    assert!(!calls.contains("hf_secret") && !failed.stderr.contains("hf_secret"), "{calls}{}", failed.stderr);
    for file in files_below(&lab.out()) {
        let bytes = fs::read(lab.out().join(&file)).unwrap();
        assert!(!bytes.windows(9).any(|part| part == b"hf_secret"), "{}", file.display());
    }
    assert_eq!(read_json(&lab.out().join("run.json"))["branches"].as_array().unwrap().len(), 2);
}
