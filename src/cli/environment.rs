//! Settings that libraries read from the environment before `main`.

use std::{
    env,
    ffi::{CStr, CString, c_char, c_int},
    ptr, thread,
};

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

/// Called by the loader before the initializers of shared libraries, since those of libtorch take a quarter of a second.
#[used]
#[unsafe(link_section = ".preinit_array")]
static PREPARE: extern "C" fn(c_int, Strings, Strings) = prepare;

/// Pointers to strings, with a null pointer at the end.
type Strings = *const *const c_char;

/// Starts this program again with the settings, if one is missing. Returns if all are set, or if starting again fails: the
/// program is then only slower. `std::env::args` and `std::env::vars` are still empty then.
extern "C" fn prepare(_: c_int, arguments: Strings, environment: Strings) {
    // SAFETY: the loader's environment is a list of strings, which nothing has changed yet.
    let entries = unsafe { entries(environment) };
    let value = |name: &str| {
        let of_name =
            |entry: &&'static CStr| entry.to_bytes().strip_prefix(name.as_bytes())?.strip_prefix(b"=");
        entries.iter().find_map(of_name)
    };
    let missing: Vec<_> = SETTINGS.into_iter().filter(|(name, _)| value(name).is_none()).collect();
    if missing.is_empty() {
        return;
    }
    let Ok(program) = env::current_exe() else { return };
    let Ok(program) = CString::new(program.into_os_string().into_encoded_bytes()) else { return };
    let mut own: Vec<String> = missing.iter().map(|(name, value)| format!("{name}={value}")).collect();
    if let Some(count) = threads_of_rank(value) {
        let unset = THREADS.into_iter().filter(|name| value(name).is_none());
        own.extend(unset.map(|name| format!("{name}={count}")));
    }
    let own: Vec<CString> = own.into_iter().filter_map(|entry| CString::new(entry).ok()).collect();
    let entries = entries.iter().copied().chain(own.iter().map(CString::as_c_str));
    let pointers: Vec<_> = entries.map(CStr::as_ptr).chain([ptr::null()]).collect();
    // SAFETY: both lists end with a null pointer. It returns only when it fails.
    unsafe { libc::execve(program.as_ptr(), arguments, pointers.as_ptr()) };
}

/// # Safety
/// The list and its strings must live as long as the program.
unsafe fn entries(mut list: Strings) -> Vec<&'static CStr> {
    let mut entries = Vec::new();
    // SAFETY: the list ends with a null pointer, before which are strings.
    unsafe {
        while !(*list).is_null() {
            entries.push(CStr::from_ptr(*list));
            list = list.add(1);
        }
    }
    entries
}

/// Threads of a process that shares its machine with other ranks of a run: those that are set, else its part of the processors. `None`
/// for a process that is alone.
fn threads_of_rank<'a>(value: impl Fn(&str) -> Option<&'a [u8]>) -> Option<String> {
    let text = |name: &str| str::from_utf8(value(name)?).ok();
    let ranks = RANKS_HERE.iter().find_map(|name| text(name)?.parse::<usize>().ok())?;
    let part = || (thread::available_parallelism().map_or(1, usize::from) / ranks.max(1)).max(1).to_string();
    Some(text(THREADS[0]).map_or_else(part, str::to_owned))
}
