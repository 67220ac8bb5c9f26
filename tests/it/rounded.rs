//! A real model rounded to nearest: quantized weights that need no calibration and are the same on every machine.

use std::{fs, path::Path};

use safetensors::Dtype;
use serde_json::json;

use crate::{
    helpers::{read_json, write_json},
    safetensors_file::{self, Tensor, Tensors},
};

/// Input features a group.
const GROUP: usize = 128;

/// Writes the fp16 checkpoint in `source` to `out` with its decoder linears rounded to nearest: 4 bits, symmetric, groups of
/// 128. `scripts/check-eval --golden` rounds in the same way.
pub(crate) fn write(source: &Path, out: &Path) {
    fs::create_dir(out).unwrap();
    fs::copy(source.join("tokenizer.json"), out.join("tokenizer.json")).unwrap();
    let mut config = read_json(&source.join("config.json"));
    config["quantization_config"] = json!({
        "bits": 4, "group_size": GROUP, "desc_act": false, "sym": true, "lm_head": false, "quant_method": "gptq",
        "checkpoint_format": "gptq", "pack_dtype": "int32",
    });
    write_json(&out.join("config.json"), &config);
    let mut tensors = Tensors::new();
    for (name, tensor) in safetensors_file::read_folder(source) {
        match name.strip_suffix(".weight") {
            Some(stem) if name.starts_with("model.layers.") && tensor.shape.len() == 2 => {
                let packed = rounded(&tensor, GROUP);
                tensors.extend(packed.map(|(suffix, tensor)| (format!("{stem}.{suffix}"), tensor)));
            }
            _ => drop(tensors.insert(name, tensor)),
        }
    }
    safetensors_file::write(&out.join("model.safetensors"), &tensors);
}

/// `[N, K]` as the format has it, in groups of `group`: codes packed along K, zero points along N and one less than they are.
pub(crate) fn rounded(weight: &Tensor, group: usize) -> [(&'static str, Tensor); 4] {
    let [n, k] = weight.shape[..] else { panic!("a matrix") };
    let (width, groups) = (group, k / group);
    let values: Vec<f64> = weight.halves().into_iter().map(f64::from).collect();
    let (mut scales, mut words) = (vec![0.0; groups * n], vec![0u32; k / 8 * n]);
    for (row, values) in values.chunks(k).enumerate() {
        for (group, values) in values.chunks(width).enumerate() {
            let largest = values.iter().fold(0.0, |a: f64, v| a.max(v.abs()));
            let scale = half::f16::from_f64(2.0 * largest / 15.0);
            scales[group * n + row] = scale.to_f32();
            for (i, value) in values.iter().enumerate() {
                let code = ((value / f64::from(scale)).round_ties_even() + 8.0).clamp(0.0, 15.0) as u32;
                let column = group * width + i;
                words[column / 8 * n + row] |= code << (4 * (column % 8));
            }
        }
    }
    let integers = |shape: [usize; 2], words: Vec<u32>| Tensor {
        dtype: Dtype::I32,
        shape: shape.into_iter().filter(|&size| size > 0).collect(),
        bytes: words.into_iter().flat_map(u32::to_le_bytes).collect(),
    };
    [
        ("qweight", integers([k / 8, n], words)),
        ("qzeros", integers([groups, n / 8], vec![0x7777_7777; groups * n / 8])),
        ("scales", Tensor::floats(Dtype::F16, &[groups, n], &scales)),
        ("g_idx", integers([k, 0], (0..k).map(|column| (column / width) as u32).collect())),
    ]
}
