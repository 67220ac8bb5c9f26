//! Compute devices. CUDA is not linked: libtorch's CUDA part is opened when a CUDA device is requested, so that one program
//! runs on machines with and without a GPU.

use std::{path::Path, sync::OnceLock};

use tch::{Cuda, Device};

use crate::error::{Error, Result};

/// Whether the tests of this project's CUDA code have passed on a GPU. `auto` chooses a GPU only if they have.
const CUDA_IS_VERIFIED: bool = false;

/// A chosen device.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The device in libtorch.
    pub device: Device,
    /// `cpu`, `cuda:0`.
    pub name: String,
    /// The choice of `auto`, or a caution about the device, as a message.
    pub note: Option<String>,
}

/// The device of `auto`, `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// If the device cannot be used; `auto` is the CPU then.
pub fn resolve(name: &str) -> Result<Choice> {
    let unusable = |problem: String| Error::Device { device: name.into(), problem };
    match name {
        "cpu" => Ok(cpu(None)),
        "auto" => Ok(auto(has_nvidia_gpu(), CUDA_IS_VERIFIED, cuda_devices)),
        _ => {
            let index: Option<usize> = match name.strip_prefix("cuda") {
                Some("") => Some(0),
                Some(rest) => rest.strip_prefix(':').and_then(|index| index.parse().ok()),
                None => None,
            };
            let index = index.ok_or_else(|| unusable("expected auto, cpu, cuda or cuda:N".into()))?;
            let count = cuda_devices().map_err(|problem| unusable(problem.clone()))?;
            if index >= count {
                let plural = if count == 1 { "" } else { "s" };
                return Err(unusable(format!("there is {count} CUDA device{plural}, counted from 0")));
            }
            let name = format!("cuda:{index}");
            let caution =
                || format!("{name} is unverified: the tests of the CUDA code have not run on a GPU yet");
            let note = (!CUDA_IS_VERIFIED).then(caution);
            Ok(Choice { device: Device::Cuda(index), name, note })
        }
    }
}

fn cpu(note: Option<String>) -> Choice {
    Choice { device: Device::Cpu, name: "cpu".into(), note }
}

/// The choice of `auto` on a machine with an NVIDIA GPU or without. `devices` counts CUDA devices; it is called only if one
/// may be chosen, because it opens libtorch's CUDA part.
fn auto(gpu: bool, verified: bool, devices: impl FnOnce() -> std::result::Result<usize, String>) -> Choice {
    let cpu = |reason: &str| cpu(Some(format!("device auto: the CPU{reason}")));
    match gpu {
        false => cpu(""),
        true if !verified => cpu("; the GPU of this machine is used by --device cuda, which is unverified"),
        true => match devices() {
            Ok(_) => Choice {
                device: Device::Cuda(0),
                name: "cuda:0".into(),
                note: Some("device auto: cuda:0".into()),
            },
            Err(problem) => cpu(&format!(", because {problem}")),
        },
    }
}

/// Whether NVIDIA's driver has a GPU. Quick: opens no library.
fn has_nvidia_gpu() -> bool {
    (0..16).any(|index| Path::new(&format!("/dev/nvidia{index}")).exists())
}

/// The devices of a list such as `cuda:0,cuda:1`. A device that is named twice counts as two.
///
/// # Errors
/// As [`resolve`], and if the list mixes the CPU with others.
pub fn resolve_all(names: &str) -> Result<Vec<Choice>> {
    let choices = names.split(',').map(|name| resolve(name.trim())).collect::<Result<Vec<_>>>()?;
    if choices.iter().any(|c| (c.device == Device::Cpu) != (choices[0].device == Device::Cpu)) {
        let problem = "the CPU does not work beside other devices".into();
        return Err(Error::Device { device: names.into(), problem });
    }
    Ok(choices)
}

/// Opens libtorch's CUDA part, if it is installed.
///
/// A program that may use CUDA must call it before any other use of libtorch. libtorch looks for its CUDA part only once, at the
/// first operation that needs it.
pub fn open() {
    // `resolve` returns the reason where it failed.
    let _ = opened();
}

/// The number of CUDA devices, at least one; else the reason why there is none.
fn cuda_devices() -> std::result::Result<usize, String> {
    static FOUND: OnceLock<std::result::Result<usize, String>> = OnceLock::new();
    FOUND
        .get_or_init(|| {
            opened()?;
            // With its CUDA part libtorch has CUDA's run-time library.
            let count = if Cuda::is_available() { Cuda::device_count() } else { 0 };
            counted(tch::utils::has_cudart(), count)
        })
        .clone()
}

/// The number of devices, by libtorch's counts with its CUDA part open.
fn counted(has_cuda: bool, count: i64) -> std::result::Result<usize, String> {
    match count {
        _ if !has_cuda => {
            Err("libtorch was used before its CUDA part was opened, and does not see it".into())
        }
        1.. => Ok(count as usize),
        _ => Err("there is no CUDA device, or no driver for it".into()),
    }
}

fn opened() -> std::result::Result<(), String> {
    static OPENED: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    OPENED.get_or_init(open_libtorch_cuda).clone()
}

/// Opens libtorch's CUDA part for the life of the program; its constructors register it with the rest of libtorch.
fn open_libtorch_cuda() -> std::result::Result<(), String> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    // SAFETY: the library's constructors register kernels and nothing else; it fits the libtorch that is linked, since
    // both come out of one folder.
    let opened = unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL) };
    match opened {
        Ok(library) => {
            // Registered kernels point into the library.
            std::mem::forget(library);
            Ok(())
        }
        Err(error) => {
            // The loader's message is in the source of the library's error.
            let said =
                std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            Err(if said.contains("libtorch_cuda.so: cannot open shared object file") {
                "libtorch's CUDA part is not installed (scripts/setup --cuda)".into()
            } else {
                format!("libtorch's CUDA part cannot be opened: {said}")
            })
        }
    }
}

/// Opens libtorch's CUDA part before `main`. Tests share a process, and many use libtorch before a test needs a device:
/// `tch::manual_seed` alone makes libtorch look for its CUDA part, once for the process.
#[cfg(test)]
#[used]
#[unsafe(link_section = ".init_array")]
static OPEN_FIRST: extern "C" fn() = {
    extern "C" fn open_first() {
        open();
    }
    open_first
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(resolve("cpu").unwrap(), Choice { device: Device::Cpu, name: "cpu".into(), note: None });
        for name in ["tpu", "cuda:", "cuda:x", "cuda0", "CPU", ""] {
            let error = resolve(name).unwrap_err().to_string();
            assert_eq!(error, format!("device `{name}` cannot be used: expected auto, cpu, cuda or cuda:N"));
        }
    }

    #[test]
    fn auto_says_what_it_chose_and_why() {
        let choice = |gpu, verified, devices: std::result::Result<usize, &str>| {
            let choice = auto(gpu, verified, || devices.map_err(Into::into));
            (choice.device, choice.note.unwrap())
        };
        let on_cpu = |note: &str| (Device::Cpu, note.to_owned());
        assert_eq!(choice(false, true, Ok(1)), on_cpu("device auto: the CPU"));
        let unverified =
            "device auto: the CPU; the GPU of this machine is used by --device cuda, which is unverified";
        assert_eq!(choice(true, false, Ok(1)), on_cpu(unverified));
        assert_eq!(
            choice(true, true, Err("x is missing")),
            on_cpu("device auto: the CPU, because x is missing")
        );
        assert_eq!(choice(true, true, Ok(2)), (Device::Cuda(0), "device auto: cuda:0".to_owned()));
        assert!(resolve("auto").unwrap().note.unwrap().starts_with("device auto: "));
    }

    #[test]
    fn a_libtorch_that_was_used_too_early_is_named() {
        assert_eq!(counted(true, 2), Ok(2));
        assert_eq!(counted(true, 0).unwrap_err(), "there is no CUDA device, or no driver for it");
        for count in [0, 1] {
            let problem = counted(false, count).unwrap_err();
            assert_eq!(problem, "libtorch was used before its CUDA part was opened, and does not see it");
        }
        // Whatever other tests of this process used before.
        tch::manual_seed(1);
        assert_eq!(tch::utils::has_cudart(), opened().is_ok());
    }

    #[test]
    fn lists() {
        let names = |text| resolve_all(text).unwrap().into_iter().map(|c| c.name).collect::<Vec<_>>();
        assert_eq!((names("cpu"), names("cpu, cpu")), (vec!["cpu".into()], vec!["cpu".into(), "cpu".into()]));
        assert!(resolve_all("cpu,").is_err());
    }

    #[test]
    fn a_device_that_is_not_there() {
        let error = resolve("cuda:99").unwrap_err().to_string();
        assert!(error.starts_with("device `cuda:99` cannot be used: "), "{error}");
    }
}
