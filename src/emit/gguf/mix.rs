//! A GGUF file that a run solves. During the run its linears are in a folder; the file is made of them at the end.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use half::f16;
use safetensors::Dtype;
use serde_json::json;

use super::{metadata, metadata_of, ordered, rope_factors};
use crate::{
    architectures::{LinearConfig, LinearId, ModelConfig},
    checkpoint::{Checkpoint, ShardPlan, ShardWriter, TensorSpec},
    emit::{OutputWriter, Provenance, places, remove_unfinished},
    error::{Error, Result},
    ggml::{BlockType, Mix, MixModel, round_rows},
    gguf::{GgufPlan, GgufTensor, GgufWriter, MetadataValue, names},
    gptq::solver::Solved,
};

/// The type of a linear in the GGUF file of a mix.
///
/// # Errors
/// When llama.cpp has no name for it, or its rows are not whole blocks.
pub fn linear_type(mix: Mix, config: &ModelConfig, id: &LinearId, columns: usize) -> Result<BlockType> {
    let problem = |problem: String| not_for_gguf(&id.to_string(), problem);
    let name =
        names::in_gguf(&id.weight()).ok_or_else(|| problem("llama.cpp has no tensor of that name".into()))?;
    let kind = mix.type_of(&name, columns, &mix_model(config));
    if kind.grid().is_none() {
        return Err(problem(format!("its rows of {columns} weights are not whole blocks of 32")));
    }
    Ok(kind)
}

/// The type of the embedding in the GGUF file of a mix.
///
/// # Errors
/// When llama.cpp has no name for it.
pub fn embedding_type(mix: Mix, config: &ModelConfig) -> Result<BlockType> {
    let name = config.embedding();
    let own = names::in_gguf(&name)
        .ok_or_else(|| not_for_gguf(&name, "llama.cpp has no tensor of that name".into()))?;
    Ok(mix.type_of(&own, config.hidden_size, &mix_model(config)))
}

fn not_for_gguf(tensor: &str, problem: String) -> Error {
    Error::NotForGguf { path: tensor.into(), problem, instead: "leave out the GGUF variants".to_owned() }
}

fn mix_model(config: &ModelConfig) -> MixModel {
    let attention = &config.layers[0].attention;
    MixModel {
        layers: config.num_layers(),
        heads: attention.num_heads,
        kv_heads: attention.num_kv_heads,
        experts: 0,
        tied: config.tie_word_embeddings,
        llama: ["LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM"].contains(&config.class),
    }
}

/// A GGUF file that is being made, in a hidden folder. Dropping it removes the folder, unless it was committed.
#[derive(Debug)]
pub struct GgufBranchWriter {
    mix: Mix,
    branch: String,
    partial: PathBuf,
    shards: Option<ShardWriter>,
    /// Whether the folder stays when this is dropped.
    keep: bool,
}

impl GgufBranchWriter {
    /// Bytes of all files while the last of them is made.
    ///
    /// # Errors
    /// When the mix does not fit the model.
    pub fn planned_bytes(mix: Mix, original: &Checkpoint, config: &ModelConfig) -> Result<u64> {
        let types = Types { mix, config, architecture: metadata::architecture(original.dir(), config)? };
        let linears = ShardPlan::new(types.linears()?, u64::MAX)?.total_bytes();
        let values = metadata_of(original.dir(), config, types.architecture, "", 0, 0)?;
        Ok(linears + GgufPlan::new(values, types.tensors()?)?.total_bytes())
    }

    /// Creates the folder of the file `branch` of `out`.
    ///
    /// # Errors
    /// When the file exists, the mix does not fit the model, or the disk is full.
    pub fn create(
        out: &Path,
        branch: &str,
        mix: Mix,
        original: &Checkpoint,
        config: &ModelConfig,
    ) -> Result<Self> {
        let [path, partial] = places(out, branch);
        let types = Types { mix, config, architecture: metadata::architecture(original.dir(), config)? };
        let plan = ShardPlan::new(types.linears()?, u64::MAX)?;
        if path.exists() {
            return Err(Error::OutputExists { path });
        }
        fs::create_dir(&partial).map_err(Error::io("create", &partial))?;
        let mut writer = Self { mix, branch: branch.to_owned(), partial, shards: None, keep: false };
        writer.shards = Some(ShardWriter::create(&writer.partial, plan)?);
        Ok(writer)
    }

    /// Reopens what was created with the same arguments and committed when the tensors of `sha256` were written.
    ///
    /// # Errors
    /// When the files are not those that were committed.
    pub fn reopen(
        out: &Path,
        branch: &str,
        mix: Mix,
        original: &Checkpoint,
        config: &ModelConfig,
        sha256: BTreeMap<String, String>,
    ) -> Result<Self> {
        let [_, partial] = places(out, branch);
        let types = Types { mix, config, architecture: metadata::architecture(original.dir(), config)? };
        let plan = ShardPlan::new(types.linears()?, u64::MAX)?;
        remove_unfinished(&partial)?;
        let file = partial.join(branch);
        if file.exists() {
            fs::remove_file(&file).map_err(Error::io("remove", &file))?;
        }
        let shards = Some(ShardWriter::reopen(&partial, plan, sha256)?);
        Ok(Self { mix, branch: branch.to_owned(), partial, shards, keep: true })
    }

    fn shards(&mut self) -> &mut ShardWriter {
        self.shards.as_mut().expect("written to before it is finished")
    }
}

impl OutputWriter for GgufBranchWriter {
    fn encode(&mut self, id: &LinearId, linear: &Solved) -> Result<()> {
        let Solved::Blocks(linear) = linear else { panic!("`{id}` is not in blocks of ggml") };
        self.shards().write(&id.weight(), linear.bytes())
    }

    fn commit(&mut self) -> Result<BTreeMap<String, String>> {
        let digests = self.shards().sync()?.clone();
        self.keep = true;
        Ok(digests)
    }

    fn finish(
        &mut self,
        checkpoint: &Checkpoint,
        original: &Checkpoint,
        provenance: &Provenance,
    ) -> Result<PathBuf> {
        let (config, dir) = (checkpoint.config(), original.dir());
        let written = self.shards.take().expect("finished once").finish()?;
        let types = Types { mix: self.mix, config, architecture: metadata::architecture(dir, config)? };
        let tensors = types.tensors()?;
        let elements = tensors.iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
        let name = dir.canonicalize().map_err(Error::io("read", dir))?;
        let name = name.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let file_type = self.mix.file_type();
        let mut values = metadata_of(dir, config, types.architecture, &name, file_type, elements)?;
        let settings = json!({
            "quant_method": "gptq",
            "format": self.mix,
            "damp_percent": provenance.damp_percent,
            "meta": provenance,
        });
        values.set("gptq.quantization_config", MetadataValue::String(settings.to_string()));

        let path = self.partial.join(&self.branch);
        let mut writer = GgufWriter::create(&path, GgufPlan::new(values, tensors.clone())?)?;
        // Without a limit of their size the linears are in one file.
        let solved = Checkpoint::of_file(&self.partial.join(&written.files[0].0), config.clone())?;
        for tensor in &tensors {
            let own = names::in_folder(&tensor.name).unwrap_or_default();
            let bytes = match rope_factors(config).filter(|(factors, _)| factors.name == tensor.name) {
                Some((_, bytes)) => bytes,
                None if solved.contains(&own) => solved.view(&own)?.bytes.to_vec(),
                None => dense(checkpoint, &own, tensor)?,
            };
            writer.write(&tensor.name, &ordered(config, types.architecture, tensor, bytes))?;
        }
        writer.finish()?;
        Ok(path)
    }
}

impl Drop for GgufBranchWriter {
    fn drop(&mut self) {
        if !self.keep {
            self.shards = None;
            // Nothing can be done about a failure here; the next run removes the folder.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

/// The tensors of a file.
struct Types<'a> {
    mix: Mix,
    config: &'a ModelConfig,
    architecture: &'static str,
}

impl Types<'_> {
    /// The linears, as stored in the folder.
    fn linears(&self) -> Result<Vec<TensorSpec>> {
        let spec = |(id, linear): (LinearId, &LinearConfig)| {
            let [n, k] = linear.shape;
            let kind = linear_type(self.mix, self.config, &id, k)?;
            let row_bytes = kind.bytes(k).expect("a linear's type fits its rows");
            Ok(TensorSpec { name: id.weight(), dtype: Dtype::U8, shape: vec![n, row_bytes] })
        };
        self.config.linears().map(spec).collect()
    }

    /// All tensors, in the order of the file: those outside layers first.
    fn tensors(&self) -> Result<Vec<GgufTensor>> {
        let model = mix_model(self.config);
        let mut tensors = Vec::new();
        let mut add = |name: &str, shape: &[usize]| -> Result<()> {
            let Some(name) = names::in_gguf(name) else {
                let problem = format!("llama.cpp's `{}` has no tensor `{name}`", self.architecture);
                return Err(not_for_gguf(name, problem));
            };
            let kind = match shape {
                [_, columns] => self.mix.type_of(&name, *columns, &model),
                _ => BlockType::F32,
            };
            tensors.push(GgufTensor { name, kind, shape: shape.to_vec() });
            Ok(())
        };
        for (name, shape) in self.config.dense_tensors() {
            add(&name, &shape)?;
        }
        for (id, linear) in self.config.linears() {
            add(&id.weight(), &linear.shape)?;
            if linear.bias {
                add(&id.bias(), &linear.shape[..1])?;
            }
        }
        tensors.extend(rope_factors(self.config).map(|(tensor, _)| tensor));
        Ok(tensors)
    }
}

/// A dense tensor of the checkpoint, rounded to the tensor's type without a Hessian.
fn dense(checkpoint: &Checkpoint, name: &str, tensor: &GgufTensor) -> Result<Vec<u8>> {
    /// Weights that are widened at a time.
    const CHUNK: usize = 1 << 22;
    let halves = checkpoint.bytes_f16(name)?;
    let columns = tensor.shape.last().copied().unwrap_or(1);
    let mut bytes = Vec::with_capacity(tensor.bytes().unwrap_or_default());
    for halves in halves.chunks(2 * columns * (CHUNK / columns).max(1)) {
        let weights: Vec<f32> =
            halves.as_chunks().0.iter().map(|&half| f16::from_le_bytes(half).to_f32()).collect();
        bytes.extend(round_rows(tensor.kind, &weights, columns, None));
    }
    checkpoint.release([name]);
    Ok(bytes)
}
