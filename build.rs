//! Tells the linker where libtorch is, so that what cargo builds runs without
//! `LD_LIBRARY_PATH`. It builds nothing: `torch-sys` compiles the binding.

use std::path::Path;
use std::{env, fs};

/// The first libtorch whose `addmm` multiplies fp16 and bf16 on CUDA with an fp32 result, which Hessians need.
const OLDEST: (u32, u32) = (2, 8);

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
    match version(Path::new(&libtorch)) {
        Some(found) if found < OLDEST => {
            let ((major, minor), (found_major, found_minor)) = (OLDEST, found);
            println!(
                "cargo::error=libtorch in {} is {found_major}.{found_minor}: expected {major}.{minor} or newer, whose products of fp16 have fp32 results on CUDA; run scripts/setup",
                folder.display()
            );
            return;
        }
        Some(_) => {}
        None => println!("cargo::warning=the version of libtorch in {} is not known", folder.display()),
    }
    // In this order: where libtorch is on this machine; then, for a program copied
    // to another one as `bin/gptq`, the `lib` folder beside `bin`.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", folder.display());
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/../lib");
    // libtorch must find our definition of this function: see src/machine.rs.
    for option in ["undefined", "export-dynamic-symbol"] {
        println!("cargo:rustc-link-arg=-Wl,--{option}=mkl_serv_intel_cpu_true");
    }
}

/// Major and minor version of a libtorch, from the file that its archive or `scripts/setup` has.
fn version(libtorch: &Path) -> Option<(u32, u32)> {
    let header = "include/torch/headeronly/version.h";
    let text = fs::read_to_string(libtorch.join("build-version")).or_else(|_| {
        let text = fs::read_to_string(libtorch.join(header))?;
        let line = text.lines().find_map(|line| line.strip_prefix("#define TORCH_VERSION \""));
        Ok::<_, std::io::Error>(line.unwrap_or_default().to_owned())
    });
    let text = text.ok()?;
    let mut numbers = text.split('.').map(|part| part.trim().parse().ok());
    Some((numbers.next()??, numbers.next()??))
}
