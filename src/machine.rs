//! Memory, disk space and speed of the machine, and the memory of this process.

use std::{
    fs,
    path::Path,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use tch::{Device, Kind, Tensor};

use crate::{
    error::{ResourceError, Result, TorchContext},
    units::bytes,
};

/// Free bytes on the disk of `folder`; `None` if the system does not state them.
pub fn available_space(folder: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(folder).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Requires so many free bytes on the disk of `folder`, if the system states its free space.
///
/// # Errors
/// If there are fewer.
pub fn require_space(folder: &Path, needed: u64) -> Result<()> {
    match available_space(folder) {
        Some(available) if available < needed => Err(ResourceError::DiskSpace {
            path: folder.into(),
            available: bytes(available),
            needed: bytes(needed),
        }
        .into()),
        _ => Ok(()),
    }
}

/// Overrides a function of MKL, which libtorch contains, on processors that are not Intel's.
///
/// MKL runs its AVX-512 code only if this function returns 1, else its AVX2 code. On two cores of an AMD EPYC (Zen 5) that
/// multiplies fp32 matrices at 0.19 TFLOP/s instead of 0.45. MKL checks the processor's instructions elsewhere, so a processor
/// without AVX-512 runs no AVX-512 code. The linker puts this definition before MKL's (`build.rs`).
#[unsafe(no_mangle)]
extern "C" fn mkl_serv_intel_cpu_true() -> libc::c_int {
    1
}

/// The processor's name, where the system has it.
pub fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Resident memory of this process now, bytes; `None` if the system does not state it.
pub fn resident_memory() -> Option<u64> {
    kilobytes("/proc/self/status", "VmRSS:")
}

/// Largest resident memory of this process so far, bytes; `None` if the system does not state it.
pub fn peak_memory() -> Option<u64> {
    kilobytes("/proc/self/status", "VmHWM:")
}

/// Bytes that this process can still allocate before the system or its container is out of memory; `None` if the system does
/// not state them.
pub fn available_memory() -> Option<u64> {
    let system = kilobytes("/proc/meminfo", "MemAvailable:");
    match (system, container_memory()) {
        (Some(system), Some(container)) => Some(system.min(container)),
        (system, container) => system.or(container),
    }
}

/// Floating-point operations per second of matrix products in `kind` on the CPU: the best of several measurements, which take a
/// fraction of a second together. Other programs slow some of them down. A process measures each kind once.
///
/// # Errors
/// If libtorch cannot compute them.
pub fn product_speed(kind: Kind) -> Result<f64> {
    static MEASURED: Mutex<Vec<(Kind, f64)>> = Mutex::new(Vec::new());
    let mut measured = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, speed)) = measured.iter().find(|(of, _)| *of == kind) {
        return Ok(*speed);
    }
    const SIZE: i64 = 1024;
    const REPEATS: usize = 12;
    let products = || {
        let x = Tensor::f_ones([SIZE, SIZE], (kind, Device::Cpu))?;
        let mut best = f64::INFINITY;
        for _ in 0..REPEATS {
            let begun = Instant::now();
            let _product = x.f_mm(&x)?;
            best = best.min(begun.elapsed().as_secs_f64());
        }
        Ok(2.0 * (SIZE as f64).powi(3) / best)
    };
    let speed = products().torch("measure a matrix product")?;
    measured.push((kind, speed));
    Ok(speed)
}

/// Returns free memory of the allocator to the system. A forward pass allocates and frees many buffers of a few megabytes,
/// which otherwise pile up in the heaps of its threads.
pub fn return_free_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it touches free memory alone, under the allocator's locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

fn kilobytes(path: &str, key: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|l| l.starts_with(key))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// Bytes that this process can still allocate in its control groups: the least from its own group up to the root. Reads version
/// 2, and version 1's memory controller.
fn container_memory() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let of_line = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let (root, limit, usage, cache) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
            _ if controllers.split(',').any(|c| c == "memory") => (
                "/sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            ),
            _ => return None,
        };
        let folders = Path::new(path.trim_start_matches('/')).ancestors();
        let left = folders.filter_map(|group| {
            let folder = Path::new(root).join(group);
            let number = |name: &str| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
            let statistics = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
            // Cached pages of files, which the system reclaims when it needs memory.
            let cache =
                statistics.lines().find_map(|line| line.strip_prefix(cache)?.trim().parse::<u64>().ok());
            // `max` means no limit.
            Some(number(limit)?.saturating_sub(number(usage)?.saturating_sub(cache.unwrap_or(0))))
        });
        left.min()
    };
    groups.lines().filter_map(of_line).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_within_what_there_is() {
        let (now, peak) = (resident_memory().unwrap(), peak_memory().unwrap());
        assert!(now > 1 << 20 && peak >= now / 2, "{now} {peak}");
        assert!(available_memory().unwrap() > 1 << 20);
        assert!(available_space(Path::new("/")).is_some());
    }
}
