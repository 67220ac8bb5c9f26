//! The tensors of a layer beside its linears: norms, router and gate.

use tch::{Device, Kind, TchError, Tensor};

use crate::{
    architectures::{ModelConfig, NormConfig, NormKind},
    checkpoint::Checkpoint,
    error::{Result, TorchContext},
};

/// A norm that is ready to run.
#[derive(Debug)]
pub struct Norm {
    /// fp32: the factor that the norm multiplies by, `w` or `1 + w`.
    weight: Tensor,
    bias: Option<Tensor>,
    subtracts_mean: bool,
    eps: f64,
}

impl Norm {
    /// Reads a norm; the names of its tensors are `prefix` and its path.
    ///
    /// # Errors
    /// When a tensor is missing, malformed or not finite.
    pub(super) fn read(
        checkpoint: &Checkpoint,
        config: &NormConfig,
        prefix: &str,
        device: Device,
    ) -> Result<Self> {
        let load =
            |name: String| checkpoint.load(&format!("{prefix}{name}"), &config.shape, Kind::Float, device);
        let weight = load(config.weight())?;
        let weight = match config.kind {
            NormKind::RmsPlusOne => weight.f_add_scalar(1.0).torch("read a norm")?,
            NormKind::Rms | NormKind::Layer => weight,
        };
        let bias = if config.bias { Some(load(config.bias_name())?) } else { None };
        Ok(Self { weight, bias, subtracts_mean: config.kind == NormKind::Layer, eps: config.eps })
    }

    /// Normalizes the last axis of `x`, computed in fp32, returned in `kind`.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn apply(&self, x: &Tensor, kind: Kind) -> Result<Tensor> {
        let norm = || -> Result<Tensor, TchError> {
            let mut x = x.f_to_kind(Kind::Float)?;
            if self.subtracts_mean {
                x = x.f_sub(&x.f_mean_dim(-1, true, Kind::Float)?)?;
            }
            let mean = x.f_square()?.f_mean_dim(-1, true, Kind::Float)?;
            let scale = mean.f_add_scalar(self.eps)?.f_rsqrt()?;
            let mut y = x.f_mul(&scale)?.f_mul(&self.weight)?;
            if let Some(bias) = &self.bias {
                y = y.f_add(bias)?;
            }
            y.f_to_kind(kind)
        };
        norm().torch("compute a norm")
    }

    /// Features that are normalized together.
    pub(super) fn features(&self) -> i64 {
        self.weight.size().last().copied().unwrap_or_default()
    }

    fn try_map(&self, f: &dyn Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let bias = self.bias.as_ref().map(f).transpose()?;
        Ok(Self { weight: f(&self.weight)?, bias, ..*self })
    }
}

/// The tensors of one layer beside its linears, fp32.
#[derive(Debug, Default)]
pub struct DenseParts {
    pub(super) input: Option<Norm>,
    pub(super) attention_output: Option<Norm>,
    pub(super) feed_forward: Option<Norm>,
    pub(super) feed_forward_output: Option<Norm>,
    pub(super) qk_norms: Option<[Norm; 2]>,
    /// `[experts, hidden]`.
    pub(super) router: Option<Tensor>,
    /// `[1, hidden]`.
    pub(super) shared_gate: Option<Tensor>,
}

impl DenseParts {
    /// Reads the tensors of a layer.
    ///
    /// # Errors
    /// When a tensor is missing, malformed or not finite.
    pub(super) fn read(checkpoint: &Checkpoint, layer: usize, device: Device) -> Result<Self> {
        let model: &ModelConfig = checkpoint.config();
        let (config, prefix) = (&model.layers[layer], model.layer_prefix(layer));
        let read = |config: &NormConfig| Norm::read(checkpoint, config, &prefix, device);
        let qk_norms = match &config.attention.qk_norms {
            Some([q, k]) => Some([read(q)?, read(k)?]),
            None => None,
        };
        let norm = |config: &Option<NormConfig>| config.as_ref().map(read).transpose();
        let load = |name: &str, shape: [usize; 2]| {
            checkpoint.load(&format!("{prefix}{name}"), &shape, Kind::Float, device)
        };
        let routing = config.feed_forward.routing.as_ref();
        let hidden = model.hidden_size;
        let router = routing.map(|routing| load(routing.router, [routing.experts, hidden])).transpose()?;
        let gate = routing.and_then(|routing| routing.shared_gate);
        Ok(Self {
            input: norm(&config.norms.input)?,
            attention_output: norm(&config.norms.attention_output)?,
            feed_forward: norm(&config.norms.feed_forward)?,
            feed_forward_output: norm(&config.norms.feed_forward_output)?,
            qk_norms,
            router,
            shared_gate: gate.map(|gate| load(gate, [1, hidden])).transpose()?,
        })
    }

    /// Applies `f` to every tensor, e.g. a copy to a device.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn try_map(&self, f: &dyn Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let norm = |norm: &Option<Norm>| norm.as_ref().map(|norm| norm.try_map(f)).transpose();
        let qk_norms = match &self.qk_norms {
            Some([q, k]) => Some([q.try_map(f)?, k.try_map(f)?]),
            None => None,
        };
        Ok(Self {
            input: norm(&self.input)?,
            attention_output: norm(&self.attention_output)?,
            feed_forward: norm(&self.feed_forward)?,
            feed_forward_output: norm(&self.feed_forward_output)?,
            qk_norms,
            router: self.router.as_ref().map(f).transpose()?,
            shared_gate: self.shared_gate.as_ref().map(f).transpose()?,
        })
    }

    /// The same tensors.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        self.try_map(&|tensor| Ok(tensor.shallow_clone())).unwrap_or_default()
    }
}
