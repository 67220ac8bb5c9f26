//! A branch as one GGUF file for llama.cpp, with its codes and scales as they are.

mod blocks;
mod metadata;
mod mix;
mod tokenizer;

use std::path::Path;

pub use mix::{GgufBranchWriter, embedding_type, linear_type};

use serde::Serialize;

use crate::{
    architectures::ModelConfig,
    checkpoint::{Checkpoint, Dtype, QuantizationConfig, packed},
    error::{Error, Result},
    ggml::BlockType,
    gguf::{GgufPlan, GgufTensor, GgufWriter, LLAMA, Metadata, names, permuted},
    progress::Progress,
    variant::Bits,
};

/// Types that the embedding and the output layer can have.
pub const DENSE_TYPES: [BlockType; 3] = [BlockType::Q8_0, BlockType::F16, BlockType::F32];

/// Choices of a file.
#[derive(Debug, Clone)]
pub struct GgufOptions {
    /// The model's name in the file.
    pub name: String,
    /// Type of the embedding, one of [`DENSE_TYPES`].
    pub token_embedding: BlockType,
    /// Type of the output layer, one of [`DENSE_TYPES`]; `None`: Q8_0 where there is one.
    pub output: Option<BlockType>,
}

/// A file that was written.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GgufFile {
    /// Its quantization: `Q4_0` or `Q8_0`.
    pub quantization: String,
    /// Its tensors.
    pub tensors: usize,
    /// Its bytes.
    pub bytes: u64,
    /// Differences between llama.cpp's computation and the branch's, each a sentence for the user.
    pub notes: Vec<String>,
}

/// Writes the GPTQ `branch` as the file `out`, which appears there complete. Codes and scales are moved bit by bit. Other tensors
/// come from the unquantized `source`, in its precision, where the branch has the same numbers rounded to fp16.
///
/// # Errors
/// When the branch cannot be held without loss, `out` exists, a file cannot be read, or the disk is full.
pub fn write_gguf(
    branch: &Checkpoint,
    source: Option<&Checkpoint>,
    out: &Path,
    options: &GgufOptions,
    progress: &dyn Progress,
) -> Result<GgufFile> {
    let (dir, config) = (branch.dir(), branch.config());
    let quantization = QuantizationConfig::read(branch)?;
    branch.check_undeclared()?;
    let architecture = metadata::architecture(dir, config)?;
    if let Some(kind) = options.output.filter(|_| config.tie_word_embeddings) {
        let expected = "no type, as the output layer is the embedding".into();
        return Err(Error::Value { what: "--output".into(), expected, found: kind.to_string() });
    }
    let parts = Parts { branch, source, config, architecture, options, quantization };
    let tensors = parts.tensors()?;
    // Types of files, as llama.cpp numbers them.
    let (kind, file_type) = match parts.quantization.bits {
        Bits::Four => (BlockType::Q4_0, 2),
        _ => (BlockType::Q8_0, 7),
    };
    let elements = tensors.iter().map(|(tensor, _)| tensor.shape.iter().product::<usize>()).sum();
    let values = metadata_of(dir, config, architecture, &options.name, file_type, elements)?;
    let plan = GgufPlan::new(values, tensors.iter().map(|(tensor, _)| tensor.clone()).collect())?;
    let bytes = plan.total_bytes();
    let mut writer = GgufWriter::create(out, plan)?;
    progress.begin("writing tensors", tensors.len() as u64);
    for (tensor, content) in &tensors {
        writer.write(&tensor.name, &parts.bytes(tensor, content)?)?;
        progress.advance(1);
    }
    writer.finish()?;
    let quantization = kind.to_string();
    Ok(GgufFile { quantization, tensors: tensors.len(), bytes, notes: metadata::notes(config) })
}

/// Source of a tensor's numbers.
enum Content {
    RopeFactors(Vec<u8>),
    /// A packed linear, by layer and position.
    Codes(usize, usize),
    /// A tensor of the branch.
    Dense(String),
}

struct Parts<'a> {
    branch: &'a Checkpoint,
    source: Option<&'a Checkpoint>,
    config: &'a ModelConfig,
    architecture: &'static str,
    options: &'a GgufOptions,
    quantization: QuantizationConfig,
}

impl Parts<'_> {
    fn refused(&self, problem: String, instead: &str) -> Error {
        Error::NotForGguf { path: self.branch.dir().into(), problem, instead: instead.to_owned() }
    }

    /// All tensors, each checked to fit.
    fn tensors(&self) -> Result<Vec<(GgufTensor, Content)>> {
        let mut tensors = Vec::new();
        let mut add = |name: &str, kind: BlockType, shape: &[usize], content| {
            let Some(name) = names::in_gguf(name) else {
                let problem = format!("llama.cpp's `{}` has no tensor `{name}`", self.architecture);
                return Err(self.refused(problem, "no file of this architecture computes the same"));
            };
            tensors.push((GgufTensor { name, kind, shape: shape.to_vec() }, content));
            Ok(())
        };
        for (name, shape) in self.config.dense_tensors() {
            let kind = self.dense_type(&name);
            let row = shape.last().copied().unwrap_or(1);
            if !row.is_multiple_of(kind.block_len()) {
                let problem = format!("rows of `{name}` have {row} features, no whole blocks of {kind}");
                return Err(self.refused(problem, "use --token-embedding f16 and --output f16"));
            }
            self.branch.view_shaped(&name, &shape)?;
            add(&name, kind, &shape, Content::Dense(name.clone()))?;
        }
        for (layer, position) in self.config.linear_positions() {
            let (id, linear) =
                (self.config.linear_id(layer, position), &self.config.layers[layer].linears[position]);
            let (kind, content) = match packed(self.branch, &id, linear, &self.quantization)? {
                Some(tensors) => {
                    let kind = blocks::lossless_type(&id, &tensors);
                    let refused = |refusal: blocks::Refusal| self.refused(refusal.problem, refusal.instead);
                    (kind.map_err(refused)?, Content::Codes(layer, position))
                }
                None => {
                    self.branch.view_shaped(&id.weight(), &linear.shape)?;
                    (BlockType::F16, Content::Dense(id.weight()))
                }
            };
            add(&id.weight(), kind, &linear.shape, content)?;
            if linear.bias {
                add(&id.bias(), BlockType::F32, &linear.shape[..1], Content::Dense(id.bias()))?;
            }
        }
        let factors = rope_factors(self.config);
        tensors.extend(factors.map(|(tensor, bytes)| (tensor, Content::RopeFactors(bytes))));
        Ok(tensors)
    }

    fn dense_type(&self, name: &str) -> BlockType {
        match name {
            name if name == self.config.embedding() => self.options.token_embedding,
            name if name == self.config.lm_head => self.options.output.unwrap_or(BlockType::Q8_0),
            // Norms.
            _ => BlockType::F32,
        }
    }

    fn bytes(&self, tensor: &GgufTensor, content: &Content) -> Result<Vec<u8>> {
        let bytes = match content {
            Content::RopeFactors(bytes) => bytes.clone(),
            Content::Codes(layer, position) => {
                let (id, linear) = (
                    self.config.linear_id(*layer, *position),
                    &self.config.layers[*layer].linears[*position],
                );
                let packed = packed(self.branch, &id, linear, &self.quantization)?;
                let packed = packed.ok_or_else(|| Error::MissingTensor {
                    name: id.qweight(),
                    path: self.branch.dir().into(),
                })?;
                let bytes = blocks::lossless(&packed, tensor.kind);
                self.branch.release([id.qweight(), id.scales(), id.qzeros(), id.g_idx()]);
                bytes
            }
            Content::Dense(name) => self.dense(name, tensor.kind)?,
        };
        Ok(ordered(self.config, self.architecture, tensor, bytes))
    }

    /// A tensor of the branch, or of the source where that has more digits of the same numbers.
    fn dense(&self, name: &str, kind: BlockType) -> Result<Vec<u8>> {
        // Checks that the numbers are finite and fit fp16, too.
        let own = self.branch.bytes_f16(name)?;
        let (mut bytes, mut from) = (own, BlockType::F16);
        if let Some(source) = self.source.filter(|source| source.contains(name)) {
            let view = source.view_shaped(name, self.branch.view(name)?.shape)?;
            let finer = match view.dtype {
                Dtype::F32 => Some(BlockType::F32),
                Dtype::BF16 => Some(BlockType::BF16),
                _ => None,
            };
            if let Some(finer) =
                finer.filter(|_| source.bytes_f16(name).is_ok_and(|rounded| rounded == bytes))
            {
                (bytes, from) = (view.bytes.into(), finer);
            }
        }
        let made = blocks::converted(&bytes, from, kind);
        self.branch.release([name]);
        self.source.into_iter().for_each(|source| source.release([name]));
        made
    }
}

/// All metadata of a file, the tokenizer's with it.
fn metadata_of(
    dir: &Path,
    config: &ModelConfig,
    architecture: &str,
    name: &str,
    file_type: u32,
    elements: usize,
) -> Result<Metadata> {
    let mut values = metadata::model(dir, config, architecture, name, file_type, elements)?;
    tokenizer::add(&mut values, dir, config.raw(), config.vocab_size)?;
    Ok(values)
}

/// The factors of a Llama 3.1's rotary frequencies, as a tensor and its bytes; none for other models.
fn rope_factors(config: &ModelConfig) -> Option<(GgufTensor, Vec<u8>)> {
    let factors = metadata::rope_factors(config.layers[0].attention.rope.as_ref()?)?;
    let (name, shape) = (names::ROPE_FREQS.to_owned(), vec![factors.len()]);
    let bytes = factors.iter().flat_map(|factor| factor.to_le_bytes()).collect();
    Some((GgufTensor { name, kind: BlockType::F32, shape }, bytes))
}

/// The bytes of a tensor with its rows in llama.cpp's order.
fn ordered(config: &ModelConfig, architecture: &str, tensor: &GgufTensor, bytes: Vec<u8>) -> Vec<u8> {
    let attention = &config.layers[0].attention;
    let heads = match &tensor.name {
        _ if architecture != LLAMA => return bytes,
        name if names::is_q(name) => attention.num_heads,
        name if names::is_k(name) => attention.num_kv_heads,
        _ => return bytes,
    };
    permuted(&bytes, tensor.shape[0], heads)
}
