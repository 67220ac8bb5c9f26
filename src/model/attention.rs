//! Causal attention over whole sequences from position 0, through libtorch's fused kernel.

use tch::{Device, Kind, Tensor};

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
}

impl Attention {
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
        })
    }

    /// `q` `[B, S, heads·d]`, `k` and `v` `[B, S, kv_heads·d]` → `[B, S, heads·d]`.
    pub(super) fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let attend = || -> Result<Tensor, tch::TchError> {
            let (batch, seq_len) = (q.size()[0], q.size()[1]);
            let heads = |x: &Tensor, n: i64| x.f_view([batch, seq_len, n, self.head_dim])?.f_transpose(1, 2);
            let q = self.rope.rotate(&heads(q, self.num_heads)?)?;
            let k = self.repeat(self.rope.rotate(&heads(k, self.num_kv_heads)?)?)?;
            let v = self.repeat(heads(v, self.num_kv_heads)?)?;
            let causal = self.mask.is_none();
            let out = Tensor::f_scaled_dot_product_attention(
                &q,
                &k,
                &v,
                self.mask.as_ref(),
                0.0,
                causal,
                None,
                false,
            )?;
            out.f_transpose(1, 2)?.f_reshape([batch, seq_len, self.num_heads * self.head_dim])
        };
        attend().torch("compute attention")
    }

    /// Grouped-query attention: each key and value head serves `heads/kv_heads` query heads.
    fn repeat(&self, x: Tensor) -> Result<Tensor, tch::TchError> {
        match self.num_heads / self.num_kv_heads {
            1 => Ok(x),
            times => x.f_repeat_interleave_self_int(times, 1, None),
        }
    }
}
