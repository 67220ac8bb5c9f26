//! Packed linears that are ready to run: on the CPU borrowed from the memory map, or with act order copied by group; on CUDA copied into
//! the kernels' layout.

use std::{cell::RefCell, sync::Arc};

use tch::{Device, Tensor};

use super::{Compute, CudaPacked, Dense, Linear, Packed, kind_name};
use crate::{
    architectures::LinearId,
    checkpoint::PackedTensors,
    error::{Error, Result, TorchContext},
    kernels::{CudaMatmul, RepackError, Workspace, repack},
    pack::PackedView,
};

/// Makes the linears of one model.
pub(super) struct PackedLinears {
    compute: Compute,
    /// On CUDA only.
    workspace: Option<Arc<Workspace>>,
    /// Why linears run dense: each reason once, with the first linear that it holds for.
    dense: RefCell<Vec<(RepackError, LinearId)>>,
    /// Number of those that [`PackedLinears::notes`] has returned.
    noted: RefCell<usize>,
}

impl PackedLinears {
    /// # Errors
    /// When the device cannot be used, or does not compute in this kind.
    pub(super) fn new(compute: Compute) -> Result<Self> {
        let workspace = match compute.device {
            Device::Cpu if compute.kind != tch::Kind::Float => {
                return Err(Error::Value {
                    what: "kind of a packed model on the CPU".into(),
                    expected: "fp32".into(),
                    found: kind_name(compute.kind).into(),
                });
            }
            Device::Cpu => None,
            device => Some(Workspace::new(device)?),
        };
        Ok(Self { compute, workspace, dense: RefCell::default(), noted: RefCell::default() })
    }

    /// # Errors
    /// When memory is exhausted or the device reports an error.
    pub(super) fn linear<'t>(
        &self,
        id: &LinearId,
        packed: &'t PackedTensors<'_>,
    ) -> Result<Box<dyn Linear + 't>> {
        let Compute { device, kind } = self.compute;
        let bias = packed.bias.as_ref().map(|bias| {
            Tensor::f_from_slice(bias)
                .and_then(|b| b.f_to_device(device)?.f_to_kind(kind))
                .torch("read a bias")
        });
        let (view, bias) = (PackedView::from(packed), bias.transpose()?);
        let Some(workspace) = &self.workspace else { return Ok(Box::new(Packed::new(view, bias))) };
        Ok(match repack(&view) {
            Ok(repacked) => Box::new(CudaPacked::new(CudaMatmul::new(&repacked, kind, workspace)?, bias)),
            Err(reason) => {
                let mut dense = self.dense.borrow_mut();
                if !dense.iter().any(|(known, _)| *known == reason) {
                    dense.push((reason, id.clone()));
                }
                Box::new(Dense::from_packed(&view, bias, kind, device)?)
            }
        })
    }

    /// Notes for the user on the linears made so far; each note is returned once.
    pub(super) fn notes(&self) -> Vec<String> {
        let dense = self.dense.borrow();
        let first = self.noted.replace(dense.len());
        let note = |(reason, id): &(RepackError, LinearId)| {
            let kind = kind_name(self.compute.kind);
            format!("{id} and all like it are dequantized and multiplied as dense {kind}: {reason}")
        };
        dense[first..].iter().map(note).collect()
    }
}
