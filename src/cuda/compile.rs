//! Compiles CUDA C++ to PTX with NVRTC, which needs no GPU.

use std::sync::OnceLock;

use cudarc::nvrtc::{CompileError, CompileOptions, compile_ptx_with_opts, sys};
use libloading::Library;

use crate::error::{Error, Result};

/// A file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// Its name in messages.
    pub name: &'static str,
    /// CUDA C++.
    pub text: &'static str,
}

/// A macro and its value, given to the compiler before the text.
pub type Macro = (&'static str, i64);

/// Compiles for an architecture such as `compute_80` or `compute_90a`.
///
/// # Errors
/// When NVRTC is missing, or refuses the text; the error then has its log.
pub fn compile(source: &Source, architecture: &str, macros: &[Macro]) -> Result<String> {
    let failed = |problem: String| Error::Cuda {
        action: format!("compile {} for {architecture}", source.name),
        problem,
    };
    if let Some(problem) = compiler_missing() {
        return Err(failed(problem.to_owned()));
    }
    let mut options = vec![format!("--gpu-architecture={architecture}"), "--std=c++17".to_owned()];
    options.extend(macros.iter().map(|(name, value)| format!("--define-macro={name}={value}")));
    let options = CompileOptions { options, name: Some(source.name.to_owned()), ..CompileOptions::default() };
    match compile_ptx_with_opts(source.text, options) {
        Ok(ptx) => Ok(ptx.to_src()),
        Err(CompileError::CompileError { log, .. }) => Err(failed(log.to_string_lossy().trim().to_owned())),
        Err(error) => Err(failed(error.to_string())),
    }
}

/// Architectures that the compiler knows, in ascending order: 80 is compute capability 8.0.
///
/// # Errors
/// When NVRTC is missing.
pub fn known_architectures() -> Result<Vec<i32>> {
    let failed =
        |problem: String| Error::Cuda { action: "list the compiler's architectures".into(), problem };
    if let Some(problem) = compiler_missing() {
        return Err(failed(problem.to_owned()));
    }
    let list = || {
        let mut count = 0;
        // SAFETY: NVRTC is there, and writes a number, then so many numbers.
        unsafe { sys::nvrtcGetNumSupportedArchs(&raw mut count) }.result()?;
        let mut architectures = vec![0; count.max(0) as usize];
        // SAFETY: as above.
        unsafe { sys::nvrtcGetSupportedArchs(architectures.as_mut_ptr()) }.result()?;
        Ok::<_, cudarc::nvrtc::result::NvrtcError>(architectures)
    };
    let mut architectures = list().map_err(|error| failed(format!("{error:?}")))?;
    architectures.sort_unstable();
    Ok(architectures)
}

/// The architecture to compile for, among those that are `known`, in ascending order. Hopper's has the instructions that
/// only Hopper has. A device that is newer than all of them gets PTX of the newest one, which its driver compiles.
pub fn architecture((major, minor): (i32, i32), known: &[i32]) -> String {
    let own = 10 * major + minor;
    match known.iter().rev().find(|&&known| known <= own) {
        Some(90) if own == 90 => "compute_90a".to_owned(),
        Some(nearest) => format!("compute_{nearest}"),
        None => format!("compute_{own}"),
    }
}

/// Why the compiler is missing; `None` if it is there.
pub fn compiler_missing() -> Option<&'static str> {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: opening NVRTC runs its constructors and nothing else.
    let present = *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() && open_builtins() });
    (!present).then_some("CUDA's run-time compiler (libnvrtc) is not installed: scripts/setup")
}

/// Opens NVRTC's second library from the folder of this program's libraries, because NVRTC itself searches only the system's
/// folders. `false` if NVRTC does not report its version.
fn open_builtins() -> bool {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: NVRTC is there, and writes two numbers.
    if unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }.result().is_err() {
        return false;
    }
    // SAFETY: the library holds data and runs no code of its own.
    if let Ok(library) = unsafe { Library::new(format!("libnvrtc-builtins.so.{major}.{minor}")) } {
        std::mem::forget(library); // NVRTC finds it by name as long as it is open
    }
    true
}

/// The kernels of a source, compiled for one architecture of each generation that is supported.
#[cfg(test)]
pub(crate) fn entries_by_generation(source: &Source) -> Vec<Vec<String>> {
    let of = |architecture| entries(source, architecture, &[]);
    ["compute_80", "compute_89", "compute_90a"].into_iter().map(of).collect()
}

#[cfg(test)]
fn entries(source: &Source, architecture: &str, macros: &[Macro]) -> Vec<String> {
    let ptx = compile(source, architecture, macros).unwrap_or_else(|error| panic!("{error}"));
    // Arrays that are indexed at run time would be in local memory. Spills show only in the output of ptxas.
    assert!(!ptx.contains(".local"), "{} for {architecture}: local memory", source.name);
    let named = ptx.lines().filter_map(|line| line.split(".entry ").nth(1));
    named.map(|rest| rest.trim_end_matches('(').to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_newer_than_the_compiler_get_the_newest_ptx() {
        let known = [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121];
        for (capability, expected) in [
            ((8, 0), "compute_80"),
            ((8, 6), "compute_86"),
            ((9, 0), "compute_90a"),
            ((10, 0), "compute_100"),
            ((12, 0), "compute_120"),
            // Not known: the newest that is not newer than the device.
            ((12, 5), "compute_121"),
            ((15, 0), "compute_121"),
            ((9, 5), "compute_90"),
            // Older than all: refused by the compiler, which names it.
            ((7, 0), "compute_70"),
        ] {
            assert_eq!(architecture(capability, &known), expected, "{capability:?}");
        }
    }

    #[test]
    fn the_compiler_knows_all_generations_with_nvrtc() {
        let known = known_architectures().unwrap();
        for architecture in [80, 86, 89, 90, 100, 120] {
            assert!(known.contains(&architecture), "{architecture} is not among {known:?}");
        }
    }

    #[test]
    fn a_mistake_is_named_with_its_line_with_nvrtc() {
        let source = Source { name: "wrong.cu", text: "extern \"C\" __global__ void f() {\n  int x = y;\n}" };
        let error = compile(&source, "compute_80", &[]).unwrap_err().to_string();
        assert!(
            error.starts_with("CUDA could not compile wrong.cu for compute_80: wrong.cu(2): error:"),
            "{error}"
        );
    }
}
