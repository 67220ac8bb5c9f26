//! Our packing against bytes made by GPTQModel's own packer; `tests/golden/README.md` says how.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use gptq::{
    checkpoint::CheckpointFormat,
    gptq::QuantizedLinear,
    kernels,
    pack::{PackedLinear, PackedView, pack_columns},
    variant::Bits,
};
use half::f16;
use safetensors::SafeTensors;

use crate::{
    helpers::repository,
    safetensors_file::{self, Tensors},
};

/// One golden linear.
struct Golden {
    name: String,
    bits: Bits,
    tensors: Tensors,
    codes: Vec<u8>,
    zeros: Vec<u8>,
    scales: Vec<f16>,
    g_idx: Vec<i32>,
}

impl Golden {
    fn read(path: &Path) -> Self {
        let tensors = safetensors_file::read(path);
        let scales = tensors["scales"].halves();
        Self {
            name: path.file_stem().unwrap().to_str().unwrap().to_owned(),
            bits: Bits::new(metadata(path)["bits"].parse().unwrap()).unwrap(),
            codes: tensors["codes"].bytes.clone(),
            zeros: tensors["zeros"].bytes.clone(),
            scales,
            g_idx: tensors["g_idx"].words(),
            tensors,
        }
    }

    fn words(&self, name: &str) -> Vec<i32> {
        self.tensors[name].words()
    }

    fn out_features(&self) -> usize {
        self.tensors["codes"].shape[1]
    }

    /// As a solver would have chosen it.
    fn linear(&self) -> QuantizedLinear {
        let g_idx = self.g_idx.iter().map(|&g| g as u32).collect();
        QuantizedLinear::new(self.bits, self.codes.clone(), self.scales.clone(), self.zeros.clone(), g_idx)
    }
}

fn metadata(path: &Path) -> HashMap<String, String> {
    let bytes = fs::read(path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    metadata.metadata().clone().expect("golden files say what they are")
}

fn all() -> Vec<Golden> {
    let folder = repository().join("tests/golden");
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    // Five cases for each of four widths, and one with negative scales.
    assert_eq!(files.len(), 21);
    files.iter().map(|path| Golden::read(path)).collect()
}

#[test]
fn packs_to_the_very_same_words() {
    for golden in all() {
        let packed = PackedLinear::new(&golden.linear());
        let view = packed.view();
        assert_eq!(view.qweight(), golden.words("qweight"), "{}", golden.name);
        assert_eq!(view.qzeros(), golden.words("qzeros_v1"), "{}", golden.name);
        assert_eq!(view.scales(), golden.scales, "{}", golden.name);
        assert_eq!(view.g_idx(), golden.g_idx, "{}", golden.name);
        // The tensors as they go into a file.
        let bytes = |name: &str| golden.tensors[name].bytes.as_slice();
        let expected =
            [("qweight", "qweight"), ("qzeros", "qzeros_v1"), ("scales", "scales"), ("g_idx", "g_idx")];
        assert_eq!(packed.tensors(), expected.map(|(ours, theirs)| (ours, bytes(theirs))), "{}", golden.name);
        let v2 = pack_columns(&golden.zeros, golden.out_features(), golden.bits);
        assert_eq!(v2, golden.words("qzeros_v2"), "{}", golden.name);
    }
}

#[test]
fn unpacks_and_dequantizes_their_words_in_both_formats() {
    for golden in all() {
        for (format, zeros) in
            [(CheckpointFormat::Gptq, "qzeros_v1"), (CheckpointFormat::GptqV2, "qzeros_v2")]
        {
            let (qweight, qzeros) = (golden.words("qweight"), golden.words(zeros));
            let (scales, g_idx, n) = (&golden.scales, &golden.g_idx, golden.out_features());
            let view = PackedView::new(golden.bits, n, &qweight, &qzeros, scales, g_idx, format).unwrap();
            assert_eq!(view.unpack_codes(), golden.codes, "{}", golden.name);
            let stored: Vec<u8> = golden.zeros.iter().map(|z| z - format.zero_offset()).collect();
            assert_eq!(view.unpack_stored_zeros(), stored, "{}", golden.name);
            let mut dense = vec![f32::NAN; golden.codes.len()];
            kernels::dequantize_into(&view, &mut dense);
            assert_eq!(dense, golden.tensors["dequantized"].singles(), "{} {format:?}", golden.name);
        }
    }
}

#[test]
fn a_solved_linear_is_the_same_weight_before_packing() {
    for golden in all() {
        assert_eq!(
            golden.linear().dequantize(|w| w),
            golden.tensors["dequantized"].singles(),
            "{}",
            golden.name
        );
    }
}
