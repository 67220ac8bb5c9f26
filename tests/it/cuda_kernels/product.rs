//! How the kernels of `int4_matmul.cu` are launched, by the plan that devices get too.

use std::sync::Arc;

use gptq::kernels::{
    Features, Repacked,
    cuda::plan::{Build, Launch as Planned, Limits, Product},
};

use super::{arguments, linear::Linear};
use crate::cuda_host::{Launch, Library, Memory, Order, tensor_map};

const THREADS: usize = 256;
/// Tokens and features of a box of activations.
const BOX: (usize, usize) = (256, 64);

/// A linear on a machine that is said to be such a device.
pub(crate) struct Product16 {
    pub(crate) repacked: Repacked,
    build: Build,
    limits: Limits,
}

/// How a product is launched; only `blocks` may show in its bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How {
    /// Blocks of the grid of `few`.
    pub(crate) blocks: usize,
    /// How many of them run at the same time.
    pub(crate) resident: usize,
    pub(crate) order: Order,
}

impl Product16 {
    pub(crate) fn new(linear: &Linear, limits: Limits) -> Self {
        let repacked = linear.repacked();
        let build = Build::new(&repacked, linear.spec.bf16, limits).expect("a build fits");
        Self { repacked, build, limits }
    }

    fn library(&self, product: Product) -> Arc<Library> {
        Library::of("int4_matmul", &self.build.macros(product))
    }

    /// Whether the device has the memory for a kernel.
    pub(crate) fn fits(&self, product: Product) -> bool {
        self.build.fits(product, self.limits)
    }

    /// Units of work of `few`: more blocks than these have none.
    pub(crate) fn units(&self, product: Product) -> usize {
        let planned = Planned { product, tokens: (0, 1) };
        self.build.blocks(&planned, self.repacked.columns, self.repacked.positions, usize::MAX).0
    }

    /// x `[M, K]` → y `[M, N]`.
    ///
    /// # Errors
    /// What a thread did wrong, or did not leave as it was.
    pub(crate) fn multiply(
        &self,
        product: Product,
        x: &[u16],
        m: usize,
        how: How,
    ) -> Result<Vec<u16>, String> {
        let r = &self.repacked;
        let spread = self.spread(x);
        let x = spread.as_deref().unwrap_or(x);
        let mut y = vec![0xffff; m * r.columns];
        match product {
            Product::Few(_) => self.few(product, x, &mut y, m, how)?,
            Product::Many(_) | Product::Wgmma => self.many(product, x, &mut y, m, how)?,
        }
        Ok(y.chunks(r.columns).flat_map(|row| &row[..r.out_features]).copied().collect())
    }

    /// Activations where the features of x are spread, zeros between them.
    fn spread(&self, x: &[u16]) -> Option<Vec<u16>> {
        let Features::Spread(order) = &self.repacked.features else { return None };
        let row = |row: &[u16]| -> Vec<u16> {
            order.iter().map(|&feature| row.get(feature as usize).copied().unwrap_or_default()).collect()
        };
        Some(x.chunks(self.repacked.in_features).flat_map(row).collect())
    }

    fn permutation(&self) -> Option<&[u32]> {
        match &self.repacked.features {
            Features::Permuted(order) => Some(order),
            _ => None,
        }
    }

    fn few(&self, product: Product, x: &[u16], y: &mut [u16], m: usize, how: How) -> Result<(), String> {
        let r = &self.repacked;
        let planned = Planned { product, tokens: (0, m) };
        let mut gathered = vec![0xffffu16; m * r.positions];
        let mut partials = vec![f32::NAN; self.build.partials(&planned, how.blocks)];
        let mut counters = vec![0u32; self.build.counters(r.columns)];
        // A second launch finds what the first has left.
        for _ in 0..2 {
            y.fill(0xffff);
            gathered.fill(0xffff);
            let mut memory = Memory::default();
            let perm = self.permutation();
            let arguments = arguments![
                memory.read(&r.weights),
                memory.read(&r.params),
                memory.read(x),
                perm.map_or(0, |perm| memory.read(perm)),
                if perm.is_some() { memory.write(&mut gathered) } else { 0 },
                memory.write(y),
                memory.write(&mut partials),
                memory.write(&mut counters),
                m as u32,
                r.columns as u32,
                r.positions as u32,
                r.group as u32,
            ];
            let launch = Launch {
                blocks: (how.blocks, 1, 1),
                threads: (THREADS as u32, 1),
                shared: self.build.shared_bytes(product),
                resident: if perm.is_some() { how.blocks } else { how.resident },
                order: how.order,
            };
            // SAFETY: the arguments of the kernel; `memory` has all that they point to.
            unsafe { self.library(product).launch(product.name(), launch, &memory, &arguments) }?;
            if counters.iter().any(|&count| count != 0) {
                return Err(format!("counters are left at {counters:?}"));
            }
        }
        Ok(())
    }

    fn many(&self, product: Product, x: &[u16], y: &mut [u16], m: usize, how: How) -> Result<(), String> {
        let r = &self.repacked;
        let gathered = self.permutation().map(|perm| self.gather(x, perm, m, how)).transpose()?;
        let planned = Planned { product, tokens: (0, m) };
        let (across, along) = self.build.blocks(&planned, r.columns, r.positions, 0);
        let mut memory = Memory::default();
        let mut arguments = arguments![
            memory.read(&r.weights),
            memory.read(&r.params),
            memory.read(gathered.as_deref().unwrap_or(x)),
            memory.write(y),
            m as u32,
            r.columns as u32,
            r.positions as u32,
            r.group as u32,
        ];
        if product == Product::Wgmma {
            let address = *bytemuck::from_bytes(&arguments[2]);
            arguments[2] = bytemuck::bytes_of(&tensor_map(address, (m, r.positions), BOX)).to_vec();
        }
        let launch = Launch {
            blocks: (across, along, 1),
            threads: (product.threads() as u32, 1),
            shared: self.build.shared_bytes(product),
            resident: how.resident,
            order: how.order,
        };
        // SAFETY: as above.
        unsafe { self.library(product).launch(product.name(), launch, &memory, &arguments) }
    }

    fn gather(&self, x: &[u16], perm: &[u32], m: usize, how: How) -> Result<Vec<u16>, String> {
        let k = self.repacked.positions;
        let mut gathered = vec![0xffffu16; m * k];
        let mut memory = Memory::default();
        let arguments =
            arguments![memory.read(x), memory.read(perm), memory.write(&mut gathered), m as u32, k as u32];
        let launch = Launch {
            // Fewer blocks than tokens, so that a block takes several.
            blocks: (k.div_ceil(THREADS * 8), m.div_ceil(3), 1),
            threads: (THREADS as u32, 1),
            shared: 0,
            resident: how.resident,
            order: how.order,
        };
        // SAFETY: as above.
        unsafe { self.library(Product::Few(8)).launch("int4_gather", launch, &memory, &arguments) }?;
        let expected = |i: usize| x[i / k * k + perm[i % k] as usize];
        match (0..m * k).position(|i| gathered[i] != expected(i)) {
            Some(i) => Err(format!("token {}, position {}: gathered from elsewhere", i / k, i % k)),
            None => Ok(gathered),
        }
    }
}
