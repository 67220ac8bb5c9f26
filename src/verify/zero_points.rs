//! Zero points of a whole checkpoint: the causes that explain wrong ones in many linears at once.

use crate::{
    architectures::LinearId,
    checkpoint::{Checkpoint, CheckpointFormat, QuantizationConfig, integers, stored_zeros},
    error::Result,
};

/// The linears that one cause explains, counted.
#[derive(Debug, Default)]
struct Linears {
    count: usize,
    first: Option<LinearId>,
}

impl Linears {
    fn add(&mut self, id: &LinearId) {
        self.count += 1;
        self.first.get_or_insert_with(|| id.clone());
    }
}

/// The causes found so far.
#[derive(Debug)]
pub(super) struct ZeroPoints<'a> {
    quantization: &'a QuantizationConfig,
    /// Linears that were looked at.
    all: usize,
    /// Symmetric ones, all of whose zero points are stored as the other format stores them.
    other_format: Linears,
    /// Asymmetric ones with zero points that are stored as the largest value, and the number of these zero points.
    beyond: (Linears, usize),
}

impl<'a> ZeroPoints<'a> {
    pub(super) fn new(quantization: &'a QuantizationConfig) -> Self {
        let (other_format, beyond) = Default::default();
        Self { quantization, all: 0, other_format, beyond }
    }

    /// All linears of a checkpoint.
    ///
    /// # Errors
    /// When `qzeros` is of another type.
    pub(super) fn of(checkpoint: &Checkpoint, quantization: &'a QuantizationConfig) -> Result<Self> {
        let mut zeros = Self::new(quantization);
        for (id, _) in checkpoint.config().linears() {
            let name = id.qzeros();
            if checkpoint.contains(&name) {
                zeros.explains(&id, &integers(&checkpoint.view(&name)?)?);
                checkpoint.release([&name]);
            }
        }
        Ok(zeros)
    }

    /// Looks at the zero points of a linear; returns whether one of the causes explains all that is wrong with them.
    pub(super) fn explains(&mut self, id: &LinearId, qzeros: &[i32]) -> bool {
        let (bits, format) = (self.quantization.bits, self.quantization.format);
        self.all += 1;
        if !self.quantization.sym {
            let largest = bits.max_code();
            // `gptq_v2` stores a zero point as it is.
            let count = match format {
                CheckpointFormat::Gptq => stored_zeros(qzeros, bits).filter(|zero| *zero == largest).count(),
                CheckpointFormat::GptqV2 => 0,
            };
            if count > 0 {
                self.beyond.0.add(id);
                self.beyond.1 += count;
            }
            return count > 0;
        }
        let stored = bits.symmetric_zero() - other(format).zero_offset();
        let all = !qzeros.is_empty() && stored_zeros(qzeros, bits).all(|zero| zero == stored);
        if all {
            self.other_format.add(id);
        }
        all
    }

    /// Each cause, with the linears that it explains and what was used.
    pub(super) fn causes(&self) -> Vec<String> {
        let (bits, format, all) = (self.quantization.bits, self.quantization.format, self.all);
        let mut causes = Vec::new();
        if let Linears { count, first: Some(first) } = &self.other_format {
            let zero = bits.symmetric_zero();
            let [stored, expected] = [other(format), format].map(|format| zero - format.zero_offset());
            let (name, other_name) = (format.name(), other(format).name());
            causes.push(format!(
                "the zero points of {count} of {all} linears (first: {first}) are stored as {stored}; `{name}` stores the zero \
                 point {zero} of a symmetric grid as {expected}. They are stored like `{other_name}`, and every weight is read \
                 one step off: if the tool that made them meant that, write \"checkpoint_format\": \"{other_name}\" into \
                 config.json (`quantization_config`) and quantize_config.json"
            ));
        }
        if let (Linears { count, first: Some(first) }, zeros) = &self.beyond {
            let (largest, used) = (bits.max_code(), u32::from(bits.max_code()) + 1);
            causes.push(format!(
                "{zeros} zero points of {count} of {all} linears (first: {first}) are stored as {largest}: {used} is used here, \
                 and other readers make 0 of it"
            ));
        }
        causes
    }
}

fn other(format: CheckpointFormat) -> CheckpointFormat {
    match format {
        CheckpointFormat::Gptq => CheckpointFormat::GptqV2,
        CheckpointFormat::GptqV2 => CheckpointFormat::Gptq,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::{architectures::ModelConfig, pack::pack_columns, variant::Bits};

    fn causes(bits: Bits, symmetric: bool, format: &str, stored: &[&[u8]]) -> Vec<String> {
        let settings = json!({
            "bits": bits.get(), "group_size": 32, "desc_act": false, "sym": symmetric, "checkpoint_format": format,
        });
        let quantization = QuantizationConfig::from_json(Path::new("q.json"), &settings).unwrap();
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        });
        let config = ModelConfig::from_json("config.json", &config).unwrap();
        let mut zeros = ZeroPoints::new(&quantization);
        for ((id, _), stored) in config.linears().zip(stored) {
            zeros.explains(&id, &pack_columns(stored, stored.len(), bits));
        }
        zeros.causes()
    }

    #[test]
    fn zero_points_of_the_other_format_have_one_cause_for_all_linears() {
        for (bits, zero) in [(Bits::Two, 2), (Bits::Three, 4), (Bits::Four, 8), (Bits::Eight, 128)] {
            let (less, exact): (&[u8], &[u8]) = (&[zero - 1; 32], &[zero; 32]);
            let mut mixed = [zero; 32];
            mixed[31] -= 1;
            assert_eq!(causes(bits, true, "gptq", &[less, less, &mixed]), [""; 0]);
            assert_eq!(causes(bits, true, "gptq_v2", &[exact, &mixed]), [""; 0]);
            let found = causes(bits, true, "gptq", &[less, exact, exact]);
            let expected = format!(
                "the zero points of 2 of 3 linears (first: model.layers.0.self_attn.k_proj) are stored as {zero}; `gptq` stores \
                 the zero point {zero} of a symmetric grid as {}. They are stored like `gptq_v2`, ",
                zero - 1
            );
            assert!(found.len() == 1 && found[0].starts_with(&expected), "{found:?}");
            let found = causes(bits, true, "gptq_v2", &[less]);
            assert!(found.len() == 1 && found[0].contains("They are stored like `gptq`, "), "{found:?}");
        }
    }

    #[test]
    fn an_asymmetric_zero_point_on_which_readers_disagree_is_named_with_what_is_used() {
        let (plain, beyond): (&[u8], &[u8]) = (&[3, 0, 14, 7, 1, 2, 3, 4], &[3, 15, 14, 15, 1, 2, 3, 4]);
        assert_eq!(causes(Bits::Four, false, "gptq", &[plain]), [""; 0]);
        assert_eq!(
            causes(Bits::Four, false, "gptq", &[plain, beyond]),
            [
                "2 zero points of 1 of 2 linears (first: model.layers.0.self_attn.k_proj) are stored as 15: 16 is used here, and \
              other readers make 0 of it"
            ]
        );
        assert_eq!(causes(Bits::Four, false, "gptq_v2", &[beyond]), [""; 0]);
    }
}
