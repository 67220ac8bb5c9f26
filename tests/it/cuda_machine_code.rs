//! The CUDA kernels as machine code of every generation: NVRTC's PTX through `ptxas`, which says what registers and shared memory
//! a kernel takes, and whether it spills. `docs/kernels.md` has the table; `GPTQ_UPDATE_DOCS=1` writes it anew.
//!
//! NVRTC sorts some instructions by the addresses of its own objects, which differ from process to process: the same text gives
//! the same instructions in another order, and ptxas a few registers more or less. So registers may differ from the table by
//! [`OF_ORDER`].

use std::{collections::BTreeMap, env, fmt::Write as _, fs, process::Command};

use gptq::{
    cuda::{Macro, Source, compile},
    kernels::{
        Features, Repacked,
        cuda::plan::{Build, Limits, Product},
    },
};

use crate::helpers::repository;

/// Architectures, with the shared memory that their blocks can have.
const ARCHITECTURES: [(&str, usize); 6] =
    [("80", 163), ("86", 99), ("89", 99), ("90a", 227), ("100", 227), ("120", 99)];
/// The `ptxas` that the table is of: that of NVRTC's release.
const RELEASE: &str = "V13.0.88";
/// Registers that let two blocks of 256 threads be resident.
const OF_TWO_BLOCKS: u32 = 128;
/// Registers of a thread that NVRTC's order of instructions makes a difference of: up to 5 were seen in ten processes. Devices give
/// out 8 at a time.
const OF_ORDER: u32 = 8;

const SOLVER: Source =
    Source { name: "gptq_block.cu", text: include_str!("../../src/gptq/solver/cuda/gptq_block.cu") };
const PRODUCT: Source =
    Source { name: "int4_matmul.cu", text: include_str!("../../src/kernels/cuda/int4_matmul.cu") };

/// What `ptxas -v` says of a kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Resources {
    registers: u32,
    /// Static, bytes.
    shared: u32,
    stack: u32,
    spilled: u32,
}

fn ptxas() -> String {
    env::var("GPTQ_PTXAS").unwrap_or_else(|_| "ptxas".into())
}

/// The number before a word, such as `120` of `Used 120 registers`.
fn before(line: &str, word: &str) -> u32 {
    let number = line.split(word).next().unwrap_or_default().trim_end().rsplit(' ').next();
    if line.contains(word) { number.and_then(|n| n.parse().ok()).expect("a number") } else { 0 }
}

/// The kernels of `ptxas -v`'s output.
fn resources(log: &str) -> BTreeMap<String, Resources> {
    let mut found = BTreeMap::new();
    let mut kernel = String::new();
    let mut now = Resources::default();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("entry function '") {
            kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            now = Resources::default();
        } else if line.contains("bytes stack frame") {
            now.stack = before(line, " bytes stack frame");
            now.spilled = before(line, " bytes spill stores") + before(line, " bytes spill loads");
        } else if line.contains(" registers") {
            now.registers = before(line, " registers");
            now.shared = before(line, " bytes smem");
            found.insert(kernel.clone(), now);
        }
    }
    found
}

fn assembled(source: &Source, macros: &[Macro], architecture: &str) -> BTreeMap<String, Resources> {
    let ptx = compile(source, &format!("compute_{architecture}"), macros).unwrap_or_else(|e| panic!("{e}"));
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("kernels.ptx"), folder.path().join("kernels.cubin"));
    fs::write(&input, ptx).unwrap();
    let gpu = format!("--gpu-name=sm_{architecture}");
    let run = Command::new(ptxas()).args(["-v", &gpu, "-o"]).args([&output, &input]).output();
    let run = run.unwrap_or_else(|error| panic!("{}: {error}", ptxas()));
    let log = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "sm_{architecture}, {macros:?}: {log}");
    assert!(!log.contains("serialized"), "sm_{architecture}, {macros:?}: wgmma waits for itself: {log}");
    let found = resources(&log);
    assert!(!found.is_empty(), "sm_{architecture}: {log}");
    for (kernel, r) in &found {
        assert!(r.stack == 0 && r.spilled == 0, "{kernel} for sm_{architecture}, {macros:?}: {r:?}");
    }
    found
}

/// Builds of the product for a device: both widths, and both types, with zero points and without; the smallest groups.
fn builds(shared_memory: usize, wgmma: bool) -> Vec<Vec<Macro>> {
    let limits = Limits { multiprocessors: 132, shared_memory, wgmma };
    let build = |(bits, bf16, zeros, group_tiles): (usize, bool, bool, usize)| {
        let linear = Repacked {
            weights: Vec::new(),
            params: Vec::new(),
            features: Features::InPlace,
            bits,
            in_features: 4096,
            out_features: 4096,
            positions: 4096,
            columns: 4096,
            group: 16 * group_tiles,
            zeros,
            group_tiles,
        };
        let products = [Some(Product::Few(8)), wgmma.then_some(Product::Wgmma)].into_iter().flatten();
        let build = Build::new(&linear, bf16, limits).unwrap();
        products.map(|product| build.macros(product)).collect::<Vec<_>>()
    };
    [(4, false, false, 4), (8, true, true, 1)].map(build).concat()
}

/// Kernels as rows, architectures as columns; of several builds the most registers.
fn table() -> String {
    let mut rows: BTreeMap<String, [Resources; ARCHITECTURES.len()]> = BTreeMap::new();
    for (column, (architecture, kibibytes)) in ARCHITECTURES.into_iter().enumerate() {
        let mut add = |found: BTreeMap<String, Resources>| {
            for (kernel, r) in found {
                let cell = &mut rows.entry(kernel).or_default()[column];
                let most = |a: u32, b: u32| a.max(b);
                *cell = Resources {
                    registers: most(cell.registers, r.registers),
                    shared: most(cell.shared, r.shared),
                    ..r
                };
            }
        };
        add(assembled(&SOLVER, &[], architecture));
        for macros in builds(kibibytes << 10, architecture == "90a") {
            add(assembled(&PRODUCT, &macros, architecture));
        }
    }
    let mut text = "| kernel |".to_owned();
    ARCHITECTURES.iter().for_each(|(architecture, _)| write!(text, " sm_{architecture} |").unwrap());
    text += " static shared memory |\n|---|";
    text += &"---|".repeat(ARCHITECTURES.len() + 1);
    for (kernel, cells) in &rows {
        write!(text, "\n| `{kernel}` |").unwrap();
        for cell in cells {
            if kernel.starts_with("gptq_solve") || kernel == "gptq_compensate" {
                assert!(cell.registers <= OF_TWO_BLOCKS, "{kernel}: {cells:?}");
            }
            match cell.registers {
                0 => text += " – |", // not built for it
                registers => write!(text, " {registers} |").unwrap(),
            }
        }
        let shared = cells.iter().map(|cell| cell.shared).max().unwrap_or_default();
        write!(text, " {shared} |").unwrap();
    }
    text
}

#[test]
fn kernels_fit_the_registers_of_every_generation_with_nvrtc_and_with_ptxas() {
    const MARKS: [&str; 2] = ["<!-- registers -->\n", "<!-- end of registers -->"];
    let table = format!("\n{}\n\n", table());
    let version = Command::new(ptxas()).arg("--version").output().unwrap();
    if !String::from_utf8_lossy(&version.stdout).contains(RELEASE) {
        return; // another assembler allocates otherwise; that nothing spills was checked
    }
    let path = repository().join("docs/kernels.md");
    let text = fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(MARKS[0]).unwrap();
    let (found, after) = rest.split_once(MARKS[1]).unwrap();
    if env::var_os("GPTQ_UPDATE_DOCS").is_some() {
        fs::write(&path, [before, MARKS[0], &table, MARKS[1], after].concat()).unwrap();
        return;
    }
    if let Err(difference) = compare(found, &table) {
        panic!("docs/kernels.md is not what ptxas says, {difference}: GPTQ_UPDATE_DOCS=1\n{table}");
    }
}

/// Whether two tables have the same kernels and shared memory, and nearly the same registers.
///
/// # Errors
/// The first difference.
fn compare(one: &str, other: &str) -> Result<(), String> {
    let cells = |table: &str| -> Vec<Vec<String>> {
        let rows =
            table.trim().lines().map(|line| line.split('|').map(|cell| cell.trim().to_owned()).collect());
        rows.collect()
    };
    let (one, other) = (cells(one), cells(other));
    if one.iter().map(Vec::len).ne(other.iter().map(Vec::len)) || one[..2] != other[..2] {
        return Err(format!("{one:?} and {other:?}"));
    }
    for (one, other) in one.iter().zip(&other).skip(2) {
        let last = one.len().saturating_sub(2); // static shared memory
        for (column, (a, b)) in one.iter().zip(other).enumerate() {
            let registers = (2..last).contains(&column).then(|| (a.parse::<u32>(), b.parse::<u32>()));
            let near = matches!(registers, Some((Ok(a), Ok(b))) if a.abs_diff(b) <= OF_ORDER);
            if !near && a != b {
                return Err(format!("{}: {a} and {b}", one[1]));
            }
        }
    }
    Ok(())
}

#[test]
fn tables_of_registers_may_differ_by_the_order_of_instructions_alone() {
    let table = |registers: &str, shared: u32| {
        format!("\n| kernel | sm_80 | s |\n|---|---|---|\n| `f` | {registers} | {shared} |\n")
    };
    let one = table("100", 128);
    assert_eq!(compare(&one, &table("108", 128)), Ok(()));
    assert_eq!(compare(&one, &table("109", 128)), Err("`f`: 100 and 109".into()));
    assert_eq!(compare(&one, &table("–", 128)), Err("`f`: 100 and –".into()));
    assert_eq!(compare(&one, &table("100", 129)), Err("`f`: 128 and 129".into()));
    assert!(compare(&one, &one.replace("`f`", "`g`")).is_err());
    assert!(compare(&one, &(one.clone() + "| `g` | 1 | 0 |\n")).is_err());
}

#[test]
fn figures_of_ptxas_are_read() {
    let log = "ptxas info    : 0 bytes gmem\n\
               ptxas info    : Compiling entry function 'one' for 'sm_80'\n\
               ptxas info    : Function properties for one\n\
               \x20   40 bytes stack frame, 52 bytes spill stores, 88 bytes spill loads\n\
               ptxas info    : Used 128 registers, used 1 barriers, 2048 bytes smem, 512 bytes cmem[0]\n\
               ptxas info    : Compiling entry function 'two' for 'sm_80'\n\
               ptxas info    : Function properties for two\n\
               \x20   0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
               ptxas info    : Used 18 registers, used 0 barriers\n";
    let found = resources(log);
    assert_eq!(found["one"], Resources { registers: 128, shared: 2048, stack: 40, spilled: 140 });
    assert_eq!(found["two"], Resources { registers: 18, ..Resources::default() });
}
