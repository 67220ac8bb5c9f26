//! The host code of CUDA on a driver of the tests' own (`tests/cuda_host/driver.cpp`): launches, attributes, copies and fences.
//! Device memory is the host's, kernels are run by the host, and what the driver API forbids is an error. Libtorch's own CUDA
//! kernels are not there.

use std::sync::Arc;

use gptq::{
    cuda::{Argument, Copies, Gpu, Grid, HostPool, Source},
    gptq::{
        Hessian, QuantizedLinear,
        solver::{CudaSolver, Factorized, Solver, Weight},
    },
    kernels::{
        CudaMatmul, Workspace,
        cuda::plan::{Build, Limits, Product, WGMMA_VERIFIED},
        repack,
    },
    pack::PackedLinear,
    variant::Variant,
};
use tch::{Device, Kind, Tensor};

use crate::cuda_host::{
    Library,
    driver::{Alive, Driver, with_driver},
};

const HOPPER: usize = 227 << 10;

/// An H200.
fn gpu(driver: &Driver) -> Arc<Gpu> {
    driver.add_device("NVIDIA H200", (9, 0), 132, HOPPER);
    Gpu::numbered(0).unwrap_or_else(|error| panic!("{error}"))
}

fn hessian(k: i64) -> Hessian {
    let x = Tensor::randn([3 * k, k], (Kind::Float, Device::Cpu));
    let mut hessian = Hessian::new(k as usize, Device::Cpu).unwrap();
    hessian.add(&x).unwrap();
    hessian.finish("test").unwrap()
}

/// The codes and scales of a solve.
fn solve(factor: &dyn Factorized, weight: &Tensor, text: &str) -> QuantizedLinear {
    let variant: Variant = text.parse().unwrap();
    let weights = [Weight { name: "weight", values: weight }];
    let solutions = factor.solve(&weights, &variant).unwrap_or_else(|error| panic!("{text}: {error}"));
    solutions[0].linear.on_host().unwrap().into_owned()
}

/// The driver keeps the limit of dynamic shared memory per function, and two solvers on one device share functions: neither may
/// lower the other's.
#[test]
fn solvers_of_one_device_do_not_take_shared_memory_from_each_other_with_nvrtc() {
    with_driver(
        "cuda_driver::solvers_of_one_device_do_not_take_shared_memory_from_each_other_with_nvrtc",
        |driver| {
            let gpu = gpu(driver);
            driver.use_kernels(&Library::of("gptq_block", &[("GPTQ_WARPS", 8)]));
            tch::manual_seed(1);
            let (hessian, weight) = (hessian(256), Tensor::randn([40, 256], (Kind::Float, Device::Cpu)));
            let solver = || CudaSolver::on_gpu(Arc::clone(&gpu), Device::Cpu).unwrap();
            let factorize = |solver: &CudaSolver, text: &str| {
                let variant: Variant = text.parse().unwrap();
                solver.factorize(&hessian, variant.sorting(false), 0.01, "test").unwrap()
            };
            let (one, other) = (solver(), solver());
            let factors = [factorize(&one, "4bit-128g"), factorize(&other, "4bit-32g")];
            let first = solve(&*factors[0], &weight, "4bit-128g");
            solve(&*factors[1], &weight, "4bit-32g");
            // 104 KiB again, after another kernel object of the same function has had 88.
            assert_eq!(solve(&*factors[0], &weight, "4bit-128g"), first);
            assert!(driver.calls("launch gptq_solve_fitted") >= 3);
            // Once for each kernel that a solver loads, never for a launch.
            assert_eq!(driver.calls("cuFuncSetAttribute"), 2 * driver.calls("cuModuleLoadData") * 15);
            assert_eq!(driver.calls("cuModuleLoadData"), 1, "two solvers share a module");
        },
    );
}

/// Dynamic and static shared memory together: between the default limit and the device's a launch fits, beyond it names both.
#[test]
fn static_shared_memory_counts_with_nvrtc() {
    with_driver("cuda_driver::static_shared_memory_counts_with_nvrtc", |driver| {
        let gpu = gpu(driver);
        let text = "extern \"C\" __global__ void f(float* x) {\n\
                    __shared__ float own[512]; extern __shared__ float more[];\n\
                    own[threadIdx.x] = more[threadIdx.x] = x[0]; __syncthreads(); x[1] = own[1] + more[1]; }";
        let kernel = gpu.kernel(&Source { name: "f.cu", text }, &[], "f").unwrap();
        let x = Tensor::zeros([2], (Kind::Float, Device::Cpu));
        let launch = |shared| {
            let grid = Grid { blocks: (1, 1, 1), threads: (32, 1), shared };
            // SAFETY: the argument is the kernel's, and nothing runs.
            unsafe { gpu.launch(&kernel, grid, false, &[Argument::tensor(&x)]) }
        };
        // 48 KiB of dynamic memory are within the driver's default, but not with 2 KiB of static memory.
        for shared in [0, 47 << 10, 48 << 10, HOPPER - 2048] {
            launch(shared).unwrap_or_else(|error| panic!("{error}"));
            assert!(gpu.resident_blocks(&kernel, 32, shared).unwrap() >= 132, "{shared}");
        }
        let error = launch(HOPPER - 2047).unwrap_err().to_string();
        let expected = "230401 bytes of dynamic and 2048 of static shared memory are more than the 232448";
        assert!(error.contains(expected), "{error}");
        assert_eq!(driver.calls("launch f"), 4);
    });
}

#[test]
fn copies_are_fenced_however_they_end() {
    with_driver("cuda_driver::copies_are_fenced_however_they_end", |driver| {
        let gpu = gpu(driver);
        let copies = Copies::on(&gpu, Device::Cpu).unwrap();
        let device = Tensor::arange(6, (Kind::Float, Device::Cpu));
        let expected: Vec<u8> = (0..6).flat_map(|i| (i as f32).to_ne_bytes()).collect();

        // Nothing waits for a copy until its result is used.
        let host = copies.host_like(&device).unwrap();
        let download = copies.download(device.shallow_clone(), &host).unwrap();
        assert!(driver.pending() == 1 && !download.ended());
        assert_eq!(download.finish().unwrap(), expected);
        assert!(driver.pending() == 0 && download.ended());
        drop(download);

        let upload = copies.upload(&host).unwrap();
        assert_eq!(driver.pending(), 1);
        assert_eq!(upload.on_device().unwrap(), device);
        assert_eq!(driver.pending(), 0, "work on the device waits for the copy");

        // Dropped without a use: the memory on the device goes to other tensors, whose work must wait.
        drop(copies.upload(&host).unwrap());
        assert_eq!(driver.pending(), 0, "an upload is waited for when it is dropped");
        drop(copies.download(device.shallow_clone(), &host).unwrap());
        assert_eq!(driver.pending(), 0, "a download is waited for when it is dropped");

        // The memory on the host is given back before the copy has ended.
        let upload = copies.upload(&host).unwrap();
        drop(host);
        assert_eq!(driver.alive().page_locked, 1, "the copy keeps its source");
        drop(upload);
        drop(copies);
        assert_eq!(driver.alive(), Alive { events: 0, streams: 0, modules: 0, page_locked: 0 });
    });
}

#[test]
fn page_locked_memory_of_weights_is_reused() {
    with_driver("cuda_driver::page_locked_memory_of_weights_is_reused", |driver| {
        let _gpus = [gpu(driver), gpu(driver)];
        let pool = HostPool::for_libtorch(&[Device::Cuda(0), Device::Cuda(1)]).unwrap();
        let layer = |sizes: &[i64]| -> Vec<_> {
            sizes.iter().map(|&size| pool.empty(&[size, 4], Kind::Half).unwrap()).collect()
        };
        for _ in 0..5 {
            let tensors = layer(&[8, 8, 16]);
            assert_eq!(tensors[2].tensor().size(), [16, 4]);
        }
        assert_eq!(driver.calls("cuMemHostAlloc"), 3, "locked once");
        assert_eq!(driver.calls("cuStreamSynchronize"), 2 * 4 * 3, "each reuse waits for both devices");
        // Handles keep memory, and a layer of other sizes gives the old one back.
        let (kept, memory) = {
            let tensors = layer(&[8]);
            (tensors[0].tensor().shallow_clone(), tensors[0].memory())
        };
        drop(layer(&[24]));
        assert_eq!(driver.alive().page_locked, 2, "the handle's and the new one");
        assert_eq!(kept.size(), [8, 4]);
        drop((kept, memory));
        driver.limit_page_locked(0);
        let error = pool.empty(&[1 << 20], Kind::Half).unwrap_err();
        assert_eq!(
            error.to_string(),
            "CUDA could not lock 2097152 bytes of memory for copies: the system locks no more memory"
        );
        assert!(!error.is_out_of_device_memory(), "the device has nothing to free");
        assert!(error.is_out_of_page_locked_memory());
        drop(pool);
        assert_eq!(driver.alive().page_locked, 0);
    });
}

/// The driver serves threads of a device's context only, and a new thread has none.
#[test]
fn any_thread_may_use_the_device_with_nvrtc() {
    with_driver("cuda_driver::any_thread_may_use_the_device_with_nvrtc", |driver| {
        let gpu = gpu(driver);
        let text = "extern \"C\" __global__ void f(float* x) { x[0] = 1; }";
        let source = Source { name: "f.cu", text };
        let x = Tensor::zeros([64], (Kind::Half, Device::Cpu));
        let kernel = gpu.kernel(&source, &[], "f").unwrap_or_else(|error| panic!("{error}"));
        let argument = Argument::tensor(&x);
        let launch = || {
            let grid = Grid { blocks: (1, 1, 1), threads: (32, 1), shared: 0 };
            // SAFETY: the argument is the kernel's, and nothing runs.
            let launched = unsafe { gpu.launch(&kernel, grid, false, std::slice::from_ref(&argument)) };
            launched.unwrap_or_else(|error| panic!("{error}"));
        };
        launch();
        assert!(gpu.resident_blocks(&kernel, 32, 0).unwrap() > 0);
        gpu.matrix_16(&argument, (8, 8), (8, 8)).unwrap_or_else(|error| panic!("{error}"));
        let in_new_thread = |work: &(dyn Fn() + Sync)| {
            std::thread::scope(|scope| scope.spawn(work).join().expect("the driver serves the thread"));
        };
        in_new_thread(&launch);
        in_new_thread(&|| assert!(gpu.resident_blocks(&kernel, 32, 0).unwrap() > 0));
        in_new_thread(&|| drop(gpu.kernel(&source, &[], "f").unwrap_or_else(|error| panic!("{error}"))));
        assert_eq!(driver.calls("cuModuleLoadData"), 1, "the thread found the module");
        // A thread that has used another device since.
        driver.add_device("NVIDIA H200", (9, 0), 132, HOPPER);
        Gpu::numbered(1).unwrap().kernel(&source, &[], "f").unwrap_or_else(|error| panic!("{error}"));
        launch();
        assert_eq!(driver.calls("launch f"), 3);

        let copies = Copies::on(&gpu, Device::Cpu).unwrap();
        let host = copies.host_like(&x).unwrap();
        let copy = std::sync::Mutex::new(Some(copies.download(x.shallow_clone(), &host).unwrap()));
        in_new_thread(&|| {
            let copy = copy.lock().unwrap().take().unwrap();
            assert!(!copy.ended());
            copy.finish().unwrap_or_else(|error| panic!("{error}"));
            assert!(copy.ended());
        });
    });
}

/// The product with packed weights through the driver: the arguments are those of the kernels, cooperative grids are resident.
#[test]
fn packed_products_are_launched_as_the_driver_takes_them_with_nvrtc() {
    with_driver("cuda_driver::packed_products_are_launched_as_the_driver_takes_them_with_nvrtc", |driver| {
        let gpu = gpu(driver);
        tch::manual_seed(2);
        let (hessian, weight) = (hessian(128), Tensor::randn([64, 128], (Kind::Float, Device::Cpu)));
        let variant: Variant = "4bit-64g-act".parse().unwrap();
        let factor = gptq::gptq::solver::CpuSolver::new()
            .factorize(&hessian, variant.sorting(false), 0.01, "test")
            .unwrap();
        let linear = solve(&*factor, &weight, "4bit-64g-act");
        let packed = PackedLinear::new(&linear);
        let repacked = repack(&packed.view()).unwrap();
        let limits = Limits { multiprocessors: 132, shared_memory: HOPPER, wgmma: true };
        let build = Build::new(&repacked, false, limits).unwrap();
        for product in [Product::Few(8), Product::Wgmma] {
            driver.use_kernels(&Library::of("int4_matmul", &build.macros(product)));
        }
        let workspace = Workspace::on(gpu, Device::Cpu, WGMMA_VERIFIED).unwrap();
        let product = CudaMatmul::new(&repacked, Kind::Half, &workspace).unwrap();
        let dense = Tensor::from_slice(&linear.dequantize(|w| w)).reshape([128, 64]);
        for tokens in [1, 9, 70] {
            let x = Tensor::randn([tokens, 128], (Kind::Float, Device::Cpu)).to_kind(Kind::Half);
            let y = product.forward(&x).unwrap().to_kind(Kind::Float);
            let error = (y - x.to_kind(Kind::Float).mm(&dense)).abs().max().double_value(&[]);
            assert!(error < 0.05, "{tokens} tokens: off by {error}");
        }
        assert_eq!(
            (driver.calls("launch int4_matmul_few_8"), driver.calls("launch int4_matmul_few_16")),
            (1, 1)
        );
        assert!(driver.calls("launch int4_gather") >= 1);

        // Wgmma only where it is asked for, and then for many tokens.
        let x = Tensor::randn([300, 128], (Kind::Float, Device::Cpu)).to_kind(Kind::Half);
        let y = product.forward(&x).unwrap();
        assert_eq!(driver.calls("launch int4_matmul_wgmma_256"), u64::from(WGMMA_VERIFIED));
        // One multiprocessor: what is sooner done there is so with 2048 tokens on a whole device.
        driver.add_device("NVIDIA H200", (9, 0), 1, HOPPER);
        let workspace = Workspace::on(Gpu::numbered(1).unwrap(), Device::Cpu, true).unwrap();
        let asked = CudaMatmul::new(&repacked, Kind::Half, &workspace).unwrap().forward(&x).unwrap();
        assert_eq!(driver.calls("launch int4_matmul_wgmma_256"), 1);
        assert_eq!(driver.calls("cuTensorMapEncodeTiled"), 1);
        let difference = (asked - y).to_kind(Kind::Float).abs().max().double_value(&[]);
        assert!(difference < 0.01, "off by {difference}");
    });
}
