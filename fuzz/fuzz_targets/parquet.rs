#![no_main]

#[path = "../bodies.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(
    // The parquet reader's own panics are caught where it is used; the fuzzer's hook would end at them all the same.
    init: std::panic::set_hook(Box::new(|_| ())),
    |data: &[u8]| bodies::parquet(data)
);
