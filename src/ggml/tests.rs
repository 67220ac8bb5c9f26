//! Block types against the decoders of two other projects, and the rounding of rows.

use candle_core::{
    Device,
    quantized::{GgmlDType, ggml_file::qtensor_from_ggml},
};
use proptest::prelude::*;

use super::*;

/// Those with codes.
fn coded() -> impl Iterator<Item = BlockType> {
    BlockType::ALL.into_iter().filter(|kind| kind.grid().is_some())
}

/// Made by `scripts/make-golden-ggml`.
const GOLDEN: &[u8] = include_bytes!("../../tests/golden/ggml/blocks.bin");

/// The blocks of each type, and their weights by the package `gguf`.
fn golden() -> Vec<(BlockType, &'static [u8], Vec<f32>)> {
    let mut rest = GOLDEN;
    let of_type = |kind: BlockType| {
        let (blocks, weights) = rest.split_at(3 * kind.block_bytes());
        let (weights, others) = weights.split_at(3 * kind.block_len() * 4);
        rest = others;
        (kind, blocks, weights.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())
    };
    let all = coded().map(of_type).collect();
    assert!(rest.is_empty());
    all
}

#[test]
fn blocks_are_decoded_as_by_the_package_gguf() {
    for (kind, bytes, expected) in golden() {
        let mut weights = vec![0.0; expected.len()];
        kind.decode(bytes, &mut weights);
        assert_eq!(weights, expected, "{kind}");
    }
}

#[test]
fn blocks_are_decoded_as_by_candle() {
    for (kind, bytes, _) in golden() {
        let Ok(dtype) = candle_dtype(kind) else { continue };
        assert_eq!((dtype.block_size(), dtype.type_size()), (kind.block_len(), kind.block_bytes()), "{kind}");
        let count = 3 * kind.block_len();
        // candle reads blocks where they lie; they begin with fp16 numbers.
        let aligned: Vec<u16> = bytes.as_chunks().0.iter().map(|&pair| u16::from_le_bytes(pair)).collect();
        let aligned = bytemuck::cast_slice(&aligned);
        let tensor = qtensor_from_ggml(dtype, aligned, vec![count], &Device::Cpu).unwrap();
        let expected = tensor.dequantize(&Device::Cpu).unwrap().to_vec1::<f32>().unwrap();
        let mut weights = vec![0.0; count];
        kind.decode(bytes, &mut weights);
        assert_eq!(weights, expected, "{kind}");
    }
}

/// candle has no `IQ4_NL`.
fn candle_dtype(kind: BlockType) -> Result<GgmlDType, ()> {
    Ok(match kind {
        BlockType::F32 => GgmlDType::F32,
        BlockType::F16 => GgmlDType::F16,
        BlockType::BF16 => GgmlDType::BF16,
        BlockType::Q4_0 => GgmlDType::Q4_0,
        BlockType::Q4_1 => GgmlDType::Q4_1,
        BlockType::Q5_0 => GgmlDType::Q5_0,
        BlockType::Q5_1 => GgmlDType::Q5_1,
        BlockType::Q8_0 => GgmlDType::Q8_0,
        BlockType::Q2_K => GgmlDType::Q2K,
        BlockType::Q3_K => GgmlDType::Q3K,
        BlockType::Q4_K => GgmlDType::Q4K,
        BlockType::Q5_K => GgmlDType::Q5K,
        BlockType::Q6_K => GgmlDType::Q6K,
        BlockType::IQ4_NL => return Err(()),
    })
}

#[test]
fn blocks_are_written_as_they_were_read() {
    for (kind, bytes, _) in golden() {
        for bytes in bytes.chunks(kind.block_bytes()) {
            let (mut block, mut written) = (Block::EMPTY, vec![0; bytes.len()]);
            block.read(kind, bytes);
            block.write(kind, &mut written);
            assert_eq!(written, bytes, "{kind}");
        }
    }
}

#[test]
fn sizes_are_those_of_ggml() {
    let bits = |kind: BlockType| kind.block_bytes() as f64 * 8.0 / kind.block_len() as f64;
    let found: Vec<f64> = BlockType::ALL.map(bits).into();
    let expected = [32.0, 16.0, 16.0, 4.5, 5.0, 5.5, 6.0, 8.5, 2.625, 3.4375, 4.5, 5.5, 6.5625, 4.5];
    assert_eq!(found, expected);
    assert_eq!(BlockType::Q4_K.bytes(512), Some(288));
    assert_eq!(BlockType::Q4_K.bytes(384), None);
    assert!(BlockType::ALL.iter().all(|&kind| BlockType::from_id(kind.id()) == Some(kind)));
    assert_eq!(BlockType::from_id(9), None);
}

#[test]
fn bits_groups_and_symmetry_follow_from_the_grid() {
    let found = BlockType::ALL.map(|kind| (kind.bits(), kind.group_len(), kind.is_symmetric()));
    let expected = [
        (32, 1, true),
        (16, 1, true),
        (16, 1, true),
        (4, 32, true),
        (4, 32, false),
        (5, 32, true),
        (5, 32, false),
        (8, 32, true),
        (2, 16, false),
        (3, 16, true),
        (4, 32, false),
        (5, 32, false),
        (6, 16, true),
        (4, 32, true),
    ];
    assert_eq!(found, expected);
}

/// The largest error of uniform levels is half a step. The scale of the range, of candidates with less squared error, and of integers
/// that stand for scales differ.
#[test]
fn rounded_weights_are_near() {
    let weights: Vec<f32> = (0..512u32).map(|i| ((i * 7919 % 1009) as f32 / 504.5 - 1.0) * 0.1).collect();
    for kind in coded() {
        let bytes = round_rows(kind, &weights, 256, None);
        let mut rounded = vec![0.0; weights.len()];
        kind.decode(&bytes, &mut rounded);
        let error = |rounded: &[f32]| -> f32 {
            rounded.iter().zip(&weights).map(|(q, w)| (q - w) * (q - w)).sum::<f32>() / weights.len() as f32
        };
        // Of evenly distributed weights the mean squared error of the nearest of evenly spaced levels is a twelfth of their distance's square.
        let levels = kind.grid().unwrap().levels.count() as f32;
        let even = (0.2 / levels) * (0.2 / levels) / 12.0;
        assert!(error(&rounded) < 1.3 * even, "{kind}: {} {even}", error(&rounded));
    }
}

#[test]
fn weights_of_zero_and_of_one_value_stay() {
    for kind in coded() {
        for value in [0.0f32, 0.5, -0.5] {
            let mut rounded = vec![1.0; 256];
            kind.decode(&round_rows(kind, &[value; 256], 256, None), &mut rounded);
            let largest = rounded.iter().fold(0.0f32, |most, q| most.max((q - value).abs()));
            // No factor of the search is 1, so that the scale misses by up to 1%.
            assert!(largest <= value.abs() * 1e-2, "{kind}: {value} became {}", rounded[0]);
        }
    }
}

#[test]
fn columns_that_cost_more_have_smaller_errors() {
    let weights: Vec<f32> = (0..256u32).map(|i| ((i * 7919 % 1009) as f32 / 504.5 - 1.0) * 0.1).collect();
    let costs: Vec<f32> = (0..256).map(|i| if i % 4 == 0 { 100.0 } else { 1.0 }).collect();
    for kind in [BlockType::Q2_K, BlockType::Q3_K, BlockType::Q4_0, BlockType::Q4_K] {
        let error = |costs| {
            let mut rounded = vec![0.0; 256];
            kind.decode(&round_rows(kind, &weights, 256, costs), &mut rounded);
            let errors = rounded.iter().zip(&weights).step_by(4).map(|(q, w)| (q - w) * (q - w));
            errors.sum::<f32>()
        };
        assert!(error(Some(&costs)) < 0.9 * error(None), "{kind}");
    }
}

proptest! {
    /// A stored step is stored as it is, and a block holds it.
    #[test]
    fn steps_are_stored_once(
        kind in prop::sample::select(coded().collect::<Vec<_>>()),
        scale in -0.1f64..0.1,
        offset in -0.5f64..0.5,
    ) {
        let grid = kind.grid().unwrap();
        let units = [0.0031, 0.0127].map(half::f16::from_f64);
        let stored = grid.stored(SubStep { scale, offset }, units);
        prop_assert_eq!(grid.stored(stored, units), stored);
        let mut block = Block { d: units[0], min: units[1], ..Block::EMPTY };
        block.set_step(&grid.scales, 0, stored);
        let (scale, offset) = block.steps(&grid.scales)[0];
        prop_assert_eq!(SubStep { scale: scale.into(), offset: offset.into() }, stored);
    }

    #[test]
    fn codes_are_nearest(kind in prop::sample::select(coded().collect::<Vec<_>>()), x in -150.0f64..300.0) {
        let levels = kind.grid().unwrap().levels;
        let distance = |code: u8| (f64::from(levels.level(code)) - x).abs();
        let codes = match &levels {
            Levels::Uniform { codes, .. } => codes.clone(),
            Levels::Table(levels) => 0..=levels.len() as u8 - 1,
        };
        let found = levels.code(x);
        prop_assert!(codes.contains(&found));
        prop_assert!(codes.into_iter().all(|code| distance(code) >= distance(found)));
    }
}

fn llama(layers: usize) -> MixModel {
    MixModel { layers, heads: 32, kv_heads: 32, experts: 0, tied: false, llama: true }
}

/// Those that llama.cpp gives Llama 2 7B.
#[test]
fn mixes_are_those_of_llama_cpp() {
    let model = llama(32);
    let of = |mix: Mix, name: &str| mix.type_of(name, 4096, &model).name();
    assert_eq!(of(Mix::Q4_K_M, "output.weight"), "Q6_K");
    assert_eq!(of(Mix::Q8_0, "output.weight"), "Q8_0");
    assert_eq!(of(Mix::Q4_K_M, "token_embd.weight"), "Q4_K");
    let more: Vec<usize> =
        (0..32).filter(|i| of(Mix::Q4_K_M, &format!("blk.{i}.ffn_down.weight")) == "Q6_K").collect();
    assert_eq!(more, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]);
    assert_eq!(of(Mix::Q5_K_M, "blk.6.attn_v.weight"), "Q6_K");
    assert_eq!(of(Mix::Q5_K_M, "blk.7.attn_v.weight"), "Q5_K");
    assert_eq!(of(Mix::Q3_K_M, "blk.1.attn_v.weight"), "Q5_K");
    assert_eq!(of(Mix::Q3_K_M, "blk.2.attn_v.weight"), "Q4_K");
    assert_eq!(of(Mix::Q3_K_M, "blk.1.ffn_down.weight"), "Q5_K");
    assert_eq!(of(Mix::Q3_K_M, "blk.9.attn_output.weight"), "Q4_K");
    assert_eq!(of(Mix::Q3_K_M, "blk.9.attn_q.weight"), "Q3_K");
    assert_eq!(of(Mix::Q2_K, "blk.9.attn_v.weight"), "Q3_K");
    assert_eq!(of(Mix::Q2_K, "blk.9.ffn_up.weight"), "Q2_K");
    assert_eq!(of(Mix::Q4_0, "blk.3.ffn_down.weight"), "Q4_1");
    assert_eq!(of(Mix::Q4_0, "blk.4.ffn_down.weight"), "Q4_0");
    assert_eq!(of(Mix::Q4_0, "blk.4.attn_norm.weight"), "F32");
    assert_eq!(of(Mix::Q4_0, "blk.4.ffn_gate_inp.weight"), "F32");
}

#[test]
fn mixes_depend_on_heads_experts_and_ties() {
    let of = |mix: Mix, model: &MixModel, name: &str| mix.type_of(name, 4096, model).name();
    let grouped = MixModel { kv_heads: 8, ..llama(32) };
    assert_eq!(of(Mix::Q2_K, &grouped, "blk.9.attn_v.weight"), "Q4_K");
    let large = MixModel { heads: 64, kv_heads: 8, ..llama(80) };
    assert_eq!(of(Mix::Q4_K_M, &large, "blk.11.attn_v.weight"), "Q5_K");
    assert_eq!(of(Mix::Q4_K_M, &MixModel { llama: false, ..large }, "blk.11.attn_v.weight"), "Q4_K");
    let experts = MixModel { experts: 8, ..grouped };
    assert_eq!(of(Mix::Q4_K_M, &experts, "blk.9.attn_k.weight"), "Q8_0");
    assert_eq!(of(Mix::Q4_K_M, &experts, "blk.9.attn_output.weight"), "Q5_K");
    assert_eq!(of(Mix::Q4_K_M, &experts, "blk.9.ffn_down_exps.weight"), "Q6_K");
    let tied = MixModel { tied: true, ..grouped };
    assert_eq!(of(Mix::Q4_0, &tied, "token_embd.weight"), "Q6_K");
}

#[test]
fn rows_that_are_not_whole_blocks_get_another_type() {
    let of = |mix: Mix, name: &str, columns| mix.type_of(name, columns, &llama(32)).name();
    let up = "blk.9.ffn_up.weight";
    let found = [Mix::Q2_K, Mix::Q3_K_M, Mix::Q4_K_M, Mix::Q5_K_M, Mix::Q6_K].map(|mix| of(mix, up, 576));
    assert_eq!(found, ["IQ4_NL", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0"]);
    assert_eq!(of(Mix::Q4_K_M, "output.weight", 576), "Q8_0");
    assert_eq!(of(Mix::Q4_0, "output.weight", 576), "Q8_0");
    assert_eq!(of(Mix::Q4_0, up, 40), "F16");
}

#[test]
fn mixes_print_what_they_parse() {
    for mix in Mix::ALL {
        assert_eq!(mix.to_string().parse::<Mix>().unwrap(), mix);
        assert_eq!(mix.name().parse::<Mix>().unwrap(), mix);
    }
    let error = "q4_k_s".parse::<Mix>().unwrap_err().to_string();
    assert!(error.contains("q4_k_m"), "{error}");
}
