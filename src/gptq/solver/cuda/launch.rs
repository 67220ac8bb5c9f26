//! The kernels of `gptq_block.cu` as functions on tensors. All of them launch on the device's stream and return without
//! waiting.

use std::{fmt, ops::Range, sync::Arc, time::Instant};

use tch::{Cuda, Device, Kind, Tensor};

use super::{
    kernels::{Clock, Compiled, Kernels},
    panels::{LANES, Mode, Search},
};
use crate::{
    cuda::{Argument, Gpu, Grid},
    error::Result,
    variant::{Bits, Variant},
};

/// Threads of a block, `GPTQ_WARPS` of 32.
const THREADS: u32 = 256;

/// Launches kernels on tensors.
pub(super) struct Launcher {
    kernels: Box<dyn Kernels>,
    clock: Option<Arc<Clock>>,
}

impl fmt::Debug for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Launcher on {:?}", self.kernels.device())
    }
}

/// Arguments of the panel kernels, documented at `PanelArguments` in `gptq_block.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct PanelArguments {
    pub(super) factor: u64,
    pub(super) weights: u64,
    pub(super) residuals: u64,
    pub(super) differences: u64,
    pub(super) codes: u64,
    pub(super) scales: u64,
    pub(super) zeros: u64,
    pub(super) groups: u64,
    pub(super) rows: u64,
    pub(super) objective: u64,
    pub(super) distance: u64,
    pub(super) minima: u64,
    pub(super) maxima: u64,
    pub(super) factors: u64,
    pub(super) factor_stride: i64,
    pub(super) n: i32,
    pub(super) columns: i32,
    pub(super) group_size: i32,
    pub(super) bits: i32,
    pub(super) symmetric: i32,
    pub(super) flags: i32,
    pub(super) candidates: i32,
    pub(super) finalists: i32,
    pub(super) at_once: i32,
    pub(super) unused: i32,
}

const _: () = assert!(size_of::<PanelArguments>() == 160);

/// The tensors of one stack of weights. `N` output features, `K` input features in quantization order, `G` groups.
pub(super) struct Stacked {
    /// `Ũ` `[K, K]` fp32, row-major.
    pub(super) factor: Tensor,
    /// `[K, N]` fp32: weights, dead features zero; `D` in the columns of solved panels.
    pub(super) weights: Tensor,
    /// `[K, N]` bytes, in the features' own order.
    pub(super) codes: Tensor,
    /// `[G, N]` fp16.
    pub(super) scales: Tensor,
    /// `[G, N]` bytes.
    pub(super) zeros: Tensor,
    /// `[K]` int: the group of each position.
    pub(super) groups: Tensor,
    /// `[K]` int: the feature at each position.
    pub(super) columns: Tensor,
    /// `[N]` fp64, a running sum.
    pub(super) objective: Tensor,
    /// `[N]` fp64, a running sum.
    pub(super) distance: Tensor,
    /// `[candidates]` fp64: the factors of a search, `[0]` without one.
    pub(super) factors: Tensor,
    pub(super) group_size: usize,
    pub(super) variant: Variant,
}

/// Further arguments of [`Mode::Compensate`].
pub(super) struct Compensation<'a> {
    /// `[P, N]` fp32 out: `x`.
    pub(super) x: &'a Tensor,
    /// `[N]` fp32: the smallest of the group's compensated weights so far.
    pub(super) minima: &'a Tensor,
    /// `[N]` fp32: the largest of them.
    pub(super) maxima: &'a Tensor,
    pub(super) first: bool,
    pub(super) last: bool,
}

impl Launcher {
    /// Compiles the kernels for a device. `device` is where libtorch has the tensors.
    pub(super) fn new(gpu: Arc<Gpu>, device: Device, clock: Option<Arc<Clock>>) -> Result<Self> {
        Ok(Self { kernels: Box::new(Compiled::new(gpu, device)?), clock })
    }

    /// Launches kernels by other means.
    pub(super) fn with(kernels: Box<dyn Kernels>) -> Self {
        Self { kernels, clock: None }
    }

    pub(super) fn device(&self) -> Device {
        self.kernels.device()
    }

    pub(super) fn shared_memory(&self) -> usize {
        self.kernels.shared_memory()
    }

    /// Runs `work`, and measures it if there is a clock.
    pub(super) fn timed<T>(&self, part: &'static str, work: impl FnOnce() -> T) -> T {
        let Some(clock) = &self.clock else { return work() };
        self.wait();
        let begun = Instant::now();
        let done = work();
        self.wait();
        clock.add(part, begun.elapsed().as_secs_f64());
        done
    }

    fn wait(&self) {
        if let Device::Cuda(index) = self.device() {
            Cuda::synchronize(index as i64);
        }
    }

    /// Solves or compensates one panel: `columns` are positions in quantization order, `residuals` `[P, N]` fp32 are those
    /// from the columns before them, if there are any.
    pub(super) fn panel(
        &self,
        mode: Mode,
        columns: Range<usize>,
        stack: &Stacked,
        residuals: Option<&Tensor>,
        compensation: Option<&Compensation<'_>>,
    ) -> Result<()> {
        let (start, p) = (columns.start as i64, columns.len() as i64);
        let (k, n) = (stack.factor.size()[0], stack.weights.size()[1]);
        assert!(start + p <= k && (mode == Mode::Compensate) == compensation.is_some());
        let [g, _] = self.matrix(&stack.scales, Kind::Half, [-1, n]);
        self.matrix(&stack.factor, Kind::Float, [k, k]);
        self.matrix(&stack.weights, Kind::Float, [k, n]);
        self.matrix(&stack.codes, Kind::Uint8, [k, n]);
        self.matrix(&stack.zeros, Kind::Uint8, [g, n]);
        let row = |tensor: &Tensor| address(&tensor.narrow(0, start, p));
        let weights = row(&stack.weights);
        let mut arguments = PanelArguments {
            factor: address(&stack.factor.narrow(0, start, p).narrow(1, start, p)),
            weights,
            residuals: residuals.map_or(0, |r| self.matrix_address(r, Kind::Float, [p, n])),
            differences: weights,
            codes: address(&stack.codes),
            scales: address(&stack.scales),
            zeros: address(&stack.zeros),
            groups: self.vector(&stack.groups, Kind::Int, k) + 4 * start as u64,
            rows: self.vector(&stack.columns, Kind::Int, k) + 4 * start as u64,
            objective: self.vector(&stack.objective, Kind::Double, n),
            distance: self.vector(&stack.distance, Kind::Double, n),
            minima: 0,
            maxima: 0,
            factors: 0,
            factor_stride: k,
            n: n as i32,
            columns: p as i32,
            group_size: stack.group_size as i32,
            bits: stack.variant.bits.get() as i32,
            symmetric: i32::from(stack.variant.symmetric),
            flags: 0,
            candidates: 0,
            finalists: 0,
            at_once: 0,
            unused: 0,
        };
        if let Mode::Searched(Search { candidates, finalists, at_once }) = mode {
            arguments.factors = self.vector(&stack.factors, Kind::Double, candidates as i64);
            arguments.candidates = candidates as i32;
            arguments.finalists = finalists as i32;
            arguments.at_once = at_once as i32;
        }
        if let Some(c) = compensation {
            arguments.differences = self.matrix_address(c.x, Kind::Float, [p, n]);
            arguments.minima = self.vector(c.minima, Kind::Float, n);
            arguments.maxima = self.vector(c.maxima, Kind::Float, n);
            arguments.flags = i32::from(c.first) | i32::from(c.last) << 1;
        }
        let grid = Grid {
            blocks: ((n as usize).div_ceil(LANES), 1, 1),
            threads: (THREADS, 1),
            shared: mode.shared_memory(columns.len(), stack.group_size),
        };
        let arguments = [Argument::Struct(bytemuck::bytes_of(&arguments).to_vec())];
        // SAFETY: the kernel takes this struct; shapes were checked above, and group indices are below G as `g_idx` is.
        unsafe { self.kernels.launch(mode.kernel(), grid, &arguments) }
    }

    /// Fits scales and zeros to the original weights of a stack. `positions` `[K]` int: the position of each feature.
    pub(super) fn fit_static(&self, stack: &Stacked, positions: &Tensor) -> Result<()> {
        let [k, n] = self.matrix(&stack.weights, Kind::Float, [-1, -1]);
        let groups = (k as usize).div_ceil(stack.group_size);
        self.matrix(&stack.scales, Kind::Half, [groups as i64, n]);
        self.matrix(&stack.zeros, Kind::Uint8, [groups as i64, n]);
        let grid = Grid { blocks: ((n as usize).div_ceil(32), groups, 1), threads: (32, 8), shared: 0 };
        let arguments = [
            Argument::tensor(&stack.weights),
            Argument::Pointer(self.vector(positions, Kind::Int, k)),
            Argument::tensor(&stack.scales),
            Argument::tensor(&stack.zeros),
            Argument::Int(n as i32),
            Argument::Int(k as i32),
            Argument::Int(stack.group_size as i32),
            Argument::Int(stack.variant.bits.get() as i32),
            Argument::Int(i32::from(stack.variant.symmetric)),
        ];
        // SAFETY: these are the kernel's arguments; shapes were checked above.
        unsafe { self.kernels.launch("gptq_fit_static", grid, &arguments) }
    }

    /// As [`Launcher::fit_static`], with the best of the stack's candidates.
    pub(super) fn search_static(&self, stack: &Stacked, positions: &Tensor) -> Result<()> {
        let [k, n] = self.matrix(&stack.weights, Kind::Float, [-1, -1]);
        let groups = (k as usize).div_ceil(stack.group_size);
        let candidates = stack.factors.size()[0];
        assert!(candidates > 0);
        let arguments = [
            Argument::tensor(&stack.weights),
            Argument::Pointer(self.vector(positions, Kind::Int, k)),
            Argument::Pointer(self.matrix_address(&stack.factor, Kind::Float, [k, k])),
            Argument::Pointer(self.vector(&stack.factors, Kind::Double, candidates)),
            Argument::Pointer(self.matrix_address(&stack.scales, Kind::Half, [groups as i64, n])),
            Argument::Pointer(self.matrix_address(&stack.zeros, Kind::Uint8, [groups as i64, n])),
            Argument::Int(n as i32),
            Argument::Int(k as i32),
            Argument::Int(stack.group_size as i32),
            Argument::Int(stack.variant.bits.get() as i32),
            Argument::Int(i32::from(stack.variant.symmetric)),
            Argument::Int(candidates as i32),
        ];
        let grid = Grid { blocks: ((n as usize).div_ceil(32), groups, 1), threads: (32, 8), shared: 0 };
        // SAFETY: these are the kernel's arguments; shapes were checked above.
        unsafe { self.kernels.launch("gptq_search_static", grid, &arguments) }
    }

    /// What rounding to nearest would cost with independent errors, `Σ H_ii d_i²` `[G, N]` fp32. `members` `[K]` int: positions,
    /// sorted by group; `diagonal` `[K]` fp32: `H_ii` by position.
    pub(super) fn rounding_costs(
        &self,
        stack: &Stacked,
        members: &Tensor,
        diagonal: &Tensor,
        costs: &Tensor,
    ) -> Result<()> {
        let [k, n] = self.matrix(&stack.weights, Kind::Float, [-1, -1]);
        let groups = (k as usize).div_ceil(stack.group_size);
        let arguments = [
            Argument::tensor(&stack.weights),
            Argument::Pointer(self.vector(members, Kind::Int, k)),
            Argument::Pointer(self.vector(diagonal, Kind::Float, k)),
            Argument::Pointer(self.matrix_address(costs, Kind::Float, [groups as i64, n])),
            Argument::Int(n as i32),
            Argument::Int(k as i32),
            Argument::Int(stack.group_size as i32),
            Argument::Int(stack.variant.bits.get() as i32),
            Argument::Int(i32::from(stack.variant.symmetric)),
        ];
        let grid = Grid { blocks: ((n as usize).div_ceil(32), groups, 1), threads: (32, 8), shared: 0 };
        // SAFETY: these are the kernel's arguments; shapes were checked above, and `members` is a permutation.
        unsafe { self.kernels.launch("gptq_rounding_costs", grid, &arguments) }
    }

    /// Dense weights `[K, N]` fp32, fp16 or bf16 of codes `[K, N]`, and of scales and zeros `[G, N]`, whose rows need not be
    /// contiguous. `groups` `[K]` int, below `G`.
    pub(super) fn dequantize(
        &self,
        codes: &Tensor,
        scales: &Tensor,
        zeros: &Tensor,
        groups: &Tensor,
        dense: &Tensor,
    ) -> Result<()> {
        let [k, n] = self.matrix(dense, dense.kind(), [-1, -1]);
        let name = match dense.kind() {
            Kind::Float => "gptq_dequantize_f32",
            Kind::Half => "gptq_dequantize_f16",
            Kind::BFloat16 => "gptq_dequantize_bf16",
            kind => unreachable!("weights are floating-point numbers, not {kind:?}"),
        };
        let rows = |t: &Tensor, kind, count: i64| {
            assert_eq!((t.kind(), t.device(), t.size()), (kind, self.device(), vec![count, n]));
            assert_eq!(t.stride()[1], 1, "rows are contiguous");
            (Argument::tensor(t), t.stride()[0])
        };
        let g = scales.size()[0];
        let (codes, stride) = rows(codes, Kind::Uint8, k);
        let (scales, step_stride) = rows(scales, Kind::Half, g);
        let (zeros, stride_of_zeros) = rows(zeros, Kind::Uint8, g);
        assert_eq!(step_stride, stride_of_zeros, "scales and zeros come from one stack");
        let arguments = [
            codes,
            Argument::Long(stride),
            scales,
            zeros,
            Argument::Long(step_stride),
            Argument::Pointer(self.vector(groups, Kind::Int, k)),
            Argument::tensor(dense),
            Argument::Int(n as i32),
        ];
        let blocks = ((n as usize).div_ceil(THREADS as usize), k as usize, 1);
        // SAFETY: these are the kernel's arguments; shapes were checked above.
        unsafe { self.kernels.launch(name, Grid { blocks, threads: (THREADS, 1), shared: 0 }, &arguments) }
    }

    /// Packs codes `[K, N]`, whose rows need not be contiguous, into words `[K·b/32, N]` int.
    ///
    /// # Panics
    /// When `K` or `N` is no multiple of the pack factor; plans are checked for that before any work.
    pub(super) fn pack(&self, codes: &Tensor, words: &Tensor, bits: Bits) -> Result<()> {
        let (size, strides) = (codes.size(), codes.stride());
        let (k, n, stride) = (size[0], size[1], strides[0]);
        let period = bits.pack_factor() as i64;
        assert!(codes.kind() == Kind::Uint8 && strides[1] == 1 && codes.device() == self.device());
        assert!(k % period == 0 && n % 4 == 0 && stride % 4 == 0, "whole words");
        self.matrix(words, Kind::Int, [k * i64::from(bits.get()) / 32, n]);
        let (from, to) = (address(codes), address(words));
        assert!(from.is_multiple_of(4) && to.is_multiple_of(16));
        let blocks = ((n as usize).div_ceil(4 * THREADS as usize), (k / period) as usize, 1);
        let arguments = [
            Argument::Pointer(from),
            Argument::Long(stride),
            Argument::Pointer(to),
            Argument::Int(n as i32),
            Argument::Int(bits.get() as i32),
        ];
        // SAFETY: these are the kernel's arguments; shapes and alignments were checked above.
        unsafe {
            self.kernels.launch("gptq_pack", Grid { blocks, threads: (THREADS, 1), shared: 0 }, &arguments)
        }
    }

    /// `H + λI` `[K, K]` fp32 with rows and columns in the order of `columns` `[K]` int, and zeros above the diagonal. Zeros on
    /// the diagonal become `mean + λ`.
    pub(super) fn reorder_hessian(
        &self,
        hessian: &Tensor,
        columns: &Tensor,
        lower: &Tensor,
        mean: f64,
        lambda: f64,
    ) -> Result<()> {
        let [k, _] = self.matrix(lower, Kind::Float, [-1, -1]);
        self.matrix(lower, Kind::Float, [k, k]);
        let arguments = [
            Argument::Pointer(self.matrix_address(hessian, Kind::Float, [k, k])),
            Argument::Pointer(self.vector(columns, Kind::Int, k)),
            Argument::tensor(lower),
            Argument::Int(k as i32),
            Argument::Double(mean),
            Argument::Double(lambda),
        ];
        let grid = Grid { blocks: (k as usize, 1, 1), threads: (THREADS, 1), shared: 0 };
        // SAFETY: these are the kernel's arguments; shapes were checked above, and `columns` is a permutation.
        unsafe { self.kernels.launch("gptq_reorder_hessian", grid, &arguments) }
    }

    /// Copies a weight `[rows, K]` of fp32, fp16 or bf16 into columns `first..` of the stack `[K, N]` fp32. `positions` `[K]`
    /// int has each feature's row; features with a `dead` `[K]` that is not 0 become zero.
    pub(super) fn stack(
        &self,
        weight: &Tensor,
        positions: &Tensor,
        dead: &Tensor,
        stack: &Tensor,
        first: i64,
    ) -> Result<()> {
        let [k, n] = self.matrix(stack, Kind::Float, [-1, -1]);
        let name = match weight.kind() {
            Kind::Float => "gptq_stack_f32",
            Kind::Half => "gptq_stack_f16",
            Kind::BFloat16 => "gptq_stack_bf16",
            kind => unreachable!("weights are floating-point numbers, not {kind:?}"),
        };
        let [rows, _] = self.matrix(weight, weight.kind(), [-1, k]);
        assert!(first + rows <= n);
        let arguments = [
            Argument::tensor(weight),
            Argument::Pointer(self.vector(positions, Kind::Int, k)),
            Argument::Pointer(self.vector(dead, Kind::Uint8, k)),
            Argument::tensor(stack),
            Argument::Int(rows as i32),
            Argument::Int(k as i32),
            Argument::Int(n as i32),
            Argument::Int(first as i32),
        ];
        let blocks = ((k as usize).div_ceil(64), (rows as usize).div_ceil(32), 1);
        // SAFETY: these are the kernel's arguments; shapes were checked above, and `positions` is a permutation.
        unsafe { self.kernels.launch(name, Grid { blocks, threads: (32, 8), shared: 0 }, &arguments) }
    }

    /// Checks a contiguous matrix of this device and returns its size; an expected size of −1 matches any size.
    fn matrix(&self, tensor: &Tensor, kind: Kind, expected: [i64; 2]) -> [i64; 2] {
        let size = tensor.size();
        assert_eq!((tensor.kind(), tensor.device()), (kind, self.device()));
        assert!(tensor.is_contiguous() && size.len() == 2);
        assert!(size.iter().zip(expected).all(|(&found, e)| e == -1 || found == e), "{size:?} {expected:?}");
        [size[0], size[1]]
    }

    fn matrix_address(&self, tensor: &Tensor, kind: Kind, expected: [i64; 2]) -> u64 {
        self.matrix(tensor, kind, expected);
        address(tensor)
    }

    /// The address of a vector of this device.
    fn vector(&self, tensor: &Tensor, kind: Kind, len: i64) -> u64 {
        assert_eq!((tensor.kind(), tensor.device()), (kind, self.device()));
        assert!(tensor.is_contiguous() && tensor.size() == [len]);
        address(tensor)
    }
}

fn address(tensor: &Tensor) -> u64 {
    tensor.data_ptr() as u64
}
