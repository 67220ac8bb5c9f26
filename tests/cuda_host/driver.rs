//! The driver of `driver.cpp`, in a process of its own: a process has one CUDA driver.

use std::{
    env,
    ffi::{CStr, CString, c_char, c_int},
    fs,
    process::Command,
};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};

use super::{compile, digest, scratch};

/// Names the test that runs alone in this process.
const ALONE: &str = "GPTQ_TEST_ALONE";

/// Runs a test, given by its full name, in a process of its own, with the tests' driver in place of CUDA's.
///
/// # Panics
/// When the test fails.
#[track_caller]
pub(crate) fn with_driver(test: &str, run: impl FnOnce(&Driver)) {
    if env::var(ALONE).is_ok_and(|alone| alone == test) {
        let driver = Driver::load();
        run(&driver);
        assert_eq!(driver.faults(), "", "what the driver API forbids");
        return;
    }
    let program = env::current_exe().expect("this program has a path");
    let mut command = Command::new(program);
    let output =
        command.args([test, "--exact", "--nocapture", "--include-ignored"]).env(ALONE, test).output();
    let output = output.expect("this program starts");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("1 passed"), "{test} is the test's name: {text}");
}

/// The driver.
pub(crate) struct Driver(Library);

/// Objects that were made and not destroyed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Alive {
    pub(crate) events: u64,
    pub(crate) streams: u64,
    pub(crate) modules: u64,
    pub(crate) page_locked: u64,
}

impl Driver {
    /// Opens it before anything looks for CUDA's, which then finds this one: it has its name.
    fn load() -> Self {
        let name = format!("libcuda-{}.so", digest(&[]));
        let path = scratch().join(&name);
        if !path.exists() {
            let work =
                tempfile::TempDir::with_prefix_in("cuda-host-", scratch()).expect("a folder to build in");
            let built = work.path().join(&name);
            let source = super::folder().join("driver.cpp");
            let flags = ["-shared", "-O1", "-Wl,-soname,libcuda.so", "-o"].map(std::ffi::OsStr::new);
            compile(
                work.path(),
                &[&flags[..], &[built.as_os_str(), source.as_os_str(), "-ldl".as_ref()]].concat(),
            );
            // Another process may have done the same meanwhile: either is as good.
            fs::rename(&built, &path).expect("the library moves to its place");
        }
        // SAFETY: its constructors touch nothing but its own state.
        let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) };
        Self(library.unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    fn call<T>(&self, name: &str) -> Symbol<T> {
        // SAFETY: the callers name the functions of driver.cpp with their types.
        unsafe { self.0.get(name.as_bytes()) }.expect("driver.cpp has it")
    }

    /// Adds a device: name, compute capability, multiprocessors, bytes of shared memory that a block can have.
    pub(crate) fn add_device(
        &self,
        name: &str,
        capability: (c_int, c_int),
        multiprocessors: c_int,
        shared: usize,
    ) {
        type Add = unsafe extern "C" fn(*const c_char, c_int, c_int, c_int, c_int, c_int);
        let (name, (major, minor)) = (CString::new(name).expect("a name"), capability);
        // SAFETY: the function's type is that of driver.cpp.
        unsafe {
            self.call::<Add>("driver_add_device")(
                name.as_ptr(),
                major,
                minor,
                multiprocessors,
                shared as c_int,
                50 << 20,
            );
        }
    }

    /// Runs kernels of a library; without one launches do nothing.
    pub(crate) fn use_kernels(&self, library: &super::Library) {
        let path = CString::new(library.path.as_os_str().as_encoded_bytes()).expect("a path");
        // SAFETY: as above.
        unsafe { self.call::<unsafe extern "C" fn(*const c_char)>("driver_use_kernels")(path.as_ptr()) };
    }

    /// What was done that the API forbids, a line each.
    pub(crate) fn faults(&self) -> String {
        // SAFETY: as above; the text lives until the next call.
        let text = unsafe {
            CStr::from_ptr(self.call::<unsafe extern "C" fn() -> *const c_char>("driver_faults")())
        };
        text.to_string_lossy().into_owned()
    }

    /// How often a call was made, or a kernel launched (`launch NAME`).
    pub(crate) fn calls(&self, name: &str) -> u64 {
        let name = CString::new(name).expect("a name");
        // SAFETY: as above.
        unsafe { self.call::<unsafe extern "C" fn(*const c_char) -> u64>("driver_calls")(name.as_ptr()) }
    }

    /// Operations that nothing has waited for.
    pub(crate) fn pending(&self) -> u64 {
        // SAFETY: as above.
        unsafe { self.call::<unsafe extern "C" fn() -> u64>("driver_pending")() }
    }

    pub(crate) fn alive(&self) -> Alive {
        let mut counts = [0u64; 4];
        // SAFETY: as above.
        unsafe { self.call::<unsafe extern "C" fn(*mut [u64; 4])>("driver_alive")(&raw mut counts) };
        let [events, streams, modules, page_locked] = counts;
        Alive { events, streams, modules, page_locked }
    }

    /// Lets no more bytes be page-locked.
    pub(crate) fn limit_page_locked(&self, bytes: u64) {
        // SAFETY: as above.
        unsafe { self.call::<unsafe extern "C" fn(u64)>("driver_limit_page_locked")(bytes) };
    }
}
