//! Device memory that decoding a model on CUDA needs, estimated before anything is loaded.

use tch::Device;

use super::Compute;
use crate::{
    architectures::LayerConfig,
    checkpoint::{Checkpoint, QuantizationConfig},
    cuda::Gpu,
    error::{Error, Result},
    kernels::repacked_bytes,
};

/// fp16 and bf16.
const ELEMENT_BYTES: usize = 2;
/// cuBLAS's own workspace as libtorch gives it on Hopper, and loaded kernels.
const LIBRARIES: usize = 64 << 20;

/// Bytes of device memory by purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceNeed {
    /// Linears, packed or dense, norms and the output layer. The embedding stays in the memory map.
    pub weights: usize,
    /// Keys and values.
    pub cache: usize,
    /// Activations of the prompt, and memory of libraries.
    pub working: usize,
}

impl DeviceNeed {
    /// All of it.
    pub fn total(&self) -> usize {
        self.weights + self.cache + self.working
    }
}

/// The memory that decoding needs with all layers resident in fp16 or bf16, for a prompt of `prompt` tokens and `capacity`
/// tokens in all.
///
/// # Errors
/// When the checkpoint's quantization cannot be read.
pub fn device_need(checkpoint: &Checkpoint, prompt: usize, capacity: usize) -> Result<DeviceNeed> {
    let config = checkpoint.config();
    let packed = checkpoint.gguf().is_none() && checkpoint.quantization_mark().is_some();
    let quantization = packed.then(|| QuantizationConfig::read(checkpoint)).transpose()?;
    let mut weights = 0;
    for (id, linear) in config.linears() {
        let [n, k] = linear.shape;
        let packed = quantization.as_ref().filter(|_| checkpoint.contains(&id.qweight()));
        let packed = packed.and_then(|q| repacked_bytes(q.bits, n, k, q.group_size, !q.sym));
        weights += packed.unwrap_or(n * k * ELEMENT_BYTES) + n * ELEMENT_BYTES;
        // The order of features, if there is one.
        weights += packed.map_or(0, |_| k * size_of::<u32>());
    }
    let hidden = config.hidden_size;
    // Norms and routers, fp32; the output layer.
    let dense = config.layers.iter().flat_map(LayerConfig::dense_tensors);
    weights += dense.map(|(_, shape)| shape.iter().product::<usize>() * size_of::<f32>()).sum::<usize>();
    weights += hidden * size_of::<f32>() + config.vocab_size * hidden * ELEMENT_BYTES;
    let kv: usize = config.layers.iter().map(|layer| layer.attention.kv_width()).sum();
    let cache = 2 * capacity * kv * ELEMENT_BYTES;
    // The residual stream and a norm's steps in fp32; gate, up, their product and its gathered copy; or q, k, v, rotated,
    // repeated and attended.
    let widest = |layer: &LayerConfig| {
        let mlp = 4 * layer.feed_forward.stored_widths().iter().sum::<usize>();
        mlp.max(10 * layer.attention.width()) * ELEMENT_BYTES
    };
    let block = config.layers.iter().map(widest).max().unwrap_or(0);
    let a_token = hidden * (3 * size_of::<f32>() + 3 * ELEMENT_BYTES) + block;
    let working = prompt * a_token + 2 * config.vocab_size * size_of::<f32>() + LIBRARIES;
    Ok(DeviceNeed { weights, cache, working })
}

/// Compares the need with the free device memory, and returns a message. `None` on the CPU, where weights stay in the memory
/// map.
///
/// # Errors
/// When the model does not fit, or the driver does not report the free memory.
pub fn check_device_memory(compute: Compute, need: &DeviceNeed) -> Result<Option<String>> {
    let Device::Cuda(index) = compute.device else { return Ok(None) };
    let memory = Gpu::of(compute.device)?.memory()?;
    fits(&format!("cuda:{index}"), need, memory.free).map(Some)
}

fn fits(device: &str, need: &DeviceNeed, free: usize) -> Result<String> {
    let gigabytes = |bytes: usize| format!("{:.2} GB", bytes as f64 / 1e9);
    let needed = format!(
        "about {} ({} of weights, {} of keys and values)",
        gigabytes(need.total()),
        gigabytes(need.weights),
        gigabytes(need.cache)
    );
    if need.total() > free {
        let problem = format!("the model needs {needed} of its memory, and {} are free", gigabytes(free));
        return Err(Error::Device { device: device.into(), problem });
    }
    Ok(format!("{device}: {needed}, {} are free", gigabytes(free)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_with_its_parts() {
        let need = DeviceNeed { weights: 3_800_000_000, cache: 1_000_000_000, working: 200_000_000 };
        assert_eq!(
            fits("cuda:0", &need, 5_000_000_000).unwrap(),
            "cuda:0: about 5.00 GB (3.80 GB of weights, 1.00 GB of keys and values), 5.00 GB are free"
        );
        assert_eq!(
            fits("cuda:1", &need, 4_999_999_999).unwrap_err().to_string(),
            "device `cuda:1` cannot be used: the model needs about 5.00 GB (3.80 GB of weights, 1.00 GB of keys and \
             values) of its memory, and 5.00 GB are free"
        );
        assert_eq!(check_device_memory(Compute::CPU, &need).unwrap(), None);
    }
}
