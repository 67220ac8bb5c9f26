//! Folded rotations: they are multiplied into the weights, the model computes the same, and outliers of weights are spread over
//! all features. They are R1 and R2 of QuaRot (arXiv 2404.00456) and SpinQuant (2405.16406), without rotations at run time, so
//! that every reader of the format loads the result.
//!
//! The weight of each RMSNorm is moved into the linears that read the norm, so that the norm commutes with a rotation of the
//! residual stream. The embedding and all linears that write to the stream are multiplied by `Q` on their output side, and all
//! linears that read from it on their input side. Within attention, each head's values are rotated by `R`, and `o` by its
//! inverse.

mod orthogonal;

use std::path::Path;

use orthogonal::Orthogonal;
pub use orthogonal::TURNED_TOGETHER;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::{
    architectures::{CONFIG_FILE, LayerConfig, ModelConfig, NormConfig, NormKind},
    checkpoint::{Checkpoint, Dtype, ShardPlan, ShardWriter, TensorSpec, to_bytes, write_file_atomically},
    error::{Error, Result, TorchContext},
};

/// Seeds of the signs in both rotations.
const SEEDS: [u64; 2] = [0x5eed, 0x4ead];

/// A rotated model in a temporary folder, which is deleted on drop.
pub struct Rotated {
    checkpoint: Checkpoint,
    _folder: tempfile::TempDir,
}

impl Rotated {
    /// Writes the rotated checkpoint, in fp32, into a new folder in `place`. `step` is called once a layer.
    ///
    /// # Errors
    /// When a tensor is missing, malformed or not finite, or the disk is full, and the errors of `step`.
    pub fn write(
        checkpoint: &Checkpoint,
        place: &Path,
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Self> {
        checkpoint.check()?;
        checkpoint.check_tied()?;
        let folder = tempfile::Builder::new().prefix("rotated-").tempdir_in(place);
        let folder = folder.map_err(Error::io("create a folder in", place))?;
        let rotation = Rotation::new(checkpoint)?;
        let config = checkpoint.config().untied();
        let mut writer = ShardWriter::create(folder.path(), ShardPlan::new(tensors(&config), u64::MAX)?)?;
        let mut write = |name: &str, tensor: Tensor| writer.write(name, &to_bytes(&tensor)?);

        write(&config.embedding(), rotation.embedding()?)?;
        checkpoint.release([config.embedding()]);
        for (layer, parts) in config.layers.iter().enumerate() {
            step()?;
            for (path, tensor) in rotation.dense_parts(layer, parts)? {
                write(&config.layer_tensor(layer, &path), tensor)?;
            }
            for (position, linear) in parts.linears.iter().enumerate() {
                let id = config.linear_id(layer, position);
                write(&id.weight(), rotation.weight(layer, position)?)?;
                if linear.bias {
                    write(&id.bias(), rotation.bias(layer, position)?)?;
                }
            }
            checkpoint.release_layer(layer);
        }
        write(&format!("{}{}", config.prefix, config.final_norm.weight()), neutral(&config.final_norm))?;
        write(&config.lm_head, rotation.head()?)?;
        checkpoint.release([config.embedding(), config.lm_head.clone()]);
        writer.finish()?;

        let mut json = config.raw().clone();
        json["dtype"] = json!("float32");
        write_file_atomically(&folder.path().join(CONFIG_FILE), json.to_string().as_bytes())?;
        Ok(Self { checkpoint: Checkpoint::open(folder.path())?, _folder: folder })
    }

    /// The rotated model.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }
}

/// Size of the rotated model on disk, bytes.
pub fn rotated_bytes(config: &ModelConfig) -> u64 {
    let numbers = |spec: TensorSpec| spec.shape.iter().map(|&size| size as u64).product::<u64>();
    tensors(&config.untied()).into_iter().map(numbers).sum::<u64>() * size_of::<f32>() as u64
}

/// Layer by layer, as they are read.
fn tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let spec = |name: String, shape: Vec<usize>| TensorSpec { name, dtype: Dtype::F32, shape };
    let dense = config.dense_tensors().into_iter().map(|(name, shape)| spec(name, shape));
    let linears = config.linears().flat_map(|(id, linear)| {
        let bias = linear.bias.then(|| spec(id.bias(), vec![linear.shape[0]]));
        std::iter::once(spec(id.weight(), linear.shape.to_vec())).chain(bias)
    });
    dense.chain(linears).collect()
}

/// The rotations of a model; models of the same shape have the same rotations.
pub struct Rotation<'a> {
    checkpoint: &'a Checkpoint,
    /// Of the residual stream.
    stream: Orthogonal,
    /// Of each head's values.
    head: Orthogonal,
}

impl<'a> Rotation<'a> {
    /// # Errors
    /// When the model's norms do not commute with rotations, or libtorch fails.
    pub fn new(checkpoint: &'a Checkpoint) -> Result<Self> {
        let config = checkpoint.config();
        if let Some(reason) = config.rotation_refusal() {
            return Err(config.refused("rotate", &reason));
        }
        Ok(Self {
            checkpoint,
            stream: Orthogonal::new(config.hidden_size, SEEDS[0]),
            head: Orthogonal::new(config.layers[0].attention.head_dim, SEEDS[1]),
        })
    }

    fn config(&self) -> &ModelConfig {
        self.checkpoint.config()
    }

    fn load(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.checkpoint.load(name, shape, Kind::Float, Device::Cpu)
    }

    /// The factors `[hidden]` of a norm; the name of its tensor is `prefix` and its path.
    fn norm(&self, norm: &NormConfig, prefix: &str) -> Result<Tensor> {
        let weight = self.load(&format!("{prefix}{}", norm.weight()), &norm.shape)?;
        match norm.kind {
            NormKind::RmsPlusOne => weight.f_add_scalar(1.0).torch("read a norm"),
            NormKind::Rms | NormKind::Layer => Ok(weight),
        }
    }

    fn layer_norm(&self, layer: usize, norm: &NormConfig) -> Result<Tensor> {
        self.norm(norm, &self.config().layer_prefix(layer))
    }

    fn embedding(&self) -> Result<Tensor> {
        let (vocab, hidden) = (self.config().vocab_size, self.config().hidden_size);
        let embedding = self.load(&self.config().embedding(), &[vocab, hidden])?;
        self.stream.turn(&embedding).torch("rotate the embedding")
    }

    /// The output layer, multiplied by the last norm's weight.
    fn head(&self) -> Result<Tensor> {
        let config = self.config();
        let head = self.load(&config.output_layer(), &[config.vocab_size, config.hidden_size])?;
        let norm = self.norm(&config.final_norm, &config.prefix)?;
        self.reading(&head, &norm).torch("rotate the output layer")
    }

    /// The tensors of a layer beside its linears: neutral norms of the residual stream, rotated routers, and other norms
    /// unchanged.
    fn dense_parts(&self, layer: usize, config: &LayerConfig) -> Result<Vec<(String, Tensor)>> {
        let mut parts: Vec<(String, Tensor)> =
            config.norms.all().map(|norm| (norm.weight(), neutral(norm))).collect();
        for norm in config.attention.qk_norms.iter().flatten() {
            for (path, shape) in norm.tensors() {
                let tensor = self.load(&self.config().layer_tensor(layer, &path), &shape)?;
                parts.push((path, tensor));
            }
        }
        for (path, shape) in config.feed_forward.dense_tensors(self.config().hidden_size) {
            let tensor = self.load(&self.config().layer_tensor(layer, &path), &shape)?;
            let norm = config.norms.feed_forward.as_ref().expect("a router reads a norm");
            let norm = self.layer_norm(layer, norm)?;
            parts.push((path, self.reading(&tensor, &norm).torch("rotate a router")?));
        }
        Ok(parts)
    }

    /// The rotated weight `[N, K]` of a layer's linear, fp32.
    ///
    /// # Errors
    /// When a tensor is missing, malformed or not finite.
    pub fn weight(&self, layer: usize, position: usize) -> Result<Tensor> {
        let config = &self.config().layers[layer];
        let id = self.config().linear_id(layer, position);
        let weight = self.load(&id.weight(), &config.linears[position].shape)?;
        let norm = config.norm_before(position).map(|norm| self.layer_norm(layer, norm)).transpose()?;
        let rotated = || {
            let weight = match &norm {
                Some(norm) => self.reading(&weight, norm)?,
                None => weight,
            };
            let weight = self.values_turned(config, position, weight)?;
            let weight =
                if position == config.attention_output() { self.reading_values(&weight)? } else { weight };
            if config.writes_to_stream(position) { self.writing(&weight) } else { Ok(weight) }
        };
        rotated().torch("rotate a weight")
    }

    fn bias(&self, layer: usize, position: usize) -> Result<Tensor> {
        let config = &self.config().layers[layer];
        let id = self.config().linear_id(layer, position);
        let bias = self.load(&id.bias(), &config.linears[position].shape[..1])?;
        let rotated = || {
            let bias = self.values_turned(config, position, bias.f_unsqueeze(1)?)?.f_squeeze_dim(1)?;
            if config.writes_to_stream(position) { self.stream.turn(&bias) } else { Ok(bias) }
        };
        rotated().torch("rotate a bias")
    }

    /// A projection's weight with rotated rows of values, if it has such rows.
    fn values_turned(
        &self,
        config: &LayerConfig,
        position: usize,
        weight: Tensor,
    ) -> Result<Tensor, tch::TchError> {
        let (values, rows) = config.attention.value_rows();
        if position != values {
            return Ok(weight);
        }
        let (first, count) = (rows.start as i64, rows.len() as i64);
        let turned = self.values(&weight.f_narrow(0, first, count)?)?;
        match first {
            0 => Ok(turned),
            _ => Tensor::f_cat(&[weight.f_narrow(0, 0, first)?, turned], 0),
        }
    }

    /// `W diag(norm) Q`, for linears that read from the residual stream.
    fn reading(&self, weight: &Tensor, norm: &Tensor) -> Result<Tensor, tch::TchError> {
        self.stream.turn(&weight.f_mul(norm)?)
    }

    /// `Qᵀ W`, for linears that write to it.
    fn writing(&self, weight: &Tensor) -> Result<Tensor, tch::TchError> {
        self.stream.turn(&weight.f_tr()?)?.f_tr()
    }

    /// `Rᵀ` times the rows `[head_dim, K]` of each head.
    fn values(&self, weight: &Tensor) -> Result<Tensor, tch::TchError> {
        let heads =
            weight.f_reshape([-1, self.config().layers[0].attention.head_dim as i64, weight.size()[1]])?;
        self.head.turn(&heads.f_transpose(1, 2)?)?.f_transpose(1, 2)?.f_reshape(weight.size())
    }

    /// The columns `[N, head_dim]` of each head times `R`.
    fn reading_values(&self, weight: &Tensor) -> Result<Tensor, tch::TchError> {
        let heads =
            weight.f_reshape([weight.size()[0], -1, self.config().layers[0].attention.head_dim as i64])?;
        self.head.turn(&heads)?.f_reshape(weight.size())
    }
}

/// The weight of a norm that multiplies by 1.
fn neutral(norm: &NormConfig) -> Tensor {
    let one = if norm.kind == NormKind::RmsPlusOne { 0f32 } else { 1.0 };
    Tensor::from_slice(&vec![one; norm.shape.iter().product()])
}
