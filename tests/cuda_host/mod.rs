//! Kernels on this machine: a `.cu` file of `src` compiled by the C++ compiler with the machine of this folder, and its
//! kernels called as a device would be; `driver` is a CUDA driver for such kernels. See `docs/kernels.md`.

pub(crate) mod driver;

use std::{
    collections::HashMap,
    env,
    ffi::{CStr, CString, OsStr, OsString, c_char, c_void},
    fs,
    marker::PhantomData,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use bytemuck::Pod;
use sha2::{Digest, Sha256};

/// A text of kernels as a library.
pub(crate) struct Library {
    path: PathBuf,
    run: unsafe extern "C" fn(*const RawLaunch) -> *const c_char,
    /// One launch at a time: the library has one machine.
    busy: Mutex<()>,
    _library: libloading::Library,
}

/// The order in which threads, and blocks, run: none may show in a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// The first that can.
    Forward,
    /// The last that can.
    Reverse,
    /// Any, by this seed.
    Random(u64),
}

/// How many blocks of how many threads, and how they run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) blocks: (usize, usize, usize),
    pub(crate) threads: (u32, u32),
    /// Dynamic shared memory, bytes.
    pub(crate) shared: usize,
    /// Blocks that run at the same time.
    pub(crate) resident: usize,
    pub(crate) order: Order,
}

/// Memory that a launch may touch. Empty: it may touch all, and races there are not seen.
#[derive(Default)]
pub(crate) struct Memory<'a> {
    buffers: Vec<RawBuffer>,
    owner: PhantomData<&'a mut [u8]>,
}

impl<'a> Memory<'a> {
    /// To be read; its address.
    pub(crate) fn read<T: Pod>(&mut self, values: &'a [T]) -> u64 {
        self.add(values.as_ptr() as u64, size_of_val(values), false)
    }

    /// To be read and written; its address.
    pub(crate) fn write<T: Pod>(&mut self, values: &'a mut [T]) -> u64 {
        self.add(values.as_mut_ptr() as u64, size_of_val(values), true)
    }

    fn add(&mut self, begin: u64, bytes: usize, writable: bool) -> u64 {
        self.buffers.push(RawBuffer { begin, bytes: bytes as u64, writable: writable.into() });
        begin
    }
}

/// A tensor map as `tensor_map.h` has it: a matrix of 16-bit values in boxes of rows and columns.
pub(crate) fn tensor_map(
    address: u64,
    (rows, columns): (usize, usize),
    (high, wide): (usize, usize),
) -> [u64; 16] {
    const MARK: u64 = u64::from_be_bytes(*b"tesentmp");
    let mut map = [0; 16];
    let sizes = [columns, rows, 2 * columns, wide, high].map(|size| size as u64);
    map[0] = address;
    map[1..6].copy_from_slice(&sizes);
    map[6] = MARK;
    map
}

#[repr(C)]
struct RawBuffer {
    begin: u64,
    bytes: u64,
    writable: u32,
}

/// `Launch` of launch.cpp.
#[repr(C)]
struct RawLaunch {
    kernel: *const c_char,
    grid: [u32; 3],
    threads: [u32; 2],
    dynamic_bytes: u32,
    resident: u32,
    order: u32,
    seed: u64,
    buffers: *const RawBuffer,
    buffer_count: u32,
    argument_count: u32,
    arguments: *const *const c_void,
    argument_sizes: *const u32,
}

impl Library {
    /// A `.cu` file, `gptq_block` or `int4_matmul`, compiled with these macros once.
    pub(crate) fn of(text: &str, macros: &[(&str, i64)]) -> Arc<Self> {
        type Libraries = HashMap<(String, Vec<(String, i64)>), Arc<OnceLock<Arc<Library>>>>;
        static BUILT: OnceLock<Mutex<Libraries>> = OnceLock::new();
        let key = (text.to_owned(), macros.iter().map(|&(name, value)| (name.to_owned(), value)).collect());
        let place = {
            let mut built = BUILT.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(built.entry(key).or_default())
        };
        Arc::clone(place.get_or_init(|| Arc::new(Self::open(build(text, macros)))))
    }

    fn open(path: PathBuf) -> Self {
        // SAFETY: its constructors are those of the machine, which touch nothing but its own state.
        let library =
            unsafe { libloading::Library::new(&path) }.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        // SAFETY: the type is that of the function in launch.cpp.
        let run = unsafe {
            *library
                .get::<unsafe extern "C" fn(*const RawLaunch) -> *const c_char>(b"cuda_host_run\0")
                .expect("launch.cpp has it")
        };
        Self { path, run, busy: Mutex::new(()), _library: library }
    }

    /// Runs a kernel to its end. Each argument is given by its bytes.
    ///
    /// # Errors
    /// What a thread did wrong, and where; memory is then as that thread left it.
    ///
    /// # Safety
    /// The arguments are those of the kernel. With an empty `memory`, they point to what it touches.
    pub(crate) unsafe fn launch(
        &self,
        kernel: &str,
        launch: Launch,
        memory: &Memory<'_>,
        arguments: &[Vec<u8>],
    ) -> Result<(), String> {
        let name = CString::new(kernel).expect("a kernel's name");
        // By value, as wide and as aligned as any.
        let values: Vec<Vec<u128>> = arguments.iter().map(|bytes| aligned(bytes)).collect();
        let addresses: Vec<*const c_void> = values.iter().map(|value| value.as_ptr().cast()).collect();
        let sizes: Vec<u32> = arguments.iter().map(|bytes| bytes.len() as u32).collect();
        let (order, seed) = match launch.order {
            Order::Forward => (0, 0),
            Order::Reverse => (1, 0),
            Order::Random(seed) => (2, seed),
        };
        let small = |value: usize| u32::try_from(value).expect("a size of a launch");
        let raw = RawLaunch {
            kernel: name.as_ptr(),
            grid: [small(launch.blocks.0), small(launch.blocks.1), small(launch.blocks.2)],
            threads: launch.threads.into(),
            dynamic_bytes: small(launch.shared),
            resident: small(launch.resident),
            order,
            seed,
            buffers: memory.buffers.as_ptr(),
            buffer_count: memory.buffers.len() as u32,
            argument_count: arguments.len() as u32,
            arguments: addresses.as_ptr(),
            argument_sizes: sizes.as_ptr(),
        };
        let _one = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: everything it points to lives; the machine checks sizes of arguments and, where memory is named, every
        // access; the rest is the caller's promise.
        let error = unsafe { (self.run)(&raw const raw) };
        if error.is_null() {
            return Ok(());
        }
        // SAFETY: a text that lives until the next launch, for which `_one` has to be given up.
        let error = unsafe { CStr::from_ptr(error) }.to_string_lossy();
        Err(format!("{kernel}: {}", self.with_lines(&error)))
    }

    /// `[0x1234]`, an offset in the library, as the line of the text that it was compiled from.
    fn with_lines(&self, error: &str) -> String {
        let Some((before, (offset, after))) =
            error.split_once('[').and_then(|(before, rest)| Some((before, rest.split_once(']')?)))
        else {
            return error.to_owned();
        };
        let offset = usize::from_str_radix(offset.trim_start_matches("0x"), 16).expect("an offset");
        // A return address: the call is before it.
        let place = format!("{:#x}", offset - 1);
        let lines = Command::new("addr2line").arg("-ie").arg(&self.path).arg(&place).output();
        let lines =
            lines.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        // Within what was inlined, the first line of the kernels' own text.
        let line = lines.lines().filter_map(|line| line.rsplit_once('/')).map(|(_, line)| line);
        let line = line.map(|line| line.split(' ').next().unwrap_or(line)).find(|line| line.contains(".cu:"));
        format!("{before}{}{after}", line.unwrap_or("a place of the library that addr2line does not know"))
    }
}

/// A value's bytes where any value may lie.
fn aligned(bytes: &[u8]) -> Vec<u128> {
    let mut value = vec![0u128; bytes.len().div_ceil(size_of::<u128>())];
    bytemuck::cast_slice_mut::<_, u8>(&mut value)[..bytes.len()].copy_from_slice(bytes);
    value
}

// ---- the build ----

/// The machine, without the texts' own files.
const MACHINE: [&str; 6] =
    ["machine.cpp", "memory.cpp", "asynchronous.cpp", "numbers.cpp", "undefined.cpp", "launch.cpp"];
const FLAGS: [&str; 8] = [
    "-std=c++17",
    "-g1",
    "-gdwarf-4",
    "-fPIC",
    "-fno-exceptions",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",
];
/// What hooks every load and store, and undefined behaviour. Nothing of the sanitizers' own libraries is linked.
const HOOKS: [&str; 5] =
    ["-O1", "-fsanitize=thread", "-fsanitize=undefined", "-fno-sanitize=vptr", "-Wno-unknown-pragmas"];

/// The library for these macros, from an earlier run where nothing has changed since.
fn build(text: &str, macros: &[(&str, i64)]) -> PathBuf {
    let macros: Vec<String> = macros.iter().map(|(name, value)| format!("-D{name}={value}")).collect();
    let name = format!("{text}-{}.so", digest(&[&macros[..], &[compiler_version()]].concat()));
    let library = scratch().join(&name);
    if library.exists() {
        return library;
    }
    let work = tempfile::TempDir::with_prefix_in("cuda-host-", scratch()).expect("a folder to build in");
    let object = work.path().join("kernels.o");
    let source = folder().join(format!("{text}.cpp"));
    compile(
        work.path(),
        &[
            &HOOKS.map(OsStr::new)[..],
            &macros.iter().map(OsStr::new).collect::<Vec<_>>(),
            &[OsStr::new("-c"), source.as_os_str(), OsStr::new("-o"), object.as_os_str()],
        ]
        .concat(),
    );
    let built = work.path().join(&name);
    let machine = machine();
    let parts = ["-shared", "-Wl,-z,defs", "-o"].map(OsStr::new);
    compile(
        work.path(),
        &[&parts[..], &[built.as_os_str(), object.as_os_str(), machine.as_os_str()]].concat(),
    );
    // Another process may have done the same meanwhile: either is as good.
    fs::rename(&built, &library).expect("the library moves to its place");
    library
}

/// The machine as one object.
fn machine() -> &'static Path {
    static OBJECT: OnceLock<PathBuf> = OnceLock::new();
    OBJECT.get_or_init(|| {
        let name = format!("machine-{}.o", digest(&[compiler_version()]));
        let place = scratch().join(&name);
        if !place.exists() {
            let work =
                tempfile::TempDir::with_prefix_in("cuda-host-", scratch()).expect("a folder to build in");
            let sources: Vec<PathBuf> = MACHINE.iter().map(|file| folder().join(file)).collect();
            let sources: Vec<&OsStr> = sources.iter().map(|path| path.as_os_str()).collect();
            compile(work.path(), &[&["-O2", "-c"].map(OsStr::new)[..], &sources[..]].concat());
            let objects = MACHINE.map(|file| OsString::from(file.replace(".cpp", ".o")));
            let objects: Vec<&OsStr> = objects.iter().map(AsRef::as_ref).collect();
            let together = ["-r", "-nostdlib", "-o", &name].map(OsStr::new);
            compile(work.path(), &[&together[..], &objects].concat());
            fs::rename(work.path().join(&name), &place).expect("the object moves to its place");
        }
        place
    })
}

/// That of the machine, and those of the kernels.
fn folders() -> [PathBuf; 3] {
    let source = |path: &str| folder().join("../../src").join(path);
    [folder(), source("gptq/solver/cuda"), source("kernels/cuda")]
}

fn compile(work: &Path, arguments: &[&OsStr]) {
    let mut command = Command::new(compiler());
    command.current_dir(work).args(FLAGS);
    for include in folders() {
        command.arg("-I").arg(include);
    }
    let output = command.args(arguments).output().unwrap_or_else(|error| {
        panic!(
            "the C++ compiler {:?}, which the tests of the CUDA kernels need: {error}; see scripts/setup",
            compiler()
        )
    });
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
}

/// As scripts/setup looks for it.
fn compiler() -> OsString {
    env::var_os("CXX").unwrap_or_else(|| "c++".into())
}

fn compiler_version() -> String {
    let output = Command::new(compiler()).arg("--version").output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_host")
}

/// `tmp` of cargo's target folder: this program is `target/PROFILE/deps/NAME`.
fn scratch() -> PathBuf {
    let program = env::current_exe().expect("this program has a path");
    let scratch = program.ancestors().nth(3).expect("it is in cargo's target folder").join("tmp");
    fs::create_dir_all(&scratch).expect("cargo's folder for tests");
    scratch
}

/// Of everything that a library is made from.
fn digest(settings: &[String]) -> String {
    let mut digest = Sha256::new();
    for folder in folders() {
        let files = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let mut files: Vec<PathBuf> = files.map(|entry| entry.expect("a file").path()).collect();
        files
            .retain(|file| file.extension().is_some_and(|e| ["h", "cpp", "cu"].map(OsStr::new).contains(&e)));
        files.sort();
        for file in files {
            digest.update(fs::read(&file).expect("a source"));
        }
    }
    for part in settings.iter().map(String::as_str).chain(FLAGS).chain(HOOKS) {
        digest.update(part);
        digest.update([0]);
    }
    digest.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}
