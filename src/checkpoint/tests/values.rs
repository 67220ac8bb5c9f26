use std::borrow::Cow;

use half::{bf16, f16};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::{
    super::{Checkpoint, Dtype},
    Given, assert_error, folder, given, small_config, weights_file,
};

fn f32_tensor(values: &[f32]) -> Given {
    given("t", Dtype::F32, &[values.len()], values.iter().flat_map(|v| v.to_le_bytes()).collect())
}

fn bf16_tensor(values: &[f32]) -> Given {
    let bytes = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
    given("t", Dtype::BF16, &[values.len()], bytes)
}

fn f16_tensor(values: &[f32]) -> Given {
    let bytes = values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
    given("t", Dtype::F16, &[values.len()], bytes)
}

fn open(tensors: &[Given]) -> (TempDir, Checkpoint) {
    let dir = folder(&small_config(), &[("model.safetensors", &weights_file(tensors))]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

fn load(tensor: Given, kind: Kind) -> crate::error::Result<Tensor> {
    let shape = tensor.shape.clone();
    let (_dir, checkpoint) = open(&[tensor]);
    checkpoint.load("t", &shape, kind, Device::Cpu)
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(tensor.to_kind(Kind::Float)).unwrap()
}

/// Everything from the smallest subnormal of fp16 to its largest number, ties between neighbours included.
fn varied() -> Vec<f32> {
    let mut values: Vec<f32> = (0..0x7C00).step_by(7).map(|bits| f16::from_bits(bits).to_f32()).collect();
    let ties: Vec<f32> = (1u16..0x7BFF)
        .step_by(97)
        .map(|b| (f16::from_bits(b).to_f32() + f16::from_bits(b + 1).to_f32()) / 2.0)
        .collect();
    values.extend(ties.iter().map(|v| -v));
    values.extend([65504.0, -65519.99, 1e-30, 0.0, -0.0]);
    values
}

#[test]
fn loads_each_dtype_as_each_kind() {
    let values = [0.5, -1.25, 3.0, 0.0];
    for tensor in [f16_tensor(&values), bf16_tensor(&values), f32_tensor(&values)] {
        for kind in [Kind::Half, Kind::BFloat16, Kind::Float, Kind::Double] {
            let loaded = load(tensor.clone(), kind).unwrap();
            assert_eq!((loaded.kind(), loaded.size()), (kind, vec![4]));
            assert_eq!(numbers(&loaded), values);
        }
    }
}

#[test]
fn a_loaded_tensor_outlives_its_checkpoint() {
    let (dir, checkpoint) = open(&[f16_tensor(&[1.0, 2.0])]);
    let loaded = checkpoint.load("t", &[2], Kind::Half, Device::Cpu).unwrap();
    drop((checkpoint, dir));
    assert_eq!(numbers(&loaded), [1.0, 2.0]);
}

#[test]
fn bytes_for_the_writer_are_what_libtorch_computes() {
    // bf16 rounds the largest numbers of fp16 up, out of its range.
    let small: Vec<f32> = varied().into_iter().filter(|v| v.abs() < 65000.0).collect();
    for tensor in [f32_tensor(&varied()), bf16_tensor(&small), f16_tensor(&varied())] {
        let dtype = tensor.dtype;
        let shape = tensor.shape.clone();
        let (_dir, checkpoint) = open(&[tensor]);
        let bytes = checkpoint.bytes_f16("t").unwrap();
        assert_eq!(matches!(bytes, Cow::Borrowed(_)), dtype == Dtype::F16);
        let loaded = checkpoint.load("t", &shape, Kind::Half, Device::Cpu).unwrap();
        let mut expected = vec![0; bytes.len()];
        loaded.view_dtype(Kind::Uint8).copy_data_u8(&mut expected, bytes.len());
        assert_eq!(bytes, expected, "{dtype}");
    }
}

#[test]
fn tensors_at_odd_addresses() {
    let mut tensors = vec![given("odd", Dtype::U8, &[1], vec![1])];
    for (name, tensor) in
        [("a", f32_tensor(&[1.5, -2.0])), ("b", f16_tensor(&[0.25])), ("c", bf16_tensor(&[4.0]))]
    {
        tensors.push(Given { name: name.into(), ..tensor });
    }
    // Whatever the header's length, one of eight paddings makes the data start odd.
    for padding in 0..8 {
        let mut file = weights_file(&tensors);
        let length = u64::from_le_bytes(*file.first_chunk().unwrap());
        file.splice(8 + length as usize..8 + length as usize, vec![b' '; padding]);
        file[..8].copy_from_slice(&(length + padding as u64).to_le_bytes());
        let dir = folder(&small_config(), &[("model.safetensors", &file)]);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        for (name, expected) in [("a", &[1.5, -2.0][..]), ("b", &[0.25]), ("c", &[4.0])] {
            let loaded = checkpoint.load(name, &[expected.len()], Kind::Float, Device::Cpu).unwrap();
            assert_eq!(numbers(&loaded), expected);
            assert_eq!(checkpoint.bytes_f16(name).unwrap().len(), 2 * expected.len());
        }
    }
}

#[test]
fn nan_and_infinity_are_counted() {
    let mut values = vec![1.0; 3_000_000];
    values[17] = f32::NAN;
    values[2_999_999] = f32::NEG_INFINITY;
    for tensor in [f16_tensor(&values), bf16_tensor(&values), f32_tensor(&values)] {
        for kind in [Kind::Half, Kind::Float] {
            let message = "tensor `t`: 2 of 3000000 values are NaN or infinite";
            assert_error(load(tensor.clone(), kind), "no folder".as_ref(), "NonFinite", message);
        }
    }
}

#[test]
fn numbers_beyond_fp16() {
    let message = "tensor `t`, element 1 (first of 2): value -70144 does not fit fp16 (largest 65504)";
    for tensor in [bf16_tensor(&[1.0, -70144.0, 1e30]), f32_tensor(&[1.0, -70144.0, 65520.0])] {
        assert_error(load(tensor.clone(), Kind::Half), "no folder".as_ref(), "Fp16Overflow", message);
        let (_dir, checkpoint) = open(std::slice::from_ref(&tensor));
        assert_error(checkpoint.bytes_f16("t"), "no folder".as_ref(), "Fp16Overflow", message);
        assert_eq!(load(tensor, Kind::Float).unwrap().size(), [3]);
    }
    let rounded = load(f32_tensor(&[65519.996]), Kind::Half).unwrap();
    assert_eq!(numbers(&rounded), [65504.0], "below half a step beyond the largest, fp16 rounds down");
}

#[test]
fn a_wrong_request_is_refused() {
    let (dir, checkpoint) = open(&[f16_tensor(&[1.0, 2.0]), given("i", Dtype::I32, &[1], vec![0; 4])]);
    let load = |name: &str, shape: &[usize]| checkpoint.load(name, shape, Kind::Half, Device::Cpu);
    assert_error(load("x", &[2]), dir.path(), "MissingTensor", "tensor `x` is missing from `DIR`");
    assert_error(
        load("t", &[1, 2]),
        dir.path(),
        "TensorShape",
        "tensor `t`: expected shape [1, 2], found [2]",
    );
    let message = "tensor `i`: expected dtype F16, BF16 or F32, found I32";
    assert_error(load("i", &[1]), dir.path(), "TensorDtype", message);
    assert_error(checkpoint.bytes_f16("i"), dir.path(), "TensorDtype", message);
}

#[test]
fn factors_are_those_of_the_last_axis() {
    let values = [0.5, -1.25, 3.0, 0.0, 2.0, 8.0];
    for tensor in [f16_tensor(&values), bf16_tensor(&values), f32_tensor(&values)] {
        let tensor = Given { shape: vec![2, 3], ..tensor };
        let (_dir, checkpoint) = open(&[tensor]);
        let scaled = checkpoint.scaled([("t".to_owned(), vec![2.0, 1.0, 0.25])].into()).unwrap();
        let expected = [1.0, -1.25, 0.75, 0.0, 2.0, 2.0];
        for kind in [Kind::Half, Kind::BFloat16, Kind::Float] {
            let loaded = scaled.load("t", &[2, 3], kind, Device::Cpu).unwrap();
            assert_eq!((loaded.kind(), numbers(&loaded.flatten(0, 1))), (kind, expected.to_vec()));
        }
        let bytes: Vec<u8> = expected.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
        assert_eq!(*scaled.bytes_f16("t").unwrap(), bytes);
        scaled.check_f16("t").unwrap();
        let beyond = checkpoint.scaled([("t".to_owned(), vec![1.0, 1.0, 1e5])].into()).unwrap();
        assert!(
            beyond.check_f16("t").is_err() && beyond.load("t", &[2, 3], Kind::Half, Device::Cpu).is_err()
        );
    }
}
