//! Causal attention through libtorch's fused kernel: over whole sequences, or token by token with a cache.

use tch::{Device, Kind, TchError, Tensor};

use super::rope::RopeTable;
use crate::{
    checkpoint::LlamaConfig,
    error::{Error, Result, TorchContext},
};

/// Heads, positions and the window of one model.
#[derive(Debug)]
pub(super) struct Attention {
    rope: RopeTable,
    num_heads: i64,
    num_kv_heads: i64,
    head_dim: i64,
    /// `[S, S]` bool, true where a token may look; only for sequences longer than a sliding window.
    mask: Option<Tensor>,
    /// Tokens that a token sees, itself included; `None`: all before it.
    window: Option<i64>,
}

/// Keys and values of one layer for the tokens of one sequence so far.
#[derive(Debug)]
pub struct KvCache {
    /// `[1, kv_heads, capacity, head_dim]`, the keys rotated; valid up to `len`.
    keys: Tensor,
    values: Tensor,
    len: i64,
}

impl Attention {
    /// An empty cache for `capacity` tokens.
    pub(super) fn cache(&self, capacity: usize, kind: Kind, device: Device) -> Result<KvCache> {
        let size = [1, self.num_kv_heads, capacity as i64, self.head_dim];
        let zeros = || Tensor::f_zeros(size, (kind, device)).torch("allocate a key-value cache");
        Ok(KvCache { keys: zeros()?, values: zeros()?, len: 0 })
    }

    pub(super) fn new(config: &LlamaConfig, seq_len: usize, device: Device) -> Result<Self> {
        let mask = match config.sliding_window {
            Some(window) if window < seq_len && config.mixed_windows => {
                return Err(Error::Value {
                    what: "sequence length".into(),
                    expected: format!("at most sliding_window {window}, which only some layers have"),
                    found: seq_len.to_string(),
                });
            }
            Some(window) if window < seq_len => {
                let s = seq_len as i64;
                let mask = Tensor::f_ones([s, s], (Kind::Bool, device))
                    .and_then(|ones| ones.f_tril(0)?.f_triu(1 - window as i64));
                Some(mask.torch("make the attention mask")?)
            }
            _ => None,
        };
        Ok(Self {
            rope: RopeTable::new(&config.rope, config.head_dim, seq_len, device)?,
            num_heads: config.num_heads as i64,
            num_kv_heads: config.num_kv_heads as i64,
            head_dim: config.head_dim as i64,
            mask,
            window: config.sliding_window.filter(|_| !config.mixed_windows).map(|window| window as i64),
        })
    }

    /// `q` `[B, S, heads·d]`, `k` and `v` `[B, S, kv_heads·d]` → `[B, S, heads·d]`.
    pub(super) fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let attend = || {
            let q = self.rope.rotate(&self.split(q, self.num_heads)?, 0)?;
            let k = self.rope.rotate(&self.split(k, self.num_kv_heads)?, 0)?;
            self.attend(&q, k, self.split(v, self.num_kv_heads)?)
        };
        attend().torch("compute attention")
    }

    /// The same for the tokens that follow those in `cache`, `B` = 1, which takes them up. More than one only while the
    /// cache is empty.
    pub(super) fn forward_cached(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        let (first, count) = (cache.len, q.size()[1]);
        assert!(first == 0 || count == 1, "a prompt goes first, as a whole");
        let attend = || {
            let q = self.rope.rotate(&self.split(q, self.num_heads)?, first)?;
            let k = self.rope.rotate(&self.split(k, self.num_kv_heads)?, first)?;
            let v = self.split(v, self.num_kv_heads)?;
            cache.keys.f_narrow(2, first, count)?.f_copy_(&k)?;
            cache.values.f_narrow(2, first, count)?.f_copy_(&v)?;
            if first == 0 {
                return self.attend(&q, k, v);
            }
            let seen = self.window.unwrap_or(i64::MAX).min(first + 1);
            let last = |x: &Tensor| x.f_narrow(2, first + 1 - seen, seen);
            self.fused(&q, last(&cache.keys)?, last(&cache.values)?, None, false)
        };
        let output = attend().torch("compute attention")?;
        cache.len += count;
        Ok(output)
    }

    /// `[B, S, n·d]` → `[B, n, S, d]`.
    fn split(&self, x: &Tensor, n: i64) -> Result<Tensor, TchError> {
        let size = x.size();
        x.f_view([size[0], size[1], n, self.head_dim])?.f_transpose(1, 2)
    }

    /// A whole sequence from position 0.
    fn attend(&self, q: &Tensor, k: Tensor, v: Tensor) -> Result<Tensor, TchError> {
        let s = q.size()[2];
        let mask = match &self.mask {
            Some(mask) => Some(mask.f_narrow(0, 0, s)?.f_narrow(1, 0, s)?),
            None => None,
        };
        let causal = mask.is_none();
        self.fused(q, k, v, mask.as_ref(), causal)
    }

    fn fused(
        &self,
        q: &Tensor,
        k: Tensor,
        v: Tensor,
        mask: Option<&Tensor>,
        causal: bool,
    ) -> Result<Tensor, TchError> {
        let (k, v) = (self.repeat(k)?, self.repeat(v)?);
        let out = Tensor::f_scaled_dot_product_attention(q, &k, &v, mask, 0.0, causal, None, false)?;
        let size = out.size();
        out.f_transpose(1, 2)?.f_reshape([size[0], size[2], self.num_heads * self.head_dim])
    }

    /// Grouped-query attention: each key and value head serves `heads/kv_heads` query heads.
    fn repeat(&self, x: Tensor) -> Result<Tensor, TchError> {
        match self.num_heads / self.num_kv_heads {
            1 => Ok(x),
            times => x.f_repeat_interleave_self_int(times, 1, None),
        }
    }
}
