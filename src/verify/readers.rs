//! Which software takes a checkpoint, as read in its sources; see `docs/format.md`.

use crate::{
    checkpoint::{Checkpoint, CheckpointFormat, LinearId, LinearKind, LlamaConfig, QuantizationConfig},
    error::Result,
    report::ReaderReport,
    variant::{Bits, GroupSize},
};

/// What decides about a reader.
struct Facts {
    bits: Bits,
    group_size: GroupSize,
    symmetric: bool,
    /// `g_idx` is not sequential.
    permuted: bool,
    v1: bool,
    has_g_idx: bool,
    written_by_gptqmodel: bool,
    /// `[N, K]` of the seven linears.
    shapes: Vec<[usize; 2]>,
}

/// Why a reader refuses, if it does.
type Rule = fn(&Facts) -> Option<String>;

/// All readers, in the order of the documentation.
pub fn readers(
    config: &LlamaConfig,
    quantization: &QuantizationConfig,
    checkpoint: &Checkpoint,
) -> Vec<ReaderReport> {
    let first = LinearId { layer: 0, kind: LinearKind::Q };
    let quantizer = quantization.meta.get("quantizer");
    let facts = Facts {
        bits: quantization.bits,
        group_size: quantization.group_size,
        symmetric: quantization.sym,
        permuted: !quantization.sequential_groups(),
        v1: quantization.format == CheckpointFormat::Gptq,
        has_g_idx: checkpoint.contains(&first.g_idx()),
        written_by_gptqmodel: quantizer.is_some_and(|q| q.to_string().contains("gptqmodel")),
        shapes: LinearKind::ALL.iter().map(|kind| kind.shape(config)).collect(),
    };
    let rules: [(&'static str, Rule); 8] = [
        ("transformers 5 (GPTQModel, optimum)", gptqmodel),
        ("GPTQModel 7", gptqmodel),
        ("AutoGPTQ 0.4-0.7", |_| None),
        ("Marlin (vLLM, GPTQModel)", marlin),
        ("Machete (vLLM on Hopper)", machete),
        ("ExLlama, ExLlamaV2", exllama),
        ("llama.cpp converter", llama_cpp),
        ("mistral.rs", mistral_rs),
    ];
    rules.iter().map(|(name, rule)| ReaderReport { name: (*name).into(), refused: rule(&facts) }).collect()
}

/// All readers of a quantized checkpoint.
///
/// # Errors
/// When it does not say how it was quantized.
pub fn readers_of(checkpoint: &Checkpoint) -> Result<Vec<ReaderReport>> {
    Ok(readers(checkpoint.config(), &QuantizationConfig::read(checkpoint)?, checkpoint))
}

fn gptqmodel(facts: &Facts) -> Option<String> {
    let foreign = facts.v1 && !facts.symmetric && !facts.written_by_gptqmodel;
    foreign.then(|| "refuses asymmetric v1 files it did not write".into())
}

fn marlin(facts: &Facts) -> Option<String> {
    if !facts.symmetric {
        return Some("symmetric only".into());
    }
    width(facts, &[Bits::Four, Bits::Eight])
        .or_else(|| group(facts, &[32, 64, 128]))
        .or_else(|| multiples(facts, 64, 128))
        .or_else(|| whole_groups(facts))
}

fn machete(facts: &Facts) -> Option<String> {
    width(facts, &[Bits::Four, Bits::Eight])
        .or_else(|| group(facts, &[64, 128]))
        .or_else(|| multiples(facts, 128, 64))
        .or_else(|| whole_groups(facts))
}

fn exllama(facts: &Facts) -> Option<String> {
    width(facts, &[Bits::Four]).or_else(|| multiples(facts, 32, 32)).or_else(|| whole_groups(facts))
}

fn llama_cpp(facts: &Facts) -> Option<String> {
    let missing = (!facts.has_g_idx).then(|| "needs g_idx tensors".to_owned());
    width(facts, &[Bits::Two, Bits::Four, Bits::Eight]).or(missing)
}

fn mistral_rs(facts: &Facts) -> Option<String> {
    if facts.permuted {
        return Some("act order gives wrong results".into());
    }
    if facts.group_size == GroupSize::PerChannel {
        return Some("cannot parse group size -1".into());
    }
    width(facts, &[Bits::Four, Bits::Eight])
}

fn width(facts: &Facts, taken: &[Bits]) -> Option<String> {
    let list = taken.iter().map(|b| b.get().to_string()).collect::<Vec<_>>().join("/");
    (!taken.contains(&facts.bits)).then(|| format!("{list}-bit only, this has {}", facts.bits.get()))
}

fn group(facts: &Facts, taken: &[usize]) -> Option<String> {
    match facts.group_size {
        GroupSize::PerChannel => None,
        GroupSize::Features(size) if taken.contains(&size) => None,
        GroupSize::Features(size) => {
            let list = taken.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            Some(format!("group sizes -1, {list} only, this has {size}"))
        }
    }
}

fn multiples(facts: &Facts, of_n: usize, of_k: usize) -> Option<String> {
    let [n, k] = facts.shapes.iter().find(|[n, k]| !n.is_multiple_of(of_n) || !k.is_multiple_of(of_k))?;
    Some(format!("needs N a multiple of {of_n} and K of {of_k}, a linear here is {n} x {k}"))
}

fn whole_groups(facts: &Facts) -> Option<String> {
    let partial = |k: usize| !k.is_multiple_of(facts.group_size.features(k));
    let [_, k] = facts.shapes.iter().find(|[_, k]| partial(*k))?;
    Some(format!("needs whole groups, K = {k} ends in a partial one"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            bits: Bits::Four,
            group_size: GroupSize::Features(128),
            symmetric: true,
            permuted: false,
            v1: true,
            has_g_idx: true,
            written_by_gptqmodel: false,
            shapes: vec![[4096, 4096], [11008, 4096], [4096, 11008]],
        }
    }

    const RULES: [Rule; 6] = [gptqmodel, marlin, machete, exllama, llama_cpp, mistral_rs];

    fn refusals(facts: &Facts) -> Vec<bool> {
        RULES.iter().map(|rule| rule(facts).is_some()).collect()
    }

    #[test]
    fn the_main_branch_is_taken_by_all() {
        assert_eq!(refusals(&facts()), [false; 6]);
    }

    #[test]
    fn each_refuses_what_its_sources_refuse() {
        let act = Facts { permuted: true, ..facts() };
        assert_eq!(refusals(&act), [false, false, false, false, false, true]);
        let small = Facts { group_size: GroupSize::Features(32), ..facts() };
        assert_eq!(refusals(&small), [false, false, true, false, false, false]);
        let asymmetric = Facts { symmetric: false, ..facts() };
        assert_eq!(refusals(&asymmetric), [true, true, false, false, false, false]);
        let three = Facts { bits: Bits::Three, ..facts() };
        assert_eq!(refusals(&three), [false, true, true, true, true, true]);
        let partial = Facts { shapes: vec![[128, 192]], ..facts() };
        assert_eq!(refusals(&partial), [false, true, true, true, false, false]);
        let channel = Facts { group_size: GroupSize::PerChannel, ..facts() };
        assert_eq!(refusals(&channel), [false, false, false, false, false, true]);
    }
}
