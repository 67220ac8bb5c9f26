//! Reading a checkpoint folder: memory-mapped safetensors files, whose headers are checked first.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    ops::Range,
    path::{Path, PathBuf},
};

use memmap2::Mmap;
use safetensors::Dtype;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::{
    architectures::{CONFIG_FILE, ModelConfig},
    checkpoint::{
        gguf_file, header,
        packed::check_layout,
        pytorch_file, values,
        weights_file::{NoWeights, base_names, needs_base_name, weights_file},
        writer::TensorSpec,
    },
    error::{Error, Result, quoted},
    folder::{check_not_pointer, file_in, is_file_name},
    gguf::{Header, Stored},
    json::{Fields, read_json},
};

const NOT_IN_SHARD: &str = "that file does not hold it";

fn index_error(index: &Path, tensor: &str, shard: &str, problem: &'static str) -> Error {
    Error::Index { index: index.into(), tensor: tensor.into(), shard: shard.into(), problem }
}

/// A checkpoint: a folder, or a GGUF file. Files must not be changed while this lives.
#[derive(Debug)]
pub struct Checkpoint {
    /// The folder or the GGUF file.
    dir: PathBuf,
    config: ModelConfig,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Entry>,
    /// Texts in the headers of the safetensors files.
    metadata: BTreeMap<String, String>,
    /// Tensors that the index lists and their shard does not hold: the shard's name.
    absent: BTreeMap<String, String>,
    /// The index, if there is one.
    index: PathBuf,
    /// Factors of a tensor's numbers, for each element of its last axis.
    factors: BTreeMap<String, Vec<f32>>,
    /// The header of a GGUF file.
    gguf: Option<Header>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
}

/// Place of a tensor.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) shard: usize,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Bytes in the shard's file; inside it.
    pub(super) range: Range<usize>,
    /// The layout of the numbers, if `dtype` does not imply it.
    pub(super) stored: Option<Stored>,
}

/// A tensor as it lies in its file. `bytes` holds exactly `shape` elements of `dtype`, row-major, little-endian, at any
/// alignment; or else in the layout `stored`.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// Name in the file.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: &'a [usize],
    /// The elements.
    pub bytes: &'a [u8],
    /// Blocks or permuted rows of a GGUF file, whose `dtype` is U8.
    pub stored: Option<Stored>,
}

impl TensorView<'_> {
    /// The element type, as files name it: `F16`, `Q4_0`.
    pub fn type_name(&self) -> String {
        self.stored.map_or_else(|| format!("{:?}", self.dtype), |stored| stored.kind.to_string())
    }

    /// The type of the numbers that are loaded: fp32 for what a GGUF file stores otherwise.
    pub fn number_type(&self) -> Dtype {
        if self.stored.is_some() { Dtype::F32 } else { self.dtype }
    }
}

impl Checkpoint {
    /// Opens the folder `dir`: reads `config.json` and the headers, maps the weights, reads none of them. `dir` can also be a
    /// GGUF file; its tensors have the names that they have in a folder.
    ///
    /// [`weights_file`] chooses the file of the weights.
    ///
    /// # Errors
    /// When `config.json` or a header cannot be read, or no file or several files could be the weights.
    pub fn open(dir: &Path) -> Result<Self> {
        if dir.is_file() {
            return Self::open_gguf(dir);
        }
        let mut checkpoint = Self::empty(dir, ModelConfig::read(dir)?);
        let weights = file_in(dir, &chosen_weights(dir)?)?;
        match weights.extension().is_some_and(|extension| extension == "json") {
            true => checkpoint.add_indexed_shards(&weights)?,
            false => checkpoint.add_shard(weights)?,
        }
        Ok(checkpoint.with_names_as_stored())
    }

    /// Opens one weights file of a model that `config` describes, in a folder without `config.json`.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn of_file(path: &Path, config: ModelConfig) -> Result<Self> {
        let mut checkpoint = Self::empty(path.parent().unwrap_or(Path::new(".")), config);
        checkpoint.add_shard(path.into())?;
        Ok(checkpoint)
    }

    fn empty(dir: &Path, config: ModelConfig) -> Self {
        Self {
            dir: dir.into(),
            config,
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            metadata: BTreeMap::new(),
            absent: BTreeMap::new(),
            index: PathBuf::new(),
            factors: BTreeMap::new(),
            gguf: None,
        }
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let map = mapped(path)?;
        let (header, entries, config) = gguf_file::parse(path, &map)?;
        let mut checkpoint = Self::empty(path, ModelConfig::from_json(path, &config)?);
        checkpoint.tensors.extend(entries);
        checkpoint.shards.push(Shard { path: path.into(), map });
        checkpoint.gguf = Some(header);
        Ok(checkpoint)
    }

    /// The header and the whole content of a GGUF file; `None` for a folder.
    pub fn gguf(&self) -> Option<(&Header, &[u8])> {
        Some((self.gguf.as_ref()?, &self.shards.first()?.map))
    }

    /// Decoders beside other encoders are stored under one of two names.
    fn with_names_as_stored(mut self) -> Self {
        const IN_MEMORY: [&str; 2] = ["model.language_model.", "lm_head.weight"];
        let embedding = format!("{}embed_tokens.weight", IN_MEMORY[0]);
        if !self.contains(&self.config.embedding()) && self.contains(&embedding) {
            self.config = self.config.with_prefix(IN_MEMORY[0], IN_MEMORY[1]);
        }
        self
    }

    fn add_indexed_shards(&mut self, index: &Path) -> Result<()> {
        let value = read_json(index)?;
        let fields = Fields::new(index, "", &value)?;
        let weight_map = fields.get("weight_map").unwrap_or(&Value::Null);
        let mut shard_of = BTreeMap::new();
        for (tensor, shard) in Fields::new(index, "weight_map", weight_map)?.entries() {
            let shard = shard
                .as_str()
                .ok_or_else(|| fields.error(&format!("weight_map.{tensor}"), "the name of a shard", shard))?;
            shard_of.insert(tensor.as_str(), shard);
        }
        self.index = index.into();
        let problem = |tensor: &str, shard: &str, problem| index_error(index, tensor, shard, problem);
        let mut files = BTreeMap::new();
        for (&tensor, &shard) in &shard_of {
            files.entry(shard).or_insert(tensor);
        }
        for (shard, tensor) in files {
            if !is_file_name(shard) {
                return Err(problem(tensor, shard, "that is not a plain file name"));
            }
            let path = file_in(&self.dir, shard)?;
            if !path.is_file() {
                return Err(problem(tensor, shard, "there is no such file"));
            }
            self.add_shard(path)?;
        }
        for (tensor, shard) in shard_of {
            match self.tensors.get(tensor).map(|entry| self.shards[entry.shard].path.file_name()) {
                // An error only where it is needed: `view`.
                None => drop(self.absent.insert(tensor.into(), shard.into())),
                Some(found) if found.is_none_or(|name| name != shard) => {
                    return Err(problem(tensor, shard, NOT_IN_SHARD));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    fn add_shard(&mut self, path: PathBuf) -> Result<()> {
        let map = mapped(&path)?;
        let shard = self.shards.len();
        let entries = if path.extension().is_some_and(|extension| extension == "bin") {
            pytorch_file::parse(&path, map.len(), shard)?
        } else {
            let (data_start, metadata) = header::parse(&path, &map)?;
            self.metadata.extend(metadata.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())));
            let entry = |name: String| {
                let info = metadata.info(&name)?;
                let (start, end) = info.data_offsets;
                let range = data_start + start..data_start + end;
                Some((
                    name,
                    Entry { shard, dtype: info.dtype, shape: info.shape.clone(), range, stored: None },
                ))
            };
            metadata.offset_keys().into_iter().filter_map(entry).collect()
        };
        for (name, entry) in entries {
            if let Some(other) = self.tensors.get(&name) {
                let problem =
                    format!("tensor `{name}` is also in `{}`", self.shards[other.shard].path.display());
                return Err(Error::Safetensors { path, problem });
            }
            self.tensors.insert(name, entry);
        }
        self.shards.push(Shard { path, map });
        Ok(())
    }

    /// The tokens that end a text: those of `config.json` and those of `generation_config.json` in `folder`. Chat models often name the end of a
    /// turn in the second one alone.
    ///
    /// # Errors
    /// When `generation_config.json` is there and cannot be read.
    pub fn stop_token_ids(&self, folder: &Path) -> Result<Vec<u32>> {
        let mut ids = self.config.eos_token_ids.clone();
        let path = file_in(folder, "generation_config.json")?;
        if path.exists() {
            ids.extend(Fields::new(&path, "", &read_json(&path)?)?.token_ids("eos_token_id")?);
        }
        Ok(ids)
    }

    /// The model's config.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Texts in the headers of the safetensors files (`__metadata__`).
    pub(super) fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Bytes of all tensors together.
    pub fn bytes_total(&self) -> u64 {
        self.tensors.values().map(|entry| entry.range.len() as u64).sum()
    }

    /// The tensor `name` as it lies in its file.
    pub fn view(&self, name: &str) -> Result<TensorView<'_>> {
        let (name, entry) = self.tensors.get_key_value(name).ok_or_else(|| match self.absent.get(name) {
            Some(shard) => index_error(&self.index, name, shard, NOT_IN_SHARD),
            None => Error::MissingTensor { name: name.into(), path: self.dir.clone() },
        })?;
        let bytes = &self.shards[entry.shard].map[entry.range.clone()];
        Ok(TensorView { name, dtype: entry.dtype, shape: &entry.shape, bytes, stored: entry.stored })
    }

    /// Rows of the matrix `name`, one after another, and their type; those of blocks become fp32.
    ///
    /// # Errors
    /// When the tensor is missing or memory is exhausted.
    ///
    /// # Panics
    /// When a row is not there.
    pub fn rows(&self, name: &str, rows: impl Iterator<Item = usize>) -> Result<(Vec<u8>, Dtype)> {
        let view = self.view(name)?;
        let width = view.bytes.len() / view.shape.first().copied().unwrap_or(1).max(1);
        let bytes: Vec<u8> = rows.flat_map(|row| &view.bytes[row * width..][..width]).copied().collect();
        let Some(stored) = view.stored else { return Ok((bytes, view.dtype)) };
        let elements = bytes.len() / stored.kind.block_bytes() * stored.kind.block_len();
        let numbers = Stored { heads: None, ..stored }.decode(&[elements], &bytes);
        Ok((bytemuck::cast_slice(&numbers).to_vec(), Dtype::F32))
    }

    /// The tensor `name`, which must have this shape, whatever its dtype. Reads the header only.
    pub fn view_shaped(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>> {
        let view = self.view(name)?;
        if view.shape != shape {
            return Err(Error::TensorShape {
                name: name.into(),
                expected: shape.into(),
                found: view.shape.into(),
            });
        }
        Ok(view)
    }

    /// Checks, before any work, that this is a dense checkpoint with every tensor of the config, in its shape, as F16, BF16 or
    /// F32. It reads headers only, and the tensors of [`Checkpoint::check_tied`].
    pub fn check(&self) -> Result<()> {
        if let Some(found) = self.quantization_mark() {
            return Err(Error::CheckpointKind {
                path: self.dir.clone(),
                expected: "an unquantized fp16, bf16 or fp32 model",
                found,
            });
        }
        for (name, shape) in self.config.dense_tensors() {
            values::kind_of(&self.view_shaped(&name, &shape)?)?;
        }
        for (id, linear) in self.config.linears() {
            values::kind_of(&self.view_shaped(&id.weight(), &linear.shape)?)?;
            if linear.bias {
                values::kind_of(&self.view_shaped(&id.bias(), &linear.shape[..1])?)?;
            }
        }
        self.check_undeclared()?;
        self.check_tied()
    }

    /// Checks that no decoder layer has a nonzero tensor that is not in the config: the model needs it to compute its function.
    /// Scales of a key-value cache and buffers of old files do not count.
    ///
    /// # Errors
    /// When there is one.
    pub fn check_undeclared(&self) -> Result<()> {
        const HARMLESS: [&str; 6] =
            ["inv_freq", "k_scale", "v_scale", "kv_scale", "masked_bias", "attn.bias"];
        let layers = format!("{}layers.", self.config.prefix);
        // Readers ignore layers after the last one, which predict further tokens.
        let layer = |name: &str| name.strip_prefix(&layers)?.split('.').next()?.parse::<usize>().ok();
        let own = |name: &&str| layer(name).is_some_and(|layer| layer < self.config.num_layers());
        // Parts of a packed linear that another part is missing of are that linear's error.
        let of_packed = |name: &str| {
            let part =
                ["qweight", "qzeros", "scales", "g_idx"].into_iter().find_map(|part| name.strip_suffix(part));
            part.and_then(|start| start.strip_suffix('.'))
                .is_some_and(|linear| self.config.linears().any(|(id, _)| id.to_string() == linear))
        };
        // Packed files of 2023 have a bias for each linear, of zeros where the model has none.
        let biases: Vec<String> =
            self.config.linears().filter(|(_, linear)| !linear.bias).map(|(id, _)| id.bias()).collect();
        let biases = biases.iter().map(String::as_str).filter(|name| self.contains(name));
        for (id, _) in self.config.linears() {
            check_layout(self, &id)?;
        }
        for name in self.extra().into_iter().filter(own).chain(biases) {
            if of_packed(name) || HARMLESS.iter().any(|end| name.ends_with(end)) {
                continue;
            }
            // Minus zero is zero, too.
            if self.view(name)?.bytes.iter().any(|byte| byte & 0x7f != 0) {
                return Err(Error::UndeclaredTensor { name: name.into(), path: self.dir.clone() });
            }
        }
        Ok(())
    }

    /// Checks that an output layer that is tied, but stored, is the embedding. If it is not, transformers 5 takes what is
    /// stored, and others the embedding.
    pub fn check_tied(&self) -> Result<()> {
        let (lm_head, embed_tokens) = (&self.config.lm_head, &self.config.embedding());
        if !self.config.tie_word_embeddings || !self.contains(lm_head) {
            return Ok(());
        }
        let (head, embedding) = (self.view(lm_head)?, self.view(embed_tokens)?);
        let same = (head.dtype, head.bytes) == (embedding.dtype, embedding.bytes);
        self.release([lm_head, embed_tokens]);
        if same {
            return Ok(());
        }
        Err(Error::Config {
            path: self.dir.join(CONFIG_FILE),
            key: "tie_word_embeddings".into(),
            expected: format!("false, as `{lm_head}` is stored and is not the embedding"),
            found: "true".into(),
        })
    }

    /// Evidence that the model is quantized already, if there is any.
    pub fn quantization_mark(&self) -> Option<String> {
        if self.gguf.is_some() {
            return Some("a GGUF file".into());
        }
        if let Some(quantization) = self.config.raw().get("quantization_config").filter(|v| !v.is_null()) {
            let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unnamed");
            return Some(format!("a quantized one (quant_method `{method}` in `config.json`)"));
        }
        let name = self.names().find(|name| name.ends_with(".qweight"))?;
        Some(format!("a quantized one (tensor `{name}`)"))
    }

    /// Tensors that are not in the config, sorted: worth a warning, and not read. The `rotary_emb.inv_freq` buffers of old
    /// files are not listed, nor what belongs to a packed linear.
    pub fn extra(&self) -> Vec<&str> {
        let mut known: HashSet<String> =
            self.config.dense_tensors().into_iter().map(|(name, _)| name).collect();
        for (id, linear) in self.config.linears() {
            let packed = self.contains(&id.qweight());
            if packed || linear.bias {
                known.insert(id.bias());
            }
            if packed {
                known.extend([id.qweight(), id.qzeros(), id.scales(), id.g_idx(), id.float_zeros()]);
            } else {
                known.insert(id.weight());
            }
        }
        let extra = |name: &&str| {
            !known.contains(*name)
                && !name.ends_with(".rotary_emb.inv_freq")
                && !self.config.is_passed_through(name)
        };
        self.names().filter(extra).collect()
    }

    /// A warning about tensors that the index lists, no shard holds and the model does not need. One that it needs is an error
    /// where it is read.
    pub fn absent(&self) -> Option<String> {
        let mut needed: HashSet<String> =
            self.config.dense_tensors().into_iter().map(|(name, _)| name).collect();
        for (id, linear) in self.config.linears() {
            needed.extend([id.weight(), id.qweight(), id.qzeros(), id.scales(), id.g_idx()]);
            needed.extend(linear.bias.then(|| id.bias()));
        }
        let absent: Vec<&String> = self.absent.keys().filter(|name| !needed.contains(*name)).collect();
        let named = quoted(absent.iter().take(3));
        let (count, index) = (absent.len(), self.index.file_name().unwrap_or_default().display());
        (count > 0).then(|| {
            format!(
                "`{index}` lists tensors that no shard holds ({count}): {named}; the model does not need them"
            )
        })
    }

    /// Tensors that are no part of the decoder and stay as they are, sorted: encoders of other inputs.
    ///
    /// # Errors
    /// When one is of a type that is not written.
    pub fn passed_through(&self) -> Result<Vec<TensorSpec>> {
        let spec = |name: &str| {
            let view = self.view(name)?;
            values::kind_of(&view)?;
            Ok(TensorSpec { name: name.to_owned(), dtype: view.dtype, shape: view.shape.to_vec() })
        };
        self.names().filter(|name| self.config.is_passed_through(name)).map(spec).collect()
    }

    /// The same folder, with some tensors multiplied by a factor for each element of their last axis, by name.
    /// [`Checkpoint::load`] and [`Checkpoint::bytes_f16`] apply the factors; [`Checkpoint::view`] returns the file's bytes.
    pub fn scaled(&self, factors: BTreeMap<String, Vec<f32>>) -> Result<Self> {
        for (name, factors) in &factors {
            let shape = self.view(name)?.shape;
            debug_assert_eq!(shape.last(), Some(&factors.len()), "{name} has a factor for each element");
        }
        Ok(Self { factors, ..Self::open(&self.dir)? })
    }

    /// Calls `use_it` with the tensor as plain numbers, multiplied by its factors if it has any.
    fn with_factors<T>(
        &self,
        view: TensorView<'_>,
        use_it: impl FnOnce(&TensorView<'_>) -> Result<T>,
    ) -> Result<T> {
        if let Some(stored) = view.stored {
            let numbers = stored.decode(view.shape, view.bytes);
            let bytes = bytemuck::cast_slice(&numbers);
            return use_it(&TensorView { dtype: Dtype::F32, bytes, stored: None, ..view });
        }
        let Some(factors) = self.factors.get(view.name) else { return use_it(&view) };
        let bytes = values::scaled(&view, factors)?;
        use_it(&TensorView { dtype: Dtype::F32, bytes: &bytes, ..view })
    }

    /// A copy of the tensor `name`, which must have this shape and be F16, BF16 or F32, as `kind` on `device`.
    /// NaN, infinity and, for [`Kind::Half`], numbers beyond fp16 are errors.
    pub fn load(&self, name: &str, shape: &[usize], kind: Kind, device: Device) -> Result<Tensor> {
        let view = self.view_shaped(name, shape)?;
        self.with_factors(view, |view| {
            values::check(view, kind == Kind::Half)?;
            values::to_tensor(view, kind, device)
        })
    }

    /// As [`Checkpoint::load`], into a tensor of the shape and the kind that are expected.
    pub fn load_into(&self, name: &str, to: &mut Tensor) -> Result<()> {
        let shape: Vec<usize> = to.size().iter().map(|&size| size as usize).collect();
        let view = self.view_shaped(name, &shape)?;
        self.with_factors(view, |view| {
            values::check(view, to.kind() == Kind::Half)?;
            values::copy_to(view, to)
        })
    }

    /// Refuses the tensor `name` when it holds NaN, infinity or numbers beyond fp16.
    pub fn check_f16(&self, name: &str) -> Result<()> {
        self.with_factors(self.view(name)?, |view| values::check(view, true))
    }

    /// The tensor `name` as little-endian fp16 bytes for a writer, borrowed when it is fp16 already. Checked as
    /// in [`Checkpoint::load`].
    pub fn bytes_f16(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        let view = self.view(name)?;
        if self.factors.contains_key(name) || view.stored.is_some() {
            return self.with_factors(view, |view| Ok(Cow::Owned(values::f16_bytes(view)?.into_owned())));
        }
        values::f16_bytes(&view)
    }

    /// Advises the system that these tensors' pages are not needed for now. The resident memory of a run then does not grow
    /// with its reads. The tensors can be read again at any time. Failures are ignored, and unknown names are skipped.
    pub fn release<S: AsRef<str>>(&self, names: impl IntoIterator<Item = S>) {
        for name in names {
            if let Some(entry) = self.tensors.get(name.as_ref()) {
                self.release_entry(entry);
            }
        }
    }

    /// [`Checkpoint::release`] for every tensor of decoder layer `layer`.
    pub fn release_layer(&self, layer: usize) {
        let prefix = self.config.layer_prefix(layer);
        let tensors = self.tensors.range(prefix.clone()..);
        tensors
            .take_while(|(name, _)| name.starts_with(&prefix))
            .for_each(|(_, entry)| self.release_entry(entry));
    }

    fn release_entry(&self, entry: &Entry) {
        #[cfg(unix)]
        {
            let map = &self.shards[entry.shard].map;
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the map is shared, read-only and backed by a file, so that dropped pages come back from the
            // file with the same contents; borrowed views stay valid.
            let _ = unsafe { map.unchecked_advise_range(advice, entry.range.start, entry.range.len()) };
        }
        #[cfg(not(unix))]
        let _ = entry;
    }
}

/// The memory map of a file.
fn mapped(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    // SAFETY: the map is only read, and `Checkpoint` asks that the files stay as they are while it lives.
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
    check_not_pointer(path, &map)?;
    Ok(map)
}

/// The name of the folder's weights file, or of the index of its shards.
fn chosen_weights(dir: &Path) -> Result<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
        let entry = entry.map_err(Error::io("read", dir))?;
        // Folders do not count, nor links to missing files, in an incomplete cache.
        names.extend(entry.file_name().into_string().ok().filter(|_| entry.path().is_file()));
    }
    names.sort();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let base_names = if needs_base_name(&names) { base_names(dir)? } else { Vec::new() };
    weights_file(&names, &base_names).map(str::to_owned).map_err(|lack| match lack {
        NoWeights::Missing(missing) => Error::NotACheckpoint { path: dir.into(), missing },
        NoWeights::Several(found) => Error::SeveralWeights { path: dir.into(), found },
        NoWeights::OtherFormat(found) => Error::WeightsFormat { path: dir.into(), found },
    })
}
