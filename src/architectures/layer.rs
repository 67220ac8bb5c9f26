//! One decoder layer: attention and feed-forward block, the norms around them, and its linears in calibration order.

use std::{ops::Range, sync::Arc};

use super::{FeedForward, RopeConfig};

/// A linear of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearConfig {
    /// Inside the layer, `self_attn.q_proj`.
    pub path: Arc<str>,
    /// Shape of the dense weight, `[out, in]`.
    pub shape: [usize; 2],
    /// Whether it has a bias, `[out]`.
    pub bias: bool,
}

impl LinearConfig {
    /// A linear by its path in the layer.
    pub fn new(path: &str, shape: [usize; 2], bias: bool) -> Self {
        Self { path: path.into(), shape, bias }
    }

    /// Weights, `out · in`.
    pub fn weights(&self) -> usize {
        self.shape[0] * self.shape[1]
    }
}

/// The formula of a norm. RMSNorms divide by the root of the mean square.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// RMSNorm, times `w`.
    Rms,
    /// RMSNorm, times `1 + w`.
    RmsPlusOne,
    /// LayerNorm: the mean is subtracted first.
    Layer,
}

/// A norm.
#[derive(Debug, Clone, PartialEq)]
pub struct NormConfig {
    /// Path of its module in the layer, or below the model's prefix.
    pub path: &'static str,
    /// Its formula.
    pub kind: NormKind,
    /// Added to the mean square or the variance.
    pub eps: f64,
    /// Sizes of the weight: `[features]`, or `[heads, features of a head]`.
    pub shape: Vec<usize>,
    /// Whether it has a bias as long as the weight.
    pub bias: bool,
}

impl NormConfig {
    /// Name of the weight, starting with the path.
    pub fn weight(&self) -> String {
        format!("{}.weight", self.path)
    }

    /// Name of the bias.
    pub fn bias_name(&self) -> String {
        format!("{}.bias", self.path)
    }

    /// Its tensors and their shapes.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Vec<usize>)> {
        let bias = self.bias.then(|| (self.bias_name(), self.shape.clone()));
        std::iter::once((self.weight(), self.shape.clone())).chain(bias)
    }

    /// The same norm at another place.
    #[must_use]
    pub fn at(&self, path: &'static str) -> Self {
        Self { path, ..self.clone() }
    }
}

/// Norms around a layer's blocks.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct NormPositions {
    /// Of the residual stream, before attention; before both blocks if they are parallel.
    pub input: Option<NormConfig>,
    /// Of attention's output, before it is added to the residual stream.
    pub attention_output: Option<NormConfig>,
    /// Of the residual stream, before the feed-forward block.
    pub feed_forward: Option<NormConfig>,
    /// Of the feed-forward block's output, before it is added.
    pub feed_forward_output: Option<NormConfig>,
}

impl NormPositions {
    /// All norms, in the order of the forward pass.
    pub fn all(&self) -> impl Iterator<Item = &NormConfig> {
        [&self.input, &self.attention_output, &self.feed_forward, &self.feed_forward_output]
            .into_iter()
            .flatten()
    }
}

/// Causal attention.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionConfig {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Features a head, even; `num_heads * head_dim` need not be the hidden size.
    pub head_dim: usize,
    /// The linears that read the layer's input: q, k and v, or one with their rows one after another.
    pub projections: Vec<LinearConfig>,
    /// The output projection.
    pub output: LinearConfig,
    /// Norms of q and of k before RoPE: per head (`[head_dim]` or `[heads, head_dim]`), or over the whole projection.
    pub qk_norms: Option<[NormConfig; 2]>,
    /// Rotary position embedding, if the layer has one.
    pub rope: Option<RopeConfig>,
    /// A token attends to this many tokens, itself included. `None`: to itself and all tokens before it.
    pub window: Option<usize>,
    /// Factor of the scores.
    pub scale: f64,
    /// Scores `x` become `cap · tanh(x / cap)`.
    pub softcap: Option<f64>,
}

impl AttentionConfig {
    /// Features of all query heads.
    pub fn width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Features of all key heads, and of all value heads.
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Whether q, k and v are rows of one linear.
    pub fn fused(&self) -> bool {
        self.projections.len() == 1
    }

    /// The position among the projections, and the rows there, of the values.
    pub fn value_rows(&self) -> (usize, Range<usize>) {
        let (width, kv) = (self.width(), self.kv_width());
        if self.fused() { (0, width + kv..width + 2 * kv) } else { (2, 0..kv) }
    }
}

/// A layer as its family describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerParts {
    /// The attention block.
    pub attention: AttentionConfig,
    /// The feed-forward block, or experts.
    pub feed_forward: FeedForward,
    /// Norms around both.
    pub norms: NormPositions,
    /// Whether both blocks read the same normalized input, and both outputs are added at once.
    pub parallel: bool,
    /// Factor of the blocks' outputs before they are added.
    pub residual_multiplier: f64,
}

/// A decoder layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerConfig {
    /// The family's description.
    parts: LayerParts,
    /// In calibration order.
    pub linears: Vec<LinearConfig>,
    /// In the order of the forward pass.
    pub stages: Vec<StageConfig>,
}

impl std::ops::Deref for LayerConfig {
    type Target = LayerParts;

    fn deref(&self) -> &LayerParts {
        &self.parts
    }
}

/// Linears that are solved after one pass over the windows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageConfig {
    /// Its place in the layer.
    pub kind: StageKind,
    /// Linears by input.
    pub groups: Vec<GroupConfig>,
}

/// Linears that read the same input, so that they share a Hessian.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupConfig {
    /// For reports and errors: `q/k/v`.
    pub name: String,
    /// Positions in [`LayerConfig::linears`].
    pub linears: Range<usize>,
    /// Input features.
    pub width: usize,
    /// Number of the expert, if the linears belong to one.
    pub expert: Option<usize>,
}

/// The place of a stage in its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StageKind {
    /// q, k and v.
    AttentionInput,
    /// The output projection.
    AttentionOutput,
    /// gate and up.
    FeedForwardInput,
    /// down.
    FeedForwardOutput,
    /// Of parallel blocks: the linears that read the layer's input.
    ParallelInput,
    /// Of parallel blocks: the linears that write to the residual stream.
    ParallelOutput,
}

impl StageKind {
    /// Whether the stage's linears write to the residual stream. Their inputs are stored by the stage before; the inputs of
    /// other stages are computed from the stream.
    pub fn writes(self) -> bool {
        matches!(self, Self::AttentionOutput | Self::FeedForwardOutput | Self::ParallelOutput)
    }
}

impl StageConfig {
    /// Its name for reports and errors: `q/k/v`.
    pub fn name(&self) -> String {
        match &self.groups[..] {
            [one] => one.name.clone(),
            [first, second] => format!("{} and {}", first.name, second.name),
            [first, ..] => format!("{} and {} others", first.name, self.groups.len() - 1),
            [] => String::new(),
        }
    }

    /// Positions of its linears in [`LayerConfig::linears`].
    pub fn linears(&self) -> Range<usize> {
        let of = |group: Option<&GroupConfig>| group.map_or(0..0, |group| group.linears.clone());
        of(self.groups.first()).start..of(self.groups.last()).end
    }
}

impl LayerConfig {
    /// Orders the linears and divides them into stages.
    pub fn new(parts: LayerParts) -> Self {
        let (attention, blocks) = (&parts.attention, &parts.feed_forward.blocks);
        let (mut linears, mut stages) = (Vec::new(), Vec::new());
        let mut group = |own: &[LinearConfig]| {
            let start = linears.len();
            linears.extend_from_slice(own);
            let width = own.first().map_or(0, |linear| linear.shape[1]);
            GroupConfig { name: short_names(own), linears: start..linears.len(), width, expert: None }
        };
        let of_block = |position: usize, group: GroupConfig| match &parts.feed_forward.routing {
            Some(routing) if position < routing.experts => {
                let name = format!("expert {position} {}", group.name);
                GroupConfig { name, expert: Some(position), ..group }
            }
            Some(_) => GroupConfig { name: format!("shared {}", group.name), ..group },
            None => group,
        };
        let output = std::slice::from_ref(&attention.output);
        if parts.parallel {
            assert_eq!(blocks.len(), 1, "parallel blocks have no experts");
            let all: Vec<LinearConfig> =
                attention.projections.iter().chain(&blocks[0].inputs).cloned().collect();
            stages.push(StageConfig { kind: StageKind::ParallelInput, groups: vec![group(&all)] });
            let groups = vec![group(output), group(std::slice::from_ref(&blocks[0].down))];
            stages.push(StageConfig { kind: StageKind::ParallelOutput, groups });
        } else {
            let groups = vec![group(&attention.projections)];
            stages.push(StageConfig { kind: StageKind::AttentionInput, groups });
            stages.push(StageConfig { kind: StageKind::AttentionOutput, groups: vec![group(output)] });
            let inputs = blocks.iter().enumerate();
            let groups = inputs.map(|(i, block)| of_block(i, group(&block.inputs))).collect();
            stages.push(StageConfig { kind: StageKind::FeedForwardInput, groups });
            let downs = blocks.iter().map(|block| std::slice::from_ref(&block.down)).enumerate();
            let groups = downs.map(|(i, down)| of_block(i, group(down))).collect();
            stages.push(StageConfig { kind: StageKind::FeedForwardOutput, groups });
        }
        Self { parts, linears, stages }
    }

    /// Positions of the attention's projections in [`LayerConfig::linears`].
    pub fn projections(&self) -> Range<usize> {
        0..self.attention.projections.len()
    }

    /// Position of the attention's output projection.
    pub fn attention_output(&self) -> usize {
        self.stages[1].linears().start
    }

    /// Features of each input of a stage that the stage before stores.
    pub fn stored_widths(&self, stage: usize) -> Vec<usize> {
        match self.stages[stage].kind {
            StageKind::AttentionOutput => vec![self.attention.width()],
            StageKind::FeedForwardOutput => self.feed_forward.stored_widths(),
            StageKind::ParallelOutput => {
                let own = std::iter::once(self.attention.width());
                own.chain(self.feed_forward.stored_widths()).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The tensors of the layer beside its linears: norms, router and gate.
    pub fn dense_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let qk_norms = self.attention.qk_norms.iter().flatten();
        let norms = self.norms.all().chain(qk_norms).flat_map(NormConfig::tensors);
        norms.chain(self.feed_forward.dense_tensors(self.hidden_size())).collect()
    }

    /// Width of the residual stream.
    pub fn hidden_size(&self) -> usize {
        self.attention.output.shape[0]
    }

    /// Each norm of the residual stream with all its readers: positions of linears, and other tensors.
    pub fn norm_readers(&self) -> Vec<(&NormConfig, Range<usize>, Vec<&'static str>)> {
        let inputs = self.stages[0].linears();
        let routing = self.feed_forward.routing.iter();
        let dense =
            routing.flat_map(|routing| std::iter::once(routing.router).chain(routing.shared_gate)).collect();
        let own = self.norms.feed_forward.as_ref();
        let own = own.map(|norm| (norm, self.stages[self.stages.len() - 2].linears(), dense));
        self.norms.input.iter().map(|norm| (norm, inputs.clone(), Vec::new())).chain(own).collect()
    }

    /// The norm of the residual stream that a linear reads; `None` if it reads something else.
    pub fn norm_before(&self, position: usize) -> Option<&NormConfig> {
        let mut readers = self.norm_readers().into_iter();
        readers.find(|(_, linears, _)| linears.contains(&position)).map(|(norm, ..)| norm)
    }

    /// Whether a linear writes to the residual stream.
    pub fn writes_to_stream(&self, position: usize) -> bool {
        self.stages.iter().any(|stage| stage.kind.writes() && stage.linears().contains(&position))
    }
}

/// `q/k/v` of `self_attn.q_proj` and its like.
fn short_names(linears: &[LinearConfig]) -> String {
    let short = |linear: &LinearConfig| {
        let name = linear.path.rsplit('.').next().unwrap_or_default();
        name.trim_end_matches("_proj").to_owned()
    };
    linears.iter().map(short).collect::<Vec<_>>().join("/")
}
