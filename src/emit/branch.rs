//! One branch on disk.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::metadata::{Provenance, quantize_config_json, quantized_config_json};
use crate::{
    architectures::{CONFIG_FILE, LinearId, ModelConfig},
    checkpoint::{
        Checkpoint, Dtype, QUANTIZE_CONFIG_FILE, ShardPlan, ShardWriter, TensorSpec, UNFINISHED,
        check_pack_factor,
    },
    error::{Error, Result},
    folder,
    gptq::solver::Solved,
    pack::PackedLinear,
    units::hex,
    variant::Variant,
};

/// File with the digests of all tensors and other files, by which `verify` names a damaged one.
pub const CHECKSUMS_FILE: &str = "checksums.json";

/// Files that belong to the tokenizer or to generation, copied as they are.
pub const COPIED_FILES: [&str; 9] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];

/// The content of [`CHECKSUMS_FILE`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Checksums {
    /// Always `sha256`.
    pub algorithm: String,
    /// Digest of each tensor's bytes, hexadecimal.
    pub tensors: BTreeMap<String, String>,
    /// Digest of each other file.
    pub files: BTreeMap<String, String>,
}

/// A branch that is being written, into a hidden folder beside its final place. Dropping it removes the folder, unless the
/// branch was published or committed.
#[derive(Debug)]
pub struct BranchWriter {
    variant: Variant,
    partial: PathBuf,
    shards: Option<ShardWriter>,
    /// Whether the folder stays when this is dropped.
    keep: bool,
}

/// An output of a run while it is written. A further format implements this trait. A run calls `encode` with each solved
/// linear, `commit` after each layer, and `finish` after the last one.
///
/// A format with one file of codes `[K, N]` for each linear:
///
/// ```
/// use std::{collections::BTreeMap, fs, path::{Path, PathBuf}};
///
/// use gptq::{
///     Error, Result,
///     architectures::LinearId,
///     checkpoint::Checkpoint,
///     emit::{OutputWriter, Provenance},
///     gptq::{Hessian, solver::{CpuSolver, Solved, Solver, Weight}},
///     units::hex,
///     variant::Variant,
/// };
/// use sha2::{Digest, Sha256};
/// use tch::{Device, Kind, Tensor};
///
/// struct CodeFiles {
///     folder: PathBuf,
///     digests: BTreeMap<String, String>,
/// }
///
/// impl OutputWriter for CodeFiles {
///     fn encode(&mut self, id: &LinearId, linear: &Solved) -> Result<()> {
///         let (name, linear) = (format!("{id}.codes"), linear.on_host()?);
///         let path = self.folder.join(&name);
///         fs::write(&path, linear.codes()).map_err(Error::io("write", &path))?;
///         self.digests.insert(name, hex(&Sha256::digest(linear.codes())));
///         Ok(())
///     }
///
///     fn commit(&mut self) -> Result<BTreeMap<String, String>> {
///         for name in self.digests.keys() {
///             let path = self.folder.join(name);
///             fs::File::open(&path).and_then(|file| file.sync_all()).map_err(Error::io("sync", &path))?;
///         }
///         Ok(self.digests.clone())
///     }
///
///     fn finish(&mut self, _: &Checkpoint, original: &Checkpoint, _: &Provenance) -> Result<PathBuf> {
///         let (from, to) = (original.dir().join("tokenizer.json"), self.folder.join("tokenizer.json"));
///         fs::copy(&from, to).map_err(Error::io("copy", &from))?;
///         Ok(self.folder.clone())
///     }
/// }
///
/// // The first linear of a model, solved with inputs from a normal distribution.
/// let checkpoint = Checkpoint::open(Path::new("calibration/demo"))?;
/// let (id, linear) = checkpoint.config().linears().next().expect("a linear");
/// let weight = checkpoint.load(&id.weight(), &linear.shape, Kind::Float, Device::Cpu)?;
/// let mut hessian = Hessian::new(linear.shape[1], Device::Cpu)?;
/// hessian.add(&Tensor::randn([512, linear.shape[1] as i64], (Kind::Float, Device::Cpu)))?;
/// let variant: Variant = "4bit-128g".parse()?;
/// let factor = CpuSolver::new().factorize(&hessian.finish("q")?, variant.sorting(false), 0.01, "q")?;
/// let solved = factor.solve(&[Weight { name: "q", values: &weight }], &variant)?;
///
/// let folder = tempfile::tempdir()?;
/// let mut output = CodeFiles { folder: folder.path().into(), digests: BTreeMap::new() };
/// output.encode(&id, &solved[0].linear)?;
/// assert_eq!(output.commit()?.len(), 1);
/// let codes = fs::read(folder.path().join("model.layers.0.self_attn.q_proj.codes"))?;
/// assert!(codes.len() == linear.shape[0] * linear.shape[1] && codes.iter().all(|&code| code < 16));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// In a run the variant chooses the format: `pipeline/output_format.rs` has one line for each.
pub trait OutputWriter: Send {
    /// Encodes and writes one linear.
    ///
    /// # Errors
    /// When the disk is full, or the device that holds the linear fails.
    fn encode(&mut self, id: &LinearId, linear: &Solved) -> Result<()>;

    /// Makes the linears so far durable; from now on dropping keeps them. Returns the digests of the written tensors, which
    /// reopening needs.
    ///
    /// # Errors
    /// When the disk fails.
    fn commit(&mut self) -> Result<BTreeMap<String, String>>;

    /// Writes everything else: dense tensors and configs of the quantized `checkpoint`; tokenizer, licences and copied tensors of the
    /// `original`; checksums. Returns the written file or folder, not yet at its final place, for checking.
    ///
    /// # Errors
    /// When a linear is missing, the source cannot be read, or the disk is full.
    fn finish(
        &mut self,
        checkpoint: &Checkpoint,
        original: &Checkpoint,
        provenance: &Provenance,
    ) -> Result<PathBuf>;
}

impl BranchWriter {
    /// Creates `out/<branch>` with its weights files at full size; `passed_through` are tensors that are copied as they are.
    ///
    /// # Errors
    /// When the branch exists, the variant does not fit the model, or the disk is full.
    pub fn create(
        out: &Path,
        branch: &str,
        variant: Variant,
        config: &ModelConfig,
        passed_through: &[TensorSpec],
        max_shard_size: u64,
    ) -> Result<Self> {
        let [path, partial] = places(out, branch);
        let plan = ShardPlan::new(tensors(&variant, config, passed_through)?, max_shard_size)?;
        if path.exists() {
            return Err(Error::OutputExists { path });
        }
        fs::create_dir(&partial).map_err(Error::io("create", &partial))?;
        let mut writer = Self { variant, partial, shards: None, keep: false };
        writer.shards = Some(ShardWriter::create(&writer.partial, plan)?);
        Ok(writer)
    }

    /// Reopens a branch that was created with the same arguments and committed when the tensors of `sha256` were written.
    ///
    /// # Errors
    /// When the files are not those that were committed.
    pub fn reopen(
        out: &Path,
        branch: &str,
        variant: Variant,
        config: &ModelConfig,
        passed_through: &[TensorSpec],
        max_shard_size: u64,
        sha256: BTreeMap<String, String>,
    ) -> Result<Self> {
        let [_, partial] = places(out, branch);
        let plan = ShardPlan::new(tensors(&variant, config, passed_through)?, max_shard_size)?;
        remove_unfinished(&partial)?;
        let shards = Some(ShardWriter::reopen(&partial, plan, sha256)?);
        Ok(Self { variant, partial, shards, keep: true })
    }

    fn shards(&mut self) -> &mut ShardWriter {
        self.shards.as_mut().expect("written to before it is sealed")
    }
}

impl OutputWriter for BranchWriter {
    fn encode(&mut self, id: &LinearId, linear: &Solved) -> Result<()> {
        let packed = PackedLinear::of_solved(linear)?;
        for (suffix, bytes) in packed.tensors() {
            self.shards().write(&format!("{id}.{suffix}"), bytes)?;
        }
        Ok(())
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
        let (config, source) = (checkpoint.config(), original.dir());
        for name in config.dense_tensors().into_iter().map(|(name, _)| name).chain(config.linear_biases()) {
            let bytes = checkpoint.bytes_f16(&name)?;
            self.shards().write(&name, &bytes)?;
            checkpoint.release([&name]);
        }
        for TensorSpec { name, .. } in original.passed_through()? {
            self.shards().write(&name, original.view(&name)?.bytes)?;
            original.release([&name]);
        }
        let written = self.shards.take().expect("sealed once").finish()?;

        let mut checksums =
            Checksums { algorithm: "sha256".into(), tensors: written.tensor_sha256, files: BTreeMap::new() };
        for (name, _) in written.files.iter().filter(|(name, _)| name.ends_with(".json")) {
            let path = self.partial.join(name);
            let index = fs::read(&path).map_err(Error::io("read", &path))?;
            checksums.files.insert(name.clone(), hex(&Sha256::digest(index)));
        }
        let write = |name: &str, bytes: &[u8]| {
            let path = self.partial.join(name);
            fs::write(&path, bytes).map_err(Error::io("write", &path))?;
            sync(&path)
        };
        let mut add = |name: &str, bytes: &[u8]| {
            checksums.files.insert(name.into(), hex(&Sha256::digest(bytes)));
            write(name, bytes)
        };
        add(CONFIG_FILE, &pretty(&quantized_config_json(config.raw(), &self.variant, provenance)))?;
        add(QUANTIZE_CONFIG_FILE, &pretty(&quantize_config_json(&self.variant, provenance)))?;
        for name in copied(source)? {
            let file = folder::file_in(source, &name)?;
            let bytes = folder::read(&file, folder::TEXT_LIMIT)?;
            // Readers refuse JSON with a byte order mark.
            let json = name.ends_with(".json");
            add(&name, if json { folder::without_mark(&bytes) } else { &bytes })?;
        }
        let text = serde_json::to_value(&checksums)
            .map_err(|source| Error::Json { path: self.partial.join(CHECKSUMS_FILE), source })?;
        write(CHECKSUMS_FILE, &pretty(&text))?;
        sync(&self.partial)?;
        Ok(self.partial.clone())
    }
}

impl Drop for BranchWriter {
    fn drop(&mut self) {
        if !self.keep {
            self.shards = None;
            // Nothing can be done about a failure here; the next run removes the folder.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

/// Whether a file name is that of a licence, a notice or a use policy, which go wherever the weights go.
pub fn is_licence(name: &str) -> bool {
    const BEGIN: [&str; 5] = ["LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "ACCEPTABLE_USE"];
    let name = name.to_ascii_uppercase().replace('-', "_");
    BEGIN.iter().any(|begin| name.starts_with(begin)) && !name.contains('/')
}

/// Moves a sealed branch to its final place, unless it is there already; of a GGUF file, the file in its folder. Returns its size
/// in bytes.
///
/// # Errors
/// When the move fails.
pub fn publish(out: &Path, branch: &str) -> Result<u64> {
    let [path, partial] = places(out, branch);
    let file = partial.join(branch);
    if file.is_file() {
        fs::rename(&file, &path).map_err(Error::io("rename", &file))?;
        sync(out)?;
    }
    if path.is_file() {
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(Error::io("remove", &partial))?;
        }
        return Ok(fs::metadata(&path).map_err(Error::io("read", &path))?.len());
    }
    if partial.exists() {
        fs::rename(&partial, &path).map_err(Error::io("rename", &partial))?;
        sync(out)?;
    }
    let mut bytes = 0;
    for entry in fs::read_dir(&path).map_err(Error::io("read", &path))? {
        let entry = entry.map_err(Error::io("read", &path))?;
        bytes += entry.metadata().map_err(Error::io("read", entry.path()))?.len();
    }
    Ok(bytes)
}

/// Final and temporary place of a branch.
pub fn places(out: &Path, branch: &str) -> [PathBuf; 2] {
    [out.join(branch), out.join(format!(".{branch}.partial"))]
}

/// Removes the unfinished files that a killed program left in a folder.
///
/// # Errors
/// When the folder cannot be read or a file not be removed.
pub fn remove_unfinished(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let entry = entry.map_err(Error::io("read", folder))?;
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            fs::remove_file(entry.path()).map_err(Error::io("remove", entry.path()))?;
        }
    }
    Ok(())
}

/// Whether a file name is that of a branch that is being written, or was when its run was killed.
pub fn is_partial(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(".partial")
}

/// Bytes of all files of a branch, with some to spare for configs and checksums.
///
/// # Errors
/// When the variant does not fit the model.
pub fn planned_bytes(
    variant: &Variant,
    config: &ModelConfig,
    original: &Checkpoint,
    max_shard_size: u64,
) -> Result<u64> {
    /// Both configs.
    const CONFIGS: u64 = 64 << 10;
    /// A tensor's line in the checksums and in an index of shards.
    const LINES: u64 = 512;
    let (tensors, source) = (tensors(variant, config, &original.passed_through()?)?, original.dir());
    let lines = tensors.len() as u64 * LINES;
    let copied = COPIED_FILES.iter().filter_map(|name| fs::metadata(source.join(name)).ok());
    let copied: u64 = copied.map(|file| file.len()).sum();
    Ok(ShardPlan::new(tensors, max_shard_size)?.total_bytes() + copied + CONFIGS + lines)
}

/// All tensors of a branch in the order of the file: layer by layer, so that a shard is a run of layers.
fn tensors(
    variant: &Variant,
    config: &ModelConfig,
    passed_through: &[TensorSpec],
) -> Result<Vec<TensorSpec>> {
    let bits = variant.bits;
    let words = |features: usize| features * bits.get() as usize / 32;
    let spec = |name: String, dtype, shape: &[usize]| TensorSpec { name, dtype, shape: shape.to_vec() };
    let mut specs = Vec::new();
    for (id, linear) in config.linears() {
        let [n, k] = linear.shape;
        check_pack_factor(&id, linear, bits)?;
        let size = variant.group_size.features(k);
        if size > k {
            return Err(Error::GroupSize { linear: id.to_string(), group_size: size, in_features: k });
        }
        let groups = variant.group_size.groups(k);
        specs.push(spec(id.qweight(), Dtype::I32, &[words(k), n]));
        specs.push(spec(id.qzeros(), Dtype::I32, &[groups, words(n)]));
        specs.push(spec(id.g_idx(), Dtype::I32, &[k]));
        specs.push(spec(id.scales(), Dtype::F16, &[groups, n]));
        if linear.bias {
            specs.push(spec(id.bias(), Dtype::F16, &[n]));
        }
    }
    let dense = config.dense_tensors().into_iter();
    specs.extend(dense.map(|(name, shape)| spec(name, Dtype::F16, &shape)));
    specs.extend_from_slice(passed_through);
    Ok(specs)
}

/// Files of the source that are copied into a branch, in a fixed order.
fn copied(source: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> = COPIED_FILES.map(str::to_owned).into();
    let mut licences = Vec::new();
    for entry in fs::read_dir(source).map_err(Error::io("read", source))? {
        let name = entry.map_err(Error::io("read", source))?.file_name();
        licences.extend(name.into_string().ok().filter(|name| is_licence(name)));
    }
    licences.sort();
    names.extend(licences);
    names.retain(|name| source.join(name).is_file());
    Ok(names)
}

fn pretty(value: &Value) -> Vec<u8> {
    let mut text = format!("{value:#}").into_bytes();
    text.push(b'\n');
    text
}

fn sync(path: &Path) -> Result<()> {
    fs::File::open(path).and_then(|f| f.sync_all()).map_err(Error::io("sync", path))
}
