//! Tells the linker where libtorch is, so that what cargo builds runs without
//! `LD_LIBRARY_PATH`. It builds nothing: `torch-sys` compiles the binding.

use std::env;
use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=LIBTORCH");

    // Set by `.cargo/config.toml` unless the user has set it.
    let Some(libtorch) = env::var_os("LIBTORCH") else {
        println!("cargo::error=LIBTORCH is not set: build inside the project folder, after scripts/setup");
        return;
    };
    let folder = Path::new(&libtorch).join("lib");
    let Ok(folder) = folder.canonicalize() else {
        println!("cargo::error=no libtorch in {}: run scripts/setup", folder.display());
        return;
    };
    // In this order: where libtorch is on this machine; then, for a program copied
    // to another one as `bin/gptq`, the `lib` folder beside `bin`.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", folder.display());
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/../lib");
    // libtorch must find our definition of this function: see src/machine.rs.
    for option in ["undefined", "export-dynamic-symbol"] {
        println!("cargo:rustc-link-arg=-Wl,--{option}=mkl_serv_intel_cpu_true");
    }
}
