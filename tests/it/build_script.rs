//! `build.rs`, compiled and run on libtorch folders that are made up: it needs `rustc`.

use std::{fs, path::Path, process::Command};

use crate::helpers::repository;

/// What the build script prints for a libtorch folder.
fn printed(program: &Path, libtorch: &Path) -> String {
    let output = Command::new(program).env("LIBTORCH", libtorch).output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_build_checks_the_version_of_libtorch() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("build-script");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let compiled = Command::new(rustc)
        .args(["--edition", "2024", "-o"])
        .args([&program, &repository().join("build.rs")])
        .output()
        .expect("rustc, which has compiled this");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));

    let libtorch = folder.path().join("libtorch");
    assert!(printed(&program, &libtorch).contains("cargo::error=no libtorch in "));
    fs::create_dir_all(libtorch.join("lib")).unwrap();
    let link = "cargo:rustc-link-arg=-Wl,-rpath,";
    let unknown = printed(&program, &libtorch);
    assert!(unknown.contains("cargo::warning=the version of libtorch in ") && unknown.contains(link));

    for (version, is_old) in
        [("2.11.0", false), ("2.8.0\n", false), ("3.0", false), ("2.7.1", true), ("1.13.1", true)]
    {
        fs::write(libtorch.join("build-version"), version).unwrap();
        let text = printed(&program, &libtorch);
        assert_eq!(text.contains("cargo::error="), is_old, "{version}: {text}");
        assert_eq!(text.contains(link), !is_old, "{version}: {text}");
        assert!(!text.contains("cargo::warning"), "{version}: {text}");
    }
    fs::write(libtorch.join("build-version"), "2.7.1").unwrap();
    let expected =
        "is 2.7: expected 2.8 or newer, whose products of fp16 have fp32 results on CUDA; run scripts/setup";
    assert!(printed(&program, &libtorch).contains(expected));

    // PyTorch's folder has a header instead.
    fs::remove_file(libtorch.join("build-version")).unwrap();
    let header = libtorch.join("include/torch/headeronly/version.h");
    fs::create_dir_all(header.parent().unwrap()).unwrap();
    for (version, is_old) in [("2.7.0", true), ("2.11.0", false)] {
        fs::write(&header, format!("#pragma once\n#define TORCH_VERSION \"{version}\"\n")).unwrap();
        assert_eq!(printed(&program, &libtorch).contains("cargo::error="), is_old, "{version}");
    }
}
