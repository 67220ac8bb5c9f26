//! Which software takes a checkpoint: the table `readers.toml`, applied to its format and shapes.

use std::sync::LazyLock;

use serde::Deserialize;

use crate::{
    architectures::ModelConfig,
    checkpoint::{Checkpoint, CheckpointFormat, QuantizationConfig},
    error::Result,
    report::ReaderReport,
    variant::GroupSize,
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

/// What one path through a reader takes; `readers.toml` says what each key means.
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

fn yes() -> bool {
    true
}

fn one() -> usize {
    1
}

/// What a checkpoint is, as far as readers care.
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
    let first = config.linear_id(0, 0);
    let mut shapes: Vec<[usize; 2]> = Vec::new();
    for (_, linear) in config.linears() {
        if !shapes.contains(&linear.shape) {
            shapes.push(linear.shape);
        }
    }
    let quantizer = quantization.meta.get("quantizer");
    let format = Format {
        bits: quantization.bits.get(),
        group_size: quantization.group_size,
        symmetric: quantization.sym,
        desc_act: quantization.desc_act,
        permuted: !quantization.sequential_groups(),
        v1: quantization.format == CheckpointFormat::Gptq,
        has_g_idx: checkpoint.contains(&first.g_idx()),
        written_by_gptqmodel: quantizer.is_some_and(|q| q.to_string().contains("gptqmodel")),
        shapes,
        class: config.class,
        expert_layers: (config.expert_layers(), config.num_layers()),
    };
    TABLE.iter().map(|reader| reader.report(&format)).collect()
}

/// All readers of a quantized checkpoint.
///
/// # Errors
/// When it does not say how it was quantized.
pub fn readers_of(checkpoint: &Checkpoint) -> Result<Vec<ReaderReport>> {
    Ok(readers(checkpoint.config(), &QuantizationConfig::read(checkpoint)?, checkpoint))
}

impl Reader {
    fn report(&self, format: &Format) -> ReaderReport {
        let model =
            || self.refuses.iter().find(|models| models.hold(format)).map(|models| models.why.clone());
        let refused = self.never.clone().or_else(model).or_else(|| {
            let refusals: Option<Vec<String>> = self.path.iter().map(|path| path.refusal(format)).collect();
            let refusals = refusals?;
            // The path that is made for this width says most.
            let nearest = self.path.iter().position(|path| path.bits.contains(&format.bits)).unwrap_or(0);
            refusals.into_iter().nth(nearest)
        });
        ReaderReport { name: self.name.clone(), living: self.living, refused }
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
    fn refusal(&self, format: &Format) -> Option<String> {
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
        if !self.v2 && !format.v1 {
            return Some("does not know checkpoint_format gptq_v2: its zero points are one off".into());
        }
        let odd = |[n, k]: &&[usize; 2]| !n.is_multiple_of(self.n) || !k.is_multiple_of(self.k);
        if let Some([n, k]) = format.shapes.iter().find(odd) {
            let (of_n, of_k) = (self.n, self.k);
            return Some(format!("needs N a multiple of {of_n} and K of {of_k}, a linear here is {n} x {k}"));
        }
        let partial = |[_, k]: &&[usize; 2]| !k.is_multiple_of(group_size.features(*k));
        if let Some([_, k]) = format.shapes.iter().find(partial).filter(|_| self.whole_groups) {
            return Some(format!("needs whole groups, K = {k} ends in a partial one"));
        }
        let few = |[_, k]: &&[usize; 2]| group_size.groups(*k) <= self.more_groups_than;
        if let Some([_, k]) =
            format.shapes.iter().find(few).filter(|_| self.more_groups_than > 0 && !per_channel)
        {
            let groups = group_size.groups(*k);
            return Some(format!(
                "computes wrong results with {} groups or fewer, K = {k} has {groups}",
                self.more_groups_than
            ));
        }
        (self.g_idx && !format.has_g_idx).then(|| "needs g_idx tensors".into())
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
        text += "| reader | takes | read |\n|---|---|---|\n";
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
        Format {
            bits: 4,
            group_size: GroupSize::Features(128),
            symmetric: true,
            desc_act: false,
            permuted: false,
            v1: true,
            has_g_idx: true,
            written_by_gptqmodel: false,
            shapes: vec![[4096, 4096], [11008, 4096], [4096, 11008]],
            class: "LlamaForCausalLM",
            expert_layers: (0, 32),
        }
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
