//! Names of tensors: those of llama.cpp and those of transformers' Llama, Mistral, Qwen2 and Qwen3.

/// Factors of the rotary frequencies, which are no tensor of a Hugging Face folder.
pub const ROPE_FREQS: &str = "rope_freqs.weight";
/// The embedding.
pub const TOKEN_EMBEDDING: &str = "token_embd.weight";
/// The output layer, where it is not the embedding.
pub const OUTPUT: &str = "output.weight";

/// Names outside layers, after the prefix of the decoder; the output layer has none.
const OUTSIDE: [(&str, &str); 2] =
    [(TOKEN_EMBEDDING, "embed_tokens.weight"), ("output_norm.weight", "norm.weight")];

/// Modules of a layer.
const MODULES: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Prefix of the decoder's names in a Hugging Face folder.
const PREFIX: &str = "model.";
/// Name of the output layer there.
const LM_HEAD: &str = "lm_head.weight";

/// llama.cpp's name of a tensor of a Hugging Face folder.
pub fn in_gguf(name: &str) -> Option<String> {
    if name == LM_HEAD {
        return Some(OUTPUT.to_owned());
    }
    let inside = name.strip_prefix(PREFIX)?;
    if let Some((own, _)) = OUTSIDE.iter().find(|(_, theirs)| *theirs == inside) {
        return Some((*own).to_owned());
    }
    let (layer, path) = inside.strip_prefix("layers.")?.split_once('.')?;
    let (module, part) = path.rsplit_once('.')?;
    let (own, _) = MODULES.iter().find(|(_, theirs)| *theirs == module)?;
    is_layer(layer).then(|| format!("blk.{layer}.{own}.{part}"))
}

/// The name in a Hugging Face folder of a tensor of a GGUF file.
pub fn in_folder(name: &str) -> Option<String> {
    if name == OUTPUT {
        return Some(LM_HEAD.to_owned());
    }
    if let Some((_, theirs)) = OUTSIDE.iter().find(|(own, _)| *own == name) {
        return Some(format!("{PREFIX}{theirs}"));
    }
    let (layer, path) = name.strip_prefix("blk.")?.split_once('.')?;
    let (module, part) = path.rsplit_once('.')?;
    let (_, theirs) = MODULES.iter().find(|(own, _)| *own == module)?;
    let known = is_layer(layer) && ["weight", "bias"].contains(&part);
    known.then(|| format!("{PREFIX}layers.{layer}.{theirs}.{part}"))
}

/// Whether a tensor of a GGUF file is q or k: `blk.3.attn_q.weight`.
pub fn is_q(name: &str) -> bool {
    name.ends_with(".attn_q.weight") || name.ends_with(".attn_q.bias")
}

/// As [`is_q`], for k.
pub fn is_k(name: &str) -> bool {
    name.ends_with(".attn_k.weight") || name.ends_with(".attn_k.bias")
}

/// A number as both write it, without zeros in front.
fn is_layer(text: &str) -> bool {
    text.parse::<u32>().is_ok_and(|layer| layer.to_string() == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_translated_both_ways() {
        for (theirs, own) in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.norm.weight", "output_norm.weight"),
            ("lm_head.weight", "output.weight"),
            ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"),
            ("model.layers.11.self_attn.k_norm.weight", "blk.11.attn_k_norm.weight"),
            ("model.layers.2.self_attn.v_proj.bias", "blk.2.attn_v.bias"),
            ("model.layers.2.post_attention_layernorm.weight", "blk.2.ffn_norm.weight"),
            ("model.layers.2.mlp.down_proj.weight", "blk.2.ffn_down.weight"),
        ] {
            assert_eq!(in_gguf(theirs).as_deref(), Some(own));
            assert_eq!(in_folder(own).as_deref(), Some(theirs));
        }
        assert_eq!(in_gguf("model.layers.0.self_attn.qkv_proj.weight"), None);
        for other in ["rope_freqs.weight", "blk.00.attn_q.weight", "blk.0.attn_qkv.weight", "blk.0.attn_q.x"]
        {
            assert_eq!(in_folder(other), None);
        }
        assert!(
            is_q("blk.0.attn_q.bias") && !is_q("blk.0.attn_q_norm.weight") && is_k("blk.0.attn_k.weight")
        );
    }
}
