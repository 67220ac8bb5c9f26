//! Rotations that are folded into the weights and leave an ordinary Llama that computes the same: outliers of weights are spread
//! over all features. (QuaRot, arXiv 2404.00456, and SpinQuant, 2405.16406, call them R1 and R2; what those do to
//! activations at run time is left out, so that every reader of the format loads the result.)
//!
//! With the weight of each RMSNorm moved into the linears behind it, the norm does the same to a rotated residual stream:
//! the embedding and all that writes to the stream are multiplied by `Q` on that side, and all that reads from it on the other.
//! Within attention, each head's values are rotated by `R`, and `o` takes that back.

mod orthogonal;

use std::path::Path;

use orthogonal::Orthogonal;
pub use orthogonal::TURNED_TOGETHER;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::{
    checkpoint::{
        CONFIG_FILE, Checkpoint, EMBED_TOKENS, FINAL_NORM, LM_HEAD, LinearId, LinearKind, LlamaConfig,
        ShardPlan, ShardWriter, TensorSpec, WriteDtype, dense_tensors, input_layernorm,
        post_attention_layernorm, to_bytes, write_file_atomically,
    },
    error::{Error, Result, TorchContext},
};

/// Decides the signs in both rotations.
const SEEDS: [u64; 2] = [0x5eed, 0x4ead];

/// A rotated model in a folder that is gone with this.
pub struct Rotated {
    checkpoint: Checkpoint,
    _folder: tempfile::TempDir,
}

impl Rotated {
    /// Writes a checkpoint as it is when rotated, in fp32, into a new folder in `place`. `step` is called once a layer.
    ///
    /// # Errors
    /// When a tensor is missing, malformed or not finite, the disk is full, or `step` says so.
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

        write(EMBED_TOKENS, rotation.embedding()?)?;
        checkpoint.release([EMBED_TOKENS]);
        for layer in 0..config.num_layers {
            step()?;
            for norm in [input_layernorm(layer), post_attention_layernorm(layer)] {
                write(&norm, ones(config.hidden_size))?;
            }
            for kind in LinearKind::ALL {
                let id = LinearId { layer, kind };
                write(&id.weight(), rotation.weight(id)?)?;
                if kind.has_bias(&config) {
                    write(&id.bias(), rotation.bias(id)?)?;
                }
            }
            checkpoint.release_layer(layer);
        }
        write(FINAL_NORM, ones(config.hidden_size))?;
        write(LM_HEAD, rotation.head()?)?;
        checkpoint.release([EMBED_TOKENS, LM_HEAD]);
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

/// Bytes that a model takes on disk when rotated.
pub fn rotated_bytes(config: &LlamaConfig) -> u64 {
    let numbers = |spec: TensorSpec| spec.shape.iter().map(|&size| size as u64).product::<u64>();
    tensors(&config.untied()).into_iter().map(numbers).sum::<u64>() * WriteDtype::F32.size() as u64
}

/// Layer by layer, as they are read.
fn tensors(config: &LlamaConfig) -> Vec<TensorSpec> {
    let spec = |name: String, shape: Vec<usize>| TensorSpec { name, dtype: WriteDtype::F32, shape };
    let dense = dense_tensors(config).into_iter().map(|(name, shape)| spec(name, shape));
    let linears = LinearId::all(config).flat_map(|id| {
        let shape = id.kind.shape(config);
        let bias = id.kind.has_bias(config).then(|| spec(id.bias(), vec![shape[0]]));
        std::iter::once(spec(id.weight(), shape.to_vec())).chain(bias)
    });
    dense.chain(linears).collect()
}

/// What a model is rotated by: the same for every model of a shape.
pub struct Rotation<'a> {
    checkpoint: &'a Checkpoint,
    /// Of the residual stream.
    stream: Orthogonal,
    /// Of each head's values.
    head: Orthogonal,
}

impl<'a> Rotation<'a> {
    /// # Errors
    /// When libtorch cannot make it.
    pub fn new(checkpoint: &'a Checkpoint) -> Result<Self> {
        let config = checkpoint.config();
        let matrix = |n: usize, seed| Orthogonal::new(n, seed).torch("make a rotation");
        Ok(Self {
            checkpoint,
            stream: matrix(config.hidden_size, SEEDS[0])?,
            head: matrix(config.head_dim, SEEDS[1])?,
        })
    }

    fn config(&self) -> &LlamaConfig {
        self.checkpoint.config()
    }

    fn load(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.checkpoint.load(name, shape, Kind::Float, Device::Cpu)
    }

    fn norm(&self, name: &str) -> Result<Tensor> {
        self.load(name, &[self.config().hidden_size])
    }

    fn embedding(&self) -> Result<Tensor> {
        let LlamaConfig { vocab_size, hidden_size, .. } = *self.config();
        let embedding = self.load(EMBED_TOKENS, &[vocab_size, hidden_size])?;
        self.stream.turn(&embedding).torch("rotate the embedding")
    }

    /// The output layer, with the last norm's weight in it.
    fn head(&self) -> Result<Tensor> {
        let LlamaConfig { vocab_size, hidden_size, tie_word_embeddings, .. } = *self.config();
        let name = if tie_word_embeddings { EMBED_TOKENS } else { LM_HEAD };
        let head = self.load(name, &[vocab_size, hidden_size])?;
        self.reading(&head, &self.norm(FINAL_NORM)?).torch("rotate the output layer")
    }

    /// A linear's weight `[N, K]` when rotated, fp32.
    ///
    /// # Errors
    /// When a tensor is missing, malformed or not finite.
    pub fn weight(&self, id: LinearId) -> Result<Tensor> {
        let weight = self.load(&id.weight(), &id.kind.shape(self.config()))?;
        let norm = match id.kind {
            LinearKind::Q | LinearKind::K | LinearKind::V => Some(input_layernorm(id.layer)),
            LinearKind::Gate | LinearKind::Up => Some(post_attention_layernorm(id.layer)),
            LinearKind::O | LinearKind::Down => None,
        };
        let norm = norm.map(|name| self.norm(&name)).transpose()?;
        let rotated = || match (&norm, id.kind) {
            (Some(norm), LinearKind::V) => self.values(&self.reading(&weight, norm)?),
            (Some(norm), _) => self.reading(&weight, norm),
            (None, LinearKind::O) => self.writing(&self.reading_values(&weight)?),
            (None, _) => self.writing(&weight),
        };
        rotated().torch("rotate a weight")
    }

    fn bias(&self, id: LinearId) -> Result<Tensor> {
        let bias = self.load(&id.bias(), &id.kind.shape(self.config())[..1])?;
        let rotated = || match id.kind {
            LinearKind::V => self.values(&bias.f_unsqueeze(1)?)?.f_squeeze_dim(1),
            LinearKind::O | LinearKind::Down => self.stream.turn(&bias),
            _ => Ok(bias.shallow_clone()),
        };
        rotated().torch("rotate a bias")
    }

    /// `W diag(norm) Q`, of what reads from the residual stream.
    fn reading(&self, weight: &Tensor, norm: &Tensor) -> Result<Tensor, tch::TchError> {
        self.stream.turn(&weight.f_mul(norm)?)
    }

    /// `Qᵀ W`, of what writes to it.
    fn writing(&self, weight: &Tensor) -> Result<Tensor, tch::TchError> {
        self.stream.turn(&weight.f_tr()?)?.f_tr()
    }

    /// `Rᵀ` times the rows `[head_dim, K]` of each head.
    fn values(&self, weight: &Tensor) -> Result<Tensor, tch::TchError> {
        let heads = weight.f_reshape([-1, self.config().head_dim as i64, weight.size()[1]])?;
        self.head.turn(&heads.f_transpose(1, 2)?)?.f_transpose(1, 2)?.f_reshape(weight.size())
    }

    /// The columns `[N, head_dim]` of each head times `R`.
    fn reading_values(&self, weight: &Tensor) -> Result<Tensor, tch::TchError> {
        let heads = weight.f_reshape([weight.size()[0], -1, self.config().head_dim as i64])?;
        self.head.turn(&heads)?.f_reshape(weight.size())
    }
}

fn ones(n: usize) -> Tensor {
    Tensor::from_slice(&vec![1f32; n])
}
