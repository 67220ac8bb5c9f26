//! A folder to work in, and the program run in it.

use std::{
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::LazyLock,
};

use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::tiny_model::Model;

/// The first linear.
pub(crate) const Q: &str = "model.layers.0.self_attn.q_proj";
/// A linear that has another input width than the others.
pub(crate) const DOWN: &str = "model.layers.1.mlp.down_proj";

/// The top of the repository; where the tests were not compiled, the place that scripts/gpu-check names.
pub(crate) fn repository() -> &'static Path {
    static PLACE: LazyLock<PathBuf> = LazyLock::new(|| {
        std::env::var_os("GPTQ_TEST_REPOSITORY").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into()).into()
    });
    &PLACE
}

/// The program, likewise.
fn program_path() -> OsString {
    std::env::var_os("GPTQ_TEST_BINARY").unwrap_or_else(|| env!("CARGO_BIN_EXE_gptq").into())
}

/// A file of the bundled demo.
pub(crate) fn demo(name: &str) -> PathBuf {
    repository().join("calibration/demo").join(name)
}

/// A temporary folder to work in: `model` is the source, `out` the output.
pub(crate) struct Lab {
    dir: TempDir,
}

impl Lab {
    /// With nothing in it.
    pub(crate) fn empty() -> Self {
        Self { dir: TempDir::with_prefix("gptq-it-").unwrap() }
    }

    /// With the tiny model.
    pub(crate) fn new() -> Self {
        Self::with(&Model::default())
    }

    /// With this model.
    pub(crate) fn with(model: &Model) -> Self {
        let lab = Self::empty();
        model.write(&lab.path("model"));
        lab
    }

    /// With the tiny model and one branch of it.
    pub(crate) fn with_branch(variant: &str) -> Self {
        let lab = Self::new();
        lab.quantize(&["--variant", variant]).succeeds();
        lab
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn model(&self) -> PathBuf {
        self.path("model")
    }

    pub(crate) fn out(&self) -> PathBuf {
        self.path("out")
    }

    /// The one branch in `out`.
    pub(crate) fn branch(&self) -> PathBuf {
        let folders: Vec<PathBuf> = entries(&self.out()).into_iter().map(|n| self.out().join(n)).collect();
        let mut folders = folders.into_iter().filter(|path| path.is_dir());
        let branch = folders.next().expect("one branch");
        assert_eq!(folders.next(), None, "only one branch");
        branch
    }

    /// Writes a file and returns its path.
    pub(crate) fn write(&self, name: &str, text: &str) -> String {
        fs::write(self.path(name), text).unwrap();
        text_of(&self.path(name))
    }

    /// `gptq quantize` with `flags`; what they do not say is small: 4 windows of 64 tokens, no evaluation.
    pub(crate) fn quantize(&self, flags: &[&str]) -> Output {
        self.run(&self.quantize_args(flags))
    }

    /// The arguments of [`Lab::quantize`].
    pub(crate) fn quantize_args(&self, flags: &[&str]) -> Vec<String> {
        let defaults = [
            ("--model", text_of(&self.model())),
            ("--out", text_of(&self.out())),
            ("--dataset", text_of(&demo("evaluation.parquet"))),
            ("--samples", "4".into()),
            ("--seq-len", "64".into()),
        ];
        let mut args = vec!["quantize".to_owned()];
        args.extend(flags.iter().map(|&flag| flag.to_owned()));
        for (name, value) in defaults {
            if !flags.contains(&name) {
                args.extend([name.to_owned(), value]);
            }
        }
        if !flags.contains(&"--eval") {
            args.push("--no-eval".into());
        }
        args
    }

    /// `gptq verify` of a folder.
    pub(crate) fn verify(&self, dir: &Path, flags: &[&str]) -> Output {
        let mut args = vec!["verify".to_owned(), text_of(dir)];
        args.extend(flags.iter().map(|&flag| flag.to_owned()));
        self.run(&args)
    }

    /// `gptq eval` of folders against the model, on 2 windows of 64 tokens; the JSON.
    pub(crate) fn eval(&self, quantized: &[&Path]) -> Value {
        let (model, text) = (text_of(&self.model()), text_of(&demo("evaluation.parquet")));
        let mut args: Vec<String> = ["eval", "--model", &model, "--dataset", &text].map(Into::into).into();
        args.extend(["--seq-len", "64", "--windows", "2", "--json"].map(Into::into));
        for dir in quantized {
            args.extend(["--quantized".to_owned(), text_of(dir)]);
        }
        self.run(&args).json()["evaluations"][0].take()
    }

    /// The program with any arguments, running; what it prints on standard error can be read.
    pub(crate) fn start<S: AsRef<OsStr>>(&self, args: &[S]) -> Child {
        self.start_with(&[], args)
    }

    /// The same with variables set.
    pub(crate) fn start_with<S: AsRef<OsStr>>(&self, variables: &[(&str, &str)], args: &[S]) -> Child {
        let mut command = self.command(variables);
        command.args(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// The program with any arguments.
    pub(crate) fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Output {
        self.run_with(&[], args)
    }

    /// The same with a text on standard input.
    pub(crate) fn run_with_input<S: AsRef<OsStr>>(&self, input: &str, args: &[S]) -> Output {
        let input = fs::File::open(self.write("input", input)).unwrap();
        self.read(&self.command(&[]).args(args).stdin(input).output().unwrap())
    }

    /// The same with variables set.
    pub(crate) fn run_with<S: AsRef<OsStr>>(&self, variables: &[(&str, &str)], args: &[S]) -> Output {
        self.read(&self.command(variables).args(args).output().unwrap())
    }

    /// The program, which finds nothing of this machine's caches and tokens, and asks the real Hub for nothing.
    fn command(&self, variables: &[(&str, &str)]) -> Command {
        let mut command = Command::new(program_path());
        for (variable, _) in std::env::vars_os() {
            let name = variable.to_string_lossy();
            let ours = ["HF_", "HUGGING", "XDG_"].iter().any(|begin| name.starts_with(begin));
            if ours || name == "GPTQ_TEST_DATA" {
                command.env_remove(variable);
            }
        }
        command
            .env("HF_HOME", self.path("hf-home"))
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("HF_ENDPOINT", "http://127.0.0.1:1")
            .env("HF_HUB_OFFLINE", "1")
            .env("OMP_WAIT_POLICY", "passive")
            .env_remove("GITHUB_STEP_SUMMARY")
            .envs(variables.iter().copied())
            .stdin(Stdio::null());
        command
    }

    /// What a process printed, with this folder's path as `[LAB]` and the repository's as `[REPO]`.
    pub(crate) fn read(&self, output: &std::process::Output) -> Output {
        let text = |bytes: &[u8]| {
            let text = String::from_utf8(bytes.to_vec()).expect("the program prints UTF-8");
            let text = text.replace(&text_of(self.dir.path()), "[LAB]");
            text.replace(&text_of(repository()), "[REPO]")
        };
        let (estimate, others): (Vec<String>, Vec<String>) = text(&output.stderr)
            .split_inclusive('\n')
            .map(str::to_owned)
            .partition(|line| line.starts_with("memory: about "));
        let (readers, others): (Vec<String>, Vec<String>) = others
            .into_iter()
            .partition(|line| line.contains(" does not load ") && !line.starts_with("error: "));
        let (device, others): (Vec<String>, Vec<String>) =
            others.into_iter().partition(|line| line.starts_with("device auto: "));
        Output {
            code: output.status.code(),
            stdout: text(&output.stdout),
            stderr: others.concat(),
            estimate: estimate.concat(),
            readers: readers.concat(),
            device: device.concat(),
        }
    }
}

/// What the program printed, and its exit code.
#[derive(Debug)]
pub(crate) struct Output {
    /// None when a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    /// Without the estimate, which has numbers of this machine in it, the readers, and the choice of the device.
    pub(crate) stderr: String,
    /// How much memory the run said it would need.
    pub(crate) estimate: String,
    /// The readers that the run said do not take a variant.
    pub(crate) readers: String,
    /// The device that `--device auto` chose.
    pub(crate) device: String,
}

impl Output {
    /// Requires exit code 0.
    #[track_caller]
    pub(crate) fn succeeds(self) -> Self {
        assert_eq!(self.code, Some(0), "{}{}", self.stdout, self.stderr);
        self
    }

    /// Requires exit code 2, nothing on standard output, and this error with its hint, without other lines.
    #[track_caller]
    pub(crate) fn fails_with(self, error: &str) {
        assert_eq!((self.stderr.trim_end(), self.stdout.as_str()), (error, ""));
        assert_eq!(self.code, Some(2));
    }

    /// Requires success and JSON alone on standard output.
    #[track_caller]
    pub(crate) fn json(self) -> Value {
        let output = self.succeeds();
        serde_json::from_str(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", output.stdout))
    }
}

/// A path as text.
pub(crate) fn text_of(path: &Path) -> String {
    path.to_str().expect("temporary paths are UTF-8").to_owned()
}

/// The names in a folder, sorted.
pub(crate) fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Every file below a folder, sorted, as paths from there.
pub(crate) fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for name in entries(dir) {
        match dir.join(&name) {
            path if path.is_dir() => {
                files.extend(files_below(&path).into_iter().map(|f| Path::new(&name).join(f)))
            }
            _ => files.push(name.into()),
        }
    }
    files
}

/// Every file below a run's folder with its digest, but for the report, which has times in it.
pub(crate) fn digests(out: &Path) -> Vec<(String, String)> {
    let files = files_below(out).into_iter().filter(|path| !path.ends_with("run.json"));
    files
        .map(|path| {
            let digest = Sha256::digest(fs::read(out.join(&path)).unwrap());
            (path.display().to_string(), digest.iter().map(|b| format!("{b:02x}")).collect())
        })
        .collect()
}

/// Copies a folder of files.
pub(crate) fn copy(from: &Path, to: &Path) {
    for file in files_below(from) {
        let target = to.join(&file);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(from.join(&file), target).unwrap();
    }
}

pub(crate) fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

pub(crate) fn write_json(path: &Path, value: &Value) {
    fs::write(path, format!("{value:#}\n")).unwrap();
}
