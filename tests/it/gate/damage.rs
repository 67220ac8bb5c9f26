//! Ways to damage a packed branch such that it still loads and runs.

use std::path::Path;

use half::bf16;
use safetensors::Dtype;

use crate::{
    helpers::{DOWN, demo},
    rounded::rounded,
    safetensors_file::{self, Tensor, Tensors},
};

/// Input features a group, of the branch that is damaged.
const GROUP: usize = 32;
const SUFFIXES: [&str; 4] = ["qweight", "qzeros", "scales", "g_idx"];

/// Every linear's weights rounded to nearest.
pub(super) fn round_to_nearest(branch: &Path) {
    let source = safetensors_file::read_folder(&demo(""));
    safetensors_file::change(branch, |tensors| {
        let stems: Vec<String> =
            tensors.keys().filter_map(|n| n.strip_suffix(".qweight").map(str::to_owned)).collect();
        assert_eq!(stems.len(), 28);
        for stem in stems {
            for (suffix, tensor) in rounded(&source[&format!("{stem}.weight")], GROUP) {
                let old = tensors.insert(format!("{stem}.{suffix}"), tensor.clone()).unwrap();
                assert_eq!((old.dtype, old.shape), (tensor.dtype, tensor.shape));
            }
        }
    });
}

/// The zero points of one linear, one higher than they are.
pub(super) fn zeros_off_by_one(branch: &Path) {
    change(branch, DOWN, "qzeros", |zeros| {
        zeros.change_words(|words| words.iter_mut().for_each(|word| *word = word.wrapping_add(0x1111_1111)));
    });
}

/// One code in 1000 with its highest bit flipped.
pub(super) fn flipped_nibbles(branch: &Path) {
    let mut random = Random(7);
    every(branch, "qweight", |codes| {
        codes.change_words(|words| {
            for word in words {
                for code in 0..8 {
                    if random.below(1000) == 0 {
                        *word ^= (8_u32 << (4 * code)) as i32;
                    }
                }
            }
        });
    });
}

/// The groups of one linear's input features in another order.
pub(super) fn shuffled_groups(branch: &Path) {
    let mut random = Random(8);
    change(branch, DOWN, "g_idx", |groups| {
        groups.change_words(|words| {
            for last in (1..words.len()).rev() {
                words.swap(last, random.below(last + 1));
            }
        });
    });
}

/// Every scale rounded to bf16, and kept as fp16.
pub(super) fn coarse_scales(branch: &Path) {
    every(branch, "scales", |scales| {
        let rounded: Vec<f32> =
            scales.halves().into_iter().map(|s| bf16::from_f32(s.to_f32()).to_f32()).collect();
        *scales = Tensor::floats(Dtype::F16, &scales.shape, &rounded);
    });
}

/// A decoder layer that adds nothing to the hidden states: every code is the zero point.
pub(super) fn layer_without_effect(branch: &Path) {
    for linear in ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"] {
        change(branch, linear, "qzeros", |zeros| {
            assert!(zeros.words().iter().all(|&word| word == 0x7777_7777))
        });
        change(branch, linear, "qweight", |codes| {
            codes.change_words(|words| words.fill(0x8888_8888_u32 as i32))
        });
    }
}

/// Words that come from no text: tokens of the demo model's vocabulary, each as likely, as JSON lines.
pub(super) fn random_tokens() -> String {
    let tokenizer = crate::helpers::read_json(&demo("tokenizer.json"));
    let mut vocabulary: Vec<&String> = tokenizer["model"]["vocab"].as_object().unwrap().keys().collect();
    vocabulary.retain(|token| !token.starts_with('<'));
    vocabulary.sort();
    let mut random = Random(9);
    let mut document = || {
        let tokens: Vec<String> =
            (0..600).map(|_| vocabulary[random.below(vocabulary.len())].replace('▁', " ")).collect();
        format!("{}\n", serde_json::json!({ "text": tokens.concat() }))
    };
    (0..32).map(|_| document()).collect()
}

fn change(branch: &Path, linear: &str, suffix: &str, change: impl FnOnce(&mut Tensor)) {
    assert!(SUFFIXES.contains(&suffix));
    safetensors_file::change(branch, |tensors| {
        change(tensors.get_mut(&format!("{linear}.{suffix}")).unwrap())
    });
}

fn every(branch: &Path, suffix: &str, mut change: impl FnMut(&mut Tensor)) {
    assert!(SUFFIXES.contains(&suffix));
    let of = |tensors: &mut Tensors| {
        let wanted = format!(".{suffix}");
        tensors.iter_mut().filter(|(name, _)| name.ends_with(&wanted)).for_each(|(_, tensor)| change(tensor));
    };
    safetensors_file::change(branch, of);
}

/// Knuth's linear congruential generator, the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }
}
