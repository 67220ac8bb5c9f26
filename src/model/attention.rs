//! Causal attention: over whole sequences, or token by token with a cache. It uses libtorch's fused kernel, except for scores
//! with a softcap, which the kernel does not support.

use tch::{Device, Kind, TchError, Tensor};

use super::{parts::Norm, rope::RopeTable};
use crate::{
    architectures::{AttentionConfig, ModelConfig, RopeConfig},
    error::{Result, TorchContext},
};

/// Rotary tables and masks of a model; layers with the same configuration share one.
#[derive(Debug)]
pub(super) struct AttentionTables {
    ropes: Vec<(RopeConfig, RopeTable)>,
    /// By window: `[S, S]` bool, true where a token attends; only for sequences longer than the window.
    masks: Vec<(usize, Tensor)>,
    /// The same for layers without a window but with a softcap.
    causal: Option<Tensor>,
}

/// Attention of one layer.
pub(super) struct Attention<'a> {
    config: &'a AttentionConfig,
    qk_norms: Option<&'a [Norm; 2]>,
    rope: Option<&'a RopeTable>,
    mask: Option<&'a Tensor>,
}

/// Keys and values of one layer for the tokens of one sequence so far.
#[derive(Debug)]
pub struct KvCache {
    /// `[1, kv_heads, capacity, head_dim]`, the keys rotated; valid up to `len`.
    keys: Tensor,
    values: Tensor,
    len: i64,
}

impl KvCache {
    /// An empty cache for `capacity` tokens.
    pub(super) fn new(config: &AttentionConfig, capacity: usize, kind: Kind, device: Device) -> Result<Self> {
        let size = [1, config.num_kv_heads as i64, capacity as i64, config.head_dim as i64];
        let zeros = || Tensor::f_zeros(size, (kind, device)).torch("allocate a key-value cache");
        Ok(Self { keys: zeros()?, values: zeros()?, len: 0 })
    }
}

impl AttentionTables {
    pub(super) fn new(config: &ModelConfig, seq_len: usize, device: Device) -> Result<Self> {
        let mut tables = Self { ropes: Vec::new(), masks: Vec::new(), causal: None };
        let s = seq_len as i64;
        let causal = || Tensor::f_ones([s, s], (Kind::Bool, device)).and_then(|ones| ones.f_tril(0));
        for attention in config.layers.iter().map(|layer| &layer.attention) {
            if let Some(rope) = &attention.rope
                && !tables.ropes.iter().any(|(known, _)| known == rope)
            {
                tables.ropes.push((rope.clone(), RopeTable::new(rope, seq_len, device)?));
            }
            match attention.window.filter(|&window| window < seq_len) {
                Some(window) if !tables.masks.iter().any(|(known, _)| *known == window) => {
                    let mask = causal().and_then(|mask| mask.f_triu(1 - window as i64));
                    tables.masks.push((window, mask.torch("make the attention mask")?));
                }
                Some(_) => {}
                None if attention.softcap.is_some() && tables.causal.is_none() => {
                    tables.causal = Some(causal().torch("make the attention mask")?);
                }
                None => {}
            }
        }
        Ok(tables)
    }

    /// Attention of a layer, with its norms of q and k.
    pub(super) fn of<'a>(
        &'a self,
        config: &'a AttentionConfig,
        qk_norms: Option<&'a [Norm; 2]>,
    ) -> Attention<'a> {
        let rope = config.rope.as_ref();
        let rope = rope.and_then(|rope| self.ropes.iter().find(|(known, _)| known == rope));
        let mask = config.window.and_then(|window| self.masks.iter().find(|(known, _)| *known == window));
        let causal = self.causal.as_ref().filter(|_| config.softcap.is_some());
        let mask = mask.map(|(_, mask)| mask).or(causal);
        Attention { config, qk_norms, rope: rope.map(|(_, table)| table), mask }
    }
}

impl Attention<'_> {
    /// Outputs of the projections `[B, S, …]` → inputs of the output projection `[B, S, heads·d]`.
    pub(super) fn forward(&self, outputs: &[Tensor]) -> Result<Tensor> {
        let attend = || {
            let [q, k, v] = self.heads(outputs, 0)?;
            self.attend(&q, k, v)
        };
        attend().torch("compute attention")
    }

    /// As [`Attention::forward`] for the tokens that follow the cached ones, `B` = 1; their keys and values are added to the
    /// cache. `S` is 1 unless the cache is empty.
    pub(super) fn forward_cached(&self, outputs: &[Tensor], cache: &mut KvCache) -> Result<Tensor> {
        let (first, count) = (cache.len, outputs[0].size()[1]);
        assert!(first == 0 || count == 1, "a prompt goes first, as a whole");
        let attend = || {
            let [q, k, v] = self.heads(outputs, first)?;
            cache.keys.f_narrow(2, first, count)?.f_copy_(&k)?;
            cache.values.f_narrow(2, first, count)?.f_copy_(&v)?;
            if first == 0 {
                return self.attend(&q, k, v);
            }
            let seen = self.config.window.map_or(i64::MAX, |window| window as i64).min(first + 1);
            let last = |x: &Tensor| x.f_narrow(2, first + 1 - seen, seen);
            self.attention(&q, last(&cache.keys)?, last(&cache.values)?, None, false)
        };
        let output = attend().torch("compute attention")?;
        cache.len += count;
        Ok(output)
    }

    /// q, k and v by heads, `[B, heads, S, head_dim]`, q and k normalized and rotated from position `first` on.
    fn heads(&self, outputs: &[Tensor], first: i64) -> Result<[Tensor; 3], TchError> {
        let (width, kv) = (self.config.width() as i64, self.config.kv_width() as i64);
        let split = |part: &Tensor| -> Result<[Tensor; 3], TchError> {
            Ok([part.f_narrow(2, 0, width)?, part.f_narrow(2, width, kv)?, part.f_narrow(2, width + kv, kv)?])
        };
        let [q, k, v] = match outputs {
            [q, k, v] => [q.shallow_clone(), k.shallow_clone(), v.shallow_clone()],
            [fused] => split(fused)?,
            _ => unreachable!("a layer has three projections or one"),
        };
        let (heads, kv_heads) = (self.config.num_heads as i64, self.config.num_kv_heads as i64);
        let [q_norm, k_norm] = match self.qk_norms {
            Some([q, k]) => [Some(q), Some(k)],
            None => [None, None],
        };
        let rotated = |x: &Tensor, norm: Option<&Norm>, heads: i64| {
            let x = self.normalized(x, norm, heads)?;
            match self.rope {
                Some(rope) => rope.rotate(&x, first),
                None => Ok(x),
            }
        };
        Ok([rotated(&q, q_norm, heads)?, rotated(&k, k_norm, kv_heads)?, self.split(&v, kv_heads)?])
    }

    /// `[B, S, n·d]` → `[B, n, S, d]`, normalized over each head or over all of them.
    fn normalized(&self, x: &Tensor, norm: Option<&Norm>, heads: i64) -> Result<Tensor, TchError> {
        let Some(norm) = norm else { return self.split(x, heads) };
        let apply = |x: &Tensor| {
            let failed = |error: crate::error::Error| TchError::Torch(error.to_string());
            norm.apply(x, x.kind()).map_err(failed)
        };
        let size = x.size();
        if norm.features() == size[2] && heads > 1 {
            return self.split(&apply(x)?, heads);
        }
        let by_head = x.f_reshape([size[0], size[1], heads, self.config.head_dim as i64])?;
        apply(&by_head)?.f_transpose(1, 2)
    }

    /// `[B, S, n·d]` → `[B, n, S, d]`.
    fn split(&self, x: &Tensor, n: i64) -> Result<Tensor, TchError> {
        let size = x.size();
        x.f_reshape([size[0], size[1], n, self.config.head_dim as i64])?.f_transpose(1, 2)
    }

    /// A whole sequence from position 0.
    fn attend(&self, q: &Tensor, k: Tensor, v: Tensor) -> Result<Tensor, TchError> {
        let s = q.size()[2];
        let mask = match self.mask {
            Some(mask) => Some(mask.f_narrow(0, 0, s)?.f_narrow(1, 0, s)?),
            None => None,
        };
        let causal = mask.is_none();
        self.attention(q, k, v, mask.as_ref(), causal)
    }

    fn attention(
        &self,
        q: &Tensor,
        k: Tensor,
        v: Tensor,
        mask: Option<&Tensor>,
        causal: bool,
    ) -> Result<Tensor, TchError> {
        let (k, v) = (self.repeat(k)?, self.repeat(v)?);
        let usual = (self.config.head_dim as f64).powf(-0.5);
        let out = match self.config.softcap {
            None if q.requires_grad() && q.device().is_cuda() => self.by_products(q, &k, &v, mask, causal)?,
            Some(cap) => {
                let scores = q.f_matmul(&k.f_transpose(2, 3)?)?.f_mul_scalar(self.config.scale)?;
                let mut scores = scores.f_div_scalar(cap)?.f_tanh()?.f_mul_scalar(cap)?;
                if let Some(mask) = mask {
                    scores = scores.f_masked_fill(&mask.f_logical_not()?, f64::NEG_INFINITY)?;
                }
                scores.f_softmax(-1, Kind::Float)?.f_to_kind(v.kind())?.f_matmul(&v)?
            }
            None => {
                let scale = (self.config.scale != usual).then_some(self.config.scale);
                Tensor::f_scaled_dot_product_attention(q, &k, &v, mask, 0.0, causal, scale, false)?
            }
        };
        let size = out.size();
        out.f_transpose(1, 2)?.f_reshape([size[0], size[2], self.config.width() as i64])
    }

    /// Attention as products and a softmax. On CUDA the fused kernel's backward pass adds in any order, so that two runs differ;
    /// that of products does not. It keeps the scores of all heads, `heads · S²` values a window, for the backward pass.
    fn by_products(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        mask: Option<&Tensor>,
        causal: bool,
    ) -> Result<Tensor, TchError> {
        let mut scores = q.f_matmul(&k.f_transpose(2, 3)?)?.f_mul_scalar(self.config.scale)?;
        let future = match mask {
            Some(mask) => Some(mask.f_logical_not()?),
            None if causal => {
                let s = q.size()[2];
                Some(Tensor::f_ones([s, s], (Kind::Bool, q.device()))?.f_triu(1)?)
            }
            None => None,
        };
        if let Some(future) = future {
            scores = scores.f_masked_fill(&future, f64::NEG_INFINITY)?;
        }
        scores.f_softmax(-1, Kind::Float)?.f_to_kind(v.kind())?.f_matmul(v)
    }

    /// Grouped-query attention: each key and value head serves `heads/kv_heads` query heads. Expanded, not repeated by index: the
    /// backward pass is then a sum in a fixed order.
    fn repeat(&self, x: Tensor) -> Result<Tensor, TchError> {
        let times = (self.config.num_heads / self.config.num_kv_heads) as i64;
        if times == 1 {
            return Ok(x);
        }
        let [b, heads, s, d] = x.size()[..] else { unreachable!("heads have four dimensions") };
        x.f_unsqueeze(2)?.f_expand([b, heads, times, s, d], false)?.f_reshape([b, heads * times, s, d])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architectures::tests::{parse, small_config};

    /// The way that gradients take on CUDA computes the same as the fused kernel, forward and backward.
    #[test]
    fn attention_by_products_is_attention() {
        tch::manual_seed(1);
        let config = parse(&small_config()).unwrap();
        let attention =
            Attention { config: &config.layers[0].attention, qk_norms: None, rope: None, mask: None };
        let (heads, d, s) = (attention.config.num_heads as i64, attention.config.head_dim as i64, 12);
        let random = || Tensor::randn([2, heads, s, d], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let [q, k, v] = [random(), random(), random()];
        let window = Tensor::ones([s, s], (Kind::Bool, Device::Cpu)).tril(0).triu(-3);
        for (mask, causal) in [(None, true), (Some(&window), false), (None, false)] {
            let scale = attention.config.scale;
            let fused = Tensor::scaled_dot_product_attention(&q, &k, &v, mask, 0.0, causal, scale, false);
            let own = attention.by_products(&q, &k, &v, mask, causal).unwrap();
            let gradients = |out: &Tensor| {
                let sum = (out * out).sum(Kind::Float);
                Tensor::run_backward(&[&sum], &[&q, &k, &v], false, false)
            };
            let pairs = gradients(&fused).into_iter().zip(gradients(&own));
            for (expected, found) in pairs.chain([(fused, own)]) {
                assert!((expected - found).abs().max().double_value(&[]) < 1e-4, "{causal}");
            }
        }
    }
}
