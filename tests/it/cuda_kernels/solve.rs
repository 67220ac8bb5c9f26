//! How the panel kernels are launched: panels, what is between them, and where everything lies in memory.

use std::ops::Range;

use gptq::{accuracy::Scales, gptq::QuantizedLinear, variant::Variant};
use half::f16;

use super::{
    arguments,
    problem::{Problem, Solved},
};
use crate::cuda_host::{Launch, Library, Memory, Order};

const LANES: usize = 32;
const FIRST: i32 = 1;
const LAST: i32 = 2;

/// A way to solve; none but `panel` may show in a result.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How {
    pub(crate) warps: u32,
    /// The most columns of a panel.
    pub(crate) panel: usize,
    /// Floats between the end of a row of Ũ and the next one.
    pub(crate) pad: usize,
    /// Floats before the first one of Ũ, weights and residuals.
    pub(crate) shift: usize,
    pub(crate) order: Order,
    /// Scales to search for, and how many finalists are compared at the same time.
    pub(crate) search: Option<(Scales, usize)>,
}

impl Default for How {
    fn default() -> Self {
        Self { warps: 8, panel: 256, pad: 0, shift: 0, order: Order::Forward, search: None }
    }
}

/// `PanelArguments` of gptq_block.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct PanelArguments {
    factor: u64,
    weights: u64,
    residuals: u64,
    differences: u64,
    codes: u64,
    scales: u64,
    zeros: u64,
    groups: u64,
    rows: u64,
    objective: u64,
    distance: u64,
    minima: u64,
    maxima: u64,
    factors: u64,
    factor_stride: i64,
    n: i32,
    columns: i32,
    group_size: i32,
    bits: i32,
    symmetric: i32,
    flags: i32,
    candidates: i32,
    finalists: i32,
    at_once: i32,
    unused: i32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Fitted,
    Searched { candidates: usize, finalists: usize, at_once: usize },
    Given,
    Compensate(i32),
}

impl Mode {
    fn kernel(self) -> &'static str {
        match self {
            Self::Fitted => "gptq_solve_fitted",
            Self::Searched { .. } => "gptq_solve_searched",
            Self::Given => "gptq_solve_given",
            Self::Compensate(_) => "gptq_compensate",
        }
    }

    /// Dynamic shared memory, bytes.
    fn shared(self, columns: usize, group: usize) -> usize {
        let padded = columns.next_multiple_of(32);
        let fitted = match group {
            ..=32 => 0,
            _ if group.is_multiple_of(32) => 32 * padded.min(group),
            _ => 32 * padded.min((group + 31).next_multiple_of(32)),
        };
        let rows = group.min(columns).next_multiple_of(32);
        let (extra, search) = match self {
            Self::Given => (6144, 0),
            Self::Compensate(_) => (0, 0),
            Self::Fitted => (fitted, 0),
            Self::Searched { candidates, finalists, at_once } => {
                (fitted.max(32 * candidates).max(8 * at_once * rows), 32 * (rows + 2 + 2 * finalists) + 4)
            }
        };
        4 * (64 * padded + extra + 5376 + 3 * (padded + 32) + search)
    }
}

/// What the kernels work on.
struct Device<'a> {
    variant: &'a Variant,
    how: How,
    n: usize,
    k: usize,
    group: usize,
    /// `[K, K + pad]` behind `shift`, NaN below the diagonal and between the rows.
    factor: Vec<f32>,
    /// `[K, N]` behind `shift`: weights, and differences where panels are solved.
    weights: Vec<f32>,
    /// `[K, N]`, x of a wide group.
    changes: Vec<f32>,
    codes: Vec<u8>,
    scales: Vec<f16>,
    zeros: Vec<u8>,
    groups: Vec<i32>,
    rows: Vec<i32>,
    objective: Vec<f64>,
    distance: Vec<f64>,
    minima: Vec<f32>,
    maxima: Vec<f32>,
    /// Of the search.
    factors: Vec<f64>,
    library: std::sync::Arc<Library>,
}

/// Solves all panels of a problem by the kernels; what is between them is done here.
///
/// # Errors
/// What a kernel did wrong.
pub(crate) fn solve(problem: &Problem, variant: &Variant, how: How) -> Result<Solved, String> {
    let mut device = Device::new(problem, variant, how);
    if variant.scales_known_beforehand() {
        device.fit_static(&problem.order(variant))?;
    }
    let fitted = match how.search {
        Some((scales, at_once)) => {
            let candidates = device.factors.len();
            let finalists = scales.finalists().clamp(1, candidates);
            Mode::Searched { candidates, finalists, at_once: at_once.min(how.warps as usize) }
        }
        None => Mode::Fitted,
    };
    let mut start = 0;
    while start < device.k {
        let wide = !variant.scales_known_beforehand() && device.group > how.panel;
        if wide && start.is_multiple_of(device.group) {
            device.compensate(start..(start + device.group).min(device.k))?;
        }
        let end = match (variant.scales_known_beforehand(), wide) {
            (true, _) => start + how.panel,
            (_, true) => (start + how.panel).min((start / device.group + 1) * device.group),
            _ => start + how.panel / device.group * device.group,
        };
        let end = end.min(device.k);
        let mode = if wide || variant.scales_known_beforehand() { Mode::Given } else { fitted };
        let residuals = device.residuals(start, start..end);
        device.panel(mode, start..end, &residuals)?;
        start = end;
    }
    Ok(device.solved(problem))
}

impl<'a> Device<'a> {
    fn new(problem: &Problem, variant: &'a Variant, how: How) -> Self {
        let (n, k, order) = (problem.n, problem.k, problem.order(variant));
        let columns = order.columns();
        let (stride, u) = (k + how.pad, problem.factor(columns));
        let mut factor = vec![f32::NAN; how.shift + k * stride];
        for row in 0..k {
            for c in row..k {
                factor[how.shift + row * stride + c] = u[row * k + c] as f32;
            }
        }
        let mut weights = vec![f32::NAN; how.shift];
        weights.extend(problem.stack(columns));
        let steps = variant.group_size.groups(k) * n;
        Self {
            variant,
            how,
            n,
            k,
            group: variant.group_size.features(k),
            factor,
            weights,
            changes: vec![f32::NAN; k * n],
            codes: vec![0xff; k * n],
            scales: vec![f16::NAN; steps],
            zeros: vec![0; steps],
            groups: (0..k).map(|i| order.group_at(i, variant) as i32).collect(),
            rows: columns.iter().map(|&c| c as i32).collect(),
            objective: vec![0.0; n],
            distance: vec![0.0; n],
            minima: vec![f32::NAN; n],
            maxima: vec![f32::NAN; n],
            factors: how.search.map_or(Vec::new(), |(s, _)| s.factors(variant.bits, variant.symmetric)),
            library: Library::of("gptq_block", &[("GPTQ_WARPS", i64::from(how.warps))]),
        }
    }

    /// Σ over the first `solved` columns j of Ũ_jc d_j, for some columns c: `[columns, N]`.
    fn residuals(&self, solved: usize, columns: Range<usize>) -> Vec<f64> {
        self.products(&self.weights[self.how.shift..], 0..solved, columns)
    }

    fn products(&self, values: &[f32], from: Range<usize>, columns: Range<usize>) -> Vec<f64> {
        let (n, stride) = (self.n, self.k + self.how.pad);
        let mut sums = vec![0.0; columns.len() * n];
        for (sums, c) in sums.chunks_mut(n).zip(columns) {
            for j in from.clone() {
                let u = f64::from(self.factor[self.how.shift + j * stride + c]);
                sums.iter_mut().zip(&values[j * n..]).for_each(|(sum, &v)| *sum += u * f64::from(v));
            }
        }
        sums
    }

    /// x and the scale of a group that is wider than a panel.
    fn compensate(&mut self, group: Range<usize>) -> Result<(), String> {
        let mut at = group.start;
        while at < group.end {
            let end = (at + self.how.panel).min(group.end);
            let mut residuals = self.residuals(group.start, at..end);
            let inside = self.products(&self.changes, group.start..at, at..end);
            residuals.iter_mut().zip(inside).for_each(|(r, x)| *r -= x);
            let first = if at == group.start { FIRST } else { 0 };
            let last = if end == group.end { LAST } else { 0 };
            self.panel(Mode::Compensate(first | last), at..end, &residuals)?;
            at = end;
        }
        Ok(())
    }

    fn panel(&mut self, mode: Mode, columns: Range<usize>, residuals: &[f64]) -> Result<(), String> {
        let (start, p, n) = (columns.start, columns.len(), self.n);
        let (stride, shift) = (self.k + self.how.pad, self.how.shift);
        let mut shifted = vec![f32::NAN; shift];
        shifted.extend(residuals.iter().map(|&r| r as f32));
        let mut memory = Memory::default();
        let within = |values: u64, floats: usize| values + 4 * (shift + floats) as u64;
        let factor = within(memory.read(&self.factor), start * stride + start);
        let compensates = matches!(mode, Mode::Compensate(_));
        let (weights, differences) = if compensates {
            (memory.read(&self.weights), memory.write(&mut self.changes[start * n..]))
        } else {
            let weights = memory.write(&mut self.weights);
            (weights, within(weights, start * n))
        };
        let given = mode == Mode::Given;
        let (scales, zeros) = if given {
            (memory.read(&self.scales), memory.read(&self.zeros))
        } else {
            (memory.write(&mut self.scales), memory.write(&mut self.zeros))
        };
        let a = PanelArguments {
            factor,
            weights: within(weights, start * n),
            residuals: if start == 0 { 0 } else { within(memory.read(&shifted), 0) },
            differences,
            codes: if compensates { 0 } else { memory.write(&mut self.codes) },
            scales,
            zeros,
            groups: memory.read(&self.groups[start..start + p]),
            rows: if compensates { 0 } else { memory.read(&self.rows[start..start + p]) },
            objective: if compensates { 0 } else { memory.write(&mut self.objective) },
            distance: if compensates { 0 } else { memory.write(&mut self.distance) },
            minima: if compensates { memory.write(&mut self.minima) } else { 0 },
            maxima: if compensates { memory.write(&mut self.maxima) } else { 0 },
            factor_stride: stride as i64,
            n: n as i32,
            columns: p as i32,
            factors: memory.read(&self.factors),
            group_size: match mode {
                Mode::Fitted | Mode::Searched { .. } => self.group as i32,
                _ => 0,
            },
            bits: self.variant.bits.get() as i32,
            symmetric: self.variant.symmetric.into(),
            flags: if let Mode::Compensate(flags) = mode { flags } else { 0 },
            candidates: 0,
            finalists: 0,
            at_once: 0,
            unused: 0,
        };
        let a = match mode {
            Mode::Searched { candidates, finalists, at_once } => PanelArguments {
                candidates: candidates as i32,
                finalists: finalists as i32,
                at_once: at_once as i32,
                ..a
            },
            _ => a,
        };
        let launch = Launch {
            blocks: (n.div_ceil(LANES), 1, 1),
            threads: (32 * self.how.warps, 1),
            shared: mode.shared(p, self.group),
            resident: 2,
            order: self.how.order,
        };
        // SAFETY: one argument, of the kernel's type; `memory` has all that it points to.
        unsafe { self.library.launch(mode.kernel(), launch, &memory, &arguments![a]) }
    }

    fn fit_static(&mut self, order: &gptq::gptq::ColumnOrder) -> Result<(), String> {
        let mut positions = vec![0i32; self.k];
        order.columns().iter().zip(0..).for_each(|(&column, position)| positions[column as usize] = position);
        let launch = Launch {
            blocks: (self.n.div_ceil(32), self.k.div_ceil(self.group), 1),
            threads: (32, 8),
            shared: 0,
            resident: 2,
            order: self.how.order,
        };
        let mut memory = Memory::default();
        let (weights, positions) = (memory.read(&self.weights), memory.read(&positions));
        let (scales, zeros) = (memory.write(&mut self.scales), memory.write(&mut self.zeros));
        let (bits, symmetric) = (self.variant.bits.get() as i32, i32::from(self.variant.symmetric));
        let weights = weights + 4 * self.how.shift as u64;
        let (n, k, group) = (self.n as i32, self.k as i32, self.group as i32);
        if self.factors.is_empty() {
            let arguments = arguments![weights, positions, scales, zeros, n, k, group, bits, symmetric];
            // SAFETY: the arguments of the kernel; `memory` has all that they point to.
            return unsafe { self.library.launch("gptq_fit_static", launch, &memory, &arguments) };
        }
        // Rows of Ũ are K apart here.
        assert_eq!((self.how.pad, self.how.shift), (0, 0));
        let (factor, factors) = (memory.read(&self.factor), memory.read(&self.factors));
        let candidates = self.factors.len() as i32;
        let arguments = arguments![
            weights, positions, factor, factors, scales, zeros, n, k, group, bits, symmetric, candidates
        ];
        // SAFETY: the arguments of the kernel; `memory` has all that they point to.
        unsafe { self.library.launch("gptq_search_static", launch, &memory, &arguments) }
    }

    fn solved(self, problem: &Problem) -> Solved {
        let order = problem.order(self.variant);
        let g_idx = order.g_idx(self.variant);
        let linear = QuantizedLinear::new(self.variant.bits, self.codes, self.scales, self.zeros, g_idx);
        // What is left of the weights is D, rounded once from Ŵ and once from the difference.
        let dense = linear.dequantize(|w| w);
        let weights = problem.stack(order.columns());
        for (i, &column) in order.columns().iter().enumerate() {
            for row in 0..self.n {
                let difference = dense[column as usize * self.n + row] - weights[i * self.n + row];
                assert_eq!(
                    self.weights[self.how.shift + i * self.n + row],
                    difference,
                    "column {i}, row {row}"
                );
            }
        }
        Solved { linear, objective: self.objective, distance: self.distance }
    }
}
