//! The rules of the source tree, read from the tree itself.

use std::{collections::BTreeSet, fs, path::PathBuf};

use crate::{
    helpers::{files_below, repository},
    source::{code, mentions, top_modules, without_tests},
};

/// The library's modules, each using only what stands before it.
const LAYERS: [&str; 37] = [
    "units",
    "error",
    "cluster",
    "progress",
    "machine",
    "folder",
    "json",
    "chat",
    "device",
    "cuda",
    "fp16",
    "ggml",
    "variant",
    "accuracy",
    "architectures",
    "plan",
    "gguf",
    "checkpoint",
    "rotation",
    "equalization",
    "calibration",
    "amx",
    "products",
    "gptq",
    "pack",
    "kernels",
    "model",
    "report",
    "gate",
    "emit",
    "verify",
    "eval",
    "generation",
    "pipeline",
    "hub",
    "card",
    "publish",
];

/// Plain Rust: what these say can be read, tested and reused without libtorch.
const WITHOUT_LIBTORCH: [&str; 17] = [
    "accuracy.rs",
    "amx",
    "calibration",
    "cluster",
    "fp16.rs",
    "gate",
    "ggml",
    "gptq/grid.rs",
    "gptq/order.rs",
    "gptq/quantized.rs",
    "kernels/cuda/layout.rs",
    "kernels/cuda/plan.rs",
    "kernels/cuda/repack.rs",
    "pack",
    "plan.rs",
    "report",
    "variant.rs",
];

/// What only the program may use: it prints, reads the environment and draws bars.
const ONLY_IN_CLI: [&str; 13] = [
    "print!",
    "println!",
    "eprint!",
    "eprintln!",
    "dbg!",
    "stdout",
    "stderr",
    "indicatif",
    "clap",
    "anyhow",
    "env::var",
    "env::var_os",
    "process::exit",
];

/// Files with unsafe code: memory maps, tensors as slices, columns shared between threads, vector and matrix instructions,
/// kernels, copies from a device, the loader's lists of strings.
const UNSAFE: &[&str] = &[
    "amx/operand.rs",
    "amx/tiles.rs",
    "checkpoint/reader.rs",
    "checkpoint/values.rs",
    "cli/environment.rs",
    "cluster/mpi_link.rs",
    "cuda/compile.rs",
    "cuda/copies.rs",
    "cuda/gpu.rs",
    "cuda/host_memory.rs",
    "device.rs",
    "gptq/raw.rs",
    "gptq/solver/cpu/panel.rs",
    "gptq/solver/cuda/host_emulation.rs",
    "gptq/solver/cuda/kernels.rs",
    "gptq/solver/cuda/launch.rs",
    "gptq/solver/cuda/linear.rs",
    "gptq/solver/cuda/work.rs",
    "kernels/cpu/fixed_point.rs",
    "kernels/cpu/simd.rs",
    "kernels/cpu/simd_x86.rs",
    "kernels/cuda/matmul.rs",
    "machine.rs",
    "model/linear.rs",
    "products.rs",
];

/// A source file: its path below `src`, with `/`, and its text.
struct Source {
    path: String,
    text: String,
}

impl Source {
    /// `verify`, for `verify/mod.rs` and all below it; `None` for `lib.rs`, `main.rs` and the program's own files.
    fn module(&self) -> Option<&str> {
        let first = self.path.split('/').next()?;
        let module = first.strip_suffix(".rs").unwrap_or(first);
        (!["lib", "main", "cli"].contains(&module)).then_some(module)
    }

    /// How many modules below the crate's top: 1 for `a.rs` and `a/mod.rs`, 2 for `a/b.rs`.
    fn depth(&self) -> usize {
        let way = self.path.strip_suffix("/mod.rs").unwrap_or(&self.path);
        way.split('/').count()
    }

    fn is_in(&self, places: &[&str]) -> bool {
        places.iter().any(|place| self.path == *place || self.path.starts_with(&format!("{place}/")))
    }

    fn is_test(&self) -> bool {
        self.path.split('/').any(|part| part == "tests" || part == "tests.rs")
    }

    /// Modules used against the order of [`LAYERS`].
    fn layering(&self) -> Vec<String> {
        let Some(module) = self.module() else { return Vec::new() };
        let rank = |module: &str| LAYERS.iter().position(|m| *m == module);
        let Some(own) = rank(module) else {
            return vec![format!("module `{module}` has no place in LAYERS")];
        };
        let used = top_modules(&code(&self.text), self.depth());
        let higher = used.iter().filter(|used| rank(used).is_some_and(|rank| rank > own));
        higher.map(|used| format!("uses `{used}`, which stands above `{module}`")).collect()
    }

    /// What belongs to the program and is found in the library.
    fn program_only(&self) -> Vec<String> {
        if self.module().is_none() || self.is_test() {
            return Vec::new();
        }
        let code = without_tests(&code(&self.text));
        let runs_a_program = self.path == "publish/git.rs";
        let streams = |word: &str| word == "stdout" || word == "stderr";
        let found = ONLY_IN_CLI
            .iter()
            .filter(|word| mentions(&code, word))
            // Of the program that it runs, not its own.
            .filter(|word| !(runs_a_program && streams(word)));
        found.map(|word| format!("has `{word}`, which only src/cli may")).collect()
    }

    fn libtorch(&self) -> Vec<String> {
        let found = self.is_in(&WITHOUT_LIBTORCH) && mentions(&code(&self.text), "tch");
        found.then(|| "has `tch`, and should be plain Rust".to_owned()).into_iter().collect()
    }
}

/// All Rust files below a folder of the repository.
fn sources(folder: &str) -> Vec<Source> {
    let dir = repository().join(folder);
    let rust: Vec<PathBuf> =
        files_below(&dir).into_iter().filter(|f| f.extension().is_some_and(|e| e == "rs")).collect();
    assert!(!rust.is_empty(), "{folder} has Rust files");
    let source = |file: PathBuf| {
        let text = fs::read_to_string(dir.join(&file)).unwrap();
        let parts: Vec<_> = file.iter().map(|part| part.to_str().unwrap()).collect();
        Source { path: parts.join("/"), text }
    };
    rust.into_iter().map(source).collect()
}

/// Requires that no file below `folder` breaks `rule`.
#[track_caller]
fn all_obey(folder: &str, rule: fn(&Source) -> Vec<String>) {
    let breaches: Vec<String> = sources(folder)
        .iter()
        .flat_map(|source| {
            rule(source).into_iter().map(|breach| format!("{folder}/{}: {breach}", source.path))
        })
        .collect();
    assert!(breaches.is_empty(), "\n{}", breaches.join("\n"));
}

#[test]
fn modules_use_only_what_stands_before_them() {
    all_obey("src", Source::layering);
}

#[test]
fn every_module_has_its_place() {
    let lib = code(&fs::read_to_string(repository().join("src/lib.rs")).unwrap());
    let declared: BTreeSet<&str> =
        lib.lines().filter_map(|line| line.trim().strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    assert_eq!(declared, LAYERS.into_iter().collect());
}

#[test]
fn only_the_program_prints_and_reads_the_environment() {
    all_obey("src", Source::program_only);
}

#[test]
fn plain_modules_do_without_libtorch() {
    all_obey("src", Source::libtorch);
    for place in WITHOUT_LIBTORCH {
        assert!(repository().join("src").join(place).exists(), "{place} is not there any more");
    }
}

#[test]
fn unsafe_code_is_where_it_is_expected() {
    let sources = sources("src");
    let found: Vec<&str> =
        sources.iter().filter(|s| mentions(&code(&s.text), "unsafe")).map(|s| s.path.as_str()).collect();
    assert_eq!(found, UNSAFE);
}

/// Every rule sees a breach of it, and lets pass what only looks like one.
#[test]
fn the_rules_can_fail() {
    let source = |path: &str, text: &str| Source { path: path.into(), text: text.into() };
    let pack = |text: &str| source("pack/bits.rs", text);

    assert_eq!(
        pack("use crate::{error::Error, verify::x};").layering(),
        ["uses `verify`, which stands above `pack`"]
    );
    assert_eq!(pack("super::super::eval::run()").layering(), ["uses `eval`, which stands above `pack`"]);
    assert!(pack("// crate::verify\nuse crate::checkpoint::Checkpoint;").layering().is_empty());
    assert_eq!(source("new/mod.rs", "").layering(), ["module `new` has no place in LAYERS"]);

    assert_eq!(pack("fn f() { println!() }").program_only(), ["has `println!`, which only src/cli may"]);
    assert_eq!(pack("std::env::var(\"X\")").program_only(), ["has `env::var`, which only src/cli may"]);
    assert!(pack("#[cfg(test)]\nmod tests { fn f() { println!() } }").program_only().is_empty());
    assert!(source("cli/terminal.rs", "println!()").program_only().is_empty());

    assert_eq!(pack("use tch::Tensor;").libtorch(), ["has `tch`, and should be plain Rust"]);
    assert!(pack("match x {} // tch").libtorch().is_empty());
    assert!(source("model/llama.rs", "use tch::Tensor;").libtorch().is_empty());
}

#[test]
fn depth_and_module_of_a_file() {
    let of = |path: &str| {
        let source = Source { path: path.into(), text: String::new() };
        (source.module().map(str::to_owned), source.depth())
    };
    assert_eq!(of("error.rs"), (Some("error".into()), 1));
    assert_eq!(of("verify/mod.rs"), (Some("verify".into()), 1));
    assert_eq!(of("gptq/solver/mod.rs"), (Some("gptq".into()), 2));
    assert_eq!(of("gptq/solver/cpu/raw.rs"), (Some("gptq".into()), 4));
    assert_eq!(of("cli/mod.rs").0, None);
}
