//! Tuning the scales of a layer of a small model.

use std::path::Path;

use gptq::{
    checkpoint::{Checkpoint, LinearId, LinearKind},
    gptq::QuantizedLinear,
    model::{Llama, TunedLayer},
    variant::Bits,
};
use half::f16;
use tch::{Device, Kind, Tensor};

/// Tokens of a window.
const SEQ_LEN: usize = 32;

/// Scales that are off by a few percent come back when the layer is tuned for what it put out before.
#[test]
fn tuning_finds_scales_again() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models/biased");
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let config = checkpoint.config();
    let llama = Llama::new(&checkpoint, SEQ_LEN, Kind::Float, Device::Cpu).unwrap();
    let _guard = tch::no_grad_guard();
    tch::manual_seed(1);
    let mut biases = Vec::new();
    let linears: Vec<QuantizedLinear> = LinearKind::ALL
        .into_iter()
        .map(|kind| {
            let [n, k] = kind.shape(config);
            biases.push(llama.weight(LinearId { layer: 0, kind }, Kind::Float).unwrap().1);
            let codes =
                Vec::<u8>::try_from(Tensor::randint(16, [(k * n) as i64], (Kind::Uint8, Device::Cpu)));
            let scales = (0..k / 16 * n).map(|i| f16::from_f32(0.01 + 0.001 * (i % 7) as f32)).collect();
            let groups = (0..k as u32).map(|i| i / 16).collect();
            QuantizedLinear::new(Bits::Four, codes.unwrap(), scales, vec![8; k / 16 * n], groups)
        })
        .collect();
    let norms = llama.norms(0).unwrap();
    let tuned = |linears: &[QuantizedLinear]| {
        let linears: Vec<_> = linears.iter().zip(biases.iter().map(Option::as_ref)).collect();
        TunedLayer::new(&llama, &norms, &linears, 60).unwrap()
    };
    let hidden = Tensor::randn([4, SEQ_LEN as i64, config.hidden_size as i64], (Kind::Float, Device::Cpu));
    let target = tuned(&linears).forward(&hidden).unwrap();
    let off =
        |(i, scale): (usize, &f16)| f16::from_f32(scale.to_f32() * if i % 2 == 0 { 1.02 } else { 0.98 });
    let moved: Vec<QuantizedLinear> = linears
        .iter()
        .map(|linear| linear.clone().with_scales(linear.scales().iter().enumerate().map(off).collect()))
        .collect();
    let mut layer = tuned(&moved);
    let plain = |errors: &Tensor| Ok(errors.shallow_clone());
    let before = layer.loss([&hidden, &target], &plain).unwrap();
    for _ in 0..60 {
        layer.step([&hidden, &target], &plain).unwrap();
    }
    layer.round().unwrap();
    let after = layer.loss([&hidden, &target], &plain).unwrap();
    assert!(after < 0.2 * before, "{before:e} {after:e}");
    // What is rounded is what is given away.
    let given: Vec<QuantizedLinear> = moved
        .into_iter()
        .zip(layer.scales().unwrap())
        .map(|(linear, scales)| linear.with_scales(scales))
        .collect();
    let again = tuned(&given).loss([&hidden, &target], &plain).unwrap();
    assert!((again / after - 1.0).abs() < 1e-3, "{after:e} {again:e}");
}
