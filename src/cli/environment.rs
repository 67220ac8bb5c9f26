//! Settings that libraries read from the environment before `main`.

use std::{env, os::unix::process::CommandExt, process::Command, thread};

/// Variables that are set, unless they are set already.
///
/// - OpenMP threads that wait spin for milliseconds. On a machine with other load, or beside the program's own threads, that
///   costs up to three quarters of the time.
/// - libtorch and glibc take large buffers from the system and return them at once. Page faults and cleared pages then take 15% of
///   a run's processor time. With huge pages of 2 MB there are 512 times fewer faults, and buffers of up to 256 MB are used again.
const SETTINGS: [(&str, &str); 3] = [
    ("OMP_WAIT_POLICY", "passive"),
    ("THP_MEM_ALLOC_ENABLE", "1"),
    (
        "GLIBC_TUNABLES",
        "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=268435456:glibc.malloc.trim_threshold=536870912",
    ),
];
/// Threads of libtorch, and of this program.
const THREADS: [&str; 2] = ["OMP_NUM_THREADS", "RAYON_NUM_THREADS"];
/// In how many processes launchers of MPI have started the program on this machine: Open MPI; MPICH and Intel MPI.
const RANKS_HERE: [&str; 2] = ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"];

/// Starts this program again with the settings, if one is missing. Returns if all are set, or if starting again fails: the
/// program is then only slower.
pub(super) fn prepare() {
    let missing: Vec<_> = SETTINGS.into_iter().filter(|(name, _)| env::var_os(name).is_none()).collect();
    if !cfg!(target_os = "linux") || missing.is_empty() {
        return;
    }
    if let Ok(program) = env::current_exe() {
        let mut arguments = env::args_os();
        let mut command = Command::new(program);
        if let Some(name) = arguments.next() {
            command.arg0(name);
        }
        let threads =
            threads_of_rank().into_iter().flat_map(|count| THREADS.map(|name| (name, count.clone())));
        // Returns only when it fails.
        let _ = command.args(arguments).envs(threads).envs(missing).exec();
    }
}

/// Threads of a process that shares its machine with other ranks of a run: those that are set, else its part of the processors. `None`
/// for a process that is alone.
fn threads_of_rank() -> Option<String> {
    let ranks = RANKS_HERE.iter().find_map(|name| env::var(name).ok()?.parse::<usize>().ok())?;
    let part = || (thread::available_parallelism().map_or(1, usize::from) / ranks.max(1)).max(1).to_string();
    Some(env::var(THREADS[0]).unwrap_or_else(|_| part()))
}
