//! The programs `git` and `git-lfs`, run in a temporary repository.

use std::{
    ffi::OsStr,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use tempfile::TempDir;

use crate::{
    error::{Error, HubError, Result},
    hub::Token,
};

/// The variable from which git's credential helper reads the token: other users see command lines, but not variables.
const TOKEN_VARIABLE: &str = "GPTQ_GIT_TOKEN";

/// A repository without files, with one remote.
pub(super) struct Git {
    folder: TempDir,
    token: Option<Token>,
}

impl Git {
    /// A repository in the folder `beside` if possible, so that large files there can be linked. `token` is used for
    /// `endpoint` alone.
    ///
    /// # Errors
    /// If git or git-lfs is not installed.
    pub(super) fn new(beside: &Path, remote: &str, endpoint: &str, token: Option<Token>) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix(".gptq-git-").tempdir_in(beside);
        let folder = folder.or_else(|_| TempDir::with_prefix("gptq-git-"));
        let folder = folder.map_err(Error::io("create a folder in", beside))?;
        let token = token.filter(|_| remote.starts_with(&format!("{endpoint}/")));
        let git = Self { folder, token };
        git.run("start", &["init", "--quiet", "."])?;
        git.run("find git-lfs", &["lfs", "version"]).map_err(|_| HubError::Git {
            action: "find git-lfs".into(),
            problem: "it is not installed".into(),
            hint: Some("on Debian and Ubuntu: sudo apt install git-lfs"),
        })?;
        git.run("set git-lfs up", &["lfs", "install", "--local", "--skip-smudge"])?;
        git.run("name the remote", &["remote", "add", "origin", remote])?;
        if git.token.is_some() {
            let helper = format!("!f() {{ echo username=token; echo \"password=${TOKEN_VARIABLE}\"; }}; f");
            git.run("set up the token", &["config", &format!("credential.{endpoint}.helper"), &helper])?;
        }
        Ok(git)
    }

    /// Runs git; returns its output.
    pub(super) fn run<S: AsRef<OsStr>>(&self, action: &str, arguments: &[S]) -> Result<String> {
        self.run_with(action, arguments, b"")
    }

    /// Stores a content in the repository without filters; returns its blob.
    pub(super) fn store(&self, action: &str, content: &[u8]) -> Result<String> {
        self.run_with(action, &["hash-object", "-w", "--stdin", "--no-filters"], content)
    }

    /// The same as [`Git::run`], with this on its standard input.
    fn run_with<S: AsRef<OsStr>>(&self, action: &str, arguments: &[S], input: &[u8]) -> Result<String> {
        let failed = |problem: String, hint| HubError::Git { action: action.to_owned(), problem, hint };
        let mut command = Command::new("git");
        command.args(arguments).current_dir(self.folder.path());
        // No questions, and the same messages in every locale.
        command.envs([("GIT_TERMINAL_PROMPT", "0"), ("LC_ALL", "C"), ("GIT_LFS_SKIP_SMUDGE", "1")]);
        for variable in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_TRACE", "GIT_CURL_VERBOSE"] {
            command.env_remove(variable);
        }
        if let Some(token) = &self.token {
            command.env(TOKEN_VARIABLE, token.secret());
        }
        let output = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let output = output.and_then(|mut child| {
            if let Some(mut stdin) = child.stdin.take() {
                stdin.write_all(input)?;
            }
            child.wait_with_output()
        });
        let output = output.map_err(|error| {
            let missing = error.kind() == std::io::ErrorKind::NotFound;
            failed(error.to_string(), missing.then_some("on Debian and Ubuntu: sudo apt install git git-lfs"))
        })?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned());
        }
        let problem = self.problem(&output);
        let hint = hint(&problem);
        Err(failed(problem, hint).into())
    }

    pub(super) fn path(&self, below: &str) -> PathBuf {
        self.folder.path().join(below)
    }

    /// The error messages in git's output.
    fn problem(&self, output: &Output) -> String {
        let text = String::from_utf8_lossy(&output.stderr);
        let text = crate::hub::redacted(&text, self.token.as_ref());
        let telling = |line: &&str| {
            ["fatal:", "error:", "! [", "remote:", "batch response"]
                .iter()
                .any(|begin| line.starts_with(begin))
        };
        let lines: Vec<&str> = text.lines().map(str::trim).filter(telling).collect();
        match lines.is_empty() {
            true => text.trim().lines().last().unwrap_or("it gave no reason").to_owned(),
            false => lines.join("; "),
        }
    }
}

fn hint(problem: &str) -> Option<&'static str> {
    let says = |parts: &[&str]| parts.iter().any(|part| problem.contains(part));
    if says(&["fetch first", "non-fast-forward", "stale info"]) {
        Some("somebody else published in the meantime: publish again, on top of that")
    } else if says(&["could not read Username", "Authentication failed", "Permission denied", "403"]) {
        Some(
            "git needs to know who you are: set up a credential helper or an SSH key, or set HF_TOKEN for the Hub",
        )
    } else if says(&["does not appear to be a git repository", "not found", "does not exist"]) {
        Some("make the repository first: git init --bare PATH, or on the server's page")
    } else {
        None
    }
}
