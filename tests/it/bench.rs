//! `gptq bench`: what it writes, and what it says where there is no device.

use crate::helpers::{Lab, read_json, text_of};

#[test]
fn the_result_goes_to_a_file_too() {
    let lab = Lab::empty();
    let file = lab.path("bench.json");
    let out = text_of(&file);
    let printed =
        lab.run(&["bench", "pack", "--shape", "64,256", "--repeat", "1", "--json", "--out", &out]).json();
    assert_eq!(read_json(&file), printed);
    assert_eq!(printed[0]["what"], "packing");
    assert!(printed[0]["seconds"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let output = Lab::empty().run(&["bench", "solver", "--device", "cuda:99"]);
    assert_eq!((output.code, output.stdout.as_str()), (Some(2), ""));
    let start = "error: device `cuda:99` cannot be used: ";
    assert!(output.stderr.starts_with(start) && output.stderr.len() > start.len() + 1, "{}", output.stderr);
}
