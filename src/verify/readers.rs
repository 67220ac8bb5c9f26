//! Which software takes a checkpoint: the table `readers.toml`, applied to its format and shapes.

use std::sync::LazyLock;

use serde::Deserialize;

use super::tensor_parallel::{PARTS, part};
use crate::{
    architectures::ModelConfig,
    checkpoint::{Checkpoint, CheckpointFormat, QuantizationConfig},
    error::{Error, Result},
    report::{ReaderReport, SplitReport},
    variant::{Bits, GroupSize, Variant, VariantSet},
};

static TABLE: LazyLock<Vec<Reader>> = LazyLock::new(|| {
    let table: Table =
        toml::from_str(include_str!("readers.toml")).expect("the table is part of the program and tested");
    table.reader
});

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    reader: Vec<Reader>,
}

/// One program, and the versions of it that behave alike.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Reader {
    name: String,
    versions: String,
    /// Whether it is maintained in these versions, and reads GPTQ.
    living: bool,
    /// The versions whose source was read, and the day.
    read: String,
    sources: Vec<String>,
    note: Option<String>,
    never: Option<String>,
    #[serde(default)]
    tensor_parallel: bool,
    #[serde(default)]
    refuses: Vec<RefusedModels>,
    #[serde(default)]
    path: Vec<Conditions>,
}

/// Models that a reader does not take in any format.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RefusedModels {
    classes: Option<Vec<String>>,
    layers: Option<Layers>,
    why: String,
}

/// Which layers of a model have experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Layers {
    /// At least one.
    Experts,
    /// Some, but not all.
    Mixed,
}

/// Formats that one path through a reader loads; `readers.toml` explains each key.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Conditions {
    bits: Vec<u32>,
    groups: Option<Vec<i64>>,
    #[serde(default)]
    wrong_groups: Vec<i64>,
    #[serde(default)]
    power_of_two: bool,
    #[serde(default)]
    symmetric: bool,
    #[serde(default)]
    own_asymmetric_v1: bool,
    #[serde(default = "yes")]
    v2: bool,
    #[serde(default)]
    desc_act: Behaviour,
    #[serde(default)]
    permuted: Behaviour,
    #[serde(default = "one")]
    n: usize,
    #[serde(default = "one")]
    k: usize,
    #[serde(default)]
    whole_groups: bool,
    #[serde(default)]
    more_groups_than: usize,
    #[serde(default)]
    g_idx: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Behaviour {
    #[default]
    Taken,
    Refused,
    Wrong,
}

/// Group sizes to propose if another one is not loaded.
const GROUP_SIZES: [GroupSize; 5] = [
    GroupSize::Features(128),
    GroupSize::Features(64),
    GroupSize::Features(32),
    GroupSize::Features(16),
    GroupSize::PerChannel,
];

/// Whether no linear of a model has fewer input features than a group; such variants are not made.
fn fits(config: &ModelConfig, group_size: GroupSize) -> bool {
    config.linears().all(|(_, linear)| group_size.features(linear.shape[1]) <= linear.shape[1])
}

fn yes() -> bool {
    true
}

fn one() -> usize {
    1
}

/// Why a path does not take a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Refusal {
    why: String,
    /// `[N, K]` of the linear whose shape is the reason.
    shape: Option<[usize; 2]>,
}

/// A maintained reader that does not take some variants of a model, known from the model's shapes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LostReader {
    /// Reader, variants, reason, and the group sizes that the reader would take.
    pub text: String,
    /// Whether the shape of a linear is the reason; otherwise the variant or the model's family is.
    pub by_shape: bool,
}

/// Properties of a checkpoint that decide which programs load it.
#[derive(Debug, Clone)]
struct Format {
    bits: u32,
    group_size: GroupSize,
    symmetric: bool,
    /// The flag in the configs.
    desc_act: bool,
    /// `g_idx` is not sequential.
    permuted: bool,
    v1: bool,
    has_g_idx: bool,
    written_by_gptqmodel: bool,
    /// `[N, K]` of the quantized linears.
    shapes: Vec<[usize; 2]>,
    /// The class in `architectures`.
    class: &'static str,
    /// Layers with experts, and all layers.
    expert_layers: (usize, usize),
}

/// All readers, in the order of the table.
pub fn readers(
    config: &ModelConfig,
    quantization: &QuantizationConfig,
    checkpoint: &Checkpoint,
) -> Vec<ReaderReport> {
    let format = Format::of_checkpoint(config, quantization, checkpoint);
    TABLE.iter().map(|reader| reader.report(&format)).collect()
}

/// The number of parts that readers with tensor parallelism can split a checkpoint into, in the order of the table.
pub fn tensor_parallel(
    config: &ModelConfig,
    quantization: &QuantizationConfig,
    checkpoint: &Checkpoint,
) -> Vec<SplitReport> {
    let format = Format::of_checkpoint(config, quantization, checkpoint);
    TABLE
        .iter()
        .filter(|reader| reader.tensor_parallel)
        .map(|reader| reader.splits(config, &format))
        .collect()
}

/// The maintained readers that do not take a variant of this model: one entry for each reader and reason.
pub fn lost_readers(config: &ModelConfig, variants: &[Variant]) -> Vec<LostReader> {
    let mut lost: Vec<(&Reader, Refusal, Vec<Variant>)> = Vec::new();
    for reader in TABLE.iter().filter(|reader| reader.living) {
        for &variant in variants {
            let Some(refusal) = reader.refusal(&Format::of_variant(config, variant)) else { continue };
            match lost.iter_mut().find(|(other, why, _)| other.name == reader.name && *why == refusal) {
                Some((_, _, variants)) => variants.push(variant),
                None => lost.push((reader, refusal, vec![variant])),
            }
        }
    }
    let text = |(reader, refusal, variants): (&Reader, Refusal, Vec<Variant>)| {
        let (name, names, why) = (&reader.name, list(&variants, "and"), &refusal.why);
        let Some([n, k]) = refusal.shape else {
            return LostReader { text: format!("{name} does not load {names}: {why}"), by_shape: false };
        };
        let sizes = reader.group_sizes(config, &variants);
        let instead = match sizes.len() {
            0 => "no group size changes that".to_owned(),
            1 => format!("it takes group size {}", sizes[0]),
            _ => format!("it takes group sizes {}", list(&sizes, "and")),
        };
        let linear = paths(config, [n, k]);
        let text = format!("{name} does not load {names}: {linear} (N = {n}, K = {k}): {why}; {instead}");
        LostReader { text, by_shape: true }
    };
    lost.into_iter().map(text).collect()
}

/// Checks that each of the named readers takes all of the variants. A name is that of a row of the table, or the beginning of a
/// maintained one's, such as `vllm`.
///
/// # Errors
/// When a name is unknown, or a reader does not take a variant.
pub fn require_readers(config: &ModelConfig, variants: &[Variant], names: &[String]) -> Result<()> {
    for name in names {
        let reader = named(name)?;
        for &variant in variants {
            let Some(Refusal { why, .. }) = reader.refusal(&Format::of_variant(config, variant)) else {
                continue;
            };
            let (reader_name, taken) = (reader.name.clone(), reader.instead_of(config, variant));
            return Err(Error::ReaderRefuses {
                reader: reader_name,
                variant: variant.to_string(),
                why,
                taken,
            });
        }
    }
    Ok(())
}

/// The reader of this name, upper and lower case alike.
fn named(name: &str) -> Result<&'static Reader> {
    let wanted = name.to_lowercase();
    let begins = |reader: &&Reader| {
        let name = reader.name.to_lowercase();
        let rest = name.strip_prefix(&wanted);
        reader.living && rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric()))
    };
    let exact = TABLE.iter().find(|reader| reader.name.to_lowercase() == wanted);
    let found = exact.or_else(|| TABLE.iter().find(begins).filter(|_| !wanted.is_empty()));
    found.ok_or_else(|| {
        let known: Vec<&str> = TABLE.iter().filter(|r| r.living).map(|r| r.name.as_str()).collect();
        Error::Value {
            what: "--require-reader".into(),
            expected: format!("the name of a reader ({}, or another of docs/readers.md)", known.join(", ")),
            found: name.into(),
        }
    })
}

/// Paths of the linears of this shape in their layers: `mlp.gate_proj and mlp.up_proj`. Experts stand for each other.
fn paths(config: &ModelConfig, shape: [usize; 2]) -> String {
    let mut paths: Vec<String> = Vec::new();
    for (id, _) in config.linears().filter(|(_, linear)| linear.shape == shape) {
        let parts = id.path.split('.').map(|part| if part.parse::<usize>().is_ok() { "*" } else { part });
        let path = parts.collect::<Vec<_>>().join(".");
        if !paths.contains(&path) {
            paths.push(path);
        }
    }
    list(&paths, "and")
}

impl Format {
    fn of_checkpoint(
        config: &ModelConfig,
        quantization: &QuantizationConfig,
        checkpoint: &Checkpoint,
    ) -> Self {
        let quantizer = quantization.meta.get("quantizer");
        Self {
            bits: quantization.bits.get(),
            group_size: quantization.group_size,
            symmetric: quantization.sym,
            desc_act: quantization.desc_act,
            permuted: !quantization.sequential_groups(),
            v1: quantization.format == CheckpointFormat::Gptq,
            has_g_idx: checkpoint.contains(&config.linear_id(0, 0).g_idx()),
            written_by_gptqmodel: quantizer.is_some_and(|q| q.to_string().contains("gptqmodel")),
            ..Self::of_model(config)
        }
    }

    /// A branch of this variant, as it is written here.
    fn of_variant(config: &ModelConfig, variant: Variant) -> Self {
        let desc_act = variant.order.desc_act();
        Self {
            bits: variant.bits.get(),
            group_size: variant.group_size,
            symmetric: variant.symmetric,
            desc_act,
            permuted: desc_act && variant.group_size != GroupSize::PerChannel,
            ..Self::of_model(config)
        }
    }

    /// The `main` branch of a model.
    fn of_model(config: &ModelConfig) -> Self {
        let mut shapes: Vec<[usize; 2]> = Vec::new();
        for (_, linear) in config.linears() {
            if !shapes.contains(&linear.shape) {
                shapes.push(linear.shape);
            }
        }
        Self::main(shapes, config.class, (config.expert_layers(), config.num_layers()))
    }

    /// The `main` branch of a model with these properties.
    fn main(shapes: Vec<[usize; 2]>, class: &'static str, expert_layers: (usize, usize)) -> Self {
        Self {
            bits: Bits::Four.get(),
            group_size: GroupSize::Features(128),
            symmetric: true,
            desc_act: false,
            permuted: false,
            v1: true,
            has_g_idx: true,
            written_by_gptqmodel: false,
            shapes,
            class,
            expert_layers,
        }
    }
}

impl Reader {
    fn report(&self, format: &Format) -> ReaderReport {
        let refused = self.refusal(format).map(|refusal| refusal.why);
        ReaderReport { name: self.name.clone(), living: self.living, refused }
    }

    fn refusal(&self, format: &Format) -> Option<Refusal> {
        let model =
            || self.refuses.iter().find(|models| models.hold(format)).map(|models| models.why.clone());
        if let Some(why) = self.never.clone().or_else(model) {
            return Some(Refusal { why, shape: None });
        }
        let refusals: Option<Vec<Refusal>> = self.path.iter().map(|path| path.refusal(format)).collect();
        // The path that is made for this width says most.
        let nearest = self.path.iter().position(|path| path.bits.contains(&format.bits)).unwrap_or(0);
        refusals?.into_iter().nth(nearest)
    }

    /// The group sizes with which this reader takes all of the variants.
    fn group_sizes(&self, config: &ModelConfig, variants: &[Variant]) -> Vec<i64> {
        let takes = |group_size: &GroupSize| {
            variants.iter().all(|&variant| {
                let variant = Variant { group_size: *group_size, ..variant };
                self.refusal(&Format::of_variant(config, variant)).is_none()
            })
        };
        GROUP_SIZES.iter().filter(|size| fits(config, **size) && takes(size)).map(|s| s.as_config()).collect()
    }

    /// Variants that this reader takes where it does not take `variant`: that one with other group sizes, and the set `serve`.
    fn instead_of(&self, config: &ModelConfig, variant: Variant) -> Vec<String> {
        let sizes = GROUP_SIZES.iter().map(|&group_size| Variant { group_size, ..variant });
        let mut taken: Vec<String> = Vec::new();
        for variant in sizes.chain(VariantSet::Serve.variants()) {
            let text = variant.to_string();
            let takes = || self.refusal(&Format::of_variant(config, variant)).is_none();
            if fits(config, variant.group_size) && !taken.contains(&text) && takes() {
                taken.push(text);
            }
        }
        taken
    }

    /// The numbers of parts that this reader can split a checkpoint into.
    fn splits(&self, config: &ModelConfig, format: &Format) -> SplitReport {
        let mut report = SplitReport { name: self.name.clone(), parts: Vec::new(), limit: None };
        if self.refusal(format).is_some() {
            return report;
        }
        let taking: Vec<&Conditions> =
            self.path.iter().filter(|path| path.refusal(format).is_none()).collect();
        for parts in PARTS {
            let problems: Option<Vec<String>> =
                taking.iter().map(|path| path.split_problem(config, format, parts)).collect();
            match problems.and_then(|problems| problems.into_iter().next()) {
                None => report.parts.push(parts),
                Some(problem) => drop(report.limit.get_or_insert(format!("not on {parts}: {problem}"))),
            }
        }
        report
    }
}

impl RefusedModels {
    fn hold(&self, format: &Format) -> bool {
        let (with_experts, layers) = format.expert_layers;
        self.classes.as_ref().is_none_or(|classes| classes.iter().any(|class| class == format.class))
            && match self.layers {
                None => true,
                Some(Layers::Experts) => with_experts > 0,
                Some(Layers::Mixed) => with_experts > 0 && with_experts < layers,
            }
    }

    /// For the documentation.
    fn in_words(&self) -> String {
        let layers = self.layers.map(|layers| match layers {
            Layers::Experts => "models with experts",
            Layers::Mixed => "models with experts in some layers only",
        });
        let classes = self.classes.as_ref().map(|classes| list(classes, "and"));
        let models = classes.into_iter().chain(layers.map(String::from)).collect::<Vec<_>>().join(", ");
        format!("Not {models}: {}", self.why)
    }
}

impl Conditions {
    /// The first reason why this path does not take `format`, if there is one.
    fn refusal(&self, format: &Format) -> Option<Refusal> {
        let of_format = self.format_refusal(format).map(|why| Refusal { why, shape: None });
        let of_shape = || self.shape_refusal(format).map(|(shape, why)| Refusal { why, shape: Some(shape) });
        let bare = || {
            (self.g_idx && !format.has_g_idx)
                .then(|| Refusal { why: "needs g_idx tensors".into(), shape: None })
        };
        of_format.or_else(of_shape).or_else(bare)
    }

    /// The first reason that does not depend on the model's shapes.
    fn format_refusal(&self, format: &Format) -> Option<String> {
        let Format { bits, group_size, .. } = *format;
        let size = group_size.as_config();
        let per_channel = group_size == GroupSize::PerChannel;
        if !self.bits.contains(&bits) {
            return Some(format!("takes {} bits, this has {bits}", list(&self.bits, "or")));
        }
        if self.symmetric && !format.symmetric {
            return Some("takes symmetric grids only".into());
        }
        if self.own_asymmetric_v1 && !format.symmetric && format.v1 && !format.written_by_gptqmodel {
            return Some("takes asymmetric v1 files only where GPTQModel wrote them".into());
        }
        if format.desc_act && !per_channel && self.desc_act == Behaviour::Refused {
            return Some("refuses act order (desc_act)".into());
        }
        if format.permuted && self.permuted == Behaviour::Wrong {
            return Some("computes wrong results with act order".into());
        }
        if self.groups.as_ref().is_some_and(|groups| !groups.contains(&size)) {
            let groups = list(self.groups.as_ref()?, "or");
            return Some(format!("takes group sizes {groups}, this has {size}"));
        }
        if self.wrong_groups.contains(&size) {
            return Some(format!("computes wrong results with group size {size}"));
        }
        if self.power_of_two && !per_channel && !(size as u64).is_power_of_two() {
            return Some(format!("takes group sizes that are powers of two, this has {size}"));
        }
        (!self.v2 && !format.v1)
            .then(|| "does not know checkpoint_format gptq_v2: its zero points are one off".into())
    }

    /// The first linear, `[N, K]`, whose shape this path does not take, and the reason.
    fn shape_refusal(&self, format: &Format) -> Option<([usize; 2], String)> {
        let group_size = format.group_size;
        let odd = |[n, k]: &&[usize; 2]| !n.is_multiple_of(self.n) || !k.is_multiple_of(self.k);
        if let Some(&[n, k]) = format.shapes.iter().find(odd) {
            let (of_n, of_k) = (self.n, self.k);
            let why = format!("needs N a multiple of {of_n} and K of {of_k}, a linear here is {n} x {k}");
            return Some(([n, k], why));
        }
        let partial = |[_, k]: &&[usize; 2]| !k.is_multiple_of(group_size.features(*k));
        if let Some(&[n, k]) = format.shapes.iter().find(partial).filter(|_| self.whole_groups) {
            return Some(([n, k], format!("needs whole groups, K = {k} ends in a partial one")));
        }
        let few = |[_, k]: &&[usize; 2]| group_size.groups(*k) <= self.more_groups_than;
        let counted = self.more_groups_than > 0 && group_size != GroupSize::PerChannel;
        format.shapes.iter().find(few).filter(|_| counted).map(|&[n, k]| {
            let (least, groups) = (self.more_groups_than, group_size.groups(k));
            ([n, k], format!("computes wrong results with {least} groups or fewer, K = {k} has {groups}"))
        })
    }

    /// The first reason why a model cannot be split into so many parts, if there is one.
    fn split_problem(&self, config: &ModelConfig, format: &Format, parts: usize) -> Option<String> {
        if parts == 1 {
            return None;
        }
        let packed = Bits::new(format.bits).map_or(1, Bits::pack_factor);
        let mut linears = config.layers.iter().flat_map(|layer| {
            (0..layer.linears.len()).map(move |position| (layer, position, &layer.linears[position]))
        });
        linears.find_map(|(layer, position, linear)| {
            let ([n, k], path) = (linear.shape, &linear.path);
            let [n_part, k_part] = match part(layer, position, parts) {
                Ok(shape) => shape,
                Err(problem) => return Some(problem),
            };
            let size = format.group_size.features(k);
            if k_part < k && format.group_size != GroupSize::PerChannel && !k_part.is_multiple_of(size) {
                let groups = format.group_size.groups(k);
                return Some(format!("{path} has {groups} groups of {size}"));
            }
            let multiple = |of: usize| if of.is_multiple_of(packed) { of } else { packed };
            let (of_n, of_k) = (multiple(self.n), multiple(self.k));
            if n_part < n && !n_part.is_multiple_of(of_n) {
                return Some(format!("{path} would have N = {n_part}, not a multiple of {of_n}"));
            }
            (k_part < k && !k_part.is_multiple_of(of_k))
                .then(|| format!("{path} would have K = {k_part}, not a multiple of {of_k}"))
        })
    }

    /// The conditions in words, for the documentation.
    fn in_words(&self) -> String {
        let mut words = vec![format!("{} bits", list(&self.bits, "or"))];
        words.extend(self.groups.as_ref().map(|groups| format!("groups of {}", list(groups, "or"))));
        let mut add = |holds: bool, text: String| words.extend(holds.then_some(text));
        add(self.power_of_two, "groups of a power of two".into());
        add(
            !self.wrong_groups.is_empty(),
            format!("wrong results with groups of {}", list(&self.wrong_groups, "or")),
        );
        add(self.symmetric, "symmetric".into());
        add(self.own_asymmetric_v1, "asymmetric v1 only as GPTQModel wrote it".into());
        add(self.desc_act == Behaviour::Refused, "**no act order**".into());
        let silently = self.permuted == Behaviour::Wrong && self.desc_act != Behaviour::Refused;
        add(silently, "**wrong results with act order**".into());
        add(!self.v2, "v1 only".into());
        add(self.n > 1 || self.k > 1, format!("N % {} = 0, K % {} = 0", self.n, self.k));
        add(self.whole_groups, "whole groups".into());
        add(self.more_groups_than > 0, format!("more than {} groups", self.more_groups_than));
        add(self.g_idx, "with `g_idx`".into());
        words.join(", ")
    }
}

/// `2, 4 or 8`.
fn list(items: &[impl ToString], or: &str) -> String {
    let texts: Vec<String> = items.iter().map(ToString::to_string).collect();
    match &texts[..] {
        [before @ .., last] if !before.is_empty() => format!("{} {or} {last}", before.join(", ")),
        _ => texts.concat(),
    }
}

/// The table as Markdown; `docs/readers.md` holds it.
pub fn readers_markdown() -> String {
    let mut text = String::new();
    for living in [true, false] {
        text += if living {
            "### Maintained\n\n"
        } else {
            "\n### Replaced by newer versions, no longer maintained, or without GPTQ now\n\n"
        };
        text += "| reader | loads | source |\n|---|---|---|\n";
        for reader in TABLE.iter().filter(|reader| reader.living == living) {
            let paths = reader.path.iter().map(Conditions::in_words).collect::<Vec<_>>().join("; or ");
            let takes = reader.never.clone().unwrap_or(paths);
            let notes =
                reader.note.clone().into_iter().chain(reader.refuses.iter().map(RefusedModels::in_words));
            let note: String = notes.map(|note| format!(". {}", note.trim_end_matches('.'))).collect();
            let sources =
                reader.sources.iter().map(|source| format!("`{source}`")).collect::<Vec<_>>().join(", ");
            let Reader { name, versions, read, .. } = reader;
            text += &format!("| {name} ({versions}) | {takes}{note} | {read}: {sources} |\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architectures::supported_classes;

    fn format() -> Format {
        Format::main(vec![[4096, 4096], [11008, 4096], [4096, 11008]], "LlamaForCausalLM", (0, 32))
    }

    /// The readers that do not take `format`, webui 4 aside, which takes nothing.
    fn refusing(format: &Format) -> Vec<&'static str> {
        let refuses =
            |reader: &&'static Reader| reader.never.is_none() && reader.report(format).refused.is_some();
        TABLE.iter().filter(refuses).map(|reader| reader.name.as_str()).collect()
    }

    fn why(format: &Format, name: &str) -> String {
        let reader = TABLE.iter().find(|reader| reader.name == name).unwrap();
        reader.report(format).refused.unwrap_or_else(|| "taken".into())
    }

    #[test]
    fn the_table_says_all_that_it_must() {
        for reader in TABLE.iter() {
            assert!(reader.read.contains("2026-"), "{}: the day on which it was read", reader.name);
            assert!(!reader.sources.is_empty() && !reader.versions.is_empty(), "{}", reader.name);
            assert_eq!(reader.never.is_some(), reader.path.is_empty(), "{}", reader.name);
            for class in reader.refuses.iter().filter_map(|models| models.classes.as_ref()).flatten() {
                assert!(supported_classes().any(|known| known == class), "{}: {class}", reader.name);
            }
        }
    }

    #[test]
    fn models_are_refused_by_class_and_by_experts() {
        let mixtral = Format { class: "MixtralForCausalLM", expert_layers: (32, 32), ..format() };
        assert_eq!(refusing(&mixtral), ["transformers 5", "GPTQModel 7"]);
        assert_eq!(why(&mixtral, "GPTQModel 7"), "looks for the linears under other names");
        let qwen = |layers| Format { class: "Qwen2MoeForCausalLM", expert_layers: (layers, 32), ..format() };
        assert_eq!(refusing(&qwen(32)), ["transformers 5"]);
        assert_eq!(refusing(&qwen(16)), ["transformers 5", "GPTQModel 7"]);
        assert_eq!(refusing(&qwen(0)), [""; 0]);
        let fused = Format { class: "Phi3ForCausalLM", ..format() };
        assert_eq!(refusing(&fused), ["GPTQModel 7"]);
    }

    #[test]
    fn the_main_branch_is_taken_by_all() {
        assert_eq!(refusing(&format()), [""; 0]);
        assert_eq!(
            why(&format(), "text-generation-webui 4"),
            "has no loader for GPTQ since 4.0 (March 2026)"
        );
    }

    #[test]
    fn act_order_is_refused_by_flag_or_wrong_by_value() {
        let act = Format { desc_act: true, permuted: true, ..format() };
        assert_eq!(refusing(&act), ["vLLM 0.30 and newer", "mistral.rs 0.9"]);
        assert_eq!(why(&act, "vLLM 0.30 and newer"), "refuses act order (desc_act)");
        assert_eq!(why(&act, "mistral.rs 0.9"), "computes wrong results with act order");
        // As versions before wrote static groups: the flag, and a sequential g_idx.
        let flagged = Format { desc_act: true, ..format() };
        assert_eq!(refusing(&flagged), ["vLLM 0.30 and newer"]);
        let channel = Format { desc_act: true, group_size: GroupSize::PerChannel, ..format() };
        assert_eq!(refusing(&channel), ["mistral.rs 0.9"]);
    }

    fn model(hidden: usize, intermediate: usize, heads: usize, kv_heads: usize) -> ModelConfig {
        let json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
            "intermediate_size": intermediate, "num_hidden_layers": 2, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "vocab_size": 32000, "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        });
        ModelConfig::from_json("config.json", &json).unwrap()
    }

    fn variants(texts: &[&str]) -> Vec<Variant> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn readers_that_a_shape_loses_are_known_before_the_run() {
        let texts = |config: &ModelConfig, names: &[&str]| -> Vec<String> {
            lost_readers(config, &variants(names)).into_iter().map(|lost| lost.text).collect()
        };
        let attention =
            "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj and self_attn.o_proj (N = 320, K = 320)";
        let kernel =
            "needs N a multiple of 64 and K of 128, a linear here is 320 x 320; no group size changes that";
        assert_eq!(
            texts(&model(320, 432, 5, 5), &["4bit-128g"]),
            [
                format!(
                    "vLLM 0.30 and newer does not load 4bit-128g: {attention}: needs whole groups, K = 320 ends in a \
                     partial one; it takes group size -1"
                ),
                format!("SGLang 0.5.20 and newer does not load 4bit-128g: {attention}: {kernel}"),
                format!("mistral.rs 0.9 does not load 4bit-128g: {attention}: {kernel}"),
            ]
        );
        let down = "vLLM 0.30 and newer does not load 4bit-128g: mlp.down_proj (N = 1024, K = 1056): needs whole groups, \
                    K = 1056 ends in a partial one; it takes group sizes 32 and -1";
        assert_eq!(texts(&model(1024, 1056, 16, 16), &["4bit-128g"])[0], down);
        // One line for all variants with the same reason.
        assert_eq!(
            texts(&model(4096, 11008, 32, 32), &["4bit-128g", "4bit-32g-act", "4bit-64g-act"]),
            [
                "vLLM 0.30 and newer does not load 4bit-32g-act and 4bit-64g-act: refuses act order (desc_act)",
                "mistral.rs 0.9 does not load 4bit-32g-act and 4bit-64g-act: computes wrong results with act order",
            ]
        );
    }

    #[test]
    fn asymmetric_variants_lose_all_but_transformers_and_llama_cpp() {
        let lost = lost_readers(&model(4096, 11008, 32, 32), &variants(&["4bit-128g-asym"]));
        assert!(lost.iter().all(|lost| !lost.by_shape), "{lost:?}");
        let names: Vec<&str> =
            lost.iter().filter_map(|lost| lost.text.split_once(" does not")).map(|(name, _)| name).collect();
        assert_eq!(
            names,
            ["GPTQModel 7", "vLLM 0.30 and newer", "SGLang 0.5.20 and newer", "mistral.rs 0.9"]
        );
        // A v1 file, as it is written here.
        let written = Format { symmetric: false, ..format() };
        assert_eq!(why(&written, "transformers 5"), "taken");
    }

    #[test]
    fn required_readers_are_found_by_the_beginning_of_their_names() {
        for (name, expected) in [
            ("vllm", "vLLM 0.30 and newer"),
            ("SGLang", "SGLang 0.5.20 and newer"),
            ("gptqmodel", "GPTQModel 7"),
            ("llama.cpp", "llama.cpp's converter"),
            ("transformers", "transformers 5"),
            ("vllm up to 0.21", "vLLM up to 0.21"),
            ("exllama", "ExLlama"),
        ] {
            assert_eq!(named(name).unwrap().name, expected);
        }
        assert!(["", "v", "trans", "nothing"].iter().all(|name| named(name).is_err()));
        let config = model(4096, 11008, 32, 32);
        let require = |variant: &str| require_readers(&config, &variants(&[variant]), &["vllm".into()]);
        require("4bit-128g").unwrap();
        let refused = require("4bit-128g-act").unwrap_err();
        assert_eq!(
            refused.hint().unwrap(),
            "it loads --variant 4bit--1g-act, 4bit-128g, 4bit-64g, 4bit-32g, 8bit-128g"
        );
    }

    #[test]
    fn each_part_of_a_split_needs_whole_groups_and_heads() {
        let split = |config: &ModelConfig, group_size: GroupSize, name: &str| {
            let reader = TABLE.iter().find(|reader| reader.name.starts_with(name)).unwrap();
            let report = reader.splits(config, &Format { group_size, ..Format::of_model(config) });
            (report.parts, report.limit.unwrap_or_default())
        };
        let (whole, half) = (GroupSize::Features(128), GroupSize::Features(64));
        for name in ["vLLM 0.30", "SGLang 0.5.20"] {
            let llama_7b = split(&model(4096, 11008, 32, 32), whole, name);
            assert_eq!(llama_7b, (vec![1, 2], "not on 4: mlp.down_proj has 86 groups of 128".into()));
            let llama_13b = split(&model(5120, 13824, 40, 40), whole, name);
            assert_eq!(llama_13b, (vec![1, 2, 4], "not on 8: mlp.down_proj has 108 groups of 128".into()));
            let llama3_8b = split(&model(4096, 14336, 32, 8), whole, name);
            assert_eq!(llama3_8b, (vec![1, 2, 4, 8], String::new()));
        }
        let qwen_05b = model(896, 4864, 14, 2);
        let groups = "not on 2: self_attn.o_proj has 7 groups of 128";
        assert_eq!(split(&qwen_05b, whole, "vLLM 0.30"), (vec![1], groups.into()));
        let heads = "not on 4: attention has 14 query heads";
        assert_eq!(split(&qwen_05b, half, "vLLM 0.30"), (vec![1, 2], heads.into()));
        // Two parts share the one key and value head of four; one group a row has no groups to keep whole.
        let per_channel = split(&model(1024, 11008, 16, 4), GroupSize::PerChannel, "vLLM 0.30");
        assert_eq!(per_channel, (vec![1, 2, 4, 8], String::new()));
        let kernel = "not on 4: mlp.down_proj would have K = 2752, not a multiple of 128";
        assert_eq!(split(&model(4096, 11008, 32, 32), GroupSize::PerChannel, "SGLang 0.5.20").1, kernel);
    }

    #[test]
    fn each_refuses_what_its_sources_refuse() {
        let small = Format { group_size: GroupSize::Features(32), ..format() };
        assert_eq!(refusing(&small), ["mistral.rs 0.9"]);
        let sixteen = Format { group_size: GroupSize::Features(16), ..format() };
        assert_eq!(why(&sixteen, "ExLlamaV2"), "computes wrong results with group size 16");
        assert_eq!(why(&sixteen, "vLLM 0.30 and newer"), "takes group sizes -1, 32, 64 or 128, this has 16");
        assert_eq!(why(&sixteen, "ExLlama"), "taken");
        let asymmetric = Format { symmetric: false, ..format() };
        assert_eq!(
            refusing(&asymmetric),
            [
                "GPTQModel 7",
                "vLLM 0.30 and newer",
                "vLLM 0.22 to 0.29",
                "SGLang 0.5.20 and newer",
                "mistral.rs 0.9"
            ]
        );
        assert_eq!(why(&Format { written_by_gptqmodel: true, ..asymmetric }, "GPTQModel 7"), "taken");
        let three = Format { bits: 3, ..format() };
        assert_eq!(why(&three, "llama.cpp's converter"), "takes 2, 4 or 8 bits, this has 3");
        assert_eq!(why(&three, "AutoGPTQ 0.4 to 0.7"), "taken");
        let eight = Format { bits: 8, ..format() };
        assert_eq!(why(&eight, "vLLM 0.30 and newer"), "taken");
        let partial = Format { shapes: vec![[128, 192]], ..format() };
        assert_eq!(why(&partial, "vLLM 0.30 and newer"), "needs whole groups, K = 192 ends in a partial one");
        assert_eq!(why(&partial, "transformers 5"), "taken");
        let narrow = Format { shapes: vec![[96, 1024]], ..format() };
        assert_eq!(
            why(&narrow, "SGLang 0.5.20 and newer"),
            "needs N a multiple of 64 and K of 128, a linear here is 96 x 1024"
        );
        let few = Format { shapes: vec![[1024, 1024]], ..format() };
        assert_eq!(
            why(&few, "mistral.rs 0.9"),
            "computes wrong results with 8 groups or fewer, K = 1024 has 8"
        );
        let bare = Format { has_g_idx: false, ..format() };
        assert_eq!(refusing(&bare), ["llama.cpp's converter", "mistral.rs 0.9", "TGI 3"]);
        let second = Format { v1: false, ..format() };
        assert_eq!(
            why(&second, "ExLlama"),
            "does not know checkpoint_format gptq_v2: its zero points are one off"
        );
        // Its Marlin kernels do not read zero points.
        assert_eq!(why(&second, "vLLM up to 0.21"), "taken");
    }
}
