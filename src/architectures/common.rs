//! Keys that the configs of most families share, and the names of Llama's modules.

use super::{
    Activation, AttentionConfig, ConfigFields, EmbeddingMultiplier, FeedForwardConfig, LayerConfig,
    LayerParts, LinearConfig, ModelConfig, NormConfig, NormKind, NormPositions, RopeConfig, RopeScaling,
    RoutingConfig, rope::RopeDefaults,
};
use crate::{
    error::Result,
    json::{Fields, SIZE_LIMIT},
};

/// More decoder layers than any model has; keeps a wrong number from filling the memory with names.
const MAX_LAYERS: usize = 4096;

/// A family's values for keys that are missing in the config.
#[derive(Clone, Copy)]
pub(super) struct Defaults {
    /// Hidden size, intermediate size, layers, query heads and vocabulary, if published configs of the family omit them.
    pub(super) sizes: Option<[usize; 5]>,
    /// Key heads if the key is missing; `None`: as many as query heads. A `null` in the config means as many as query heads.
    pub(super) kv_heads: Option<usize>,
    /// Features of a head; `None`: hidden size over heads.
    pub(super) head_dim: Option<usize>,
    /// Longest sequence.
    pub(super) max_positions: usize,
    /// Key and value of the number that norms add to a mean square or a variance.
    pub(super) eps: (&'static str, f64),
    /// Whether the output layer is the embedding.
    pub(super) tied: bool,
    /// The key of the activation, and its name.
    pub(super) activation: (&'static str, &'static str),
    /// Base of the rotary embedding.
    pub(super) theta: f64,
    /// The part of a head that is rotated; `None` if the whole head always is.
    pub(super) partial_rotary: Option<f64>,
    /// Whether neighbouring features are rotated together.
    pub(super) interleaved: bool,
}

/// Llama's defaults, which most other families extend.
pub(super) const LLAMA: Defaults = Defaults {
    sizes: None,
    kv_heads: None,
    head_dim: None,
    max_positions: 2048,
    eps: ("rms_norm_eps", 1e-6),
    tied: false,
    activation: ("hidden_act", "silu"),
    theta: 10_000.0,
    partial_rotary: None,
    interleaved: false,
};

/// Sizes of a model, checked.
#[derive(Clone, Copy)]
pub(super) struct Sizes<'a> {
    pub(super) config: ConfigFields<'a>,
    defaults: Defaults,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    vocab: usize,
    pub(super) max_positions: usize,
    pub(super) eps: f64,
    pub(super) activation: Activation,
}

impl<'a> Sizes<'a> {
    pub(super) fn read(config: &ConfigFields<'a>, defaults: Defaults) -> Result<Self> {
        let fields = &config.decoder;
        let size = |key: &str, position: usize| match defaults.sizes {
            Some(sizes) => Ok(fields.size(key)?.unwrap_or(sizes[position])),
            None => fields.required_size(key),
        };
        let (key, default) = defaults.activation;
        let name = fields.text(key)?.unwrap_or(default);
        let Some(activation) = Activation::by_name(name) else {
            let expected = "`silu`, `gelu`, `gelu_pytorch_tanh`, `relu` or `relu2`";
            return Err(fields.error(key, expected, format_args!("`{name}`")));
        };
        let hidden = size("hidden_size", 0)?;
        let layers = size("num_hidden_layers", 2)?;
        if layers > MAX_LAYERS {
            return Err(fields.error("num_hidden_layers", format_args!("at most {MAX_LAYERS}"), layers));
        }
        let heads = size("num_attention_heads", 3)?;
        Ok(Self {
            config: *config,
            defaults,
            hidden,
            intermediate: size("intermediate_size", 1)?,
            layers,
            heads,
            kv_heads: kv_heads(fields, defaults.kv_heads, heads)?,
            head_dim: head_dim(fields, defaults.head_dim, hidden, heads)?,
            vocab: size("vocab_size", 4)?,
            max_positions: fields.size("max_position_embeddings")?.unwrap_or(defaults.max_positions),
            eps: fields.positive(defaults.eps.0)?.unwrap_or(defaults.eps.1),
            activation,
        })
    }

    /// A boolean of the config.
    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.config.decoder.boolean(key)?.unwrap_or(default))
    }

    /// A number of the config, above 0.
    pub(super) fn number(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.config.decoder.positive(key)?.unwrap_or(default))
    }

    /// The rotary embedding, the same for all layers.
    pub(super) fn rope(&self) -> Result<RopeConfig> {
        RopeConfig::read(&self.config, self.rope_defaults())
    }

    /// The rotary embeddings of layers with a window and of all other layers. In the layout of transformers 5,
    /// `rope_parameters` has a section for each. Otherwise, the former has the base `key` and no scaling. `theta` is its
    /// default base.
    pub(super) fn ropes_by_window(&self, key: Option<&str>, theta: f64) -> Result<[RopeConfig; 2]> {
        let (config, far) = (&self.config, self.rope_defaults());
        let nested = config.decoder.get("rope_parameters");
        let Some(nested) = nested.filter(|value| value.get("full_attention").is_some()) else {
            let theta = key.map_or(Ok(theta), |key| self.number(key, theta))?;
            let far = RopeConfig::read(config, far)?;
            return Ok([RopeConfig { theta, scaling: RopeScaling::None, ..far.clone() }, far]);
        };
        let of = |key: &str, defaults| {
            RopeConfig::from_layout(config, nested.get(key).map(|value| (key, value)), defaults)
        };
        let near = RopeDefaults { theta, ..far };
        Ok([of("sliding_attention", near)?, of("full_attention", far)?])
    }

    pub(super) fn rope_defaults(&self) -> RopeDefaults {
        RopeDefaults {
            theta: self.defaults.theta,
            head_dim: self.head_dim,
            partial: self.defaults.partial_rotary,
            interleaved: self.defaults.interleaved,
            max_positions: self.max_positions,
            original_max: None,
        }
    }

    /// A norm of the hidden states.
    pub(super) fn norm(&self, path: &'static str, kind: NormKind, bias: bool) -> NormConfig {
        NormConfig { path, kind, eps: self.eps, shape: vec![self.hidden], bias }
    }

    /// RMSNorms before both blocks, under the names of Llama.
    pub(super) fn pre_norms(&self, kind: NormKind, bias: bool) -> NormPositions {
        NormPositions {
            input: Some(self.norm("input_layernorm", kind, bias)),
            feed_forward: Some(self.norm("post_attention_layernorm", kind, bias)),
            ..NormPositions::default()
        }
    }

    /// Norms of q and k, `[head_dim]` each.
    pub(super) fn qk_norms(&self, kind: NormKind) -> [NormConfig; 2] {
        ["self_attn.q_norm", "self_attn.k_norm"].map(|path| NormConfig {
            path,
            kind,
            eps: self.eps,
            shape: vec![self.head_dim],
            bias: false,
        })
    }

    /// Attention over all tokens with a rotary embedding; `attention_bias`, by default false, is of all its linears.
    pub(super) fn llama_attention(&self) -> Result<AttentionConfig> {
        Ok(self.attention(Some(self.rope()?), [self.flag("attention_bias", false)?; 2]))
    }

    /// Attention over all tokens with Llama's names; `bias`: of q, k and v, and of the output projection.
    pub(super) fn attention(&self, rope: Option<RopeConfig>, bias: [bool; 2]) -> AttentionConfig {
        let (width, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let projection = |path: &str, out: usize| LinearConfig::new(path, [out, self.hidden], bias[0]);
        AttentionConfig {
            num_heads: self.heads,
            num_kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            projections: vec![
                projection("self_attn.q_proj", width),
                projection("self_attn.k_proj", kv),
                projection("self_attn.v_proj", kv),
            ],
            output: LinearConfig::new("self_attn.o_proj", [self.hidden, width], bias[1]),
            qk_norms: None,
            rope,
            window: None,
            scale: (self.head_dim as f64).powf(-0.5),
            softcap: None,
        }
    }

    /// A gated block with Llama's names.
    pub(super) fn gated(&self, bias: bool) -> FeedForwardConfig {
        let wide = [self.intermediate, self.hidden];
        FeedForwardConfig {
            inputs: vec![
                LinearConfig::new("mlp.gate_proj", wide, bias),
                LinearConfig::new("mlp.up_proj", wide, bias),
            ],
            down: LinearConfig::new("mlp.down_proj", [self.hidden, self.intermediate], bias),
            gated: true,
            activation: self.activation,
        }
    }

    /// A gated block with the rows of gate and up in one linear.
    pub(super) fn fused_gated(&self) -> FeedForwardConfig {
        let both = LinearConfig::new("mlp.gate_up_proj", [2 * self.intermediate, self.hidden], false);
        FeedForwardConfig { inputs: vec![both], ..self.gated(false) }
    }

    /// A block without a gate.
    pub(super) fn plain(&self, [up, down]: [&str; 2], bias: bool) -> FeedForwardConfig {
        FeedForwardConfig {
            inputs: vec![LinearConfig::new(up, [self.intermediate, self.hidden], bias)],
            down: LinearConfig::new(down, [self.hidden, self.intermediate], bias),
            gated: false,
            activation: self.activation,
        }
    }

    /// Experts of a layer and experts of a token; `default` has both for configs without these keys.
    pub(super) fn routing(&self, router: &'static str, default: [usize; 2]) -> Result<RoutingConfig> {
        let fields = &self.config.decoder;
        let experts = fields.size("num_experts")?.or(fields.size("num_local_experts")?).unwrap_or(default[0]);
        let per_token = fields.size("num_experts_per_tok")?.unwrap_or(default[1]);
        if per_token > experts {
            return Err(fields.error(
                "num_experts_per_tok",
                format_args!("at most {experts}, all experts"),
                per_token,
            ));
        }
        let renormalized = self.flag("norm_topk_prob", false)?;
        Ok(RoutingConfig { router, experts, per_token, renormalized, shared_gate: None })
    }

    /// A layer as Llama's: norms before both blocks, both outputs added as they are.
    pub(super) fn llama_layer(&self, attention: AttentionConfig, bias: bool) -> LayerParts {
        LayerParts {
            attention,
            feed_forward: self.gated(bias).into(),
            norms: self.pre_norms(NormKind::Rms, false),
            parallel: false,
            residual_multiplier: 1.0,
        }
    }

    /// A model of these layers, `layer` of each; with Llama's names around them.
    pub(super) fn model(&self, layer: impl Fn(usize) -> LayerParts) -> Result<ModelConfig> {
        let (config, file) = (&self.config, &self.config.file);
        let decoder = &config.decoder;
        let layers: Vec<LayerConfig> = (0..self.layers).map(|i| LayerConfig::new(layer(i))).collect();
        let kind = layers[0].norms.all().next().map_or(NormKind::Rms, |norm| norm.kind);
        // A key of the file takes precedence over that of the decoder's section.
        let tied = file.boolean("tie_word_embeddings")?.or(decoder.boolean("tie_word_embeddings")?);
        let ids = |key: &str| {
            let own = decoder.token_ids(key)?;
            if own.is_empty() { file.token_ids(key) } else { Ok(own) }
        };
        Ok(ModelConfig {
            class: config.class,
            hidden_size: self.hidden,
            vocab_size: self.vocab,
            max_position_embeddings: self.max_positions,
            layers,
            embedding_multiplier: EmbeddingMultiplier::Exact(1.0),
            final_norm: self.norm("norm", kind, false),
            logits_multiplier: 1.0,
            logits_softcap: None,
            tie_word_embeddings: tied.unwrap_or(self.defaults.tied),
            prefix: "model.".into(),
            lm_head: "lm_head.weight".into(),
            bos_token_id: ids("bos_token_id")?.first().copied(),
            eos_token_ids: ids("eos_token_id")?,
            dtype: dtype(decoder)?.or(dtype(file)?),
            raw: config.raw.clone(),
        })
    }

    /// The window of each layer: `window` or none, by [`Sizes::windowed`].
    pub(super) fn windows(
        &self,
        window: Option<usize>,
        default: impl Fn(usize) -> bool,
    ) -> Result<Vec<Option<usize>>> {
        let windowed = self.windowed(default)?.into_iter();
        Ok(windowed.map(|windowed| window.filter(|_| windowed)).collect())
    }

    /// Which layers have a sliding window, by `layer_types` or else by `default`.
    pub(super) fn windowed(&self, default: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
        let fields = &self.config.decoder;
        let Some(types) = fields.get("layer_types") else {
            return Ok((0..self.layers).map(default).collect());
        };
        let windowed = |of: &serde_json::Value| match of.as_str()? {
            "sliding_attention" => Some(true),
            "full_attention" | "attention" => Some(false),
            _ => None,
        };
        let all: Option<Vec<bool>> = types.as_array().and_then(|types| types.iter().map(windowed).collect());
        all.filter(|all| all.len() == self.layers).ok_or_else(|| {
            let expected =
                format!("`sliding_attention` or `full_attention` for each of {} layers", self.layers);
            fields.error("layer_types", expected, types)
        })
    }
}

fn dtype(fields: &Fields<'_>) -> Result<Option<String>> {
    Ok(fields.text("dtype")?.or(fields.text("torch_dtype")?).map(str::to_owned))
}

fn kv_heads(fields: &Fields<'_>, missing: Option<usize>, heads: usize) -> Result<usize> {
    let key = "num_key_value_heads";
    let default = if fields.has(key) { heads } else { missing.unwrap_or(heads) };
    let kv_heads = fields.size(key)?.unwrap_or(default);
    if !heads.is_multiple_of(kv_heads) {
        return Err(fields.error(key, format_args!("a divisor of num_attention_heads {heads}"), kv_heads));
    }
    Ok(kv_heads)
}

fn head_dim(fields: &Fields<'_>, default: Option<usize>, hidden: usize, heads: usize) -> Result<usize> {
    let head_dim = match fields.size("head_dim")?.or(default) {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(fields.error(
                "num_attention_heads",
                format_args!("a divisor of hidden_size {hidden}"),
                heads,
            ));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(fields.error("head_dim", "an even number", head_dim));
    }
    match head_dim.checked_mul(heads) {
        Some(width) if width < SIZE_LIMIT => Ok(head_dim),
        _ => Err(fields.error("head_dim", "num_attention_heads * head_dim below 2147483648", head_dim)),
    }
}
