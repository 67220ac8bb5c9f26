//! `y = x · Wᵀ` on a CUDA device with packed weights: the launches of `int4_matmul.cu`.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tch::{Device, Kind, Tensor};

use super::{
    INT4_MATMUL,
    layout::{CHUNK, ROW_MULTIPLE, THREADS},
    plan::{Build, Launch, Limits, Product, WGMMA_TOKENS, WGMMA_VERIFIED},
    repack::{Features, Repacked},
};
use crate::{
    cuda::{Argument, Gpu, Grid, Kernel},
    error::{Error, Result, TorchContext},
};

/// Blocks along y of `int4_gather` at most.
const MAX_BLOCKS_Y: usize = 65_535;
/// Alignment of addresses for the kernels' 16-byte loads, bytes.
const ALIGNMENT: usize = 16;

/// Compiled kernels and scratch memory that the products of one device share. They are launched on one stream, so that they
/// run one after another.
pub struct Workspace {
    gpu: Arc<Gpu>,
    device: Device,
    wgmma: bool,
    kernels: Mutex<HashMap<Build, Arc<Kernels>>>,
    scratch: Mutex<Scratch>,
}

struct Scratch {
    /// fp32 sums of blocks that share output features.
    partials: Tensor,
    /// Counts of arrived blocks, int32; zero between launches.
    counters: Tensor,
}

/// The kernels of one build, each with the number of its blocks that are resident on the device at the same time.
struct Kernels {
    products: HashMap<Product, (Kernel, usize)>,
    gather: Kernel,
}

/// A packed linear on a CUDA device.
pub struct CudaMatmul {
    workspace: Arc<Workspace>,
    kernels: Arc<Kernels>,
    build: Build,
    kind: Kind,
    /// As in [`Repacked`], bytes.
    weights: Tensor,
    params: Tensor,
    order: Order,
    in_features: usize,
    out_features: usize,
    positions: usize,
    columns: usize,
    group: usize,
}

/// [`Features`] on the device.
enum Order {
    InPlace,
    /// int32, for the kernels.
    Permuted(Tensor),
    /// int64, for libtorch.
    Spread(Tensor),
}

impl Workspace {
    /// For products on `device`.
    ///
    /// # Errors
    /// When the device is not a usable CUDA device.
    pub fn new(device: Device) -> Result<Arc<Self>> {
        Self::on(Gpu::of(device)?, device, WGMMA_VERIFIED)
    }

    /// As [`Workspace::new`], with the device that libtorch's tensors are on. It differs from `gpu` in tests, whose driver takes
    /// the CPU's memory for a device's. With `wgmma`, a device of compute capability 9.0 uses [`Product::Wgmma`].
    ///
    /// # Errors
    /// As [`Workspace::new`].
    pub fn on(gpu: Arc<Gpu>, device: Device, wgmma: bool) -> Result<Arc<Self>> {
        if gpu.capability < (8, 0) {
            return Err(Error::Device {
                device: format!("{device:?}"),
                problem: format!(
                    "{} has compute capability {}.{}, the int4 kernels need 8.0",
                    gpu.name, gpu.capability.0, gpu.capability.1
                ),
            });
        }
        let empty = |kind| Tensor::f_zeros([0], (kind, device)).torch("allocate scratch memory");
        let scratch = Mutex::new(Scratch { partials: empty(Kind::Float)?, counters: empty(Kind::Int)? });
        let wgmma = wgmma && gpu.capability == (9, 0);
        Ok(Arc::new(Self { gpu, device, wgmma, kernels: Mutex::default(), scratch }))
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// libtorch's name of the device.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Whether products with many tokens use [`Product::Wgmma`].
    pub fn has_wgmma(&self) -> bool {
        self.wgmma
    }

    fn limits(&self) -> Limits {
        Limits {
            multiprocessors: self.gpu.multiprocessors as usize,
            shared_memory: self.gpu.shared_memory,
            wgmma: self.wgmma,
        }
    }

    fn kernels(&self, build: Build) -> Result<Arc<Kernels>> {
        let mut kernels = lock(&self.kernels);
        if let Some(found) = kernels.get(&build) {
            return Ok(Arc::clone(found));
        }
        let load = |product, name| self.gpu.kernel(&INT4_MATMUL, &build.macros(product), name);
        let mut products = HashMap::new();
        for product in Product::ALL.into_iter().filter(|product| build.fits(*product, self.limits())) {
            let kernel = load(product, product.name())?;
            let shared = build.shared_bytes(product);
            let resident = self.gpu.resident_blocks(&kernel, product.threads() as u32, shared)?;
            if resident == 0 {
                return Err(Error::Cuda {
                    action: format!("run {} on {}", product.name(), self.gpu.name),
                    problem: format!("not even one block with {shared} bytes of shared memory fits"),
                });
            }
            products.insert(product, (kernel, resident));
        }
        let made = Arc::new(Kernels { products, gather: load(Product::Many(64), "int4_gather")? });
        kernels.insert(build, Arc::clone(&made));
        Ok(made)
    }

    /// Scratch memory with at least this many partial sums and counters.
    fn scratch(&self, partials: usize, counters: usize) -> Result<MutexGuard<'_, Scratch>> {
        let mut scratch = lock(&self.scratch);
        let grown = |size: usize, kind| {
            Tensor::f_zeros([size as i64], (kind, self.device)).torch("allocate scratch memory")
        };
        // Freed memory is reused only by later work on the stream.
        if scratch.partials.numel() < partials {
            scratch.partials = grown(partials, Kind::Float)?;
        }
        if scratch.counters.numel() < counters {
            scratch.counters = grown(counters, Kind::Int)?;
        }
        Ok(scratch)
    }
}

impl CudaMatmul {
    /// Copies a linear to the device, for activations of `kind`, fp16 or bf16.
    ///
    /// # Errors
    /// When `kind` is another kind, the kernels do not compile, or memory is exhausted.
    pub fn new(linear: &Repacked, kind: Kind, workspace: &Arc<Workspace>) -> Result<Self> {
        if !matches!(kind, Kind::Half | Kind::BFloat16) {
            return Err(Error::Value {
                what: "kind of activations of a packed linear on CUDA".into(),
                expected: "fp16 or bf16".into(),
                found: format!("{kind:?}"),
            });
        }
        let device = workspace.device;
        let build = Build::new(linear, kind == Kind::BFloat16, workspace.limits());
        let build = build.ok_or_else(|| Error::Device {
            device: workspace.gpu.name.clone(),
            problem: format!(
                "{} bytes of shared memory a block are too few for the int4 kernels",
                workspace.gpu.shared_memory
            ),
        })?;
        let upload = |bytes: &[u8], kind: Kind| {
            let count = (bytes.len() / kind.elt_size_in_bytes()) as i64;
            Tensor::f_from_data_size(bytes, &[count], kind)
                .and_then(|t| t.f_to_device(device))
                .torch("copy a packed linear to the device")
        };
        let order = match &linear.features {
            Features::InPlace => Order::InPlace,
            Features::Permuted(order) => Order::Permuted(upload(bytemuck::cast_slice(order), Kind::Int)?),
            Features::Spread(order) => {
                let order: Vec<i64> = order.iter().map(|&feature| i64::from(feature)).collect();
                Order::Spread(upload(bytemuck::cast_slice(&order), Kind::Int64)?)
            }
        };
        Ok(Self {
            kernels: workspace.kernels(build)?,
            workspace: Arc::clone(workspace),
            build,
            kind,
            weights: upload(bytemuck::cast_slice(&linear.weights), Kind::Uint8)?,
            params: upload(bytemuck::cast_slice(&linear.params), Kind::Uint8)?,
            order,
            in_features: linear.in_features,
            out_features: linear.out_features,
            positions: linear.positions,
            columns: linear.columns,
            group: linear.group,
        })
    }

    /// Kind of activations and outputs.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Bytes that a product with few tokens reads of this linear.
    pub fn bytes(&self) -> usize {
        self.weights.numel() + self.params.numel()
    }

    /// Multiplies: `x` `[M, K]` → `[M, N]`, both of this linear's kind, on its device.
    ///
    /// # Errors
    /// When `x` has another kind, device or shape, the device refuses a launch, or memory is exhausted.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let tokens = x.size().first().copied().unwrap_or_default();
        let output = [tokens, self.columns as i64];
        let y = Tensor::f_empty(output, (self.kind, self.workspace.device)).torch("allocate an output")?;
        self.multiply(x, &y)?;
        if self.columns == self.out_features {
            return Ok(y);
        }
        y.f_narrow(1, 0, self.out_features as i64).and_then(|y| y.f_contiguous()).torch("cut an output")
    }

    /// As [`CudaMatmul::forward`], into `y` `[M, N]`, with N padded to a multiple of 8. The old values of `y` are not read.
    ///
    /// # Errors
    /// As for [`CudaMatmul::forward`].
    pub fn multiply(&self, x: &Tensor, y: &Tensor) -> Result<()> {
        self.check(x, self.in_features, "input")?;
        self.check(y, self.columns, "output")?;
        assert!(y.is_contiguous(), "outputs are written row by row");
        let tokens = x.size()[0] as usize;
        if tokens == 0 {
            return Ok(());
        }
        let x = x.f_contiguous().torch("lay out an input")?;
        let x = match &self.order {
            // Positions without a feature read an additional column of zeros.
            Order::Spread(order) => x.f_constant_pad_nd([0, 1]).and_then(|x| x.f_index_select(1, order)),
            // A view into a larger tensor may begin anywhere.
            _ if !x.data_ptr().addr().is_multiple_of(ALIGNMENT) => x.f_alias_copy(),
            _ => Ok(x),
        };
        let x = x.torch("lay out an input")?;
        for launch in self.build.launches(tokens, self.columns, self.workspace.limits()) {
            self.launch(&launch, &x, y)?;
        }
        Ok(())
    }

    fn check(&self, tensor: &Tensor, features: usize, what: &str) -> Result<()> {
        let found = (tensor.kind(), tensor.device(), tensor.dim(), tensor.size().last().copied());
        if found == (self.kind, self.workspace.device, 2, Some(features as i64)) {
            return Ok(());
        }
        Err(Error::Value {
            what: format!("{what} of a packed linear on CUDA"),
            expected: format!("{:?} [M, {features}] on {:?}", self.kind, self.workspace.device),
            found: format!("{:?} {:?} on {:?}", tensor.kind(), tensor.size(), tensor.device()),
        })
    }

    /// Multiplies some tokens of x `[M, positions]`, or of x `[M, K]` if features are permuted.
    fn launch(&self, launch: &Launch, x: &Tensor, y: &Tensor) -> Result<()> {
        let (first, tokens) = launch.tokens;
        let row = |tensor: &Tensor, width: usize| {
            let bytes = first * width * self.kind.elt_size_in_bytes();
            Argument::Pointer(tensor.data_ptr().addr() as u64 + bytes as u64)
        };
        let (x_rows, y_rows) = (row(x, self.positions), row(y, self.columns));
        let sizes =
            [tokens, self.columns, self.positions, self.group].map(|size| Argument::Unsigned(size as u32));
        let (kernel, resident) = &self.kernels.products[&launch.product];
        let (blocks, blocks_y) = self.build.blocks(launch, self.columns, self.positions, *resident);
        let shared = self.build.shared_bytes(launch.product);
        let threads = (launch.product.threads() as u32, 1);
        let grid = Grid { blocks: (blocks, blocks_y, 1), threads, shared };
        let gathered = || {
            let size = [tokens as i64, self.positions as i64];
            Tensor::f_empty(size, (self.kind, self.workspace.device)).torch("allocate gathered activations")
        };
        let weights = [Argument::tensor(&self.weights), Argument::tensor(&self.params)];
        match launch.product {
            Product::Few(_) => {
                let (partials, counters) =
                    (self.build.partials(launch, blocks), self.build.counters(self.columns));
                let scratch = self.workspace.scratch(partials, counters)?;
                let (perm, gathered) = match &self.order {
                    Order::Permuted(perm) => (Argument::tensor(perm), Some(gathered()?)),
                    _ => (Argument::Pointer(0), None),
                };
                let target = gathered.as_ref().map_or(Argument::Pointer(0), Argument::tensor);
                let scratch = [Argument::tensor(&scratch.partials), Argument::tensor(&scratch.counters)];
                let arguments = weights.into_iter().chain([x_rows, perm, target, y_rows]);
                let arguments: Vec<Argument> = arguments.chain(scratch).chain(sizes).collect();
                // SAFETY: the arguments of `int4_matmul_few_*`. Weights, parameters and permutation are as `Repacked`
                // has them for these sizes, the activations were checked, scratch memory is as large as the plan says;
                // all of it is freed, if at all, to the allocator of the stream that this is launched on.
                unsafe { self.workspace.gpu.launch(kernel, grid, gathered.is_some(), &arguments) }
            }
            Product::Many(_) | Product::Wgmma => {
                let gathered = match &self.order {
                    Order::Permuted(perm) => Some(self.gather(x_rows.clone(), perm, gathered()?, tokens)?),
                    _ => None,
                };
                let x_rows = gathered.as_ref().map_or(x_rows, Argument::tensor);
                let x = match launch.product {
                    Product::Wgmma => {
                        let sides = (WGMMA_TOKENS as u32, CHUNK as u32);
                        self.workspace.gpu.matrix_16(&x_rows, (tokens, self.positions), sides)?
                    }
                    _ => x_rows,
                };
                let arguments: Vec<Argument> = weights.into_iter().chain([x, y_rows]).chain(sizes).collect();
                // SAFETY: the arguments of `int4_matmul_many_*` or `int4_matmul_wgmma_256`, with the same promises.
                unsafe { self.workspace.gpu.launch(kernel, grid, false, &arguments) }
            }
        }
    }

    /// x `[M, K]` in the order of the weights.
    fn gather(&self, x: Argument, perm: &Tensor, gathered: Tensor, tokens: usize) -> Result<Tensor> {
        let sizes = [tokens, self.positions].map(|size| Argument::Unsigned(size as u32));
        let blocks = (self.positions.div_ceil(THREADS * ROW_MULTIPLE), tokens.min(MAX_BLOCKS_Y), 1);
        let grid = Grid { blocks, threads: (THREADS as u32, 1), shared: 0 };
        let tensors = [x, Argument::tensor(perm), Argument::tensor(&gathered)];
        let arguments: Vec<Argument> = tensors.into_iter().chain(sizes).collect();
        // SAFETY: the arguments of `int4_gather`, with the promises of the products.
        unsafe { self.workspace.gpu.launch(&self.kernels.gather, grid, false, &arguments) }?;
        Ok(gathered)
    }
}

/// Locks a mutex. Its data stays valid if another thread panics, so that poisoning is ignored.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
