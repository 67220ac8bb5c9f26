//! The CUDA kernels on a device, against fp64. `scripts/gpu-check` runs these; without a device they fail.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::{CudaMatmul, Workspace, layout::group_tiles, repack};
use crate::{
    cuda::Gpu,
    kernels::cpu::fixture::{Fixture, Order, Random, Spec},
};

/// Of sums in fp32, relative to Σ|w·x|: far more than their additions' roundings.
const SUMS: f64 = 1e-6;

fn workspace() -> Arc<Workspace> {
    workspace_with(false)
}

fn workspace_with(wgmma: bool) -> Arc<Workspace> {
    let device = crate::device::resolve("cuda").expect("a CUDA device").device;
    let gpu = Gpu::of(device).expect("a device that the driver opens");
    Workspace::on(gpu, device, wgmma).expect("a device that the kernels run on")
}

fn multiply(fixture: &Fixture, x: &Tensor, kind: Kind, workspace: &Arc<Workspace>) -> Vec<f64> {
    let repacked = repack(&fixture.view()).expect("a linear that the kernels take");
    let matmul = CudaMatmul::new(&repacked, kind, workspace).expect("it fits the device");
    let x = x.to_device(workspace.device());
    let y = matmul.forward(&x).expect("the device multiplies");
    assert_eq!(y.size(), [x.size()[0], fixture.out_features as i64]);
    let again = matmul.forward(&x).expect("the device multiplies");
    workspace.gpu().synchronize().expect("nothing went wrong");
    assert!(y.equal(&again), "the same bytes each time");
    Vec::try_from(y.to_device(Device::Cpu).to_kind(Kind::Double).flatten(0, 1)).expect("outputs")
}

/// Outputs of a linear with K input features that rounding does not explain.
fn wrong(y: &[f64], exact: &[(f64, f64)], tokens: usize, k: usize, kind: Kind) -> usize {
    let unit = if kind == Kind::Half { 2f64.powi(-11) } else { 2f64.powi(-8) };
    // With many tokens each weight is rounded: by 0.4 units on average and in random directions, so that 5 deviations of
    // their sum are 2/√K of all in one direction, and a little more for terms of unequal sizes.
    let weights = if tokens > 16 { unit * (2.5 / (k as f64).sqrt()).min(1.0) } else { 0.0 };
    let right = |(y, (exact, size)): (&f64, &(f64, f64))| {
        (y - exact).abs() <= unit * exact.abs() + (weights + SUMS) * size + 2f64.powi(-24)
    };
    y.iter().zip(exact).filter(|pair| !right(*pair)).count()
}

fn check(spec: Spec, kind: Kind, symmetric: bool, tokens: &[usize], workspace: &Arc<Workspace>) {
    let mut random = Random(spec.in_features as u64);
    let mut fixture = Fixture::random(spec, &mut random);
    if symmetric {
        fixture.zeros.fill((1 << (spec.bits - 1)) - spec.zero_offset);
        fixture.pack();
    }
    for &tokens in tokens {
        let x = Tensor::from_slice(&random.vector(tokens * spec.in_features)).to_kind(kind);
        let values = Vec::<f32>::try_from(x.to_kind(Kind::Float)).expect("numbers");
        let exact = fixture.multiply(&values);
        let x = x.view([tokens as i64, -1]);
        let what = format!("{spec:?} {kind:?}, symmetric {symmetric}, {tokens} tokens");
        assert_eq!(
            wrong(&multiply(&fixture, &x, kind, workspace), &exact, tokens, spec.in_features, kind),
            0,
            "{what}"
        );
        // The check can fail: the highest bit of one code, seen by every token.
        let mut faulty = fixture.clone();
        let at = faulty.codes.len() / 2;
        faulty.codes[at] ^= 1 << (spec.bits - 1);
        faulty.pack();
        let seen = wrong(&multiply(&faulty, &x, kind, workspace), &exact, tokens, spec.in_features, kind);
        assert!(seen * 2 > tokens, "{what}: a wrong code shows in {seen} outputs");
    }
}

const PLAIN: Spec = Spec {
    bits: 4,
    in_features: 320,
    out_features: 136,
    group_size: 64,
    order: Order::Sequential,
    zero_offset: 1,
};

const KINDS: [Kind; 2] = [Kind::Half, Kind::BFloat16];

/// Each pair of width, type, zero points and tiles of a group: a build takes seconds.
#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_all_widths_groups_and_orders() {
    let workspace = workspace();
    for (bits, kind) in [4, 8].into_iter().flat_map(|bits| KINDS.map(|kind| (bits, kind))) {
        for group_size in [16, 20, 32, 48, 64, 128, 160, 320] {
            let symmetric = (bits == 8) ^ (kind == Kind::BFloat16) ^ (group_tiles(group_size) == 2);
            for order in [Order::Sequential, Order::Act] {
                let spec = Spec { bits, group_size, order, ..PLAIN };
                check(spec, kind, symmetric, &[1, 7, 16, 67], &workspace);
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_any_number_of_tokens_and_features() {
    let workspace = workspace();
    let tokens = [1, 2, 8, 9, 15, 16, 17, 32, 33, 64, 65, 130, 261];
    for (out_features, in_features, group_size) in
        [(8, 8, 8), (24, 88, 32), (264, 200, 128), (1032, 72, 64), (136, 384, 32)]
    {
        for order in [Order::Sequential, Order::Act] {
            let spec = Spec { in_features, out_features, group_size, order, ..PLAIN };
            check(spec, Kind::Half, true, &tokens, &workspace);
        }
    }
    for (out_features, in_features, group_size) in [(4, 12, 12), (20, 100, 32), (140, 68, 16)] {
        let spec = Spec { bits: 8, in_features, out_features, group_size, order: Order::Act, ..PLAIN };
        check(spec, Kind::Half, false, &tokens, &workspace);
    }
}

/// A sample of tokens of a large product: fp64 on the CPU is slow.
fn check_sample(spec: Spec, kind: Kind, tokens: i64, workspace: &Arc<Workspace>) {
    let mut random = Random(5);
    let fixture = Fixture::random(spec, &mut random);
    let (k, n) = (spec.in_features as i64, spec.out_features);
    let x = Tensor::randn([tokens, k], (Kind::Float, Device::Cpu)).to_kind(kind);
    let rows: Vec<i64> = (0..tokens).step_by((tokens as usize).div_ceil(16)).chain([tokens - 1]).collect();
    let sample = x.index_select(0, &Tensor::from_slice(&rows)).to_kind(Kind::Float).flatten(0, 1);
    let exact = fixture.multiply(&Vec::<f32>::try_from(sample).expect("numbers"));
    let y = multiply(&fixture, &x, kind, workspace);
    let y: Vec<f64> = rows.iter().flat_map(|&r| y[r as usize * n..][..n].to_vec()).collect();
    let wrong = wrong(&y, &exact, tokens as usize, k as usize, kind);
    assert_eq!(wrong, 0, "{spec:?} {kind:?} {tokens} tokens");
}

/// Large enough for stream-K over the whole chip, and for blocks of 256 tokens.
#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_real_sizes() {
    let workspace = workspace();
    for (kind, order) in KINDS.into_iter().zip([Order::Sequential, Order::Act]) {
        let spec = Spec { in_features: 4096, out_features: 4096, group_size: 128, order, ..PLAIN };
        for tokens in [1, 16, 64, 2048] {
            check_sample(spec, kind, tokens, &workspace);
        }
    }
}

/// Enough tokens and features that the plan prefers wgmma on a device of 132 multiprocessors, with tails of all.
#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_wgmma() {
    let workspace = workspace_with(true);
    // Another compute capability than 9.0 has no such kernel.
    if !workspace.has_wgmma() {
        return;
    }
    for (bits, kind) in [4, 8].into_iter().zip(KINDS) {
        for (group_size, order) in [(32, Order::Act), (64, Order::Sequential), (128, Order::Act)] {
            let spec = Spec { bits, in_features: 328, out_features: 4104, group_size, order, ..PLAIN };
            check_sample(spec, kind, 2053, &workspace);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_inputs_that_do_not_fit_are_refused() {
    let workspace = workspace();
    let fixture = Fixture::random(PLAIN, &mut Random(1));
    let matmul = CudaMatmul::new(&repack(&fixture.view()).expect("it is taken"), Kind::Half, &workspace)
        .expect("it fits");
    let device = workspace.device();
    let zeros = |size: [i64; 2], kind, device| Tensor::zeros(size, (kind, device));
    for x in [
        zeros([2, 320], Kind::Float, device),
        zeros([2, 312], Kind::Half, device),
        zeros([2, 320], Kind::Half, Device::Cpu),
    ] {
        assert!(matmul.forward(&x).is_err());
    }
    assert_eq!(matmul.forward(&zeros([0, 320], Kind::Half, device)).expect("no tokens").size(), [0, 136]);
    // Not contiguous, and at an address that is no multiple of 16.
    let x = Tensor::randn([321, 4], (Kind::Half, device));
    let turned = x.narrow(0, 1, 320).tr();
    let shifted = Tensor::randn([4 * 320 + 1], (Kind::Half, device)).narrow(0, 1, 4 * 320).view([4, 320]);
    for x in [turned, shifted] {
        let plain = x.contiguous() + 0.0;
        assert!(matmul.forward(&x).expect("it is laid out").equal(&matmul.forward(&plain).expect("it is")));
    }
}
