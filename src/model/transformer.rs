//! A decoder, computed layer by layer and stage by stage, as its config describes it.

use std::collections::HashMap;

use tch::{Device, Kind, TchError, Tensor};

use super::{
    Dense, KvCache, Linear,
    attention::AttentionTables,
    feed_forward::{Routing, activated},
    parts::{DenseParts, Norm},
};
use crate::{
    architectures::{EmbeddingMultiplier, LayerConfig, LinearId, ModelConfig, StageKind},
    checkpoint::{Checkpoint, Dtype},
    error::{Error, Result, TorchContext},
    ggml::{BlockType, round_rows},
};

/// The parts of the forward pass that all layers share: config, rotary tables and masks, kind and device of the computation.
#[derive(Debug)]
pub struct Transformer<'a> {
    checkpoint: &'a Checkpoint,
    attention: AttentionTables,
    kind: Kind,
    device: Device,
}

/// A decoder layer that is ready to run.
pub struct Layer<'a> {
    /// Which one, from 0.
    pub(super) index: usize,
    pub(super) parts: DenseParts,
    /// In the order of [`LayerConfig::linears`].
    pub(super) linears: Vec<Box<dyn Linear + 'a>>,
}

impl<'a> Layer<'a> {
    /// Layer `index` of these linears, in the order of [`LayerConfig::linears`].
    pub fn new(index: usize, parts: DenseParts, linears: Vec<Box<dyn Linear + 'a>>) -> Self {
        Self { index, parts, linears }
    }
}

/// A batch between two stages of a layer.
#[derive(Debug)]
pub struct Between {
    /// The residual stream, `[B, S, hidden]`.
    pub hidden: Tensor,
    /// Outputs of the stage before that this stage reads, `[B, S, …]` each: as many as [`LayerConfig::stored_widths`] has.
    pub stored: Vec<Tensor>,
}

impl Between {
    /// In front of a layer.
    pub fn entering(hidden: Tensor) -> Self {
        Self { hidden, stored: Vec::new() }
    }
}

impl<'a> Transformer<'a> {
    /// Prepares forward passes over sequences of up to `seq_len` tokens.
    ///
    /// # Errors
    /// When the rotary table cannot be made.
    pub fn new(checkpoint: &'a Checkpoint, seq_len: usize, kind: Kind, device: Device) -> Result<Self> {
        let attention = AttentionTables::new(checkpoint.config(), seq_len, device)?;
        Ok(Self { checkpoint, attention, kind, device })
    }

    /// The model's config.
    pub fn config(&self) -> &'a ModelConfig {
        self.checkpoint.config()
    }

    /// Kind of weights and activations.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its device.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Token ids, `[B, S]` flattened, → hidden states `[B, S, hidden]`.
    ///
    /// # Errors
    /// When the embedding cannot be read.
    pub fn embed(&self, ids: &[i64], seq_len: usize) -> Result<Tensor> {
        self.embed_rounded(ids, seq_len, BlockType::F32)
    }

    /// [`Transformer::embed`] by the embedding's rows as [`round_rows`] rounds them to blocks of type `blocks`; fp32 leaves them.
    ///
    /// # Errors
    /// When the embedding cannot be read.
    ///
    /// # Panics
    /// When rows are not whole blocks.
    pub fn embed_rounded(&self, ids: &[i64], seq_len: usize, blocks: BlockType) -> Result<Tensor> {
        let name = self.config().embedding();
        let hidden = self.config().hidden_size;
        let (rows, dtype) = self.checkpoint.rows(&name, ids.iter().map(|&id| id as usize))?;
        let size = [(ids.len() / seq_len) as i64, seq_len as i64, hidden as i64];
        let kind = tensor_kind(&name, dtype)?;
        let gathered = Tensor::f_from_data_size(&rows, &size, kind);
        let gathered = match blocks {
            BlockType::F32 => gathered,
            _ => gathered.and_then(|rows| rounded(&rows, ids, blocks)),
        };
        let gathered =
            gathered.and_then(|t| t.f_to_device(self.device)?.f_to_kind(self.kind)).torch("embed tokens")?;
        let total = gathered.numel() as u64;
        let finite = gathered.f_isfinite().and_then(|t| i64::try_from(t.f_sum(Kind::Int64)?));
        let broken = total - finite.torch("check the embedding")? as u64;
        if broken > 0 {
            let place = format!("tensor `{name}`");
            return Err(Error::NonFinite { place, count: broken, total, computed: false });
        }
        let multiplied = match self.config().embedding_multiplier {
            EmbeddingMultiplier::Exact(1.0) => Ok(gathered),
            EmbeddingMultiplier::Exact(by) => gathered.f_mul_scalar(by),
            EmbeddingMultiplier::Rounded(by) => Tensor::f_from_slice(&[by as f32])
                .and_then(|by| gathered.f_mul(&by.f_to_device(self.device)?.f_to_kind(self.kind)?)),
        };
        multiplied.torch("embed tokens")
    }

    /// The tensors of a layer beside its linears.
    ///
    /// # Errors
    /// When a tensor is missing, malformed or not finite.
    pub fn parts(&self, layer: usize) -> Result<DenseParts> {
        DenseParts::read(self.checkpoint, layer, self.device)
    }

    /// The dense weight `[N, K]` and bias `[N]` of a layer's linear, by its position.
    ///
    /// # Errors
    /// When a tensor is missing, malformed or not finite.
    pub fn weight(&self, layer: usize, position: usize, kind: Kind) -> Result<(Tensor, Option<Tensor>)> {
        let linear = &self.config().layers[layer].linears[position];
        let id = self.config().linear_id(layer, position);
        let weight = self.checkpoint.load(&id.weight(), &linear.shape, kind, self.device)?;
        Ok((weight, self.bias(layer, position, kind)?))
    }

    /// As [`Transformer::weight`], with the weight in a tensor of its shape that `empty` makes for these sizes.
    ///
    /// # Errors
    /// As for [`Transformer::weight`], and those of `empty`.
    pub fn weight_into(
        &self,
        layer: usize,
        position: usize,
        kind: Kind,
        empty: impl FnOnce(&[i64]) -> Result<Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let shape = self.config().layers[layer].linears[position].shape;
        let mut weight = empty(&shape.map(|size| size as i64))?;
        self.checkpoint.load_into(&self.config().linear_id(layer, position).weight(), &mut weight)?;
        Ok((weight, self.bias(layer, position, kind)?))
    }

    fn bias(&self, layer: usize, position: usize, kind: Kind) -> Result<Option<Tensor>> {
        let linear = &self.config().layers[layer].linears[position];
        let id = self.config().linear_id(layer, position);
        let load = || self.checkpoint.load(&id.bias(), &linear.shape[..1], kind, self.device);
        linear.bias.then(load).transpose()
    }

    /// Refuses a linear's weight that fp16 cannot hold, because readers of the quantized model compute in fp16.
    ///
    /// # Errors
    /// When the tensor is missing, not finite or beyond fp16.
    pub fn check_f16(&self, id: &LinearId) -> Result<()> {
        self.checkpoint.check_f16(&id.weight())
    }

    /// The kind a linear's weight is stored in.
    ///
    /// # Errors
    /// When the tensor is missing or of an unsupported kind.
    pub fn source_kind(&self, id: &LinearId) -> Result<Kind> {
        let view = self.checkpoint.view(&id.weight())?;
        tensor_kind(view.name, view.number_type())
    }

    /// Lets the system drop a layer's part of the memory map.
    pub fn release(&self, layer: usize) {
        self.checkpoint.release_layer(layer);
    }

    /// The inputs of each group of a stage's linears.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn inputs(
        &self,
        index: usize,
        parts: &DenseParts,
        stage: usize,
        at: &Between,
    ) -> Result<Vec<Tensor>> {
        Ok(self.routed_inputs(index, parts, stage, at)?.0)
    }

    /// The inputs of each group of a stage's linears, and the inputs of the same groups in the reference model, whose batch is
    /// `reference`. The reference model may route a token to other experts. An expert that it does not choose has this model's
    /// input in both.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn inputs_beside(
        &self,
        index: usize,
        parts: &DenseParts,
        stage: usize,
        at: &Between,
        reference: &Between,
    ) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
        let (own, routing) = self.routed_inputs(index, parts, stage, at)?;
        let Some(routing) = routing else {
            return Ok((own, self.inputs(index, parts, stage, reference)?));
        };
        let config = &self.config().layers[index];
        let x = self.feed_forward_input(config, parts, &reference.hidden)?;
        let (mut others, for_all) = if config.stages[stage].kind == StageKind::FeedForwardOutput {
            let theirs = self.routing(config, parts, &x)?.expect("a layer with experts");
            let matching = theirs.matching(&routing)?;
            let k = routing.per_token();
            let (own, other) = (rows(&at.stored[0], k)?, rows(&reference.stored[0], k)?);
            let merged = || -> Result<Tensor, TchError> {
                let missing = matching.f_lt(0)?.f_unsqueeze(1)?;
                let found = other.f_index_select(0, &matching.f_clamp_min(0)?)?;
                own.f_where_self(&missing, &found)
            };
            let merged = merged().torch("match the experts of two models")?;
            (chosen_rows(&routing, &merged, 1)?, reference.stored.get(1).map(Tensor::shallow_clone))
        } else {
            (chosen_rows(&routing, &rows(&x, 1)?, routing.per_token())?, Some(x))
        };
        others.extend(for_all.filter(|_| own.len() > routing.chosen.len()));
        Ok((own, others))
    }

    fn routed_inputs(
        &self,
        index: usize,
        parts: &DenseParts,
        stage: usize,
        at: &Between,
    ) -> Result<(Vec<Tensor>, Option<Routing>)> {
        let config = &self.config().layers[index];
        let stored = || at.stored.iter().map(Tensor::shallow_clone).collect();
        Ok(match config.stages[stage].kind {
            StageKind::AttentionInput | StageKind::ParallelInput => {
                (vec![self.normalized(parts.input.as_ref(), &at.hidden)?], None)
            }
            StageKind::AttentionOutput | StageKind::ParallelOutput => (stored(), None),
            StageKind::FeedForwardInput => {
                let x = self.feed_forward_input(config, parts, &at.hidden)?;
                let Some(routing) = self.routing(config, parts, &x)? else { return Ok((vec![x], None)) };
                let mut inputs = chosen_rows(&routing, &rows(&x, 1)?, routing.per_token())?;
                if config.feed_forward.blocks.len() > inputs.len() {
                    inputs.push(x);
                }
                (inputs, Some(routing))
            }
            StageKind::FeedForwardOutput => {
                if config.feed_forward.routing.is_none() {
                    return Ok((stored(), None));
                }
                let x = self.feed_forward_input(config, parts, &at.hidden)?;
                let routing = self.routing(config, parts, &x)?.expect("a layer with experts");
                let choices = rows(&at.stored[0], routing.per_token())?;
                let mut inputs = chosen_rows(&routing, &choices, 1)?;
                inputs.extend(at.stored.get(1).map(Tensor::shallow_clone));
                (inputs, Some(routing))
            }
        })
    }

    fn feed_forward_input(
        &self,
        config: &LayerConfig,
        parts: &DenseParts,
        hidden: &Tensor,
    ) -> Result<Tensor> {
        debug_assert!(!config.parallel, "parallel blocks read the layer's input");
        self.normalized(parts.feed_forward.as_ref(), hidden)
    }

    fn routing(&self, config: &LayerConfig, parts: &DenseParts, x: &Tensor) -> Result<Option<Routing>> {
        let (Some(routing), Some(router)) = (&config.feed_forward.routing, &parts.router) else {
            return Ok(None);
        };
        Routing::new(routing, router, &rows(x, 1)?).map(Some)
    }

    /// Runs a stage's linears, in the order of [`LayerConfig::linears`], and returns the batch in front of the next stage.
    /// With a `cache`, the batch continues the cached sequence.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn advance(
        &self,
        index: usize,
        parts: &DenseParts,
        stage: usize,
        at: Between,
        linears: &[&dyn Linear],
        cache: Option<&mut KvCache>,
    ) -> Result<Between> {
        let config = &self.config().layers[index];
        let (inputs, routing) = self.routed_inputs(index, parts, stage, &at)?;
        let stage = &config.stages[stage];
        let first = stage.linears().start;
        let mut outputs = Vec::with_capacity(linears.len());
        for (group, x) in stage.groups.iter().zip(&inputs) {
            for position in group.linears.clone() {
                let linear = linears[position - first];
                outputs.push(match x.size()[0] {
                    // An expert that no token goes through.
                    0 => self.nothing(config.linears[position].shape[0])?,
                    _ => linear.forward(x)?,
                });
            }
        }
        let attention = self.attention.of(&config.attention, parts.qk_norms.as_ref());
        let attend = |outputs: &[Tensor]| match cache {
            Some(cache) => attention.forward_cached(outputs, cache),
            None => attention.forward(outputs),
        };
        let blocks = &config.feed_forward.blocks;
        Ok(match stage.kind {
            StageKind::AttentionInput => Between { hidden: at.hidden, stored: vec![attend(&outputs)?] },
            StageKind::AttentionOutput => {
                let norm = parts.attention_output.as_ref();
                Between::entering(self.add_output(config, norm, &at.hidden, &outputs[0])?)
            }
            StageKind::FeedForwardInput => {
                let groups = stage.groups.iter().zip(blocks);
                let activated = groups.map(|(group, block)| {
                    activated(block, &outputs[group.linears.start - first..group.linears.end - first])
                });
                let activated = activated.collect::<Result<Vec<_>>>()?;
                let stored = match routing {
                    Some(routing) => self.by_choice(&routing, activated, &at.hidden)?,
                    None => activated,
                };
                Between { hidden: at.hidden, stored }
            }
            StageKind::FeedForwardOutput => {
                let output = match routing {
                    Some(routing) => self.mixed(config, parts, &routing, &outputs, &at.hidden)?,
                    None => outputs.swap_remove(0),
                };
                let norm = parts.feed_forward_output.as_ref();
                Between::entering(self.add_output(config, norm, &at.hidden, &output)?)
            }
            StageKind::ParallelInput => {
                let after = config.projections().end;
                let stored = vec![attend(&outputs[..after])?, activated(&blocks[0], &outputs[after..])?];
                Between { hidden: at.hidden, stored }
            }
            StageKind::ParallelOutput => {
                let mut hidden = at.hidden;
                for output in &outputs {
                    hidden = self.add_output(config, None, &hidden, output)?;
                }
                Between::entering(hidden)
            }
        })
    }

    /// Outputs for no tokens.
    fn nothing(&self, features: usize) -> Result<Tensor> {
        Tensor::f_zeros([0, features as i64], (self.kind, self.device)).torch("allocate an output")
    }

    /// Adds a block's output to the residual stream, after its norm if it has one.
    fn add_output(
        &self,
        config: &LayerConfig,
        norm: Option<&Norm>,
        hidden: &Tensor,
        output: &Tensor,
    ) -> Result<Tensor> {
        let output = self.normalized(norm, output)?;
        let added = match config.residual_multiplier {
            1.0 => hidden.f_add(&output),
            by => output.f_mul_scalar(by).and_then(|output| hidden.f_add(&output)),
        };
        added.torch("add to the residual stream")
    }

    /// Rows of experts `[T_e, width]` → `[B, S, k·width]`, each at the choice that it belongs to; then the rows of the shared
    /// block, if there is one.
    fn by_choice(
        &self,
        routing: &Routing,
        mut activated: Vec<Tensor>,
        hidden: &Tensor,
    ) -> Result<Vec<Tensor>> {
        let (size, k) = (hidden.size(), routing.per_token());
        let shared = activated.split_off(routing.chosen.len());
        let width = activated[0].size()[1];
        let put = || -> Result<Tensor, TchError> {
            let mut all = Tensor::f_zeros([size[0] * size[1] * k, width], (self.kind, self.device))?;
            for (chosen, rows) in routing.chosen.iter().zip(&activated) {
                all = all.f_index_copy(0, chosen, rows)?;
            }
            all.f_view([size[0], size[1], k * width])
        };
        Ok(std::iter::once(put().torch("collect the experts' rows")?).chain(shared).collect())
    }

    /// The weighted sum of the experts' outputs, plus the gated output of the shared block if there is one.
    fn mixed(
        &self,
        config: &LayerConfig,
        parts: &DenseParts,
        routing: &Routing,
        outputs: &[Tensor],
        hidden: &Tensor,
    ) -> Result<Tensor> {
        let (size, k) = (hidden.size(), routing.per_token());
        let add = || -> Result<Tensor, TchError> {
            let mut sum = Tensor::f_zeros([size[0] * size[1], size[2]], (Kind::Float, self.device))?;
            for (chosen, rows) in routing.chosen.iter().zip(outputs) {
                let weights = routing.weights.f_index_select(0, chosen)?.f_unsqueeze(1)?;
                let token = chosen.f_div_scalar_mode(k, "floor")?;
                sum = sum.f_index_add(0, &token, &rows.f_to_kind(Kind::Float)?.f_mul(&weights)?)?;
            }
            sum.f_view(&size[..])?.f_to_kind(self.kind)
        };
        let sum = add().torch("add experts")?;
        let shared = outputs.get(routing.chosen.len());
        let (Some(gate), Some(shared)) = (&parts.shared_gate, shared) else { return Ok(sum) };
        let x = self.feed_forward_input(config, parts, hidden)?;
        let gated = || {
            let gate = x.f_linear(&gate.f_to_kind(self.kind)?, None::<&Tensor>)?.f_sigmoid()?;
            sum.f_add(&shared.f_mul(&gate)?)
        };
        gated().torch("add the block that all tokens go through")
    }

    /// Applies a norm if there is one.
    fn normalized(&self, norm: Option<&Norm>, x: &Tensor) -> Result<Tensor> {
        match norm {
            Some(norm) => norm.apply(x, self.kind),
            None => Ok(x.shallow_clone()),
        }
    }

    /// Runs a whole layer: hidden states `[B, S, hidden]` → the next ones. With the layer's `cache` `B` is 1. The tokens follow
    /// the cached ones and are added to the cache; `S` is 1 unless the cache is empty.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn forward(
        &self,
        layer: &Layer<'_>,
        hidden: &Tensor,
        mut cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let mut at = Between::entering(hidden.shallow_clone());
        let stages = &self.config().layers[layer.index].stages;
        for (position, stage) in stages.iter().enumerate() {
            let linears: Vec<&dyn Linear> = layer.linears[stage.linears()].iter().map(|l| &**l).collect();
            let cache = if position == 0 { cache.take() } else { None };
            at = self.advance(layer.index, &layer.parts, position, at, &linears, cache)?;
        }
        Ok(at.hidden)
    }

    /// An empty cache of a layer for `capacity` tokens.
    ///
    /// # Errors
    /// When memory is exhausted.
    pub fn cache(&self, layer: usize, capacity: usize) -> Result<KvCache> {
        KvCache::new(&self.config().layers[layer].attention, capacity, self.kind, self.device)
    }

    /// The last norm, and the output layer `[vocab, hidden]` in `kind`.
    ///
    /// # Errors
    /// When a tensor is missing, malformed or not finite, or a tied output layer is stored and is another one.
    pub fn head(&self, kind: Kind) -> Result<(Norm, Dense)> {
        self.checkpoint.check_tied()?;
        let config = self.config();
        let norm = Norm::read(self.checkpoint, &config.final_norm, &config.prefix, self.device)?;
        let shape = [config.vocab_size, config.hidden_size];
        let weight = self.checkpoint.load(&config.output_layer(), &shape, kind, self.device)?;
        Ok((norm, Dense::new(weight, None)))
    }
}

/// The rows of each expert: of `x` `[T·k, …]`, or of `x` `[T, …]` with `per_row` = `k` choices for each row.
fn chosen_rows(routing: &Routing, x: &Tensor, per_row: i64) -> Result<Vec<Tensor>> {
    let of = |chosen: &Tensor| {
        let rows = chosen.f_div_scalar_mode(per_row, "floor").and_then(|row| x.f_index_select(0, &row));
        rows.torch("gather an expert's tokens")
    };
    routing.chosen.iter().map(of).collect()
}

/// `[B, S, k·width]` → `[B·S·k, width]`.
fn rows(x: &Tensor, k: i64) -> Result<Tensor> {
    let width = x.size().last().copied().unwrap_or_default() / k;
    x.f_reshape([-1, width]).torch("lay out tokens")
}

/// The kind that a checkpoint's first linear is stored in; the others are expected to be of the same kind.
///
/// # Errors
/// When the tensor is missing or of an unsupported kind.
pub fn source_kind(checkpoint: &Checkpoint) -> Result<Kind> {
    let name = checkpoint.config().linear_id(0, 0).weight();
    tensor_kind(&name, checkpoint.view(&name)?.number_type())
}

/// The rows of `ids` `[B, S, hidden]` rounded to blocks, in fp32. Files are rounded from fp16.
fn rounded(rows: &Tensor, ids: &[i64], blocks: BlockType) -> Result<Tensor, TchError> {
    let size = rows.size();
    let width = size[size.len() - 1] as usize;
    let rows = rows.f_to_kind(Kind::Half)?.f_to_kind(Kind::Float)?.f_flatten(0, -1)?;
    let mut rows = Vec::<f32>::try_from(rows)?;
    // Most tokens occur many times.
    let mut first: HashMap<i64, usize> = HashMap::new();
    for (at, &id) in ids.iter().enumerate() {
        first.entry(id).or_insert(at);
    }
    let mut places: Vec<usize> = first.values().copied().collect();
    places.sort_unstable();
    let distinct: Vec<f32> = places.iter().flat_map(|&at| rows[at * width..][..width].to_vec()).collect();
    let mut decoded = vec![0.0; distinct.len()];
    blocks.decode(&round_rows(blocks, &distinct, width, None), &mut decoded);
    let place: HashMap<i64, usize> = places.iter().enumerate().map(|(i, &at)| (ids[at], i)).collect();
    for (row, id) in rows.chunks_mut(width).zip(ids) {
        row.copy_from_slice(&decoded[place[id] * width..][..width]);
    }
    Tensor::f_from_slice(&rows)?.f_view(&size[..])
}

/// The kind of the embedding, which is unquantized in every checkpoint.
///
/// # Errors
/// When the tensor is missing or of an unsupported kind.
pub(super) fn embedding_kind(checkpoint: &Checkpoint) -> Result<Kind> {
    let name = checkpoint.config().embedding();
    tensor_kind(&name, checkpoint.view(&name)?.number_type())
}

/// libtorch's name of a tensor's dtype.
fn tensor_kind(name: &str, dtype: Dtype) -> Result<Kind> {
    match dtype {
        Dtype::F16 => Ok(Kind::Half),
        Dtype::BF16 => Ok(Kind::BFloat16),
        Dtype::F32 => Ok(Kind::Float),
        other => Err(Error::TensorDtype {
            name: name.to_owned(),
            expected: "F16, BF16 or F32",
            found: format!("{other:?}"),
        }),
    }
}
