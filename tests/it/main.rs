//! The tests of the library and the program together.
//!
//! | file | what it holds the program to |
//! |---|---|
//! | `quantize` | a run from end to end: what is in the folder, and that it is the same every time |
//! | `variants` | every kind of variant and of source, from quantize through verify to eval |
//! | `accuracy` | what presets turn on beyond plain GPTQ, where it shows, and that it helps |
//! | `output` | what people see on the terminal |
//! | `bad_input` | every malformed checkpoint: its error, its hint, exit code 2, nothing left behind |
//! | `bad_settings` | the same for plans, flags, texts and disks |
//! | `cuda_device` | whole models on a CUDA device against the CPU (needs one) |
//! | `cuda_driver` | the host code of CUDA on a driver of the tests' own: launches, attributes, copies, fences |
//! | `resume` | runs that end early go on to the same bytes; what cannot be gone on with is refused, untouched |
//! | `killed` | the same with the program killed, stopped by signals, and on disks that fill up |
//! | `resources` | limits of memory and several devices make the same branches |
//! | `verify` | every kind of damage to a branch is named; a good one passes |
//! | `foreign` | checkpoints written by other tools mean the same |
//! | `fuzz_findings` | inputs that fuzzers found something with |
//! | `golden` | our packing against bytes that other code made |
//! | `kernel` | every linear of a branch through the matmul that runs it; every fault in one shows |
//! | `models` | our forward pass against logits that transformers computed |
//! | `evaluation` | what `eval` keeps and takes again: predictions, `eval.json`; windows that overlap |
//! | `reports` | the comparison of runs and other checkpoints, in all its forms; the page in a browser |
//! | `gate` | its verdicts, forms and exit codes; ten ways to make a model worse, each seen; what must not fail |
//! | `gguf` | branches as GGUF files; GGUF files of all kinds read, damaged and broken |
//! | `generate` | text from the demo model and its branches |
//! | `help` | what `--help` says, of the program and of every command |
//! | `reference` | figures of a real model as transformers computes them (needs `GPTQ_TEST_DATA`) |
//! | `card` | the model card: what is on it, and what is not claimed |
//! | `hub_fetch` | models and datasets from a Hub on loopback, with every fault of a network and a server |
//! | `hub_cache` | the cache of what comes from it |
//! | `hub_datasets` | datasets from that Hub |
//! | `publish_hub` | branches to a Hub on loopback with every fault, and the whole way from a Hub to a Hub |
//! | `publish_git` | branches to a git remote with git-lfs, and cloned from there |
//! | `cuda_kernels` | the CUDA kernels, run on this machine by `tests/cuda_host`, against plain definitions |
//! | `cuda_machine_code` | the same kernels through `ptxas` for every generation: registers, no spills (needs `ptxas`) |
//! | `build_script` | which versions of libtorch a build takes (needs `rustc`) |
//! | `gpu_check` | `scripts/gpu-check` on made-up programs: order, lines, JSON, the README's section |
//! | `documentation` | the tests that it names exist |
//! | `layering` | the rules of the source tree: layers, printing, plain Rust, file length, unsafe code |
//!
//! `hub_server` is that Hub. `helpers` runs the program in a folder of its own, mostly on a `tiny_model`;
//! `safetensors_file` reads and writes files without the library's own reader; `rounded` makes a quantized model without
//! calibration; `source` reads Rust source text.

mod accuracy;
mod bad_input;
mod bad_settings;
mod build_script;
mod card;
mod chat;
mod cuda_device;
mod cuda_driver;
#[path = "../cuda_host/mod.rs"]
mod cuda_host;
mod cuda_kernels;
mod cuda_machine_code;
mod documentation;
mod evaluation;
mod foreign;
mod fuzz_findings;
mod gate;
mod generate;
mod gguf;
mod gguf_variants;
mod golden;
mod gpu_check;
mod help;
mod helpers;
mod hub_cache;
mod hub_datasets;
mod hub_fetch;
mod hub_server;
mod kernel;
mod killed;
mod layering;
mod models;
mod output;
mod publish_git;
mod publish_hub;
mod quantize;
mod reference;
mod reports;
mod resources;
mod resume;
mod rounded;
mod safetensors_file;
mod source;
mod tiny_model;
mod variants;
mod verify;
