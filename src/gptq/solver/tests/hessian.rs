//! Hessians on a CUDA device, against fp64.

use tch::{Device, Kind, Tensor};

use super::problem::{CODES_THAT_MAY_DIFFER, OBJECTIVE_TOLERANCE, Problem, cuda};
use crate::gptq::{Hessian, fault};

/// Largest error of an element, relative to `√(H_ii H_jj)`: what fp32 sums of a few thousand tokens may have.
const TOLERANCE: f64 = 1e-5;

/// `[tokens, k]`, correlated and of very different size, rounded to `kind`.
fn inputs(tokens: i64, k: i64, kind: Kind) -> Tensor {
    tch::manual_seed(9);
    let options = (Kind::Float, Device::Cpu);
    let mix = Tensor::randn([k, k], options) * 0.3 + Tensor::eye(k, options);
    let sizes = (Tensor::randn([k], options) * 0.7).exp();
    (Tensor::randn([tokens, k], options).matmul(&mix) * sizes).to_kind(kind)
}

fn accumulated(batches: &[Tensor], device: Device) -> Hessian {
    let mut hessian = Hessian::new(batches[0].size()[1] as usize, device).unwrap();
    for batch in batches {
        hessian.add(&batch.to_device(device)).unwrap();
    }
    assert_eq!(hessian.warning(), None);
    hessian.finish("test").unwrap()
}

/// One block and several, of each kind that forward passes run in; in two batches of different length.
#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_hessians_are_fp64s() {
    for (k, kind) in [200, 2048, 4100]
        .into_iter()
        .flat_map(|k| [Kind::Half, Kind::BFloat16, Kind::Float].map(|kind| (k, kind)))
    {
        let x = inputs(3000, k, kind);
        let found = accumulated(&[x.narrow(0, 0, 2000), x.narrow(0, 2000, 1000)], cuda());
        let wide = x.to_device(cuda()).to_kind(Kind::Double);
        let exact = wide.tr().mm(&wide) / 3000.0;
        let sizes = exact.diagonal(0, 0, 1).sqrt();
        let error = (found.matrix() - &exact).abs() / sizes.unsqueeze(1) / sizes;
        let error = f64::try_from(error.max()).unwrap();
        assert!(error < TOLERANCE, "{k} {kind:?}: {error}");
    }
}

/// The codes for a Hessian from tensor cores are as good as those for one summed in fp64.
#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_hessians_leave_codes_unharmed() {
    let (n, k, tokens) = (64, 512, 4096);
    for kind in [Kind::Half, Kind::BFloat16] {
        let x = inputs(tokens, k, kind);
        let found = accumulated(&[x.narrow(0, 0, 2048), x.narrow(0, 2048, 2048)], cuda());
        let wide = x.to_kind(Kind::Double);
        let mut exact = Problem::with_inputs(n, k as usize, &x.to_kind(Kind::Float));
        exact.hessian.set_matrix((wide.tr().mm(&wide) / tokens as f64).to_kind(Kind::Float));
        let mut ours = exact.on(Device::Cpu);
        ours.hessian = found.on(Device::Cpu);
        for variant in ["4bit-128g", "4bit-32g-act", "2bit-32g-asym"].map(|text| text.parse().unwrap()) {
            let [ours, best] = [&ours, &exact].map(|p| p.fast(&variant, 0.01).linear);
            let different = ours.codes().iter().zip(best.codes()).filter(|(a, b)| a != b).count() as f64;
            let share = different / ours.codes().len() as f64;
            assert!(share <= CODES_THAT_MAY_DIFFER, "{variant} {kind:?}: {share}");
            let ratio = exact.objective(&ours) / exact.objective(&best);
            assert!(ratio < 1.0 + OBJECTIVE_TOLERANCE, "{variant} {kind:?}: {ratio}");
        }
    }
}

#[test]
#[ignore = "needs a CUDA device: scripts/gpu-check"]
fn cuda_device_output_energy_is_that_of_the_cpu() {
    let problem = Problem::new(300, 2200, 6000, 7);
    let on_cpu = problem.hessian.output_energy(&problem.weight).unwrap();
    let problem = problem.on(cuda());
    let ratio = problem.hessian.output_energy(&problem.weight).unwrap() / on_cpu;
    assert!((ratio - 1.0).abs() < 1e-3, "{ratio}");
}

/// A batch that the memory ended in is not added twice: its blocks go on where they ended.
#[test]
fn a_batch_can_be_added_again() {
    // Two blocks of rows.
    let x = inputs(64, 1300, Kind::Float);
    let expected = accumulated(&[x.shallow_clone(), x.shallow_clone()], Device::Cpu);
    for products in 0..4 {
        let mut hessian = Hessian::new(1300, Device::Cpu).unwrap();
        fault::after(products);
        for _ in 0..2 {
            if let Err(error) = hessian.add(&x) {
                assert!(error.is_out_of_device_memory(), "{error}");
                assert_eq!(hessian.is_between_batches(), products % 2 == 0);
                hessian.add(&x).unwrap();
            }
        }
        assert!(fault::has_failed() && hessian.tokens() == 128);
        assert!(hessian.finish("test").unwrap().matrix().equal(expected.matrix()), "{products}");
    }
}

/// The products that CUDA measures outputs by, with inputs of very different size and a dead one.
#[test]
fn energies_in_bf16_are_those_of_fp32() {
    let x = inputs(600, 96, Kind::Float);
    let _ = x.narrow(1, 7, 1).zero_();
    let hessian = accumulated(&[x], Device::Cpu);
    let weights = [200, 8].map(|n| Tensor::randn([n, 96], (Kind::Float, Device::Cpu)) * 0.02);
    let found = hessian.output_energies_in_bf16(&[&weights[0], &weights[1].to_kind(Kind::Half)]).unwrap();
    for (weight, found) in weights.iter().zip(found) {
        let exact = hessian.output_energy(weight).unwrap();
        assert!((found / exact - 1.0).abs() < 1e-3, "{found} {exact}");
    }
}
